"""Names that a Nextcloud refuses or changes, written so that it keeps them, and read back: a program finds what it wrote.

Pure; of remotes it knows no more than that. Refused are backslashes, control characters, bytes that are not UTF-8, `.htaccess`,
`*.part` and `*.filepart`; letters with separate accents (NFD) are composed, so that one file would overwrite another
(Nextcloud 32). What stands in the way is written as the sign
ESCAPE and its number; other clients see that. Everything else is as it is, on both sides: `shown(stored(name)) == name`
for every name, `stored(shown(name)) == name` for every name that the server has.
"""

from __future__ import annotations

import re
import unicodedata

ESCAPE = "\u241b"
"""The symbol for "escape": nobody types it, and everybody can see it."""

REFUSED_END = re.compile(r"\.(?:file)?part\Z|\A\.htaccess\Z", re.IGNORECASE)
CODE = re.compile(f"{ESCAPE}(?:{ESCAPE}|([0-9a-f]{{2,6}});)")


def stored(name: str) -> str:
    """How a program's `name` is called on the server."""
    return name if _is_kept(name) and shown(name) == name else _escaped(name)


def shown(name: str) -> str:
    """How programs see what is called `name` on the server."""
    if ESCAPE not in name:
        return name
    meant = CODE.sub(lambda match: chr(min(int(match[1], 16), 0x10FFFF)) if match[1] else ESCAPE, name)
    # Only what we would write so: anything else somebody has called so, and it is his name.
    if meant == name or len(meant) >= len(name) or _escaped(meant) != name:
        return name
    return name if _is_kept(meant) and shown(meant) == meant else meant


def stored_size(name: str, *, escapes: bool) -> int:
    """Bytes that the name takes on a remote, which `escapes` names or takes them as they are."""
    return len((stored(name) if escapes else name).encode("utf-8", "surrogateescape"))


def _is_kept(name: str) -> bool:
    """Whether the server takes the name and leaves it as it is."""
    return (
        unicodedata.is_normalized("NFC", name)
        and REFUSED_END.search(name) is None
        and not any(_is_refused(character) for character in name)
    )


def _is_refused(character: str) -> bool:
    return character in "\\\x7f" or character < " " or "\udc80" <= character <= "\udcff"


def _escaped(name: str) -> str:
    composed = unicodedata.is_normalized("NFC", name)
    end = REFUSED_END.search(name)
    dot = end.start() if end is not None else -1
    parts = []
    for at, character in enumerate(name):
        changes = not composed and (
            unicodedata.combining(character) != 0
            or "\u1100" <= character <= "\u11ff"
            or unicodedata.normalize("NFC", character) != character
        )
        if character == ESCAPE:
            parts.append(ESCAPE * 2)
        elif _is_refused(character) or at == dot or changes:
            parts.append(f"{ESCAPE}{ord(character):02x};")
        else:
            parts.append(character)
    return "".join(parts)
