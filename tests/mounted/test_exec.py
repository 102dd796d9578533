"""`nbmountd exec`: a command with the mounts beside it; what it wrote is on the remote when the wrapper has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.mounted]

COMMAND = [sys.executable, "-c", "from nbmountd.cli import nbmountd; nbmountd()", "exec"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A home with a configuration of one shared folder, `source`, mounted at `home/shared`."""
    for name in ("source", "home", "run"):
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "config.toml").write_text(
        f'[daemon]\nstate_dir = "{tmp_path}/state"\ncache_dir = "{tmp_path}/cache"\n'
        f'[[mount]]\nname = "shared"\npath = "{tmp_path}/home/shared"\nbackend = "directory"\nsource = "{tmp_path}/source"\n'
    )
    return tmp_path


def start(place: Path, script: str, *options: str, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    environment = os.environ | {"XDG_RUNTIME_DIR": str(place / "run"), "HOME": str(place)}
    return subprocess.Popen(
        [*COMMAND, *options, "--config", str(place / "config.toml"), "--", "sh", "-c", script], cwd=place / "home",
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before,
    )  # fmt: skip


def mounted_below(place: Path) -> bool:
    return str(place) in Path("/proc/self/mountinfo").read_text()


def test_the_command_sees_the_mount_and_its_files_are_on_the_remote_at_the_end(place: Path) -> None:
    wrapper = start(place, "echo result > shared/result.txt; exit 7")

    _, log = wrapper.communicate(timeout=60)

    assert wrapper.returncode == 7, log
    assert (place / "source" / "result.txt").read_text() == "result\n"
    assert not mounted_below(place)


def test_signals_reach_the_command_and_its_end_is_reported_as_shells_do(place: Path) -> None:
    wrapper = start(place, "echo started; exec sleep 60")
    assert wrapper.stdout is not None and wrapper.stdout.readline() == "started\n"

    wrapper.send_signal(signal.SIGTERM)
    _, log = wrapper.communicate(timeout=60)

    assert wrapper.returncode == 128 + signal.SIGTERM, log
    assert not mounted_below(place)


def test_the_command_runs_when_nothing_can_be_mounted(place: Path) -> None:
    (place / "home" / "shared").mkdir()
    (place / "home" / "shared" / "in-the-way").write_text("precious")

    wrapper = start(place, "echo ran")
    out, log = wrapper.communicate(timeout=60)

    assert (wrapper.returncode, out) == (0, "ran\n")
    assert "shared is not mounted" in log and "not empty" in log
    assert (place / "home" / "shared" / "in-the-way").read_text() == "precious"


def test_a_wrong_configuration_is_one_line_and_the_command_runs(place: Path) -> None:
    (place / "config.toml").write_text("[[mount]]\nname = 1\n")

    wrapper = start(place, "echo ran")
    out, log = wrapper.communicate(timeout=60)

    assert (wrapper.returncode, out) == (0, "ran\n")
    assert log.count("\n") == 1 and "nothing is mounted" in log


def test_a_command_that_does_not_exist_is_status_127(place: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--config", str(place / "config.toml"), "--", "no-such-command"],
        env=os.environ | {"XDG_RUNTIME_DIR": str(place / "run")}, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 127, done.stderr
    assert not mounted_below(place)


def test_credentials_of_mounts_are_not_in_the_commands_environment(place: Path) -> None:
    config = (place / "config.toml").read_text()
    (place / "config.toml").write_text(
        config + f'[[mount]]\nname = "dav"\npath = "{place}/home/dav"\nbackend = "webdav"\n'
        'url = "http://127.0.0.1:9/"\nuser = "ada"\npassword_env = "DAV_PASSWORD"\n'
    )
    os.environ["DAV_PASSWORD"] = "s3cret-in-the-environment"
    try:
        wrapper = start(place, "env")
        out, log = wrapper.communicate(timeout=60)
    finally:
        del os.environ["DAV_PASSWORD"]

    assert wrapper.returncode == 0
    assert "s3cret" not in out + log
    assert "HOME=" in out


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_an_ordinary_user_without_any_privilege_mounts_in_a_namespace_of_its_own(place: Path, tmp_path: Path) -> None:
    """Start mode D: /dev/fuse that may be opened, no capability, no_new_privs; the command gets none of the rights."""
    node, script = tmp_path / "fuse", tmp_path / "script"
    script.write_text(
        f'mknod "{node}" c 10 229; chmod 666 "{node}"; mount --bind "{node}" /dev/fuse\n'
        f'chown -R 1000:1000 "{place}/source" "{place}/home" "{place}/run" "{place}"; exec setpriv --reuid 1000 --regid 1000'
        ' --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs "$@"\n'
    )
    for parent in tmp_path.parents:
        if parent.stat().st_uid == 0 and parent.stat().st_mode & 0o5 != 0o5 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o5)  # pytest's own directories are closed to others
    inner = [*COMMAND, "--userns", "--config", str(place / "config.toml"), "--", "sh", "-c",
             "id -u; grep CapEff /proc/self/status; echo result > shared/result.txt"]  # fmt: skip

    done = subprocess.run(
        ["unshare", "-m", "sh", str(script), *inner], cwd=place / "home", text=True, timeout=60, check=False,
        env=os.environ | {"XDG_RUNTIME_DIR": str(place / "run"), "HOME": str(place)},
        capture_output=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1000", "CapEff:", "0" * 16]
    assert (place / "source" / "result.txt").read_text() == "result\n"
