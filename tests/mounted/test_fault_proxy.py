"""Whatever goes wrong in an upload, and wherever: nothing is lost, the server ends up with the bytes, the call told the truth.

Ten faults at each point of an upload: which of its requests, and how far that had come (tests/servers/fault_proxy.py). That
is 20 points where an upload goes to a name beside its own, and 12 where it is put straight. Every case is a file of its own,
all are written at the same time, and each upload is spoiled once.

FAULTS=all plays each case for a new file and for one that replaces another; else about half of the points are for the one,
half for the other, and of the straight uploads only the PUT is spoiled.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from tests.mounted.conftest import webdav_mount
from tests.mounted.harness import Daemon, daemon_over
from tests.mounted.kernel import listed
from tests.servers import ServerProcess
from tests.servers.fault_proxy import KINDS, PHASES, FaultProxy

EVERYTHING = os.environ.get("FAULTS") == "all"
STRAIGHT, BESIDE = (3 if EVERYTHING else 1), 5
"""Requests of an upload over Apache: PUT, PROPFIND, PROPPATCH, then MOVE and a last PROPFIND if it went to a name beside."""
NAME = "data.bin"
SAID = (errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EDQUOT)
"""What a close that waits for the remote may say when it cannot be told yet that the bytes are there."""


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
    def content(self) -> bytes:
        return f"{self.directory} as it must arrive. ".encode() * (1000 + 100 * self.request)


def cases(requests: int) -> list[Case]:
    """The new file's upload to a name beside has no fifth request: its version is known by then."""
    points = list(product(KINDS, range(1, requests + 1), PHASES))
    if EVERYTHING:
        return [Case(*point, replaces) for point in points for replaces in (False, True) if replaces or point[1] < BESIDE]
    return [Case(kind, request, phase, request == BESIDE or (request + phase) % 2 == 1) for kind, request, phase in points]


@dataclass(frozen=True)
class Share:
    """A share with a directory for each case, and with what is to be replaced; its mount, and how the proxy sees it."""

    cases: list[Case]
    root: Path
    mount: Path
    proxy: FaultProxy


def make(root: Path, cases: list[Case]) -> None:
    for case in cases:
        (root / case.directory).mkdir(parents=True)
        if case.replaces:
            (root / case.directory / NAME).write_bytes(b"what was there before")


def write(path: Path, content: bytes) -> int | None:
    """As a careful program does: write, fsync, close. The errno that close ended with, if any."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    half = len(content) // 2
    assert os.write(fd, content[:half]) + os.write(fd, content[half:]) == len(content)
    os.fsync(fd)
    try:
        os.close(fd)
    except OSError as exc:
        return exc.errno
    return None


def assert_all_arrived(daemon: Daemon, share: Share) -> None:
    """Nothing is left to do, nothing is parked or in conflict, and both sides have the bytes under the name, and no other."""
    daemon.sync(share.mount, timeout=140)
    wrong = []
    for case in share.cases:
        here, there = share.mount / case.directory, share.root / case.directory
        if (names := (sorted(os.listdir(here)), listed(there))) != ([NAME], [NAME]):
            wrong.append(f"{case.directory}: {names[0]} here, {names[1]} on the server")
        elif (there / NAME).read_bytes() != case.content:
            wrong.append(f"{case.directory}: other bytes on the server")
        elif (here / NAME).read_bytes() != case.content:
            wrong.append(f"{case.directory}: other bytes in the mount")
        elif case.directory not in share.proxy.fired:
            wrong.append(f"{case.directory}: nothing was spoiled in {share.proxy.seen[case.directory]} requests")
    assert wrong == []
    status = daemon.status(share.mount.name)
    assert (status.unsent_files, status.parked, status.conflicts) == (0, 0, 0)


@pytest.fixture
def shares(apache_server: ServerProcess) -> Iterator[tuple[Daemon, Share, Share]]:
    """The daemon, a share that is put to straight, and one whose uploads go to a name beside and whose close waits."""
    special: dict[str, dict[str, object]] = {"straight": {}, "beside": {"durability": "close", "atomic_replace": False}}
    places = {"straight": cases(STRAIGHT), "beside": cases(BESIDE)}
    with FaultProxy(apache_server.port) as straight, FaultProxy(apache_server.port) as beside:
        proxies = {"straight": straight, "beside": beside}
        mounts = {}
        for name, proxy in proxies.items():
            make(apache_server.root / name, places[name])
            url = f"http://127.0.0.1:{proxy.port}{apache_server.prefix}{name}/"
            keys = {"url": url, "request_timeout": 1.0, "connections": 16, "freshness": 3600.0, "write_back_delay": 0.1}
            mounts[name] = {**webdav_mount(apache_server), **keys, **special[name]}
        with daemon_over(mounts) as daemon:
            made = [Share(places[name], apache_server.root / name, daemon.path(name), proxies[name]) for name in mounts]
            for share in made:
                for case in share.cases:
                    os.listdir(share.mount / case.directory)
                share.proxy.arm()
            yield daemon, made[0], made[1]


@pytest.mark.expects_log("the remote is|will try again|parked")
def test_a_spoiled_upload_arrives_all_the_same_and_no_call_lies(shares: tuple[Daemon, Share, Share]) -> None:
    """With durability "local" write, fsync and close are done at once, and their promise is kept here. With "close", a close
    that returns says that the server has it now; one that cannot know says so, and the bytes arrive later all the same."""
    daemon, straight, beside = shares

    def close_waits(case: Case) -> str | None:
        number = write(beside.mount / case.directory / NAME, case.content)
        if number is not None:
            return None if number in SAID else f"{case.directory}: close said {errno.errorcode[number]}"
        same = (beside.root / case.directory / NAME).read_bytes() == case.content
        return None if same else f"{case.directory}: close returned before the server had it"

    with ThreadPoolExecutor(100) as programs:
        waiting = programs.map(close_waits, beside.cases)
        said = {write(straight.mount / case.directory / NAME, case.content) for case in straight.cases}
        lies = [lie for lie in waiting if lie]

    assert (said, lies) == ({None}, [])
    assert_all_arrived(daemon, straight)
    assert_all_arrived(daemon, beside)
