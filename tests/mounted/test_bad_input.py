"""What a server will not take, and what no server should say: an errno or a word in `parked`, and nothing is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbmountd.control import schema
from tests.mounted.conftest import Rig, webdav_mount
from tests.mounted.harness import Daemon, daemon_over
from tests.mounted.kernel import eventually
from tests.servers import ApacheServer, WsgiDAVServer
from tests.servers.broken import CONTENT, BrokenServer

LARGE = bool(os.environ.get("NBMOUNTD_TEST_LARGE"))
pytestmark = [pytest.mark.timeout(1200)] if LARGE else []
DEADLINE = 4.0
"""`request_deadline` of the mounts here, in seconds; what takes longer hangs."""

# --- what the server will not take ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A server that takes no name beginning with "forbidden" and no file over 300,000 bytes."""
    base = tmp_path_factory.mktemp("narrow")
    extra = 'LimitRequestBody 300000\n  RedirectMatch 403 "/forbidden[^/]*/?$"'
    with ApacheServer(base / "root", base / "work", extra=extra) as server:
        with daemon_over({"narrow": {**webdav_mount(server), "write_back_delay": 0.1}}, drain_timeout=3.0) as daemon:
            yield Rig(daemon, "narrow", daemon.path("narrow"), server.root)


def parked(daemon: Daemon) -> dict[str, str]:
    """Path -> why, of everything that is kept and not sent."""
    reply = daemon.ask(schema.Parked())
    assert isinstance(reply, schema.ParkedReply), reply
    return {item.path: item.error for item in reply.items}


def wait_until_parked(rig: Rig, path: Path) -> str:
    return eventually(lambda: parked(rig.daemon).get(str(path)), 20, f"{path} parked: {parked(rig.daemon)}, {rig.status}")


def assert_others_are_sent(rig: Rig, name: str) -> None:
    """One file that cannot be sent holds up no other."""
    (rig.mount / name).write_text(name)
    eventually(lambda: (rig.root / name).exists(), 20, f"{name} on the server")
    assert (rig.root / name).read_text() == name


@pytest.mark.expects_log("forbidden|parked|refused|403")
def test_a_name_that_the_server_refuses_is_kept_and_said_and_goes_out_under_another(narrow: Rig) -> None:
    path = narrow.mount / "forbidden name"
    path.write_bytes(b"not lost" * 1000)

    reason = wait_until_parked(narrow, path)

    assert reason
    assert path.read_bytes() == b"not lost" * 1000
    assert os.getxattr(path, "user.nbmountd.state") == b"parked"
    assert_others_are_sent(narrow, "beside the forbidden")
    path.rename(narrow.mount / "allowed name")
    narrow.daemon.sync(narrow.mount / "allowed name")
    assert (narrow.root / "allowed name").read_bytes() == b"not lost" * 1000
    assert str(path) not in parked(narrow.daemon)


@pytest.mark.expects_log("forbidden|parked|refused|403")
def test_a_directory_that_the_server_refuses_keeps_what_is_in_it(narrow: Rig) -> None:
    directory = narrow.mount / "forbidden directory"
    (directory / "sub").mkdir(parents=True)
    (directory / "sub" / "file").write_bytes(b"below")

    wait_until_parked(narrow, directory)

    assert (directory / "sub" / "file").read_bytes() == b"below"
    assert_others_are_sent(narrow, "beside the directory")
    directory.rename(narrow.mount / "allowed directory")
    narrow.daemon.sync(narrow.mount / "allowed directory")
    assert (narrow.root / "allowed directory" / "sub" / "file").read_bytes() == b"below"


@pytest.mark.expects_log("large|parked|refused|413")
def test_a_file_that_is_too_large_is_kept_and_said_and_goes_out_when_it_is_smaller(narrow: Rig) -> None:
    path = narrow.mount / "large.bin"
    path.write_bytes(b"0123456789" * 100_000)

    reason = wait_until_parked(narrow, path)

    assert reason
    assert path.read_bytes() == b"0123456789" * 100_000
    assert_others_are_sent(narrow, "beside the large")
    os.truncate(path, 1000)
    narrow.daemon.sync(path)
    assert (narrow.root / "large.bin").read_bytes() == b"0123456789" * 100


@pytest.mark.expects_log("parked|refused|long|40[0-9]|414|500")
def test_a_path_that_is_too_deep_for_the_server_is_kept_and_said(narrow: Rig) -> None:
    """25 directories of 200 bytes are a path of 5,000 bytes, which neither URL nor disk of the server take."""
    here = os.open(narrow.mount, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    fd = os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here)
    os.write(fd, b"at the bottom")
    os.close(fd)

    eventually(lambda: [path for path in parked(narrow.daemon) if "d" * 200 in path], 30, f"parked: {narrow.status}")

    fd = os.open("file", os.O_RDONLY, dir_fd=here)
    assert os.read(fd, 100) == b"at the bottom"
    os.close(fd)
    assert_others_are_sent(narrow, "beside the deep")
    os.rename("file", narrow.mount / "from the bottom", src_dir_fd=here)
    os.close(here)
    narrow.daemon.sync(narrow.mount / "from the bottom")
    assert (narrow.root / "from the bottom").read_bytes() == b"at the bottom"
    subprocess.run(["rm", "-r", narrow.mount / ("d" * 200)], check=True)
    eventually(lambda: not (narrow.root / ("d" * 200)).exists(), 20, "what had been made is removed again")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for 6 MB."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "small", place]).returncode:
        pytest.skip("a small disk needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def room(mount: Path) -> int:
    found = os.statvfs(mount)
    return found.f_bavail * found.f_frsize


@pytest.fixture
def small(small_disk: Path, tmp_path: Path) -> Iterator[Rig]:
    """A mount over a server with a small disk, whose quota is known already."""
    with WsgiDAVServer(small_disk, tmp_path / "work") as server:
        keys = {**webdav_mount(server), "write_back_delay": 0.1}
        with daemon_over({"small": keys}, drain_timeout=2.0) as daemon:
            rig = Rig(daemon, "small", daemon.path("small"), small_disk)
            eventually(lambda: room(rig.mount) < 10_000_000, 10, "the quota is known")
            yield rig


@pytest.mark.expects_log("full|507|500|space|quota|degraded|parked|offline")
def test_full_is_said_before_anything_is_acknowledged_and_no_longer_when_there_is_room(small: Rig) -> None:
    (small.mount / "fits").write_bytes(bytes(4_000_000))
    small.daemon.sync(small.mount)

    with pytest.raises(OSError) as refused:
        (small.mount / "too much").write_bytes(bytes(5_000_000))
    assert refused.value.errno in (errno.EDQUOT, errno.ENOSPC)
    (small.mount / "too much").unlink()
    (small.mount / "fits").unlink()
    small.daemon.sync(small.mount)
    small.daemon.refresh(small.mount)

    (small.mount / "now it fits").write_bytes(b"x" * 5_000_000)
    small.daemon.sync(small.mount)
    assert (small.root / "now it fits").read_bytes() == b"x" * 5_000_000


@pytest.mark.expects_log("full|507|500|space|quota|degraded|parked|offline")
def test_what_no_longer_fits_on_the_server_is_kept_until_there_is_room(small: Rig) -> None:
    """Somebody else takes the room between the write and the upload."""
    (small.root / "of somebody else").write_bytes(bytes(4_000_000))
    content = os.urandom(4_000_000)
    (small.mount / "mine").write_bytes(content)

    reply = small.daemon.ask(schema.Sync(paths=(str(small.mount),), timeout=3))
    assert isinstance(reply, schema.Failed), reply
    assert small.status.unsent_files + small.status.parked >= 1
    assert (small.mount / "mine").read_bytes() == content
    (small.root / "of somebody else").unlink()

    # Who asks for it by name does not wait for the next time that a full remote is tried by itself.
    small.daemon.sync(small.mount, timeout=20)
    assert (small.root / "mine").read_bytes() == content


# --- what no server should say -------------------------------------------------------------------------------------------

ODD = ("garbage", "html", "cut", "doctype", "outside", "empty", "vanish", "away", "status-500", "status-418", "denied-size")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokenServer]:
    with BrokenServer(tmp_path_factory.mktemp("broken")) as server:
        yield server


def outcome(call: Callable[[], object]) -> object:
    """What `call` gave, the name of its errno, or that it came too late."""
    started = time.monotonic()
    try:
        said = call()
    except OSError as exc:
        said = errno.errorcode.get(exc.errno or 0)
    return said if time.monotonic() - started < DEADLINE + 4 else f"{said} after {time.monotonic() - started:.1f} s"


@pytest.mark.expects_log(".")
def test_answers_that_make_no_sense_become_errnos_and_lose_nothing(broken: BrokenServer) -> None:
    """Whatever is listed or read is true: no name of another directory, no bytes but the file's. Writes are kept."""
    keys = {"backend": "webdav", "user": "alice", "password": "wonderland", "request_deadline": DEADLINE}
    mounts = {behaviour: {**keys, "url": broken.at(behaviour), "freshness": 1.0} for behaviour in ODD}
    errors = ["EPROTO", "EIO", "EHOSTDOWN", "ETIMEDOUT", "EACCES", "EOPNOTSUPP"]
    with daemon_over(mounts, drain_timeout=1.0) as daemon:
        workers = {behaviour: daemon.status(behaviour).pid for behaviour in ODD}
        wrong = []
        for behaviour in ODD:
            mount = daemon.path(behaviour)
            listed = outcome(lambda mount=mount: os.listdir(mount))
            read = outcome(lambda mount=mount: (mount / "file").read_bytes())
            written = outcome(lambda mount=mount: (mount / "mine").write_bytes(b"mine"))
            back = outcome(lambda mount=mount: (mount / "mine").read_bytes())
            if listed not in ([], ["file"], *errors):
                wrong.append(f"{behaviour}: listed {listed}")
            if read not in (CONTENT, "ENOENT" if listed == [] else "", *errors):
                wrong.append(f"{behaviour}: read {read!r:.60} where the list was {listed}")
            if (written, back) != (4, b"mine") and (written not in errors or back not in errors):
                wrong.append(f"{behaviour}: written {written}, read back {back!r:.60}")

        assert wrong == []
        assert {behaviour: daemon.status(behaviour).pid for behaviour in ODD} == workers


@pytest.mark.expects_log("many")
def test_a_directory_of_a_hundred_thousand_entries_is_listed(broken: BrokenServer) -> None:
    count = 100_000 if LARGE else 30_000
    keys: dict[str, object] = {"backend": "webdav", "user": "alice", "password": "wonderland"}
    keys |= {"url": broken.at(f"many-{count}"), "request_deadline": 120.0 if LARGE else 30.0}
    with daemon_over({"many": keys}) as daemon:
        mount = daemon.path("many")

        with os.scandir(mount) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries}
        again = os.listdir(mount)

        assert len(sizes) == len(again) == count
        assert set(sizes.values()) == {len(CONTENT)}
        assert (mount / f"entry {count - 1:06}").stat().st_size == len(CONTENT)
        assert daemon.status("many").state == "live"
        peak = max(process.peak_resident for process in daemon.processes())
        assert peak < 400_000_000


@pytest.mark.expects_log("drip")
def test_a_directory_that_cannot_be_listed_in_time_is_shown_at_last(broken: BrokenServer) -> None:
    """The first who look get an error within `request_deadline`; the listing goes on without them."""
    keys: dict[str, object] = {"backend": "webdav", "user": "alice", "password": "wonderland"}
    keys |= {"url": broken.at("drip-12"), "request_deadline": 2.0}
    with daemon_over({"drip": keys}) as daemon:
        mount = daemon.path("drip")
        answers: list[object] = []
        while len(answers) < 30 and not isinstance(answers[-1] if answers else None, list):
            answers.append(outcome(lambda: os.listdir(mount)))

        assert answers[0] == "ETIMEDOUT"
        assert isinstance(answers[-1], list) and len(answers[-1]) == 12
