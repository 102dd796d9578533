"""The crash loop of the tests at length: the worker, then everything, killed 300 times under a program that writes."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median

from rich.console import Console

from tests.mounted.conftest import webdav_mount
from tests.mounted.crash_loop import Loop, Outcome
from tests.mounted.harness import daemon_over
from tests.servers import ApacheServer

KILLS, QUICK_KILLS = 300, 20


def endure(home: Path, kills: int, console: Console) -> dict[str, object]:
    """What was killed and found; differences, of which there should be none, are shown and part of it."""
    measured: dict[str, object] = {}
    for victim in ("worker", "everything"):
        console.print(f"[dim]crash loop: {victim} killed {kills} times[/]")
        seed = random.randrange(10**6)
        outcome = run(home / victim, victim, kills, seed)
        console.print(
            f"{victim} killed {outcome.kills} times (seed {seed}) under {outcome.operations} operations, all of them looked at"
            f" in the mount and on the server: {len(outcome.differences)} differences;"
            f" served again after {median(outcome.away):.2f} s, at most {max(outcome.away):.2f} s"
        )
        for difference in outcome.differences:
            console.print(difference, markup=False, style="red")
        measured[victim] = {
            "kills": outcome.kills, "operations": outcome.operations, "differences": outcome.differences, "seed": seed,
            "median_away": median(outcome.away), "longest_away": max(outcome.away),
        }  # fmt: skip
    return measured


def run(home: Path, victim: str, kills: int, seed: int) -> Outcome:
    """One loop over an Apache of its own."""
    home.mkdir(parents=True)
    with ApacheServer(home / "root", home / "work") as server:
        with daemon_over({"dav": {**webdav_mount(server), "write_back_delay": 0.3}}) as daemon:
            loop = Loop(daemon, daemon.path("dav"), server.root, home / "manifest", kills, seed)
            return loop.kill_workers() if victim == "worker" else loop.kill_everything()
