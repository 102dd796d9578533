"""Random operations on a few files of a mount, each compared with a model of bytes.

It is driven from outside: test_random_operations.py says how many operations, with which seed, over which server. Everything
random comes from the one generator, so a seed is a reproduction (but for what runs beside: uploads, listings, other seeds).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path

from nbmountd.control import schema
from tests.mounted.conftest import Rig

LARGEST = 700_000
"""Bytes; some blocks of whatever size a layer below may have, and nothing that takes time."""
PAGE = 4096
OFTEN = 1500
"""Operations up to which whatever waits for the server comes as often as its weight says. In longer runs it comes more seldom,
by the square root: Apache lets a client wait a second after each upload, and uploads go on beside the operations anyway."""
RENAME_EXCHANGE = 2
AT_FDCWD = -100


class Mismatch(AssertionError):
    """The mount and the model differ. The text tells where, and what was done before."""


class File:
    """One name with its model; `fd` is None while it is closed."""

    def __init__(self, path: Path, remote: Path) -> None:
        self.path = path
        self.remote = remote
        self.model = bytearray()
        self.fd: int | None = None

    def opened(self) -> int:
        if self.fd is None:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        return self.fd

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class RandomFiles:
    """The operations. `disturb`: what is done seldom and from outside, as (weight, what) beside the built-in ones."""

    def __init__(self, rig: Rig, seed: int, count: int = 3) -> None:
        self.rig = rig
        self.random = random.Random(seed)
        self.files = [File(rig.mount / f"file-{number}", rig.root / f"file-{number}") for number in range(count)]
        self.done: deque[str] = deque(maxlen=60)
        self.kills = 0
        self._choices: dict[Callable[[File], str], float] = {
            self.read: 20, self.write: 24, self.append: 5, self.mapped_read: 5, self.mapped_write: 8, self.zero: 4,
            self.truncate: 6, self.truncate_by_path: 3, self.reopen: 6, self.fsync: 3, self.drop_pages: 2,
            self.read_all: 1, self.copy_from: 2, self.rename_over: 0.8, self.remove: 0.4, self.replace_by_rename: 0.8,
            self.scattered_write: 2, self.gathered_read: 2, self.direct: 1.5, self.send: 1, self.exchange: 0.5,
            self.second_name: 0.5, self.refresh: 0.5,
        }  # fmt: skip
        self._waiting: dict[Callable[[File], str], float] = {
            self.sync: 0.25, self.sync_and_evict: 0.25, self.remote_change: 0.2,
        }  # fmt: skip

    def run(self, operations: int, *, kills: int = 0) -> None:
        """Does so many operations, and kills the mount's worker in so many of them; then compares everything."""
        seldom = min(1.0, (OFTEN / max(operations, 1)) ** 0.5)
        choices = {**self._choices, **{operation: weight * seldom for operation, weight in self._waiting.items()}}
        names = list(choices)
        weights = list(choices.values())
        to_kill = set(self.random.sample(range(operations), kills))
        for number in range(operations):
            file = self.random.choice(self.files)
            if number in to_kill:
                self.note(file, "kill the worker")
                self.rig.daemon.kill_worker(self.rig.name)
                self.kills += 1
            operation = self.random.choices(names, weights)[0]
            self.note(file, operation.__name__)
            self.done[-1] += " " + operation(file)
        for file in self.files:
            self.note(file, "at the end")
            self.check_all(file)
            file.close()

    def assert_the_server_has_it(self) -> None:
        """Sends everything and compares the server's files with the models."""
        for file in self.files:
            file.close()
        self.rig.daemon.sync(self.rig.mount)
        for file in self.files:
            found = file.remote.read_bytes() if file.remote.exists() else None
            expected = bytes(file.model) if file.path.exists() else None
            if found != expected:
                self.fail(file, found or b"", expected or b"", "on the server")

    # -- comparing ----------------------------------------------------------------------------------------------------

    def note(self, file: File, text: str) -> None:
        self.done.append(f"{file.path.name}: {text}")

    def fail(self, file: File, found: bytes, expected: bytes, where: str, start: int = 0) -> None:
        at = next((i for i, (x, y) in enumerate(zip(found, expected, strict=False)) if x != y), min(len(found), len(expected)))
        raise Mismatch(
            f"{file.path.name} {where}: {len(found)} bytes instead of {len(expected)}; at {start + at} stands "
            f"{found[at : at + 8]!r} instead of {expected[at : at + 8]!r}; before it:\n  " + "\n  ".join(self.done)
        )

    def check(self, file: File, start: int, found: bytes, size: int) -> None:
        expected = bytes(file.model[start : start + size])
        if found != expected:
            self.fail(file, found, expected, f"from {start}", start)

    def check_all(self, file: File) -> None:
        fd = file.opened()
        if os.fstat(fd).st_size != len(file.model):
            self.fail(file, b"", bytes(file.model), f"fstat says {os.fstat(fd).st_size}")
        self.check(file, 0, os.pread(fd, LARGEST * 3, 0), LARGEST * 3)

    # -- operations ---------------------------------------------------------------------------------------------------

    def place(self, file: File, *, beyond: bool) -> tuple[int, int]:
        """(start, size) of a range: mostly small, sometimes aligned, inside the file or also behind its end."""
        limit = LARGEST if beyond else len(file.model)
        if limit == 0:
            return 0, 0
        start = self.random.randrange(limit)
        if self.random.random() < 0.3:
            start -= start % PAGE
        if self.random.random() < 0.1 and beyond:
            start = len(file.model)
        size = self.random.choice((1, 10, 500, PAGE, 5 * PAGE, 150_000))
        size = self.random.randint(1, size) if self.random.random() < 0.7 else size
        return start, max(0, min(size, limit - start))

    def put(self, file: File, start: int, content: bytes) -> None:
        if content and start > len(file.model):
            file.model.extend(bytes(start - len(file.model)))
        file.model[start : start + len(content)] = content

    def content(self, size: int) -> bytes:
        return self.random.randbytes(min(size, 64)) * (size // 64 + 1)

    def read(self, file: File) -> str:
        start, size = self.place(file, beyond=True)
        self.check(file, start, os.pread(file.opened(), size, start), size)
        return f"{start} + {size}"

    def read_all(self, file: File) -> str:
        self.check_all(file)
        return str(len(file.model))

    def write(self, file: File) -> str:
        start, size = self.place(file, beyond=True)
        content = self.content(size)[:size]
        assert os.pwrite(file.opened(), content, start) == size
        self.put(file, start, content)
        return f"{start} + {size}"

    def append(self, file: File) -> str:
        content = self.content(500)[: self.random.randint(1, 500)]
        if len(file.model) + len(content) > LARGEST:
            return "not: it is full"
        file.opened()
        with file.path.open("ab", buffering=0) as other:
            other.write(content)
        file.model += content
        return str(len(content))

    def mapped_read(self, file: File) -> str:
        start, size = self.place(file, beyond=False)
        fd = file.opened()
        if not size:
            return "not: it is empty"
        with mmap.mmap(fd, len(file.model), prot=mmap.PROT_READ) as view:
            self.check(file, start, view[start : start + size], size)
        return f"{start} + {size}"

    def mapped_write(self, file: File) -> str:
        start, size = self.place(file, beyond=False)
        fd = file.opened()
        if not size:
            return "not: it is empty"
        content = self.content(size)[:size]
        with mmap.mmap(fd, len(file.model)) as view:
            view[start : start + size] = content
            if self.random.random() < 0.3:
                view.flush()
        self.put(file, start, content)
        return f"{start} + {size}"

    def zero(self, file: File) -> str:
        start, size = self.place(file, beyond=False)
        os.pwrite(file.opened(), bytes(size), start)
        self.put(file, start, bytes(size))
        return f"{start} + {size}"

    def _cut(self, file: File, size: int) -> str:
        before = len(file.model)
        del file.model[size:]
        file.model.extend(bytes(size - len(file.model)))
        return f"{before} -> {size}"

    def truncate(self, file: File) -> str:
        size = self.random.choice((0, self.random.randrange(LARGEST), self.random.randrange(len(file.model) + 1)))
        os.ftruncate(file.opened(), size)
        return self._cut(file, size)

    def truncate_by_path(self, file: File) -> str:
        size = self.random.randrange(LARGEST)
        file.opened()
        os.truncate(file.path, size)
        return self._cut(file, size)

    def reopen(self, file: File) -> str:
        file.close()
        file.opened()
        return ""

    def fsync(self, file: File) -> str:
        os.fsync(file.opened())
        return ""

    def drop_pages(self, file: File) -> str:
        os.posix_fadvise(file.opened(), 0, 0, os.POSIX_FADV_DONTNEED)
        return ""

    def copy_from(self, file: File) -> str:
        other = self.random.choice(self.files)
        if other is file or not other.model:
            return "not"
        start, size = self.place(other, beyond=False)
        to = self.random.randrange(len(file.model) + 1)
        copied = os.copy_file_range(other.opened(), file.opened(), size, start, to)
        self.put(file, to, bytes(other.model[start : start + copied]))
        return f"{other.path.name} {start} + {copied} to {to}"

    def rename_over(self, file: File) -> str:
        """The other name goes with its content; what was open under this name stays open for nobody."""
        other = self.random.choice(self.files)
        if other is file:
            return "not"
        other.opened()
        file.close()
        other.path.rename(file.path)
        file.model, file.fd = other.model, other.fd
        other.model, other.fd = bytearray(), None
        return f"from {other.path.name}"

    def replace_by_rename(self, file: File) -> str:
        file.opened()
        file.close()
        content = self.content(self.random.randrange(LARGEST // 2))
        fresh = file.path.with_name("fresh")
        fresh.write_bytes(content)
        fresh.rename(file.path)
        file.model = bytearray(content)
        return str(len(content))

    def remove(self, file: File) -> str:
        file.opened()
        file.path.unlink()
        self.check(file, 0, os.pread(file.opened(), LARGEST * 3, 0), LARGEST * 3)
        file.close()
        file.model = bytearray()
        return ""

    def scattered_write(self, file: File) -> str:
        """Several buffers at once, at odd lengths."""
        start, size = self.place(file, beyond=True)
        parts = [self.content(length)[:length] for length in (size // 3, 1, size // 2)]
        if start + sum(map(len, parts)) > LARGEST:
            return "not: it is full"
        assert os.pwritev(file.opened(), parts, start) == sum(map(len, parts))
        self.put(file, start, b"".join(parts))
        return f"{start} + {sum(map(len, parts))}"

    def gathered_read(self, file: File) -> str:
        start, size = self.place(file, beyond=True)
        buffers = [bytearray(size // 3), bytearray(1), bytearray(size // 2)]
        count = os.preadv(file.opened(), buffers, start)
        self.check(file, start, b"".join(buffers)[:count], sum(map(len, buffers)))
        return f"{start} + {count}"

    def direct(self, file: File) -> str:
        """Past the page cache, in whole pages, while the same file is open with it."""
        page = self.random.randrange(LARGEST // PAGE)
        count = self.random.randint(1, 20) * PAGE
        file.opened()
        fd = os.open(file.path, os.O_RDWR | os.O_DIRECT)
        try:
            with mmap.mmap(-1, count) as buffer:
                if self.random.random() < 0.5:
                    got = os.preadv(fd, [buffer], page * PAGE)
                    self.check(file, page * PAGE, buffer[:got], count)
                    return f"read {page * PAGE} + {got}"
                buffer[:] = self.content(count)[:count]
                assert os.pwritev(fd, [buffer], page * PAGE) == count
                self.put(file, page * PAGE, buffer[:])
                return f"write {page * PAGE} + {count}"
        finally:
            os.close(fd)

    def send(self, file: File) -> str:
        """sendfile(2) from one file to the end of another."""
        other = self.random.choice(self.files)
        if other is file or not other.model:
            return "not"
        start, size = self.place(other, beyond=False)
        if len(file.model) + size > LARGEST:
            return "not: it is full"
        os.lseek(file.opened(), 0, os.SEEK_END)
        sent = os.sendfile(file.opened(), other.opened(), start, size)
        self.put(file, len(file.model), bytes(other.model[start : start + sent]))
        return f"{other.path.name} {start} + {sent}"

    def exchange(self, file: File) -> str:
        """Two names change their files, which both stay open."""
        other = self.random.choice(self.files)
        if other is file:
            return "not"
        file.opened()
        other.opened()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(AT_FDCWD, os.fsencode(file.path), AT_FDCWD, os.fsencode(other.path), RENAME_EXCHANGE):
            raise OSError(ctypes.get_errno(), "renameat2", str(file.path))
        file.model, other.model = other.model, file.model
        file.fd, other.fd = other.fd, file.fd
        return f"with {other.path.name}"

    def second_name(self, file: File) -> str:
        """A hard link through which something is written, and which is removed again."""
        file.opened()
        second = file.path.with_name("second")
        os.link(file.path, second)
        with second.open("r+b", buffering=0) as through:
            content = self.content(300)[:300]
            start = self.random.randrange(len(file.model) + 1)
            os.pwrite(through.fileno(), content, start)
        self.put(file, start, content)
        second.unlink()
        return f"{start} + {len(content)}"

    # -- from outside -------------------------------------------------------------------------------------------------

    def refresh(self, file: File) -> str:
        self.rig.daemon.refresh(self.rig.mount)
        return ""

    def sync(self, file: File) -> str:
        self.rig.daemon.sync(self.rig.mount)
        return ""

    def sync_and_evict(self, file: File) -> str:
        """What is read or partly overwritten next has to come from the server."""
        for each in self.files:
            each.close()
        self.rig.daemon.sync(self.rig.mount)
        reply = self.rig.daemon.ask(schema.Cache(evict=True, path=str(self.rig.mount)))
        assert isinstance(reply, schema.CacheReply), reply
        return ""

    def remote_change(self, file: File) -> str:
        """Somebody else writes the file on the server while nothing is unsent here."""
        file.opened()
        for each in self.files:
            each.close()
        self.rig.daemon.sync(self.rig.mount)
        content = self.content(self.random.randrange(1, LARGEST))
        beside = file.remote.with_name(".beside")
        beside.write_bytes(content)
        beside.rename(file.remote)
        self.rig.daemon.refresh(self.rig.mount)
        file.model = bytearray(content)
        self.check_all(file)
        return str(len(content))
