"""The name of a conflict copy, and the name that it is a copy of. Pure."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable

_MARK = re.compile(r" \(conflict \d{4}-\d\d-\d\d \d{4}(?: \d+)?\)")
_DOUBLE = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def conflict_name(name: str, when: datetime.datetime, taken: Callable[[str], bool], max_bytes: int = 255) -> str:
    """`name (conflict 2026-11-22 1403).ext`, numbered when taken, never longer than `max_bytes` in UTF-8.

    What is too long loses characters at the end of the stem, or its extension if that alone leaves no room.
    `max_bytes` is at least 40: less does not hold the mark. A copy of a copy is one more copy of the first name.
    """
    stem, extension = _split(first_name(name))
    number = 1
    while True:
        mark = f" (conflict {when:%Y-%m-%d %H%M}{'' if number == 1 else f' {number}'})"
        if _size(stem[:1] + mark + extension) > max_bytes:
            stem, extension = first_name(name), ""
        kept = stem
        while _size(kept + mark + extension) > max_bytes:
            kept = kept[:-1]
        candidate = kept + mark + extension
        if not taken(candidate):
            return candidate
        number += 1


def is_copy(name: str) -> bool:
    """Whether the name bears the mark of a conflict copy."""
    return _MARK.search(name) is not None


def first_name(name: str) -> str:
    """The name without the mark: of the file that it is a copy of, unless it had to be cut."""
    return _MARK.sub("", name)


def _size(name: str) -> int:
    return len(name.encode("utf-8", "surrogateescape"))


def _split(name: str) -> tuple[str, str]:
    for double in _DOUBLE:
        if name.endswith(double) and len(name) > len(double):
            return name[: -len(double)], double
    stem, dot, extension = name.rpartition(".")
    return (stem, dot + extension) if stem and dot and len(extension) <= 16 else (name, "")
