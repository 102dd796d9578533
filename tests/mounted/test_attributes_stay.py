"""Two containers change the attributes of one tree in turn, each sees the other's, and nothing is sent without need."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted import harness
from tests.mounted.conftest import webdav_mount
from tests.servers import ApacheServer, ServerProcess, WsgiDAVServer

MTIME = 1_600_000_000_123_456_789


@pytest.fixture(scope="module", params=[ApacheServer, WsgiDAVServer])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    base = tmp_path_factory.mktemp("server")
    with request.param(base / "root", base / "work") as server:
        yield server


def picture(directory: Path) -> dict[str, object]:
    """Everything that is to come back, by path."""
    found: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        kept: list[object] = [oct(status.st_mode), status.st_size]
        if path.is_symlink():
            kept += [os.readlink(path), status.st_mtime_ns]
        elif path.is_file():
            attributes = {n: os.getxattr(path, n) for n in os.listxattr(path) if not n.startswith("user.nbmountd.")}
            kept += [status.st_mtime_ns, path.read_bytes(), attributes]
        found[str(path.relative_to(directory))] = kept
    return found


def test_attributes_go_to_and_fro_between_two_containers(server: ServerProcess) -> None:
    mounts = {"dav": webdav_mount(server)}
    with harness.daemon_over(mounts) as first, harness.daemon_over(mounts) as second:
        place = first.path("dav")
        (place / "bin").mkdir(mode=0o700)
        (place / "bin" / "run.sh").write_text("#!/bin/sh\necho it runs\n")
        (place / "bin" / "run.sh").chmod(0o755)
        (place / "data.bin").write_bytes(b"d" * 2_000_000)
        os.utime(place / "data.bin", ns=(MTIME, MTIME))
        os.setxattr(place / "data.bin", "user.colour", b"blue\0\xff")
        (place / "latest").symlink_to("bin/run.sh")
        (place / "dangling").symlink_to("../nowhere/ü")
        (place / "kept.txt").write_text("kept")
        first.sync(place)
        os.setxattr(place / "kept.txt", "user.a", b"1")  # after the upload: a step of its own
        (place / "kept.txt").chmod(0o400)
        os.utime(place / "kept.txt", ns=(MTIME, MTIME))
        (place / "bin" / "run.sh").rename(place / "bin" / "walk.sh")
        (place / "latest").rename(place / "newest")
        first.sync(place)
        wanted = picture(place)

        second.refresh(second.path("dav"))

        assert picture(second.path("dav")) == wanted
        assert os.popen(str(second.path("dav") / "bin" / "walk.sh")).read() == "it runs\n"

        os.removexattr(second.path("dav") / "data.bin", "user.colour")
        (second.path("dav") / "kept.txt").chmod(0o644)
        (second.path("dav") / "newest").unlink()
        second.sync(second.path("dav"))
        first.refresh(place)

        assert picture(place) == picture(second.path("dav"))
        assert (place / "kept.txt").stat().st_mode & 0o777 == 0o644


def test_nothing_is_sent_again_when_nothing_changes(server: ServerProcess) -> None:
    """Storing attributes changes no version and no time of what the mount knows."""
    with harness.daemon_over({"dav": {**webdav_mount(server), "freshness": 1.0}}) as daemon:
        place = daemon.path("dav") / "quiet"
        place.mkdir()
        (place / "f").write_text("content")
        (place / "f").chmod(0o600)
        (place / "link").symlink_to("f")
        daemon.sync(place)
        before = picture(place), (place / "f").stat().st_ino
        server.clear_requests()

        for _ in range(3):
            time.sleep(1.1)  # past the freshness time: the remote is asked again
            assert (picture(place), (place / "f").stat().st_ino) == before
        daemon.sync(place)

        methods = {line.split()[0] for line in server.requests("quiet")}
        assert methods <= {"PROPFIND", "GET"}
        assert "PROPFIND" in methods
