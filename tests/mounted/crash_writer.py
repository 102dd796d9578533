"""A program that works in a mount and writes down, outside of it, each operation before its call and after its return.

    python crash_writer.py MOUNT MANIFEST SEED

A line of the manifest is one JSON object: {"n", "op", ...} before the call, {"n", "done", "stat": [size, mode, mtime_ns] of
what it was done to, or null} after its return, {"n", "failed": errno} when it raised. It works until it is told "pause" on
its standard input or something fails, says "paused" on its standard output, and goes on at "go". Only the standard library
is used, as by any program. crash_model.py says what the lines mean.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import select
import sys
from pathlib import Path
from typing import Any

DIRECTORIES = ("", "one/", "two/")
MANY = 25
LARGEST_WRITE = 60_000
"""One request of the kernel: it happens whole or not at all."""


def body(n: int, length: int) -> bytes:
    """The bytes that operation `n` writes: not zeros, and different from those of every other."""
    return random.Random(n).randbytes(length)


class Writer:
    """Makes up operations that must succeed, given those that did; keeps some files open over many of them."""

    def __init__(self, mount: Path, manifest: Path, seed: int) -> None:
        self.mount = mount
        self.manifest = os.open(manifest, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.chance = random.Random(seed)
        self.n = 0
        self.files: dict[str, int] = {}
        """Name -> open descriptor, or -1."""
        self.others: list[str] = []
        """Symlinks and directories that are made and, when they are many, removed."""

    def note(self, **line: Any) -> None:
        os.write(self.manifest, (json.dumps({"n": self.n, **line}) + "\n").encode())

    def close_all(self) -> None:
        for name, fd in self.files.items():
            if fd >= 0:
                with contextlib.suppress(OSError):  # of a mount that is gone
                    os.close(fd)
            self.files[name] = -1

    def step(self) -> bool:
        """One operation; False when it failed."""
        self.n += 1
        operation = self.chance.choice(
            ["write"] * 6 + ["append"] * 4 + ["truncate"] * 2 + ["create"] * 3 + ["rename"] * 3
            + ["unlink", "symlink", "chmod", "utime", "fsync", "replace", "open", "mkdir"]
        )  # fmt: skip
        if operation not in ("create", "symlink", "mkdir") and not self.files:
            operation = "create"
        try:
            getattr(self, operation)()
        except OSError as exc:
            self.note(failed=exc.errno, text=str(exc))
            self.close_all()
            return False
        return True

    def look_again(self) -> bool:
        """What failed may have happened all the same: it is looked at, as a program would. False when it cannot be."""
        try:
            entries = {
                f"{directory}{entry.name}": entry.is_file(follow_symlinks=False)
                for directory in DIRECTORIES for entry in os.scandir(self.mount / directory)
            }  # fmt: skip
        except OSError:
            return False
        there = {name for name, is_file in entries.items() if is_file}
        self.others = sorted(entries.keys() - there - {directory.rstrip("/") for directory in DIRECTORIES})
        for name in self.files.keys() - there:
            self.close_all()
            del self.files[name]
        for name in there - self.files.keys():
            self.files[name] = -1
        return True

    def done(self, name: str | None) -> None:
        """`name` None: there is nothing to look at."""
        found = None if name is None else (self.mount / name).lstat()
        self.note(done=True, stat=None if found is None else [found.st_size, found.st_mode & 0o7777, found.st_mtime_ns])

    def new_name(self) -> str:
        return f"{self.chance.choice(DIRECTORIES)}{self.chance.choice(['f', 'g', 'h'])}{self.n}"

    def some_file(self) -> str:
        return self.chance.choice(sorted(self.files))

    def descriptor(self, name: str) -> tuple[int, bool]:
        """An open file, and whether it is to be closed after the operation."""
        if self.files[name] >= 0:
            return self.files[name], False
        return os.open(self.mount / name, os.O_RDWR), True

    # -- operations ---------------------------------------------------------------------------------------------------

    def create(self) -> None:
        if len(self.files) > 25:
            self.unlink()
            return
        name = self.new_name()
        self.note(op="create", name=name)
        os.close(os.open(self.mount / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640))
        self.files[name] = -1
        self.done(name)

    def open(self) -> None:
        name = self.some_file()
        if self.files[name] >= 0:
            os.close(self.files[name])
            self.files[name] = -1
        else:
            self.files[name] = os.open(self.mount / name, os.O_RDWR)

    def write(self) -> None:
        self._write(self.some_file(), self.chance.choice([0, 1, 4096, 100_000, self.chance.randrange(200_000)]))

    def append(self) -> None:
        name = self.some_file()
        self._write(name, (self.mount / name).stat().st_size)

    def _write(self, name: str, offset: int) -> None:
        length = self.chance.choice([1, 100, 4096, LARGEST_WRITE])
        fd, ours = self.descriptor(name)
        self.note(op="write", name=name, offset=offset, length=length)
        self.pwrite(fd, length, offset)
        self.done(name)
        if ours:
            os.close(fd)

    def pwrite(self, fd: int, length: int, offset: int) -> None:
        written = os.pwrite(fd, body(self.n, length), offset)
        if written != length:
            raise OSError(errno.EIO, f"{written} bytes written of {length}")

    def truncate(self) -> None:
        name, size = self.some_file(), self.chance.choice([0, 10, 5000, self.chance.randrange(300_000)])
        self.note(op="truncate", name=name, size=size)
        os.truncate(self.mount / name, size)
        self.done(name)

    def rename(self) -> None:
        source = self.some_file()
        target = self.some_file() if self.chance.random() < 0.5 else self.new_name()
        self._rename(source, target)

    def _rename(self, source: str, target: str) -> None:
        self.note(op="rename", name=source, target=target)
        (self.mount / source).rename(self.mount / target)
        if source != target:
            if self.files.get(target, -1) >= 0:
                os.close(self.files[target])
            self.files[target] = self.files.pop(source)
        self.done(target)

    def replace(self) -> None:
        """As editors save."""
        target = self.some_file()
        name = f"{target}.tmp{self.n}"
        self.note(op="create", name=name)
        fd = os.open(self.mount / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self.files[name] = -1
        self.done(name)
        self.n += 1
        self.note(op="write", name=name, offset=0, length=5000)
        self.pwrite(fd, 5000, 0)
        self.done(name)
        os.fsync(fd)
        os.close(fd)
        self.n += 1
        self._rename(name, target)

    def unlink(self) -> None:
        name = self.some_file()
        self.note(op="unlink", name=name)
        (self.mount / name).unlink()
        fd = self.files.pop(name)
        self.done(None)
        if fd >= 0:
            os.close(fd)

    def remove_other(self) -> None:
        name = self.others.pop(self.chance.randrange(len(self.others)))
        path = self.mount / name
        is_link = path.is_symlink()
        self.note(op="unlink" if is_link else "rmdir", name=name)
        path.unlink() if is_link else path.rmdir()
        self.done(None)

    def symlink(self) -> None:
        if len(self.others) > MANY:
            self.remove_other()
            return
        name = self.new_name()
        self.note(op="symlink", name=name, target=f"to {self.n}")
        (self.mount / name).symlink_to(f"to {self.n}")
        self.done(name)
        self.others.append(name)

    def mkdir(self) -> None:
        if len(self.others) > MANY:
            self.remove_other()
            return
        name = f"d{self.n}"
        self.note(op="mkdir", name=name)
        (self.mount / name).mkdir(0o755)
        self.done(name)
        self.others.append(name)

    def chmod(self) -> None:
        name, mode = self.some_file(), self.chance.choice([0o600, 0o644, 0o755])
        self.note(op="chmod", name=name, mode=mode)
        (self.mount / name).chmod(mode)
        self.done(name)

    def utime(self) -> None:
        name, mtime_ns = self.some_file(), self.chance.randrange(10**18, 2 * 10**18)
        self.note(op="utime", name=name, mtime_ns=mtime_ns)
        os.utime(self.mount / name, ns=(mtime_ns, mtime_ns))
        self.done(name)

    def fsync(self) -> None:
        fd, ours = self.descriptor(self.some_file())
        os.fsync(fd)
        if ours:
            os.close(fd)


def main() -> None:
    mount, manifest, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    writer = Writer(mount, manifest, seed)
    told = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115  # so that select knows of every line
    well = True
    while True:
        asked = bool(select.select([told], [], [], 0)[0])
        if not asked and well:
            well = writer.step()
            continue
        if asked and not told.readline():
            return
        print("paused", flush=True)
        while (line := told.readline()) != b"go\n":
            if not line:
                return
        well = writer.look_again()


if __name__ == "__main__":
    main()
