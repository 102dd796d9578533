"""What an upload that was interrupted leaves on the server is shown to no program, and the next start removes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbmountd.backends.webdav_share import TEMPORARY, TURN
from tests.mounted.conftest import webdav_mount
from tests.mounted.harness import daemon_over, eventually
from tests.servers import ApacheServer

CONTENT = os.urandom(300_000)
"""More than goes straight to its name."""


def hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith(TEMPORARY) and path.name != TURN)


@pytest.mark.expects_log("worker ended unasked.*SIGKILL")
def test_an_interrupted_upload_is_never_shown_and_gone_after_the_next_start(tmp_path: Path) -> None:
    """Somebody else's turn in the directory holds the upload up when all of it has been sent; then everything is killed."""
    root = tmp_path / "root"
    with ApacheServer(root, tmp_path / "work") as server:
        keys = {**webdav_mount(server), "freshness": 1.0, "write_back_delay": 0.1}
        with daemon_over({"dav": keys}) as daemon:
            mount = daemon.path("dav")
            (root / TURN).mkdir()
            os.chmod(root / TURN, 0o777)

            (mount / "file").write_bytes(CONTENT)
            left = eventually(lambda: hidden(root), 30, "the upload waits for its turn")
            daemon.refresh()
            assert os.listdir(mount) == ["file"]
            daemon.abandon()
            daemon.kill_supervisor()
            assert hidden(root) == left
            daemon.start()
            assert os.listdir(mount) == ["file"]
            daemon.sync(timeout=90)

            assert os.listdir(mount) == ["file"]
            assert [path.name for path in root.iterdir() if path.name != ".DAV"] == ["file"]
            assert (root / "file").read_bytes() == CONTENT
