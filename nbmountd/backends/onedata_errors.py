"""What a refusal of Onedata means: one table of errnos, one of error ids, and the reasons why tokens are refused.

Pure; it knows nothing of requests. Sources: op-worker (rest_translator.erl), ctool (errors.erl), onedata-errors for the
25 line. Texts hold only words of these tables, never what a server wrote.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from nbmountd.backends.connections import SAFE_METHODS
from nbmountd.backends.http_errors import error_of, retry_after
from nbmountd.backends.http_exchange import Answer
from nbmountd.backends.hygiene import NOT_JSON
from nbmountd.errors import (
    NameRefused,
    ParentMissing,
    RemoteDenied,
    RemoteError,
    RemoteExists,
    RemoteFull,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteTooLarge,
    RemoteUnavailable,
    RemoteUnsupported,
)


class _Details(msgspec.Struct, frozen=True):
    errno: Any = None
    auth_error: Any = msgspec.field(default=None, name="authError")


class _Error(msgspec.Struct, frozen=True):
    id: str = ""
    details: Any = None


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _Error


POSIX: dict[str, type[RemoteError]] = {
    "enoent": RemoteNotFound,
    "eexist": RemoteExists,
    "enotempty": RemoteExists,
    "eisdir": RemoteExists,
    "enotdir": ParentMissing,
    "eacces": RemoteDenied,
    "eperm": RemoteDenied,
    "erofs": RemoteDenied,
    "enospc": RemoteFull,
    "edquot": RemoteFull,
    "efbig": RemoteTooLarge,
    "enametoolong": NameRefused,
    "enotsup": RemoteUnsupported,
    "eopnotsupp": RemoteUnsupported,
    "enosys": RemoteUnsupported,
    "einval": RemoteUnsupported,
    "enodata": RemoteNotFound,
    "eagain": RemoteUnavailable,
    "ebusy": RemoteUnavailable,
    "etimedout": RemoteUnavailable,
}
"""Most refusals of file operations are status 400 with `posix` and one of these. The unknown become RemoteProtocolError."""

IDS: dict[str, type[RemoteError]] = {
    "quotaExceeded": RemoteFull,
    "badValueIdentifier": RemoteNotFound,
    "badValueFilePath": NameRefused,
    "notSupported": RemoteUnsupported,
    "spaceNotSupportedBy": RemoteDenied,
    "userNotSupported": RemoteDenied,
    "forbidden": RemoteDenied,
    "notFound": RemoteNotFound,
    "alreadyExists": RemoteExists,
    "notImplemented": RemoteUnsupported,
}

UNAVAILABLE = frozenset({
    "internalServerError", "serviceUnavailable", "temporaryFailure", "timeout", "noConnectionToOnezone",
    "noConnectionToPeerOneprovider", "noConnectionToClusterNode", "unregisteredOneprovider",
    "externalServiceOperationFailed",
})  # fmt: skip

BAD_INPUT = re.compile(r"badValue\w*|badData|missingRequiredValue|malformedData")


class BadInput(RemoteUnsupported):
    """The provider does not understand a parameter; an older or newer one may."""


def error_id(answer: Answer) -> tuple[str, str]:
    """(id, errno) of an error body; empty where there is none."""
    try:
        error = msgspec.json.decode(answer.body, type=_ErrorBody).error
        errno = msgspec.convert(error.details, _Details).errno if isinstance(error.details, dict) else None
    except NOT_JSON:
        return "", ""
    return error.id, errno if isinstance(errno, str) else ""


def error_of_answer(answer: Answer, what: str) -> RemoteError:
    """The error that an answer of status 300 or more means. The text holds only words of our own tables."""
    id, errno = error_id(answer)
    in_doubt = what.split(" ", 1)[0] not in SAFE_METHODS
    wait = retry_after(answer.headers)
    if id == "posix":
        kind = POSIX.get(errno, RemoteProtocolError)
        known = errno if errno in POSIX else "an unknown errno"
        return kind(f"{what}: {known}", in_doubt=in_doubt and kind in (RemoteProtocolError, RemoteUnavailable))
    if id in IDS:
        return IDS[id](f"{what}: {id}")
    if id in UNAVAILABLE:
        return RemoteUnavailable(f"{what}: {id}", retry_after=wait, in_doubt=in_doubt)
    if BAD_INPUT.fullmatch(id) and answer.status == 400:
        return BadInput(f"{what}: the provider does not accept the request (400)")
    return error_of(answer, what)


def refusal_reason(body: bytes) -> str:
    """Why a token was refused, in words of ours."""
    try:
        error = msgspec.json.decode(body, type=_ErrorBody).error
        details = msgspec.convert(error.details, _Details)
        nested = details.auth_error if isinstance(details.auth_error, dict) else {}
        caveat = nested["details"]["caveat"] if nested.get("id") == "tokenCaveatUnverified" else {}
        kind, value = str(caveat.get("type", "")), caveat.get("interface")
    except (*NOT_JSON, KeyError, TypeError, AttributeError):
        return "is refused"
    if kind == "interface" and value == "oneclient":
        return "is limited to oneclient, REST needs another"
    if kind in ("time", "service", "interface", "ip", "data.path"):
        return f"is refused because of its caveat {kind}"
    return {"tokenRevoked": "has been revoked", "tokenInvalid": "is not valid"}.get(str(nested.get("id")), "is refused")
