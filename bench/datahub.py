"""A space of EGI DataHub beside PyFilesystem's driver for it (fs-onedatarestfs), on the same stand-in for its servers.

Seconds, CPU of the client and of the stand-in, and requests of each job, of the fastest of several turns. Each turn has empty
caches and open connections: both have listed the root, as a program has that is at work. Each job is done on loopback, where
the CPU of client and stand-in is all that counts, and with answers that come late, as from providers far away. The driver is
used in two ways: as a program uses files (pieces of 1 MiB, a listing with details), and in the rows "at once" with the whole
content in memory, which is its own fastest. It knows nothing of the other rows.
"""

from __future__ import annotations

import base64
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fs.onedatarestfs import OnedataRESTFS
from rich.console import Console
from rich.table import Table

from bench.systems import cpu_of
from tests.mounted.harness import Daemon, daemon_over
from tests.servers.onedata_double import KRAKOW, DoorError, DoubleOutside, OnedataDouble

MIB = 2**20
LISTED, SIZE, SCATTERED, TURNS = 1000, 64 * MIB, 1000, 3
GOAL = 3.0
LATE = 0.05
"""Seconds added to each answer in the late rows."""
PAUSE = 3.0
"""Seconds of doing nothing before a listing, as a person does. The driver asks Onezone anew after 2."""
Job = Callable[[Any], None]


@dataclass(frozen=True)
class Row:
    """A job; `again`: it was done once before, uncounted. `pause`: seconds before it. `turns`: 0 for as many as ever."""

    job: Job
    again: bool = False
    pause: float = 0.0
    turns: int = 0


def measure(directory: Path, turns: int = TURNS) -> dict[str, Mapping[str, float]]:
    """Seconds, requests and CPU of both for each job. Works in `directory`, an empty one. One turn: the quick ones only."""
    content = random.Random(5).randbytes(SIZE)
    places = random.Random(6).sample(range(SIZE // 4096), SCATTERED)
    token = directory / "token"
    token.write_text("alice-rest")
    with OnedataDouble(directory / "onedata") as double:
        assert isinstance(double, OnedataDouble)
        space = double.add_space("bench")
        space.mkdir("listed")
        double.do("fill", provider=KRAKOW, path="bench/listed", count=LISTED)
        put(space, "large.bin", content)

        def list_all(root: Any) -> None:
            assert len(root.details("listed")) == LISTED

        def list_by_name(root: Any) -> None:
            assert len(root.details_by_name("listed")) == LISTED

        def read_all(root: Any) -> None:
            with root.open("large.bin", "rb") as file:
                size = 0
                while piece := file.read(MIB):
                    size += len(piece)
                assert size == SIZE

        def read_at_once(root: Any) -> None:
            assert len(root.read("large.bin")) == SIZE

        def read_scattered(root: Any) -> None:
            with root.open("large.bin", "rb") as file:
                for place in places:
                    file.seek(place * 4096)
                    assert file.read(4096) == content[place * 4096 : (place + 1) * 4096]

        def write_all(root: Any) -> None:
            with root.open("written.bin", "wb") as file:
                for start in range(0, SIZE, MIB):
                    file.write(content[start : start + MIB])
            root.safe()

        def write_at_once(root: Any) -> None:
            root.write("written.bin", content)
            root.safe()

        listing, reading, writing = f"listing {LISTED} entries", f"reading {SIZE // MIB} MiB", f"writing {SIZE // MIB} MiB"
        rows = {
            listing: Row(list_all),
            f"{listing}, {PAUSE:.0f} s after the last": Row(list_all, pause=PAUSE),
            f"{listing} once more": Row(list_all, again=True),
            f"{listing}, name by name": Row(list_by_name),
            reading: Row(read_all),
            f"{reading}, at once": Row(read_at_once),
            f"{SCATTERED} reads of 4 KiB": Row(read_scattered),
            f"{writing}, until safe": Row(write_all),
            f"{writing} at once, until safe": Row(write_at_once),
        }
        late = f"{LATE * 1000:.0f} ms late: "
        rare = {f"{SCATTERED} reads of 4 KiB": 1, f"{listing}, name by name": 0}  # the driver takes 100 s for each
        jobs = [(title, row, 0.0, turns) for title, row in rows.items()]
        jobs += [(late + title, row, LATE, min(turns, rare.get(title, turns))) for title, row in rows.items()]
        if turns == 1:
            jobs = [job for job in jobs if job[2] == 0.0 or job[0].removeprefix(late) not in rare]
        keys: dict[str, object] = {
            "backend": "onedata", "onezone": double.zone_host, "oneprovider": double.krakow_host, "space": "bench",
            "token_file": str(token), "ca_bundle": double.ca_bundle,
        }  # fmt: skip
        found: dict[str, Mapping[str, float]] = {}
        for title, row, latency, count in jobs:
            best: dict[str, float] = {}
            for _ in range(count):
                for system, opened in (("nbmountd", mounted(keys)), ("fs-onedatarestfs", driven(double))):
                    double.do("clear")
                    with suppress(DoorError):
                        space.remove("written.bin")
                    with opened as root:
                        took = timed(double, row, latency, root)
                    if took["seconds"] < best.get(f"{system} seconds", float("inf")):
                        best |= {f"{system} {what}": value for what, value in took.items()}
            if best:
                found[title] = best
        return found


def timed(double: OnedataDouble, row: Row, latency: float, root: Mount | Driver) -> dict[str, float]:
    """What the job took, from its beginning to its end."""
    if row.again:
        row.job(root)
    time.sleep(row.pause)
    double.do("clear")
    if latency:
        for face in (KRAKOW, "zone"):
            double.fault(".*", "latency", face=face, seconds=latency, count=10**6)
    cpu, server, started = root.cpu(), double.do("cpu"), time.perf_counter()
    row.job(root)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds, "cpu": root.cpu() - cpu, "stand-in cpu": double.do("cpu") - server,
        "requests": len(double.records()),
    }  # fmt: skip


class Mount:
    """A mount, with what the jobs need."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._root = daemon.path("bench")

    def open(self, name: str, mode: str) -> Any:
        return (self._root / name).open(mode, buffering=0)

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        (self._root / name).write_bytes(content)

    def details(self, name: str) -> list[tuple[str, int]]:
        return [(entry.name, entry.stat().st_size) for entry in os.scandir(self._root / name)]

    def details_by_name(self, name: str) -> list[tuple[str, int]]:
        return [(child, (self._root / name / child).stat().st_size) for child in os.listdir(self._root / name)]

    def safe(self) -> None:
        self._daemon.sync()

    def cpu(self) -> float:
        """Seconds of CPU of the program and of all that serves the mount."""
        return own_cpu() + sum(cpu_of(process.pid) for process in self._daemon.processes())


class Driver:
    """PyFilesystem's file system, likewise."""

    def __init__(self, files: OnedataRESTFS) -> None:
        self._files = files

    def open(self, name: str, mode: str) -> Any:
        return self._files.openbin(name, mode)

    def read(self, name: str) -> bytes:
        content: bytes = self._files.readbytes(name)
        return content

    def write(self, name: str, content: bytes) -> None:
        self._files.writebytes(name, content)

    def details(self, name: str) -> list[tuple[str, int]]:
        return [(info.name, info.size) for info in self._files.scandir(name, namespaces=["details"])]

    def details_by_name(self, name: str) -> list[tuple[str, int]]:
        return [(child, self._files.getsize(f"{name}/{child}")) for child in self._files.listdir(name)]

    def safe(self) -> None:
        """It is, when closed."""

    def cpu(self) -> float:
        return own_cpu()


@contextmanager
def mounted(keys: Mapping[str, object]) -> Iterator[Mount]:
    with daemon_over({"bench": keys}) as daemon:
        daemon.wait_for_state("bench", "live")
        os.listdir(daemon.path("bench"))
        yield Mount(daemon)


@contextmanager
def driven(double: OnedataDouble) -> Iterator[Driver]:
    preferred = [double.krakow_host]
    with warnings.catch_warnings():  # its TLS cannot be told of an authority
        warnings.simplefilter("ignore")
        files = OnedataRESTFS(double.zone_host, "alice-rest", space="bench", preferred_oneproviders=preferred, verify_ssl=False)
        files.listdir("/")
        yield Driver(files)


def own_cpu() -> float:
    return sum(os.times()[:2])


def put(space: DoubleOutside, name: str, content: bytes) -> None:
    space.double.do("write", provider=space.provider, path=f"bench/{name}", content=base64.b64encode(content).decode())


def show(found: Mapping[str, Mapping[str, float]], console: Console) -> None:
    table = Table(title="a space of EGI DataHub (stand-in)", title_justify="left")
    of_each = ("CPU", "stand-in", "requests")
    for column in ("", "nbmountd", *of_each, "fs-onedatarestfs", *of_each, "times its speed"):
        table.add_column(column, no_wrap=True, justify="left" if not column else "right")
    for title, one in found.items():
        cells = []
        for system in ("nbmountd", "fs-onedatarestfs"):
            cells += [f"{one[f'{system} {what}']:.3f} s" for what in ("seconds", "cpu", "stand-in cpu")]
            cells.append(f"{one[f'{system} requests']:.0f}")
        ratio = one["fs-onedatarestfs seconds"] / one["nbmountd seconds"]
        table.add_row(title, *cells, f"{ratio:.1f}" + ("" if ratio >= GOAL else f" (goal {GOAL:.0f})"))
    console.print(table)
