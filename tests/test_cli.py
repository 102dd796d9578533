"""The two command lines as a user runs them: output, exit status, and how fast they start.

The daemon is a stub handler behind the real server on a socket of the test's own.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from nbmountd.arguments import absolute
from nbmountd.control import schema
from nbmountd.control.server import open_listener, serve_requests
from nbmountd.errors import NotFound

CTL = [sys.executable, "-c", "from nbmountd.cli import nbmountctl; nbmountctl()"]
DAEMON = [sys.executable, "-c", "from nbmountd.cli import nbmountd; nbmountd()"]
REPOSITORY = Path(__file__).parent.parent

LIVE = schema.MountStatus(
    name="b2drop", path="/home/a/b2drop", backend="webdav", state="live", quota_used=2**30, quota_available=2**30
)
REFUSED = schema.MountStatus(
    name="workspace", path="/home/a/workspace", backend="webdav", state="unauthenticated",
    unsent_files=3, unsent_bytes=3 * 2**20,
)


class Stub:
    """Answers each request with what the test has put there, and keeps the requests."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.requests: list[schema.AnyRequest] = []
        self.replies: Sequence[schema.AnyReply | Exception] = [schema.Done()]
        self.asked, self.left_waiting = trio.Event(), trio.Event()

    async def handle(self, request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        self.requests.append(request)
        self.asked.set()
        try:
            for reply in self.replies:
                if isinstance(reply, Exception):
                    raise reply
                yield reply
            await trio.sleep_forever()
        finally:
            self.left_waiting.set()

    async def ctl(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """`nbmountctl ARGUMENTS` with this stub's socket, ended."""
        environ = {**os.environ, "NBMOUNTD_SOCKET": str(self.socket), **more}
        ended = await trio.run_process(
            [*CTL, *arguments], capture_stdout=True, capture_stderr=True, check=False, env=environ, cwd=REPOSITORY
        )
        return subprocess.CompletedProcess(arguments, ended.returncode, ended.stdout.decode(), ended.stderr.decode())


@asynccontextmanager
async def stub() -> AsyncIterator[Stub]:
    with tempfile.TemporaryDirectory(prefix="nbm-") as directory:
        running = Stub(Path(directory) / "c.sock")
        listener = open_listener(running.socket)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_requests, listener, running.handle)
            with trio.fail_after(60):
                yield running
            nursery.cancel_scope.cancel()


def run(*command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NBMOUNTD_", "WEBDAV_", "XDG_"))}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**clean, **environ}, cwd=REPOSITORY, timeout=60
    )


# --- starting fast -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [CTL, DAEMON], ids=["nbmountctl", "nbmountd"])
def test_help_imports_nothing_slow(command: list[str]) -> None:
    program = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('\\n'.join(sys.modules), file=sys.stderr))\n"
        f"sys.argv[1:] = ['--help']\n{command[-1]}"
    )
    ended = run(sys.executable, "-c", program)

    loaded = ended.stderr.split()
    slow = {"trio", "rich", "msgspec", "pyfuse3", "urllib3", "webdav3", "sqlite3", "asyncio", "nbmountd.backends"}
    assert ended.returncode == 0
    assert "nbmountd.cli" in loaded
    assert sorted(slow.intersection(loaded)) == []


async def test_a_request_needs_neither_trio_nor_rich() -> None:
    program = "import sys, atexit\natexit.register(lambda: print('\\n'.join(sys.modules), file=sys.stderr))\n" + CTL[-1]
    async with stub() as daemon:
        ended = await trio.run_process(
            [sys.executable, "-c", program, "--socket", str(daemon.socket), "sync"],
            capture_stdout=True, capture_stderr=True, cwd=REPOSITORY,
        )

    assert {"trio", "rich", "pyfuse3", "urllib3", "asyncio"}.intersection(ended.stderr.decode().split()) == set()


@pytest.mark.parametrize("command", [CTL, DAEMON], ids=["nbmountctl", "nbmountd"])
def test_help_costs_less_than_150_ms_of_processor_time(command: list[str]) -> None:
    """Best of five, because the machine may be busy."""

    def once() -> float:
        before = os.times()
        run(*command, "--help")
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(once() for _ in range(5)) < 0.15


def test_help_names_every_verb() -> None:
    shown = run(*CTL, "--help").stdout
    verbs = "status mount unmount sync queue refresh explain conflicts parked cache pin unpin prefetch events log-level metrics"
    assert [verb for verb in [*verbs.split(), "add", "remove", "doctor"] if f"  {verb} " not in shown] == []

    shown = run(*DAEMON, "--help").stdout
    assert [verb for verb in ("run", "demo", "config") if f"  {verb} " not in shown] == []


# --- what is asked -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "request_sent"),
    [
        ("status", schema.Status()),
        ("status --mount b2drop", schema.Status(mount="b2drop")),
        ("mount b2drop", schema.Mount(mount="b2drop")),
        ("unmount b2drop --timeout 1min", schema.Unmount(mount="b2drop", timeout=60.0)),
        ("sync", schema.Sync()),
        ("sync /x/a /x/b --timeout 5", schema.Sync(paths=("/x/a", "/x/b"), timeout=5.0)),
        ("queue", schema.Queue()),
        ("refresh", schema.Refresh()),
        ("refresh /x/a", schema.Refresh(path="/x/a")),
        ("explain /x/a", schema.Explain(path="/x/a")),
        ("conflicts", schema.Conflicts()),
        ("conflicts --keep remote /x/a", schema.Conflicts(path="/x/a", keep="remote")),
        ("parked", schema.Parked()),
        ("parked list", schema.Parked()),
        ("parked retry", schema.Parked(action="retry")),
        ("parked retry /x/a", schema.Parked(action="retry", path="/x/a")),
        ("parked export /x/out /x/a", schema.Parked(action="export", directory="/x/out", path="/x/a")),
        ("parked discard /x/a --yes", schema.Parked(action="discard", path="/x/a")),
        ("parked discard --all --yes", schema.Parked(action="discard")),
        ("cache", schema.Cache()),
        ("cache usage", schema.Cache()),
        ("cache evict /x/a", schema.Cache(evict=True, path="/x/a")),
        ("pin /x/a", schema.Pin(path="/x/a")),
        ("unpin /x/a", schema.Pin(path="/x/a", on=False)),
        ("prefetch /x/a", schema.Prefetch(path="/x/a")),
        ("events", schema.Events()),
        ("log-level debug", schema.LogLevel(level="debug")),
        ("metrics", schema.Metrics()),
    ],
)
async def test_each_verb_asks_for_what_it_says(arguments: str, request_sent: schema.AnyRequest) -> None:
    async with stub() as daemon:
        ended = await daemon.ctl(*arguments.split())

        assert ended.returncode == 0, ended.stderr
        assert daemon.requests == [request_sent]


@pytest.mark.parametrize(
    "arguments",
    [
        "dance", "mount", "sync --timeout soon", "explain", "conflicts --keep remote", "conflicts --keep mine /x",
        "parked discard", "parked discard /x --all", "log-level loud", "cache melt", "status extra", "refresh a b",
    ],
)
def test_a_wrong_use_ends_with_2_and_asks_nobody(arguments: str) -> None:
    ended = run(*CTL, "--socket", "/nowhere/s", *arguments.split())

    assert ended.returncode == 2
    assert "Usage:" in ended.stderr
    assert ended.stdout == ""


async def test_discarding_asks_first_and_no_is_no() -> None:
    async with stub() as daemon:
        ended = await trio.run_process(
            [*CTL, "--socket", str(daemon.socket), "parked", "discard", "/x/a"], stdin=b"n\n",
            capture_stdout=True, capture_stderr=True, check=False, cwd=REPOSITORY,
        )

        assert ended.returncode != 0
        assert b"/x/a" in ended.stderr
        assert daemon.requests == []


def test_a_path_becomes_absolute_and_its_last_symlink_stays(tmp_path: Path) -> None:
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "last").symlink_to("below")
    root = os.path.realpath(tmp_path)

    assert absolute(f"{tmp_path}/link/last") == f"{root}/real/last"
    assert absolute(f"{tmp_path}/link/last/") == f"{root}/real/last"
    assert absolute(f"{tmp_path}/link/absent") == f"{root}/real/absent"
    assert absolute(f"{tmp_path}/link/last/..") == f"{root}/real"
    assert absolute("here") == os.path.join(os.getcwd(), "here")
    assert absolute("/") == "/"
    assert absolute(".") == os.getcwd()


# --- what is shown -----------------------------------------------------------------------------------------------------


async def test_status_is_aligned_and_says_what_to_do() -> None:
    async with stub() as daemon:
        daemon.replies = [schema.StatusReply(version="0.1.0", pid=1, safe=False, mounts=(LIVE, REFUSED))]

        ended = await daemon.ctl("status")

    assert ended.stdout.splitlines() == [
        "b2drop     live             /home/a/b2drop     safe            1.0 GiB of 2.0 GiB used",
        "workspace  unauthenticated  /home/a/workspace  3 files unsent",
        "    the credential is missing or refused; put a valid one in its place and it goes on by itself",
        "    3.0 MiB not yet sent ('nbmountctl queue')",
        "not yet safe: 3 files, 3.0 MiB; 'nbmountctl sync' sends them and waits",
    ]


REPLIES: list[tuple[str, schema.AnyReply, list[str]]] = [
    ("queue", schema.QueueReply(items=(), total=0), ["nothing is waiting"]),
    (
        "queue",
        schema.QueueReply(
            items=(
                schema.QueueItem(mount="m", path="/a", step="upload", state="running", size=2048, sent=1024),
                schema.QueueItem(mount="m", path="/b", step="upload", state="retrying", due_in=90, error="507 full"),
            ),
            total=5,
        ),
        ["50 %", "2.0 KiB", "/a", "in 90 s", "507 full", "... and 3 more"],
    ),
    ("explain /a", schema.ExplainReply(fields=(("name", "a"), ("version", '"1"'))), ["name     a", 'version  "1"']),
    (
        "conflicts",
        schema.ConflictsReply(items=(schema.Conflict(mount="m", path="/a", copy="/a (conflict)", at=0, local_size=5),)),
        ["/a (conflict)", "5 B", "--keep"],
    ),
    ("conflicts", schema.ConflictsReply(items=()), ["no conflicts"]),
    (
        "parked",
        schema.ParkedReply(items=(schema.ParkedItem(mount="m", path="/a", step="upload", size=5, error="too large", at=0),)),
        ["/a", "too large", "parked retry"],
    ),
    ("parked", schema.ParkedReply(items=()), ["nothing is parked"]),
    ("cache", schema.CacheReply(mounts=(("m", 1024, 2048),)), ["m", "1.0 KiB", "of 2.0 KiB"]),
    ("metrics", schema.Text(text="a 1\nb 2\n"), ["a 1\nb 2\n"]),
    ("mount m", schema.Done(message="mounted at /m"), ["mounted at /m"]),
    ("status", schema.StatusReply(version="1", pid=1, safe=True, mounts=(LIVE,)), ["everything is safe"]),
    ("status", schema.StatusReply(version="1", pid=1, safe=True, mounts=()), ["no mounts"]),
]


@pytest.mark.parametrize(("arguments", "reply", "parts"), REPLIES)
async def test_each_reply_is_shown_and_as_json_is_the_reply(arguments: str, reply: schema.AnyReply, parts: list[str]) -> None:
    async with stub() as daemon:
        daemon.replies = [reply]
        shown = await daemon.ctl(*arguments.split())
        as_json = await daemon.ctl("--json", *arguments.split())

    assert (shown.returncode, as_json.returncode) == (0, 0)
    assert [part for part in parts if part not in shown.stdout] == [], shown.stdout
    assert schema.decode_reply(as_json.stdout.encode()) == reply


async def test_names_from_a_remote_cannot_steer_the_terminal() -> None:
    async with stub() as daemon:
        name = "/a\x1b[2J\r\n\udcff\u202e"
        daemon.replies = [schema.QueueReply(items=(schema.QueueItem(mount="m", path=name, step="s", state="open"),), total=1)]
        ended = await daemon.ctl("queue")

    assert "\x1b" not in ended.stdout
    assert len(ended.stdout.splitlines()) == 1
    assert r"/a\x1b[2J\r\n\xff\u202e" in ended.stdout


async def test_a_name_that_is_not_utf_8_can_be_asked_for() -> None:
    async with stub() as daemon:
        await trio.run_process([*CTL, "--socket", str(daemon.socket), "explain", b"/x/latin-\xfc"], cwd=REPOSITORY)

        assert daemon.requests == [schema.Explain(path="/x/latin-\udcfc")]


# --- long requests -----------------------------------------------------------------------------------------------------

PROGRESS = schema.Progress(files_left=2, bytes_left=1024, bytes_total=2048, current="/a")


async def test_sync_shows_progress_beside_the_result() -> None:
    async with stub() as daemon:
        daemon.replies = [PROGRESS, PROGRESS, schema.Done()]
        shown = await daemon.ctl("sync")
        as_json = await daemon.ctl("--json", "sync")

    assert shown.stdout == "safe\n"
    assert shown.stderr == "2 files, 1.0 KiB to go: /a\n"
    assert json.loads(as_json.stdout)["type"] == "done"
    assert [json.loads(line)["type"] for line in as_json.stderr.splitlines()] == ["progress", "progress"]


async def test_sync_draws_a_bar_on_a_terminal() -> None:
    async with stub() as daemon:
        daemon.replies = [PROGRESS, schema.Done()]
        ours, theirs = pty.openpty()
        try:
            await trio.run_process(
                [*CTL, "--socket", str(daemon.socket), "sync"], stdout=theirs, stderr=theirs,
                env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}, cwd=REPOSITORY,
            )
            drawn = os.read(ours, 100_000).decode()
        finally:
            os.close(ours)
            os.close(theirs)

    assert "1.0/2.0 KiB" in drawn
    assert "2 left" in drawn
    assert drawn.rstrip().endswith("safe")


async def test_sync_that_is_not_safe_in_time_ends_with_4() -> None:
    async with stub() as daemon:
        daemon.replies = [PROGRESS, schema.Failed(message="2 files are not safe", code=4)]
        shown = await daemon.ctl("sync", "--timeout", "1")
        as_json = await daemon.ctl("--json", "sync", "--timeout", "1")

    assert (shown.returncode, as_json.returncode) == (4, 4)
    assert shown.stderr.endswith("nbmountctl: 2 files are not safe\n")
    assert json.loads(as_json.stdout) == {"type": "failed", "message": "2 files are not safe", "code": 4}


@pytest.mark.parametrize("verb", ["sync", "events"])
async def test_an_interrupt_is_quiet_and_ends_the_request(verb: str) -> None:
    async with stub() as daemon:
        daemon.replies = []
        command = [*CTL, "--socket", str(daemon.socket), verb]
        process = await trio.lowlevel.open_process(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY
        )
        await daemon.asked.wait()
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = b"".join([part async for part in process.stderr])
        await process.wait()
        await daemon.left_waiting.wait()
        await process.stdout.aclose()  # type: ignore[union-attr]

    assert process.returncode == 130
    assert said.strip() == b""


async def test_a_reader_that_leaves_ends_the_program_quietly() -> None:
    async with stub() as daemon:
        daemon.replies = [schema.Event(at=0, mount="m", event="e", path="x" * 1000)] * 2000
        command = f"{sys.executable} -c '{CTL[-1]}' --socket {daemon.socket} events | head -n 1"
        ended = await trio.run_process(command, shell=True, capture_stdout=True, capture_stderr=True, cwd=REPOSITORY)

    assert ended.stdout.count(b"\n") == 1
    assert ended.stderr == b""


async def test_watching_shows_the_status_again_when_it_changes() -> None:
    async with stub() as daemon:
        daemon.replies = [schema.StatusReply(version="1", pid=1, safe=False, mounts=(REFUSED,))]
        process = await trio.lowlevel.open_process(
            [*CTL, "--json", "--socket", str(daemon.socket), "status", "--watch"], stdout=subprocess.PIPE, cwd=REPOSITORY
        )
        assert process.stdout is not None
        received = b""
        async for part in process.stdout:
            received += part
            if received.count(b"\n") == 1:
                daemon.replies = [schema.StatusReply(version="1", pid=1, safe=True, mounts=(LIVE,))]
            if received.count(b"\n") == 2:
                break
        process.send_signal(signal.SIGINT)
        await process.wait()
        await process.stdout.aclose()

    assert [json.loads(line)["safe"] for line in received.splitlines()] == [False, True]


# --- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["status", "status --watch", "sync", "queue", "explain /x", "mount a", "events"])
def test_without_a_daemon_each_verb_ends_with_3_and_says_how_to_start_it(verb: str, tmp_path: Path) -> None:
    ended = run(*CTL, "--socket", str(tmp_path / "none"), *verb.split())
    as_json = run(*CTL, "--json", "--socket", str(tmp_path / "none"), *verb.split())

    assert (ended.returncode, as_json.returncode) == (3, 3)
    assert "not running" in ended.stderr
    assert "nbmountd run" in ended.stderr
    assert json.loads(as_json.stdout)["code"] == 3
    assert "Traceback" not in ended.stderr + as_json.stderr


async def test_a_refusal_is_shown_and_ends_with_its_code() -> None:
    async with stub() as daemon:
        daemon.replies = [NotFound("/x/a: no such file")]
        ended = await daemon.ctl("explain", "/x/a")

    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", "nbmountctl: /x/a: no such file\n")


# --- nbmountd ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / ".config" / "nbmountd").mkdir(parents=True)
    yield tmp_path


def test_config_check_prints_a_line_for_each_mount_and_no_secret(home: Path) -> None:
    file = home / "c.toml"
    file.write_text(
        '[[mount]]\nname = "b2drop"\npath = "~/b2drop"\nbackend = "webdav"\nurl = "https://h/"\npassword = "hunter2"\n'
        '[[mount]]\nname = "shared"\npath = "~/shared"\nbackend = "directory"\nsource = "/srv"\nread_only = true\n'
    )

    ended = run(*DAEMON, "config", "check", "--config", str(file), HOME=str(home))

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        f"{file}: correct, 2 mounts",
        f"b2drop  webdav     read-write  {home}/b2drop",
        f"shared  directory  read-only   {home}/shared",
    ]


@pytest.mark.parametrize("verb", ["config check", "run"])
def test_a_wrong_configuration_ends_with_2_and_names_the_place(home: Path, verb: str) -> None:
    file = home / "c.toml"
    file.write_text("[daemon]\ncache_sise = 3\n")

    ended = run(*DAEMON, *verb.split(), "--config", str(file), HOME=str(home))

    assert ended.returncode == 2
    assert ended.stderr == f'nbmountd: {file}:2: [daemon]: cache_sise: unknown key; did you mean "cache_size"?\n'


def test_without_any_configuration_it_says_where_it_looked(home: Path) -> None:
    ended = run(*DAEMON, "run", HOME=str(home))

    assert ended.returncode == 2
    assert "config.toml" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_config_schema_is_json(home: Path) -> None:
    assert json.loads(run(*DAEMON, "config", "schema").stdout)["title"] == "nbmountd configuration"


def test_the_version_is_told() -> None:
    assert run(*DAEMON, "--version").stdout == run(*CTL, "--version").stdout != ""


