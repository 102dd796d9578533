"""Status as Prometheus' text exposition format (version 0.0.4): what a site's monitoring wants to know of the mounts.

Pure: a reply in, text out. It holds names of mounts and numbers; no path, no address and no secret.
Format: prometheus.io/docs/instrumenting/exposition_formats (each metric's lines together, HELP and TYPE once before them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import get_args, get_type_hints

from nbmountd.control.schema import MountStatus, StatusReply

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_STATES: tuple[str, ...] = get_args(get_type_hints(MountStatus)["state"])

Value = Callable[[MountStatus], float | None]

_OF_A_MOUNT: tuple[tuple[str, str, str, Value], ...] = (
    ("unsent_files", "gauge", "Files and directories that the remote has not confirmed yet.", lambda s: s.unsent_files),
    ("unsent_bytes", "gauge", "Bytes that the remote has not confirmed yet.", lambda s: s.unsent_bytes),
    ("uploads_running", "gauge", "Uploads under way.", lambda s: s.uploading),
    ("conflicts", "gauge", "Files of which both versions were kept.", lambda s: s.conflicts),
    ("parked", "gauge", "Changes that wait for a person.", lambda s: s.parked),
    ("cached_bytes", "gauge", "Bytes kept of what the remote has.", lambda s: s.cached_bytes),
    ("open_files", "gauge", "Files and directories that programs have open.", lambda s: s.open_files),
    ("quota_used_bytes", "gauge", "Bytes used on the remote; absent if it does not tell.", lambda s: s.quota_used),
    ("quota_available_bytes", "gauge", "Bytes free on the remote; absent if it does not tell.", lambda s: s.quota_available),
    ("token_ending", "gauge", "1 when the mount's token ends soon or has ended.", lambda s: bool(s.token_warning)),
    ("state_since_seconds", "gauge", "Unix time since when the mount is in its state.", lambda s: s.since),
    ("worker_restarts_total", "counter", "Workers that were replaced.", lambda s: s.restarts),
    ("remote_requests_total", "counter", "Requests sent to the remote by this worker.", lambda s: s.remote_requests),
    ("received_bytes_total", "counter", "Bytes of contents and answers received by this worker.", lambda s: s.bytes_received),
    ("sent_bytes_total", "counter", "Bytes of contents and requests sent by this worker.", lambda s: s.bytes_sent),
)


def exposition(status: StatusReply) -> str:
    """The metrics of all mounts in `status`."""
    return "".join(f"{line}\n" for line in _lines(status))


def _lines(status: StatusReply) -> Iterator[str]:
    yield from _head("info", "gauge", "The version that runs.")
    yield _sample("info", {"version": status.version}, 1)
    yield from _head("safe", "gauge", "1 when every byte of every mount is confirmed by its remote.")
    yield _sample("safe", {}, status.safe)
    yield from _head("state", "gauge", "1 for the state that a mount is in, 0 for the others.")
    for mount in status.mounts:
        for state in _STATES:
            yield _sample("state", {"mount": mount.name, "backend": mount.backend, "state": state}, mount.state == state)
    for name, kind, text, value_of in _OF_A_MOUNT:
        yield from _head(name, kind, text)
        for mount in status.mounts:
            value = value_of(mount)
            if value is not None:
                yield _sample(name, {"mount": mount.name}, value)
    yield from _head("fuse_requests_total", "counter", "File operations served by this worker.")
    for mount in status.mounts:
        for operation, count in sorted(mount.requests.items()):
            yield _sample("fuse_requests_total", {"mount": mount.name, "operation": operation}, count)
    for name, text in (
        ("count", "Calls to the remote that ended, however."), ("errors", "Calls to the remote that failed."),
        ("retries", "Attempts after the first one."), ("seconds", "Time spent in calls to the remote, with waiting."),
    ):  # fmt: skip
        full = f"remote_calls_{name}_total".replace("_count", "")
        yield from _head(full, "counter", text)
        for mount in status.mounts:
            for verb, calls in sorted(mount.calls.items()):
                yield _sample(full, {"mount": mount.name, "verb": verb}, getattr(calls, name))


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP nbmountd_{name} {text}"
    yield f"# TYPE nbmountd_{name} {kind}"


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    written = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    number = repr(round(float(value), 6)) if isinstance(value, float) else str(int(value))
    return f"nbmountd_{name}{{{written}}} {number}" if written else f"nbmountd_{name} {number}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
