"""A million inputs for everything that reads what strangers wrote (tests/fuzz): each is read or refused, in bounded time."""

from __future__ import annotations

import time

from rich.console import Console

from tests.fuzz.run import fuzz

INPUTS, QUICK_INPUTS = 1_000_000, 50_000


def endure(inputs: int, console: Console) -> dict[str, object]:
    """The findings, of which there should be none, and what was measured."""
    console.print(f"[dim]fuzzing: {inputs} inputs[/]")
    began = time.monotonic()
    outcome = fuzz(inputs)
    seconds = time.monotonic() - began
    refused = sum(outcome.refused.values())
    console.print(
        f"{outcome.inputs} hostile inputs in {seconds:.0f} s: {outcome.read} could be read, {refused} were refused by a"
        f" declared error, {len(outcome.findings)} findings;"
        f" slowest {outcome.slowest:.3f} s, memory grew by {outcome.grown / 2**20:.0f} MiB"
    )
    for finding in outcome.findings:
        console.print(finding, markup=False, style="red")
    return {
        "inputs": outcome.inputs, "read": outcome.read, "refused": refused, "findings": outcome.findings, "seconds": seconds,
        "slowest": outcome.slowest, "grown": outcome.grown,
    }  # fmt: skip
