"""Places: where the daemon keeps things, and that nobody else gets at them."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbmountd import places
from nbmountd.errors import StateError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_state_and_cache_follow_the_base_directories(tmp_path: Path) -> None:
    plain = {"HOME": str(tmp_path), "XDG_STATE_HOME": "", "XDG_CACHE_HOME": "relative/is/ignored"}
    set_by_user = {"HOME": str(tmp_path), "XDG_STATE_HOME": "/s", "XDG_CACHE_HOME": "/c"}

    assert places.default_state_directory(plain) == tmp_path / ".local/state/nbmountd"
    assert places.default_cache_directory(plain) == tmp_path / ".cache/nbmountd"
    assert places.default_state_directory(set_by_user) == Path("/s/nbmountd")
    assert places.default_cache_directory(set_by_user) == Path("/c/nbmountd")


def test_directories_are_made_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        places.private_directory(tmp_path / "a" / "b")
    finally:
        os.umask(old)

    assert mode(tmp_path / "a") == mode(tmp_path / "a" / "b") == 0o700
    places.private_directory(tmp_path / "a" / "b")


def test_each_mount_has_a_directory_of_its_own_that_is_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "b2drop").mkdir()
    (tmp_path / "b2drop").chmod(0o755)

    path = places.mount_directory(tmp_path, "b2drop")

    assert path == tmp_path / "b2drop"
    assert mode(path) == 0o700


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden"])
def test_a_mount_name_cannot_leave_its_base(tmp_path: Path, name: str) -> None:
    with pytest.raises(StateError):
        places.mount_directory(tmp_path, name)


def test_a_symlink_in_the_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")

    for name in ("link", "dangling"):
        with pytest.raises(StateError, match="symlink"):
            places.private_directory(tmp_path / name)
    with pytest.raises(StateError, match="symlink"):
        places.mount_directory(tmp_path, "link")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("bits", [0o777, 0o1777, 0o770])
def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path, bits: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(bits)

    with pytest.raises(StateError, match="others can write"):
        places.private_directory(shared)
    assert mode(shared) == bits


def test_a_file_in_the_way_and_a_relative_path_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("relative")):
        with pytest.raises(StateError):
            places.private_directory(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make directories of other users")
def test_a_directory_of_another_user_is_refused_unless_it_is_made_for_that_user(tmp_path: Path) -> None:
    path = places.private_directory(tmp_path / "made" / "for-1234", owner=(1234, 1234))

    assert (path.stat().st_uid, path.parent.stat().st_uid) == (1234, 1234)
    places.private_directory(path, owner=(1234, 1234))
    with pytest.raises(StateError, match="belongs to user 1234"):
        places.private_directory(path)


def test_a_locked_directory_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    order = []

    def hold(number: int) -> None:
        with places.locked_directory(tmp_path / "held"):
            order.append(("in", number))
            order.append(("out", number))

    threads = [threading.Thread(target=hold, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(order) == 10
    assert all(order[at][1] == order[at + 1][1] for at in range(0, 10, 2))


# --- the control socket ------------------------------------------------------------------------------------------------


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory in which a test may bind sockets by their plain paths (107 bytes at most)."""
    with tempfile.TemporaryDirectory(prefix="nbm-") as directory:
        yield Path(directory)


def test_the_runtime_directory_of_the_user_comes_first(short: Path) -> None:
    (short / "rt").mkdir(mode=0o700)
    environ = {"HOME": str(short), "XDG_RUNTIME_DIR": str(short / "rt")}

    path = places.control_socket(environ, run=short / "run")

    assert path == short / "rt" / "nbmountd" / "control.sock"
    assert mode(path.parent) == 0o700


def test_without_it_the_socket_is_below_run_by_user(short: Path) -> None:
    (short / "run").mkdir()

    path = places.control_socket({"HOME": str(short)}, run=short / "run")

    assert path == short / "run" / "nbmountd" / str(os.geteuid()) / "control.sock"


def test_when_run_cannot_be_used_the_state_directory_takes_the_socket(short: Path) -> None:
    (short / "run").write_text("in the way")
    environ = {"HOME": str(short), "XDG_STATE_HOME": str(short / "s"), "XDG_RUNTIME_DIR": str(short / "run" / "x")}

    path = places.control_socket(environ, run=short / "run")

    assert path == short / "s" / "nbmountd" / "run" / "control.sock"


def test_a_client_with_other_variables_finds_the_daemon(short: Path) -> None:
    (short / "run").mkdir()
    environ = {"HOME": str(short), "XDG_STATE_HOME": str(short / "s")}
    expected = short / "run" / "nbmountd" / str(os.geteuid()) / "control.sock"
    assert places.find_control_socket(environ, run=short / "run") == expected

    with socket.socket(socket.AF_UNIX) as listener:
        path = short / "run" / "user" / str(os.geteuid()) / "nbmountd" / "control.sock"
        path.parent.mkdir(parents=True)
        listener.bind(str(path))
        assert places.find_control_socket(environ, run=short / "run") == path

    with socket.socket(socket.AF_UNIX) as listener:
        path = short / "s" / "nbmountd" / "run" / "control.sock"
        path.parent.mkdir(parents=True)
        listener.bind(str(path))
        assert places.find_control_socket(environ, run=short / "run") == path
