"""Gives each target its inputs and notes what must not be: undeclared errors, inputs that take long, memory that stays.

A finding names target and seed, and `python -m tests.fuzz.run --only TARGET --number N` gives that input again.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.mutations import mutate
from tests.fuzz.targets import Target, targets

SLOWEST = 2.0
"""Seconds of processor for one input of at most some 100 kB, on a busy machine."""
MOST_MEMORY = 300 * 2**20
"""Bytes by which the process may grow in all."""
MOST_FINDINGS = 20


@dataclass
class Outcome:
    """What a run came to."""

    inputs: int = 0
    read: int = 0
    """Inputs that made sense."""
    refused: Counter[str] = field(default_factory=Counter)
    """By the error's class."""
    slowest: float = 0.0
    """Seconds of processor for one input."""
    grown: int = 0
    """Bytes of memory at the highest, beyond the start."""
    findings: list[str] = field(default_factory=list)


def fuzz(inputs: int, seed: int = 0, only: str | None = None, start: int = 0) -> Outcome:
    """`inputs` of them spread over all targets, or all for one. The same seed gives the same inputs."""
    ours = logging.getLogger("nbmountd")
    level = ours.level
    ours.setLevel(logging.CRITICAL)
    try:
        return _fuzz(inputs, seed, only, start)
    finally:
        ours.setLevel(level)


def _fuzz(inputs: int, seed: int, only: str | None, start: int) -> Outcome:
    outcome = Outcome()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(prefix="nbm-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        chosen = [target for target in targets(Path(directory)) if only in (None, target.name)]
        total = sum(target.share for target in chosen)
        for target in chosen:
            for number in range(start, start + round(inputs * target.share / total)):
                _try(target, number, input_of(target, seed, number), outcome)
                if len(outcome.findings) >= MOST_FINDINGS:
                    break
    outcome.grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if outcome.grown > MOST_MEMORY:
        outcome.findings.append(f"memory grew by {outcome.grown} bytes")
    return outcome


def input_of(target: Target, seed: int, number: int) -> bytes:
    return mutate(target.seeds, random.Random(f"{seed} {target.name} {number}"))


def _try(target: Target, number: int, data: bytes, outcome: Outcome) -> None:
    outcome.inputs += 1
    began = time.thread_time()
    try:
        target.read(data)
        outcome.read += 1
    except target.errors as error:
        outcome.refused[type(error).__name__] += 1
    except Exception as error:
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        place = f"{where.tb_frame.f_code.co_filename.rpartition('/')[2]}:{where.tb_lineno}" if where is not None else "?"
        outcome.findings.append(
            f"{target.name} {number}: {type(error).__name__} at {place}: {str(error)[:200]} <- {data[:300]!r}"
        )
    took = time.thread_time() - began
    outcome.slowest = max(outcome.slowest, took)
    if took > SLOWEST:
        outcome.findings.append(f"{target.name} {number}: {took:.1f} s for {len(data)} bytes <- {data[:300]!r}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz.run", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one target")
    parser.add_argument("--number", type=int, help="that one input alone, printed")
    arguments = parser.parse_args()
    began = time.monotonic()
    inputs, start = (arguments.inputs, 0) if arguments.number is None else (1, arguments.number)
    outcome = fuzz(inputs, arguments.seed, arguments.only, start)
    sys.stdout.writelines(f"{line}\n" for line in _report(outcome, time.monotonic() - began))
    return bool(outcome.findings)


def _report(outcome: Outcome, seconds: float) -> Iterator[str]:
    yield f"{outcome.inputs} inputs in {seconds:.0f} s: {outcome.read} read, {sum(outcome.refused.values())} refused"
    yield f"by {dict(outcome.refused.most_common())}"
    yield f"slowest {outcome.slowest:.3f} s of processor, memory grew by {outcome.grown // 2**20} MiB"
    yield from outcome.findings


if __name__ == "__main__":
    sys.exit(main())
