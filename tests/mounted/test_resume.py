"""Workers die under programs that use the mount, and no program notices more than a pause.

`NBMOUNTD_RESUME_SECONDS` makes the long test longer (300 in `make bench`); it prints its pauses.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig, webdav_mount
from tests.mounted.harness import daemon_over, eventually
from tests.mounted.kernel import same_tree
from tests.servers import ServerProcess

SECONDS = float(os.environ.get("NBMOUNTD_RESUME_SECONDS", "20"))
KILLED = pytest.mark.expects_log("worker ended unasked.*SIGKILL")


@pytest.fixture
def rig(apache_server: ServerProcess, tmp_path: Path) -> Iterator[Rig]:
    """A daemon of the test's own over a directory of Apache's; at its end server and mount must be equal."""
    root = apache_server.root / tmp_path.name
    root.mkdir()
    keys = {**webdav_mount(apache_server, f"{tmp_path.name}/"), "write_back_delay": 0.5, "exclude": []}
    with daemon_over({"dav": keys}) as daemon:
        rig = Rig(daemon, "dav", daemon.path("dav"), root)
        yield rig
        daemon.wait_for_state("dav", "live")
        daemon.sync(rig.mount)
        assert same_tree(rig.mount, rig.root) == []
        assert (rig.status.unsent_files, rig.status.parked, rig.status.conflicts) == (0, 0, 0)
    shutil.rmtree(root)


class Killer:
    """Kills the worker, each `every` seconds while inside."""

    def __init__(self, rig: Rig, every: float) -> None:
        self._rig = rig
        self._every = every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.kills = 0

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self._every):
            with suppress(AssertionError, ProcessLookupError):  # there is none just now
                self._rig.daemon.kill_worker("dav")
                self.kills += 1


CLIENT = Path(__file__).with_name("resume_client.py")


@KILLED
@pytest.mark.timeout(SECONDS + 120)
def test_a_program_with_open_files_sees_pauses_and_no_error(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    with Killer(rig, 1.0) as killer:
        client = subprocess.run(
            [sys.executable, str(CLIENT), str(rig.mount), str(SECONDS)], capture_output=True, text=True, check=False,
            timeout=SECONDS + 60,
        )  # fmt: skip

    assert client.returncode == 0, client.stderr
    report = json.loads(client.stdout)
    with capsys.disabled():
        print(
            f"\n{killer.kills} kills in {SECONDS:g} s, {report['calls']} calls: longest pause {report['longest']:.3f} s,"
            f" 99th percentile of the pauses {report['percentile']:.3f} s, median {report['median']:.3f} s"
        )
    assert killer.kills >= SECONDS / 4
    assert rig.status.state in ("live", "starting")
    assert rig.status.open_files == 0 or eventually(lambda: rig.status.open_files == 0, 5, "every handle was given back")


@KILLED
def test_an_unlinked_file_that_is_open_outlives_the_worker_and_is_cleaned_up_after_its_last_close(rig: Rig) -> None:
    with (rig.mount / "gone").open("w+b", buffering=0) as file:
        file.write(b"still " * 1000)
        (rig.mount / "gone").unlink()
        for _ in range(2):
            rig.daemon.kill_worker("dav")
            file.write(b"here\n")
        file.seek(0)

        assert file.read() == b"still " * 1000 + b"here\n" * 2
        assert os.fstat(file.fileno()).st_nlink == 0
    unsent = rig.daemon.home / "state" / "dav" / "unsent"

    eventually(lambda: not [path for path in unsent.rglob("*") if path.is_file()], 10, "no bytes of it are left")


@KILLED
def test_a_listing_goes_on_where_the_dead_worker_was(rig: Rig) -> None:
    names = [f"{number:05}-{'n' * 200}" for number in range(3000)]
    for name in names:
        (rig.mount / name).touch()

    found = []
    with os.scandir(rig.mount) as entries:
        for count, entry in enumerate(entries):
            found.append(entry.name)
            if count in (100, 1500):
                rig.daemon.kill_worker("dav")

    assert sorted(found) == names


@KILLED
def test_a_file_that_is_open_for_writing_is_not_taken_for_closed_by_the_next_worker(rig: Rig) -> None:
    with (rig.mount / "open").open("wb", buffering=0) as file:
        file.write(b"first\n")
        rig.daemon.kill_worker("dav")
        rig.daemon.wait_for_state("dav", "live")
        time.sleep(1.5)  # three times the write-back delay: it would have been sent

        assert not (rig.root / "open").exists() or (rig.root / "open").stat().st_size == 0
        assert rig.status.open_files == 1
        file.write(b"second\n")


# --- programs ----------------------------------------------------------------------------------------------------------


def kill_once(rig: Rig, process: subprocess.Popen[bytes], after: float) -> None:
    """Kills the worker in the middle of a program, and requires that it was in the middle."""
    time.sleep(after)
    assert process.poll() is None, "the program was too fast for a kill in its middle"
    rig.daemon.kill_worker("dav")


@KILLED
@pytest.mark.skipif(shutil.which("fio") is None, reason="fio is not installed")
def test_fio_verifies_what_it_wrote(rig: Rig, tmp_path: Path) -> None:
    job = [
        "fio", "--name=verify", f"--directory={rig.mount}", "--rw=randwrite", "--bs=4k-64k", "--size=32m", "--numjobs=2",
        "--ioengine=psync", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--fsync=64", "--time_based=0", "--loops=6",
    ]  # fmt: skip
    with (tmp_path / "fio.log").open("wb") as log:
        process = subprocess.Popen(job, stdout=log, stderr=log, cwd=tmp_path)
        kill_once(rig, process, 0.8)
        status = process.wait(90)

    assert status == 0, (tmp_path / "fio.log").read_text()


SQLITE = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, text TEXT)")
for n in range(400):
    db.execute("BEGIN"); db.execute("INSERT INTO t VALUES (?, ?)", (n, "x" * 500)); db.execute("COMMIT")
"""


@KILLED
def test_sqlite_loses_no_transaction(rig: Rig) -> None:
    process = subprocess.Popen([sys.executable, "-c", SQLITE, str(rig.mount / "data.db")], stderr=subprocess.PIPE)
    eventually(lambda: (rig.mount / "data.db").exists() and (rig.mount / "data.db").stat().st_size > 20_000, 30, "it has begun")
    kill_once(rig, process, 0)
    _, errors = process.communicate(timeout=90)

    assert process.returncode == 0, errors
    with sqlite3.connect(rig.mount / "data.db") as database:
        assert database.execute("SELECT count(*), max(n) FROM t").fetchone() == (400, 399)
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


@KILLED
@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_clones(rig: Rig, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    for number in range(400):
        (origin / f"file{number}").write_bytes(os.urandom(3000))
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], cwd=origin, check=True)

    clone = [*git, "clone", "-q", "--no-local", str(origin), str(rig.mount / "clone")]
    process = subprocess.Popen(clone, stderr=subprocess.PIPE)
    eventually(lambda: (rig.mount / "clone" / "file3").exists(), 60, "it is checking out")
    kill_once(rig, process, 0)
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 0, errors
    assert subprocess.run([*git, "fsck", "--strict"], cwd=rig.mount / "clone", check=False).returncode == 0
    assert subprocess.run([*git, "status", "--porcelain"], cwd=rig.mount / "clone", capture_output=True).stdout == b""


H5PY = """
import h5py, numpy, sys
with h5py.File(sys.argv[1], "w") as file:
    data = file.create_dataset("d", (0, 1000), maxshape=(None, 1000), chunks=(10, 1000), dtype="i8")
    for step in range(150):
        data.resize(data.shape[0] + 10, axis=0)
        data[-10:] = numpy.full((10, 1000), step)
        file.flush()
"""


@KILLED
def test_h5py_appends(rig: Rig) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    process = subprocess.Popen([sys.executable, "-c", H5PY, str(rig.mount / "data.h5")], stderr=subprocess.PIPE)
    eventually(lambda: (rig.mount / "data.h5").exists() and (rig.mount / "data.h5").stat().st_size > 10**6, 30, "it has begun")
    kill_once(rig, process, 0)
    _, errors = process.communicate(timeout=90)

    assert process.returncode == 0, errors
    with h5py.File(rig.mount / "data.h5", "r") as file:
        assert file["d"].shape == (1500, 1000)
        assert [int(value) for value in file["d"][::10, 0]] == list(range(150))


def test_a_restart_on_purpose_is_no_event(rig: Rig) -> None:
    with (rig.mount / "file").open("w+b", buffering=0) as file:
        file.write(b"before\n")
        before = rig.status.pid

        restarted = rig.daemon.ctl("restart", "dav")
        file.write(b"after\n")

        assert restarted.returncode == 0, restarted.stderr
        assert os.pread(file.fileno(), 100, 0) == b"before\nafter\n"
    assert rig.status.pid != before
    assert rig.status.restarts == 0


