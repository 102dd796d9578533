"""What travels over the control socket: one JSON object a line, tagged by `verb` (requests) and `type` (replies).

A client sends one request and reads replies until one that is not `Progress` or `Event`. The supervisor answers what it
knows and passes the rest to the worker of the mount, whose socket speaks the same language.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

# --- requests ----------------------------------------------------------------------------------------------------------


class Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="verb"):
    """Base of all requests. `mount` names one mount; None means all, or the one that holds the paths."""

    mount: str | None = None


class Status(Request, frozen=True, kw_only=True, tag="status"):
    """-> StatusReply."""


class Mount(Request, frozen=True, kw_only=True, tag="mount"):
    """Mounts a configured mount that is not mounted. -> Done."""


class Unmount(Request, frozen=True, kw_only=True, tag="unmount"):
    """Drains to the deadline, unmounts. -> Done; Failed (code 4) if something is left in the journal."""

    timeout: float | None = None


class Sync(Request, frozen=True, kw_only=True, tag="sync"):
    """Sends everything (below `paths`, if any) now. -> Progress..., then Done, or Failed with code 4 after `timeout`."""

    paths: tuple[str, ...] = ()
    timeout: float | None = None


class Queue(Request, frozen=True, kw_only=True, tag="queue"):
    """-> QueueReply."""


class Refresh(Request, frozen=True, kw_only=True, tag="refresh"):
    """Forgets what is known of `path` (absolute; None: the whole mount) so that the next look asks the remote. -> Done."""

    path: str | None = None


class Explain(Request, frozen=True, kw_only=True, tag="explain"):
    """Everything known of one file. -> ExplainReply."""

    path: str


class Conflicts(Request, frozen=True, kw_only=True, tag="conflicts"):
    """-> ConflictsReply; with `keep`, resolves the one at `path` first."""

    path: str | None = None
    keep: Literal["local", "remote", "both"] | None = None


class Parked(Request, frozen=True, kw_only=True, tag="parked"):
    """-> ParkedReply; with `action`, does it to the one at `path` (or all) first."""

    action: Literal["list", "retry", "export", "discard"] = "list"
    path: str | None = None
    directory: str | None = None


class Cache(Request, frozen=True, kw_only=True, tag="cache"):
    """-> CacheReply; with `evict`, gives up clean cached bytes (below `path`, if any) first."""

    evict: bool = False
    path: str | None = None


class Pin(Request, frozen=True, kw_only=True, tag="pin"):
    """Keeps `path` cached (`on`), or no longer. -> Done."""

    path: str
    on: bool = True


class Prefetch(Request, frozen=True, kw_only=True, tag="prefetch"):
    """Brings everything below `path` into the cache. -> Progress..., Done."""

    path: str


class Events(Request, frozen=True, kw_only=True, tag="events"):
    """-> Event... until the client closes."""


class LogLevel(Request, frozen=True, kw_only=True, tag="log-level"):
    """-> Done."""

    level: Literal["debug", "info", "warning", "error"]


class Metrics(Request, frozen=True, kw_only=True, tag="metrics"):
    """-> Text in Prometheus' format, of all mounts or one. Answered by the supervisor, out of Status."""


class Ping(Request, frozen=True, kw_only=True, tag="ping"):
    """-> Done. The supervisor's heartbeat."""


class Restart(Request, frozen=True, kw_only=True, tag="restart"):
    """Replaces the workers, one mount after the other; open files stay open and callers wait. -> Done."""


class Upgrade(Request, frozen=True, kw_only=True, tag="upgrade"):
    """Has the daemon become the version that is installed now, mounts and open files and all. -> Done, before it does."""


class Reload(Request, frozen=True, kw_only=True, tag="reload"):
    """Reads the configuration again and changes what is different, like SIGHUP. -> Done, Failed."""


class Requests(Request, frozen=True, kw_only=True, tag="requests"):
    """-> RequestsReply: the file operations that programs are waiting for."""


class Stop(Request, frozen=True, kw_only=True, tag="stop"):
    """Worker only: drains to `timeout` seconds, then ends. -> Done or Failed (code 4).

    `handover`: another worker goes on at once, so nothing need be sent first. -> Done.
    """

    timeout: float = 0.0
    handover: bool = False


AnyRequest = (
    Status | Mount | Unmount | Sync | Queue | Refresh | Explain | Conflicts | Parked | Cache | Pin | Prefetch
    | Events | LogLevel | Metrics | Ping | Restart | Upgrade | Reload | Requests | Stop
)

# --- replies -----------------------------------------------------------------------------------------------------------


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Base of all replies."""


class Done(Reply, frozen=True, kw_only=True, tag="done"):
    """It is done; `message` may add something for a person."""

    message: str = ""


class Failed(Reply, frozen=True, kw_only=True, tag="failed"):
    """It is not done. `code` is the exit code of the command line (1 failed, 2 usage, 4 not safe in time)."""

    message: str
    code: int = 1


class Progress(Reply, frozen=True, kw_only=True, tag="progress"):
    """How far a long request is."""

    files_left: int
    bytes_left: int
    bytes_total: int
    current: str = ""


class Event(Reply, frozen=True, kw_only=True, tag="event"):
    """A state change. `at` is seconds since 1970."""

    at: float
    mount: str
    event: str
    path: str = ""
    details: dict[str, Any] = {}


class Calls(msgspec.Struct, frozen=True, kw_only=True):
    """What one verb of the backend contract did so far."""

    count: int = 0
    """Calls that ended, however."""
    errors: int = 0
    retries: int = 0
    seconds: float = 0.0
    """Time spent in all of them, with waiting."""


class MountStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One mount. Sizes in bytes, times in seconds since 1970; None = unknown."""

    name: str
    path: str
    backend: str
    state: Literal["starting", "live", "degraded", "offline", "unauthenticated", "failed", "unmounted", "stopping"]
    reason: str = ""
    """What is wrong and what to do, for a person; empty when live."""
    since: float = 0.0
    read_only: bool = False
    unsent_files: int = 0
    unsent_bytes: int = 0
    uploading: int = 0
    conflicts: int = 0
    parked: int = 0
    local_only: int = 0
    cached_bytes: int = 0
    open_files: int = 0
    quota_used: int | None = None
    quota_available: int | None = None
    pid: int | None = None
    restarts: int = 0
    requests: dict[str, int] = {}
    """FUSE requests served by this worker, by operation."""
    remote_requests: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    token_warning: str = ""
    """A sentence for a person when the token ends soon or has ended; empty before, and when that is unknown."""
    calls: dict[str, Calls] = {}
    """What was asked of the remote, by verb."""


class StatusReply(Reply, frozen=True, kw_only=True, tag="status"):
    """All mounts; `safe` is True when every byte of every mount has been confirmed by its remote."""

    version: str
    pid: int
    safe: bool
    mounts: tuple[MountStatus, ...]


class QueueItem(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of unsent work."""

    mount: str
    path: str
    step: str
    state: Literal["waiting", "running", "retrying", "parked", "open"]
    size: int = 0
    sent: int = 0
    due_in: float = 0.0
    attempts: int = 0
    error: str = ""


class QueueReply(Reply, frozen=True, kw_only=True, tag="queue"):
    items: tuple[QueueItem, ...]
    total: int
    """How many there are; `items` may be cut to the first 1,000."""


class ExplainReply(Reply, frozen=True, kw_only=True, tag="explain"):
    """Field names and values in the order to show them."""

    fields: tuple[tuple[str, str], ...]


class Conflict(msgspec.Struct, frozen=True, kw_only=True):
    mount: str
    path: str
    """Where the remote's version is (it kept the name)."""
    copy: str
    """Where the local version is."""
    at: float
    local_size: int | None = None
    local_mtime: float | None = None
    remote_size: int | None = None
    remote_mtime: float | None = None


class ConflictsReply(Reply, frozen=True, kw_only=True, tag="conflicts"):
    items: tuple[Conflict, ...]


class ParkedItem(msgspec.Struct, frozen=True, kw_only=True):
    mount: str
    path: str
    step: str
    size: int
    error: str
    at: float


class ParkedReply(Reply, frozen=True, kw_only=True, tag="parked"):
    items: tuple[ParkedItem, ...]


class CacheReply(Reply, frozen=True, kw_only=True, tag="cache"):
    mounts: tuple[tuple[str, int, int], ...]
    """(mount, bytes cached, limit)."""


class RequestItem(msgspec.Struct, frozen=True, kw_only=True):
    """One file operation that was taken and not answered."""

    mount: str
    operation: str
    path: str
    inode: int
    seconds: float


class RequestsReply(Reply, frozen=True, kw_only=True, tag="requests"):
    items: tuple[RequestItem, ...]
    """Longest first."""


class Text(Reply, frozen=True, kw_only=True, tag="text"):
    text: str


AnyReply = (
    Done | Failed | Progress | Event | StatusReply | QueueReply | ExplainReply | ConflictsReply | ParkedReply
    | CacheReply | RequestsReply | Text
)

MAX_LINE = 16 * 1024 * 1024
"""Longest line either side accepts; a longer one ends the connection."""

encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(AnyRequest).decode
decode_reply = msgspec.json.Decoder(AnyReply).decode
