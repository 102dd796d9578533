"""The hook for notebook images: whatever the daemon does, the start goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOOK = ROOT / "docker" / "before-notebook.d" / "10nbmountd.sh"

START = r"""
cmd=("$@"); set -- "${@:1:1}"; cmd=("${cmd[@]:1}")
before=$-:$(shopt -p | md5sum):$(trap -p)
source "$1"
[ "$before" = "$-:$(shopt -p | md5sum):$(trap -p)" ] || echo options changed
declare -F | grep nbmountd || true
printf '[%s]' "${cmd[@]}"
echo " ${NBMOUNTD_UNSET:-} ${JUPYTER_ENV_VARS_TO_UNSET:-}"
"""
"""What start.sh does around a hook; its arguments are the hook and the command."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for programs that an ordinary user can get at."""
    path = Path(tempfile.mkdtemp(prefix="nbm-hook-"))
    path.chmod(0o777)
    yield path
    if (path / "pid").exists():
        subprocess.run(["kill", "-9", (path / "pid").read_text().strip()], stderr=subprocess.DEVNULL, check=False)
    shutil.rmtree(path)


def install(place: Path, daemon: str | None) -> None:
    if daemon is not None:
        (place / "nbmountd").write_text(f'#!/bin/sh\necho $$ > {place}/pid\necho "$@" >> {place}/asked\n{daemon}\n')
        (place / "nbmountd").chmod(0o755)
    shutil.copy(HOOK, place / "hook.sh")
    (place / "hook.sh").chmod(0o644)


def source(place: Path, options: str, *command: str, user: bool = False, **environ: str) -> subprocess.CompletedProcess[str]:
    as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if user else []
    return subprocess.run(
        [*as_user, "bash", *options.split(), "-c", START, "bash", str(place / "hook.sh"), *command], cwd="/",
        env={"PATH": f"{place}:/usr/bin:/bin", **environ}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    "daemon", [None, "exit 1", "exit 5", "exit 0", "kill -9 $$", "exec sleep 60"],
    ids=["missing", "fails", "has no way", "ends", "dies", "hangs"],
)  # fmt: skip
@pytest.mark.parametrize("options", ["-e", "-eu", "-e -o pipefail"])
def test_the_start_goes_on(place: Path, daemon: str | None, options: str) -> None:
    install(place, daemon)
    begin = time.monotonic()

    done = source(place, options, "jupyter", "a b", "")

    wrapped = "" if daemon is None else f"[{place}/nbmountd][exec][--]"
    assert (done.returncode, done.stdout.rstrip()) == (0, f"{wrapped}[jupyter][a b][]")
    assert time.monotonic() - begin < 10
    if daemon is not None and os.geteuid() == 0:
        while not (place / "asked").exists() and time.monotonic() < begin + 30:
            time.sleep(0.05)  # where another nbmountd has a mount, the hook does not wait for this one
        assert (place / "asked").read_text() == "run\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_an_ordinary_user_waits_for_nothing_and_starts_nothing_in_the_hook(place: Path) -> None:
    install(place, "exec sleep 60")

    done = source(place, "-eu", "jupyter", "lab", user=True)

    assert done.stdout.rstrip() == f"[{place}/nbmountd][exec][--][jupyter][lab]"
    assert not (place / "asked").exists()


def test_what_start_sh_would_take_away_reaches_the_wrapper_first(place: Path) -> None:
    install(place, "exit 1")

    done = source(place, "-eu", "jupyter", JUPYTER_ENV_VARS_TO_UNSET="WEBDAV_PWD,X", NBMOUNTD_UNSET="Y")

    assert done.stdout == f"[{place}/nbmountd][exec][--][jupyter] WEBDAV_PWD,X,Y \n"


def test_it_can_be_switched_off(place: Path) -> None:
    install(place, "exit 1")

    done = source(place, "-eu", "jupyter", NBMOUNTD_DISABLE="1")

    assert done.stdout.rstrip() == "[jupyter]"
    assert not (place / "asked").exists()


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
