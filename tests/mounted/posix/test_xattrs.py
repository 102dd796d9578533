"""Extended attributes: ours to keep are `user.*`; the rest is refused in words that programs know."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.posix.twins import Twins


def test_user_attributes_are_kept_replaced_and_removed(twins: Twins) -> None:
    def call(place: Path) -> object:
        path = place / "file"
        path.write_bytes(b"x")
        os.setxattr(path, "user.one", b"1")
        os.setxattr(path, "user.two", b"\0\xff binary")
        os.setxattr(path, "user.empty", b"")
        os.setxattr(path, "user.one", b"other", os.XATTR_REPLACE)
        os.removexattr(path, "user.two")
        return {name: os.getxattr(path, name) for name in sorted(os.listxattr(path))}

    twins.same(call)


def test_create_and_replace_look_at_what_is_there(twins: Twins) -> None:
    for place in (twins.local, twins.mounted):
        (place / "file").write_bytes(b"x")
        os.setxattr(place / "file", "user.there", b"1")

    there = twins.same(lambda place: os.setxattr(place / "file", "user.there", b"2", os.XATTR_CREATE))
    missing = twins.same(lambda place: os.setxattr(place / "file", "user.missing", b"2", os.XATTR_REPLACE))

    assert (there.error, missing.error) == ("EEXIST", "ENODATA")
    twins.same(lambda place: {name: os.getxattr(place / "file", name) for name in os.listxattr(place / "file")})


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo"])
def test_what_has_attributes_and_what_has_not(kind: str, twins: Twins) -> None:
    def call(place: Path) -> object:
        path = place / "object"
        match kind:
            case "file":
                path.write_bytes(b"x")
            case "directory":
                path.mkdir()
            case "symlink":
                path.symlink_to("nowhere")
            case "fifo":
                os.mkfifo(path)
        said: list[object] = []
        for use in (
            lambda: os.listxattr(path, follow_symlinks=False),
            lambda: os.getxattr(path, "user.none", follow_symlinks=False),
            lambda: os.removexattr(path, "user.none", follow_symlinks=False),
            lambda: os.setxattr(path, "user.a", b"v", follow_symlinks=False),
            lambda: os.getxattr(path, "user.a", follow_symlinks=False),
        ):
            try:
                said.append(use())
            except OSError as exc:
                said.append(exc.errno)
        return said

    twins.same(call)


OTHERS = ("trusted.a", "security.a", "system.a", "system.posix_acl_access", "nothing.a", "user.", "plain")


@pytest.mark.parametrize("name", OTHERS)
def test_other_namespaces_are_refused_and_nothing_is_kept(folder: Rig, name: str) -> None:
    path = folder.mount / "file"
    path.write_bytes(b"x")

    with pytest.raises(OSError, match=r"not supported|not permitted|Invalid argument"):
        os.setxattr(path, name, b"\2\0\0\0")
    with pytest.raises(OSError, match=r"not supported|not permitted|Invalid argument|No data"):
        os.getxattr(path, name)

    assert os.listxattr(path) == []


def test_a_value_of_the_kernels_largest_size_is_kept(folder: Rig) -> None:
    value = os.urandom(65536)
    (folder.mount / "file").write_bytes(b"x")

    os.setxattr(folder.mount / "file", "user.large", value)

    assert os.getxattr(folder.mount / "file", "user.large") == value
    with pytest.raises(OSError, match=r"too long|too large"):
        os.setxattr(folder.mount / "file", "user.larger", value + b"x")


def test_a_name_of_255_bytes_is_kept_and_a_longer_one_refused(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"x")
        os.setxattr(place / "file", "user." + "n" * 250, b"v")
        names = os.listxattr(place / "file")
        with contextlib.suppress(OSError):
            os.setxattr(place / "file", "user." + "n" * 251, b"v")
        return names, os.listxattr(place / "file")

    twins.same(call)


def test_attributes_follow_renames_and_die_with_the_file(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"x")
        os.setxattr(place / "file", "user.colour", b"blue")
        (place / "file").rename(place / "moved")
        before = os.getxattr(place / "moved", "user.colour")
        (place / "moved").unlink()
        (place / "moved").write_bytes(b"y")
        return before, os.listxattr(place / "moved")

    twins.same(call)


def test_attributes_stay_over_uploads_and_listings(folder: Rig) -> None:
    path = folder.mount / "file"
    path.write_bytes(b"x")
    os.setxattr(path, "user.colour", b"blue")
    folder.daemon.sync(folder.mount)

    path.write_bytes(b"other")
    folder.daemon.sync(folder.mount)
    folder.daemon.refresh(folder.mount)

    assert os.getxattr(path, "user.colour") == b"blue"


def test_cp_copies_attributes(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"x")
        os.setxattr(place / "file", "user.colour", b"blue")
        ran = subprocess.run(["cp", "-a", "file", "copy"], cwd=place, capture_output=True, text=True, check=False)
        return ran.returncode, ran.stderr, os.getxattr(place / "copy", "user.colour")

    twins.same(call)


def test_our_own_attribute_is_read_and_not_written(folder: Rig) -> None:
    path = folder.mount / "file"
    path.write_bytes(b"x")

    assert os.getxattr(path, "user.nbmountd.state") in (b"dirty", b"uploading", b"cached", b"safe")
    with pytest.raises(PermissionError):
        os.setxattr(path, "user.nbmountd.state", b"safe")
    assert os.listxattr(path) == []


def test_ls_says_nothing_odd_of_attributes(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"x")
        ran = subprocess.run(["ls", "-lZ", "."], cwd=place, capture_output=True, text=True, check=False)
        return ran.returncode, ran.stderr

    twins.same(call)
