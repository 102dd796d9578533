"""A real systemd, booted over a throw-away copy of this machine's own root, and what a test does inside.

It knows nothing of the daemon. Everything written goes to memory and is gone at the end. Needs root, overlayfs and
systemd-nspawn (Debian: systemd-container).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.mounted.kernel import eventually
from tests.mounted.modes import ROOT

USER, UID = "ada", 1234

LAY = r"""
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/tree"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/tree"
mknod -m 666 "$1/fuse" c 10 229
"$2" "$3" "$1/tree"
shift 3
exec "$@"
"""
"""Arguments: where, a Python, the script that fills the tree, and then what boots it."""

FILL = r"""
import os, sys
from pathlib import Path
tree = Path(sys.argv[1])
system = tree / "etc/systemd/system"
system.mkdir(parents=True, exist_ok=True)
for name, target in {links!r}.items():
    (system / name).unlink(missing_ok=True)
    (system / name).symlink_to(target)
for name, text in {files!r}.items():
    file = tree / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_text(text)
    file.chmod(0o755 if text.startswith("#!") else 0o644)
with (tree / "etc/passwd").open("a") as passwd:
    passwd.write("{user}:x:{uid}:{uid}::/home/{user}:/bin/sh\n")
home = tree / "home/{user}"
home.mkdir(parents=True)
os.chown(home, {uid}, {uid})
"""


class Unbootable(Exception):
    """This machine cannot; the text says why."""


class Booted:
    """A system with `files` (path without the leading slash -> text; a script is executable). Whoever makes one calls `end`."""

    def __init__(self, python: str, files: dict[str, str]) -> None:
        """Raises Unbootable. `python`: an interpreter that every user may execute."""
        if os.geteuid() != 0 or shutil.which("systemd-nspawn") is None:
            raise Unbootable("needs root and systemd-nspawn (Debian: systemd-container)")
        self.place = Path(tempfile.mkdtemp(prefix="nbm-boot-"))
        # No more than needed is started; nothing waits for a network that is not there.
        links = {"default.target": "/lib/systemd/system/basic.target", "systemd-networkd-wait-online.service": "/dev/null"}
        script = self.place.with_suffix(".py")
        script.write_text(FILL.format(links=links, files=files, user=USER, uid=UID))
        # nspawn lays an empty /tmp over the tree's, which may be where we are.
        needed = {str(ROOT), *(each for each in sys.path if each and Path(each).is_dir())}
        binds = [f"--bind-ro={each}" for each in sorted(needed) if each.startswith("/tmp/")]
        boot = [
            "systemd-nspawn", "--register=no", "--keep-unit", "-D", f"{self.place}/tree", "--boot", "--private-network",
            f"--bind={self.place}/fuse:/dev/fuse", "--console=pipe", *binds,
        ]  # fmt: skip
        self.log = self.place.with_suffix(".log")
        with self.log.open("wb") as log:
            self._nspawn = subprocess.Popen(
                ["unshare", "-m", "sh", "-c", LAY, "sh", self.place, sys.executable, script, *boot],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._leader = 0
        try:
            self._leader = eventually(self._find_leader, 30, "init has been started")
            eventually(self._is_up, 60, "the system is up")
        except AssertionError as exc:
            said = self.log.read_text(errors="replace")[-1000:]
            self.end()
            raise Unbootable(f"{exc}; systemd-nspawn said: {said}") from exc

    def _find_leader(self) -> int | None:
        """nspawn's child that is pid 1 in there."""
        if self._nspawn.poll() is not None:
            raise AssertionError("systemd-nspawn ended")
        for children in Path(f"/proc/{self._nspawn.pid}/task").glob("*/children"):
            for child in children.read_text().split():
                status = Path(f"/proc/{child}/status").read_text()
                if any(line.startswith("NSpid:") and line.split()[-1] == "1" for line in status.splitlines()):
                    return int(child)
        return None

    def _is_up(self) -> bool:
        if self._nspawn.poll() is not None:
            raise AssertionError("systemd-nspawn ended")
        return self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")

    def inside(self, *command: str, user: bool = False) -> list[str]:
        """The command line that runs `command` in there, as root or as the user."""
        become = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=-all"] if user else []
        surroundings = [f"HOME=/home/{USER}", f"XDG_RUNTIME_DIR=/run/user/{UID}"] if user else []
        path = "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        return ["nsenter", "-t", str(self._leader), "-a", *become, "env", "-i", path, *surroundings, *command]

    def run(self, *command: str, user: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.inside(*command, user=user), capture_output=True, text=True, timeout=120, check=False,
            stdin=subprocess.DEVNULL, cwd="/",
        )  # fmt: skip

    def must(self, *command: str, user: bool = False) -> str:
        """Standard output of a command that must succeed."""
        done = self.run(*command, user=user)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def show(self, unit: str, name: str, manager: Sequence[str] = ()) -> str:
        """A property of a unit."""
        return self.run("systemctl", *manager, "show", "-P", name, unit, user="--user" in manager).stdout.strip()

    def end(self) -> None:
        """Everything in there ends at once; a polite end may wait."""
        if self._leader > 1 and self._nspawn.poll() is None:
            os.kill(self._leader, 9)
        elif self._nspawn.poll() is None:
            self._nspawn.kill()
        self._nspawn.wait(30)
        shutil.rmtree(self.place, ignore_errors=True)
        for file in (self.log, self.place.with_suffix(".py")):
            file.unlink(missing_ok=True)
