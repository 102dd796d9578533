"""What the status of an HTTP answer means in general. It knows nothing of any protocol on top."""

from __future__ import annotations

import http
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from nbmountd.backends.connections import SAFE_METHODS
from nbmountd.backends.http_exchange import Answer
from nbmountd.errors import (
    NameRefused,
    RemoteDenied,
    RemoteError,
    RemoteFull,
    RemoteLocked,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteTimeout,
    RemoteTooLarge,
    RemoteUnavailable,
    RemoteUnsupported,
    Unauthenticated,
    VersionMismatch,
)

THROTTLED_WAIT = 60.0
"""Seconds to leave a server alone that says "too many requests" and not until when."""

MAINTENANCE_WAIT = 20.0
"""Seconds after which a server in maintenance mode is asked again."""


def error_of(answer: Answer, what: str) -> RemoteError:
    """The error that an answer with status 300 or more means in general; a protocol may know better for some.

    The text holds nothing that the server wrote: it may echo secrets or be meant for a terminal.
    """
    status = answer.status
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = "unknown status"
    text = f"{what}: {status} {phrase}"
    wait = retry_after(answer.headers)
    in_doubt = what.split(" ", 1)[0] not in SAFE_METHODS
    if status < 400:
        return RemoteProtocolError(f"{text}: redirects are not followed")
    if status == 429:
        # Nextcloud does not say how long; each further request makes it longer, for everybody behind our address.
        return RemoteUnavailable(text, retry_after=wait or THROTTLED_WAIT)
    if status == 503 and b"MaintenanceMode" in answer.body:
        return RemoteUnavailable(f"{text}: the server is in maintenance mode", retry_after=wait or MAINTENANCE_WAIT)
    if status in (503, 425):
        return RemoteUnavailable(text, retry_after=wait)
    if status in (408, 504):
        return RemoteTimeout(text, retry_after=wait, in_doubt=in_doubt)
    if status == 423:
        return RemoteLocked(text, retry_after=wait)
    if kind := _FINAL.get(status):
        return kind(text)
    if status >= 500:
        return RemoteUnavailable(text, retry_after=wait, in_doubt=in_doubt)
    return RemoteDenied(text)


_FINAL: dict[int, type[RemoteError]] = {
    401: Unauthenticated,
    403: RemoteDenied,
    404: RemoteNotFound,
    405: RemoteUnsupported,
    410: RemoteNotFound,
    412: VersionMismatch,
    413: RemoteTooLarge,
    414: NameRefused,
    416: RemoteProtocolError,
    501: RemoteUnsupported,
    507: RemoteFull,
}


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait (RFC 9110, section 10.2.3: a number or a date), or None."""
    value = headers.get("retry-after", "").strip()
    if not value:
        return None
    if value.isascii() and value.isdigit():
        return float(min(int(value[:9]), 24 * 3600))
    try:
        at = parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(at - time.time(), 0.0), 24 * 3600.0)
