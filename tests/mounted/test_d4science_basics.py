"""What test_webdav_basics.py promises, for D4Science workspaces: both generations of the server, with and without ranges."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import cast

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.harness import daemon_over
from tests.mounted.test_webdav_basics import *  # noqa: F403  each test there, over the rigs of this module
from tests.mounted.workspaces import KINDS, WorkspacePath, workspace_on
from tests.servers.d4science_double import D4ScienceServer


@pytest.fixture(scope="module")
def workspaces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Rig]]:
    """One daemon with a mount over each kind of server."""
    base = tmp_path_factory.mktemp("workspaces")
    mounts, roots = {}, {}
    with ExitStack() as stack:
        for kind in KINDS:
            server = stack.enter_context(D4ScienceServer(base / kind))
            mounts[kind], roots[kind] = workspace_on(server, kind, base)
        daemon = stack.enter_context(daemon_over(mounts))
        yield {name: Rig(daemon, name, daemon.path(name), roots[name]) for name in mounts}


@pytest.fixture(scope="module", params=KINDS)
def webdav(workspaces: dict[str, Rig], request: pytest.FixtureRequest) -> Rig:
    """The rig of the imported tests."""
    return workspaces[request.param]


def test_ten_thousand_entries_are_listed_with_their_sizes(webdav: Rig) -> None:
    sizes = {f"entry-{number:05}": number % 3 for number in range(10_000)}
    cast(WorkspacePath, webdav.root).user.fill("ten-thousand", sizes)
    webdav.daemon.refresh(webdav.mount)

    listed = {entry.name: entry.stat().st_size for entry in os.scandir(webdav.mount / "ten-thousand")}

    assert listed == sizes
