"""A program that uses a directory in every way that a program can, and knows at each moment what must be there.

Arguments: the directory, and for how many seconds. Ends with status 1 and the reason at the first call that fails or byte
that is not what was written. Prints, as JSON, how many calls it made and how long the pauses were: calls of 50 ms or more.
It knows nothing of the daemon.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = 4096
PAUSE = 0.05


class Timer:
    """Calls things and notes how long they took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, call: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.monotonic()
        result = call(*arguments)
        self.seconds.append(time.monotonic() - begin)
        return result


class OpenFile:
    """A file that stays open all along, and what is in it. Some are mapped, some have no name any longer."""

    def __init__(self, path: Path, timed: Timer, *, mapped: bool, unlinked: bool) -> None:
        self.path = path
        self.timed = timed
        self.fd = timed(os.open, path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.content = bytearray(16 * PAGE)
        timed(os.pwrite, self.fd, bytes(self.content), 0)
        self.map = mmap.mmap(self.fd, len(self.content)) if mapped else None
        self.unlinked = unlinked
        if unlinked:
            timed(os.unlink, path)

    def change(self, chance: random.Random) -> None:
        at = chance.randrange(len(self.content) - 100)
        data = chance.randbytes(chance.randrange(1, 100))
        if self.map is not None and chance.random() < 0.5:
            self.timed(self.map.__setitem__, slice(at, at + len(data)), data)
        else:
            if self.map is not None:
                self.timed(self.map.flush)
            assert self.timed(os.pwrite, self.fd, data, at) == len(data)
        self.content[at : at + len(data)] = data

    def append(self, chance: random.Random) -> None:
        data = chance.randbytes(1000)
        self.timed(os.pwrite, self.fd, data, len(self.content))
        self.content += data

    def check(self) -> None:
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert self.timed(os.pread, self.fd, len(self.content) + 1, 0) == self.content, f"{self.path} has other bytes"
        assert self.timed(os.fstat, self.fd).st_size == len(self.content)

    def sync(self) -> None:
        if self.map is not None:
            self.timed(self.map.flush)
        self.timed(os.fsync, self.fd)

    def close(self) -> None:
        self.sync()
        self.check()
        if self.map is not None:
            self.map.close()
        self.timed(os.close, self.fd)


def work(directory: Path, seconds: float, timed: Timer) -> None:
    chance = random.Random(5)
    files = [
        OpenFile(directory / f"open{number}", timed, mapped=number in (2, 3, 6), unlinked=number in (6, 7))
        for number in range(8)
    ]
    names: dict[str, bytes] = {}
    end = time.monotonic() + seconds
    made = 0
    while time.monotonic() < end:
        chance.choice(files).change(chance)
        files[0].append(chance)
        match chance.randrange(8):
            case 0:
                chance.choice(files).sync()
            case 1:
                chance.choice(files).check()
            case 2 | 3:
                made += 1
                name, data = f"file{made}", chance.randbytes(chance.randrange(10_000))
                fd = timed(os.open, directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                timed(os.write, fd, data)
                timed(os.close, fd)
                names[name] = data
            case 4 if names:
                old = chance.choice(sorted(names))
                new = chance.choice([*sorted(names), f"renamed{made}"])
                timed(os.rename, directory / old, directory / new)
                names[new] = names.pop(old)
            case 5 if names:
                name = chance.choice(sorted(names))
                timed(os.unlink, directory / name)
                del names[name]
            case 6:
                made += 1
                timed(os.mkdir, directory / f"directory{made}")
                timed(os.rmdir, directory / f"directory{made}")
                timed(os.symlink, "target", directory / f"link{made}")
                timed(os.unlink, directory / f"link{made}")
            case 7:
                kept = {file.path.name for file in files if not file.unlinked}
                found = set(timed(os.listdir, directory))
                assert found == names.keys() | kept, f"listed {sorted(found ^ (names.keys() | kept))}"
                for name in sorted(names)[:5]:
                    fd = timed(os.open, directory / name, os.O_RDONLY)
                    assert timed(os.pread, fd, 20_000, 0) == names[name], f"{name} has other bytes"
                    timed(os.close, fd)
            case _:
                pass
    for file in files:
        file.close()
    for name, data in names.items():
        assert timed((directory / name).read_bytes) == data, f"{name} has other bytes"


def main() -> None:
    timed = Timer()
    work(Path(sys.argv[1]), float(sys.argv[2]), timed)
    pauses = sorted(second for second in timed.seconds if second >= PAUSE) or [0.0]
    print(
        json.dumps(
            {
                "calls": len(timed.seconds),
                "longest": pauses[-1],
                "percentile": pauses[min(len(pauses) - 1, int(len(pauses) * 0.99))],
                "median": statistics.median(pauses),
            }
        )
    )


if __name__ == "__main__":
    main()
