"""The hook for notebook images: whatever the daemon does, the start goes on."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOOK = ROOT / "docker" / "before-notebook.d" / "10nbmountd.sh"

START = 'before=$-; source "$1"; [ "$before" = "$-" ] || echo options changed; declare -F | grep nbmountd; echo started'


@pytest.mark.parametrize(
    "daemon", [None, "exit 1", "exit 0", "kill -9 $$", "exec sleep 30"], ids=["missing", "fails", "ends", "dies", "hangs"]
)
@pytest.mark.parametrize("options", ["-e", "-eu", "-e -o pipefail"])
def test_the_start_goes_on(tmp_path: Path, daemon: str | None, options: str) -> None:
    if daemon is not None:
        (tmp_path / "nbmountd").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{daemon}\n")
        (tmp_path / "nbmountd").chmod(0o755)
    begin = time.monotonic()

    done = subprocess.run(
        ["bash", *options.split(), "-c", START.replace("| grep nbmountd", "| grep nbmountd || true"), "bash", HOOK],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stdout) == (0, "started\n")
    assert time.monotonic() - begin < 7
    if daemon is not None and "sleep" in daemon:
        os.kill(int((tmp_path / "pid").read_text()), 9)


def test_the_unit_is_valid(tmp_path: Path) -> None:
    unit = ROOT / "systemd" / "nbmountd.service"
    try:
        done = subprocess.run(
            ["systemd-analyze", "verify", "--user", "--man=no", unit],
            env={"XDG_RUNTIME_DIR": str(tmp_path), "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no systemd-analyze here")

    assert (done.returncode, done.stderr) == (0, "")
