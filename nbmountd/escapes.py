"""Names that a remote refuses, changes or hides, written so that it keeps them, and read back: a program finds what it wrote.

Pure; of remotes it knows no more than their rules. What stands in the way is written as the sign ESCAPE and its number; other
clients see that. Everything else is as it is, on both sides: `shown(stored(name)) == name` for every name,
`stored(shown(name)) == name` for every name that a server keeps.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

ESCAPE = "\u241b"
"""The symbol for "escape": nobody types it, and everybody can see it."""

CODE = re.compile(f"{ESCAPE}(?:{ESCAPE}|([0-9a-f]{{2,6}});)")


@dataclass(frozen=True, slots=True)
class Rules:
    """How a kind of remote treats names. Plain values only: a mount remembers them over restarts."""

    text: bool = False
    """Refused are backslashes, control characters and bytes that are not UTF-8; letters with separate accents (NFD) are
    composed, so that one file would overwrite another."""
    bad_dot: str = ""
    """A regular expression for what makes the remote refuse or hide a name, from a dot on; it matches no more when that is
    escaped. Empty: nothing does."""

    def stored(self, name: str) -> str:
        """How a program's `name` is called on the server."""
        return name if self._is_kept(name) and self.shown(name) == name else self._escaped(name)

    def shown(self, name: str) -> str:
        """How programs see what is called `name` on the server."""
        if ESCAPE not in name or self == AS_THEY_ARE:
            return name
        meant = CODE.sub(lambda match: chr(min(int(match[1], 16), 0x10FFFF)) if match[1] else ESCAPE, name)
        # Only what we would write so: anything else somebody has called so, and it is his name.
        if meant == name or len(meant) >= len(name) or self._escaped(meant) != name:
            return name
        return name if self._is_kept(meant) and self.shown(meant) == meant else meant

    def stored_size(self, name: str) -> int:
        """Bytes that the name takes on the remote."""
        return len(self.stored(name).encode("utf-8", "surrogateescape"))

    def _is_kept(self, name: str) -> bool:
        """Whether the server takes the name, leaves it as it is and lists it."""
        if self.bad_dot and re.search(self.bad_dot, name) is not None:
            return False
        return not self.text or (
            unicodedata.is_normalized("NFC", name) and not any(_is_refused(character) for character in name)
        )

    def _escaped(self, name: str) -> str:
        composed = not self.text or unicodedata.is_normalized("NFC", name)
        bad = re.search(self.bad_dot, name) if self.bad_dot else None
        dot = bad.start() if bad is not None else -1
        parts = []
        for at, character in enumerate(name):
            changes = not composed and (
                unicodedata.combining(character) != 0
                or "\u1100" <= character <= "\u11ff"
                or unicodedata.normalize("NFC", character) != character
            )
            if character == ESCAPE:
                parts.append(ESCAPE * 2)
            elif (self.text and _is_refused(character)) or at == dot or changes:
                parts.append(f"{ESCAPE}{ord(character):02x};")
            else:
                parts.append(character)
        return "".join(parts)


def _is_refused(character: str) -> bool:
    return character in "\\\x7f" or character < " " or "\udc80" <= character <= "\udcff"


AS_THEY_ARE = Rules()
NEXTCLOUD = Rules(text=True, bad_dot=r"(?i)\.(?:file)?part\Z|\A\.htaccess\Z")
"""Nextcloud 32 as it is installed."""
NO_FIRST_DOT = Rules(bad_dot=r"\A\.")
"""What begins with a dot is kept and not listed (nginx with dav-ext)."""
