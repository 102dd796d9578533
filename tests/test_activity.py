"""The server is kept alive while something is sent, and no longer: posts to a real HTTP server, in a trio clock of its own."""

from __future__ import annotations

import datetime
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import trio

from nbmountd import activity, log
from nbmountd.control.schema import MountStatus, StatusReply

TOKEN = "server-token-0123456789"


class HubServer(ThreadingHTTPServer):
    """Answers like JupyterHub's activity handler. `answer` is the status it gives."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.posts: list[tuple[str, str, Any]] = []
        self.answer = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hub/api/users/ada/activity"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, HubServer)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append((self.path, self.headers["Authorization"], json.loads(body)))
        self.send_response(self.server.answer)
        self.send_header("Location", "/stolen")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def environment(hub: HubServer, name: str = "") -> dict[str, str]:
    return {activity.URL: hub.url, activity.TOKEN: TOKEN, activity.SERVER: name}


class Work:
    """What the daemon would say of its mounts; looks are counted."""

    def __init__(self, **values: Any) -> None:
        self.values = values
        self.looks = 0

    async def status(self) -> StatusReply:
        self.looks += 1
        await trio.lowlevel.checkpoint()
        mount = MountStatus(name="m", path="/m", backend="webdav", **{"state": "live", **self.values})
        return StatusReply(version="", pid=1, safe=False, mounts=(mount,))

    async def looked(self, times: int) -> None:
        until = self.looks + times
        while self.looks < until:  # noqa: ASYNC110 (what is waited for tells nobody)
            await trio.sleep(0.005)


async def report(nursery: trio.Nursery, hub: HubServer, work: Work, *, limit: float = 60.0, every: float = 0.0) -> None:
    found = activity.hub_of(environment(hub, "gpu"))
    assert found is not None
    nursery.start_soon(lambda: activity.report(found, work.status, limit=limit, every=every, look_every=0.01))


async def test_activity_is_posted_as_the_hub_wants_it_while_work_is_pending_and_not_after(
    hub: HubServer, nursery: trio.Nursery
) -> None:
    work = Work(unsent_files=3)
    with trio.fail_after(20):
        await report(nursery, hub, work)
        await work.looked(5)

        work.values = {"unsent_files": 0}
        await work.looked(2)
        posted = len(hub.posts)
        await work.looked(10)

    assert posted and len(hub.posts) == posted
    path, authorization, body = hub.posts[0]
    assert path == "/hub/api/users/ada/activity"
    assert authorization == f"token {TOKEN}"
    assert set(body) == {"servers", "last_activity"} and set(body["servers"]) == {"gpu"}
    at = datetime.datetime.fromisoformat(body["servers"]["gpu"]["last_activity"].replace("Z", "+00:00"))
    assert abs((datetime.datetime.now(datetime.timezone.utc) - at).total_seconds()) < 60


async def test_the_hub_is_not_asked_more_often_than_every_five_minutes(hub: HubServer, nursery: trio.Nursery) -> None:
    work = Work(uploading=1)

    with trio.fail_after(20):
        await report(nursery, hub, work, every=activity.EVERY)
        await work.looked(20)

    assert len(hub.posts) == 1


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"unsent_files": 2, "parked": 2},
        {"unsent_files": 2, "state": "unauthenticated"},
        {"unsent_files": 2, "state": "failed"},
    ],
)
async def test_what_goes_nowhere_by_itself_keeps_no_server_alive(
    hub: HubServer, nursery: trio.Nursery, values: dict[str, Any]
) -> None:
    work = Work(**values)

    with trio.fail_after(20):
        await report(nursery, hub, work)
        await work.looked(5)

    assert hub.posts == []


async def test_work_without_end_is_told_for_so_long_and_no_longer_until_everything_was_safe_once(
    hub: HubServer, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    work = Work(unsent_files=1)
    with trio.fail_after(20):
        await report(nursery, hub, work, limit=0.2)
        while "report_activity_limit" not in caplog.text:  # noqa: ASYNC110
            await trio.sleep(0.01)
        posted = len(hub.posts)
        await work.looked(10)
        stayed = len(hub.posts)

        work.values = {"unsent_files": 0}
        await work.looked(2)
        work.values = {"unsent_files": 1}
        while len(hub.posts) == stayed:  # noqa: ASYNC110
            await trio.sleep(0.01)

    assert posted and stayed == posted


@pytest.mark.parametrize("answer", [302, 307, 403, 500])
async def test_a_refusal_ends_nothing_follows_nowhere_and_shows_no_token(
    hub: HubServer, nursery: trio.Nursery, answer: int
) -> None:
    text = io.StringIO()
    log.configure("debug", stream=text)
    hub.answer = answer
    work = Work(unsent_files=1)
    with trio.fail_after(20):
        await report(nursery, hub, work)
        await work.looked(4)

    assert {path for path, _, _ in hub.posts} == {"/hub/api/users/ada/activity"}
    assert f"HTTP {answer}" in text.getvalue()
    assert TOKEN not in text.getvalue()


async def test_a_hub_that_is_away_ends_nothing(hub: HubServer, nursery: trio.Nursery) -> None:
    found = activity.hub_of({**environment(hub), activity.URL: "http://127.0.0.1:9/"})
    assert found is not None
    work = Work(unsent_files=1)

    with trio.fail_after(20):
        nursery.start_soon(lambda: activity.report(found, work.status, limit=60, every=0, look_every=0.01))
        await work.looked(4)

    assert TOKEN not in repr(found)


@pytest.mark.parametrize("missing", [activity.URL, activity.TOKEN])
def test_outside_of_a_hub_there_is_nobody_to_tell(hub: HubServer, missing: str) -> None:
    assert activity.hub_of({**environment(hub), missing: ""}) is None
    assert activity.hub_of({**environment(hub), activity.URL: "file:///etc/passwd"}) is None
