"""A D4Science workspace mounted: both generations of the server, with and without ranges, over the double."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mounted.harness import Daemon, daemon_over
from tests.mounted.kernel import eventually
from tests.servers.d4science_double import D4ScienceServer, DoubleUser


@dataclass
class Workspace:
    """A mounted workspace and the same from outside."""

    server: D4ScienceServer
    user: DoubleUser
    daemon: Daemon
    mount: Path
    token: Path


@pytest.fixture(params=["1.x", "2.x", "2.x with ranges"])
def workspace(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workspace]:
    profile, _, ranges = request.param.partition(" ")
    with D4ScienceServer(tmp_path / "storagehub") as server:
        server.settings(profile=profile, ranges=bool(ranges))
        user = server.new_user()
        user.write("readme.txt", b"hello")
        token = tmp_path / "token"
        token.write_text(user.token)
        mount = {"backend": "d4science", "url": server.url, "token_file": str(token), "write_back_delay": 0.2}
        with daemon_over({"workspace": mount}) as daemon:
            yield Workspace(server, user, daemon, daemon.path("workspace"), token)


def test_files_are_written_read_moved_and_removed(workspace: Workspace) -> None:
    mount, user = workspace.mount, workspace.user
    assert (mount / "readme.txt").read_text() == "hello"

    (mount / "data").mkdir()
    (mount / "data" / ".hidden").write_bytes(b"dot")
    content = bytearray(os.urandom(300_000))
    (mount / "data" / "a.bin").write_bytes(content)
    workspace.daemon.sync(mount)
    content[100_000:100_004] = b"seek"
    with (mount / "data" / "a.bin").open("r+b") as file:
        file.seek(100_000)
        file.write(b"seek")
    os.utime(mount / "data" / "a.bin", ns=(0, 1_500_000_000_987_654_321))
    (mount / "data" / "a.bin").rename(mount / "b: 100%.bin")
    (mount / "readme.txt").unlink()
    workspace.daemon.sync(mount)

    assert user.listdir("") == ["b\uff1a 100\uff05.bin", "data"]
    assert user.listdir("data") == [".hidden"]
    assert user.read("b\uff1a 100\uff05.bin") == content
    assert (mount / "b: 100%.bin").stat().st_mtime_ns == 1_500_000_000_987_654_321
    assert user.trash() == ["readme.txt"]


def test_a_notebook_saved_fifty_times_stays_one_item(workspace: Workspace) -> None:
    mount, user = workspace.mount, workspace.user
    for number in range(50):
        saving = mount / ".~a.ipynb"
        saving.write_text(json.dumps({"cells": [number]}))
        saving.rename(mount / "a.ipynb")
        if number % 10 == 0:
            workspace.daemon.sync(mount)
    workspace.daemon.sync(mount)

    assert user.listdir("") == ["a.ipynb", "readme.txt"]
    assert json.loads(user.read("a.ipynb")) == {"cells": [49]}
    assert 1 <= user.item("a.ipynb")["versions"] <= 50


def test_a_git_repository_lives_in_the_workspace(workspace: Workspace) -> None:
    """Temporary files of git are never uploaded."""
    repository = workspace.mount / "repo"

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=Ann", "-c", "user.email=ann@example.org")
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=workspace.mount, capture_output=True, text=True, check=True, timeout=100
        )
        return done.stdout

    git("init", "-q", "repo")
    for number in range(30):
        (repository / f"file{number}").write_text(str(number))
    git("-C", "repo", "add", ".")
    git("-C", "repo", "commit", "-q", "-m", "first")
    workspace.daemon.sync(workspace.mount)

    assert git("-C", "repo", "status", "--porcelain") == ""
    assert len(workspace.user.listdir("repo")) == 31
    uploads = [line for line in workspace.server.lines(workspace.user.name) if "create/FILE" in line]
    assert len(uploads) <= 150


def test_the_end_of_a_large_file_comes_when_it_arrives_and_its_beginning_before(workspace: Workspace) -> None:
    size = 64 * 1024 * 1024
    content = os.urandom(1024 * 1024) * 64
    workspace.user.write("large.bin", content)
    workspace.daemon.refresh(workspace.mount)
    path = workspace.mount / "large.bin"
    got: dict[str, bytes] = {}

    def read_end() -> None:
        with path.open("rb") as file:
            file.seek(size - 65536)
            got["end"] = file.read()

    reader = threading.Thread(target=read_end)
    reader.start()
    with path.open("rb") as file:
        got["beginning"] = file.read(4096)
    reader.join(60)

    assert not reader.is_alive()
    assert got == {"end": content[-65536:], "beginning": content[:4096]}


def test_a_folder_without_write_permission_says_so_at_once(workspace: Workspace) -> None:
    members = {workspace.user.name: "READ_ONLY", "head": "ADMINISTRATOR"}
    workspace.server.share("vre", "Lab", "head", members, context="/root/Lab")
    workspace.daemon.refresh(workspace.mount)

    assert os.listdir(workspace.mount / "VREFolders") == ["Lab"]
    refusals = []
    for folder in (workspace.mount / "VREFolders", workspace.mount / "VREFolders" / "Lab"):
        with pytest.raises(PermissionError) as refused:
            (folder / "new.txt").write_text("x")
        refusals.append(refused.value.errno)
    assert set(refusals) == {errno.EACCES}


@pytest.mark.expects_log("token", "unauthenticated", "not connected", "Unauthenticated")
def test_what_is_written_while_the_token_is_dead_leaves_with_a_new_one(workspace: Workspace) -> None:
    assert (workspace.mount / "readme.txt").read_text() == "hello"
    workspace.server.call("expire", workspace.user.token.encode())
    (workspace.mount / "late.txt").write_text("kept")
    workspace.daemon.wait_for_state("workspace", "unauthenticated")
    assert (workspace.mount / "late.txt").read_text() == "kept"

    workspace.token.write_text(json.loads(workspace.server.call("token", user=workspace.user.name)))

    eventually(lambda: "late.txt" in workspace.user.listdir(""), 60, "the file arrives")
    workspace.daemon.sync(workspace.mount)
    assert workspace.user.read("late.txt") == b"kept"
