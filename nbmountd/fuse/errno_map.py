"""The one table from our errors to errnos. Where it could be debated, the reason stands beside the row."""

from __future__ import annotations

import errno
import sqlite3

from nbmountd import errors

ERRNOS: dict[type[Exception], int] = {
    errors.NotFound: errno.ENOENT,
    errors.Exists: errno.EEXIST,
    errors.NotADirectory: errno.ENOTDIR,
    errors.IsADirectory: errno.EISDIR,
    errors.NotEmpty: errno.ENOTEMPTY,
    errors.AccessDenied: errno.EACCES,
    errors.NotPermitted: errno.EPERM,
    errors.ReadOnlyMount: errno.EROFS,
    errors.NameTooLong: errno.ENAMETOOLONG,
    errors.InvalidArgument: errno.EINVAL,
    errors.NoSpace: errno.ENOSPC,
    errors.QuotaExceeded: errno.EDQUOT,
    errors.FileTooLarge: errno.EFBIG,
    errors.CrossDevice: errno.EXDEV,
    errors.NotSupported: errno.EOPNOTSUPP,
    errors.NoAttribute: errno.ENODATA,
    errors.StaleFile: errno.ESTALE,
    errors.RemoteNotFound: errno.ENOENT,
    errors.ParentMissing: errno.ENOENT,
    errors.RemoteExists: errno.EEXIST,
    errors.VersionMismatch: errno.ESTALE,
    errors.RemoteDenied: errno.EACCES,
    errors.Unauthenticated: errno.EACCES,  # EKEYREJECTED says more, but programs know EACCES; status says why
    errors.RemoteFull: errno.EDQUOT,
    errors.RemoteTooLarge: errno.EFBIG,
    errors.NameRefused: errno.EINVAL,  # what Linux answers for a name that its file system cannot hold
    errors.RemoteUnsupported: errno.EOPNOTSUPP,
    errors.RemoteTimeout: errno.ETIMEDOUT,
    errors.RemoteUnavailable: errno.EHOSTDOWN,  # "Host is down" reads better than "Input/output error"; never EAGAIN
    errors.RemoteLocked: errno.EBUSY,
    errors.RemoteProtocolError: errno.EPROTO,
    errors.RemoteError: errno.EIO,
    errors.LocalError: errno.EIO,
}


def errno_of(exc: BaseException) -> int:
    """The errno that a program gets for `exc`; EIO for what is not in the table."""
    if isinstance(exc, OSError) and exc.errno is not None:
        return exc.errno  # of our own local files: ENOSPC, EDQUOT, EIO
    if isinstance(exc, sqlite3.OperationalError) and "full" in str(exc):
        return errno.ENOSPC
    for kind in type(exc).__mro__:
        if kind in ERRNOS:
            return ERRNOS[kind]
    return errno.EIO


def is_expected(exc: BaseException) -> bool:
    """Whether the error is an answer, not a bug of ours."""
    return isinstance(exc, (errors.NbmountdError, OSError)) or errno_of(exc) == errno.ENOSPC
