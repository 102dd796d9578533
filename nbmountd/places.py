"""Where things live: the control socket, the state and the cache, and that nobody else can get at them.

It knows nothing of what is kept there. Directories are made with mode 0700. One that exists is taken only if it is a
real directory (no symlink) of our user or root, that no one else can write to. All failures are StateError.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from nbmountd.errors import StateError

SOCKET_NAME = "control.sock"
SIDECAR = "NBMOUNTD_SIDECAR"
"""Names a directory that a sidecar shares with the notebook's container: its mounts and, in `.run`, its control socket."""
_LOCK_WAIT = 10.0


def home(environ: Mapping[str, str] = os.environ) -> Path:
    """The user's home directory. Raises StateError when there is none."""
    value = environ.get("HOME", "")
    if value.startswith("/"):
        return Path(value)
    try:
        return Path.home()
    except RuntimeError as exc:
        raise StateError("there is no home directory: set HOME, or state_dir and cache_dir in [daemon]") from exc


def default_state_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Unsent bytes and databases: has to survive the container."""
    return _base("XDG_STATE_HOME", ".local/state", environ)


def default_cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Clean copies: may be deleted at any time while the daemon is not running."""
    return _base("XDG_CACHE_HOME", ".cache", environ)


def _base(variable: str, below_home: str, environ: Mapping[str, str]) -> Path:
    value = environ.get(variable, "")
    # The XDG base directory specification: a relative path is invalid and to be ignored.
    return (Path(value) if value.startswith("/") else home(environ) / below_home) / "nbmountd"


# --- the control socket ------------------------------------------------------------------------------------------------


def control_socket(
    environ: Mapping[str, str] = os.environ, *, uid: int | None = None, gid: int | None = None, run: Path = Path("/run")
) -> Path:
    """Where the daemon listens: the first place whose directory is there or can be made. Makes the directory.

    `uid` (and `gid`): the user for whom root runs the daemon; None means ourselves.
    """
    owner = None if uid is None else (uid, uid if gid is None else gid)
    reasons = []
    for path in _sockets(environ, uid, run):
        try:
            private_directory(path.parent, owner=owner)
        except StateError as exc:
            reasons.append(str(exc))
        else:
            return path
    raise StateError("no place for the control socket: " + "; ".join(reasons))


def find_control_socket(
    environ: Mapping[str, str] = os.environ, *, uid: int | None = None, run: Path = Path("/run")
) -> Path:
    """Where a client should look: the first place with a socket in it, else the place where one would be expected.

    The daemon may have been started with other XDG variables than ours, so all its places are looked at; root finds the
    daemons that root runs for users too.
    """
    candidates = _sockets(environ, uid, run)
    user = os.geteuid() if uid is None else uid
    others = sorted((run / "nbmountd").glob(f"*/{SOCKET_NAME}")) if user == 0 else []
    for path in [*candidates, run / "user" / str(user) / "nbmountd" / SOCKET_NAME, *others]:
        try:
            if stat.S_ISSOCK(path.lstat().st_mode):
                return path
        except OSError:
            continue
    return candidates[0]


def _sockets(environ: Mapping[str, str], uid: int | None, run: Path) -> list[Path]:
    user = os.geteuid() if uid is None else uid
    directories = []
    shared = environ.get(SIDECAR, "")
    if shared.startswith("/"):
        directories.append(Path(shared) / ".run")
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        directories.append(Path(runtime) / "nbmountd")
    directories.append(run / "nbmountd" / str(user))
    with suppress(StateError):
        directories.append(default_state_directory(environ) / "run")
    directories.append(Path("/tmp") / f"nbmountd-{user}")  # the last resort: ours, or refused by private_directory
    return [directory / SOCKET_NAME for directory in directories]


@contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """What to give bind(2) or connect(2) for the socket at `path`; it holds until the end of the block. Raises OSError.

    The address of a unix socket has 107 bytes (sun_path of unix(7)), and a path below a home or a temporary directory may
    have more: through a descriptor of its directory only the name counts.
    """
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


# --- directories -------------------------------------------------------------------------------------------------------


def mount_directory(base: Path, mount: str) -> Path:
    """The directory of one mount below the state or the cache directory, made if missing, 0700."""
    if not mount or "/" in mount or mount.startswith("."):
        raise StateError(f"{mount!r} cannot be the name of a directory")
    private_directory(base)
    path = private_directory(base / mount)
    path.chmod(0o700)
    return path


def private_directory(path: Path, *, owner: tuple[int, int] | None = None) -> Path:
    """`path`, which is then a directory that only its owner can write to; made with mode 0700 (parents too) if missing.

    `owner` (uid, gid): made by root for this user, and may be this user's already.
    """
    with _opened(path, owner):
        return path


@contextmanager
def locked_directory(path: Path, *, owner: tuple[int, int] | None = None) -> Iterator[int]:
    """`private_directory`, held under an exclusive lock; gives its descriptor. Raises StateError after 10 seconds."""
    with _opened(path, owner) as directory:
        deadline = time.monotonic() + _LOCK_WAIT
        while True:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StateError(f"{path}: another daemon holds this directory") from None
                time.sleep(0.02)
        yield directory


@contextmanager
def _opened(path: Path, owner: tuple[int, int] | None) -> Iterator[int]:
    if not path.is_absolute():
        raise StateError(f"{path}: a directory of the daemon must be an absolute path")
    try:
        _make(path, owner)
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        if path.is_symlink():
            raise StateError(f"{path}: is a symlink; name the directory it points to instead") from exc
        raise StateError(f"{path}: cannot be used as a directory: {exc.strerror}") from exc
    try:
        _check(path, os.fstat(directory), owner)
        yield directory
    finally:
        os.close(directory)


def _make(path: Path, owner: tuple[int, int] | None) -> None:
    missing = []
    step = path
    while not os.path.lexists(step):
        missing.append(step)
        step = step.parent
    for directory in reversed(missing):
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            continue
        if owner is not None and os.geteuid() == 0:
            os.chown(directory, *owner, follow_symlinks=False)


def _check(path: Path, found: os.stat_result, owner: tuple[int, int] | None) -> None:
    trusted = {os.geteuid(), 0}
    if owner is not None:
        trusted.add(owner[0])
    if found.st_uid not in trusted:
        raise StateError(f"{path}: belongs to user {found.st_uid}, not to user {os.geteuid()}; choose another directory")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(found.st_mode)
        raise StateError(f"{path}: others can write to it (mode {mode:04o}); chmod 0700 it, or choose another directory")
