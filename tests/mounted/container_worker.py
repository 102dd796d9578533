"""One program of several that work in the same tree, in one of two containers; started by test_two_containers.py.

It writes, edits, replaces, renames, moves and removes at random. Every version of a file is named in its content, and what is
done to versions is noted down: `N version origin` before one is written over `origin` (`-`: over nothing), `A version` when
the last call that writes it has returned, `R version` before a file that holds it is removed, `! ...` for what must not be,
`# errno` for a call that failed, `E` at the end. It knows nothing of nbmountd.

The programs of one container take turns where otherwise nobody could tell which version was overwritten. What the other
container does in between comes as it comes: to know what was there, a file that is removed or replaced is first taken to a
name of its own, by a call that leaves nobody else a chance.

Arguments: directory, lock file of the container, log, name of the writer, seconds, seed.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE = 3000
DIRECTORIES = ("", "one", "two", "one/deep", "new")
NAMES = ("a.txt", "b.txt", "c", "d.csv")
NOREPLACE, EXCHANGE = 1, 2
AT_FDCWD = -100

_libc = ctypes.CDLL(None, use_errno=True)


def content_of(version: str) -> bytes:
    """All of it says which version it is, so that a mixture of two does not go unseen."""
    line = f"{version}\n".encode()
    return (line * (SIZE // len(line) + 1))[:SIZE]


def version_of(content: bytes) -> str | None:
    """The version that a file holds; None if that is not one version, whole."""
    found = re.match(rb"([a-z0-9-]+)\n", content)
    version = found[1].decode() if found else ""
    return version if found and content == content_of(version) else None


def rename(source: Path, target: Path, flags: int) -> None:
    """renameat2(2)."""
    if _libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags):
        raise OSError(ctypes.get_errno(), "renameat2", str(source))


class Writer:
    def __init__(self, place: Path, lock: Path, log: Path, name: str, seed: int) -> None:
        self.place, self.name = place, name
        self.chance = random.Random(seed)
        self.lock = lock.open("a")
        self.log = log.open("a", buffering=1)
        self.count = 0

    def note(self, *words: str) -> None:
        self.log.write(" ".join(words) + "\n")

    @contextmanager
    def turn(self) -> Iterator[None]:
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self.lock, fcntl.LOCK_UN)

    def directory(self) -> Path:
        return self.place / self.chance.choice(DIRECTORIES)

    def path(self) -> Path:
        return self.directory() / self.chance.choice(NAMES)

    def step(self) -> None:
        acts = (self.write, self.edit, self.replace, self.save, self.rename, self.remove, self.make, self.drop, self.shift)
        act = self.chance.choices((*acts, self.look), (8, 6, 6, 6, 5, 4, 4, 1, 1, 2))[0]
        try:
            act()
        except OSError as exc:  # others work here too: what was there a moment ago may be gone, or be a directory
            self.note("#", str(exc.errno), act.__name__)

    def begin(self, origin: str | None) -> str:
        self.count += 1
        version = f"{self.name}-{self.count}"
        self.note("N", version, origin or "-")
        return version

    def read(self, path: Path) -> str | None:
        """The version in a file. Nothing else may be in it."""
        content = path.read_bytes()
        version = version_of(content)
        if version is None:
            self.note("!", str(path), repr(content[:50]), repr(content[-50:]), str(len(content)))
        return version

    def write(self) -> None:
        """A new file; one that is there is left alone."""
        with self.turn(), self.path().open("xb", buffering=0) as file:
            version = self.begin(None)
            file.write(content_of(version))
        self.note("A", version)

    def edit(self) -> None:
        """A file that is there is written over in place."""
        with self.turn(), self.path().open("r+b", buffering=0) as file:
            origin = version_of(file.read())
            if origin is None:
                self.note("!", "edit", file.name)
            version = self.begin(origin)
            file.seek(0)
            file.write(content_of(version))
        self.note("A", version)

    def replace(self) -> None:
        """A new file takes the name of one that is there."""
        with self.turn():
            path = self.path()
            if not path.is_file():
                return
            aside = self.aside(path)
            version = self.begin(None)
            aside.write_bytes(content_of(version))
            self.note("A", version)
            rename(aside, path, EXCHANGE)
            self.discard(aside)

    def save(self) -> None:
        """As editors save: a temporary file renamed over the old one, here a file that only this program writes."""
        path = self.directory() / f"own-{self.name}.txt"
        with self.turn():
            origin = self.read(path) if path.exists() else None
            version = self.begin(origin)
            aside = self.aside(path)
            aside.write_bytes(content_of(version))
            self.note("A", version)
            os.rename(aside, path)

    def remove(self) -> None:
        with self.turn():
            path = self.path()
            aside = self.aside(path)
            rename(path, aside, NOREPLACE)
            if aside.is_file():
                self.discard(aside)

    def aside(self, path: Path) -> Path:
        self.count += 1
        return path.with_name(f".{path.name}.{self.name}-{self.count}")

    def discard(self, aside: Path) -> None:
        version = self.read(aside)
        if version is not None:
            self.note("R", version)
            aside.unlink()

    def rename(self) -> None:
        rename(self.path(), self.path(), NOREPLACE)

    def make(self) -> None:
        (self.place / self.chance.choice(DIRECTORIES[1:])).mkdir()

    def drop(self) -> None:
        (self.place / self.chance.choice(DIRECTORIES[1:])).rmdir()

    def shift(self) -> None:
        """A directory gets another name, with all that is in it."""
        rename(self.place / self.chance.choice(DIRECTORIES[1:]), self.place / self.chance.choice(DIRECTORIES[1:]), NOREPLACE)

    def look(self) -> None:
        with self.turn():
            for directory, _, files in os.walk(self.place):
                for file in files:
                    self.read(Path(directory) / file)


def main() -> None:
    place, lock, log, name, seconds, seed = sys.argv[1:]
    writer = Writer(Path(place), Path(lock), Path(log), name, int(seed))
    until = time.monotonic() + float(seconds)
    while time.monotonic() < until:
        writer.step()
        time.sleep(writer.chance.uniform(0, 0.1))
    writer.note("E")


if __name__ == "__main__":
    main()
