"""Two empty directories for each test: one local, one in the mount over Apache that all tests share."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.posix.twins import Twins

_numbers = itertools.count(1)


@pytest.fixture
def folder(apache: Rig, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A directory of the test's own in the mount, and the same on the server. It is removed at the end, so that what no
    test waits for is never sent."""
    name = f"posix-{next(_numbers)}-" + re.sub(r"[^A-Za-z0-9_]+", "-", request.node.name)[:100]
    assert apache.mount.is_mount(), "without the mount both directories of a test are local, and nothing could fail"
    (apache.mount / name).mkdir()
    yield apache.below(name)
    if os.geteuid() != 0:  # who may not look into a directory without bits
        subprocess.run(["chmod", "-R", "u+rwX", apache.mount / name], check=True)
    shutil.rmtree(apache.mount / name)


@pytest.fixture
def twins(folder: Rig, tmp_path: Path) -> Twins:
    local = tmp_path / "local"
    local.mkdir()
    return Twins(local, folder.mount)
