"""The control socket: what a client may expect of it, and what no client can do to it."""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, closing, suppress
from pathlib import Path

import pytest
import trio

from nbmountd import log
from nbmountd.control import schema
from nbmountd.control.client import ControlError, DaemonNotRunning, ask, ask_sync
from nbmountd.control.server import Handler, open_listener, serve_requests
from nbmountd.errors import NotFound, StateError


@asynccontextmanager
async def serving(path: Path, handler: Handler, allowed_uids: set[int] | None = None) -> AsyncIterator[Path]:
    listener = open_listener(path)
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await serve_requests(listener, handler, allowed_uids=allowed_uids)

        nursery.start_soon(serve)
        with trio.fail_after(20):
            yield path
        nursery.cancel_scope.cancel()


async def answers(path: Path, request: schema.AnyRequest) -> list[schema.AnyReply]:
    async with aclosing(ask(path, request)) as replies:
        return [reply async for reply in replies]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control.sock"


@pytest.fixture
def log_text() -> Iterator[io.StringIO]:
    text = io.StringIO()
    log.configure("debug", stream=text)
    yield text
    log.configure("info")


async def echo(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
    yield schema.Done(message=getattr(request, "path", None) or "")


# --- answers -----------------------------------------------------------------------------------------------------------


async def test_a_request_is_answered_by_progress_and_one_last_reply(place: Path) -> None:
    async def count_down(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        assert request == schema.Sync(paths=("/a",), timeout=2.0)
        for left in (2, 1):
            yield schema.Progress(files_left=left, bytes_left=left * 10, bytes_total=20)
        yield schema.Done(message="safe")

    async with serving(place, count_down):
        replies = await answers(place, schema.Sync(paths=("/a",), timeout=2.0))

    assert [type(reply) for reply in replies] == [schema.Progress, schema.Progress, schema.Done]


async def test_the_synchronous_client_gets_the_same_replies(place: Path) -> None:
    async with serving(place, echo):
        replies = await trio.to_thread.run_sync(lambda: list(ask_sync(place, schema.Prefetch(path="/a"), timeout=5)))

    assert replies == [schema.Done(message="/a")]


async def test_one_connection_may_ask_several_times_and_ahead_of_the_answers(place: Path) -> None:
    async with serving(place, echo):
        async with await trio.open_unix_socket(place) as stream:
            await stream.send_all(b"".join(b'{"verb":"prefetch","path":"/%d"}\n' % number for number in range(3)))
            received = b""
            while received.count(b"\n") < 3:
                received += await stream.receive_some()

    assert [json.loads(line)["message"] for line in received.splitlines()] == ["/0", "/1", "/2"]


@pytest.mark.parametrize("name", ["/plain", "/grün", "/latin-\udcfc", "/quote\"\n\\u0000ff"])
async def test_every_file_name_travels_unchanged_both_ways(place: Path, name: str) -> None:
    async with serving(place, echo):
        assert await answers(place, schema.Prefetch(path=name)) == [schema.Done(message=name)]


async def test_requests_of_many_clients_are_answered_at_once(place: Path) -> None:
    arrived = 0
    everybody = trio.Event()

    async def wait_for_everybody(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        nonlocal arrived
        arrived += 1
        if arrived == 50:
            everybody.set()
        await everybody.wait()
        yield schema.Done()

    async with serving(place, wait_for_everybody), trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(answers, place, schema.Ping())

    assert arrived == 50


async def test_a_client_that_does_not_read_delays_nobody_else(place: Path) -> None:
    async def flood(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        while isinstance(request, schema.Events):
            yield schema.Event(at=0.0, mount="m", event="noise", path="x" * 10_000)
        yield schema.Done()

    async with serving(place, flood), await trio.open_unix_socket(place) as slow:
        await slow.send_all(b'{"verb":"events"}\n')
        await trio.testing.wait_all_tasks_blocked(0.02)  # its buffers are full now

        assert await answers(place, schema.Ping()) == [schema.Done()]


# --- clients that go away ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["events", "sync"])
async def test_a_client_that_goes_away_ends_its_handler(place: Path, verb: str) -> None:
    started, ended = trio.Event(), trio.Event()

    async def wait_for_ever(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        try:
            started.set()
            await trio.sleep_forever()
            yield schema.Done()
        finally:
            ended.set()

    async with serving(place, wait_for_ever):
        async with await trio.open_unix_socket(place) as stream:
            await stream.send_all(b'{"verb":"%s"}\n' % verb.encode())
            await started.wait()
        await ended.wait()


async def test_leaving_the_replies_early_ends_the_handler(place: Path) -> None:
    ended = trio.Event()

    async def noise(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        try:
            while True:
                yield schema.Event(at=0.0, mount="m", event="noise", path="x" * 100_000)
        finally:
            ended.set()

    async with serving(place, noise):
        async with aclosing(ask(place, schema.Events())) as replies:
            async for _ in replies:
                break
        await ended.wait()

        ended = trio.Event()
        await trio.to_thread.run_sync(lambda: _first(place))
        await ended.wait()


def _first(path: Path) -> schema.AnyReply:
    replies = ask_sync(path, schema.Events(), timeout=5)
    with closing(replies):  # type: ignore[type-var]  # a generator has close()
        return next(replies)


async def test_ending_the_server_ends_its_handlers_and_its_clients_are_told(place: Path) -> None:
    started, ended = trio.Event(), trio.Event()

    async def wait_for_ever(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        try:
            started.set()
            await trio.sleep_forever()
            yield schema.Done()
        finally:
            ended.set()

    async with trio.open_nursery() as clients:

        async def wait_for_the_end() -> None:
            with pytest.raises(DaemonNotRunning):
                await answers(place, schema.Ping())

        async with serving(place, wait_for_ever):
            clients.start_soon(wait_for_the_end)
            await started.wait()
        assert ended.is_set()


# --- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (b"hello", "malformed"),
        (b'{"verb":"dance"}', "dance"),
        (b'{"verb":"sync","paths":3}', "$.paths"),
        (b'{"verb":"explain"}', "path"),
        (b'{"verb":"explain","path":"\xff"}', "utf-8"),
        (b'{"verb":"ping","x":' + b"[" * 100_000, "recursion"),
        (b"[" * 100_000, "array"),
        (b'{"verb":"explain","path":"\\u0000ff","mount":1}', "$.mount"),
    ],
)
async def test_what_is_no_request_is_refused_with_the_reason_and_the_next_one_is_answered(
    place: Path, line: bytes, hint: str
) -> None:
    async with serving(place, echo), await trio.open_unix_socket(place) as stream:
        await stream.send_all(line + b'\n{"verb":"ping"}\n')
        received = b""
        while received.count(b"\n") < 2:
            received += await stream.receive_some()

    refused, answered = (schema.decode_reply(part) for part in received.splitlines())
    assert isinstance(refused, schema.Failed)
    assert refused.code == 2
    assert hint in refused.message
    assert answered == schema.Done()


async def test_a_line_without_end_is_refused(place: Path) -> None:
    async with serving(place, echo), await trio.open_unix_socket(place) as stream:
        received = b""

        async def receive() -> None:
            nonlocal received
            with suppress(trio.BrokenResourceError):
                while part := await stream.receive_some():
                    received += part

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await stream.send_all(b"x" * 1_000_000)
            nursery.cancel_scope.cancel()

        assert await answers(place, schema.Ping()) == [schema.Done()]


async def test_an_answer_that_is_too_long_is_said_so(place: Path) -> None:
    async def shout(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        yield schema.Text(text="x" * schema.MAX_LINE)

    async with serving(place, shout):
        (reply,) = await answers(place, schema.Metrics())

    assert isinstance(reply, schema.Failed)
    assert "longer than" in reply.message


async def test_a_bug_in_a_handler_is_told_and_logged_and_the_server_lives(place: Path, log_text: io.StringIO) -> None:
    log.register_secret("hunter2hunter2")

    async def broken(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        if isinstance(request, schema.Queue):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                raise KeyError("hunter2hunter2 is not here")
        yield schema.Done()

    async with serving(place, broken):
        (reply,) = await answers(place, schema.Queue())
        assert await answers(place, schema.Ping()) == [schema.Done()]

    assert isinstance(reply, schema.Failed)
    assert reply.code == 1
    assert "KeyError" in reply.message
    assert "hunter2" not in reply.message
    assert "Traceback" in log_text.getvalue()
    assert "hunter2" not in log_text.getvalue()


async def test_a_bug_that_shows_only_when_the_client_leaves_does_not_end_the_server(
    place: Path, log_text: io.StringIO
) -> None:
    started = trio.Event()

    async def broken_cleanup(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        async def fail_at_the_end() -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("bad cleanup")

        if isinstance(request, schema.Events):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail_at_the_end)
                started.set()
                await trio.sleep_forever()
        yield schema.Done()

    async with serving(place, broken_cleanup):
        async with await trio.open_unix_socket(place) as stream:
            await stream.send_all(b'{"verb":"events"}\n')
            await started.wait()
        while "bad cleanup" not in log_text.getvalue():
            await trio.lowlevel.checkpoint()
        assert await answers(place, schema.Ping()) == [schema.Done()]


@pytest.mark.parametrize("tasks", [1, 3])
async def test_a_client_that_leaves_while_many_are_asked_for_it_is_no_bug(
    place: Path, log_text: io.StringIO, tasks: int
) -> None:
    started, ended = trio.Event(), trio.Event()

    async def ask_many(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        if isinstance(request, schema.Status):
            try:
                async with trio.open_nursery() as outer:
                    for _ in range(tasks):
                        outer.start_soon(ask_one)
            finally:
                ended.set()
        yield schema.Done()

    async def ask_one() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            started.set()
            with trio.move_on_after(100):
                async with trio.open_nursery() as inner:
                    inner.start_soon(trio.sleep_forever)

    async with serving(place, ask_many):
        async with await trio.open_unix_socket(place) as stream:
            await stream.send_all(b'{"verb":"status"}\n')
            await started.wait()
        await ended.wait()
        assert await answers(place, schema.Ping()) == [schema.Done()]

    assert "bug" not in log_text.getvalue()


async def test_errors_of_ours_out_of_a_nursery_are_no_bug(place: Path, log_text: io.StringIO) -> None:
    async def fail() -> None:
        raise NotFound("a file that is not there")

    async def ask_two(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            nursery.start_soon(trio.sleep_forever)
        yield schema.Done()

    async with serving(place, ask_two):
        (reply,) = await answers(place, schema.Queue())

    assert isinstance(reply, schema.Failed)
    assert "a file that is not there" in reply.message
    assert "bug" not in reply.message + log_text.getvalue()


async def test_an_error_of_ours_reaches_the_client_as_its_text_alone(place: Path, log_text: io.StringIO) -> None:
    async def refuse(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        raise NotFound("/a: no such file")
        yield

    async with serving(place, refuse):
        assert await answers(place, schema.Ping()) == [schema.Failed(message="/a: no such file")]

    assert "Traceback" not in log_text.getvalue()


async def test_a_handler_that_ends_without_an_answer_leaves_nobody_waiting(place: Path) -> None:
    async def silent(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        if isinstance(request, schema.Text):
            yield schema.Done()

    async with serving(place, silent):
        (reply,) = await answers(place, schema.Ping())
        assert isinstance(reply, schema.Failed)
        assert await answers(place, schema.Events()) == [schema.Done()]


# --- who may speak -----------------------------------------------------------------------------------------------------


async def test_a_process_of_another_user_is_not_heard(place: Path, log_text: io.StringIO) -> None:
    heard = False

    async def listen(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        nonlocal heard
        heard = True
        yield schema.Done()

    async with serving(place, listen, allowed_uids={os.geteuid() + 1}):
        with pytest.raises(DaemonNotRunning):
            await answers(place, schema.Ping())

    assert not heard
    assert f"uid={os.geteuid()}" in log_text.getvalue()


def test_socket_and_directory_are_only_for_their_owner_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run" / "control.sock"
    old = os.umask(0)
    try:
        with open_listener(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    finally:
        os.umask(old)


def test_a_socket_that_nobody_answers_is_replaced(place: Path) -> None:
    open_listener(place).close()

    with open_listener(place), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(place))


def test_a_living_socket_is_refused_even_when_its_backlog_is_full(place: Path) -> None:
    with open_listener(place) as living:
        with pytest.raises(StateError, match="another daemon"):
            open_listener(place)

        living.listen(0)  # the attempt above is still waiting to be accepted: now it is full
        with pytest.raises(StateError, match="somebody holds"):
            open_listener(place)
        assert place.is_socket()


@pytest.mark.parametrize("kind", ["file", "symlink", "directory"])
def test_what_is_not_a_socket_is_left_alone(place: Path, kind: str) -> None:
    place.parent.mkdir(mode=0o700)
    if kind == "file":
        place.write_text("mine")
    elif kind == "symlink":
        place.symlink_to("elsewhere")
    else:
        place.mkdir()

    with pytest.raises(StateError, match="in the way"):
        open_listener(place)
    assert place.is_symlink() or place.exists()


def test_of_daemons_that_start_at_once_one_wins(place: Path) -> None:
    """A crashed daemon's socket lies there; two starts must not both think they replaced it."""
    open_listener(place).close()
    program = (
        "import sys, time; from pathlib import Path; from nbmountd.control.server import open_listener\n"
        "sys.stdin.readline()\n"
        "try: listener = open_listener(Path(sys.argv[1]))\n"
        "except Exception as exc: print(type(exc).__name__, flush=True)\n"
        "else: print('listening', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    results = []
    try:
        for start in starts:
            assert start.stdin is not None
            start.stdin.write("go\n")
            start.stdin.flush()
        for start in starts:
            assert start.stdout is not None
            results.append(start.stdout.readline().strip())
    finally:
        for start in starts:
            start.communicate("end\n")

    assert sorted(results) == ["StateError", "StateError", "listening"]


async def test_a_path_longer_than_an_address_of_a_socket_serves_too(tmp_path: Path) -> None:
    """A home may lie deep, and so may the directory of a test."""
    path = tmp_path / ("d" * 120) / ("e" * 120) / "control.sock"

    async with serving(path, echo):
        assert await answers(path, schema.Ping()) == [schema.Done(message="")]
        with closing(await trio.to_thread.run_sync(lambda: ask_sync(path, schema.Ping(), timeout=10))) as replies:
            assert await trio.to_thread.run_sync(lambda: next(replies)) == schema.Done(message="")
        with pytest.raises(StateError, match="another daemon is running"):
            open_listener(path)


# --- asking nobody -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["nothing", "stale socket", "file above"])
async def test_asking_nobody_says_that_the_daemon_is_not_running(place: Path, left: str) -> None:
    if left == "stale socket":
        open_listener(place).close()
    elif left == "file above":
        place.parent.write_text("")

    with pytest.raises(DaemonNotRunning):
        list(ask_sync(place, schema.Ping()))
    with pytest.raises(DaemonNotRunning):
        await answers(place, schema.Ping())


def test_a_daemon_that_never_answers_is_an_error_in_time(place: Path) -> None:
    with open_listener(place), pytest.raises(ControlError, match="did not answer"):
        list(ask_sync(place, schema.Ping(), timeout=0.05))


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\n", b'{"type":"later-version"}\n', b"\xff\n"])
async def test_an_answer_that_is_none_is_an_error(place: Path, answer: bytes) -> None:
    async def babble(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(answer)

    with open_listener(place) as listener:
        async with trio.open_nursery() as nursery:
            trio_listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
            nursery.start_soon(trio.serve_listeners, babble, [trio_listener])
            with trio.fail_after(5), pytest.raises(ControlError, match="makes no sense"):
                await answers(place, schema.Ping())
            nursery.cancel_scope.cancel()
