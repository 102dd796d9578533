"""Each start mode in a container that has no more than the mode needs, and a container in which none is possible."""

from __future__ import annotations

import pytest

from tests.containers.conftest import BARE, MODES, PASSWORD, Home

SCRIPT = """
echo "I am $(id -u):$(id -g)"
echo result > ~/b2drop/result.txt && cat ~/b2drop/from-there.txt
nbmountctl status
nbmountctl doctor | grep -E 'mounting|way:'
echo ENVIRONMENT; env; tr '\\0' '\\n' < /proc/$PPID/environ
grep -E 'CapEff|CapPrm' /proc/self/status
exit 7
"""


@pytest.mark.parametrize("mode", MODES)
def test_the_command_has_the_mount_and_what_it_wrote_is_on_the_server_when_the_container_has_ended(
    home: Home, mode: str
) -> None:
    (home.remote / "from-there.txt").write_text("hello from there\n")
    options = MODES[mode](home)
    with home.notebook(options, "bash", "-c", SCRIPT) as notebook:
        status = notebook.start().wait()
        log = notebook.log

    assert status == 7, log
    assert "hello from there" in log and "I am 1000:100" in log
    assert (home.remote / "result.txt").read_text() == "result\n"
    chosen = {"A": "start mode A", "F": "", "D": "", "P": "start mode P", "S": "start mode S"}[mode]
    assert chosen in log
    assert "0000000000000000" in log.partition("CapEff:")[2].splitlines()[0]
    assert PASSWORD not in log, "the password reached the command"


def test_where_nothing_can_be_mounted_one_line_says_why_and_the_command_runs(home: Home) -> None:
    with home.notebook(["--user=1000:100", *BARE], "sh", "-c", "echo the notebook runs; exit 7") as notebook:
        status = notebook.start().wait()
        log = notebook.log

    assert status == 7
    assert "the notebook runs" in log
    (line,) = [line for line in log.splitlines() if "nbmountd" in line]
    assert "there is no way to mount here" in line and "/dev/fuse is missing" in line


def test_where_nothing_can_be_mounted_the_daemon_ends_with_a_status_of_its_own(home: Home) -> None:
    with home.notebook(["--user=1000:100", *BARE, "--entrypoint=nbmountd"], "run") as notebook:
        status = notebook.start().wait()
        log = notebook.log

    assert (status, log.count("\n")) == (5, 1), log
