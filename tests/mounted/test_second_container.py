"""What one container wrote another one finds: names, bytes, modes, times, symlinks, attributes.

The second daemon has a home of its own, with nothing in it: all it knows is what the server tells.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.conftest import webdav_mount
from tests.mounted.harness import Daemon, daemon_over
from tests.mounted.posix.twins import shape
from tests.servers import ApacheServer, FakeNextcloud, ServerProcess

LONG_AGO = 1_234_567_890_000_000_000


def grow(place: Path) -> None:
    """A tree with one of each thing that could get lost on the way."""
    for name in ("plain", "name with ä and 文", "percent%20", "UPPER", "upper", "e\u0301", "\u00e9"):
        (place / name).write_bytes(os.fsencode(name) * 100)
    (place / "empty").touch()
    (place / "large").write_bytes(bytes(range(256)) * 8000)
    (place / "a" / "b" / "c").mkdir(parents=True)
    (place / "a" / "b" / "c" / "deep").write_text("deep")
    (place / "empty directory").mkdir()
    for name, mode in {"plain": 0o640, "empty": 0o444, "large": 0o600, "UPPER": 0o755}.items():
        (place / name).chmod(mode)
    (place / "a" / "b").chmod(0o750)
    (place / "script").write_text("#!/bin/sh\necho run\n")
    (place / "script").chmod(0o755)
    for number, name in enumerate(("plain", "empty", "large", "a/b/c/deep")):
        os.utime(place / name, ns=(LONG_AGO, LONG_AGO + number * 10**9))
    (place / "link").symlink_to("a/b/c/deep")
    (place / "a" / "up").symlink_to("../plain")
    (place / "dangling").symlink_to("/nowhere/at all")
    os.setxattr(place / "plain", "user.colour", b"blue \xff")
    os.setxattr(place / "a", "user.on a directory", b"1")
    os.link(place / "plain", place / "second name")


def link_later(place: Path) -> None:
    """Further names of files, across directories too."""
    os.link(place / "script", place / "a" / "run it")
    os.link(place / "plain", place / "third name")


def change_later(place: Path) -> None:
    """What is done to a file with several names when all of them have been sent is to be told of each name."""
    (place / "a" / "run it").chmod(0o700)
    os.setxattr(place / "third name", "user.later", b"of all names")
    os.utime(place / "second name", ns=(LONG_AGO, LONG_AGO + 7 * 10**9))
    (place / "plain").unlink()


@pytest.fixture(scope="module", params=[ApacheServer, FakeNextcloud])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    base = tmp_path_factory.mktemp("two-containers")
    with request.param(base / "root", base / "work") as server:
        yield server


@pytest.fixture(scope="module")
def original(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tree on the local disk; and the first container has written its own, and is gone."""
    local = tmp_path_factory.mktemp("original")
    grow(local)
    link_later(local)
    change_later(local)
    with daemon_over({"cloud": webdav_mount(server)}) as daemon:
        grow(daemon.path("cloud"))
        link_later(daemon.path("cloud"))
        daemon.sync()
        change_later(daemon.path("cloud"))
        daemon.sync()
    return local


@pytest.fixture(scope="module")
def second(server: ServerProcess, original: Path) -> Iterator[Daemon]:
    with daemon_over({"cloud": webdav_mount(server)}) as daemon:
        yield daemon


def walk(place: Path) -> list[Path]:
    return sorted(path.relative_to(place) for path in place.rglob("*"))


def test_every_name_and_kind_comes_back(second: Daemon, original: Path) -> None:
    found = second.path("cloud")

    assert walk(found) == walk(original)
    for path in walk(original):
        assert (found / path).is_symlink() == (original / path).is_symlink(), path
        assert (found / path).is_dir() == (original / path).is_dir(), path


def test_every_byte_comes_back(second: Daemon, original: Path) -> None:
    for path in walk(original):
        if (original / path).is_file() and not (original / path).is_symlink():
            assert (second.path("cloud") / path).read_bytes() == (original / path).read_bytes(), path


def test_modes_come_back(second: Daemon, original: Path) -> None:
    def modes(place: Path) -> dict[str, object]:
        # Link counts are kept within one container: on the server every name is a file of its own.
        return {str(path): shape(place / path)[0] for path in walk(original)}

    assert modes(second.path("cloud")) == modes(original)
    assert os.access(second.path("cloud") / "script", os.X_OK)


def test_mtimes_come_back_to_the_second(second: Daemon, original: Path) -> None:
    def set_times(place: Path) -> dict[str, int]:
        names = ("second name", "third name", "empty", "large", "a/b/c/deep")
        return {name: int((place / name).stat().st_mtime) for name in names}

    assert set_times(second.path("cloud")) == set_times(original)


def test_symlinks_come_back(second: Daemon, original: Path) -> None:
    for name in ("link", "a/up", "dangling"):
        assert os.readlink(second.path("cloud") / name) == os.readlink(original / name)
    assert (second.path("cloud") / "link").read_text() == "deep"


def test_extended_attributes_come_back(second: Daemon, original: Path) -> None:
    def attributes(place: Path) -> dict[str, dict[str, bytes]]:
        names = ("a", "second name", "third name")
        return {name: {key: os.getxattr(place / name, key) for key in os.listxattr(place / name)} for name in names}

    assert attributes(second.path("cloud")) == attributes(original)


def test_nothing_is_sent_because_it_was_looked_at(second: Daemon) -> None:
    for path in second.path("cloud").rglob("*"):
        if path.is_file():
            path.read_bytes()

    assert second.status("cloud").unsent_files == 0
