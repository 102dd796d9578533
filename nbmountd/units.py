"""Sizes and durations as people write them, to numbers and back. Pure."""

from __future__ import annotations

import math
import re

_NUMBER = r"(\d+(?:\.\d+)?)"
_SIZE = re.compile(rf"{_NUMBER}\s*(?:([kmgtp])(i?b)?|b)?", re.IGNORECASE)
_DURATION_TERM = re.compile(rf"{_NUMBER}\s*([a-z]+)", re.IGNORECASE)
_POWERS = {letter: power for power, letter in enumerate("kmgtp", start=1)}
_SECONDS = {
    "ms": 0.001, "s": 1, "sec": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "minute": 60, "minutes": 60,
    "h": 3600, "hour": 3600, "hours": 3600, "d": 86400, "day": 86400, "days": 86400,
}


def parse_size(text: str) -> int:
    """Bytes in "10G", "512 MiB", "2GB", "1000". K, M, G, T, P and KiB... are powers of 1024; KB, MB... of 1000.

    Raises ValueError.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'"{text}" is not a size such as "10G" or "512 MiB"')
    number, letter, suffix = match.groups()
    if len(number) > 30:
        raise ValueError(f'"{text[:30]}..." is not a size such as "10G" or "512 MiB"')
    if letter is None:
        return int(float(number))
    unit = 1000 if (suffix or "").lower() == "b" else 1024
    return int(float(number) * unit ** _POWERS[letter.lower()])


def parse_duration(text: str) -> float:
    """Seconds in "30s", "5 min", "1h 30min", "250ms", "2.5". Raises ValueError."""
    compact = "".join(text.split())
    try:
        number = float(compact)
    except ValueError:
        number = math.nan
    if math.isfinite(number) and number >= 0:
        return number
    total, end = 0.0, 0
    for match in _DURATION_TERM.finditer(compact):
        seconds = _SECONDS.get(match[2].lower())
        if match.start() != end or seconds is None:
            break
        total += float(match[1]) * seconds
        end = match.end()
    if not compact or end != len(compact):
        raise ValueError(f'"{text}" is not a duration such as "30s" or "5 min"')
    return total


def show_size(size: int) -> str:
    """`1.5 GiB`, `312 KiB`, `0 B`: three digits or so."""
    if size < 1000:
        return f"{size} B"
    number, units = float(size), iter(("KiB", "MiB", "GiB", "TiB", "PiB"))
    while number >= 999.5:
        number, unit = number / 1024, next(units, "EiB")
    return f"{number:.1f} {unit}" if number < 9.95 else f"{number:.0f} {unit}"


def show_duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `5 min`, `3 h 20 min`, `4 d`."""
    if seconds < 9.5:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{round(seconds / 86400)} d"


_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]|):(?P<port>[0-9]{1,5})")


def parse_address(text: str) -> tuple[str | None, int]:
    """Host (None: all) and port of "127.0.0.1:9180", "[::1]:9180" or ":9180". Raises ValueError."""
    match = _ADDRESS.fullmatch(text)
    if match is None or not int(match["port"]) < 65536:
        raise ValueError(f'"{text}" is no address such as "127.0.0.1:9180"')
    return match["host"].strip("[]") or None, int(match["port"])
