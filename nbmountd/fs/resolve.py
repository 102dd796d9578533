"""Conflicts as a person deals with them: which there are, and what becomes of one when somebody has chosen.

A choice is an ordinary local change (a rename over, a removal), made by the verbs that programs use; what it means for the
remote follows from the positions as always. It does not know how a conflict comes about (sync/settle.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nbmountd.disk.database import Node
from nbmountd.errors import InvalidArgument, NotFound
from nbmountd.fs.conflicts import first_name, is_copy
from nbmountd.fs.filesystem import FileSystem

Keep = Literal["local", "remote", "both"]


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two versions beside each other. `copy` is ours; `remote` is the other side's, None if that is gone by now. Sizes in
    bytes, times since 1970; sizes and times are those of the moment it was found (`at`); None: unknown."""

    copy: Node
    remote: Node | None
    at: float
    local_size: int | None
    local_mtime_ns: int | None
    remote_size: int | None
    remote_mtime_ns: int | None


def conflicts(fs: FileSystem) -> list[Conflict]:
    """What nobody has dealt with yet. A copy that was removed, or given a name of its own, is dealt with."""
    nodes, found = fs.nodes, []
    rows = nodes.database.connection.execute(
        "SELECT ino, remote_ino, at, local_size, local_mtime_ns, remote_size, remote_mtime_ns FROM conflicts ORDER BY at, ino"
    ).fetchall()
    for ino, remote_ino, *values in rows:
        copy = nodes.database.get(ino)
        if copy is None or copy.removed or not is_copy(copy.name):
            _forget(fs, ino)
            continue
        remote = None if remote_ino is None else nodes.database.get(remote_ino)
        if remote is None or remote.removed:  # the remote's may have changed since: then the name has another node
            assert copy.parent is not None
            remote = nodes.database.child(copy.parent, first_name(copy.name))
        found.append(Conflict(copy, remote, *values))
    return found


async def resolve(fs: FileSystem, node: Node, keep: Keep) -> None:
    """Settles the conflict of which `node` is one of the two versions. Raises NotFound when it is in none, InvalidArgument
    when it is in several or cannot be settled like that, and what the verbs of the file system raise.

    "local": ours takes the name, and replaces the remote's version if that is still the one known here (else both stay,
    again). "remote": ours is removed. "both": nothing moves; it is only listed no longer.
    """
    found = [conflict for conflict in conflicts(fs) if node in (conflict.copy, conflict.remote)]
    if not found:
        raise NotFound(f"{fs.nodes.local_path(node)} is in no conflict")
    if len(found) > 1:
        names = ", ".join(sorted(conflict.copy.name for conflict in found))
        raise InvalidArgument(f"there are several versions of it ({names}): name one of these")
    (conflict,) = found
    copy = conflict.copy
    if keep != "both":
        if copy.is_directory or (conflict.remote is not None and conflict.remote.is_directory):
            raise InvalidArgument("one of the two is a directory: move or remove what you do not want, and say --keep both")
        assert copy.parent is not None
        parent, name = copy.parent, copy.name
        if keep == "remote":
            if conflict.remote is None:
                raise NotFound("the remote's version is gone; --keep local or both")
            await fs.unlink(parent, name)
        else:
            to = conflict.remote if conflict.remote is not None and conflict.remote.parent == parent else None
            new_name = first_name(name) if to is None else to.name
            await fs.rename(parent, name, parent, new_name, replace=True, exchange=False)
            fs.nodes.kernel.entry_changed(parent, new_name)
        fs.nodes.kernel.entry_changed(parent, name)
    _forget(fs, copy.ino)


def _forget(fs: FileSystem, ino: int) -> None:
    fs.nodes.database.connection.execute("DELETE FROM conflicts WHERE ino = ?", (ino,))
