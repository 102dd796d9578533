"""Whatever goes wrong in an upload, and wherever: nothing is lost, the server ends up with the bytes, the call told the truth.

Ten faults at each point of an upload: which of its requests, and how far that had come (tests/servers/fault_proxy.py). Every
case is a file of its own, all are written at the same time, and each upload is spoiled once. How many requests an upload takes
is counted first.

FAULTS=all has seven points in each request, for a new file and for one that replaces another. Over Apache that is at least 20
points for each kind of upload: 21 where it is put straight, 28 and 35 where it goes to a name beside its own. Else it is a
sample: four points in a request, over Apache about half of them for the one, half for the other, and of the straight uploads
only the PUT. NBMOUNTD_TEST_SERVERS="nginx rclone", or "all", plays it over those servers.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest

from tests.mounted.conftest import OTHER_SERVERS, asked_for, webdav_mount
from tests.mounted.crash_loop import UNFINISHED
from tests.mounted.harness import Daemon, daemon_over
from tests.mounted.kernel import listed
from tests.servers.fault_proxy import ALL_PHASES, ALSO_FAIL, KINDS, PHASES, FaultProxy

EVERYTHING = os.environ.get("FAULTS") == "all"
ATOMIC = ("apache", "nginx", "lighttpd")
"""Where a PUT that is cut leaves the old content, so that small files are put straight."""
NAME = "data.bin"
LONG_AGO = 1_234_567_890
SAID = (errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EDQUOT)
"""What an fsync or a close that waits for the remote may say when it cannot be told yet that the bytes are there."""


@dataclass(frozen=True)
class Case:
    """One spoiled upload."""

    kind: str
    request: int
    phase: int
    replaces: bool

    @property
    def directory(self) -> str:
        return f"{self.kind}-{self.request}-{self.phase}-{'replaces' if self.replaces else 'new'}"

    @property
    def refuses_to_clear_up(self) -> bool:
        return self.kind.isdigit() and ALSO_FAIL.get(self.phase, 0) > 1

    @property
    def content(self) -> bytes:
        return f"{self.directory} as it must arrive. ".encode() * (1000 + 100 * self.request)


def cases(requests: dict[bool, int], *, whole: bool, first_only: bool) -> list[Case]:
    """`requests` of an upload, by whether it replaces. `whole`: each point for both, as far as both have it."""
    found = []
    phases = ALL_PHASES if EVERYTHING else PHASES
    for kind, request, phase in product(KINDS, range(1, (1 if first_only else max(requests.values())) + 1), phases):
        has = [replaces for replaces in (False, True) if request <= requests[replaces]]
        found += [Case(kind, request, phase, replaces) for replaces in (has if whole else [has[(request + phase) % len(has)]])]
    return found


@dataclass(frozen=True)
class Share:
    """A share with a directory for each case, and with what is to be replaced; its mount, and how the proxy sees it."""

    root: Path
    mount: Path
    proxy: FaultProxy
    cases: list[Case] = field(default_factory=list)


def make(root: Path, cases: list[Case]) -> None:
    for case in cases:
        (root / case.directory).mkdir(parents=True)
        if case.replaces:
            old = root / case.directory / NAME
            old.write_bytes(b"what was there before")
            os.utime(old, (LONG_AGO, LONG_AGO))  # else Apache calls its ETag a weak one


def write(path: Path, content: bytes) -> int | None:
    """As a careful program does: write, fsync, close. The errno that the last two ended with, if any."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    half = len(content) // 2
    assert os.write(fd, content[:half]) + os.write(fd, content[half:]) == len(content)
    said = None
    for call in (os.fsync, os.close):
        try:
            call(fd)
        except OSError as exc:
            said = exc.errno
    return said


def assert_all_arrived(daemon: Daemon, share: Share) -> None:
    """Nothing is left to do, nothing is parked or in conflict, and both sides have the bytes under the name, and no other.

    Where the server refused three times in a row, it refused to clear up as well: then a hidden name stays there for a day.
    """
    daemon.sync(share.mount, timeout=140)
    wrong = []
    for case in share.cases:
        here, there = share.mount / case.directory, share.root / case.directory
        kept = [name for name in listed(there) if not (case.refuses_to_clear_up and name.startswith(UNFINISHED))]
        if (names := (sorted(os.listdir(here)), kept)) != ([NAME], [NAME]):
            wrong.append(f"{case.directory}: {names[0]} here, {names[1]} on the server")
        elif (there / NAME).read_bytes() != case.content:
            wrong.append(f"{case.directory}: other bytes on the server")
        elif (here / NAME).read_bytes() != case.content:
            wrong.append(f"{case.directory}: other bytes in the mount")
        elif case.directory not in share.proxy.fired:
            wrong.append(f"{case.directory}: nothing was spoiled in {share.proxy.seen[case.directory]} requests")
    assert not wrong, wrong
    status = daemon.status(share.mount.name)
    assert (status.unsent_files, status.parked, status.conflicts) == (0, 0, 0)


def requests_of_an_upload(daemon: Daemon, share: Share) -> dict[bool, int]:
    """How many requests for its name an upload takes, by whether it replaces something."""
    counted = [Case("000", 0, 0, replaces) for replaces in (False, True)]
    make(share.root, counted)
    daemon.refresh(share.mount)
    for case in counted:
        os.listdir(share.mount / case.directory)
    share.proxy.arm()
    for case in counted:
        write(share.mount / case.directory / NAME, case.content)
    daemon.sync(share.mount)
    share.proxy.disarm()
    return {case.replaces: share.proxy.seen[case.directory] for case in counted}


@pytest.fixture(params=asked_for("apache", "nextcloud"))
def shares(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Daemon, list[Share]]]:
    """The daemon, and the shares: one, and over some servers a first one that is put to straight. The close of the last one
    waits. With Nextcloud's way there is no name beside."""
    kind: str = request.param
    special: dict[str, dict[str, object]] = {"beside": {"durability": "close"}}
    if kind in ATOMIC:
        special = {"straight": {}, "beside": {"durability": "close", "atomic_replace": False}}
    with ExitStack() as stack:
        if kind == "apache":
            server = request.getfixturevalue("apache_server")
        else:
            server = stack.enter_context(OTHER_SERVERS[kind](tmp_path / "root", tmp_path / "work"))
        proxies = {name: stack.enter_context(FaultProxy(server.port)) for name in special}
        mounts = {}
        for name, proxy in proxies.items():
            (server.root / name).mkdir()
            url = f"http://127.0.0.1:{proxy.port}{server.prefix}{name}/"
            keys = {"url": url, "request_timeout": 1.0, "connections": 16, "freshness": 3600.0, "write_back_delay": 0.1}
            mounts[name] = {**webdav_mount(server), **keys, **special[name]}
        daemon = stack.enter_context(daemon_over(mounts))
        shares = [Share(server.root / name, daemon.path(name), proxies[name]) for name in mounts]
        for share in shares:
            counts = requests_of_an_upload(daemon, share)
            first_only = share.mount.name == "straight" and not EVERYTHING
            share.cases.extend(cases(counts, whole=EVERYTHING or kind == "nextcloud", first_only=first_only))
            requests = f"{counts[False]} requests of a new file, {counts[True]} of an overwrite"
            print(f"{kind}, {share.mount.name}: {requests}; {len(share.cases)} spoiled uploads")
            make(share.root, share.cases)
            daemon.refresh(share.mount)
            for case in share.cases:
                os.listdir(share.mount / case.directory)
            share.proxy.arm()
        yield daemon, shares


@pytest.mark.timeout(900 if EVERYTHING else 300)
@pytest.mark.expects_log("the remote is|will try again|parked")
def test_a_spoiled_upload_arrives_all_the_same_and_no_call_lies(shares: tuple[Daemon, list[Share]]) -> None:
    """With durability "local" write, fsync and close are done at once, and their promise is kept here. With "close", a close
    that returns says that the server has it now; one that cannot know says so, and the bytes arrive later all the same."""
    daemon, (*straight, beside) = shares

    def close_waits(case: Case) -> str | None:
        number = write(beside.mount / case.directory / NAME, case.content)
        if number is not None:
            return None if number in SAID else f"{case.directory}: fsync or close said {errno.errorcode[number]}"
        same = (beside.root / case.directory / NAME).read_bytes() == case.content
        return None if same else f"{case.directory}: close returned before the server had it"

    with ThreadPoolExecutor(100) as programs:
        waiting = programs.map(close_waits, beside.cases)
        said = {write(share.mount / case.directory / NAME, case.content) for share in straight for case in share.cases}
        lies = [lie for lie in waiting if lie]

    assert (said - {None}, lies) == (set(), [])
    for share in [*straight, beside]:
        assert_all_arrived(daemon, share)
