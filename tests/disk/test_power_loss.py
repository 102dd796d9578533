"""After a loss of power: what was fsynced is there, the database opens, and no zeros are called data.

The whole state directory (database, journal, layers) lies on a file system that records what a disk is told; then the power
goes at many moments of the record, in many of the ways that the fsyncs made allow.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nbmountd.disk.state import open_state
from nbmountd.model import ROOT_INODE
from tests.disk.power_loss import Entry, materialise, read_record
from tests.disk.rig import Rig, accept

WORLDS = int(os.environ.get("WORLDS", "150"))
SEED = int(os.environ.get("SEED", random.randrange(10**6)))


@pytest.fixture
def recorded(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A directory whose changes are recorded, and the record."""
    backing, mount, record = tmp_path / "backing", tmp_path / "mount", tmp_path / "record"
    backing.mkdir()
    mount.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "recording_fs.py"), str(backing), str(mount), str(record)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "mounted\n"
        yield mount, record
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)
        process.wait(10)
        process.stdout.close()


@dataclass
class File:
    """What a program did to a file: its states, each with the place in the record where it began to be possible."""

    states: list[tuple[int, bytes]] = field(default_factory=list)
    fsynced: list[tuple[int, int]] = field(default_factory=list)
    """(place in the record, index of the state) of each fsync that returned."""
    sent: dict[str, bytes] = field(default_factory=dict)

    def possible(self, place: int) -> list[bytes]:
        """The states that may be left when the power goes at `place`: not older than the last fsync."""
        oldest = max((index for at, index in self.fsynced if at <= place), default=0)
        return [state for at, state in self.states[oldest:] if at <= place]


def work(rig: Rig, record: Path, chance: random.Random) -> dict[str, File]:
    """Programs and the daemon at work on three files."""
    files = {name: File([(place(record), b"")]) for name in ("a", "b", "c")}
    for name in files:
        rig.new_file(name)
    for number in range(120):
        name = chance.choice("abc")
        file, node = files[name], rig.node(name)
        now = file.states[-1][1]
        what = chance.choice(["write"] * 6 + ["truncate", "fsync", "fsync", "settle", "send"])
        if what == "write":
            offset = chance.choice([len(now), len(now), 0, chance.randrange(30_000)])
            data = bytes([number % 255 + 1]) * chance.choice([10, 3000, 9000])
            file.states.append((place(record), now.ljust(offset, b"\0")[:offset] + data + now[offset + len(data) :]))
            rig.write(node, offset, data)
        elif what == "truncate":
            size = chance.randrange(20_000)
            file.states.append((place(record), now[:size].ljust(size, b"\0")))
            rig.truncate(node, size)
        elif what == "fsync":
            rig.fsync(node)
            file.fsynced.append((place(record), len(file.states) - 1))
        elif what == "settle":
            rig.settle()
        elif node.unsent:
            version = str(number)
            file.sent[version] = now
            send(rig, name, now, version)
    return files


def send(rig: Rig, name: str, sent: bytes, version: str) -> None:
    node = rig.node(name)
    content = rig.store.open(node)
    layers = rig.store.freeze(content)
    with rig.database.transaction() as change:
        for layer in layers:
            change.execute("DELETE FROM layers WHERE id = ?", (layer.id,))
        change.update(
            node, base_parent=1, base_name=name, base_version=version, base_size=len(sent), unsent=False, size=len(sent)
        )
    absorption = rig.store.begin_absorb(content, layers, size=len(sent))
    absorption.copy()
    rig.store.finish_absorb(absorption)
    rig.store.release(content)


def place(record: Path) -> int:
    return record.stat().st_size


def check(world: Path, cache: Path, files: dict[str, File], at: int) -> None:
    state = open_state(world, cache, accept, boot_id="after")
    try:
        assert not (world / "quarantine").exists(), "the database must open"
        for name, file in files.items():
            possible = file.possible(at)
            fsynced = any(when <= at for when, _ in file.fsynced)
            node = state.database.child(ROOT_INODE, name)
            if node is None:
                assert not fsynced, f"{name} is gone"
                continue
            content = state.store.open(node)
            base = file.sent.get(node.base_version or "", b"")
            for start, stop in content.missing(0, content.size):
                fill = state.store.fill(content, start)
                fill.write(memoryview(base[start:stop]))
                fill.note()
                fill.close()
            data = content.read(0, content.size)
            state.store.release(content)
            assert node.size == len(data)
            assert len(data) in {len(state) for state in possible}, f"{name}: a size it never had"
            for offset, byte in enumerate(data):
                seen = {state[offset] for state in possible if offset < len(state)}
                assert byte in seen, f"{name}: byte {offset} is {byte}, not one of {seen}"
    finally:
        state.close()


@pytest.mark.timeout(600)
def test_what_was_fsynced_survives_any_loss_of_power(recorded: tuple[Path, Path], tmp_path: Path) -> None:
    print(f"SEED={SEED} WORLDS={WORLDS}")
    chance = random.Random(SEED)
    home, record = recorded
    rig = Rig(home, journal_limit=600, keep_open=1)
    files = work(rig, record, chance)
    rig.abandon()
    entries, places = read_record(record)
    assert any(entry[0] == "unlink" for entry in entries)

    for number in range(WORLDS):
        cut = chance.randrange(len(entries) // 10, len(entries) + 1)
        world = tmp_path / f"world {number}"
        materialise(below(entries[:cut], "state 0"), world, chance)
        if (world / "nodes.db").exists():
            check(world, tmp_path / f"cache {number}", files, places[cut])
        else:
            assert all(when > places[cut] for file in files.values() for when, _ in file.fsynced), "the database is gone"
        shutil.rmtree(world)
        shutil.rmtree(tmp_path / f"cache {number}", ignore_errors=True)


def below(entries: list[Entry], directory: str) -> list[Entry]:
    """What concerns that directory, with paths relative to it; files of others keep no name and do no harm."""
    found: list[Entry] = []
    for kind, *rest in entries:
        if kind in ("write", "truncate", "fsync"):
            found.append((kind, *rest))
            continue
        paths = [part for part in rest if isinstance(part, str)]
        if all(path == directory or path.startswith(f"{directory}/") for path in paths):
            found.append((kind, *(os.path.relpath(part, directory) if isinstance(part, str) else part for part in rest)))
    return found

