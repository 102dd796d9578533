"""The doctor's look at the machine: Python, kernel, /dev/fuse, and which way of mounting is open to us.

It knows no configuration. The ways to mount are judged by ways.py.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from nbmountd.doctor.check import Check, Level
from nbmountd.ways import Rights, Way, all_ways

_OLDEST_PYTHON = (3, 10)
_OLDEST_KERNEL = (4, 18)  # FUSE can be mounted in a user namespace since then
_RESEND_KERNEL = (6, 9)  # FUSE_NOTIFY_RESEND
_ENOUGH_FILES = 4096
_CHILD_TIMEOUT = 20.0


def examine() -> Iterable[Check]:
    """All findings on the machine."""
    yield from _python()
    yield _kernel()
    yield _rights(Rights.of_this_process())
    yield from _ways(list(all_ways()), _device(), os.environ.get("NBMOUNTD_SIDECAR", ""))
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


# --- the ways to mount -------------------------------------------------------------------------------------------------

_WORDS = {
    "direct": "directly, with CAP_SYS_ADMIN (start mode F, or as root)",
    "fusermount3": "by fusermount3 (start mode A)",
    "helper": "by a mount helper (start mode P)",
    "userns": "in a user namespace, with 'nbmountd exec' alone (start mode D)",
}


def _rights(rights: Rights) -> Check:
    held = "held" if rights.may_mount else "in the bounding set" if rights.helper_may_mount else "not to be had"
    privileges = "no_new_privs is set" if rights.no_new_privileges else "no_new_privs is not set"
    return Check("ok", "rights", f"uid {os.geteuid()}, CAP_SYS_ADMIN {held}, {privileges}")


def _ways(judged: Sequence[Way], device: Check, sidecar: str) -> Iterable[Check]:
    """The device, each way, and the one that is taken. One open way is enough: what others lack is not to be repaired then."""
    chosen = next((way for way in judged if way.is_open), None)
    yield device if chosen is None and not sidecar else Check("ok", device.subject, device.finding)
    for way in judged:
        advice = way.advice if chosen is None else ""
        if way.is_open:
            yield Check("ok", f"way: {way.name}", "open")
        else:
            level: Level = "ok" if chosen or sidecar else "warn"
            yield Check(level, f"way: {way.name}", f"not open: {way.lacks}", advice)
    if chosen is not None:
        yield Check("ok", "mounting", _WORDS[chosen.name])
    elif sidecar:
        yield Check("ok", "mounting", f"not from here, and not needed: a sidecar mounts at {sidecar} (start mode S)")
    else:
        yield Check("fail", "mounting", "no way is open", "README, 'In a container', says what each way needs")


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = f"{soft} (hard limit {'none' if hard == resource.RLIM_INFINITY else hard})"
    if soft != resource.RLIM_INFINITY and soft < _ENOUGH_FILES:
        return Check("warn", "open files", shown, f"each open file takes one; ulimit -n {_ENOUGH_FILES}")
    return Check("ok", "open files", shown)
