"""What is measured: each row is a job that programs do, on a directory of whichever system.

A row gives seconds (or bytes) by label, less is better; None where a system has no such thing. It does not know which
system it works on.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.systems import System, wait_until

KIB, MIB = 2**10, 2**20
Results = dict[str, float | None]
SAFE_LIMIT = 300.0


@dataclass(frozen=True)
class Scale:
    """How much is done. Sizes in bytes."""

    large: int = 1024 * MIB
    listed: int = 10_000
    opened: int = 300
    created: int = 1000
    written: int = 512 * MIB
    random_reads: int = 100


QUICK = Scale(large=256 * MIB, listed=3000, opened=100, created=200, written=128 * MIB, random_reads=50)


@dataclass(frozen=True)
class Row:
    """A job: `prepare` puts into the remote's directory what it needs, once; `run` does it on a fresh system."""

    title: str
    prepare: Callable[[Path, Scale], None]
    run: Callable[[System, Scale, Callable[[], int]], Results]


# --- reading -----------------------------------------------------------------------------------------------------------


def prepare_large(root: Path, scale: Scale) -> None:
    block = random.Random(1).randbytes(16 * MIB)
    with (root / "large.bin").open("wb") as file:
        for number in range(scale.large // len(block)):
            file.write(number.to_bytes(8, "big") + block[8:])


def run_read(system: System, scale: Scale, wire: Callable[[], int]) -> Results:
    drop_page_cache(system.mount / "large.bin")
    if system.remote != system.mount:
        read_whole(system.remote / "large.bin")  # the server's disk is not what is measured
    path = system.mount / "large.bin"
    size = f"{scale.large // MIB} MiB read"
    results: Results = {f"{size}, cold": timed(lambda: read_whole(path))}
    results[f"{size}, re-opened"] = timed(lambda: read_whole(path))
    drop_page_cache(path)
    results[f"{size}, page cache dropped"] = timed(lambda: read_whole(path))
    return results


def run_random(system: System, scale: Scale, wire: Callable[[], int]) -> Results:
    drop_page_cache(system.mount / "large.bin")
    if system.remote != system.mount:
        read_whole(system.remote / "large.bin")
    places = random.Random(2).sample(range(scale.large // (64 * KIB)), scale.random_reads)
    before = wire()

    def read_places() -> None:
        with (system.mount / "large.bin").open("rb", buffering=0) as file:
            for place in places:
                assert len(os.pread(file.fileno(), 64 * KIB, place * 64 * KIB)) == 64 * KIB

    label = f"{scale.random_reads} random reads of 64 KiB"
    results: Results = {label: timed(read_places)}
    # Read-ahead that is still under way counts as well: it uses the line.
    time.sleep(1)
    results[f"{label}, bytes over the wire"] = None if system.remote == system.mount else wire() - before
    return results


def prepare_opened(root: Path, scale: Scale) -> None:
    (root / "opened").mkdir()
    for number in range(scale.opened):
        (root / "opened" / f"{number:05}.dat").write_bytes(bytes([number % 256]) * 10_000)


def run_opened(system: System, scale: Scale, wire: Callable[[], int]) -> Results:
    drop_page_cache()

    def read_all() -> None:
        for number in range(scale.opened):
            assert len((system.mount / "opened" / f"{number:05}.dat").read_bytes()) == 10_000

    label = f"open+read of {scale.opened} small files"
    return {f"{label}, cold": timed(read_all), f"{label}, again": timed(read_all)}


def prepare_listed(root: Path, scale: Scale) -> None:
    (root / "listed").mkdir()
    for number in range(scale.listed):
        (root / "listed" / f"entry-{number:05}.txt").write_bytes(b"x" * (number % 100))


def run_listed(system: System, scale: Scale, wire: Callable[[], int]) -> Results:
    drop_page_cache()

    def list_all() -> None:
        listing = subprocess.run(["ls", "-l", str(system.mount / "listed")], capture_output=True, check=True).stdout
        assert listing.count(b"\n") == scale.listed + 1

    label = f"ls -l of {scale.listed} entries"
    return {f"{label}, cold": timed(list_all), f"{label}, warm": timed(list_all)}


# --- writing -----------------------------------------------------------------------------------------------------------


def prepare_nothing(root: Path, scale: Scale) -> None:
    pass


def run_created(system: System, scale: Scale, wire: Callable[[], int]) -> Results:
    label = f"{scale.created} files of 4 KiB"
    results: Results = {}
    with scratch(system, "created") as (mount, remote):
        started = time.perf_counter()
        create(mount, scale.created)
        results[f"{label}, until close"] = time.perf_counter() - started
        results[f"{label}, until safe"] = seconds_until(system, started, lambda: all_there(remote, scale.created, 4096))
        started = time.perf_counter()
        for number in range(scale.created):
            (mount / f"{number:05}").unlink()
        results[f"{label} deleted, until done"] = time.perf_counter() - started
        results[f"{label} deleted, until gone"] = seconds_until(system, started, lambda: all_there(remote, 0, 0))
    with scratch(system, "synced") as (mount, remote):
        started = time.perf_counter()
        create(mount, scale.created)
        asked = system.sync()
        results[f"{label}, until sync says so"] = time.perf_counter() - started if asked else None
        assert not asked or all_there(remote, scale.created, 4096)
        if not asked and system.remote != system.mount:
            wait_until(lambda: all_there(remote, scale.created, 4096), "all files are on the server", SAFE_LIMIT)
    return results


def run_written(system: System, scale: Scale, wire: Callable[[], int]) -> Results:
    label = f"{scale.written // MIB} MiB written"
    results: Results = {}
    with scratch(system, "written") as (mount, remote):
        block = random.Random(3).randbytes(MIB)
        started = time.perf_counter()
        with (mount / "out.bin").open("wb", buffering=0) as file:
            for _ in range(scale.written // MIB):
                file.write(block)
        results[f"{label}, until close"] = time.perf_counter() - started
        results[f"{label}, until safe"] = seconds_until(system, started, lambda: all_there(remote, 1, scale.written))
    return results


ROWS = {
    "read": Row("sequential read", prepare_large, run_read),
    "small": Row("small files", prepare_opened, run_opened),
    "list": Row("listing", prepare_listed, run_listed),
    "create": Row("many new files", prepare_nothing, run_created),
    "write": Row("one large new file", prepare_nothing, run_written),
    "random": Row("scattered reads", prepare_large, run_random),
}


# --- helpers -----------------------------------------------------------------------------------------------------------


@contextmanager
def scratch(system: System, name: str) -> Iterator[tuple[Path, Path]]:
    """An empty directory of the system and the same one at its remote, known to both; removed from the remote after."""
    name = f"{name}-{time.monotonic_ns()}"
    (system.mount / name).mkdir()
    if system.remote != system.mount and not system.sync():
        wait_until((system.remote / name).is_dir, "the directory is on the server", SAFE_LIMIT)
    try:
        yield system.mount / name, system.remote / name
    finally:
        shutil.rmtree(system.remote / name, ignore_errors=True)


def create(directory: Path, count: int) -> None:
    block = random.Random(4).randbytes(4096)
    for number in range(count):
        (directory / f"{number:05}").write_bytes(block)


def all_there(directory: Path, count: int, size: int) -> bool:
    """Whether the server has `count` files of `size` bytes."""
    try:
        sizes = [entry.stat().st_size for entry in os.scandir(directory) if entry.is_file()]
    except FileNotFoundError:
        return False
    return len(sizes) == count and all(found == size for found in sizes)


def seconds_until(system: System, started: float, look: Callable[[], bool]) -> float | None:
    """Seconds from `started` until the remote has it, left to itself; None for a system without a remote."""
    if system.remote == system.mount:
        return None
    wait_until(look, "everything has reached the server", SAFE_LIMIT)
    return time.perf_counter() - started


def timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_whole(path: Path) -> None:
    buffer = bytearray(MIB)
    with path.open("rb", buffering=0) as file:
        total = 0
        while count := file.readinto(buffer):
            total += count
        assert total == os.fstat(file.fileno()).st_size


def drop_page_cache(path: Path | None = None) -> None:
    """Drops all clean pages of the machine as root, else those of `path`."""
    if os.geteuid() == 0:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
    elif path is not None:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
