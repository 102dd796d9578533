"""Kills the worker every second under a program that uses the mount, and tells how long the program's pauses were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from rich.console import Console

CLIENT = Path(__file__).parents[1] / "tests" / "mounted" / "resume_client.py"
EVERY = 1.0
SECONDS = 300.0
QUICK_SECONDS = 20.0


def survive(directory: Path, worker: Callable[[], int | None], seconds: float) -> Mapping[str, float]:
    """Runs the program in `directory`, an empty one, and kills `worker()` all along; its report, in seconds.

    Raises CalledProcessError when any of its calls failed or any byte was wrong.
    """
    client = subprocess.Popen([sys.executable, str(CLIENT), str(directory), str(seconds)], stdout=subprocess.PIPE)
    kills = 0
    while client.poll() is None:
        time.sleep(EVERY)
        pid = worker()
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                kills += 1
    output, _ = client.communicate()
    if client.returncode:
        raise subprocess.CalledProcessError(client.returncode, "resume_client")
    return {**json.loads(output), "kills": kills, "seconds": seconds}


def show(report: Mapping[str, float], console: Console) -> None:
    console.print(
        f"{report['kills']} workers killed in {report['seconds']:g} s under {report['calls']} calls, none of which failed,"
        " and the server has every byte;"
        f" pauses: longest {report['longest']:.3f} s, 99th percentile {report['percentile']:.3f} s,"
        f" median {report['median']:.3f} s"
    )
