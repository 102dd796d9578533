"""Every error that crosses a module border, in one tree.

NbmountdError
├─ LocalError: the normal answers of a file system ("no such file"); fuse/errno_map.py gives each its errno
│  └─ NotFound, Exists, NotADirectory, IsADirectory, NotEmpty, AccessDenied, NotPermitted, ReadOnlyMount, NameTooLong,
│     InvalidArgument, NoSpace, QuotaExceeded, FileTooLarge, CrossDevice, NotSupported, NoAttribute, StaleFile
├─ RemoteError: the far side failed or refused; `transient` says whether time alone may heal it
│  ├─ transient: RemoteUnavailable, RemoteTimeout, RemoteLocked
│  └─ final: RemoteNotFound, RemoteExists, VersionMismatch, ParentMissing, RemoteDenied, Unauthenticated, RemoteFull,
│     RemoteTooLarge, NameRefused, RemoteUnsupported, RemoteProtocolError
├─ ConfigError: the configuration is wrong; the text names the place
└─ StateError: the state directory cannot be used (locked by another daemon, unreadable database)

A message is for a person and never holds a secret. Nothing here inherits OSError: an errno is the business of fuse/.
"""

from __future__ import annotations


class NbmountdError(Exception):
    """Base of all errors of this project."""


class ConfigError(NbmountdError):
    """The configuration is wrong. The message names file, table and key, and what would be right."""


class StateError(NbmountdError):
    """The state directory cannot be used as it is."""


# --- local -----------------------------------------------------------------------------------------------------------


class LocalError(NbmountdError):
    """A normal negative answer of the file system."""


class NotFound(LocalError):
    """ENOENT."""


class Exists(LocalError):
    """EEXIST."""


class NotADirectory(LocalError):
    """ENOTDIR."""


class IsADirectory(LocalError):
    """EISDIR."""


class NotEmpty(LocalError):
    """ENOTEMPTY."""


class AccessDenied(LocalError):
    """EACCES."""


class NotPermitted(LocalError):
    """EPERM."""


class ReadOnlyMount(LocalError):
    """EROFS."""


class NameTooLong(LocalError):
    """ENAMETOOLONG."""


class InvalidArgument(LocalError):
    """EINVAL."""


class NoSpace(LocalError):
    """ENOSPC: no room on the local disk for bytes that are not yet safe."""


class QuotaExceeded(LocalError):
    """EDQUOT: the remote's quota would be exceeded."""


class FileTooLarge(LocalError):
    """EFBIG: larger than the remote can hold."""


class CrossDevice(LocalError):
    """EXDEV."""


class NotSupported(LocalError):
    """EOPNOTSUPP."""


class NoAttribute(LocalError):
    """ENODATA: no such extended attribute."""


class StaleFile(LocalError):
    """ESTALE: bytes of a version that the remote no longer has, and that were not kept here."""


# --- remote ----------------------------------------------------------------------------------------------------------


class RemoteError(NbmountdError):
    """The remote failed or refused.

    `transient`: repeating later may help, with nothing changed. `retry_after`: seconds the remote asked us to wait, or
    None. `in_doubt`: the request may have been carried out although no answer came (set by backends for verbs that
    change something); the caller must ask before it repeats.
    """

    transient = False

    def __init__(self, message: str, *, retry_after: float | None = None, in_doubt: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.in_doubt = in_doubt


class RemoteUnavailable(RemoteError):
    """No connection, a broken one, 5xx, 429, maintenance."""

    transient = True


class RemoteTimeout(RemoteUnavailable):
    """No answer within the deadline."""


class RemoteLocked(RemoteError):
    """Somebody holds a lock on the object, or an earlier upload is still being put together (423)."""

    transient = True


class RemoteNotFound(RemoteError):
    """The object is not there."""


class RemoteExists(RemoteError):
    """Something with that name is there already."""


class VersionMismatch(RemoteError):
    """The object is there in another version than the one the request was conditional on."""


class ParentMissing(RemoteError):
    """The directory that should hold the object is not there."""


class RemoteDenied(RemoteError):
    """Known to the remote, but not allowed (403)."""


class Unauthenticated(RemoteError):
    """The credential is missing, wrong or expired (401). Never repeated with the same credential."""


class RemoteFull(RemoteError):
    """Quota or space of the remote is used up (507)."""


class RemoteTooLarge(RemoteError):
    """The object is larger than the remote accepts (413)."""


class NameRefused(RemoteError):
    """The remote does not accept this name."""


class RemoteUnsupported(RemoteError):
    """The remote has no such operation."""


class RemoteProtocolError(RemoteError):
    """The answer makes no sense: not the format, cut, or out of bounds. Nothing may be concluded from it."""

    transient = True
