"""What is so after a death: the layers as the journal says they are, on top of what the database knew.

After the death of the process every record is believed, as its bytes were written before it. After a loss of power a record
may be on the disk without its bytes. Then what was fsynced is believed (SYNC), and of each layer's later records those up to
the first one whose bytes are not there for certain: the file is as it was at some moment after its last fsync or settling,
and never has zeros where a program wrote something else. It knows nothing of the cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import google_crc32c

from nbmountd.disk.database import Database, Node, Transaction
from nbmountd.disk.extents import Extents
from nbmountd.disk.journal import Journal, Record, RecordKind
from nbmountd.disk.layers import Layer
from nbmountd.log import get_logger

SETTLED = "journal_settled"
"""Key in `meta`: the rows know all records below this sequence."""
_END = 2**63
_log = get_logger(__name__)


class Replay:
    """One replay of the whole journal. `layers` (by id: inode number and layer) are brought up to date in place."""

    def __init__(
        self,
        database: Database,
        journal: Journal,
        layers: dict[int, tuple[int, Layer]],
        path: Callable[[int], Path],
    ) -> None:
        self._database = database
        self._journal = journal
        self._layers = layers
        self._path = path
        self.touched: set[int] = set()
        """Layers of which the journal knew more than the database."""

    def run(self, *, power_lost: bool) -> None:
        """Raises OSError."""
        settled = int(self._database.get_meta(SETTLED) or 0)
        # The deletion of settled files may have been forgotten, or their names with all that came after.
        self._journal.skip_to(settled)
        records = [(sequence, record) for sequence, record in self._journal.records() if sequence >= settled]
        unreadable = [sequence for sequence, record in records if record is None]
        if unreadable:
            _log.warning("part of the journal cannot be read", records=len(unreadable), of=len(records))
        believed_until = self._first_doubts(records) if power_lost else {}
        for sequence, record in records:
            if record is None or record.kind is RecordKind.SYNC or record.layer not in self._layers:
                continue
            if sequence >= believed_until.get(record.layer, _END):
                continue
            layer = self._layers[record.layer][1]
            self.touched.add(layer.id)
            layer.sequence, layer.mtime_ns = sequence, record.mtime_ns
            if record.kind is RecordKind.WRITE:
                layer.extend(record.offset, record.stop)
            elif record.kind is RecordKind.TRUNCATE:
                layer.resize(record.offset)
        for id in believed_until:
            _log.warning("not all bytes written before the loss of power, and not fsynced, are on the disk", **self._name(id))

    def unsettled(self) -> dict[int, tuple[Node, Layer]]:
        """The layers of which the journal still knows more than the database, with their nodes."""
        found = {}
        for id in self.touched:
            ino, layer = self._layers[id]
            node = self._database.get(ino)
            if node is not None:
                found[id] = (node, layer)
        return found

    def write_nodes(self, change: Transaction) -> None:
        """Size and mtime of every node with layers are those of its newest; work on bytes that are lost is parked."""
        newest = dict(self._layers.values())
        for ino, layer in newest.items():
            node = self._database.get(ino)
            if node is not None and (node.size, node.mtime_ns) != (layer.size, layer.mtime_ns):
                change.update(node, size=layer.size, mtime_ns=layer.mtime_ns, ctime_ns=max(layer.mtime_ns, node.ctime_ns))
        for ino, layer in self._layers.values():
            if layer.lost is not None or self._length(layer) < layer.extents.stop:
                error = f"the local disk has lost unsent bytes of this file ({self._path(layer.id)})"
                _log.error(error, **self._name(layer.id))
                change.execute(
                    "INSERT INTO work (ino, parked, error, at) VALUES (?, 1, ?, ?)"
                    " ON CONFLICT (ino) DO UPDATE SET parked = 1, error = excluded.error, at = excluded.at",
                    (ino, error, time.time()),
                )

    def write_layers(self, change: Transaction) -> None:
        """Puts what was replayed into the rows; its bytes must be on the disk. The journal says nothing new then."""
        change.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (SETTLED, str(self._journal.next_sequence)))
        for id in self.touched:
            layer = self._layers[id][1]
            layer.sequence = -1
            change.execute(
                "UPDATE layers SET size = ?, floor = ?, mtime_ns = ?, extents = ? WHERE id = ?",
                (layer.size, layer.floor, layer.mtime_ns, layer.extents.pack(), id),
            )

    def _length(self, layer: Layer) -> int:
        try:
            return self._path(layer.id).stat().st_size
        except FileNotFoundError:
            return 0

    def _name(self, id: int) -> dict[str, object]:
        node = self._database.get(self._layers[id][0])
        return {"inode": self._layers[id][0], "name": None if node is None else node.name}

    # -- after a loss of power ----------------------------------------------------------------------------------------

    def _first_doubts(self, records: list[tuple[int, Record | None]]) -> dict[int, int]:
        """For each layer with a record whose bytes are not there: the sequence of the first such record."""
        synced: dict[int, int] = {}
        by_layer: dict[int, list[tuple[int, Record]]] = {}
        gap = _first_gap(records)
        for sequence, record in records:
            if record is None or record.layer not in self._layers:
                continue
            if record.kind is RecordKind.SYNC:
                if sequence < gap:  # else its own fsync had not ended
                    synced[record.layer] = max(record.offset, synced.get(record.layer, 0))
            else:
                by_layer.setdefault(record.layer, []).append((sequence, record))
        doubts: dict[int, int] = {}
        for id, own in by_layer.items():
            unsynced = [(sequence, record) for sequence, record in own if sequence >= synced.get(id, 0)]
            there = self._with_bytes(id, unsynced)
            cut = min((sequence for sequence, _ in unsynced if sequence >= gap), default=_END)
            while (earlier := _first_without_bytes(unsynced, there, cut)) < cut:
                cut = earlier
            if cut < _END:
                doubts[id] = cut
        return doubts

    def _with_bytes(self, id: int, records: list[tuple[int, Record]]) -> set[int]:
        """Sequences of the writes whose bytes the file has, all of them and unchanged."""
        try:
            fd = os.open(self._path(id), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return set()
        try:
            return {
                sequence for sequence, record in records
                if record.kind is RecordKind.WRITE
                and google_crc32c.value(os.pread(fd, record.length, record.offset)) == record.checksum
            }  # fmt: skip
        finally:
            os.close(fd)


def _first_gap(records: list[tuple[int, Record | None]]) -> int:
    """The sequence of the first record that is unreadable or, at the end of an older file, not there."""
    expected = records[0][0] if records else 0
    for sequence, record in records:
        if record is None or sequence != expected:
            return expected
        expected += 1
    return _END


def _first_without_bytes(records: list[tuple[int, Record]], there: set[int], cut: int) -> int:
    """The sequence of the first write before `cut` of which not every byte is known to be on the disk; `cut` if there is none.

    A later write that is there answers for what it covers. What a believed truncation cut off is not asked for. No checksum
    tells of a part of a write, so one that is overwritten in part counts as not there.
    """
    answered = Extents()
    first = cut
    for sequence, record in reversed(records):
        if record.kind is RecordKind.TRUNCATE and sequence < cut:
            answered.add(record.offset, _END)
        elif record.kind is RecordKind.WRITE:
            if sequence in there:
                answered.add(record.offset, record.stop)
            elif sequence < cut and not answered.covers(record.offset, record.stop):
                first = sequence
    return first
