"""The command line of the benchmark: sets the stage, alternates the systems row by row, prints the report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import crash, datahub, latency, requests, resume, workspace
from bench.fuzz import INPUTS, QUICK_INPUTS, endure
from bench.report import Report
from bench.requests import count_requests
from bench.resume import QUICK_SECONDS, SECONDS, survive
from bench.rows import QUICK, ROWS, Row, Scale
from bench.server import MeteredApache
from bench.systems import Davfs2, Local, Nbmountd, Rclone, System, costing, unmount
from bench.workspace import CLONED, QUICK_CLONED
from nbmountd import __version__
from tests.mounted.kernel import same_tree
from tests.servers import FakeNextcloud

INSIDE = ("counts", "workspace", "datahub", "crash", "fuzz")
"""What is measured of nbmountd alone, or beside others than rclone."""
ALL_ROWS = [*ROWS, *INSIDE, *latency.ROWS]


def main() -> int:
    """Runs the chosen rows; the exit status is 0 when all of them ran, whoever was ahead."""
    arguments = parse()
    scale = QUICK if arguments.quick else Scale()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the ExitStack, so that nothing stays mounted
    console = Console(width=None if sys.stdout.isatty() else 160)
    inside: dict[str, Any] = {}
    with ExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="nbmountd-bench-", dir=arguments.directory))
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        server = MeteredApache(home / "server", home / "work")
        stack.enter_context(server)
        systems: list[System] = [Nbmountd(home, server), Rclone(home, server), Local(home)]
        for system in systems:
            stack.callback(unmount, system.mount)
            stack.callback(system.stop)
        report = Report([system.name for system in systems])
        for name in [name for name in arguments.rows if name in ROWS]:
            run_row(ROWS[name], systems, server, scale, arguments.repetitions, report, console)
        if "counts" in arguments.rows:
            inside |= look_inside(systems[0], QUICK_SECONDS if arguments.quick else SECONDS, console)
        if "workspace" in arguments.rows:
            inside["workspace"] = workspace.measure(new(home / "workspace"), QUICK_CLONED if arguments.quick else CLONED)
            workspace.show(inside["workspace"], console)
        if "datahub" in arguments.rows:
            inside["datahub"] = datahub.measure(new(home / "datahub"), 1 if arguments.quick else datahub.TURNS)
            datahub.show(inside["datahub"], console)
        if "fuzz" in arguments.rows:
            inside["fuzz"] = endure(QUICK_INPUTS if arguments.quick else INPUTS, console)
        if slow := [name for name in arguments.rows if name in latency.ROWS]:
            inside["latency"] = run_slow(slow, home, latency.QUICK if arguments.quick else latency.Scale(), console)
        if "crash" in arguments.rows:
            inside["crash"] = crash.endure(home / "crash", crash.QUICK_KILLS if arguments.quick else crash.KILLS, console)
    if report.values:
        report.show(console)
    if arguments.json:
        measured = {"about": about(arguments), "rows": report.as_json(), **inside}
        Path(arguments.json).write_text(json.dumps(measured, indent=1) + "\n")
    return 0


def run_slow(names: list[str], home: Path, scale: latency.Scale, console: Console) -> dict[str, dict[str, float | None]]:
    """The rows on a Nextcloud far away, beside rclone and davfs2 (which needs root)."""
    with ExitStack() as stack:
        (home / "slow").mkdir()
        server = FakeNextcloud(home / "cloud", home / "cloud-work")
        stack.enter_context(server)
        place = home / "slow"
        systems: list[System] = [
            Nbmountd(place, server, {"backend": "nextcloud", "url": server.origin}),
            Rclone(place, server, "nextcloud"),
        ]
        if os.geteuid() == 0 and shutil.which("mount.davfs"):
            systems.append(Davfs2(place, server))
        else:
            console.print("davfs2 is left out: it needs root, and to be installed")
        for system in systems:
            stack.callback(unmount, system.mount)
            stack.callback(system.stop)
        return latency.measure(names, systems, server, place, scale, console)


def look_inside(system: System, seconds: float, console: Console) -> dict[str, Any]:
    """What only nbmountd can tell: how many requests things cost, and how it endures the death of its workers."""
    assert isinstance(system, Nbmountd)
    system.start()
    try:
        (system.mount / "requests").mkdir()
        counts = count_requests(system.mount / "requests", lambda: system.status().requests)
        (system.mount / "resume").mkdir()
        report = survive(system.mount / "resume", lambda: system.status().pid, seconds)
        system.sync()
        if differences := same_tree(system.mount / "resume", system.remote / "resume"):
            raise RuntimeError(f"mount and server differ after the kills: {differences}")
    finally:
        system.stop()
    requests.show(counts, console)
    resume.show(report, console)
    return {"requests": counts, "resume": report}


def run_row(
    row: Row, systems: Sequence[System], server: MeteredApache, scale: Scale, repetitions: int, report: Report,
    console: Console,
) -> None:
    """Every system does the row `repetitions` times, each time in another order and from empty caches."""
    systems[-1].start()
    for root in {system.remote for system in systems}:
        row.prepare(root, scale)
    for repetition in range(repetitions):
        turn = repetition % len(systems)
        for system in [*systems[turn:], *systems[:turn]]:
            console.print(f"[dim]{row.title}: {repetition + 1}/{repetitions} {system.name}[/]")
            system.start()
            try:
                with costing(system) as cost:
                    results = row.run(system, scale, server.bytes_sent)
            finally:
                system.stop()
            for label, value in results.items():
                report.add(label, system.name, value)
            served = bool(cost.memory)
            report.add(f"  {row.title}: CPU of the daemon", system.name, cost.cpu if served else None)
            report.add(f"  {row.title}: memory of the daemon", system.name, cost.memory if served else None)
    for root in {system.remote for system in systems}:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()


def new(directory: Path) -> Path:
    directory.mkdir()
    return directory


def about(arguments: argparse.Namespace) -> dict[str, object]:
    """What a reader of the numbers has to know."""
    rclone = subprocess.run(["rclone", "version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return {
        "nbmountd": __version__,
        "rclone": rclone,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "repetitions": arguments.repetitions,
        "quick": arguments.quick,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--rows", type=rows, default=ALL_ROWS, help=f"which of {','.join(ALL_ROWS)}; default all")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, one repetition")
    parser.add_argument("--repetitions", type=int, help="default 3, or 1 with --quick")
    parser.add_argument("--no-inside", dest="inside", action="store_false", help=f"none of {','.join(INSIDE)}")
    parser.add_argument("--json", help="write everything measured to this file, too")
    parser.add_argument("--directory", help="a directory on the disk to use; default the system's temporary one")
    arguments = parser.parse_args()
    if not arguments.inside:
        arguments.rows = [name for name in arguments.rows if name not in INSIDE]
    arguments.repetitions = arguments.repetitions or (1 if arguments.quick else 3)
    return arguments


def rows(text: str) -> list[str]:
    names = text.replace(",", " ").split()
    if unknown := [name for name in names if name not in ALL_ROWS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(ALL_ROWS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
