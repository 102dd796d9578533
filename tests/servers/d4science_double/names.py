"""How a JCR repository writes names: Jackrabbit's escapeIllegalJcrChars and its inverse, and what is no path at all."""

from __future__ import annotations

import re
from urllib.parse import unquote

ILLEGAL = "%/:[]*|\t\r\n"


def escape(name: str, *, quotes: bool = False) -> str:
    """The node name for `name`. `quotes`: as older versions did, which touch ' and " as well."""
    illegal = ILLEGAL + ("'\"" if quotes else "") + ("." if len(name) < 3 else "")

    def written(position: int, character: str) -> str:
        at_the_edge = character == " " and position in (0, len(name) - 1)
        return f"%{ord(character):02X}" if character in illegal or at_the_edge else character

    return "".join(written(position, character) for position, character in enumerate(name))


def unescape(name: str) -> str:
    return re.sub(r"%[0-9A-Fa-f]{2}", lambda match: unquote(match[0]), name)


def legal_path(name: str) -> bool:
    """Whether the raw name can be looked up as a relative JCR path."""
    return not (set(name) & set("/[]*|\t\r\n")) and name == name.strip(" ") and name not in ("", ".", "..")
