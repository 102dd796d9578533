"""A folder of the test's own, and how programs are run in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig

LARGE = bool(os.environ.get("NBMOUNTD_TEST_LARGE"))
LIMIT = 900 if LARGE else 120
"""Seconds that a program may take."""

Run = Callable[..., str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The large edition takes its time."""
    here = Path(__file__).parent
    for item in items:
        if LARGE and here in item.path.parents:
            item.add_marker(pytest.mark.timeout(2 * LIMIT))


def sized(small: int, large: int) -> int:
    return large if LARGE else small


@pytest.fixture
def folder(apache: Rig, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """What stands in the folder at the end of the test must stand on the server too, byte for byte."""
    name = "program-" + re.sub(r"[^A-Za-z0-9_]+", "-", request.node.name)
    assert apache.mount.is_mount()
    (apache.mount / name).mkdir()
    rig = apache.below(name)

    yield rig

    rig.daemon.sync(rig.mount, timeout=LIMIT - 20)
    assert [line for line in rig.differences() if not _stays_here(rig, line)] == []
    assert (rig.status.parked, rig.status.conflicts) == (0, 0)


def _stays_here(rig: Rig, difference: str) -> bool:
    """Whether the name is one that the mount never sends, or a symlink: the server holds those in its own way."""
    path = rig.mount / difference.partition(" is only in left")[0].partition(" differs in kind")[0]
    return path.is_symlink() or "__pycache__" in path.parts


@pytest.fixture
def run(folder: Rig) -> Run:
    """Runs a program in the folder (or in `cwd`), which must succeed, and gives what it printed."""

    def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
        done = subprocess.run(
            [str(word) for word in command], cwd=cwd or folder.mount, capture_output=True, text=True, timeout=LIMIT,
            check=False, stdin=subprocess.DEVNULL, env={**os.environ, "HOME": str(folder.daemon.home), **environment},
        )  # fmt: skip
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def needed(program: str) -> str:
    """The program's path; skips the test where it is not installed."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found
