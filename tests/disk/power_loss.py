"""What may be on a disk after a loss of power, given what it was told: any of the worlds that the fsyncs allow.

    ("create", path, file) ("mkdir", path) ("unlink", path) ("rename", path, path)   names
    ("write", file, offset, bytes) ("truncate", file, size)                           contents
    ("fsync", file) ("fsyncdir", path)                                                promises

Of what a file was told since its last fsync, any subset of pages may have come to the disk. Of the changes of a directory, any
prefix that holds everything before its last fsync. Nothing is assumed of the order between files, and an fsync of a file does
not save its name: stricter than any file system of today.
"""

from __future__ import annotations

import os
import pickle
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

PAGE = 4096
Entry = tuple[Any, ...]


def read_record(path: Path) -> tuple[list[Entry], list[int]]:
    """The entries, and where in the record each of them begins, and its end."""
    entries: list[Entry] = []
    places = [0]
    with path.open("rb") as file:
        while True:
            try:
                entries.append(pickle.load(file))
            except EOFError:
                return entries, places
            places.append(file.tell())


def materialise(entries: list[Entry], target: Path, chance: random.Random) -> None:
    """Makes one of the worlds that may be left when the power goes after the last of `entries`."""
    contents = {file: _content(told, chance) for file, told in _by_file(entries).items()}
    names = _names(entries, chance)
    target.mkdir()
    there = {""}
    for path, file in sorted(names.items()):
        if path == "." or os.path.dirname(path) not in there:
            continue  # below a directory that is not there
        if file is None:
            there.add(path)
            (target / path).mkdir(mode=0o700)
        else:
            (target / path).write_bytes(contents.get(file, b""))


def _by_file(entries: list[Entry]) -> dict[int, list[Entry]]:
    told: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry[0] in ("write", "truncate", "fsync"):
            told[entry[1]].append(entry)
    return told


def _content(told: list[Entry], chance: random.Random) -> bytes:
    last = max((at for at, entry in enumerate(told) if entry[0] == "fsync"), default=-1)
    share = chance.choice([0.0, 0.3, 0.7, 1.0])
    data = bytearray()
    for at, entry in enumerate(told):
        if entry[0] == "truncate" and (at < last or chance.random() < share):
            data = data[: entry[2]].ljust(entry[2], b"\0")
        elif entry[0] == "write":
            _, _, offset, written = entry
            start = 0
            while start < len(written):
                stop = min(len(written), (offset + start) // PAGE * PAGE + PAGE - offset)
                if at < last or chance.random() < share:
                    data.extend(bytes(max(0, offset + start - len(data))))
                    data[offset + start : offset + stop] = written[start:stop]
                start = stop
    return bytes(data)


def _names(entries: list[Entry], chance: random.Random) -> dict[str, int | None]:
    """Path -> file, or None for a directory."""
    changes: dict[str, list[int]] = defaultdict(list)
    safe: dict[str, int] = defaultdict(int)
    for at, entry in enumerate(entries):
        if entry[0] in ("create", "mkdir", "unlink", "rename"):
            changes[os.path.dirname(entry[-1] if entry[0] == "rename" else entry[1]) or "."].append(at)
        elif entry[0] == "fsyncdir":
            safe[entry[1]] = len(changes[entry[1]])
    kept = {at for directory, all in changes.items() for at in all[: chance.randint(safe[directory], len(all))]}
    names: dict[str, int | None] = {}
    for at in sorted(kept):
        entry = entries[at]
        if entry[0] == "create":
            names[entry[1]] = entry[2]
        elif entry[0] == "mkdir":
            names[entry[1]] = None
        elif entry[0] == "unlink":
            names.pop(entry[1], None)
        elif entry[1] in names:
            names[entry[2]] = names.pop(entry[1])
    return names
