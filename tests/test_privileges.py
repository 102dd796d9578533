"""What a process that keeps its memory private shows to others of the same user."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

NOBODY = 65534
PROGRAM = """
import sys
from nbmountd.privileges import keep_memory_private
{call}
print("ready", flush=True)
sys.stdin.read()
"""
LOOK = """
import sys
for name in ("environ", "maps", "mem"):
    with open(f"/proc/{sys.argv[1]}/{name}", "rb") as file:
        file.read(0 if name == "mem" else 1)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
@pytest.mark.parametrize("private", [True, False])
def test_another_process_of_the_same_user_sees_neither_its_environment_nor_its_memory(private: bool) -> None:
    """The second case shows that the test would notice."""
    call = "keep_memory_private()" if private else "pass"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "SECRET": "s3cret"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(call=call)], env=environment, user=NOBODY, group=NOBODY, extra_groups=[],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as daemon:  # fmt: skip
        assert daemon.stdout is not None
        if daemon.stdout.readline() != b"ready\n":
            pytest.skip("the user nobody cannot run this Python")

        looked = subprocess.run(
            [sys.executable, "-c", LOOK, str(daemon.pid)], user=NOBODY, group=NOBODY, extra_groups=[],
            capture_output=True, check=False,
        )  # fmt: skip
        daemon.communicate()

    if private:
        assert b"PermissionError" in looked.stderr and b"environ" in looked.stderr
    else:
        assert looked.returncode == 0, looked.stderr


def test_a_crash_leaves_no_core_dump(tmp_path: Path) -> None:
    program = PROGRAM.format(call="keep_memory_private(); import os; os.abort()")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.RLIM_INFINITY))
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, "-c", program], environment)

    _, status = os.waitpid(pid, 0)

    assert os.WTERMSIG(status) == signal.SIGABRT and not os.WCOREDUMP(status)
    assert list(tmp_path.iterdir()) == []
