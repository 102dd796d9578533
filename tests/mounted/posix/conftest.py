"""Two empty directories for each test: one local, one in the mount over Apache that all tests share."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.posix.twins import Twins


@pytest.fixture
def folder(apache: Rig, request: pytest.FixtureRequest) -> Rig:
    """A directory of the test's own in the mount, and the same on the server."""
    name = "posix-" + re.sub(r"[^A-Za-z0-9_]+", "-", request.node.name)[:100]
    (apache.mount / name).mkdir()
    return apache.below(name)


@pytest.fixture
def twins(folder: Rig, tmp_path: Path) -> Twins:
    local = tmp_path / "local"
    local.mkdir()
    return Twins(local, folder.mount)
