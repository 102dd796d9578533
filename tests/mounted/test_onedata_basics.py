"""What test_webdav_basics.py promises, for spaces of Onedata: both generations of the API.

The providers hear of each other's changes after 2 s.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.harness import daemon_over
from tests.mounted.spaces import SpacePath, space_on
from tests.mounted.test_webdav_basics import *  # noqa: F403  each test there, over the rigs of this module
from tests.servers.onedata_double import OnedataDouble

RIGS = {"all-spaces": "25.0.1", "old-space": "21.02.3"}


@pytest.fixture(scope="module")
def spaces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Rig]]:
    """One daemon with a mount over each double."""
    base = tmp_path_factory.mktemp("spaces")
    mounts: dict[str, dict[str, object]] = {}
    roots = {}
    with ExitStack() as stack:
        doubles = {version: stack.enter_context(OnedataDouble(base / version, version=version)) for version in RIGS.values()}
        for name, version in RIGS.items():
            double = doubles[version]
            assert isinstance(double, OnedataDouble)
            mounts[name], roots[name] = space_on(double, name, base)
        del mounts["all-spaces"]["space"]
        daemon = stack.enter_context(daemon_over(mounts))
        tops = {name: daemon.path(name) for name in mounts}
        tops["all-spaces"] /= "all-spaces data"
        yield {name: Rig(daemon, name, tops[name], cast(Path, roots[name])) for name in mounts}


@pytest.fixture(scope="module", params=RIGS)
def webdav(spaces: dict[str, Rig], request: pytest.FixtureRequest) -> Rig:
    """The rig of the imported tests."""
    return spaces[request.param]


def test_ten_thousand_entries_are_listed(webdav: Rig) -> None:
    root = cast(SpacePath, webdav.root)
    root.outside.mkdir("ten-thousand")
    root.outside.double.do("fill", provider=root.outside.provider, path=f"{root.outside.base}/ten-thousand", count=10_000)
    webdav.mount.stat()
    webdav.daemon.refresh(webdav.mount)

    assert sorted(os.listdir(webdav.mount / "ten-thousand")) == [f"{number:05}" for number in range(10_000)]


@pytest.mark.parametrize("name", ["a@b", "#1", "what?", "100%", "%41", "@", "ærø 🌊", "a&b=c;d+e", "trailing ", "-rf"])
def test_names_that_official_clients_confuse_come_through(folder: Rig, name: str) -> None:
    (folder.mount / name).write_text(name)
    folder.daemon.sync(folder.mount)
    (folder.mount / name).rename(folder.mount / f"{name}.renamed")
    (folder.root / f"theirs {name}").write_bytes(name.encode())
    folder.daemon.refresh(folder.mount)

    assert (folder.mount / f"theirs {name}").read_text() == name
    assert_safe_and_equal(folder)  # noqa: F405
    assert (folder.root / f"{name}.renamed").read_text() == name
    (folder.mount / f"theirs {name}").unlink()
    (folder.mount / f"{name}.renamed").unlink()
    assert_safe_and_equal(folder)  # noqa: F405
    assert list(folder.root.iterdir()) == []
