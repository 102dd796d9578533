"""The last look at what any remote said of an object, before nodes, database and kernel believe it.

Each backend checks its own answers; this holds for all of them, whatever one has overlooked. Pure; it knows no protocol.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import msgspec

from nbmountd.errors import RemoteProtocolError
from nbmountd.log import get_logger
from nbmountd.model import Attributes, Entry

NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding a remote's JSON raises; the last one is for nesting without end."""

LONGEST_NAME = 255
"""Bytes (NAME_MAX). The kernel answers a whole readdir with EIO if a single name has more than 1024."""
LONGEST_TARGET = 4095
"""Bytes of a symlink's target (PATH_MAX)."""
LARGEST_SIZE = 2**62
"""Bytes. The database and the kernel count in signed 64 bits."""
_TIMES = range(-(2**63), 2**63)
"""Nanoseconds: from 1677 to 2262, which is what fits into signed 64 bits. What is outside is no time that a file has."""

_log = get_logger(__name__)


def fit_entries(entries: Iterable[Entry], where: object) -> list[Entry]:
    """The entries of a listing that can be shown; others are left out, with a line in the log."""
    kept = []
    for entry in entries:
        try:
            kept.append(fit(entry))
        except RemoteProtocolError as exc:
            _log.warning("not shown", directory=str(where), name=entry.name[:LONGEST_NAME], cause=exc)
    return kept


def fit(entry: Entry) -> Entry:
    """The entry, without attributes that cannot be. Raises RemoteProtocolError for one that would leave its directory, or that
    neither database nor kernel can hold."""
    name = entry.name
    ordinary = name.isascii() and len(name) <= LONGEST_NAME and "/" not in name and "\0" not in name and name not in (".", "..")
    if not ordinary and (problem := name_problem(name)):
        raise RemoteProtocolError(problem)
    if entry.size is not None and not 0 <= entry.size < LARGEST_SIZE:
        raise RemoteProtocolError("an impossible size")
    if not ((entry.version or "").isascii() and (entry.id or "").isascii()) and not (
        _is_text(entry.version) and _is_text(entry.id)
    ):
        raise RemoteProtocolError("a version or an id that is no text")
    attributes = _fit_attributes(entry.attributes)
    if attributes.target is None and entry.attributes.target is not None:
        raise RemoteProtocolError("a symlink to what is no path")
    return entry if attributes is entry.attributes else replace(entry, attributes=attributes)


def name_problem(name: str) -> str:
    """Why `name` is none that a directory could hold; "" if it is one. The root's is empty, and is not asked for here."""
    if name in (".", "..") or "/" in name or "\0" in name:
        return "a name that would lead elsewhere"
    try:
        size = len(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return "a name that is no text"
    return f"a name of more than {LONGEST_NAME} bytes" if size > LONGEST_NAME else ""


def _fit_attributes(told: Attributes) -> Attributes:
    kept = told
    if told.mtime_ns is not None and told.mtime_ns not in _TIMES:
        kept = replace(kept, mtime_ns=None)
    if told.mode is not None and not 0 <= told.mode <= 0o7777:
        kept = replace(kept, mode=None)
    if told.target is not None and ("\0" in told.target or not 0 < _length(told.target) <= LONGEST_TARGET):
        kept = replace(kept, target=None)
    if told.xattrs and any("\0" in name or not 0 < _length(name) <= LONGEST_NAME for name in told.xattrs):
        xattrs = {name: value for name, value in told.xattrs.items() if "\0" not in name and 0 < _length(name) <= LONGEST_NAME}
        kept = replace(kept, xattrs=xattrs)
    return kept


def _length(text: str) -> int:
    """Bytes; 0 if it is no text."""
    try:
        return len(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return 0


def _is_text(text: str | None) -> bool:
    return not text or _length(text) > 0
