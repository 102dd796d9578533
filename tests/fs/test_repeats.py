"""A request that a dead worker had carried out is recognised, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbmountd.disk.database import Database
from nbmountd.fs.repeats import Repeats
from nbmountd.model import Kind


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "nodes.db")
    yield database
    database.close()


def carry_out(database: Database, request: str) -> int:
    repeats = Repeats(database, resumed=False)
    with repeats.asked(request), database.transaction() as change:
        node = change.insert(Kind.FILE, parent=1, name=request)
        repeats.note(change, node.ino)
    return node.ino


def test_the_last_change_is_recognised_once(database: Database) -> None:
    ino = carry_out(database, "('create', 12, 1, b'a')")
    repeats = Repeats(database, resumed=True)

    assert repeats.carried_out("('create', 13, 1, b'a')") is None
    assert repeats.carried_out("('create', 12, 1, b'a')") == ino
    assert repeats.carried_out("('create', 12, 1, b'a')") is None


def test_a_worker_that_begins_with_its_mount_recognises_nothing(database: Database) -> None:
    carry_out(database, "x")

    assert Repeats(database, resumed=False).carried_out("x") is None


def test_a_change_that_was_rolled_back_was_not_carried_out(database: Database) -> None:
    repeats = Repeats(database, resumed=False)
    with pytest.raises(OSError), repeats.asked("x"), database.transaction() as change:
        repeats.note(change, 0)
        raise OSError

    assert Repeats(database, resumed=True).carried_out("x") is None


def test_a_change_that_no_program_asked_for_is_not_noted(database: Database) -> None:
    ino = carry_out(database, "x")
    repeats = Repeats(database, resumed=True)

    with database.transaction() as change:
        repeats.note(change, 0)

    assert Repeats(database, resumed=True).carried_out("x") == ino
