"""Packing, unpacking and copying: zip, tar, 7z, rsync, cp. They set modes and times, and look at them again."""

from __future__ import annotations

import os
import random
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.mounted import modes
from tests.mounted.conftest import Rig
from tests.mounted.posix.twins import tree
from tests.mounted.programs.conftest import Run, needed, sized


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A local tree with modes, times in nanoseconds, symlinks, empty and sparse files, and odd names."""
    root = tmp_path / "source"
    generator = random.Random(4)
    for number in range(sized(60, 2000)):
        directory = root / f"d{number % 7}" / f"e{number % 3}"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"file {number} ä"
        path.write_bytes(generator.randbytes(generator.choice((0, 1, 1000, 70_000))))
        path.chmod(generator.choice((0o644, 0o600, 0o755, 0o444)))
        os.utime(path, ns=(10**18 + number, 1_400_000_000_123_456_789 + number * 10**9))
    (root / "link to a file").symlink_to("d0/e0/file 0 ä")
    (root / "link to a directory").symlink_to("d1")
    (root / "dangling").symlink_to("nowhere/at all")
    with (root / "sparse").open("wb") as file:
        file.truncate(3_000_000)
    (root / "empty directory").mkdir(mode=0o700)
    for directory in (root / "d0", root / "empty directory"):
        os.utime(directory, ns=(10**18, 1_300_000_000 * 10**9))
    if modes.MODE == "drop":  # what the mount's user has packed; what others own is a test of its own
        give(root, *modes.OWNER)
    return root


def give(root: Path, uid: int, gid: int) -> None:
    for path in (root, *root.rglob("*")):
        os.chown(path, uid, gid, follow_symlinks=False)


def times(directory: Path) -> dict[str, int]:
    """Of files, in whole seconds, which every archive keeps."""
    return {
        str(path.relative_to(directory)): int(path.stat().st_mtime)
        for path in directory.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def test_an_unpacked_tar_is_the_same_tree(folder: Rig, source: Path, run: Run) -> None:
    run("tar", "-czf", "archive.tar.gz", "-C", source, ".")
    (folder.mount / "unpacked").mkdir()

    run("tar", "-xpzf", "archive.tar.gz", "-C", "unpacked")

    assert run("diff", "-r", "--no-dereference", source, "unpacked") == ""
    assert tree(folder.mount / "unpacked") == tree(source)
    assert times(folder.mount / "unpacked") == times(source)
    assert int((folder.mount / "unpacked" / "empty directory").stat().st_mtime) == 1_300_000_000
    assert run("tar", "-dzf", "archive.tar.gz", "-C", "unpacked") == ""


def test_python_packs_and_unpacks_tar(folder: Rig, source: Path) -> None:
    with tarfile.open(folder.mount / "archive.tar.xz", "w:xz") as archive:
        archive.add(source, "tree")
    with tarfile.open(folder.mount / "archive.tar.xz") as archive:
        archive.extractall(folder.mount, filter="tar")

    assert tree(folder.mount / "tree").keys() == tree(source).keys()
    assert times(folder.mount / "tree") == times(source)


def test_rsync_finds_nothing_to_do_the_second_time(folder: Rig, source: Path, run: Run) -> None:
    rsync = needed("rsync")
    first = run(rsync, "-a", "--itemize-changes", f"{source}/", "copy/")
    folder.daemon.sync(folder.mount)
    folder.daemon.refresh(folder.mount)

    second = run(rsync, "-a", "--itemize-changes", f"{source}/", "copy/")
    back = run(rsync, "-a", "--checksum", "--itemize-changes", "copy/", f"{source}/")

    assert first.count("\n") > 60
    assert second == ""
    assert back == ""
    assert tree(folder.mount / "copy") == tree(source)


def test_rsync_sends_into_a_file_in_place_and_deletes(folder: Rig, source: Path, run: Run) -> None:
    rsync = needed("rsync")
    run(rsync, "-a", f"{source}/", "copy/")
    victim = source / "d2" / "e2" / "file 2 ä"
    victim.chmod(0o644)
    victim.write_bytes(os.urandom(50_000))
    (source / "dangling").unlink()

    run(rsync, "-a", "--inplace", "--no-whole-file", "--delete", f"{source}/", "copy/")

    assert tree(folder.mount / "copy") == tree(source)


def test_cp_keeps_all_and_moves_over(folder: Rig, source: Path, run: Run) -> None:
    run("cp", "-a", source, "copy")
    run("cp", "-a", "copy", "second")
    run("mv", "second", "moved")
    run("cp", "-u", "-r", "copy/.", "moved/")

    assert tree(folder.mount / "moved") == tree(source)
    assert times(folder.mount / "moved") == times(source)


@pytest.mark.skipif(modes.MODE != "drop", reason="root on a mount of another user")
def test_what_others_own_is_copied_to_a_users_mount_without_its_owner(folder: Rig, source: Path, run: Run) -> None:
    """Who insists on the owner gets the bytes, and is told."""
    give(source, 0, 0)
    run("tar", "-cf", "archive.tar", "-C", source, ".")
    for name in ("tar", "told"):
        (folder.mount / name).mkdir()

    run("tar", "--no-same-owner", "-xpf", "archive.tar", "-C", "tar")
    run("cp", "-r", "--preserve=mode,timestamps", source, "cp")
    run(needed("rsync"), "-a", "--no-owner", "--no-group", f"{source}/", "rsync/")
    unpack = ["tar", "-xpf", "archive.tar", "-C", "told"]
    told = subprocess.run(unpack, cwd=folder.mount, capture_output=True, text=True, check=False)

    for name in ("tar", "cp", "rsync"):
        assert tree(folder.mount / name) == tree(source), name
        assert times(folder.mount / name) == times(source), name
    assert told.returncode != 0
    assert "Operation not permitted" in told.stderr
    assert run("diff", "-r", "--no-dereference", source, "told") == ""


def test_a_zip_is_appended_to_and_tested(folder: Rig, run: Run) -> None:
    path = folder.mount / "results.zip"
    for number in range(20):
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"result-{number}.txt", f"{number}\n" * 1000)

    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == 20
        archive.extractall(folder.mount / "out")
    assert (folder.mount / "out" / "result-7.txt").read_text() == "7\n" * 1000
    assert "No errors detected" in run(needed("unzip"), "-t", "results.zip")


def test_unzip_keeps_times_and_modes(folder: Rig, source: Path, run: Run) -> None:
    unzip = needed("unzip")
    with zipfile.ZipFile(folder.mount / "tree.zip", "w") as archive:
        for path in sorted(source.rglob("*")):
            if path.is_file() and not path.is_symlink():
                archive.write(path, path.relative_to(source))

    run(unzip, "-q", "tree.zip", "-d", "out", TZ="UTC")

    script = next(path for path in source.rglob("file*") if path.stat().st_mode & 0o111)
    found = folder.mount / "out" / script.relative_to(source)
    assert found.stat().st_mode == script.stat().st_mode
    assert found.read_bytes() == script.read_bytes()


def test_7z_packs_and_tests(folder: Rig, source: Path, run: Run) -> None:
    program = needed("7z")

    run(program, "a", "-bd", "-mx1", "tree.7z", f"{source}/d0", f"{source}/d1")
    run(program, "t", "-bd", "tree.7z")
    run(program, "x", "-bd", "-oout", "tree.7z")

    assert run("diff", "-r", f"{source}/d1", "out/d1") == ""
