"""What is shipped for systemd is correct, and the system unit is as closed as a mounting daemon can be."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nbmountd.config import DaemonConfig
from nbmountd.keeper import Rhythm

SHIPPED = Path(__file__).parents[1] / "systemd"
pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def analyze(*arguments: str | Path, runtime: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)},
        capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize(("unit", "manager"), [("nbmountd.service", "--user"), ("nbmountd@.service", "--system")])
def test_systemd_finds_nothing_wrong_with_the_unit(unit: str, manager: str, tmp_path: Path) -> None:
    checked = analyze(manager, "verify", "--man=no", SHIPPED / unit, runtime=tmp_path)

    assert [line for line in checked.stderr.splitlines() if "nbmountd" in line] == []
    assert checked.returncode == 0, checked.stderr


def test_the_system_unit_leaves_little_open(tmp_path: Path) -> None:
    """5.0 of 10; 9.6 is a unit without anything. The rest is what would hide the mounts, and the right to mount itself."""
    listed = analyze("security", "--offline=true", "--no-pager", SHIPPED / "nbmountd@.service", runtime=tmp_path)
    exposure = re.search(r"exposure level for .*: ([\d.]+)", listed.stdout)

    assert exposure is not None, listed.stdout + listed.stderr
    assert float(exposure[1]) <= 5.1


@pytest.mark.parametrize("unit", ["nbmountd.service", "nbmountd@.service"])
def test_a_stop_is_given_longer_than_the_drain(unit: str) -> None:
    limit = re.search(r"^TimeoutStopSec=(\d+)$", (SHIPPED / unit).read_text(), re.MULTILINE)

    assert limit is not None
    assert int(limit[1]) > DaemonConfig(state_dir="/", cache_dir="/").drain_timeout + 2 * Rhythm().stop_grace


def test_tmpfiles_are_correct(tmp_path: Path) -> None:
    if shutil.which("systemd-tmpfiles") is None:
        pytest.skip("systemd-tmpfiles is not installed")
    made = subprocess.run(
        ["systemd-tmpfiles", "--create", f"--root={tmp_path}", SHIPPED / "tmpfiles.conf"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert made.returncode == 0, made.stderr
    assert oct((tmp_path / "var/lib/nbmountd").stat().st_mode & 0o777) == "0o755"
