"""A D4Science workspace mounted: both generations of the server, with and without ranges, over the double."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

from nbmountd.fuse.operations import GRACE
from tests.mounted.harness import Daemon, daemon_over
from tests.mounted.kernel import eventually
from tests.mounted.test_jupyter import notebook, run
from tests.mounted.workspaces import WorkspacePath
from tests.servers.d4science_double import D4ScienceServer, DoubleUser

MIB = 2**20
LARGE = 1024 * MIB if os.environ.get("NBMOUNTD_TEST_LARGE") else 64 * MIB
"""The file whose end is read from a server without ranges; 1 GiB in the larger edition."""


@dataclass
class Workspace:
    """A folder in a mounted workspace and the same from outside."""

    server: D4ScienceServer
    user: DoubleUser
    daemon: Daemon
    top: Path
    mount: Path
    root: WorkspacePath
    token: Path

    def sync(self) -> None:
        self.daemon.sync(self.top)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())

    def changes(self, pattern: str = "") -> list[str]:
        """Requests so far that were to change something, "METHOD PATH STATUS"; 0 is no answer."""
        lines = self.server.lines(self.user.name)
        return [line for line in lines if not line.startswith("GET ") and pattern in line and "/metadata " not in line]


@contextmanager
def mounted(base: Path, *profiles: str, **keys: object) -> Iterator[dict[str, Workspace]]:
    """One daemon with a workspace on a server of its own for each profile ("2.x", "2.x with ranges")."""
    servers: dict[str, tuple[D4ScienceServer, DoubleUser, Path]] = {}
    mounts: dict[str, dict[str, object]] = {}
    with ExitStack() as stack:
        for profile in profiles:
            name = profile.replace(" ", "-")
            server = stack.enter_context(D4ScienceServer(base / name))
            server.settings(profile=profile.split(" ")[0], ranges="ranges" in profile)
            user = server.new_user()
            user.write("readme.txt", b"hello")
            token = base / f"{name}.token"
            token.write_text(user.token)
            servers[name] = server, user, token
            mounts[name] = {"backend": "d4science", "url": server.url, "token_file": str(token), **keys}
        with daemon_over(mounts) as daemon:
            yield {
                profile: Workspace(server, user, daemon, top, top, WorkspacePath(user), token)
                for profile, (name, (server, user, token)) in zip(profiles, servers.items(), strict=True)
                for top in (daemon.path(name),)
            }


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Workspace]]:
    with mounted(tmp_path_factory.mktemp("storagehub"), "1.x", "2.x", "2.x with ranges") as workspaces:
        yield workspaces


def folder_of(shared: dict[str, Workspace], profile: str, request: pytest.FixtureRequest) -> Workspace:
    """A folder of the test's own, on both sides, and no fault of an earlier test."""
    top = shared[profile]
    top.server.call("clear")
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    (top.mount / name).mkdir()
    top.sync()
    return Workspace(top.server, top.user, top.daemon, top.top, top.mount / name, top.root / name, top.token)


@pytest.fixture(params=["1.x", "2.x", "2.x with ranges"])
def workspace(shared: dict[str, Workspace], request: pytest.FixtureRequest) -> Workspace:
    return folder_of(shared, request.param, request)


@pytest.fixture(params=["1.x", "2.x"])
def either(shared: dict[str, Workspace], request: pytest.FixtureRequest) -> Workspace:
    """Where ranges make no difference."""
    return folder_of(shared, request.param, request)


def test_files_are_written_read_moved_and_removed(workspace: Workspace) -> None:
    mount, root = workspace.mount, workspace.root
    assert (workspace.top / "readme.txt").read_text() == "hello"

    (mount / "data").mkdir()
    (mount / "data" / ".hidden").write_bytes(b"dot")
    content = bytearray(os.urandom(300_000))
    (mount / "data" / "a.bin").write_bytes(content)
    workspace.sync()
    content[100_000:100_004] = b"seek"
    with (mount / "data" / "a.bin").open("r+b") as file:
        file.seek(100_000)
        file.write(b"seek")
    os.utime(mount / "data" / "a.bin", ns=(0, 1_500_000_000_987_654_321))
    (mount / "data" / "a.bin").rename(mount / "b: 100%.bin")
    (mount / "gone.txt").write_text("x")
    workspace.sync()
    (mount / "gone.txt").unlink()
    workspace.sync()

    assert sorted(workspace.user.listdir(root.wire)) == ["b\uff1a 100\uff05.bin", "data"]
    assert workspace.user.listdir(f"{root.wire}/data") == [".hidden"]
    assert (root / "b: 100%.bin").read_bytes() == content
    assert (mount / "b: 100%.bin").stat().st_mtime_ns == 1_500_000_000_987_654_321
    assert "gone.txt" in workspace.user.trash()


def test_a_notebook_that_jupyter_saves_fifty_times_stays_one_item(either: Workspace) -> None:
    """Even if each save is sent: at most fifty versions, and never a second item."""
    contents = AsyncLargeFileManager(root_dir=str(either.mount), delete_to_trash=False)
    for number in range(50):
        run(contents.save(notebook(f"number {number}"), "a.ipynb"))
        if number % 10 == 0:
            either.sync()
    either.sync()

    assert either.names() == ["a.ipynb"]
    assert "number 49" in (either.root / "a.ipynb").read_text()
    assert 1 <= either.user.item((either.root / "a.ipynb").wire)["versions"] <= 50


def test_each_file_of_a_cloned_repository_is_uploaded_once(either: Workspace, tmp_path: Path) -> None:
    """So what git writes for a moment only is never uploaded."""
    origin = tmp_path / "origin"
    make_repository(origin, files=100)
    before = len(either.changes("create/FILE"))

    subprocess.run(["git", "clone", "-q", f"file://{origin}", str(either.mount / "clone")], check=True, timeout=100)
    status = ["git", "-C", str(either.mount / "clone"), "status", "--porcelain"]
    either.sync()

    assert subprocess.run(status, check=True, capture_output=True, timeout=100).stdout == b""
    files = count_files(either.root / "clone")
    assert files >= 100
    assert len(either.changes("create/FILE")) - before == files


def test_what_is_open_and_still_empty_is_not_sent_meanwhile(tmp_path: Path) -> None:
    """git holds its empty index.lock open for as long as a checkout takes."""
    with mounted(tmp_path, "2.x", write_back_delay=0.2) as workspaces:
        workspace = workspaces["2.x"]
        with (workspace.mount / "index.lock").open("w") as held:
            (workspace.mount / "later").write_text("x")
            eventually(lambda: "later" in workspace.names(), 60, "what was closed arrives")
            meanwhile = workspace.names()
            held.write("index")
        (workspace.mount / "index.lock").rename(workspace.mount / "index")
        workspace.sync()

        assert meanwhile == ["later", "readme.txt"]
        assert workspace.names() == ["index", "later", "readme.txt"]
        assert len(workspace.changes("create/FILE")) == 2


def make_repository(origin: Path, files: int) -> None:
    origin.mkdir()
    for number in range(files):
        directory = origin / f"d{number % 10}"
        directory.mkdir(exist_ok=True)
        (directory / f"file{number}").write_text(f"{number}\n" * 20)
    git = ["git", "-C", str(origin), "-c", "user.name=Ann", "-c", "user.email=ann@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True, timeout=100)


def count_files(directory: WorkspacePath) -> int:
    return sum(count_files(entry) if entry.is_dir() else 1 for entry in directory.iterdir())


@pytest.mark.expects_log("empty", "degraded")
def test_an_empty_file_that_the_server_refuses_is_kept_and_leaves_with_its_first_byte(either: Workspace) -> None:
    """Whether it takes empty files is not known. Nothing else waits for that."""
    either.server.settings(takes_empty_files=False)
    try:
        (either.mount / "empty").touch()
        (either.mount / "full").write_text("x")
        unsafe = either.daemon.ctl("sync", "--timeout", "1", str(either.mount))
        waiting = either.daemon.ctl("queue").stdout + either.daemon.ctl("parked").stdout
        meanwhile, seen = either.names(), sorted(os.listdir(either.mount))

        (either.mount / "empty").write_text("no longer")
        either.sync()
    finally:
        either.server.settings(takes_empty_files=True)

    assert (unsafe.returncode, meanwhile, seen) == (4, ["full"], ["empty", "full"])
    assert "refuses an empty file" in waiting
    assert (either.root / "empty").read_text() == "no longer"


def test_times_and_modes_come_back_in_another_container(either: Workspace) -> None:
    for number, mode in enumerate((0o640, 0o755, 0o400)):
        (either.mount / f"f{number}").write_text("x")
        (either.mount / f"f{number}").chmod(mode)
        os.utime(either.mount / f"f{number}", ns=(0, 1_234_567_890_123_456_789 + number))
    either.sync()

    with daemon_over({"other": either.daemon.mounts[either.top.name]}) as other:
        found = [path.stat() for path in sorted((other.path("other") / either.mount.name).iterdir())]

    assert [status.st_mode & 0o777 for status in found] == [0o640, 0o755, 0o400]
    assert [status.st_mtime_ns for status in found] == [1_234_567_890_123_456_789 + number for number in range(3)]


# --- a server that sends whole files only ------------------------------------------------------------------------------


def test_the_end_of_a_large_file_comes_when_it_arrives_and_its_beginning_before(either: Workspace) -> None:
    """Neither hangs, and who reads the beginning is not kept waiting by who wants the end."""
    edge = os.urandom(MIB)
    either.user.write_sparse((either.root / "large.bin").wire, LARGE, edge)
    either.server.hook(pattern="download", action="drip", count=8 * MIB, user=either.user.name)
    either.daemon.refresh(either.mount)
    before = downloads(either)
    got: dict[str, bytes] = {}

    def read_end() -> None:
        with (either.mount / "large.bin").open("rb") as file:
            file.seek(LARGE - 65536)
            got["end"] = file.read()

    reader = threading.Thread(target=read_end)
    reader.start()
    eventually(lambda: downloads(either) > before, 30, "the reader of the end has asked")
    with (either.mount / "large.bin").open("rb") as file:
        got["beginning"] = file.read(4096)
    assert "end" not in got, "the server has not sent it yet"
    either.server.release()
    reader.join(120)

    assert got == {"end": edge[-65536:], "beginning": edge[:4096]}
    assert downloads(either) - before == 1


def downloads(workspace: Workspace) -> int:
    return sum("/download" in line for line in workspace.server.lines(workspace.user.name))


def test_after_a_glance_at_the_beginning_the_whole_file_can_be_read(either: Workspace) -> None:
    """What is fetched ahead is given up when the file is closed; a server without ranges then begins anew."""
    edge = os.urandom(MIB)
    either.user.write_sparse((either.root / "glance.bin").wire, 16 * MIB, edge)
    either.server.hook(pattern="download", action="drip", count=4 * MIB, user=either.user.name)
    either.daemon.refresh(either.mount)

    with (either.mount / "glance.bin").open("rb") as file:
        beginning = file.read(4096)
    whole = hashlib.sha256()
    with (either.mount / "glance.bin").open("rb") as file:
        while piece := file.read(MIB):
            whole.update(piece)

    assert beginning == edge[:4096]
    assert whole.digest() == hashlib.sha256(edge + bytes(14 * MIB) + edge).digest()


def test_a_reader_of_the_end_waits_longer_than_the_deadline_while_bytes_come(tmp_path: Path) -> None:
    edge = os.urandom(MIB)
    deadline = 4.0
    with mounted(tmp_path, "2.x", request_deadline=deadline) as workspaces:
        workspace = workspaces["2.x"]
        workspace.user.write_sparse("slow.bin", 32 * MIB, edge)
        slowly = {"action": "trickle", "count": MIB, "seconds": 0.32, "times": 100}
        workspace.server.hook(pattern="download", **slowly, user=workspace.user.name)
        workspace.daemon.refresh(workspace.mount)
        began = time.monotonic()

        with (workspace.mount / "slow.bin").open("rb") as file:
            file.seek(32 * MIB - 65536)
            end = file.read()

        assert end == edge[-65536:]
        assert time.monotonic() - began > deadline + GRACE, "the server was too fast for this test to mean anything"


# --- lost answers --------------------------------------------------------------------------------------------------------


def make_folder(mount: Path) -> None:
    (mount / "made").mkdir()


def upload(mount: Path) -> None:
    (mount / "new.txt").write_text("new")


def replace(mount: Path) -> None:
    (mount / "old.txt").write_text("other bytes")


def rename(mount: Path) -> None:
    (mount / "old.txt").rename(mount / "renamed.txt")


def move(mount: Path) -> None:
    (mount / "old.txt").rename(mount / "sub" / "old.txt")


def delete(mount: Path) -> None:
    (mount / "old.txt").unlink()


LOST = [
    (make_folder, "create/FOLDER", ["made", "old.txt", "sub"]),
    (upload, "create/FILE", ["new.txt", "old.txt", "sub"]),
    (replace, "create/FILE", ["old.txt", "sub"]),
    (rename, "/rename", ["renamed.txt", "sub"]),
    (move, "/move", ["sub", "sub/old.txt"]),
    (delete, "DELETE", ["sub"]),
]


@pytest.mark.expects_log("degraded", "offline")
@pytest.mark.parametrize(("act", "request_", "left"), LOST, ids=[act.__name__ for act, _, _ in LOST])
def test_a_lost_answer_is_found_out_and_the_change_done_once(
    either: Workspace, act: Callable[[Path], None], request_: str, left: list[str]
) -> None:
    (either.mount / "old.txt").write_text("old")
    (either.mount / "sub").mkdir()
    either.sync()
    before = len(either.changes(request_))
    either.server.hook(pattern=request_, action="lose-after", user=either.user.name)

    act(either.mount)
    either.sync()

    found = [entry.wire.removeprefix(f"{either.root.wire}/") for entry in tree(either.root)]
    assert sorted(found) == left
    assert len(either.changes(request_)) - before == 1, "sent once"
    either.daemon.refresh(either.mount)
    assert sorted(str(path.relative_to(either.mount)) for path in either.mount.rglob("*")) == left
    if act is replace:
        assert (either.root / "old.txt").read_text() == "other bytes"
        assert either.user.item((either.root / "old.txt").wire)["versions"] == 2


def tree(directory: WorkspacePath) -> Iterator[WorkspacePath]:
    for entry in directory.iterdir():
        yield entry
        if entry.is_dir():
            yield from tree(entry)


def test_a_removal_that_was_answered_and_not_done_is_noticed(either: Workspace) -> None:
    (either.mount / "stubborn.txt").write_text("x")
    either.sync()
    before = len(either.changes("DELETE"))
    either.server.hook(pattern="DELETE", action="nothing", user=either.user.name)

    (either.mount / "stubborn.txt").unlink()
    either.sync()

    assert either.names() == []
    assert len(either.changes("DELETE")) - before == 2


# --- what the server tells beside the bytes ------------------------------------------------------------------------------


def test_versions_and_public_links_are_read_only_attributes_and_explain_tells_the_rest(either: Workspace) -> None:
    file = either.mount / "a.txt"
    for text in ("one", "two"):
        file.write_text(text)
        either.sync()
    (either.mount / "here-only.txt").touch()

    def attribute(name: str) -> str:
        return os.getxattr(file, f"user.d4science.{name}").decode()

    listed = os.listxattr(file)
    item = either.user.item((either.root / "a.txt").wire)
    link = attribute("publiclink")
    with urllib.request.urlopen(link, timeout=60) as answer:
        assert answer.read() == b"two"
    assert (attribute("id"), attribute("owner"), attribute("shared")) == (item["id"], either.user.name, "no")
    assert [line.endswith("current") for line in attribute("versions").split("\n")] == [False, True]
    assert listed == [], "a copy with all attributes must not make a link of each file"
    refusals = []
    for name, path in (("publiclink", either.mount), ("versions", either.mount / "here-only.txt"), ("other", file)):
        with pytest.raises(OSError) as refused:
            os.getxattr(path, f"user.d4science.{name}")
        refusals.append(refused.value.errno)
    assert set(refusals) == {errno.ENODATA}
    with pytest.raises(PermissionError):
        os.setxattr(file, "user.d4science.owner", b"somebody else")

    told = dict(line.split(maxsplit=1) for line in either.daemon.ctl("explain", str(file)).stdout.splitlines())
    assert (told["id"], told["owner"]) == (item["id"], either.user.name)
    assert len(told["versions"].split("; ")) == 2


@pytest.mark.expects_log("degraded", "offline")
def test_what_the_server_does_not_tell_in_time_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    with mounted(tmp_path, "2.x", request_deadline=0.5) as workspaces:
        workspace = workspaces["2.x"]
        workspace.server.hook(pattern="versions", action="delay", seconds=120, times=100, user=workspace.user.name)

        with pytest.raises(OSError) as refused:
            os.getxattr(workspace.mount / "readme.txt", "user.d4science.versions")
        explained = workspace.daemon.ctl("explain", str(workspace.mount / "readme.txt"))

        assert refused.value.errno in (errno.ETIMEDOUT, errno.EIO)
        assert explained.returncode == 0
        assert "no answer" in explained.stdout
        workspace.server.release()


def test_a_vre_folder_has_a_readable_name_and_is_there_once(either: Workspace) -> None:
    members = {either.user.name: "WRITE_ALL"}
    title = f"Ocean Lab {either.mount.name}"
    either.server.share("vre", title, either.user.name, members, context="/d4science.research-infrastructures.eu/Ocean")
    either.daemon.refresh(either.top)

    (either.top / "VREFolders" / title / "notes.txt").write_text("for all")
    either.sync()

    assert [str(path.parent.relative_to(either.top)) for path in either.top.rglob("notes.txt")] == [f"VREFolders/{title}"]
    explained = either.daemon.ctl("explain", str(either.top / "VREFolders" / title)).stdout
    assert re.search(r"^shared +yes$", explained, re.MULTILINE)


@pytest.mark.expects_log("worker ended unasked")
def test_a_move_across_a_shared_folders_border_is_exdev_so_mv_copies(either: Workspace) -> None:
    share = f"Team {either.mount.name}"
    members = {either.user.name: "WRITE_ALL", "other": "WRITE_ALL"}
    either.server.share("shared", share, "other", members)
    either.daemon.refresh(either.top)
    (either.mount / "private.txt").write_text("mine")
    (either.top / share / "sub").mkdir()
    (either.top / share / "sub" / "common.txt").write_text("ours")
    either.sync()
    before = len(either.changes("/move"))

    either.daemon.kill_worker(either.top.name)  # what it knew of borders, its successor knows
    refusals = []
    for source, target in (
        (either.mount / "private.txt", either.top / share / "private.txt"),
        (either.top / share / "sub" / "common.txt", either.mount / "common.txt"),
        (either.top / share / "sub", either.mount / "sub"),
    ):
        with pytest.raises(OSError) as refused:
            source.rename(target)
        refusals.append(refused.value.errno)
    (either.top / share / "sub" / "common.txt").rename(either.top / share / "within.txt")
    shutil.move(either.mount / "private.txt", either.top / share / "private.txt")
    either.sync()

    assert set(refusals) == {errno.EXDEV}
    assert sorted(os.listdir(either.top / share)) == ["private.txt", "sub", "within.txt"]
    assert (WorkspacePath(either.user) / share / "private.txt").read_text() == "mine"
    assert os.listdir(either.mount) == either.names() == []
    assert len(either.changes("/move")) - before == 1


def test_a_shared_folder_and_what_holds_one_stay_where_they_are(either: Workspace) -> None:
    share = f"Fixed {either.mount.name}"
    id = either.server.share("shared", share, "other", {either.user.name: "WRITE_ALL"})
    either.server.share("vre", f"VRE {share}", "other", {either.user.name: "WRITE_ALL"}, context=f"/root/{share}")
    either.daemon.refresh(either.top)

    refusals = []
    for act in (
        lambda: (either.top / share).rename(either.top / "elsewhere"),
        lambda: (either.top / share).rmdir(),
        lambda: (either.top / "VREFolders").rename(either.top / "elsewhere"),
        lambda: (either.top / "VREFolders" / f"VRE {share}").rename(either.top / "elsewhere"),
    ):
        with pytest.raises(PermissionError) as refused:
            act()
        refusals.append(refused.value.errno)
    folder = either.user.item(either.root.wire)["id"]
    either.server.call("hang", id=id, user=either.user.name, folder=folder)
    either.daemon.refresh(either.mount)
    assert os.listdir(either.mount) == [share]
    with pytest.raises(PermissionError):
        either.mount.rename(either.top / "elsewhere")

    assert set(refusals) == {errno.EACCES}


# --- permission and tokens -----------------------------------------------------------------------------------------------


def test_a_folder_without_write_permission_says_so_at_once(either: Workspace) -> None:
    members = {either.user.name: "READ_ONLY", "head": "ADMINISTRATOR"}
    either.server.share("vre", "Lab", "head", members, context="/root/Lab")
    either.daemon.refresh(either.top)
    before = len(either.changes())

    assert "Lab" in os.listdir(either.top / "VREFolders")
    refusals = []
    for folder in (either.top / "VREFolders", either.top / "VREFolders" / "Lab"):
        with pytest.raises(PermissionError) as refused:
            (folder / "new.txt").write_text("x")
        refusals.append(refused.value.errno)

    assert set(refusals) == {errno.EACCES}
    assert len(either.changes()) == before, "the server was not even asked"


@pytest.mark.expects_log("worker ended unasked")
def test_what_others_own_in_a_folder_for_owners_is_neither_removed_nor_renamed_nor_replaced(either: Workspace) -> None:
    """Said at once, and by the next worker too; one's own goes."""
    share = f"Owners {either.mount.name}"
    head = either.server.new_user()
    either.server.share("shared", share, head.name, {either.user.name: "WRITE_OWNER", head.name: "ADMINISTRATOR"})
    for name in ("sub", "theirs"):
        head.mkdir(f"{share}/{name}")
    head.write(f"{share}/theirs.txt", b"theirs")
    folder = either.top / share
    either.daemon.refresh(either.top)
    for name in ("mine.txt", "other.txt"):
        (folder / name).write_text("mine")
    either.sync()
    assert sorted(os.listdir(folder)) == ["mine.txt", "other.txt", "sub", "theirs", "theirs.txt"]
    before = len(either.changes())

    either.daemon.kill_worker(either.top.name)
    refusals = []
    for act in (
        (folder / "theirs.txt").unlink,
        (folder / "theirs").rmdir,
        lambda: (folder / "theirs.txt").rename(folder / "renamed.txt"),
        lambda: (folder / "theirs").rename(folder / "renamed"),
        lambda: (folder / "theirs.txt").rename(folder / "sub" / "theirs.txt"),
        lambda: (folder / "theirs").rename(folder / "sub" / "theirs"),
        lambda: (folder / "mine.txt").replace(folder / "theirs.txt"),
    ):
        with pytest.raises(PermissionError) as refused:
            act()
        refusals.append(refused.value.errno)
    asked = len(either.changes()) - before
    (folder / "mine.txt").rename(folder / "sub" / "still mine.txt")
    (folder / "other.txt").unlink()
    either.sync()

    assert set(refusals) == {errno.EACCES}
    assert asked == 0, "the server was not even asked"
    assert sorted(head.listdir(share)) == ["sub", "theirs", "theirs.txt"]
    assert head.listdir(f"{share}/sub") == ["still mine.txt"]
    assert head.read(f"{share}/theirs.txt") == b"theirs"


def test_the_token_is_in_no_log_no_argument_list_and_no_url(either: Workspace) -> None:
    (either.mount / "secret.txt").write_text("x")
    either.daemon.ctl("log-level", "debug")
    either.sync()
    either.daemon.refresh(either.mount)
    said = either.daemon.ctl("--json", "status").stdout
    said += either.daemon.ctl("explain", str(either.mount / "secret.txt")).stdout
    either.daemon.ctl("log-level", "info")

    processes = either.daemon.processes()
    assert len(processes) >= 2
    environments = []
    for process in processes:
        with suppress(PermissionError):  # a worker shows its own to nobody but root
            environments.append(Path(f"/proc/{process.pid}/environ").read_bytes())
    assert not [process for process in processes if either.user.token in process.command]
    assert not [environment for environment in environments if either.user.token.encode() in environment]
    assert either.user.token not in either.daemon.log.read_text()
    assert either.user.token not in either.server.log.read_text()
    assert either.user.token not in said


@pytest.mark.expects_log("expires in")
def test_a_token_that_ends_within_fifteen_minutes_is_warned_of_in_status(tmp_path: Path) -> None:
    with mounted(tmp_path, "2.x") as workspaces:
        workspace = workspaces["2.x"]
        before = workspace.daemon.status("2.x").token_warning
        workspace.token.write_text(json.loads(workspace.server.call("token", user=workspace.user.name, seconds="600")))
        workspace.daemon.refresh(workspace.mount)

        assert before == ""
        assert "expires in 10 min" in workspace.daemon.status("2.x").token_warning
        assert "expires in 10 min" in workspace.daemon.ctl("status").stdout
        assert workspace.daemon.status("2.x").state == "live"


@pytest.mark.expects_log("token", "unauthenticated", "not connected", "Unauthenticated")
@pytest.mark.parametrize("profile", ["1.x", "2.x"])
def test_what_is_written_while_the_token_is_dead_leaves_with_a_new_one(profile: str, tmp_path: Path) -> None:
    with mounted(tmp_path, profile, write_back_delay=0.2) as workspaces:
        workspace = workspaces[profile]
        assert (workspace.mount / "readme.txt").read_text() == "hello"
        workspace.server.call("expire", workspace.user.token.encode())
        (workspace.mount / "late.txt").write_text("kept")
        workspace.daemon.wait_for_state(profile, "unauthenticated")
        assert (workspace.mount / "late.txt").read_text() == "kept"

        workspace.token.write_text(json.loads(workspace.server.call("token", user=workspace.user.name)))

        eventually(lambda: "late.txt" in workspace.user.listdir(""), 60, "the file arrives")
        workspace.sync()
        assert workspace.user.read("late.txt") == b"kept"
