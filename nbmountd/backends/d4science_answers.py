"""What StorageHub's failures mean: the exception class it names comes first, then the status, which is often misleading.

Pure. 406 is what the server answers to any failure in its repository, a missing id among them ("something failed"); what
it means only a look can tell, so it is an error of its own here, `Unclear`. Nothing that the server wrote gets into an
error's text: it may echo secrets.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from nbmountd.backends.connections import SAFE_METHODS
from nbmountd.backends.http_errors import error_of
from nbmountd.backends.http_exchange import Answer
from nbmountd.backends.hygiene import NOT_JSON
from nbmountd.errors import (
    RemoteDenied,
    RemoteError,
    RemoteExists,
    RemoteFull,
    RemoteLocked,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteUnsupported,
)


class Unclear(RemoteProtocolError):
    """406 by the service itself: something failed; often, but not surely, that there is no such id."""


class BadCall(RemoteUnsupported):
    """400 by the service itself. For a move: that it would cross the border of a shared folder."""


def failure(answer: Answer, what: str) -> RemoteError:
    """The error for an answer of status 300 or more. `what` begins with the method."""
    name = exception_class(answer)
    text = f"{what}: {answer.status}" + (f" {name}" if name else "")
    in_doubt = what.split(" ", 1)[0] not in SAFE_METHODS
    if name.endswith("IdNotFoundException"):
        return RemoteNotFound(text)
    if name.endswith("UserNotAuthorizedException"):
        return RemoteDenied(text)
    if name.endswith("ItemAlreadyExistsException"):
        return RemoteExists(text)
    if name.endswith("ItemLockedException") or answer.status == 409:
        return RemoteLocked(text)
    if name.endswith("InvalidItemException"):
        return RemoteDenied(text)  # a permanent 500: the operation does not fit the item
    if answer.status == 400:
        return BadCall(text)
    if answer.status == 406:
        if is_own(answer):
            return Unclear(text, in_doubt=in_doubt)
        return RemoteProtocolError(f"{text}: not by the service itself")
    if answer.status == 507 or (answer.status >= 500 and re.search(rb"(?i)\bquota\b", answer.body)):
        return RemoteFull(text)
    if name and answer.status >= 500:
        return RemoteProtocolError(text, in_doubt=in_doubt)  # the service itself answered: it is not away
    return error_of(answer, what)


def exception_class(answer: Answer) -> str:
    """The exception that the service names, without its package; "" when there is none."""
    try:
        told: Any = msgspec.json.decode(answer.body)
    except NOT_JSON:
        told = answer.body[:200].decode("ascii", "replace").partition("@")[0]
    if isinstance(told, dict):
        told = told.get("exceptionClass")
    match = re.fullmatch(r"(?:[A-Za-z_]\w*\.)+([A-Za-z_]\w{0,79})", told) if isinstance(told, str) else None
    return match[1] if match else ""


def is_own(answer: Answer) -> bool:
    """Whether the service itself failed, and not a proxy or the container before it."""
    return "GXErrorResponse" in answer.headers.get("etag", "") or bool(exception_class(answer))


def refuses_the_token(answer: Answer) -> bool:
    """Whether the credential is not accepted. The container in front of the service answers so, without an exception class
    and, as far as is known, not always with 401; a refusal by the service itself is about permission.
    """
    if is_own(answer):
        return False
    if answer.status == 401:
        return True
    return answer.status in (400, 403, 500) and re.search(rb"(?i)\btoken\b", answer.body[:4096]) is not None
