"""`nbmountd exec`: a command with the mounts beside it; what it wrote is on the remote when the wrapper has ended."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from nbmountd.control import schema
from nbmountd.control.client import ControlError, ask_sync
from tests.mounted.kernel import eventually, is_alive

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
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before,
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


def test_a_signal_to_the_whole_process_group_reaches_the_command_once(place: Path) -> None:
    """As `tini -g` sends it; a second SIGTERM means "at once" to some programs."""
    script = "trap 'echo told' TERM; echo started; for i in 1 2 3 4 5 6 7 8; do sleep 0.2; done; exit 7"
    wrapper = start(place, script, before=os.setsid)
    assert wrapper.stdout is not None and wrapper.stdout.readline() == "started\n"

    os.killpg(wrapper.pid, signal.SIGTERM)
    out, log = wrapper.communicate(timeout=60)

    assert (wrapper.returncode, out) == (7, "told\n"), log


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


def test_a_daemon_that_does_not_come_up_keeps_the_command_waiting_for_five_seconds_and_no_more(place: Path) -> None:
    (place / "state").mkdir(mode=0o700)
    with (place / "state" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another daemon that does not end

        wrapper = start(place, "echo ran; mountpoint -q shared || echo without")
        out, log = wrapper.communicate(timeout=60)

    assert (wrapper.returncode, out) == (0, "ran\nwithout\n"), log
    assert "not there after 5 s" in log


# --- after kill -9 of any process ---------------------------------------------------------------------------------------


def pids(place: Path) -> dict[str, int]:
    """The daemon's processes, from its own status."""
    socket = place / "run" / "nbmountd" / "control.sock"

    def asked() -> dict[str, int] | None:
        with suppress(ControlError):
            *_, reply = ask_sync(socket, schema.Status(), timeout=10)
            if isinstance(reply, schema.StatusReply) and reply.mounts[0].state == "live" and reply.mounts[0].pid:
                return {"daemon": reply.pid, "worker": reply.mounts[0].pid}
        return None

    return eventually(asked, 30, "the mount is live")


@pytest.mark.parametrize("victim", ["worker", "daemon"])
def test_a_killed_daemon_or_worker_comes_back_while_the_command_goes_on(place: Path, victim: str) -> None:
    wrapper = start(place, "echo one > shared/one; echo started; read line; echo two > shared/two; cat shared/one; exit 7")
    assert wrapper.stdout is not None and wrapper.stdout.readline() == "started\n"
    before = pids(place)

    os.kill(before[victim], signal.SIGKILL)
    eventually(lambda: pids(place)[victim] != before[victim], 30, f"another {victim}")
    out, log = wrapper.communicate("go on\n", timeout=60)

    assert (wrapper.returncode, out) == (7, "one\n"), log
    assert [(place / "source" / name).read_text() for name in ("one", "two")] == ["one\n", "two\n"]
    assert not mounted_below(place)


def test_a_killed_command_is_reported_as_shells_do_and_its_files_are_sent(place: Path) -> None:
    wrapper = start(place, "echo result > shared/result.txt; kill -9 $$")

    _, log = wrapper.communicate(timeout=60)

    assert wrapper.returncode == 128 + signal.SIGKILL, log
    assert (place / "source" / "result.txt").read_text() == "result\n"
    assert not mounted_below(place)


def test_a_killed_wrapper_leaves_a_daemon_that_drains_and_ends(place: Path) -> None:
    wrapper = start(place, "echo kept > shared/kept.txt; echo started; read line; exec sleep 1")
    assert wrapper.stdout is not None and wrapper.stdout.readline() == "started\n"
    daemon = pids(place)["daemon"]

    wrapper.kill()
    wrapper.communicate(timeout=60)

    eventually(lambda: not is_alive(daemon), 60, "the daemon has ended")
    assert (place / "source" / "kept.txt").read_text() == "kept\n"
    assert not mounted_below(place)


def test_when_everything_is_killed_at_once_the_next_start_sends_what_was_written(place: Path) -> None:
    config = (place / "config.toml").read_text()
    (place / "config.toml").write_text(config + "write_back_delay = 600\n")
    wrapper = start(place, "echo kept > shared/kept.txt; echo started; read line")
    assert wrapper.stdout is not None and wrapper.stdout.readline() == "started\n"
    found = pids(place)

    os.kill(wrapper.pid, signal.SIGSTOP)  # it starts no other one
    for pid in (*found.values(), wrapper.pid):
        os.kill(pid, signal.SIGKILL)
    wrapper.communicate(timeout=60)
    assert not (place / "source" / "kept.txt").exists()
    again = start(place, "cat shared/kept.txt")
    out, log = again.communicate(timeout=60)

    assert (again.returncode, out) == (0, "kept\n"), log
    assert (place / "source" / "kept.txt").read_text() == "kept\n"
    assert not mounted_below(place)


# --- start modes -------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
@pytest.mark.parametrize("options", [["--userns"], []], ids=["told", "by itself"])
def test_an_ordinary_user_without_any_privilege_mounts_in_a_namespace_of_its_own(
    place: Path, tmp_path: Path, options: list[str]
) -> None:
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
    inner = [*COMMAND, *options, "--config", str(place / "config.toml"), "--", "sh", "-c",
             "id -u; grep CapEff /proc/self/status; echo result > shared/result.txt; cat /proc/$PPID/environ"]  # fmt: skip

    done = subprocess.run(
        ["unshare", "-m", "sh", str(script), *inner], cwd=place / "home", text=True, timeout=60, check=False,
        env=os.environ | {"XDG_RUNTIME_DIR": str(place / "run"), "HOME": str(place)},
        capture_output=True,
    )  # fmt: skip

    assert done.returncode == 1, done.stderr  # of cat: the wrapper's environment is closed to the command
    assert "/environ: Permission denied" in done.stderr
    assert done.stdout.split() == ["1000", "CapEff:", "0" * 16]
    assert (place / "source" / "result.txt").read_text() == "result\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="taking rights away takes root")
def test_where_no_way_is_open_one_line_says_so_and_the_command_runs(place: Path) -> None:
    """No CAP_SYS_ADMIN to be had, no namespace, no helper: the daemon's own status for it is 5."""
    shut = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all", "--no-new-privs", "unshare", "-U", "--map-root-user"]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(place / "run"), "HOME": str(place)}
    limit = "echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-all --inh-caps=-all \"$@\""
    inner = ["sh", "-c", limit, "sh", *COMMAND[:-1]]
    config = ["--config", str(place / "config.toml")]

    done = subprocess.run(
        [*shut, *inner, "exec", *config, "--", "echo", "ran"], env=environment, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    daemon = subprocess.run(
        [*shut, *inner, "run", *config], env=environment, capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stdout) == (0, "ran\n"), done.stderr
    assert done.stderr.count("\n") == 1 and "there is no way to mount here" in done.stderr
    assert (daemon.returncode, daemon.stderr.count("\n")) == (5, 1), daemon.stderr
