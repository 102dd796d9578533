"""What programs in Python keep files with: locks, small databases, mailboxes, logs, temporary files, copies of trees."""

from __future__ import annotations

import compileall
import dbm
import fileinput
import logging.handlers
import mailbox
import multiprocessing
import shelve
import shutil
import subprocess
import sys
import tempfile
from email.message import EmailMessage
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.kernel import same_tree
from tests.mounted.programs.conftest import LIMIT, sized

COUNTER = """if True:
    import sys
    from filelock import FileLock, SoftFileLock
    path, kind, count = sys.argv[1], {"hard": FileLock, "soft": SoftFileLock}[sys.argv[2]], int(sys.argv[3])
    for _ in range(count):
        with kind(path + ".lock", timeout=60):
            with open(path) as file:
                number = int(file.read())
            with open(path, "w") as file:
                file.write(str(number + 1))
"""


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_filelock_lets_one_process_count_at_a_time(folder: Rig, kind: str) -> None:
    pytest.importorskip("filelock", reason="filelock is not installed")
    path, count = folder.mount / "counter", sized(50, 300)
    path.write_text("0")

    counters = [subprocess.Popen([sys.executable, "-c", COUNTER, path, kind, str(count)]) for _ in range(3)]
    assert [counter.wait(LIMIT) for counter in counters] == [0, 0, 0]

    assert path.read_text() == str(3 * count)


LMDB_WRITER = """if True:
    import sys, lmdb
    with lmdb.open(sys.argv[1], map_size=16 << 20, writemap=sys.argv[2] == "map") as env:
        for number in range(int(sys.argv[4])):
            with env.begin(write=True) as change:
                change.put(f"{sys.argv[3]}-{number:06}".encode(), str(number).encode() * 20)
"""


@pytest.mark.parametrize("way", ["map", "write"])
def test_lmdb_is_written_by_two_processes_and_read_by_a_third(folder: Rig, way: str) -> None:
    """Readers map the file; writers use the map or write(2): both have to be one."""
    lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed")
    path, count = folder.mount / "data", sized(50, 1000)
    with lmdb.open(str(path), map_size=16 << 20, writemap=way == "map") as reader:
        writers = [subprocess.Popen([sys.executable, "-c", LMDB_WRITER, path, way, name, str(count)]) for name in "ab"]
        assert [writer.wait(LIMIT) for writer in writers] == [0, 0]
        with reader.begin() as view:
            found = {bytes(key).decode(): bytes(value) for key, value in view.cursor()}

    assert found == {f"{name}-{number:06}": str(number).encode() * 20 for name in "ab" for number in range(count)}


@pytest.mark.parametrize("kind", ["dbm.gnu", "dbm.ndbm", "dbm.dumb"])
def test_dbm_and_shelve_keep_what_was_put_in(folder: Rig, kind: str) -> None:
    module = pytest.importorskip(kind, reason=f"this Python has no {kind}")
    with module.open(str(folder.mount / "small"), "c") as database:
        for number in range(300):
            database[str(number)] = str(number) * 10
        for number in range(0, 300, 3):
            del database[str(number)]
    with module.open(str(folder.mount / "small"), "r") as database:
        keys = list(database.keys())  # not every kind can be iterated over
        assert {bytes(key): bytes(database[key]) for key in keys} == {
            str(number).encode(): (str(number) * 10).encode() for number in range(300) if number % 3
        }
    with shelve.open(str(folder.mount / "shelf")) as shelf:
        shelf["list"] = [1, 2, 3]
        shelf.sync()
        shelf["list"] = [*shelf["list"], 4]
    assert dbm.whichdb(folder.mount / "shelf")
    with shelve.open(str(folder.mount / "shelf"), flag="r") as shelf:
        assert shelf["list"] == [1, 2, 3, 4]


def test_mailboxes_of_both_kinds_take_and_give_letters(folder: Rig) -> None:
    letter = EmailMessage()
    letter["Subject"] = "results"
    letter.set_content("they are good\n" * 100)
    here = folder.mount
    for box in (mailbox.mbox(here / "mbox"), mailbox.Maildir(here / "maildir"), mailbox.MH(here / "mh")):
        box.lock()
        keys = [box.add(letter) for _ in range(5)]
        box.flush()
        box.remove(keys[2])
        box.flush()
        box.unlock()
        assert [message["Subject"] for message in box] == ["results"] * 4
        box.close()


def test_logs_are_turned_over_by_size_and_by_a_watcher(folder: Rig) -> None:
    path = folder.mount / "app.log"
    logger = logging.Logger("of its own")
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=2000, backupCount=3)
    logger.addHandler(handler)
    for number in range(1000):
        logger.info("line %05d", number)
    handler.close()
    logger.removeHandler(handler)
    watched = logging.handlers.WatchedFileHandler(folder.mount / "watched.log")
    logger.addHandler(watched)
    logger.info("before")
    (folder.mount / "watched.log").rename(folder.mount / "watched.log.1")
    logger.info("after")
    watched.close()

    kept = "".join((folder.mount / f"app.log{end}").read_text() for end in (".3", ".2", ".1", "")).splitlines()
    assert kept == [f"line {number:05}" for number in range(1000 - len(kept), 1000)]
    assert len(kept) > 500
    assert (folder.mount / "watched.log").read_text() == "after\n"
    assert (folder.mount / "watched.log.1").read_text() == "before\n"


def test_temporary_files_are_made_in_the_mount_and_leave_nothing(folder: Rig) -> None:
    with tempfile.TemporaryFile(dir=folder.mount) as nameless, tempfile.NamedTemporaryFile(dir=folder.mount) as named:
        nameless.write(b"x" * 10_000)
        nameless.seek(0)
        assert len(nameless.read()) == 10_000
        named.write(b"shown")
        named.flush()
        assert Path(named.name).read_bytes() == b"shown"
    here = folder.mount
    with tempfile.SpooledTemporaryFile(100, dir=here) as spooled, tempfile.TemporaryDirectory(dir=here) as place:
        (Path(place) / "a" / "b").mkdir(parents=True)
        (Path(place) / "a" / "b" / "file").write_text("x")
        spooled.write(b"y" * 1000)
        spooled.seek(0)
        assert spooled.read() == b"y" * 1000

    assert list(folder.mount.iterdir()) == []


def test_shutil_copies_moves_packs_and_removes_trees(folder: Rig, tmp_path: Path) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    for number in range(30):
        (tmp_path / "tree" / "sub" / f"{number}").write_bytes(bytes([number]) * number * 1000)
    (tmp_path / "tree" / "link").symlink_to("sub/3")

    shutil.copytree(tmp_path / "tree", folder.mount / "tree", symlinks=True)
    shutil.copytree(folder.mount / "tree", folder.mount / "again", symlinks=True, copy_function=shutil.copyfile)
    shutil.move(folder.mount / "again", folder.mount / "moved")
    shutil.move(folder.mount / "moved", tmp_path / "outside")
    shutil.move(tmp_path / "outside", folder.mount / "inside")
    packed = shutil.make_archive(str(folder.mount / "packed"), "gztar", folder.mount / "tree")
    shutil.unpack_archive(packed, folder.mount / "unpacked", filter="tar")

    for name in ("tree", "inside", "unpacked"):
        assert same_tree(tmp_path / "tree", folder.mount / name) == []
    shutil.rmtree(folder.mount / "inside")
    assert shutil.disk_usage(folder.mount).free > 0


def test_a_package_is_compiled_and_imported_from_where_it_lies(folder: Rig) -> None:
    package = folder.mount / "package"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import answer\n")
    (package / "inner.py").write_text("answer = 1\n")
    code = "import package; print(package.answer)"

    def imported() -> str:
        return subprocess.run([sys.executable, "-c", code], cwd=folder.mount, capture_output=True, text=True, check=True).stdout

    assert compileall.compile_dir(package, quiet=1)
    first = imported()
    folder.daemon.sync(folder.mount)
    folder.daemon.refresh(folder.mount)
    (package / "inner.py").write_text("answer = 2000\n")
    second = imported()

    assert (first, second) == ("1\n", "2000\n")
    assert list((package / "__pycache__").iterdir())


def test_fileinput_changes_files_in_place(folder: Rig) -> None:
    paths = [folder.mount / name for name in ("one", "two")]
    for path in paths:
        path.write_text("a\nb\n")
    with fileinput.input(paths, inplace=True, backup=".bak") as lines:
        for line in lines:
            print(line.upper(), end="")

    assert [path.read_text() for path in paths] == ["A\nB\n"] * 2
    assert (folder.mount / "one.bak").read_text() == "a\nb\n"


def fill(path: Path) -> int:
    return path.write_bytes(path.name.encode() * 10_000)


def test_a_pool_of_processes_writes_many_files(folder: Rig) -> None:
    paths = [folder.mount / f"part-{number:03}" for number in range(sized(60, 1000))]
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        written = pool.map(fill, paths)

    assert written == [path.stat().st_size for path in paths]
    assert all(path.read_bytes() == path.name.encode() * 10_000 for path in paths)
