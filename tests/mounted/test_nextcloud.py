"""Programs on a mount of a server that behaves as a Nextcloud does."""

from __future__ import annotations

import errno
import http.client
import os
import re
import shutil
import stat
import subprocess
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted import modes
from tests.mounted.conftest import Rig
from tests.mounted.harness import daemon_over, program
from tests.mounted.kernel import eventually, listed, same_tree
from tests.servers import FakeNextcloud

MTIME = 1_500_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeNextcloud]:
    base = tmp_path_factory.mktemp("nextcloud")
    server = FakeNextcloud(base / "root", base / "work")
    with server:
        yield server


def mount_keys(server: FakeNextcloud) -> dict[str, object]:
    return {"backend": "nextcloud", "url": server.origin, "user": server.user, "password": server.password}


@pytest.fixture(scope="module")
def rig(server: FakeNextcloud) -> Iterator[Rig]:
    with daemon_over({"cloud": {**mount_keys(server), "freshness": 2.0}}) as daemon:
        yield Rig(daemon, "cloud", daemon.path("cloud"), server.root)


@pytest.fixture
def folder(rig: Rig, server: FakeNextcloud, request: pytest.FixtureRequest) -> Rig:
    server.hook()
    (rig.mount / request.node.originalname).mkdir(exist_ok=True)
    return rig.below(request.node.originalname)


def assert_safe_and_equal(rig: Rig) -> None:
    rig.daemon.sync(rig.mount)
    assert same_tree(rig.mount, rig.root) == []
    assert (rig.status.unsent_files, rig.status.parked, rig.status.conflicts) == (0, 0, 0)


def test_files_are_made_overwritten_renamed_and_removed(folder: Rig, server: FakeNextcloud) -> None:
    (folder.mount / "a").write_text("one")
    (folder.mount / "b").write_text("other")
    (folder.mount / "d").mkdir()
    assert_safe_and_equal(folder)
    first = (folder.root / "a").stat().st_ino
    server.clear_requests()
    (folder.mount / "a").write_text("two, longer")
    with (folder.mount / "a").open("a") as file:
        file.write(" and more")
    assert_safe_and_equal(folder)
    (folder.mount / "b").replace(folder.mount / "d" / "moved")
    assert_safe_and_equal(folder)
    (folder.mount / "d" / "moved").unlink()
    (folder.mount / "d").rmdir()
    assert_safe_and_equal(folder)

    assert (folder.root / "a").read_text() == "two, longer and more"
    assert (folder.root / "a").stat().st_ino == first  # the file id, to which versions and shares belong
    assert listed(folder.root) == ["a"]
    assert not [line for line in server.every_request() if re.match(r"PUT \S*/files/", line)]


def test_saving_by_a_temporary_file_keeps_the_id_of_the_target(folder: Rig) -> None:
    (folder.mount / "report.csv").write_bytes(b"old")
    folder.daemon.sync(folder.mount)
    first = (folder.root / "report.csv").stat().st_ino

    (folder.mount / "report.csv.tmp").write_bytes(b"new\n" * 50)
    (folder.mount / "report.csv.tmp").replace(folder.mount / "report.csv")

    assert_safe_and_equal(folder)
    assert (folder.root / "report.csv").stat().st_ino == first


def test_a_time_that_a_program_set_is_seen_in_another_container(folder: Rig, server: FakeNextcloud) -> None:
    (folder.mount / "dated").write_text("1")
    os.utime(folder.mount / "dated", (MTIME, MTIME))
    (folder.mount / "dated later").write_text("1")
    folder.daemon.sync(folder.mount)
    os.utime(folder.mount / "dated later", (MTIME, MTIME))
    folder.daemon.sync(folder.mount)

    with daemon_over({"cloud": mount_keys(server)}) as second:
        there = second.path("cloud") / folder.mount.name
        times = [(there / name).stat().st_mtime for name in ("dated", "dated later")]
        content = (there / "dated later").read_text()

    assert times == [MTIME, MTIME]
    assert content == "1"
    assert (folder.mount / "dated").stat().st_mtime == MTIME
    assert_safe_and_equal(folder)


def test_what_is_in_a_directory_keeps_modes_and_links_when_it_moves_here_or_elsewhere(
    folder: Rig, server: FakeNextcloud
) -> None:
    """The server forgets them: when we move it they are stored again; who moved it elsewhere leaves us what we knew."""

    def say(place: Path) -> list[object]:
        deep = place / "deep"
        xattrs = {name: os.getxattr(deep / "run.sh", name) for name in os.listxattr(deep / "run.sh")}
        return [
            stat.S_IMODE((deep / "run.sh").stat().st_mode), stat.S_IMODE(deep.stat().st_mode), xattrs,
            str((deep / "link").readlink()), stat.S_IMODE((place / "plain").stat().st_mode),
        ]  # fmt: skip

    (folder.mount / "d" / "deep").mkdir(parents=True)
    (folder.mount / "d" / "plain").write_text("1")
    (folder.mount / "d" / "deep" / "run.sh").write_text("#!/bin/sh")
    (folder.mount / "d" / "deep" / "run.sh").chmod(0o750)
    (folder.mount / "d" / "deep" / "link").symlink_to("run.sh")
    os.setxattr(folder.mount / "d" / "deep" / "run.sh", "user.colour", b"blue")
    (folder.mount / "d" / "deep").chmod(0o710)
    expected = say(folder.mount / "d")
    folder.daemon.sync(folder.mount)
    with daemon_over({"cloud": mount_keys(server)}) as fresh:  # which has not looked into it when it moves it
        there = fresh.path("cloud") / folder.mount.name
        (there / "d").rename(there / "e")
        fresh.sync()
        assert say(there / "e") == expected
        folder.daemon.refresh(folder.mount)
        here = say(folder.mount / "e")
    with daemon_over({"cloud": mount_keys(server)}) as fresh:
        again = say(fresh.path("cloud") / folder.mount.name / "e")

    assert (here, again) == (expected, expected)

    def move_by_others(source: str, target: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        login = b64encode(f"{server.user}:{server.password}".encode()).decode()
        below = f"{server.prefix}{folder.mount.name}/"
        headers = {"Authorization": f"Basic {login}", "Destination": f"{server.origin}{below}{target}"}
        connection.request("MOVE", below + source, headers=headers)
        assert connection.getresponse().status == 201
        connection.close()

    move_by_others("e", "f")
    folder.daemon.refresh(folder.mount)
    folder.daemon.refresh(folder.mount / "f" / "deep")

    assert say(folder.mount / "f") == expected
    folder.daemon.sync(folder.mount)
    assert (folder.status.parked, folder.status.conflicts) == (0, 0)


@pytest.mark.parametrize("name", ["x" * 251, "\u00e4" * 125 + "y", "x" * 245 + "\\", "e\u0301" * 60], ids=len)
@pytest.mark.parametrize("call", ["create", "mkdir", "symlink", "rename", "link"])
def test_a_name_that_would_be_too_long_on_the_server_is_refused_when_it_is_made(folder: Rig, call: str, name: str) -> None:
    """More than 250 bytes as it is written there: backslashes and separate accents take more than one."""
    file = folder.mount / "file"
    file.touch()
    with pytest.raises(OSError) as refused:
        match call:
            case "create":
                (folder.mount / name).touch()
            case "mkdir":
                (folder.mount / name).mkdir()
            case "symlink":
                (folder.mount / name).symlink_to("file")
            case "rename":
                file.rename(folder.mount / name)
            case "link":
                (folder.mount / name).hardlink_to(file)

    assert refused.value.errno == errno.ENAMETOOLONG
    assert os.listdir(folder.mount) == ["file"]


def test_names_that_just_fit_or_are_forbidden_there_arrive_and_come_back(folder: Rig, server: FakeNextcloud) -> None:
    names = {"x" * 250, "\u00e4" * 125, "x" * 244 + "\\", "not \udcff text", ".htaccess", "a.part", "b\nc", "e\u0301"}
    for name in names:
        (folder.mount / name).mkdir()
        (folder.mount / name / name).write_text("1")
    folder.daemon.sync(folder.mount)

    with daemon_over({"cloud": mount_keys(server)}) as second:
        there = second.path("cloud") / folder.mount.name
        assert set(os.listdir(there)) == names
        assert {(there / name / name).read_text() for name in names} == {"1"}
    shutil.rmtree(folder.mount)
    folder.daemon.sync()
    assert not folder.root.exists()
    assert (folder.status.parked, folder.status.conflicts) == (0, 0)


@pytest.mark.expects_log("degraded")
def test_a_time_whose_answer_was_lost_is_ours_all_the_same(folder: Rig, server: FakeNextcloud) -> None:
    """The ETag changes with the time. That is no change by others, also if the file is written to before this is known."""
    for name, later in (("kept", ""), ("written", " and more")):
        file = folder.mount / name
        file.write_text("1")
        folder.daemon.sync(folder.mount)
        number = file.stat().st_ino
        server.hook(lose={"PROPPATCH": 1})
        server.clear_requests()

        os.utime(file, ns=(MTIME * 10**9 + 123_456_789,) * 2)
        eventually(lambda: any(line.startswith("PROPPATCH") for line in server.every_request()), 30, "the answer is lost")
        with file.open("a") as appending:
            appending.write(later)
        folder.daemon.sync(folder.mount)
        folder.daemon.refresh(folder.mount)

        assert file.stat().st_ino == number
        assert file.read_text() == "1" + later
        if not later:
            assert file.stat().st_mtime_ns == MTIME * 10**9 + 123_456_789
    assert_safe_and_equal(folder)


def test_content_of_one_size_and_second_written_twice_arrives(folder: Rig) -> None:
    file = folder.mount / "table"
    for content in (b"aaaa", b"bbbb", b"cccc"):
        file.write_bytes(content)
        os.utime(file, (MTIME, MTIME))
        folder.daemon.sync(folder.mount)
        assert (folder.root / "table").read_bytes() == content

    assert file.stat().st_mtime == MTIME
    assert file.read_bytes() == b"cccc"


@pytest.mark.expects_log("degraded")
def test_a_lost_answer_makes_no_conflict_and_sends_nothing_twice(folder: Rig, server: FakeNextcloud) -> None:
    (folder.mount / "file").write_text("old")
    folder.daemon.sync(folder.mount)
    server.hook(lose={"MOVE": 1, "PUT": 0})
    server.clear_requests()

    (folder.mount / "file").write_text("new and longer")
    assert_safe_and_equal(folder)

    assert (folder.root / "file").read_text() == "new and longer"
    assert len([line for line in server.every_request() if line.startswith("MOVE")]) == 1


def test_a_tree_copied_in_and_changed_is_the_same_on_the_server(folder: Rig) -> None:
    for number in range(60):
        directory = folder.mount / f"d{number % 6}" / f"e{number % 4}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"f{number}").write_bytes(bytes([number]) * number * 100)
    (folder.mount / "d0").rename(folder.mount / "d5" / "moved")
    (folder.mount / "d1" / "e1").rename(folder.mount / "d0")
    for number in range(2, 60, 7):
        (folder.mount / f"d{number % 6}" / f"e{number % 4}" / f"f{number}").unlink(missing_ok=True)

    assert_safe_and_equal(folder)


def test_a_change_by_others_is_seen(folder: Rig) -> None:
    (folder.mount / "file").write_text("ours")
    folder.daemon.sync(folder.mount)
    (folder.root / "file").write_text("theirs, longer")

    eventually(lambda: (folder.mount / "file").read_text() == "theirs, longer", 5, "the change is seen")


def test_a_quiet_tree_is_asked_about_once_however_large(folder: Rig, server: FakeNextcloud) -> None:
    folder.daemon.sync(folder.mount)
    for left in range(10):
        for right in range(10):
            (folder.root / str(left) / str(right)).mkdir(parents=True)
    folder.daemon.refresh(folder.mount)
    counts = []
    for _ in range(4):  # in the first rounds directories are listed, and their versions get known
        server.clear_requests()
        assert sum(len(names) for _, names, _ in os.walk(folder.mount)) == 110
        counts.append(len([line for line in server.every_request() if line.startswith("PROPFIND")]))
        time.sleep(2.1)  # past the freshness time

    assert counts[0] > 100
    assert counts[-1] <= 4


@pytest.mark.expects_log("credential|401|unauthenticated|not connected|password")
def test_a_wrong_password_is_sent_once_and_status_says_what_to_do(server: FakeNextcloud, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("wrong")
    keys = {**mount_keys(server), "password_file": str(password)}
    del keys["password"]
    server.clear_requests()
    with daemon_over({"cloud": keys}) as daemon:
        status = daemon.wait_for_state("cloud", "unauthenticated")
        for _ in range(5):
            with pytest.raises(OSError):
                os.listdir(daemon.path("cloud"))
        refused = [line for line in server.every_request() if line.endswith(" 401")]
        password.write_text(server.password)
        daemon.wait_for_state("cloud", "live")
        os.listdir(daemon.path("cloud"))

    assert str(password) in str(status)
    assert len(refused) == 1


@pytest.mark.expects_log("credential|401|unauthenticated|password")
def test_after_a_revoked_password_exactly_one_request_fails_and_nothing_is_lost(
    server: FakeNextcloud, tmp_path: Path
) -> None:
    """Eleven refused log-ins, and the site is closed to everybody behind our address. What was under way when the password was
    revoked is refused as well, at most 8 requests; here there is nothing."""
    password = tmp_path / "password"
    password.write_text(server.password)
    keys = {**mount_keys(server), "password_file": str(password), "freshness": 60.0, "write_back_delay": 0.1}
    del keys["password"]
    server.hook()
    (server.root / "revoked").mkdir()
    (server.root / "revoked" / "there").write_text("cached")
    with daemon_over({"cloud": keys}) as daemon:
        folder = daemon.path("cloud") / "revoked"
        assert (folder / "there").read_text() == "cached"
        server.clear_requests()
        time.sleep(0.6)  # a mount that is in use, with nothing on its way (http.IDLE_PROOF_LASTS)
        server.hook(passwords=["new"])
        for number in range(13):  # each of them wants to be sent, by several workers
            (folder / f"unsent {number}").write_text("kept")
        status = daemon.wait_for_state("cloud", "unauthenticated")
        for number in range(13):
            assert (folder / "there").read_text() == "cached"
            (folder / f"more {number}").write_text("kept")
            daemon.ctl("refresh", str(folder))
        said = daemon.ctl("status").stdout
        refused = [line for line in server.every_request() if line.endswith((" 401", " 429"))]
        password.write_text("new")
        daemon.wait_for_state("cloud", "live")
        daemon.sync(folder)
        server.hook()

    assert len(refused) == 1, refused
    assert str(password) in str(status)
    assert "write a valid one to" in " ".join(said.split()), said
    assert len(os.listdir(server.root / "revoked")) == 27


@pytest.mark.expects_log("credential|401|unauthenticated|not connected|password")
def test_logging_in_gives_a_running_mount_its_password(server: FakeNextcloud, tmp_path: Path) -> None:
    password = tmp_path / "new" / "app-password"
    keys = {**mount_keys(server), "password_file": str(password)}
    del keys["password"]
    server.hook()
    with daemon_over({"cloud": keys}) as daemon:
        daemon.wait_for_state("cloud", "unauthenticated")
        command = [*program("nbmountctl"), "login", "cloud", "--config", str(daemon.config)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=daemon.environment) as child:
            assert child.stdout is not None
            page = next(line.strip() for line in child.stdout if "http" in line)
            assert server.grant(page) == 200
            said = child.stdout.read()
        assert child.returncode == 0
        modes.hand_over(password.parent)
        daemon.wait_for_state("cloud", "live")
        os.listdir(daemon.path("cloud"))
    secret = password.read_text().strip()

    assert stat.S_IMODE(password.stat().st_mode) == 0o600
    assert secret and secret not in page + said


@pytest.mark.expects_log("maintenance|degraded|offline")
def test_maintenance_is_shown_in_status(server: FakeNextcloud) -> None:
    server.hook()
    with daemon_over({"cloud": mount_keys(server)}) as daemon:
        os.listdir(daemon.path("cloud"))
        server.hook(maintenance=True)
        daemon.ctl("refresh", str(daemon.path("cloud")))
        daemon.wait_for_state("cloud", "degraded", "offline")
        said = daemon.ctl("status").stdout
    server.hook()

    assert "maintenance mode" in " ".join(said.split())


def test_a_share_that_may_not_be_changed_is_read_only(folder: Rig, server: FakeNextcloud) -> None:
    """What oc:permissions says is what the modes say, and it is refused at once, not when it is to be sent."""
    server.hook(permissions={"shared": "RG", "read.txt": "RG"})
    folder.daemon.sync(folder.mount)
    (folder.root / "shared").mkdir()
    (folder.root / "read.txt").write_text("r")
    folder.daemon.refresh(folder.mount)

    modes = [stat.S_IMODE((folder.mount / name).stat().st_mode) for name in ("shared", "read.txt")]

    assert modes == [0o555, 0o444]
    with pytest.raises(PermissionError):
        (folder.mount / "shared" / "new").write_text("x")
    with pytest.raises(PermissionError):
        (folder.mount / "read.txt").write_text("x")


def test_a_file_renamed_elsewhere_is_the_same_file_here(folder: Rig) -> None:
    (folder.mount / "before").write_bytes(b"x" * 1000)
    folder.daemon.sync(folder.mount)
    number = (folder.mount / "before").stat().st_ino
    with (folder.mount / "before").open("rb") as still_open:
        received = folder.status.bytes_received

        (folder.root / "before").rename(folder.root / "after")
        folder.daemon.refresh(folder.mount)

        assert os.listdir(folder.mount) == ["after"]
        assert (folder.mount / "after").stat().st_ino == number
        assert (folder.mount / "after").read_bytes() == still_open.read() == b"x" * 1000
    assert folder.status.bytes_received - received < 100_000


@pytest.mark.parametrize("first", ["new place", "old place"])
def test_a_file_moved_to_another_directory_elsewhere_is_the_same_file_here(folder: Rig, first: str) -> None:
    """Whichever of the two directories is looked at first; if that is the old one, as long as the file is open."""
    folder = folder.below(first)
    for name in ("", "a", "b"):
        (folder.mount / name).mkdir()
    (folder.mount / "a" / "before").write_bytes(b"x" * 100_000)
    folder.daemon.sync(folder.mount)
    number = (folder.mount / "a" / "before").stat().st_ino
    with (folder.mount / "a" / "before").open("r+b", buffering=0) as still_open:
        received = folder.status.bytes_received
        (folder.root / "a" / "before").rename(folder.root / "b" / "after")
        for name in ("b", "a") if first == "new place" else ("a", "b"):
            folder.daemon.refresh(folder.mount / name)

        assert (os.listdir(folder.mount / "a"), os.listdir(folder.mount / "b")) == ([], ["after"])
        assert (folder.mount / "b" / "after").stat().st_ino == number
        assert (folder.mount / "b" / "after").read_bytes() == still_open.read() == b"x" * 100_000
        assert folder.status.bytes_received - received < 50_000
        still_open.write(b" and more")
    assert_safe_and_equal(folder)
    assert (folder.root / "b" / "after").read_bytes() == b"x" * 100_000 + b" and more"


def test_a_directory_moved_into_another_elsewhere_is_the_same_directory_here(folder: Rig) -> None:
    (folder.mount / "a" / "deep").mkdir(parents=True)
    (folder.mount / "b").mkdir()
    (folder.mount / "a" / "deep" / "file").write_bytes(b"x" * 100_000)
    folder.daemon.sync(folder.mount)
    numbers = [path.stat().st_ino for path in (folder.mount / "a", folder.mount / "a" / "deep" / "file")]
    os.listdir(folder.mount / "b")
    (folder.mount / "a" / "deep" / "unsent").write_text("written before anybody knew")
    received = folder.status.bytes_received

    (folder.root / "a").rename(folder.root / "b" / "c")
    folder.daemon.refresh(folder.mount / "b")

    moved = folder.mount / "b" / "c"
    assert [path.stat().st_ino for path in (moved, moved / "deep" / "file")] == numbers
    assert (moved / "deep" / "file").read_bytes() == b"x" * 100_000
    assert not (folder.mount / "a").exists()
    assert folder.status.bytes_received - received < 50_000
    assert_safe_and_equal(folder)
    assert (folder.root / "b" / "c" / "deep" / "unsent").read_text() == "written before anybody knew"


def test_what_the_administrator_forbids_is_refused_when_it_is_made(server: FakeNextcloud) -> None:
    forbidden = {
        "forbidden_filenames": [".htaccess", "thumbs.db"],
        "forbidden_filename_basenames": ["con", "aux"],
        "forbidden_filename_characters": ["\\", "/", ":", "*"],
        "forbidden_filename_extensions": [".filepart", ".part", ".exe", " "],
    }
    root = server.root / "administered"
    root.mkdir()
    (root / "con.txt").write_text("older than the rule")
    server.hook(forbidden=forbidden)
    keys = {**mount_keys(server), "url": f"{server.origin}{server.prefix}administered"}
    with daemon_over({"cloud": keys}) as daemon:
        mount = daemon.path("cloud")
        assert (mount / "con.txt").read_text() == "older than the rule"
        (mount / "plain").write_text("content")
        for name in ("Thumbs.db", "aux", "CON.tar.gz", "12:30", "setup.EXE", "blank "):
            for make in (Path.mkdir, Path.touch, lambda path: os.rename(mount / "plain", path)):
                with pytest.raises(OSError) as refused:
                    make(mount / name)
                assert refused.value.errno == errno.EINVAL, name
        for name in ("console.txt", "thumbs.db.bak", ".part", "x.part", "exe", ".htaccess", "back\\slash"):
            (mount / name).write_text(name)
        (mount / "con.txt").rename(mount / "icon.txt")
        daemon.sync()
        status = daemon.status("cloud")
        assert (status.unsent_files, status.parked) == (0, 0)
        names = sorted(os.listdir(mount))
    server.hook()

    assert (root / "icon.txt").read_text() == "older than the rule"
    assert len(names) == len(list(root.iterdir())) == 9


@pytest.mark.expects_log("429|degraded|offline|not everything could be sent")
def test_a_server_that_says_too_many_requests_is_left_alone(server: FakeNextcloud) -> None:
    server.hook()

    def at_rest() -> bool:
        before = server.every_request()
        time.sleep(1.0)
        return server.every_request() == before

    with daemon_over({"cloud": {**mount_keys(server), "write_back_delay": 0.1}}, drain_timeout=0.5) as daemon:
        os.listdir(daemon.path("cloud"))
        eventually(at_rest, 30, "directories are listed ahead, and no such request is under way any more")
        server.hook(refuse={"PROPFIND": [429, 1000], "PUT": [429, 1000]})
        server.clear_requests()
        for number in range(5):
            (daemon.path("cloud") / f"throttled {number}").write_text("kept")
            daemon.ctl("refresh", str(daemon.path("cloud")))
        daemon.wait_for_state("cloud", "degraded", "offline")
        refused = server.every_request()
    server.hook()

    assert 1 <= len(refused) <= 8, refused  # what was under way together
    assert [line for line in refused if not line.endswith(" 429")] == []


def test_a_program_that_walks_finds_directories_listed_ahead_of_it(server: FakeNextcloud) -> None:
    server.hook()
    for number in range(40):
        (server.root / "walked" / f"{number:02}" / "below").mkdir(parents=True)

    def listed_there() -> set[str]:
        paths = (line.split()[1] for line in server.every_request() if line.startswith("PROPFIND"))
        return {path.removeprefix(f"{server.prefix}walked/").strip("/") for path in paths}

    with daemon_over({"cloud": mount_keys(server)}) as daemon:
        walked = daemon.path("cloud") / "walked"
        os.listdir(walked)
        server.clear_requests()
        os.listdir(walked / "00")
        first = listed_there()
        for number in range(1, 4):
            os.listdir(walked / f"{number:02}")
        eventually(lambda: {"04", "08", "03/below"} <= listed_there(), 20, "the next ones are listed")

        assert not {"01", "02"} & first  # one directory is no walk
        assert "39" not in listed_there()
