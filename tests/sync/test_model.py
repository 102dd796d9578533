"""Nothing is lost and both sides converge, whatever happens: thousands of random scripts against the real core.

A failing script is made as short as it can be and printed as Python, with its seed, its profile and its block size. To play
more of them: `NBMOUNTD_MODEL_EXAMPLES=20000 NBMOUNTD_MODEL_SEED=1 pytest tests/sync/test_model.py -s`.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.sync.script import PROFILES, TOKEN, Op, make_script, play

EXAMPLES = int(os.environ.get("NBMOUNTD_MODEL_EXAMPLES", "2000"))
SEED = int(os.environ.get("NBMOUNTD_MODEL_SEED", "1000000"))
BATCHES = 8
LARGE_UNIT = 128 * 1024
"""Blocks with which a file is too large to be fetched whole."""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: durability is not what is tested here."""
    shared = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="nbmountd-model-", dir=shared if os.access(shared, os.W_OK) else tmp_path))
    logging.disable(logging.CRITICAL)
    yield made
    logging.disable(logging.NOTSET)
    shutil.rmtree(made, ignore_errors=True)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_no_byte_is_lost_and_both_sides_converge(batch: int, home: Path) -> None:
    first, count = SEED + batch * EXAMPLES, EXAMPLES // BATCHES
    print(f"seeds {first} to {first + count - 1}")
    for seed in range(first, first + count):
        chance = random.Random(seed)
        profile, unit = chance.choice(list(PROFILES)), chance.choices((TOKEN, LARGE_UNIT), (9, 1))[0]
        script = make_script(chance)

        failure = _failure_of(script, profile, home, seed, unit)
        if failure is not None:
            shortest = _shortened(script, partial(_failure_of, profile=profile, home=home, seed=seed, unit=unit))
            text = "\n".join(f"    {op!r}," for op in shortest)
            raise AssertionError(f"seed {seed}, profile {profile!r}, unit {unit}:\n[\n{text}\n]") from failure


def _failure_of(script: list[Op], profile: str, home: Path, seed: int, unit: int) -> Exception | None:
    place = Path(tempfile.mkdtemp(dir=home))
    try:
        play(script, profile, place, seed=seed, unit=unit)
    except Exception as exc:
        return exc
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return None


def _shortened(script: list[Op], failure_of: Callable[[list[Op]], Exception | None]) -> list[Op]:
    """Leaves out what is not needed for some failure. What does not fail each time is tried a few times."""
    size = max(1, len(script) // 2)
    while size:
        at = 0
        while at < len(script):
            shorter = script[:at] + script[at + size :]
            if any(failure_of(shorter) for _ in range(2)):
                script = shorter
            else:
                at += size
        size //= 2
    return script
