"""Whose mounts they are when root runs the daemon, and how a worker becomes that user for good.

It knows nothing of what the process does before or after.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path

from nbmountd.errors import ConfigError, StateError

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38


def owner_of_mounts(paths: Iterable[str], environ: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """For whom root mounts at `paths`, as (uid, gid); None to stay who we are.

    The environment of a notebook container says it (`NB_UID`, `NB_GID`: jupyter's start.sh refits the user to them). Without
    it, it is the owner of the directory that holds the first mount point, if that is not root. A daemon has one owner.
    Raises ConfigError when the environment holds no number.
    """
    if os.geteuid() != 0:
        return None
    if uid_text := environ.get("NB_UID"):
        try:
            uid = int(uid_text)
            gid = int(environ["NB_GID"]) if environ.get("NB_GID") else _group_of(uid)
        except ValueError as exc:
            raise ConfigError("NB_UID and NB_GID in the environment must be numbers") from exc
        return (uid, gid) if uid != 0 else None
    for path in paths:
        holder = next(parent for parent in Path(path).parents if parent.is_dir())
        found = holder.stat()
        return (found.st_uid, _group_of(found.st_uid, found.st_gid)) if found.st_uid != 0 else None
    return None


def drop_privileges(uid: int, gid: int) -> None:
    """Makes this process `uid`/`gid` with that user's groups, no capability, and no way back (PR_SET_NO_NEW_PRIVS).

    Call it before the first thread is started and before the first byte from a remote is read. Without root's rights it only
    checks that there is nothing to do. Raises StateError when the process is not that user afterwards.
    """
    if os.geteuid() == 0 and uid != 0:
        try:
            groups = os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
        except KeyError:  # a uid without a name is common in containers
            groups = [gid]
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise StateError(f"PR_SET_NO_NEW_PRIVS: {os.strerror(ctypes.get_errno())}")
    if os.getresuid() != (uid, uid, uid):
        raise StateError(f"this process is uid {os.geteuid()} and cannot become uid {uid}")


def keep_memory_private() -> None:
    """No core dump of this process and its children, and no look into its memory and first environment by processes of the same
    user (prctl(2), PR_SET_DUMPABLE: ptrace and most of /proc/pid belong to root then). Lasts until another program is executed,
    or the user changes; call it again then.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _group_of(uid: int, default: int | None = None) -> int:
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:
        return uid if default is None else default
