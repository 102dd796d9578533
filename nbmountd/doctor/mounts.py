"""The doctor's look at what the configuration names: directories, mount points, credential files.

It never reads a credential for more than whether there is one, and asks a mount only from a child process, which may hang.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from nbmountd import places
from nbmountd.config import Config, DirectoryOptions, MountConfig, OnedataNativeOptions, WebDAVOptions
from nbmountd.doctor.check import Check
from nbmountd.errors import StateError
from nbmountd.units import show_size

_LITTLE_SPACE = 2**30
_MOUNT_TIMEOUT = 3.0
_LIBRARY_TIMEOUT = 30.0
_PROBE = "import os, sys\ntry: os.statvfs(sys.argv[1])\nexcept OSError as e: sys.exit(e.errno)"

_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "beegfs", "9p", "virtiofs"})
_GONE_AT_RESTART = frozenset({"tmpfs", "overlay", "ramfs"})


def examine(config: Config, environ: Mapping[str, str] = os.environ) -> Iterable[Check]:
    """All findings on the places that `config` names."""
    types = _mount_points()
    yield _directory("state_dir", Path(config.daemon.state_dir), types, keeps_unsent=True)
    yield _directory("cache_dir", Path(config.daemon.cache_dir), types, keeps_unsent=False)
    yield _socket_place(environ)
    for mount in config.mounts:
        yield _mount_point(mount, types)
        yield from _credentials(mount, environ)


# --- directories -------------------------------------------------------------------------------------------------------


def _mount_points() -> dict[str, str]:
    """Mount point -> file system type; the topmost wins (proc(5), mountinfo)."""
    found = {}
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines():
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), left.split(" ")[4])
        found[point] = right.split(" ")[0]
    return found


def _type_at(path: Path, types: Mapping[str, str]) -> str:
    for parent in (path, *path.parents):
        if str(parent) in types:
            return types[str(parent)]
    return "unknown"


def _directory(subject: str, path: Path, types: Mapping[str, str], *, keeps_unsent: bool) -> Check:
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return Check("fail", subject, f"{existing} is in the way: not a directory", f"choose another {subject}")
    if existing == path:
        try:
            places.private_directory(path)
        except StateError as exc:
            return Check("fail", subject, str(exc), "or choose another directory in [daemon]")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check("fail", subject, f"{existing} cannot be written to", "chown it, or choose another directory")
    space = os.statvfs(existing)
    free = space.f_bavail * space.f_frsize
    kind = _type_at(existing.resolve(), types)
    finding = f"{path}, {'' if existing == path else 'not made yet, '}{show_size(free)} free on {kind}"
    if free < _LITTLE_SPACE:
        return Check("warn", subject, finding, "little space: programs will see ENOSPC before it is used up")
    if keeps_unsent and kind in _GONE_AT_RESTART:
        advice = "what is not sent yet would be lost with the container: put state_dir on a persistent volume"
        return Check("warn", subject, finding, advice)
    if not keeps_unsent and kind in _NETWORK:
        return Check("warn", subject, finding, "a cache on the network is slow: put cache_dir on a local disk")
    return Check("ok", subject, finding)


def _socket_place(environ: Mapping[str, str]) -> Check:
    path = places.find_control_socket(environ)
    directory = path.parent
    while not directory.exists():
        directory = directory.parent
    if not os.access(directory, os.W_OK | os.X_OK):
        return Check("ok", "control socket", f"not at {path} (no right); the daemon takes the next place")
    return Check("ok", "control socket", str(path))


# --- mount points ------------------------------------------------------------------------------------------------------


def _mount_point(mount: MountConfig, types: Mapping[str, str]) -> Check:
    subject, path = f"{mount.name} at", Path(mount.path)
    if kind := types.get(os.path.realpath(path.parent) + "/" + path.name, ""):
        return _mounted(subject, path, kind)
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return Check("ok", subject, f"{path}: will be made")
    except OSError as exc:
        return Check("fail", subject, f"{path}: {exc.strerror}", "choose another path for this mount")
    if names:
        advice = f"nothing is mounted over data: mv {path} {path}.local, mount, and copy them in"
        return Check("warn", subject, f"{path}: holds {len(names)} local files, and nothing is mounted", advice)
    return Check("ok", subject, f"{path}: empty, not mounted")


def _mounted(subject: str, path: Path, kind: str) -> Check:
    """Asks the mount in a child, which is left behind if it hangs: a caller of a hung mount cannot be ended."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PROBE, str(path)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )
    try:
        status = child.wait(_MOUNT_TIMEOUT)
    except subprocess.TimeoutExpired:
        child.kill()
        return Check("fail", subject, f"{path}: mounted ({kind}), does not answer", "see the daemon's log; restart the daemon")
    if status == errno.ENOTCONN:
        return Check("fail", subject, f"{path}: a dead mount", f"start the daemon, or: umount -l {path} (fusermount3 -uz)")
    if status != 0:
        return Check("warn", subject, f"{path}: mounted ({kind}): {os.strerror(status)}", "see the daemon's log")
    if not kind.startswith("fuse"):
        return Check("fail", subject, f"{path}: another file system ({kind}) is mounted there", "choose another path")
    return Check("ok", subject, f"{path}: mounted, answers")


# --- credentials -------------------------------------------------------------------------------------------------------


def _credentials(mount: MountConfig, environ: Mapping[str, str]) -> Iterable[Check]:
    if isinstance(mount.options, DirectoryOptions):
        if not Path(mount.options.source).is_dir():
            finding = f"{mount.options.source} is not a directory"
            yield Check("fail", f"{mount.name} source", finding, "make it, or correct source")
    elif isinstance(mount.options, WebDAVOptions):
        yield from _webdav_credentials(mount.name, mount.options, environ)
    elif isinstance(mount.options, OnedataNativeOptions):
        yield _library(mount.name, mount.options)
        if mount.options.token_file is not None:
            yield _credential_file(f"{mount.name} credentials", Path(mount.options.token_file))
        if mount.options.token_env is not None:
            yield _credential_variable(f"{mount.name} credentials", mount.options.token_env, environ)


def _library(name: str, options: OnedataNativeOptions) -> Check:
    """Whether the interpreter has the driver; a foreign library, so in a child."""
    subject, module = f"{name} library", f"fs.{options.library}"
    try:
        found = subprocess.run(
            [options.python, "-c", f"import {module}"], cwd="/", stdin=subprocess.DEVNULL, capture_output=True,
            timeout=_LIBRARY_TIMEOUT, check=False,
        )  # fmt: skip
    except OSError as exc:
        return Check("fail", subject, f"{options.python} cannot be run: {exc.strerror}", "correct `python`")
    except subprocess.TimeoutExpired:
        return Check("fail", subject, f"{options.python} does not import {module} in {_LIBRARY_TIMEOUT:.0f} s", "look why")
    if found.returncode:
        why = found.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        finding = f"{options.python} cannot import {module}: {why}"
        return Check("fail", subject, finding, "install it there, or correct `python`")
    return Check("ok", subject, f"{module} of {options.python}")


def _webdav_credentials(name: str, options: WebDAVOptions, environ: Mapping[str, str]) -> Iterable[Check]:
    subject = f"{name} credentials"
    checks = [_credential_file(subject, Path(file)) for file in (options.password_file, options.token_file) if file]
    checks += [
        _credential_variable(subject, variable, environ) for variable in (options.password_env, options.token_env) if variable
    ]
    if options.token_command is not None:
        program = options.token_command[0] if options.token_command else ""
        if shutil.which(program) is None:
            checks.append(Check("fail", subject, f"token_command: there is no program {program!r}", "correct its path"))
        else:
            checks.append(Check("ok", subject, f"from the program {program}"))
    if options.password is not None:
        checks.append(Check("ok", subject, "a password in the configuration (password_file is safer)"))
    if not checks and options.user is not None:
        checks.append(Check("warn", subject, f"a user ({options.user}) without a password", "give password_file"))
    if options.ca_bundle is not None and not os.access(options.ca_bundle, os.R_OK):
        checks.append(Check("fail", f"{name} ca_bundle", f"{options.ca_bundle} cannot be read", "correct ca_bundle"))
    return checks


def _credential_file(subject: str, path: Path) -> Check:
    later = "the mount starts without and goes on by itself when it is there"
    try:
        found = path.stat()
    except FileNotFoundError:
        return Check("warn", subject, f"{path} is not there", later)
    except OSError as exc:
        return Check("fail", subject, f"{path}: {exc.strerror}", "make it readable for this user")
    if not stat.S_ISREG(found.st_mode):
        return Check("fail", subject, f"{path} is not a file", "name the file itself")
    if not os.access(path, os.R_OK):
        return Check("fail", subject, f"{path} cannot be read by uid {os.geteuid()}", "make it readable for this user")
    if found.st_size == 0:
        return Check("warn", subject, f"{path} is empty", later)
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        return Check("warn", subject, f"{path}: others can read it (mode {mode:04o})", f"chmod 600 {path}")
    return Check("ok", subject, f"{path}: there, only for its owner")


def _credential_variable(subject: str, variable: str, environ: Mapping[str, str]) -> Check:
    if not environ.get(variable):
        return Check("warn", subject, f"the variable {variable} is not set here", "the daemon needs it in its environment")
    return Check("ok", subject, f"from the variable {variable}")
