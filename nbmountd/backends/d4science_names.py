"""Names on StorageHub's wire: characters that its repository must escape travel as look-alikes, and come back as they were.

Pure; it knows nothing of requests. The repository (Jackrabbit) escapes some characters when it makes a node but looks for
existing ones by the raw name, so that a second upload under such a name fails or makes a second item. A look-alike is in
no need of escaping. Names that others gave are shown as they are, whatever they hold.
"""

from __future__ import annotations

from nbmountd.errors import NameRefused

REFUSED = frozenset({"Workspace", "Trash", "MySpecialFolders"})
"""The server neither lists, renames nor removes folders with these names, at any depth."""

MAX_NAME_BYTES = 255
"""Of the name that programs see. A guess: no limit of the server is published."""

QUOTE = "\u201b"
"""Before a look-alike that stood in the name itself."""

_ESCAPED = "%/:[]*|'\"" + "\\"
"""Jackrabbit's escapeIllegalJcrChars, with the two quotes that older versions touch; and the backslash, which servlet
containers commonly refuse in a path."""

_IMAGES = {character: chr(ord(character) + 0xFEE0) for character in _ESCAPED}
_IMAGES |= {chr(code): chr(0x2400 + code) for code in range(1, 32)} | {"\x7f": "\u2421"}
_EDGE = {" ": "\u2420"}
_SHORT = {".": "\uff0e"}
_ORIGINALS = {image: character for character, image in (_IMAGES | _EDGE | _SHORT).items()}


def encode(name: str) -> str:
    """The name to send. Raises NameRefused for what is no name, and for what the server would lose."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise NameRefused(f"not a name: {name!r}")
    if name in REFUSED:
        raise NameRefused(f"D4Science keeps the name {name} for itself")
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise NameRefused(f"not UTF-8: {name!r}") from None
    if size > MAX_NAME_BYTES:
        raise NameRefused(f"longer than {MAX_NAME_BYTES} bytes: {name!r}")
    return _written(name)


def decode(wire: str) -> str:
    """The name that programs see: what `encode` made comes back; anything else stays as it is."""
    name = []
    characters = iter(wire)
    for character in characters:
        if character == QUOTE:
            name.append(next(characters, QUOTE))
        else:
            name.append(_ORIGINALS.get(character, character))
    decoded = "".join(name)
    return decoded if _written(decoded) == wire and decoded not in ("", ".", "..") else wire


def _written(name: str) -> str:
    last = len(name) - 1
    short = len(name) < 3
    written = []
    for position, character in enumerate(name):
        if character == QUOTE or character in _ORIGINALS:
            written.append(QUOTE + character)
        elif character in _IMAGES:
            written.append(_IMAGES[character])
        elif character == " " and position in (0, last):
            written.append(_EDGE[character])
        elif character == "." and short:
            written.append(_SHORT[character])
        else:
            written.append(character)
    return "".join(written)
