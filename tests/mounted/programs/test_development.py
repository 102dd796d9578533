"""What people do with code: git, make, pip, venv, editors."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.kernel import listed
from tests.mounted.programs.conftest import Run, needed, sized

GIT = {
    "GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.org", "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org", "GIT_CONFIG_NOSYSTEM": "1",
}  # fmt: skip


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A local bare repository with many files in one commit."""
    work = tmp_path / "work"
    for number in range(sized(120, 2000)):
        path = work / f"package{number % 23}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"number = {number}\n" * (number % 40 + 1))
    (work / "run.sh").write_text("#!/bin/sh\n")
    (work / "run.sh").chmod(0o755)
    (work / "link").symlink_to("run.sh")
    env = {**os.environ, **GIT}
    for command in (
        ["git", "init", "-q", "-b", "main", "."], ["git", "add", "."], ["git", "commit", "-qm", "all"],
        ["git", "clone", "-q", "--bare", ".", str(tmp_path / "bare.git")],
    ):  # fmt: skip
        subprocess.run(command, cwd=work, env=env, check=True)
    return tmp_path / "bare.git"


def test_git_clones_commits_packs_and_finds_no_fault(folder: Rig, bare: Path, run: Run) -> None:
    git = needed("git")
    run(git, "clone", "-q", bare, "clone")
    clone = folder.mount / "clone"
    assert run(git, "status", "--porcelain", cwd=clone) == ""
    (clone / "package3" / "module3.py").write_text("changed = True\n")
    (clone / "package4" / "module4.py").unlink()
    (clone / "new.py").write_text("new = True\n")
    changes = run(git, "status", "--porcelain", cwd=clone)
    assert changes.split() == ["M", "package3/module3.py", "D", "package4/module4.py", "??", "new.py"]

    run(git, "add", "-A", cwd=clone, **GIT)
    run(git, "commit", "-qm", "changes", cwd=clone, **GIT)
    run(git, "checkout", "-q", "-b", "other", "HEAD~1", cwd=clone)
    assert (clone / "package4" / "module4.py").exists()
    run(git, "merge", "-q", "main", cwd=clone, **GIT)
    run(git, "gc", "-q", cwd=clone)
    run(git, "push", "-q", "origin", "main", cwd=clone)

    assert run(git, "fsck", "--full", "--strict", cwd=clone) == ""
    assert run(git, "status", "--porcelain", cwd=clone) == ""
    assert (clone / "link").is_symlink()
    assert os.access(clone / "run.sh", os.X_OK)
    assert run(git, "log", "--oneline", cwd=bare).count("\n") == 2


def test_git_finds_nothing_changed_after_everything_was_sent(folder: Rig, bare: Path, run: Run) -> None:
    """git compares times, inode numbers and sizes with its index; an upload must move none of them."""
    git = needed("git")
    run(git, "clone", "-q", bare, "clone")
    folder.daemon.sync(folder.mount)
    folder.daemon.refresh(folder.mount)

    changed = run(git, "diff-files", "--name-only", cwd=folder.mount / "clone")

    assert changed == ""


def test_make_builds_what_is_older_and_nothing_twice(folder: Rig, run: Run) -> None:
    make = needed("make")
    (folder.mount / "Makefile").write_text("out: a b\n\tcat a b > out\na:\n\techo a > a\nb: a\n\tcp a b\n")
    first = run(make)
    second = run(make)
    folder.daemon.sync(folder.mount)
    folder.daemon.refresh(folder.mount)
    third = run(make)
    time.sleep(0.02)
    (folder.mount / "a").write_text("newer\n")
    fourth = run(make)

    assert "cat a b" in first
    assert "up to date" in second
    assert "up to date" in third
    assert "cp a b" in fourth
    assert (folder.mount / "out").read_text() == "newer\nnewer\n"


def test_pip_installs_a_wheel_and_it_is_imported(folder: Rig, tmp_path: Path, run: Run) -> None:
    wheel = tmp_path / "sample_pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for number in range(30):
            archive.writestr(f"sample_pkg/part{number}.py", f"value = {number}\n")
        archive.writestr("sample_pkg/__init__.py", "from .part7 import value\n")
        archive.writestr("sample_pkg-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: sample_pkg\nVersion: 1.0\n")
        archive.writestr("sample_pkg-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("sample_pkg-1.0.dist-info/entry_points.txt", "[console_scripts]\nsample = sample_pkg:value\n")
        archive.writestr("sample_pkg-1.0.dist-info/RECORD", "")
    python = folder.mount / "venv" / "bin" / "python"
    run("python3", "-m", "venv", "--without-pip", "--symlinks", "venv")
    import sys

    run(sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", "site", wheel)

    assert run(python, "-c", "import sample_pkg; print(sample_pkg.value)", PYTHONPATH=str(folder.mount / "site")) == "7\n"
    assert run(python, "-c", "import sys; print(sys.prefix)").strip() == str(folder.mount / "venv")
    assert python.is_symlink()
    assert os.access(folder.mount / "site" / "bin" / "sample", os.X_OK)


def saved_like_vim(path: Path, text: str) -> None:
    """backup by rename: the old one is moved away, a new one written, the backup removed."""
    backup = path.with_name(path.name + "~")
    swap = path.with_name(f".{path.name}.swp")
    swap.write_bytes(b"b0VIM 9.0" + bytes(4087))
    probe = path.with_name("4913")
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, path.stat().st_mode & 0o777))
    os.chown(probe, path.stat().st_uid, path.stat().st_gid)
    probe.unlink()
    mode = path.stat().st_mode & 0o777
    path.rename(backup)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(fd, text.encode())
    os.fsync(fd)
    os.close(fd)
    path.chmod(mode)
    backup.unlink()
    swap.unlink()


def saved_like_nano(path: Path, text: str) -> None:
    """In place: opened with O_TRUNC, written, synced."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def saved_like_emacs(path: Path, text: str) -> None:
    """A lock that is a symlink to nowhere, a backup by rename, an autosave beside."""
    lock = path.with_name(f".#{path.name}")
    lock.symlink_to("me@host.1234:5678")
    autosave = path.with_name(f"#{path.name}#")
    autosave.write_text(text)
    path.rename(path.with_name(path.name + "~"))
    path.write_text(text)
    autosave.unlink()
    lock.unlink()


@pytest.mark.parametrize("save", [saved_like_vim, saved_like_nano, saved_like_emacs])
def test_a_file_is_saved_again_and_again_the_way_editors_do(folder: Rig, save) -> None:  # type: ignore[no-untyped-def]
    path = folder.mount / "notes.txt"
    path.write_text("first\n")
    path.chmod(0o640)
    folder.daemon.sync(folder.mount)

    for number in range(5):
        save(path, f"revision {number}\n" * (number + 1))
        if number % 2:
            folder.daemon.sync(folder.mount)

    assert path.read_text() == "revision 4\n" * 5
    folder.daemon.sync(folder.mount)
    assert (folder.root / "notes.txt").read_text() == "revision 4\n" * 5
    assert set(listed(folder.root)) <= {"notes.txt", "notes.txt~"}


def test_vim_saves(folder: Rig, run: Run) -> None:
    vim = needed("vim")
    (folder.mount / "notes.txt").write_text("first\n")

    settings = "set backup writebackup swapfile backupskip= backupdir=."  # by default it keeps none of files below /tmp
    run(vim, "-e", "-s", "-u", "NONE", "-c", settings, "-c", "%s/first/second/", "-c", "wq", "notes.txt")

    assert (folder.mount / "notes.txt").read_text() == "second\n"
    assert sorted(os.listdir(folder.mount)) == ["notes.txt", "notes.txt~"]


def test_nano_saves(folder: Rig) -> None:
    """Typed into a terminal of its own: text, ^O, Enter, ^X."""
    nano = needed("nano")
    (folder.mount / "notes.txt").write_text("first\n")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder.mount)
        os.environ["TERM"] = "xterm"
        os.execv(nano, ["nano", "--ignorercfiles", "--positionlog", "notes.txt"])
    try:
        for keys in (b"typed ", b"\x0f", b"\r", b"\x18"):
            _until_quiet(terminal)
            os.write(terminal, keys)
        _until_quiet(terminal)
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        os.close(terminal)

    assert (folder.mount / "notes.txt").read_text() == "typed first\n"


def _until_quiet(terminal: int) -> None:
    """Reads what the program draws until it has waited for a key for a moment, or has ended."""
    while select.select([terminal], [], [], 0.3)[0]:
        try:
            if not os.read(terminal, 65536):
                return
        except OSError:
            return
