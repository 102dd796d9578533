"""A folder that is already there, mounted read-only and read-write, with its modes, times and links."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig, directory_mount
from tests.mounted.harness import Daemon, daemon_over
from tests.mounted.kernel import same_tree


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    base = tmp_path_factory.mktemp("directory")
    for name in ("shared", "datasets"):
        source = base / name
        (source / "deep" / "er").mkdir(parents=True)
        (source / "deep" / "er" / "data.bin").write_bytes(os.urandom(200_000))
        (source / "script.sh").write_text("#!/bin/sh\n")
        (source / "script.sh").chmod(0o750)
        (source / "link").symlink_to("deep/er/data.bin")
        os.utime(source / "script.sh", ns=(1, 1_600_000_000_123_456_789))
    mounts = {
        "shared": directory_mount(base / "shared"),
        "datasets": {**directory_mount(base / "datasets"), "read_only": True},
    }
    with daemon_over(mounts) as running:
        yield running


@pytest.fixture
def shared(daemon: Daemon) -> Rig:
    return Rig(daemon, "shared", daemon.path("shared"), Path(str(daemon.mounts["shared"]["source"])))


@pytest.fixture
def datasets(daemon: Daemon) -> Rig:
    return Rig(daemon, "datasets", daemon.path("datasets"), Path(str(daemon.mounts["datasets"]["source"])))


@pytest.mark.parametrize(("name", "mode"), [("shared", 0o750), ("datasets", 0o550)])
def test_a_folder_shows_its_files_with_modes_times_and_links(
    name: str, mode: int, request: pytest.FixtureRequest
) -> None:
    """A read-only mount shows no write bits: programs ask them to decide where they may save."""
    rig: Rig = request.getfixturevalue(name)

    found = (rig.mount / "script.sh").stat()

    assert same_tree(rig.mount, rig.root) == []
    assert (found.st_mode & 0o777, found.st_mtime_ns) == (mode, 1_600_000_000_123_456_789)
    assert os.readlink(rig.mount / "link") == "deep/er/data.bin"


def test_a_read_only_mount_refuses_every_change(datasets: Rig) -> None:
    refusals = []
    for change in (
        lambda: (datasets.mount / "new").touch(),
        lambda: (datasets.mount / "new").mkdir(),
        lambda: (datasets.mount / "script.sh").unlink(),
        lambda: (datasets.mount / "script.sh").chmod(0o777),
        lambda: (datasets.mount / "script.sh").rename(datasets.mount / "other"),
        lambda: os.truncate(datasets.mount / "script.sh", 0),
    ):
        with pytest.raises(OSError) as refused:
            change()
        refusals.append(refused.value.errno)

    assert set(refusals) == {errno.EROFS}
    assert datasets.status.read_only


def test_changes_arrive_in_the_folder(shared: Rig) -> None:
    (shared.mount / "results").mkdir()
    (shared.mount / "results" / "table.csv").write_text("a,b\n1,2\n")
    (shared.mount / "results" / "table.csv").chmod(0o640)
    os.utime(shared.mount / "results" / "table.csv", ns=(0, 1_500_000_000_987_654_321))
    (shared.mount / "results" / "latest").symlink_to("table.csv")
    (shared.mount / "deep").rename(shared.mount / "results" / "deeper")
    shared.daemon.sync(shared.mount)

    found = (shared.root / "results" / "table.csv").stat()

    assert same_tree(shared.mount, shared.root) == []
    assert (found.st_mode & 0o777, found.st_mtime_ns) == (0o640, 1_500_000_000_987_654_321)
    assert os.readlink(shared.root / "results" / "latest") == "table.csv"
    assert (shared.mount / "results" / "table.csv").stat().st_mtime_ns == 1_500_000_000_987_654_321


def test_a_new_file_of_the_folder_is_seen_after_refresh(shared: Rig) -> None:
    (shared.root / "from-outside.txt").write_text("hello")
    shared.daemon.refresh(shared.mount)

    assert (shared.mount / "from-outside.txt").read_text() == "hello"
