"""The ways to mount (start modes), and which of them this process has.

Letters as in README: F and root: mount(2) itself; A: the setuid fusermount3; P: a mount helper's socket; D: a user namespace of
its own. (S, a sidecar, mounts by one of these in another container.) What can be tried without a trace is tried, in a child
process with a mount namespace of its own; fusermount3 is judged by what it would need. It knows no mount and no configuration.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nbmountd.errors import NbmountdError

Name = Literal["helper", "direct", "fusermount3", "userns"]
DEVICE = Path("/dev/fuse")
_CAP_SYS_ADMIN = 1 << 21  # linux/capability.h
_TRIAL_LIMIT = 20.0


class NoWayToMount(NbmountdError):
    """Nothing can be mounted from this process; the text says what each way lacks."""


@dataclass(frozen=True)
class Way:
    """One way. `lacks`: what it needs and does not have here; empty when it is open."""

    name: Name
    lacks: str = ""
    advice: str = ""

    @property
    def is_open(self) -> bool:
        return not self.lacks


@dataclass(frozen=True)
class Rights:
    """What the kernel lets this process do (proc(5), /proc/pid/status)."""

    effective: int
    bounding: int
    no_new_privileges: bool

    @classmethod
    def of_this_process(cls) -> Rights:
        return cls.parse(Path("/proc/self/status").read_text())

    @classmethod
    def parse(cls, status: str) -> Rights:
        fields = dict(re.findall(r"^(\w+):\s+(\w+)", status, re.MULTILINE))
        return cls(int(fields["CapEff"], 16), int(fields["CapBnd"], 16), fields.get("NoNewPrivs", "0") == "1")

    @property
    def may_mount(self) -> bool:
        return bool(self.effective & _CAP_SYS_ADMIN)

    @property
    def helper_may_mount(self) -> bool:
        """Whether a setuid program started by us could get the right to mount."""
        return bool(self.bounding & _CAP_SYS_ADMIN) and not self.no_new_privileges


def all_ways(*, trials: bool = True) -> Iterator[Way]:
    """The ways in the order in which they are taken, judged one by one as the caller asks for the next.

    Without `trials` mode D is left out (it only helps who puts the users of the mounts into the namespace, too), and mount(2)
    is judged by the rights that it needs; that costs nothing.
    """
    from nbmountd.fuse import borrow

    if borrow.is_named():
        yield helper()
        return
    rights, device = Rights.of_this_process(), device_lacks()
    yield direct(rights, device, trial=trials)
    yield fusermount3(rights, device)
    if borrow.helper_socket() is not None:
        yield helper()
    if trials:
        yield namespace(device)


def choose(*, trials: bool = True) -> Way:
    """The first way that is open. Raises NoWayToMount."""
    reasons: list[str] = []
    for way in all_ways(trials=trials):
        if way.is_open:
            return way
        if way.lacks not in reasons:
            reasons.append(way.lacks)
    raise NoWayToMount("there is no way to mount here: " + "; ".join(reasons))


# --- each way ----------------------------------------------------------------------------------------------------------


def device_lacks(path: Path = DEVICE) -> str:
    """What is wrong with /dev/fuse; empty if it can be opened."""
    try:
        if not stat.S_ISCHR(path.stat().st_mode):
            return f"{path} is no device"
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as exc:
        cause = "the device cgroup refuses it" if exc.errno == errno.EPERM else exc.strerror
        return f"{path} cannot be opened ({cause})"
    return ""


def direct(rights: Rights, device: str, *, trial: bool) -> Way:
    if not rights.may_mount:
        return Way("direct", "no CAP_SYS_ADMIN", "start the container as root with --cap-add SYS_ADMIN")
    if device:
        return Way("direct", device, "start the container with --device /dev/fuse, or a device plugin")
    return Way("direct", *_trial("direct")) if trial else Way("direct")


def fusermount3(rights: Rights, device: str) -> Way:
    found = shutil.which("fusermount3")
    if found is None:
        return Way("fusermount3", "fusermount3 is not installed", "Debian: apt-get install fuse3")
    path = Path(found)
    if not path.stat().st_mode & stat.S_ISUID or path.stat().st_uid != 0:
        return Way("fusermount3", f"{found} is not setuid root", f"chown root {found} && chmod u+s {found}")
    if os.statvfs(path).f_flag & os.ST_NOSUID:
        return Way("fusermount3", f"{found} is on a file system mounted nosuid", "it cannot mount from there")
    if rights.no_new_privileges:
        return Way(
            "fusermount3", "fusermount3 cannot become root: no_new_privs is set",
            "Kubernetes: allowPrivilegeEscalation: true in the container's securityContext",
        )  # fmt: skip
    if not rights.helper_may_mount:
        return Way(
            "fusermount3", "fusermount3 cannot mount: CAP_SYS_ADMIN is not in the bounding set",
            "start the container with --cap-add SYS_ADMIN",
        )  # fmt: skip
    if device:
        return Way("fusermount3", device, "start the container with --device /dev/fuse, or a device plugin")
    return Way("fusermount3")


def helper() -> Way:
    """Whether the mount helper serves us; it is asked."""
    from nbmountd.fuse import borrow

    path = borrow.helper_socket()
    assert path is not None, "only when there is one"
    try:
        borrow.ping(path)
    except borrow.BorrowError as exc:
        return Way("helper", str(exc), "see the helper's log, and the paths of its socket on both sides")
    return Way("helper")


def namespace(device: str) -> Way:
    advice = "needed only to mount without any right: a seccomp and AppArmor profile that allows unshare and mount"
    if device:
        return Way("userns", device, "start the container with --device /dev/fuse, or a device plugin")
    lacks, _ = _trial("userns")
    if not lacks:
        return Way("userns")
    for name, bad in (
        ("user/max_user_namespaces", "0"),
        ("kernel/unprivileged_userns_clone", "0"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1"),
    ):
        try:
            if (Path("/proc/sys") / name).read_text().strip() == bad:
                lacks += f", {name.replace('/', '.')} = {bad}"
        except OSError:
            continue
    return Way("userns", lacks, advice)


# --- trials ------------------------------------------------------------------------------------------------------------


def _trial(way: Name) -> tuple[str, str]:
    """What the trial of `way` says is lacking, and what to do; empty texts if it mounted."""
    try:
        tried = subprocess.run(
            [sys.executable, "-c", f"from nbmountd.ways import try_in_this_process as t; t({way!r})"], cwd="/",
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TRIAL_LIMIT, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"the trial ended with {type(exc).__name__}", ""
    if tried.returncode == 0:
        return "", ""
    reason = (tried.stderr.strip().splitlines() or [f"status {tried.returncode}"])[-1]
    return reason, "the container's seccomp or AppArmor profile forbids it"


def try_in_this_process(way: Name) -> None:
    """Mounts as `way` does, in a mount namespace that ends with this process; ends it with a line if that fails."""
    from nbmountd import namespace as spaces

    try:
        if way == "userns":
            spaces.enter()
        else:
            spaces.enter_mounts_only()
        spaces.try_to_mount(DEVICE)
    except spaces.NamespaceError as exc:
        sys.exit(str(exc))
