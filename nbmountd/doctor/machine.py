"""The doctor's look at the machine: Python, kernel, /dev/fuse, and which way of mounting is open to us.

It knows no configuration. The ways to mount, and which of them worked in which container, were tried out on Linux 6.18 with
libfuse 3.14: mount(2) with CAP_SYS_ADMIN; the setuid helper fusermount3; an own user and mount namespace.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nbmountd.doctor.check import Check

_OLDEST_PYTHON = (3, 10)
_OLDEST_KERNEL = (4, 18)  # FUSE can be mounted in a user namespace since then
_RESEND_KERNEL = (6, 9)  # FUSE_NOTIFY_RESEND
_ENOUGH_FILES = 4096
_CHILD_TIMEOUT = 20.0
_CAP_SYS_ADMIN = 1 << 21  # linux/capability.h

_USER_NAMESPACE = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x10000000 | 0x00020000) and 1)"  # NEWUSER, NEWNS


def examine() -> Iterable[Check]:
    """All findings on the machine."""
    yield from _python()
    yield _kernel()
    rights = Rights.of_this_process()
    device = _device()
    helper = _helper(rights)
    namespace = _user_namespace()
    yield device
    yield rights.check()
    yield helper
    yield namespace
    yield _way_to_mount(rights, device, helper, namespace)
    yield _open_files()


# --- Python ------------------------------------------------------------------------------------------------------------


def _python() -> Iterable[Check]:
    version = platform.python_version()
    if sys.version_info < _OLDEST_PYTHON:
        yield Check("fail", "python", version, "3.10 or newer is needed")
    else:
        yield Check("ok", "python", f"{version} at {sys.executable}")
    found, missing = [], []
    for name in _required_packages():
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Check("fail", "packages", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    else:
        yield Check("ok", "packages", ", ".join(found))
    # In a child: a library that is missing or broken must not take the doctor with it.
    loaded = subprocess.run(
        [sys.executable, "-c", "import pyfuse3"], capture_output=True, text=True, timeout=_CHILD_TIMEOUT, check=False
    )
    if loaded.returncode != 0:
        reason = (loaded.stderr.strip().splitlines() or [f"ended with {loaded.returncode}"])[-1]
        yield Check("fail", "pyfuse3", f"cannot be loaded: {reason}", "install libfuse3 (Debian: libfuse3-3) and pyfuse3")


def _required_packages() -> list[str]:
    """The names that our own metadata asks for; a fixed list when we run from a source tree."""
    try:
        wanted = metadata.requires("nbmountd") or []
    except metadata.PackageNotFoundError:
        wanted = ["pyfuse3", "trio", "msgspec", "click", "rich", "urllib3"]
    return [name[0] for text in wanted if ";" not in text and (name := re.match(r"[\w.-]+", text)) is not None]


# --- kernel ------------------------------------------------------------------------------------------------------------


def _kernel() -> Check:
    release = os.uname().release
    numbers = re.match(r"(\d+)\.(\d+)", release)
    version = (int(numbers[1]), int(numbers[2])) if numbers is not None else (0, 0)
    if version < _OLDEST_KERNEL:
        return Check("warn", "kernel", release, "older than 4.18: mounting needs root or fusermount3")
    if version < _RESEND_KERNEL:
        return Check(
            "warn", "kernel", f"{release}: before 6.9 it cannot hand calls in progress to a new worker",
            "after a crash, calls that were being served end with an error; nothing that was written is lost",
        )
    return Check("ok", "kernel", f"{release}: a crash of a worker is no error for programs")


def _device(path: Path = Path("/dev/fuse")) -> Check:
    try:
        if not stat.S_ISCHR(path.stat().st_mode):
            return Check("fail", str(path), "is not a device", "start the container with --device /dev/fuse")
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Check("fail", str(path), "is missing", "start the container with --device /dev/fuse (host: modprobe fuse)")
    except PermissionError as exc:
        if exc.errno == errno.EPERM:
            advice = "the container's device rules forbid it: start it with --device /dev/fuse, or a device plugin"
            return Check("fail", str(path), "exists but the device cgroup refuses it (EPERM)", advice)
        mode = stat.S_IMODE(path.stat().st_mode)
        return Check("fail", str(path), f"its mode {mode:04o} keeps us out (EACCES)", "chmod 0666 /dev/fuse, as root")
    except OSError as exc:
        return Check("fail", str(path), f"cannot be opened: {exc.strerror}", "load the kernel module: modprobe fuse")
    return Check("ok", str(path), "can be opened")


# --- rights ------------------------------------------------------------------------------------------------------------


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

    def check(self) -> Check:
        held = "held" if self.may_mount else "not held" if self.bounding & _CAP_SYS_ADMIN else "not in the bounding set"
        privileges = "no_new_privs is set" if self.no_new_privileges else "no_new_privs is not set"
        return Check("ok", "rights", f"uid {os.geteuid()}, CAP_SYS_ADMIN {held}, {privileges}")


def _helper(rights: Rights) -> Check:
    found = shutil.which("fusermount3")
    if found is None:
        return Check("warn", "fusermount3", "not installed", "needed only to mount without root (Debian: fuse3)")
    path = Path(found)
    if not path.stat().st_mode & stat.S_ISUID or path.stat().st_uid != 0:
        return Check("warn", "fusermount3", f"{found} is not setuid root", f"chown root {found} && chmod u+s {found}")
    if os.statvfs(path).f_flag & os.ST_NOSUID:
        return Check("warn", "fusermount3", f"{found} is on a file system mounted nosuid", "it cannot mount from there")
    if rights.no_new_privileges:
        return Check(
            "warn", "fusermount3", "cannot become root: no_new_privs is set",
            "Kubernetes: allowPrivilegeEscalation: true in the container's securityContext",
        )
    if not rights.helper_may_mount:
        return Check(
            "warn", "fusermount3", "cannot mount: CAP_SYS_ADMIN is not in the bounding set",
            "start the container with --cap-add SYS_ADMIN",
        )
    return Check("ok", "fusermount3", f"{found}, setuid root")


def _user_namespace() -> Check:
    # Tried, not guessed: sysctls, seccomp and AppArmor all have a say.
    try:
        tried = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _USER_NAMESPACE], capture_output=True, timeout=_CHILD_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return Check("warn", "user namespace", "the trial did not end", "mount as root or by fusermount3")
    if tried.returncode == 0:
        return Check("ok", "user namespace", "can be made")
    reasons = []
    for name, bad in (
        ("user/max_user_namespaces", "0"),
        ("kernel/unprivileged_userns_clone", "0"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1"),
    ):
        try:
            if (Path("/proc/sys") / name).read_text().strip() == bad:
                reasons.append(f"{name.replace('/', '.')} = {bad}")
        except OSError:
            continue
    reason = ", ".join(reasons) or "seccomp or AppArmor profile of the container"
    return Check("warn", "user namespace", f"refused ({reason})", "needed only to mount without any right")


def _way_to_mount(rights: Rights, device: Check, helper: Check, namespace: Check) -> Check:
    if device.level == "fail":
        return Check("fail", "mounting", f"impossible without {device.subject}", device.advice)
    if rights.may_mount:
        return Check("ok", "mounting", "directly, with CAP_SYS_ADMIN")
    if helper.level == "ok":
        return Check("ok", "mounting", "by fusermount3")
    if namespace.level == "ok":
        return Check(
            "warn", "mounting", "only in a user and mount namespace of its own, where other processes do not see it",
            "start the daemon and Jupyter inside one: unshare -U --map-current-user --keep-caps -m CMD",
        )
    return Check(
        "fail", "mounting", "no way is open: no CAP_SYS_ADMIN, no usable fusermount3, no user namespace",
        "start the container with --cap-add SYS_ADMIN, or allow privilege escalation, or allow user namespaces",
    )


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = f"{soft} (hard limit {'none' if hard == resource.RLIM_INFINITY else hard})"
    if soft != resource.RLIM_INFINITY and soft < _ENOUGH_FILES:
        return Check("warn", "open files", shown, f"each open file takes one; ulimit -n {_ENOUGH_FILES}")
    return Check("ok", "open files", shown)
