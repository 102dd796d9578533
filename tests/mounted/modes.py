"""Who runs the daemon in the tests of a run, and who mounts: NBMOUNTD_TEST_MODE.

    root   the tests and the daemon are root's (the default where they are)
    user   the tests and the daemon are an ordinary user's, who mounts through fusermount3
    drop   the daemon is root's and mounts; its workers become user 1000
    fd     the tests mount, as a privileged helper does, and pass the descriptors to the daemon

`python -m tests.mounted.modes MODE [ARGUMENT OF PYTEST...]`, as root, runs tests in such a way. It knows nothing of the daemon
but its command line.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MODE = os.environ.get("NBMOUNTD_TEST_MODE", "root" if os.geteuid() == 0 else "user")
MODES = ("root", "user", "drop", "fd")
ROOT = Path(__file__).parents[2]

USER = 1000
"""Whom workers become in the mode "drop"."""
OWNER = (USER, USER) if MODE == "drop" else (os.geteuid(), os.getegid())
"""To whom the files of the mounts belong."""
NOBODY = 65534
"""Whose the tests are in the mode "user". Has a name in /etc/passwd, which fusermount3 insists on."""

# /dev/fuse is for root alone on some machines. In a mount namespace of its own a node for everybody changes nothing outside.
ENTER = r"""
set -e
mount --make-rprivate /
mknod -m 666 "$1/fuse" c 10 229
mount --bind "$1/fuse" /dev/fuse
shift
exec setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all env "$@"
"""
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", "env"]
"""`env`, because setpriv itself still has root's rights when it looks for the program."""


@dataclass(frozen=True)
class Way:
    """How to start a daemon. `close()` when it has been started."""

    environment: Mapping[str, str] = field(default_factory=dict)
    passed: Mapping[Path, int] = field(default_factory=dict)
    """Connections that were mounted for it, by mount point."""

    def close(self) -> None:
        for fd in self.passed.values():
            os.close(fd)


def prepare(home: Path, mounts: Mapping[Path, Mapping[str, object]]) -> Way:
    """Makes `home` (private so far) and what the mounts need fit for the daemon that is to be started now."""
    if MODE == "drop":
        for path in (home, home / "run", home / "mnt"):
            os.chown(path, USER, USER)
        home.chmod(0o755)
        for point, keys in mounts.items():
            files = [Path(str(value)) for key, value in keys.items() if key in ("source", "ca_bundle") or key.endswith("_file")]
            for path in (point, *files):
                _open_to_the_user(path)
        return Way({"NB_UID": str(USER), "NB_GID": str(USER)})
    if MODE == "fd":
        clean(home)
        return Way(passed={path: mount_by_hand(path, 0) for path in mounts})
    return Way()


def clean(home: Path) -> None:
    """Unmounts below `home` what was mounted here and not by the daemon, after its end."""
    if MODE == "fd":
        from tests.mounted.kernel import mounts_below

        for point in mounts_below(home):
            subprocess.run(["umount", "-l", point], check=False, capture_output=True)


def mount_by_hand(point: Path, uid: int) -> int:
    """A new FUSE connection, mounted as a container's init helper or a CSI driver would; nobody has answered FUSE_INIT."""
    point.mkdir(parents=True, exist_ok=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id={uid},group_id={uid},default_permissions,allow_other"
    subprocess.run(["mount", "-i", "-t", "fuse.helper", "-o", options, "helper", str(point)], pass_fds=[device], check=True)
    return device


def hand_over(*places: Path) -> None:
    """In the mode "drop": what the tests made, as root, after the daemon began or where `prepare` does not look."""
    if MODE == "drop":
        for place in places:
            _give_to_the_user(place)


def _open_to_the_user(place: Path) -> None:
    """What root's tests made, and the user's worker needs. What is mounted or missing is left alone."""
    if os.path.exists(place) and not os.path.ismount(place):  # pathlib's raise where a mount is dead
        _give_to_the_user(place)


def _give_to_the_user(place: Path) -> None:
    for path in (place, *place.rglob("*")):
        os.chown(path, USER, USER, follow_symlinks=False)
    for parent in place.parents:
        if parent.stat().st_mode & 0o011 != 0o011:
            parent.chmod(parent.stat().st_mode | 0o011)


def python_for_users() -> str | None:
    """An interpreter that an ordinary user may execute and that has what the daemon needs."""
    for candidate in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        tried = subprocess.run(
            [*AS_NOBODY, candidate, "-c", "import nbmountd, pyfuse3, trio"], env=environment(), capture_output=True, check=False
        )
        if tried.returncode == 0:
            return candidate
    return None


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}


def run_tests(mode: str, *arguments: str) -> subprocess.CompletedProcess[bytes] | None:
    """pytest with `arguments` in `mode`, its output with ours. None if this machine cannot."""
    with tempfile.TemporaryDirectory(prefix="nbm-mode-") as name:
        place = Path(name)
        place.chmod(0o755)
        python: str | None = sys.executable
        before: list[str] = []
        if mode == "user":
            python = python_for_users()
            before = ["unshare", "-m", "sh", "-c", ENTER, "sh", name]
        if python is None:
            return None
        # Not pytest's own place for temporary files: what workers read must be open to other users.
        work = place / "work"
        work.mkdir()
        if mode == "user":
            os.chown(work, NOBODY, NOBODY)
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={work}/bt", *arguments]
        # Root is a stranger in a user's repository.
        trust = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
        places = {"HYPOTHESIS_STORAGE_DIRECTORY": f"{work}/hypothesis", "HOME": str(work)}
        settings = {"NBMOUNTD_TEST_MODE": mode, **trust, **places}
        return subprocess.run([*before, *command], env={**environment(), **settings}, cwd=ROOT, check=False)


if __name__ == "__main__":
    done = run_tests(*sys.argv[1:])
    if done is None:
        sys.exit("no interpreter with pyfuse3 that an ordinary user may execute")
    sys.exit(done.returncode)
