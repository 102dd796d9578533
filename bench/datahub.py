"""A space of EGI DataHub beside PyFilesystem's driver for it (fs-onedatarestfs), on the same stand-in for its servers.

Seconds and requests of each job, the least of several turns, each from empty caches. It knows nothing of the other rows.
"""

from __future__ import annotations

import base64
import os
import random
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fs.onedatarestfs import OnedataRESTFS
from rich.console import Console
from rich.table import Table

from tests.mounted.harness import daemon_over
from tests.servers.onedata_double import KRAKOW, DoorError, DoubleOutside, OnedataDouble

MIB = 2**20
LISTED, SIZE, SCATTERED, TURNS = 1000, 64 * MIB, 1000, 3
GOAL = 3.0
LATE = 0.03
"""Seconds added to each answer in the rows that say so, as a network does. On loopback the stand-in's own speed is what limits
one large transfer."""
Job = Callable[[Any], None]


def measure(directory: Path, turns: int = TURNS) -> dict[str, Mapping[str, float]]:
    """Seconds and requests of both for each job. Works in `directory`, an empty one."""
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

        def read_all(root: Any) -> None:
            with root.open("large.bin", "rb") as file:
                size = 0
                while piece := file.read(MIB):
                    size += len(piece)
                assert size == SIZE

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

        listing, reading, writing = f"listing {LISTED} entries", f"reading {SIZE // MIB} MiB", f"writing {SIZE // MIB} MiB"
        late = f", answers {LATE * 1000:.0f} ms late"
        jobs: dict[str, tuple[Job, float, bool]] = {
            listing: (list_all, 0, False),
            f"{listing} once more": (list_all, 0, True),
            reading: (read_all, 0, False),
            f"{SCATTERED} reads of 4 KiB": (read_scattered, 0, False),
            f"{writing}, until safe": (write_all, 0, False),
            f"{listing}{late}": (list_all, LATE, False),
            f"{reading}{late}": (read_all, LATE, False),
            f"{writing}{late}": (write_all, LATE, False),
        }
        keys: dict[str, object] = {
            "backend": "onedata", "onezone": double.zone_host, "oneprovider": double.krakow_host, "space": "bench",
            "token_file": str(token), "ca_bundle": double.ca_bundle,
        }  # fmt: skip
        found: dict[str, dict[str, float]] = {}
        for title, (job, latency, again) in jobs.items():
            best = found.setdefault(title, {})
            for _ in range(turns):
                for system in ("nbmountd", "fs-onedatarestfs"):
                    double.do("clear")
                    with suppress(DoorError):
                        space.remove("written.bin")
                    count = Counted(double, job, latency, again)
                    seconds, requests = count_mount(keys, count) if system == "nbmountd" else count_driver(double, count)
                    if seconds < best.get(system, float("inf")):
                        best[system], best[f"{system} requests"] = seconds, requests
        return dict(found)


class Mount:
    """A mount, with what the jobs need."""

    def __init__(self, root: Path, safe: Callable[[], None]) -> None:
        self._root, self.safe = root, safe

    def open(self, name: str, mode: str) -> Any:
        return (self._root / name).open(mode, buffering=0)

    def details(self, name: str) -> list[tuple[str, int]]:
        return [(entry.name, entry.stat().st_size) for entry in os.scandir(self._root / name)]


class Driver:
    """PyFilesystem's file system, likewise."""

    def __init__(self, files: OnedataRESTFS) -> None:
        self._files = files

    def open(self, name: str, mode: str) -> Any:
        return self._files.openbin(name, mode)

    def details(self, name: str) -> list[tuple[str, int]]:
        return [(info.name, info.size) for info in self._files.scandir(name, namespaces=["details"])]

    def safe(self) -> None:
        """It is, when closed."""


@dataclass(frozen=True)
class Counted:
    """A job, and how it is looked at. `again`: it was done once before, uncounted."""

    double: OnedataDouble
    job: Job
    latency: float
    again: bool

    def on(self, root: Mount | Driver) -> tuple[float, int]:
        """Seconds and requests."""
        if self.again:
            self.job(root)
        self.double.do("clear")
        if self.latency:
            for face in (KRAKOW, "zone"):
                self.double.fault(".*", "latency", face=face, seconds=self.latency, count=10**6)
        started = time.perf_counter()
        self.job(root)
        seconds = time.perf_counter() - started
        return seconds, len(self.double.records())


def count_mount(keys: Mapping[str, object], counted: Counted) -> tuple[float, int]:
    with daemon_over({"bench": keys}) as daemon:
        daemon.wait_for_state("bench", "live")
        return counted.on(Mount(daemon.path("bench"), daemon.sync))


def count_driver(double: OnedataDouble, counted: Counted) -> tuple[float, int]:
    preferred = [double.krakow_host]
    with warnings.catch_warnings():  # its TLS cannot be told of an authority
        warnings.simplefilter("ignore")
        files = OnedataRESTFS(double.zone_host, "alice-rest", space="bench", preferred_oneproviders=preferred, verify_ssl=False)
        files.listdir("/")
        return counted.on(Driver(files))


def put(space: DoubleOutside, name: str, content: bytes) -> None:
    space.double.do("write", provider=space.provider, path=f"bench/{name}", content=base64.b64encode(content).decode())


def show(found: Mapping[str, Mapping[str, float]], console: Console) -> None:
    table = Table(title="a space of EGI DataHub (stand-in)", title_justify="left")
    for column in ("", "nbmountd", "requests", "fs-onedatarestfs", "requests", "times its speed"):
        table.add_column(column, no_wrap=True, justify="left" if not column else "right")
    for title, one in found.items():
        ours, theirs = one["nbmountd"], one["fs-onedatarestfs"]
        counts = (f"{one[system]:.0f}" for system in ("nbmountd requests", "fs-onedatarestfs requests"))
        times = f"{theirs / ours:.1f}" + ("" if theirs >= GOAL * ours else f" (goal {GOAL:.0f})")
        table.add_row(title, f"{ours:.3f} s", next(counts), f"{theirs:.3f} s", next(counts), times)
    console.print(table)
