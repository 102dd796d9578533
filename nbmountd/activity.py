"""Tells JupyterHub that this server is in use while something is being sent, so that it is not culled in the middle of that.

Opt-in (`report_activity`). It knows the hub's API and whether work is pending, and nothing of mounts. The server's own token
may post activity and little else (jupyterhub/roles.py: role "server"); the hub takes any later time (apihandlers/users.py).
Bounded: work that gets nowhere keeps the server alive for `report_activity_limit` and no longer.
"""

from __future__ import annotations

import datetime
import json
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import IO
from urllib.parse import urlsplit

import trio

from nbmountd.control.schema import StatusReply
from nbmountd.log import get_logger, register_secret

URL, TOKEN, SERVER = "JUPYTERHUB_ACTIVITY_URL", "JUPYTERHUB_API_TOKEN", "JUPYTERHUB_SERVER_NAME"

EVERY = 300.0
"""Seconds between two posts, as jupyterhub's own single-user server. Culling times are an hour by default."""
LOOK_EVERY = 30.0
"""Seconds between two looks at what is pending: an upload that is done within one needs no help."""
POST_LIMIT = 20.0

_log = get_logger(__name__)


@dataclass(frozen=True)
class Hub:
    """Where to post, and as whom. `server` is "" for the default server."""

    url: str
    token: str
    server: str

    def __repr__(self) -> str:
        return f"Hub({self.url!r})"


def hub_of(environ: Mapping[str, str]) -> Hub | None:
    """The hub that started this server; None if none did."""
    url, token = environ.get(URL, ""), environ.get(TOKEN, "")
    if urlsplit(url).scheme not in ("http", "https") or not token:
        return None
    register_secret(token)
    return Hub(url, token, environ.get(SERVER, ""))


def is_pending(status: StatusReply) -> bool:
    """Whether something is on its way, or soon will be. What is parked waits for a person, not for this server."""
    return any(
        mount.uploading or mount.unsent_files > mount.parked
        for mount in status.mounts
        if mount.state not in ("failed", "unmounted", "unauthenticated")
    )


async def report(
    hub: Hub,
    status: Callable[[], Awaitable[StatusReply]],
    *,
    limit: float,
    every: float = EVERY,
    look_every: float = LOOK_EVERY,
) -> None:
    """Posts activity every `every` seconds while work is pending, for at most `limit` seconds on end. Until cancelled."""
    began: float | None = None
    posted_at = -float("inf")
    given_up = False
    while True:
        now = trio.current_time()
        if not is_pending(await status()):
            began, given_up = None, False
        elif began is None:
            began = now
        elif now - began > limit:
            if not given_up:
                _log.warning("sending takes longer than report_activity_limit: the hub is told no more", limit=limit)
            given_up = True
        elif now - posted_at >= every:
            posted_at = now
            await _post(hub)
        await trio.sleep(look_every)


async def _post(hub: Hub) -> None:
    try:
        with trio.move_on_after(2 * POST_LIMIT):
            await trio.to_thread.run_sync(_send, hub, abandon_on_cancel=True)
    except (OSError, ValueError) as exc:
        # The hub's answer may echo what was sent, so only the kind of failure is told.
        _log.warning("the hub could not be told that something is being sent", cause=_reason(exc))
    else:
        _log.debug("told the hub that something is being sent")


def _send(hub: Hub) -> None:
    at = datetime.datetime.now(datetime.timezone.utc).isoformat().replace("+00:00", "Z")
    body = json.dumps({"servers": {hub.server: {"last_activity": at}}, "last_activity": at}).encode()
    headers = {"Authorization": f"token {hub.token}", "Content-Type": "application/json"}
    request = urllib.request.Request(hub.url, body, headers, method="POST")
    with _opener.open(request, timeout=POST_LIMIT):
        pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The token goes to the hub and nowhere else, whatever the hub answers."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: object, newurl: str
    ) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))  # nor to a proxy


def _reason(exc: Exception) -> str:
    if isinstance(exc, urllib.error.HTTPError):
        return f"HTTP {exc.code}"
    return str(getattr(exc, "reason", None) or type(exc).__name__)
