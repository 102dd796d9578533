"""Start, end and accident: what a state directory goes through, and that nothing acknowledged is lost or made up."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbmountd.disk.content import SETTLE_EVERY, Content
from nbmountd.disk.database import SCHEMA_VERSION, Database, UnreadableDatabaseError
from nbmountd.disk.journal import Journal, RecordKind
from nbmountd.disk.state import open_state
from nbmountd.errors import StateError
from nbmountd.model import ROOT_INODE, Kind
from tests.disk.rig import NOW, Rig, accept

BLOCK = 128 * 2**10


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def layer_files(rig: Rig) -> list[Path]:
    return sorted(rig.state_dir.glob("unsent/*/*"))


# -- a death of the process -------------------------------------------------------------------------------------------


def test_every_write_and_truncation_survives_a_kill(rig: Rig) -> None:
    node = rig.new_file()
    for at in range(50):
        rig.write(node, at * 10, b"%010d" % at)
    rig.truncate(node, 123)
    rig.write(node, 200, b"end")
    rig.kill()

    assert rig.read(rig.node()) == (b"".join(b"%010d" % at for at in range(13)))[:123] + bytes(77) + b"end"
    assert rig.node().size == 203
    rig.check_counters()


def test_an_mtime_that_a_program_set_after_its_last_write_survives_a_kill(rig: Rig) -> None:
    node = rig.new_file()
    rig.write(node, 0, b"x")
    rig.store.touch(node, 42)
    with rig.database.transaction() as change:
        change.update(node, mtime_ns=42)

    rig.kill()
    assert rig.node().mtime_ns == 42
    rig.settle()
    rig.kill()
    assert rig.node().mtime_ns == 42


def test_an_mtime_set_on_a_file_nobody_has_open_survives_kills(rig: Rig) -> None:
    rig.write(rig.new_file(), 0, b"x")
    rig.kill()
    node = rig.node()
    rig.store.touch(node, 42)
    with rig.database.transaction() as change:
        change.update(node, mtime_ns=42)
    rig.kill()
    assert rig.node().mtime_ns == 42


def test_the_journal_shrinks_and_what_it_said_stays(tmp_path: Path) -> None:
    rig = Rig(tmp_path, journal_limit=1000)
    node = rig.new_file()
    for at in range(100):
        rig.write(node, at, b"%c" % (at + 1))
    assert rig.state.journal.size > 1000

    rig.settle()

    assert rig.state.journal.size == 0
    rig.kill()
    assert rig.read(rig.node()) == bytes(range(1, 101))
    rig.close()


def test_writes_that_come_while_the_journal_is_settled_are_kept(tmp_path: Path) -> None:
    rig = Rig(tmp_path, journal_limit=100)
    node = rig.new_file()
    for at in range(5):
        rig.write(node, at, b"a")
    for number, call in enumerate(rig.store.settling()):
        rig.write(node, 5 + number, b"b")
        call()
    rig.write(node, 7, b"c")
    rig.kill()
    assert rig.read(rig.node()) == b"aaaaabbc"
    rig.close()


def test_settling_may_be_given_up_at_any_point(tmp_path: Path) -> None:
    for stop in range(3):
        rig = Rig(tmp_path / str(stop), journal_limit=100)
        node = rig.new_file()
        rig.write(node, 0, b"abc" * 10)
        rig.write(node, 30, b"abc" * 10)
        rig.write(node, 60, b"abc" * 10)
        for number, call in enumerate(rig.store.settling()):
            if number == stop:
                break
            call()
        rig.write(node, 90, b"end")
        rig.kill()
        assert rig.read(rig.node()) == b"abc" * 30 + b"end"
        rig.close()


def test_a_new_layer_with_no_write_does_not_change_the_file(rig: Rig) -> None:
    """A death between the row of the layer and its first record."""
    node = rig.new_file(base=b"remote")
    content = rig.store.open(node)
    before = content.node.mtime_ns
    rig.store._begin_layer(content)
    rig.kill()
    assert rig.read(rig.node(), b"remote") == b"remote"
    assert rig.node().mtime_ns == before


# -- unreadable things ------------------------------------------------------------------------------------------------


def test_a_damaged_record_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(tmp_path)
    node = rig.new_file()
    for at in range(3):
        rig.write(node, at, b"%d" % at)
    rig.abandon()
    (journal,) = rig.state_dir.glob("journal.*")
    data = bytearray(journal.read_bytes())
    data[60] ^= 1
    journal.write_bytes(data)
    rig._open()

    assert rig.node().size == 3
    content = rig.store.open(rig.node())
    assert content.read(0, 3) == b"0\x002", "the hole is shown as one: no record claims it"
    assert "journal cannot be read" in caplog.text
    rig.close()


def test_a_torn_end_of_the_journal_is_where_the_process_died(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.write(rig.new_file(), 0, b"abc")
    rig.abandon()
    (journal,) = rig.state_dir.glob("journal.*")
    with journal.open("ab") as file:
        file.write(b"torn")
    rig._open()
    rig.write(rig.node(), 3, b"def")
    rig.kill()
    assert rig.read(rig.node()) == b"abcdef"
    rig.close()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_lost_unsent_bytes_are_an_error_and_never_zeros(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path)
    rig.write(rig.new_file(), 0, b"a" * 5000)
    rig.abandon()
    (path,) = layer_files(rig)
    path.unlink() if damage == "missing" else os.truncate(path, 1000)
    rig._open()

    node = rig.node()
    content = rig.store.open(node)
    with pytest.raises(OSError, match="lost"):
        content.read(0, 5000)
    with pytest.raises(OSError, match="lost"):
        rig.store.read_later(content, 0, 5000)()
    if damage == "cut":
        assert content.read(0, 1000) == b"a" * 1000
    assert node.unsent, "kept, for a person to decide"
    assert rig.database.connection.execute("SELECT parked FROM work WHERE ino = ?", (node.ino,)).fetchone() == (1,)
    assert "lost unsent bytes" in caplog.text
    rig.check_counters()

    rig.store.write(content, 0, b"b" * 5000, NOW)
    assert content.read(0, 5000) == b"b" * 5000, "writing it anew heals it"
    rig.store.release(content)
    rig.close()


def test_unreadable_extents_are_an_error_and_never_zeros(tmp_path: Path) -> None:
    rig = Rig(tmp_path, journal_limit=0)
    rig.write(rig.new_file(), 0, b"a" * 50)
    rig.settle()
    rig.database.connection.execute("UPDATE layers SET extents = x'010203'")
    rig.kill()
    content = rig.store.open(rig.node())
    with pytest.raises(OSError, match="lost"):
        content.read(0, 50)
    rig.store.release(content)
    rig.close()


@pytest.mark.parametrize("damage", ["overwritten", "pages"])
def test_an_unreadable_database_is_put_aside_with_all_unsent_bytes(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path)
    for number in range(200):
        rig.write(rig.new_file(f"file {number}"), 0, b"precious")
    rig.state.close()
    path = rig.state_dir / "nodes.db"
    with path.open("r+b") as file:
        file.seek(0 if damage == "overwritten" else 4096)
        file.write(os.urandom(4096 if damage == "overwritten" else path.stat().st_size - 4096))

    rig._open()

    assert rig.database.children(ROOT_INODE) == []
    (kept,) = (rig.state_dir / "quarantine").iterdir()
    assert [file.read_bytes() for file in kept.glob("unsent/*/*")] == [b"precious"] * 200
    assert list(kept.glob("journal.*"))
    assert (kept / "nodes.db").exists()
    assert caplog.text.count("put aside") == 1
    rig.write(rig.new_file(), 0, b"new")
    rig.kill()
    assert rig.read(rig.node()) == b"new"
    rig.close()


def test_data_files_are_deleted_only_when_their_rows_are_known_to_be_gone(rig: Rig) -> None:
    node = rig.new_file()
    rig.write(node, 0, b"x")
    (path,) = layer_files(rig)

    rig.store.discard(node)
    assert path.exists(), "a loss of power now would bring the row back"
    rig.settle()
    assert not path.exists()
    rig.check_counters()
    assert rig.store.unsent_bytes == 0


def test_discarding_what_was_never_loaded_is_counted_too(rig: Rig) -> None:
    rig.write(rig.new_file(), 0, b"x" * 100)
    base = b"y" * 1000
    rig.read(rig.new_file("cached", base=base), base)
    rig.restart()
    assert rig.store.unsent_bytes == 100
    assert rig.store.cached_bytes == 1000

    rig.store.discard(rig.node())
    rig.store.discard(rig.node("cached"))
    rig.settle()

    assert (rig.store.unsent_bytes, rig.store.cached_bytes) == (0, 0)
    assert layer_files(rig) == list(rig.cache_dir.glob("base/*/*")) == []


# -- versions and locks -----------------------------------------------------------------------------------------------


def test_a_state_of_schema_1_is_migrated_and_keeps_unsent_bytes(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.write(rig.new_file(), 0, b"precious")
    rig.database.connection.execute("ALTER TABLE nodes DROP COLUMN removable")
    rig.database.connection.execute("DROP TABLE doubts")
    rig.database.connection.execute("DROP TABLE cached")
    rig.database.connection.execute(
        "CREATE TABLE cached (ino INTEGER PRIMARY KEY, version TEXT NOT NULL, size INTEGER NOT NULL, extents BLOB NOT NULL,"
        " used_at REAL NOT NULL)"
    )
    rig.database.connection.execute("INSERT INTO cached VALUES (5, 'v', 3, x'', 0)")
    rig.database.connection.execute("PRAGMA user_version = 1")
    rig.restart()

    assert rig.database.connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    assert rig.read(rig.node()) == b"precious"
    base = b"y" * 1000
    rig.read(rig.new_file("cached", base=base), base)
    rig.restart()
    assert rig.store.cached_bytes == 1000
    rig.close()


def test_a_state_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.database.connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    rig.close()
    with pytest.raises(StateError, match="newer nbmountd"):
        rig._open()
    assert not (rig.state_dir / "quarantine").exists()


def test_a_second_daemon_is_kept_out(rig: Rig) -> None:
    other = (
        "import sys, nbmountd.disk.database as d; from pathlib import Path; from nbmountd.disk.state import open_state\n"
        "d.LOCK_TIMEOUT = 0.2\n"
        "try: open_state(Path(sys.argv[1]), Path(sys.argv[2]), lambda count: None)\n"
        "except d.StateError as exc: print(exc)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", other, rig.state_dir, rig.cache_dir], capture_output=True, text=True, timeout=30, check=True
    )
    assert "in use by another nbmountd" in answer.stdout
    rig.write(rig.new_file(), 0, b"still ours")
    assert not (rig.state_dir / "quarantine").exists()


def test_damage_is_told_from_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "nodes.db").write_bytes(b"no database" * 1000)
    with pytest.raises(UnreadableDatabaseError):
        Database(tmp_path / "nodes.db")
    with pytest.raises(StateError) as refused:
        Database(tmp_path / "no such directory" / "nodes.db")
    assert not isinstance(refused.value, UnreadableDatabaseError)


# -- the cache --------------------------------------------------------------------------------------------------------


def test_cached_bytes_are_verified_at_their_first_use_after_a_restart(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    base = os.urandom(3 * BLOCK + 100)
    assert rig.read(rig.new_file(base=base), base) == base
    rig.restart()
    assert rig.store.cached_bytes == len(base)
    (path,) = rig.cache_dir.glob("base/*/*")
    with path.open("r+b") as file:
        file.seek(BLOCK + 5)
        file.write(bytes([base[BLOCK + 5] ^ 1]))

    content = rig.store.open(rig.node())
    assert content.missing(0, len(base)) == [(0, len(base))], "nothing is believed before it was looked at"
    verify = rig.store.verify_later(content, [(0, 10), (BLOCK, BLOCK + 1)])
    assert verify is not None
    verify()()

    assert content.missing(0, 2 * BLOCK) == [(BLOCK, 2 * BLOCK)]
    assert caplog.text.count("fetched again") == 1
    assert rig.store.cached_bytes == len(base) - BLOCK
    rig.store.release(content)
    assert rig.read(rig.node(), base) == base
    rig.check_counters()


def test_what_was_sent_is_cached_with_checksums(rig: Rig) -> None:
    node = rig.new_file(base=b"a" * 3 * BLOCK)
    rig.read(node, b"a" * 3 * BLOCK)
    rig.write(node, BLOCK - 1, b"xyz")
    expected = b"a" * (BLOCK - 1) + b"xyz" + b"a" * (2 * BLOCK - 2)
    confirm(rig, node, expected)
    rig.restart()

    content = rig.store.open(rig.node())
    verify = rig.store.verify_later(content, [(0, len(expected))])
    assert verify is not None
    verify()()
    assert content.missing(0, len(expected)) == []
    assert content.read(0, len(expected)) == expected
    rig.store.release(content)


def confirm(rig: Rig, node: object, sent: bytes) -> None:
    """The remote has everything: as sync/steps.py does it."""
    node = rig.node()
    content = rig.store.open(node)
    layers = rig.store.freeze(content)
    with rig.database.transaction() as change:
        for layer in layers:
            change.execute("DELETE FROM layers WHERE id = ?", (layer.id,))
        change.update(
            node, base_parent=1, base_name=node.name, base_version="sent", base_size=len(sent), unsent=False, size=node.size
        )
    absorption = rig.store.begin_absorb(content, layers, size=len(sent))
    absorption.copy()
    rig.store.finish_absorb(absorption)
    rig.store.release(content)


def test_a_cache_that_cannot_be_written_costs_a_download_and_nothing_else(rig: Rig) -> None:
    node = rig.new_file()
    rig.write(node, 0, b"abc")
    (rig.cache_dir / "base").parent.mkdir(parents=True, exist_ok=True)
    (rig.cache_dir / "base").write_bytes(b"a file where the directory should be")

    confirm(rig, node, b"abc")

    content = rig.store.open(node)
    assert content.layers == []
    assert content.missing(0, 3) == [(0, 3)]
    rig.store.release(content)
    rig.check_counters()
    (rig.cache_dir / "base").unlink()
    rig.write(node, 1, b"X")
    rig.kill()
    assert rig.read(rig.node(), b"abc") == b"aXc"


def test_the_base_under_unsent_bytes_is_not_evicted(rig: Rig) -> None:
    base = b"a" * 1000
    node = rig.new_file(base=base)
    rig.read(node, base)
    rig.write(node, 3, b"x")
    assert rig.store.evict(node) == 0
    assert rig.store.cached_bytes == 1000


def test_a_fetch_into_a_base_that_was_replaced_counts_for_nothing(rig: Rig) -> None:
    node = rig.new_file(base=b"old" * 100)
    content = rig.store.open(node)
    fill = rig.store.fill(content, 0)
    fill.write(memoryview(b"old" * 50))
    rig.write(node, 0, b"new" * 100)
    confirm(rig, node, b"new" * 100)
    fill.write(memoryview(b"old" * 50))
    fill.note()
    fill.close()

    assert content.read(0, 300) == b"new" * 100
    rig.store.release(content)
    rig.check_counters()


def test_fetched_bytes_come_back_in_order_of_use(rig: Rig) -> None:
    """Eviction begins with what was not used for longest."""
    base = b"a" * 100
    for name in ("first", "second"):
        rig.read(rig.new_file(name, base=base), base)
    content = rig.store.open(rig.node("first"))
    content.used_at -= 1000
    rig.store.release(content)
    rig.store.save_all_present()
    at = dict(rig.database.connection.execute("SELECT ino, used_at FROM cached"))
    assert at[rig.node("first").ino] > time.time() - 10


# -- a loss of power --------------------------------------------------------------------------------------------------


def reboot_with(rig: Rig, damage: Callable[[], None]) -> None:
    rig.abandon()
    damage()
    rig.meddled = True
    rig.boot_id += " later"
    rig._open()


def test_after_an_orderly_reboot_everything_is_there(tmp_path: Path) -> None:
    """The daemon is stopped before the machine; no program has fsynced anything."""
    rig = Rig(tmp_path)
    node = rig.new_file()
    for offset in (0, 50, 25, 90, 10):
        rig.write(node, offset, bytes([offset + 1]) * 60)
    rig.truncate(node, 120)
    rig.write(node, 100, b"end" * 20)
    before = rig.read(node)
    rig.state.close()
    rig.boot_id += " later"
    rig._open()
    assert rig.read(rig.node()) == before
    rig.close()


def test_what_is_older_than_a_few_seconds_survives_without_fsync(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    node = rig.new_file()
    for offset in (0, 50, 25):
        rig.write(node, offset, b"x" * 60)
    rig.settle()
    assert rig.state.journal.size, "not yet"
    rig.store._unsettled_since -= SETTLE_EVERY
    rig.settle()
    assert not rig.state.journal.size
    rig.write(node, 200, b"y")
    assert rig.store._unsettled_since > time.monotonic() - SETTLE_EVERY
    rig.kill(reboot=True)
    assert rig.read(rig.node()) == b"x" * 110 + bytes(90) + b"y"
    rig.close()


def test_a_write_that_was_overwritten_in_part_is_not_believed_without_proof(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    node = rig.new_file()
    rig.write(node, 0, b"a" * 100)
    rig.fsync(node)
    rig.write(node, 100, b"b" * 100)
    rig.write(node, 150, b"c" * 100)
    rig.kill(reboot=True)
    assert rig.read(rig.node()) == b"a" * 100
    rig.close()


def test_bytes_that_the_disk_forgot_do_not_become_zeros(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The journal came to the disk, the file's last pages did not: the file ends where its bytes end."""
    rig = Rig(tmp_path)
    node = rig.new_file()
    rig.write(node, 0, b"a" * 4096)
    rig.fsync(node)
    rig.write(node, 4096, b"b" * 4096)
    rig.write(node, 8192, b"c" * 4096)
    (path,) = layer_files(rig)

    def forget() -> None:
        os.truncate(path, 4096)
        os.truncate(path, 12288)
        with path.open("r+b") as file:
            file.seek(8192)
            file.write(b"c" * 4096)  # pages reach the disk in any order

    reboot_with(rig, forget)

    assert rig.read(rig.node()) == b"a" * 4096
    assert rig.node().size == 4096
    assert "loss of power" in caplog.text
    rig.kill()
    assert rig.read(rig.node()) == b"a" * 4096, "what was taken back stays taken back"
    rig.close()


def test_a_write_during_fsync_is_not_taken_for_fsynced(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    node = rig.new_file()
    rig.write(node, 0, b"a" * 4096)
    content = rig.store.open(node)
    for number, call in enumerate(rig.store.syncing(content)):
        call()
        if number == 0:  # after the fsync of the bytes, before the record of it
            rig.store.write(content, 4096, b"b" * 4096, NOW)
    (path,) = layer_files(rig)

    def forget() -> None:
        os.truncate(path, 4096)
        os.truncate(path, 8192)

    reboot_with(rig, forget)
    assert rig.read(rig.node()) == b"a" * 4096
    rig.close()


def test_a_start_that_dies_after_a_reboot_is_still_a_start_after_a_reboot(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.write(rig.new_file(), 0, b"a" * 4096)
    (path,) = layer_files(rig)
    rig.abandon()
    os.truncate(path, 0)
    database = Database(rig.state_dir / "nodes.db")  # looked at, and died
    database.close()

    state = open_state(rig.state_dir, rig.cache_dir, accept, boot_id="boot 2")
    node = state.database.child(ROOT_INODE, "file")
    assert node is not None
    assert node.size == 0
    state.close()


def test_cached_bytes_that_the_disk_forgot_are_fetched_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    base = os.urandom(2 * BLOCK)
    rig.read(rig.new_file(base=base), base)
    rig.store.save_all_present()
    (path,) = rig.cache_dir.glob("base/*/*")

    def forget() -> None:
        os.truncate(path, 4096)
        os.truncate(path, len(base))

    reboot_with(rig, forget)
    assert rig.read(rig.node(), base) == base
    rig.close()


# -- errors of the disk -----------------------------------------------------------------------------------------------


def test_a_refused_fsync_is_never_followed_by_a_successful_one(rig: Rig) -> None:
    """The kernel drops the pages that it could not write and reports it once."""
    node = rig.new_file()
    rig.write(node, 0, b"x")
    content = rig.store.open(node)
    good, content.layers[0].fd = content.layers[0].fd, os.pipe()[0]  # fdatasync of a pipe fails
    with pytest.raises(OSError, match="Invalid"):
        rig.fsync(node)
    os.close(content.layers[0].fd)
    content.layers[0].fd = good

    with pytest.raises(OSError) as refused:
        rig.fsync(node)
    assert refused.value.errno == errno.EIO
    rig.store.release(content)


def test_a_write_that_finds_no_budget_leaves_the_file_clean(tmp_path: Path) -> None:
    def refuse(count: int) -> None:
        raise OSError(errno.ENOSPC, "no room")

    state = open_state(tmp_path / "state", tmp_path / "cache", refuse)
    with state.database.transaction() as change:
        node = change.insert(Kind.FILE, parent=ROOT_INODE, name="file")
    content: Content = state.store.open(node)
    with pytest.raises(OSError, match="no room"):
        state.store.write(content, 0, b"x", NOW)
    assert not node.unsent
    assert content.layers == []
    state.store.release(content)
    state.close()


def test_the_sequence_of_a_record_is_the_same_after_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    for number in range(3):
        assert journal.append(RecordKind.WRITE, number, 0, 1, 0) == number
    journal.rotate()
    assert journal.append(RecordKind.TOUCH, 3, 0, 0, 0) == 3
    journal.close()

    journal = Journal(tmp_path / "journal")
    assert [sequence for sequence, _ in journal.records()] == [0, 1, 2, 3]
    journal.retire()
    assert [sequence for sequence, _ in journal.records()] == [3]
    assert journal.next_sequence == 4
    journal.close()


def test_a_database_transaction_is_all_or_nothing_in_memory_too(rig: Rig) -> None:
    node = rig.new_file()
    with pytest.raises(sqlite3.IntegrityError), rig.database.transaction() as change:
        change.update(node, mode=0o700)
        change.insert(Kind.FILE, parent=ROOT_INODE, name="file")
    assert node.mode == 0
    rig.kill()
    assert rig.node().mode == 0


def unsent_files(rig: Rig) -> list[Path]:
    return sorted(path for path in (rig.state_dir / "unsent").rglob("*") if path.is_file())


def test_files_without_a_row_are_deleted_after_the_start_and_those_that_never_had_one_at_once(rig: Rig) -> None:
    """A start is waited for: no fsync in it. A number that was never committed is the next layer's."""
    first = rig.new_file("first")
    rig.write(first, 0, b"gone")
    with rig.database.transaction() as change:
        change.execute("DELETE FROM layers")
        change.update(first, unsent=False, size=0)
    (dead,) = unsent_files(rig)
    number = int(dead.name) + 1
    reused = dead.parent.with_name(f"{number % 256:02x}") / str(number)
    reused.parent.mkdir(exist_ok=True)
    reused.write_bytes(b"of a transaction that was never committed")

    rig.kill()
    assert [path.name for path in unsent_files(rig)] == [dead.name]
    second = rig.new_file("second")
    rig.write(second, 0, b"new")
    rig.settle()

    assert [path.name for path in unsent_files(rig)] == [str(number)]
    assert rig.read(rig.node("second")) == b"new"
