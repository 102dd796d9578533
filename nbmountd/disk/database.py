"""The nodes of one mount in SQLite: local position, base, content records, kept over restarts.

It knows no remote, no FUSE and no bytes of content. Every local change is one transaction, committed before the program
that asked for it gets its answer: WAL with `synchronous=NORMAL`, so a commit survives the death of this process but is
durable against loss of power only after `sync`. `locking_mode=EXCLUSIVE` needs no shared memory, so
that the file may lie on NFS, and keeps a second daemon out.

A `Node` in memory is the row: it changes only by a transaction's `update`, at the commit, so that memory never says what
the disk does not know. There is at most one `Node` object for an inode number at any time.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from operator import itemgetter
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec
from cachetools import LRUCache

from nbmountd.errors import StateError
from nbmountd.model import ROOT_INODE, Kind

SCHEMA_VERSION = 4

LOCK_TIMEOUT = 5.0
"""Seconds that a worker waits for its predecessor, which may still be dying, to let go of the database."""

RESIDENT_NODES = 20_000
"""Nodes kept in memory though nothing refers to them; about 1 KiB each. A guess: two large directories."""

MOST_PARAMETERS = 500
"""Of one statement; SQLite allows 999 at least."""

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE nodes (
    ino INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: the kernel may remember an old one
    kind INTEGER NOT NULL,
    -- local position; parent NULL: removed (the root is its own parent)
    parent INTEGER, name BLOB NOT NULL,
    mode INTEGER NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
    target BLOB, xattrs BLOB, rdev INTEGER NOT NULL,
    -- base; base_parent NULL: the remote never saw it, or no longer has it
    base_parent INTEGER, base_name BLOB NOT NULL, base_id TEXT, base_version TEXT, base_size INTEGER, base_mtime_ns INTEGER,
    unsent INTEGER NOT NULL,       -- content differs from base: there are layers
    unsent_attributes INTEGER NOT NULL,  -- bits of UnsentAttribute
    writable INTEGER NOT NULL,     -- the remote lets us change it
    local_only INTEGER NOT NULL,   -- excluded: never sent
    listed INTEGER NOT NULL,       -- directory: every base child is known
    changed_at REAL NOT NULL,      -- seconds since 1970 of the last local change not yet sent
    link_of INTEGER,               -- a further name of that file: content and attributes are the other node's
    removable INTEGER NOT NULL DEFAULT 1  -- the remote lets us remove and rename it
);
CREATE UNIQUE INDEX nodes_by_name ON nodes (parent, name) WHERE parent IS NOT NULL;
CREATE UNIQUE INDEX nodes_by_base ON nodes (base_parent, base_name) WHERE base_parent IS NOT NULL;
CREATE INDEX nodes_by_base_id ON nodes (base_id) WHERE base_id IS NOT NULL;
CREATE INDEX nodes_to_send ON nodes (ino) WHERE local_only = 0
    AND (parent IS NOT base_parent OR name IS NOT base_name OR unsent OR unsent_attributes);
CREATE INDEX nodes_by_link ON nodes (link_of) WHERE link_of IS NOT NULL;
CREATE INDEX nodes_removed ON nodes (ino) WHERE parent IS NULL;
CREATE TABLE layers (
    id INTEGER PRIMARY KEY AUTOINCREMENT, ino INTEGER NOT NULL, size INTEGER NOT NULL, floor INTEGER,
    mtime_ns INTEGER NOT NULL, extents BLOB NOT NULL
);
CREATE INDEX layers_by_node ON layers (ino);
CREATE TABLE cached (  -- bytes: the total of extents
    ino INTEGER PRIMARY KEY, version TEXT NOT NULL, size INTEGER NOT NULL, bytes INTEGER NOT NULL, extents BLOB NOT NULL,
    sums BLOB NOT NULL, used_at REAL NOT NULL
);
CREATE TABLE work (  -- what is remembered of a node's unsent work beyond its state
    ino INTEGER PRIMARY KEY, parked INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '', at REAL NOT NULL DEFAULT 0,
    token TEXT
);
CREATE TABLE doubts (  -- a step that was begun and of which nobody knows whether the remote has carried it out
    ino INTEGER PRIMARY KEY, kind TEXT NOT NULL, parent INTEGER NOT NULL, name BLOB NOT NULL, version TEXT,
    layer INTEGER NOT NULL
);
CREATE TABLE conflicts (
    id INTEGER PRIMARY KEY, ino INTEGER NOT NULL, remote_ino INTEGER, at REAL NOT NULL,
    local_size INTEGER, local_mtime_ns INTEGER, remote_size INTEGER, remote_mtime_ns INTEGER
);
"""

_MIGRATIONS = {
    # 1 knew no checksums of cached bytes: they are fetched again.
    1: "DROP TABLE cached;\n" + _SCHEMA[_SCHEMA.index("CREATE TABLE cached") : _SCHEMA.index("CREATE TABLE work")],
    2: _SCHEMA[_SCHEMA.index("CREATE TABLE doubts") : _SCHEMA.index("CREATE TABLE conflicts")],
    3: "ALTER TABLE nodes ADD COLUMN removable INTEGER NOT NULL DEFAULT 1",
}
"""Schema version -> statements that make the next one of it. A version that was released keeps its row for ever."""


class UnreadableDatabaseError(StateError):
    """The file is there and is no database, or a damaged one. What it held can only be quarantined."""


@dataclass(eq=False)
class Node:
    """One file, directory or symlink. Field order is column order. See the schema for what each means."""

    ino: int
    kind: Kind
    parent: int | None
    name: str
    mode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    target: str | None
    xattrs: dict[str, bytes]
    rdev: int
    base_parent: int | None
    base_name: str
    base_id: str | None
    base_version: str | None
    base_size: int | None
    base_mtime_ns: int | None
    unsent: bool
    unsent_attributes: int
    writable: bool
    local_only: bool
    listed: bool
    changed_at: float
    link_of: int | None
    removable: bool

    @property
    def is_directory(self) -> bool:
        return self.kind is Kind.DIRECTORY

    @property
    def removed(self) -> bool:
        return self.parent is None

    @property
    def in_place(self) -> bool:
        """Local position = base position."""
        return self.parent == self.base_parent and self.name == self.base_name

    @property
    def to_send(self) -> bool:
        """Local ≠ base: there is something that the remote does not know."""
        if self.local_only:
            return False
        if self.parent is None and self.base_parent is None:
            return False
        return not self.in_place or self.unsent or bool(self.unsent_attributes)


_COLUMNS = tuple(field.name for field in fields(Node))
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM nodes "
_INSERT = f"INSERT INTO nodes ({', '.join(_COLUMNS[1:])}) VALUES ({', '.join('?' * (len(_COLUMNS) - 1))})"
_INSERT_AS = f"INSERT INTO nodes ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
_TOLD = (
    "kind", "name", "mode", "size", "mtime_ns", "ctime_ns", "target", "xattrs", "base_id", "base_version", "base_size",
    "base_mtime_ns", "writable", "removable",
)  # fmt: skip
"""What a remote tells of a node."""
_told = itemgetter(*_TOLD)
_INSERT_CLEAN = f"""INSERT INTO nodes
    (ino, parent, base_parent, {", ".join(_TOLD)}, base_name, rdev, unsent, unsent_attributes, local_only, listed, changed_at)
    VALUES (?1, ?2, ?2, {", ".join(f"?{number}" for number in range(3, 3 + len(_TOLD)))}, ?4, 0, 0, 0, 0, 0, 0.0)"""
_TO_SEND = "local_only = 0 AND (parent IS NOT base_parent OR name IS NOT base_name OR unsent OR unsent_attributes)"
_DEFAULTS: dict[str, Any] = {
    "parent": None, "name": "", "mode": 0, "size": 0, "mtime_ns": 0, "ctime_ns": 0, "target": None, "xattrs": {}, "rdev": 0,
    "base_parent": None, "base_name": "", "base_id": None, "base_version": None, "base_size": None,
    "base_mtime_ns": None, "unsent": False, "unsent_attributes": 0, "writable": True, "local_only": False,
    "listed": False, "changed_at": 0.0, "link_of": None, "removable": True,
}  # fmt: skip


def is_damage(exc: BaseException) -> bool:
    """Whether SQLite says that the file itself is wrong; all else may pass. (Python 3.10 gives the text only.)"""
    return isinstance(exc, sqlite3.DatabaseError) and any(
        sign in str(exc) for sign in ("not a database", "malformed", "unsupported file format", "corrupt")
    )


def _to_column(name: str, value: Any) -> Any:
    if name in ("name", "base_name", "target"):
        return None if value is None else os.fsencode(value)
    if name == "xattrs":
        return msgspec.msgpack.encode(value) if value else None
    return value


def _from_row(row: tuple[Any, ...]) -> Node:
    node = Node(*row)
    node.kind = Kind(row[1])
    node.name = os.fsdecode(row[3])
    node.base_name = os.fsdecode(row[12])
    node.target = None if row[8] is None else os.fsdecode(row[8])
    node.xattrs = msgspec.msgpack.decode(row[9], type=dict[str, bytes]) if row[9] else {}
    node.unsent, node.writable, node.local_only, node.listed = bool(row[17]), bool(row[19]), bool(row[20]), bool(row[21])
    node.removable = bool(row[24])
    return node


class Transaction:
    """Changes that are committed together; `Node` objects show them after the commit only."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._updates: list[tuple[Node, dict[str, Any]]] = []
        self._inserted: list[Node] = []
        self._deleted: list[int] = []

    def insert(self, kind: Kind, **values: Any) -> Node:
        """A new node with a new inode number; columns not named get their empty value."""
        values = _DEFAULTS | {"xattrs": {}} | values | {"kind": kind}
        cursor = self.execute(_INSERT, [_to_column(name, values[name]) for name in _COLUMNS[1:]])
        node = Node(ino=int(cursor.lastrowid or 0), **values)
        self._inserted.append(node)
        return node

    def insert_clean(self, parent: int, found: Iterable[Mapping[str, Any]]) -> None:
        """New nodes with new inode numbers in the directory `parent`, each as the remote has it: local = base. All or none.

        Each of `found` names all columns of _TOLD. A listing of 1,000 makes as many at once: in one go, and with what is the
        same for all of them in the statement, it takes a third of the time of `insert`.
        """
        (last,) = self.execute("SELECT seq FROM sqlite_sequence WHERE name = 'nodes'").fetchone()
        rows = []
        for ino, values in enumerate(found, last + 1):
            (
                kind, name, mode, size, mtime_ns, ctime_ns, target, xattrs, base_id, version, base_size, base_mtime_ns,
                writable, removable,
            ) = _told(values)  # fmt: skip
            self._inserted.append(
                Node(
                    ino, kind, parent, name, mode, size, mtime_ns, ctime_ns, target, xattrs, 0,
                    parent, name, base_id, version, base_size, base_mtime_ns, False, 0, writable, False, False, 0.0, None,
                    removable,
                )
            )  # fmt: skip
            # An enumeration or a bool costs sqlite3 as much as all the rest of a row.
            rows.append(
                (
                    ino, parent, int(kind), os.fsencode(name), mode, size, mtime_ns, ctime_ns, target and os.fsencode(target),
                    msgspec.msgpack.encode(xattrs) if xattrs else None, base_id, version, base_size, base_mtime_ns,
                    int(writable), int(removable),
                )
            )  # fmt: skip
        self._database.connection.executemany(_INSERT_CLEAN, rows)

    def update(self, node: Node, **values: Any) -> None:
        self.execute(
            f"UPDATE nodes SET {', '.join(f'{name} = ?' for name in values)} WHERE ino = ?",
            [*(_to_column(name, value) for name, value in values.items()), node.ino],
        )
        self._updates.append((node, values))

    def delete(self, node: Node) -> None:
        """Takes the row away for good; nobody may hold the inode number any longer."""
        for table in ("nodes", "layers", "cached", "work", "doubts"):
            self.execute(f"DELETE FROM {table} WHERE ino = ?", [node.ino])
        self._deleted.append(node.ino)

    def execute(self, sql: str, parameters: Iterable[Any] = ()) -> sqlite3.Cursor:
        return self._database.connection.execute(sql, tuple(parameters))

    def _apply(self) -> None:
        for node in self._inserted:
            self._database.remember(node)
        for node, values in self._updates:
            for name, value in values.items():
                setattr(node, name, value)
        for ino in self._deleted:
            self._database.forget(ino)


class Database:
    """The open database of one mount. Used from the loop's thread only; every call is short. Closed with `close`."""

    def __init__(self, path: Path) -> None:
        """Opens or makes it. Raises StateError when it is locked by another daemon, of a newer version or cannot be opened,
        UnreadableDatabaseError when it is damaged."""
        self._known: WeakValueDictionary[int, Node] = WeakValueDictionary()
        self._recent: LRUCache[int, Node] = LRUCache(RESIDENT_NODES)
        self._commits = self._synced = 0
        self._sync_lock = threading.Lock()
        try:
            self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=LOCK_TIMEOUT)
        except sqlite3.Error as exc:
            raise StateError(f"{path} cannot be opened: {exc}") from exc
        try:
            self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = NORMAL")
            self.connection.execute("PRAGMA wal_autocheckpoint = 4000")  # 16 MiB: a checkpoint fsyncs on the loop
            self.connection.execute("PRAGMA cache_size = -8192")
            self.connection.execute("BEGIN IMMEDIATE")  # takes the lock now, not at the first change
            self._migrate()
            self.connection.execute("COMMIT")
            self._wal_fd = os.open(f"{path}-wal", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException as exc:
            self.connection.close()
            if isinstance(exc, sqlite3.OperationalError) and "locked" in str(exc):
                raise StateError(f"{path} is in use by another nbmountd") from exc
            if is_damage(exc):
                raise UnreadableDatabaseError(f"{path} is damaged: {exc}") from exc
            if isinstance(exc, (sqlite3.Error, OSError)):
                raise StateError(f"{path} cannot be opened: {exc}") from exc
            raise

    def _migrate(self) -> None:
        (version,) = self.connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise StateError(f"the state directory was written by a newer nbmountd (schema {version})")
        if version == 0:
            self._run(_SCHEMA)
            root = {"kind": Kind.DIRECTORY, "mode": 0o755, "parent": 1, "base_parent": 1}
            self.connection.execute(
                _INSERT_AS,
                [ROOT_INODE, *(_to_column(name, (_DEFAULTS | root)[name]) for name in _COLUMNS[1:])],
            )
        else:
            for older in range(version, SCHEMA_VERSION):
                self._run(_MIGRATIONS[older])
        self.connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _run(self, statements: str) -> None:
        """Not `executescript`, which would end our transaction."""
        for statement in statements.split(";\n"):
            if statement.strip():
                self.connection.execute(statement)

    def check(self) -> None:
        """Reads all of it. Raises UnreadableDatabaseError when something does not fit; takes 1 s for 200 MB."""
        try:
            (answer,) = self.connection.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as exc:
            answer = str(exc)
        if answer != "ok":
            raise UnreadableDatabaseError(f"the database is damaged: {answer}")

    @property
    def commits(self) -> int:
        """Transactions committed by this process; for `sync`."""
        return self._commits

    def sync(self, commits: int) -> None:
        """Returns when the first so many commits survive loss of power. In a thread; who comes together shares one fsync."""
        with self._sync_lock:
            if self._synced < commits:
                reached = self._commits
                os.fdatasync(self._wal_fd)
                self._synced = reached

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """All or nothing. No await inside. Raises sqlite3.Error when the disk is full; then nothing has changed."""
        transaction = Transaction(self)
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield transaction
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise
        self._commits += 1
        transaction._apply()

    def remember(self, node: Node) -> None:
        self._known[node.ino] = node
        self._recent[node.ino] = node

    def forget(self, ino: int) -> None:
        self._known.pop(ino, None)
        self._recent.pop(ino, None)

    def get(self, ino: int) -> Node | None:
        """The node with that number, removed ones included; None if there is none."""
        node = self._known.get(ino)
        if node is None:
            return self._one("WHERE ino = ?", ino)
        return node

    @property
    def root(self) -> Node:
        root = self.get(ROOT_INODE)
        assert root is not None
        return root

    def child(self, parent: int, name: str) -> Node | None:
        """Who has that local name."""
        return self._one("WHERE parent = ? AND name = ?", parent, os.fsencode(name))

    def children(self, parent: int) -> list[Node]:
        """All with a local name in the directory, by inode number (the root is not its own child)."""
        where = "WHERE parent = ? AND ino != ? ORDER BY ino"
        numbers = self.connection.execute("SELECT ino FROM nodes " + where, (parent, ROOT_INODE))
        nodes = [self._known.get(ino) for (ino,) in numbers]
        resident = [node for node in nodes if node is not None]
        if len(resident) == len(nodes):  # a directory listed again: an eighth of the time
            return resident
        return self._many(where, parent, ROOT_INODE)

    def child_directories(self, parent: int) -> list[tuple[str, int]]:
        """Name and inode number of all directories with a local name in the directory."""
        where = "WHERE parent = ? AND ino != ? AND kind = ?"
        rows = self.connection.execute("SELECT name, ino FROM nodes " + where, (parent, ROOT_INODE, Kind.DIRECTORY.value))
        return [(os.fsdecode(name), ino) for name, ino in rows]

    def has_children(self, parent: int) -> bool:
        row = self.connection.execute(
            "SELECT 1 FROM nodes WHERE parent = ? AND ino != ? LIMIT 1", (parent, ROOT_INODE)
        ).fetchone()
        return row is not None

    def base_child(self, parent: int, name: str) -> Node | None:
        """Who the remote knows under that name."""
        return self._one("WHERE base_parent = ? AND base_name = ?", parent, os.fsencode(name))

    def base_children(self, parent: int) -> list[Node]:
        return self._many("WHERE base_parent = ? AND ino != ?", parent, ROOT_INODE)

    def with_base_id(self, base_id: str) -> list[Node]:
        return self._many("WHERE base_id = ?", base_id)

    def elsewhere(self, directory: int, base_ids: Sequence[str]) -> list[Node]:
        """The nodes with one of these ids that have no base in the directory."""
        found: list[Node] = []
        for start in range(0, len(base_ids), MOST_PARAMETERS):
            some = base_ids[start : start + MOST_PARAMETERS]
            where = f"WHERE base_id IN ({', '.join('?' * len(some))}) AND base_parent IS NOT ?"
            found += self._many(where, *some, directory)
        return found

    def aliases(self, ino: int) -> list[Node]:
        """The further names of a file."""
        return self._many("WHERE link_of = ? AND parent IS NOT NULL", ino)

    def count_aliases(self) -> dict[int, int]:
        """For each file with further names, how many."""
        rows = self.connection.execute(
            "SELECT link_of, count(*) FROM nodes WHERE link_of IS NOT NULL AND parent IS NOT NULL GROUP BY link_of"
        )
        return dict(rows.fetchall())

    def to_send(self) -> list[Node]:
        """Every node whose local position, attributes or content differ from its base."""
        return [node for node in self._many(f"WHERE {_TO_SEND}") if node.to_send]

    def removed(self) -> list[Node]:
        return self._many("WHERE parent IS NULL")

    def count_local_only(self) -> int:
        (count,) = self.connection.execute("SELECT count(*) FROM nodes WHERE local_only AND parent IS NOT NULL").fetchone()
        return int(count)

    def get_meta(self, key: str) -> str | None:
        row = self.connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> None:
        self.connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def checkpoint(self) -> None:
        """Moves the WAL into the database, with fsync: afterwards everything committed is durable."""
        self.connection.execute("PRAGMA wal_checkpoint(FULL)")

    def close(self) -> None:
        os.close(self._wal_fd)
        self.connection.close()

    def _one(self, where: str, *parameters: Any) -> Node | None:
        row = self.connection.execute(_SELECT + where, parameters).fetchone()
        return None if row is None else self._resident(row)

    def _many(self, where: str, *parameters: Any) -> list[Node]:
        return [self._resident(row) for row in self.connection.execute(_SELECT + where, parameters)]

    def _resident(self, row: tuple[Any, ...]) -> Node:
        node = self._known.get(row[0])
        if node is None:
            node = _from_row(row)
            self.remember(node)
        else:
            self._recent[node.ino] = node
        return node
