"""What becomes of a name when this side and the remote have both moved: one pure function over a table.

It knows no nodes and no requests. `adopt.py` (a listing brought news) and `settle.py` (a step met something unexpected)
ask it, so that what happens does not depend on who noticed first. The rules behind the table:

- Nobody's bytes are overwritten: when both sides have new bytes, the remote keeps the name and ours gets one beside it.
- An edit wins over a removal, whoever made which; a removal wins over a mere rename.
- Two directories of one name are one directory.
"""

from __future__ import annotations

import enum


class Here(enum.Enum):
    """What was done on this side since both agreed."""

    SAME = "nothing"
    EDITED = "edited"
    MOVED = "renamed"
    MOVED_EDITED = "renamed and edited"
    REMOVED = "removed"
    REPLACED = "removed, and something else took its name"
    NEW = "made"


class There(enum.Enum):
    """What the remote has at the place where both agreed last (for NEW: at the place where it is to go)."""

    SAME = "nothing"
    CHANGED = "changed"
    GONE = "removed"
    OTHER_KIND = "replaced by another kind"
    ALIKE = "made too, equal"
    """For NEW only: the same bytes, the same target, or both a directory."""


class Outcome(enum.Enum):
    """What happens."""

    NOTHING = "nothing"
    SEND = "ours is sent"
    SEND_AS_NEW = "ours is sent as something new"
    TAKE = "the remote's is taken"
    COME_BACK = "the remote's comes back"
    COPY = "both stay: ours as a conflict copy"
    DROP = "ours goes too"
    FORGET = "nothing is left to do"
    MERGE = "they are one"


_SAME, _CHANGED, _GONE, _OTHER, _ALIKE = There.SAME, There.CHANGED, There.GONE, There.OTHER_KIND, There.ALIKE

TABLE: dict[Here, dict[There, Outcome]] = {
    Here.SAME: {
        _SAME: Outcome.NOTHING,
        _CHANGED: Outcome.TAKE,
        _GONE: Outcome.DROP,
        _OTHER: Outcome.TAKE,
    },
    Here.EDITED: {
        _SAME: Outcome.SEND,
        _CHANGED: Outcome.COPY,
        _GONE: Outcome.SEND_AS_NEW,
        _OTHER: Outcome.COPY,
    },
    Here.MOVED: {
        _SAME: Outcome.SEND,
        _CHANGED: Outcome.TAKE,  # the new bytes, under our name; settle.py takes what is whole here for edited
        _GONE: Outcome.DROP,
        _OTHER: Outcome.DROP,
    },
    Here.MOVED_EDITED: {
        _SAME: Outcome.SEND,
        _CHANGED: Outcome.SEND_AS_NEW,  # under its new name; the remote's stays under the old one
        _GONE: Outcome.SEND_AS_NEW,
        _OTHER: Outcome.SEND_AS_NEW,
    },
    Here.REMOVED: {
        _SAME: Outcome.SEND,
        _CHANGED: Outcome.COME_BACK,
        _GONE: Outcome.FORGET,
        _OTHER: Outcome.COME_BACK,
    },
    Here.REPLACED: {
        _SAME: Outcome.SEND,
        _CHANGED: Outcome.COPY,  # the newcomer becomes the copy
        _GONE: Outcome.SEND_AS_NEW,
        _OTHER: Outcome.COPY,
    },
    Here.NEW: {
        _CHANGED: Outcome.COPY,
        _GONE: Outcome.SEND,
        _OTHER: Outcome.COPY,
        _ALIKE: Outcome.MERGE,
    },
}


def decide(here: Here, there: There) -> Outcome:
    """The table. Raises KeyError for a combination that cannot be."""
    return TABLE[here][there]


def what_happened_here(*, has_base: bool, removed: bool, name_taken: bool, in_place: bool, edited: bool) -> Here:
    """One word for what this side did with a node. `name_taken`: something else here has the name of a removed one."""
    if not has_base:
        return Here.NEW
    if removed:
        return Here.REPLACED if name_taken else Here.REMOVED
    if in_place:
        return Here.EDITED if edited else Here.SAME
    return Here.MOVED_EDITED if edited else Here.MOVED


def as_markdown() -> str:
    """The table for people."""
    columns = [_SAME, _CHANGED, _GONE, _OTHER, _ALIKE]
    lines = ["| here \\ on the remote | " + " | ".join(there.value for there in columns) + " |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    for here, row in TABLE.items():
        cells = [row[there].value if there in row else "–" for there in columns]
        lines.append(f"| **{here.value}** | " + " | ".join(cells) + " |")
    return "\n".join(lines)
