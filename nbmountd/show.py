"""Replies of the daemon as text for a person: aligned, short, and with what to do when something is wrong.

It asks nobody and prints nothing. Names come from remotes, so whatever could steer a terminal is written out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from nbmountd.control import schema
from nbmountd.control.schema import AnyReply, MountStatus
from nbmountd.units import show_duration, show_size

_ADVICE = {
    "unauthenticated": "the credential is missing or refused; put a valid one in its place and it goes on by itself",
    "offline": "the remote does not answer; what is cached can be read, what is written is kept and sent later",
    "degraded": "the remote answers late or with errors; what is written is kept until it is sent",
    "failed": "see the daemon's log; 'nbmountctl mount {name}' tries again",
    "unmounted": "'nbmountctl mount {name}' brings it back",
}


def lines_of(reply: AnyReply) -> list[str]:
    """The lines to print for a reply."""
    if isinstance(reply, schema.StatusReply):
        return _status(reply)
    if isinstance(reply, schema.QueueReply):
        return _queue(reply)
    if isinstance(reply, schema.ExplainReply):
        return aligned([(clean(name), clean(value)) for name, value in reply.fields])
    if isinstance(reply, schema.ConflictsReply):
        return _conflicts(reply)
    if isinstance(reply, schema.ParkedReply):
        return _parked(reply)
    if isinstance(reply, schema.CacheReply):
        return aligned(
            [(clean(mount), show_size(cached), f"of {show_size(limit)}") for mount, cached, limit in reply.mounts]
        )
    if isinstance(reply, schema.RequestsReply):
        return _requests(reply)
    if isinstance(reply, schema.Event):
        return [_event(reply)]
    if isinstance(reply, schema.Progress):
        return [progress(reply)]
    if isinstance(reply, schema.Text):
        return [clean(line) for line in reply.text.splitlines()]
    return [clean(line) for line in reply.message.splitlines()]


def clean(text: str) -> str:
    """`text` with control characters and bytes that are no UTF-8 written as escapes."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(character)[1:-1]


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns of equal width, two spaces apart; no spaces at the ends of lines."""
    table = [list(row) for row in rows]
    columns = range(max(map(len, table), default=0))
    widths = [max(len(row[column]) for row in table if column < len(row)) for column in columns]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in table]


def progress(reply: schema.Progress) -> str:
    """`12 files, 3.4 MiB to go: /a/b.txt`."""
    current = f": {clean(reply.current)}" if reply.current else ""
    return f"{_files(reply.files_left)}, {show_size(reply.bytes_left)} to go{current}"


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


# --- status ------------------------------------------------------------------------------------------------------------


def _status(reply: schema.StatusReply) -> list[str]:
    if not reply.mounts:
        return ["no mounts are configured"]
    heads = aligned([_mount_row(mount) for mount in reply.mounts])
    lines = []
    for mount, head in zip(reply.mounts, heads, strict=True):
        lines.append(head)
        lines += [f"    {note}" for note in _notes(mount)]
    files = sum(mount.unsent_files for mount in reply.mounts)
    size = sum(mount.unsent_bytes for mount in reply.mounts)
    if reply.safe:
        lines.append("everything is safe")
    else:
        lines.append(f"not yet safe: {_files(files)}, {show_size(size)}; 'nbmountctl sync' sends them and waits")
    return lines


def _mount_row(mount: MountStatus) -> list[str]:
    row = [clean(mount.name), mount.state, clean(mount.path)]
    row.append(f"{_files(mount.unsent_files)} unsent" if mount.unsent_files else "safe")
    if mount.quota_used is not None and mount.quota_available is not None:
        row.append(f"{show_size(mount.quota_used)} of {show_size(mount.quota_used + mount.quota_available)} used")
    elif mount.quota_available is not None:
        row.append(f"{show_size(mount.quota_available)} free")
    return row


def _notes(mount: MountStatus) -> list[str]:
    notes = []
    if mount.reason:
        notes.append(clean(mount.reason))
    elif mount.state in _ADVICE:
        notes.append(_ADVICE[mount.state].format(name=clean(mount.name)))
    if mount.token_warning and mount.token_warning not in mount.reason:
        notes.append(clean(mount.token_warning))
    if mount.unsent_files:
        uploading = f", {mount.uploading} being sent" if mount.uploading else ""
        notes.append(f"{show_size(mount.unsent_bytes)} not yet sent{uploading} ('nbmountctl queue')")
    if mount.conflicts:
        notes.append(f"{mount.conflicts} in conflict, both versions kept ('nbmountctl conflicts')")
    if mount.parked:
        notes.append(f"{mount.parked} parked until somebody looks ('nbmountctl parked')")
    if mount.restarts:
        notes.append(f"its worker was restarted {mount.restarts} times (see the daemon's log)")
    if mount.read_only:
        notes.append("read-only")
    return notes


# --- lists -------------------------------------------------------------------------------------------------------------


def _queue(reply: schema.QueueReply) -> list[str]:
    if not reply.items:
        return ["nothing is waiting to be sent"]
    rows = (
        (item.state, item.step, show_size(item.size), _when(item), clean(item.path), clean(item.error)) for item in reply.items
    )
    lines = aligned(rows)
    if reply.total > len(reply.items):
        lines.append(f"... and {reply.total - len(reply.items)} more")
    return lines


def _when(item: schema.QueueItem) -> str:
    if item.state == "running":
        return f"{100 * item.sent // item.size} %" if item.size else "now"
    return f"in {show_duration(item.due_in)}" if item.due_in > 0 and item.state != "parked" else "-"


def _conflicts(reply: schema.ConflictsReply) -> list[str]:
    if not reply.items:
        return ["no conflicts"]
    lines = []
    for item in reply.items:
        lines += [
            f"{clean(item.path)}  ({_moment(item.at)})",
            f"    remote  {_version(item.remote_size, item.remote_mtime)}  {clean(item.path)}",
            f"    local   {_version(item.local_size, item.local_mtime)}  {clean(item.copy)}",
        ]
    lines.append("to resolve one: nbmountctl conflicts --keep local|remote|both PATH")
    return lines


def _version(size: int | None, mtime: float | None) -> str:
    known = [show_size(size) if size is not None else "", _moment(mtime) if mtime is not None else ""]
    return ", ".join(filter(None, known)) or "?"


def _parked(reply: schema.ParkedReply) -> list[str]:
    if not reply.items:
        return ["nothing is parked"]
    lines = []
    for item in reply.items:
        lines += [
            f"{clean(item.path)}  ({item.step}, {show_size(item.size)}, {_moment(item.at)})",
            f"    {clean(item.error)}",
        ]
    lines.append("to go on: nbmountctl parked retry [PATH], parked export DIRECTORY [PATH], parked discard PATH")
    return lines


def _requests(reply: schema.RequestsReply) -> list[str]:
    if not reply.items:
        return ["no program is waiting"]
    return aligned([(f"{item.seconds:.1f} s", item.operation, clean(item.path)) for item in reply.items])


def _event(reply: schema.Event) -> str:
    details = [f"{clean(str(name))}={clean(str(value))}" for name, value in reply.details.items()]
    moment = _moment(reply.at, "%H:%M:%S")
    return " ".join(filter(None, [moment, clean(reply.mount), clean(reply.event), clean(reply.path), *details]))


def _moment(at: float, form: str = "%Y-%m-%d %H:%M:%S") -> str:
    try:
        return time.strftime(form, time.localtime(at))
    except (ValueError, OverflowError, OSError):
        return "?"
