"""What a mount of Nextcloud promises beyond the suite: nothing damaged by a cut, bytes told apart, no account locked out."""

from __future__ import annotations

import hashlib
import http.client
import unicodedata
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from nbmountd.backends import nextcloud
from nbmountd.backends.base import NoTicket
from nbmountd.backends.nextcloud import split_address
from nbmountd.backends.nextcloud_login import log_in
from nbmountd.backends.nextcloud_uploads import CHUNK
from nbmountd.backends.webdav import WebDAVBackend
from nbmountd.backends.webdav_entries import nextcloud_version, strong_tag, tells
from nbmountd.config import B2DROPOptions, NextcloudOptions, WebDAVOptions
from nbmountd.errors import (
    NameRefused,
    ParentMissing,
    RemoteError,
    RemoteFull,
    RemoteLocked,
    RemoteProtocolError,
    RemoteUnavailable,
    Unauthenticated,
    VersionMismatch,
)
from nbmountd.escapes import NEXTCLOUD
from nbmountd.model import Attributes, Entry, Kind, Place
from tests.backends.suite import BytesBody, at, free, listing, pattern, read, upload
from tests.servers import FakeNextcloud

MTIME = 1_600_000_000 * 10**9
NO_ATTRIBUTES = Attributes()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeNextcloud]:
    directory = tmp_path_factory.mktemp("nextcloud")
    server = FakeNextcloud(directory / "root", directory / "work")
    with server:
        yield server


@pytest.fixture
def server(running: FakeNextcloud) -> FakeNextcloud:
    running.hook()
    running.clear_requests()
    return running


@asynccontextmanager
async def mounted(
    server: FakeNextcloud, folder: str = "", *, origin: str | None = None, **options: Any
) -> AsyncIterator[WebDAVBackend]:
    """A connected backend on `folder` of the user's files, which is made; by way of `origin` instead of the server's."""
    (server.root / folder).mkdir(exist_ok=True)
    url = f"{origin or server.origin}/remote.php/dav/files/whoever/{folder}"
    given = {"user": server.user, "password": server.password, **options}
    backend = WebDAVBackend(WebDAVOptions(url=url, **given))
    try:
        await backend.connect()
        yield backend
    finally:
        await backend.aclose()


def another_client(server: FakeNextcloud, method: str, path: str, body: bytes = b"", **headers: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    login = b64encode(f"{server.user}:{server.password}".encode()).decode()
    connection.request(method, server.prefix + path, body, {"Authorization": f"Basic {login}", **headers})
    status = connection.getresponse().status
    connection.close()
    return status


def methods(server: FakeNextcloud) -> list[str]:
    """METHOD and the first name below remote.php/dav of each request, such as "PUT uploads"."""
    found = []
    for line in server.every_request():
        method, path, _ = line.rsplit(" ", 2)
        found.append(f"{method} {path.removeprefix('/remote.php/dav/').partition('/')[0]}")
    return found


# --- finding it ---


@pytest.mark.parametrize(
    ("path", "base", "below"),
    [
        ("/remote.php/webdav", "", ()),
        ("/remote.php/webdav/a%20b/c", "", ("a b", "c")),
        ("/remote.php/dav/files/me/sub/", "", ("sub",)),
        ("/cloud/remote.php/dav/files/me", "/cloud", ()),
        ("/cloud/index.php/", "/cloud", ()),
        ("/", "", ()),
        ("", "", ()),
    ],
)
def test_every_form_of_the_address_is_understood(path: str, base: str, below: tuple[str, ...]) -> None:
    assert split_address(path) == (base, below)


@pytest.mark.parametrize("form", ["/remote.php/webdav/{}", "/remote.php/dav/files/whoever/{}"])
async def test_the_old_and_the_new_address_lead_to_the_files_of_the_user_by_her_internal_id(
    server: FakeNextcloud, form: str
) -> None:
    (server.root / "found").mkdir(exist_ok=True)
    (server.root / "found" / "file").unlink(missing_ok=True)
    options = WebDAVOptions(url=server.origin + form.format("found"), user=server.user, password=server.password)
    backend = WebDAVBackend(options)
    can = await backend.connect()
    await upload(backend, free("file"), b"1")
    await backend.aclose()

    assert (server.root / "found" / "file").read_bytes() == b"1"
    assert all("/dav/files/alice-id/" in line for line in server.every_request() if line.startswith("PUT"))
    assert (can.propagating_versions, can.stable_ids, can.native_mtime, can.checksum_algorithm, can.max_name_bytes) == (
        True, True, True, "sha1", 250
    )  # fmt: skip


@pytest.mark.parametrize("kind", [WebDAVOptions, NextcloudOptions, B2DROPOptions])
async def test_the_address_of_the_web_pages_is_enough(server: FakeNextcloud, kind: type[WebDAVOptions]) -> None:
    backend = WebDAVBackend(kind(url=server.origin, user=server.user, password=server.password))
    await backend.connect()
    await backend.list(Place())
    await backend.aclose()

    assert backend.habits.name == "Nextcloud"
    assert B2DROPOptions().url == "https://b2drop.eudat.eu"


async def test_one_refused_password_is_one_request(server: FakeNextcloud) -> None:
    """Eleven of them within half an hour, and everybody behind our address is locked out."""
    backend = WebDAVBackend(WebDAVOptions(url=server.origin + "/remote.php/webdav/", user="alice", password="wrong"))
    for _ in range(13):
        with pytest.raises(Unauthenticated, match="password"):
            await backend.connect()
    await backend.aclose()

    assert len([line for line in server.every_request() if line.endswith(" 401")]) == 1


# --- nothing is damaged ---


async def test_requests_of_an_upload(server: FakeNextcloud) -> None:
    async with mounted(server, "count") as backend:
        server.clear_requests()
        entry = await upload(backend, free("file"), b"new", attributes=Attributes(mtime_ns=MTIME))
        new = methods(server)
        server.clear_requests()
        await upload(backend, at(entry), b"over", entry.version, Attributes(mtime_ns=MTIME))
        over = methods(server)

    assert new == ["PUT files"]
    assert over == ["MKCOL uploads", "PUT uploads", "PROPFIND files", "MOVE uploads"]


async def test_what_an_upload_answers_is_what_a_listing_says(server: FakeNextcloud) -> None:
    async with mounted(server, "answers") as backend:
        first = await upload(backend, free("file"), b"new", attributes=Attributes(mtime_ns=MTIME + 5))
        listed_first = (await listing(backend))["file"]
        second = await upload(backend, at(first), b"replaced", first.version, Attributes(mtime_ns=MTIME))
        listed_second = (await listing(backend))["file"]

    assert first == listed_first
    assert second == listed_second
    assert (first.id, first.attributes.mtime_ns) == (second.id, MTIME)
    assert second.checksums == {"SHA1": hashlib.sha1(b"replaced").hexdigest()}


class CuttingProxy:
    """Passes bytes on to a server until `budget` have gone there; then every connection ends and no other is taken.

    `answers`: the answers to what has gone through are passed back still.
    """

    def __init__(self, port: int, budget: float, *, answers: bool) -> None:
        self.port = port
        self.budget = budget
        self.answers = answers
        self.passed = 0
        self.origin = ""

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.origin = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        await trio.serve_listeners(self.serve, listeners, task_status=task_status)  # type: ignore[arg-type]

    async def serve(self, client: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with client, await trio.open_tcp_stream("127.0.0.1", self.port) as server, trio.open_nursery() as nursery:
                nursery.start_soon(self.back, server, client, nursery.cancel_scope)
                async for data in client:
                    passed = data[: max(0, int(min(len(data), self.budget - self.passed)))]
                    self.passed += len(passed)
                    if passed:
                        await server.send_all(passed)
                    if self.passed >= self.budget:
                        await server.send_eof()
                        with trio.move_on_after(0.05 if self.answers else 0):
                            await trio.sleep_forever()
                        break
                nursery.cancel_scope.cancel()

    async def back(self, server: trio.SocketStream, client: trio.SocketStream, scope: trio.CancelScope) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in server:
                if self.passed >= self.budget and not self.answers:
                    break
                await client.send_all(data)
        scope.cancel()


async def overwrite_through(
    server: FakeNextcloud, name: str, budget: float, old: bytes, new: bytes, *, answers: bool
) -> tuple[int, Exception | None, Entry, Entry, bytes]:
    """Bytes that went through, what the overwrite raised, the file's entry before and after, and its content."""
    async with trio.open_nursery() as nursery:
        proxy = CuttingProxy(server.port, float("inf"), answers=answers)
        await nursery.start(proxy.run)
        error: Exception | None = None
        async with mounted(server, "cut", origin=proxy.origin) as backend:
            before = await upload(backend, free(name), old, attributes=Attributes(mtime_ns=MTIME))
            begun = proxy.passed
            proxy.budget = begun + budget
            try:
                await upload(backend, at(before), new, before.version, Attributes(mtime_ns=MTIME))
            except RemoteError as exc:
                error = exc
        nursery.cancel_scope.cancel()
    async with mounted(server, "cut") as backend:
        await trio.sleep(0.02)  # what has reached the server is done, or being done: reading waits for that
        after = await backend.stat(at(before))
        content = await read(backend, at(before), None, 0, after.size or 0)
    return proxy.passed - begun, error, before, after, content


async def test_an_overwrite_cut_anywhere_leaves_the_old_or_the_new_content_with_id_and_versions(server: FakeNextcloud) -> None:
    """At fifty points of all that goes to the server, and at three from which no answer comes back."""
    old, new = pattern(60_000), pattern(50_000)[::-1]
    whole, error, _, _, _ = await overwrite_through(server, "whole", float("inf"), old, new, answers=True)
    assert error is None
    seen = set()
    for point in range(50):
        budget = whole * point // 49
        for answers in (True, False) if point >= 47 else (True,):
            name = f"{point} {answers}"
            _, error, before, after, content = await overwrite_through(server, name, budget, old, new, answers=answers)

            assert content in (old, new), f"cut after {budget} of {whole} bytes: {len(content)} bytes are left"
            assert after.id == before.id
            assert server.versions(server.root / "cut" / name) == ([old] if content == new else [])
            if content == new and error is not None:
                assert isinstance(error, RemoteError)
                assert error.in_doubt, error
            if error is None:
                assert content == new
            seen.add((content == new, error is None))
    assert (False, False) in seen
    assert (True, False) in seen


async def test_a_lost_answer_is_in_doubt_and_asking_tells(server: FakeNextcloud) -> None:
    async with mounted(server, "lost") as backend:
        entry = await upload(backend, free("file"), b"old")
        server.hook(lose={"MOVE": 1})
        with pytest.raises(RemoteUnavailable) as lost:
            await upload(backend, at(entry), b"newer", entry.version)
        now = await backend.stat(at(entry))

    assert lost.value.in_doubt
    assert now.checksums["SHA1"] == hashlib.sha1(b"newer").hexdigest()


@pytest.mark.parametrize(("status", "kind"), [(404, RemoteUnavailable), (423, RemoteLocked), (504, RemoteUnavailable)])
async def test_an_answer_that_may_mean_that_it_was_done_is_in_doubt(
    server: FakeNextcloud, status: int, kind: type[RemoteError]
) -> None:
    async with mounted(server, "doubt") as backend:
        entry = await upload(backend, free(f"file{status}"), b"old")
        server.hook(refuse={"MOVE": [status, 1]})
        with pytest.raises(kind) as refused:
            await upload(backend, at(entry), b"newer", entry.version)

    assert refused.value.in_doubt
    assert refused.value.transient


async def test_a_file_that_is_being_put_together_is_not_touched(server: FakeNextcloud) -> None:
    async with mounted(server, "busy") as backend:
        entry = await upload(backend, free("file"), b"old")
        server.hook(assembling=0.5)
        results: list[object] = []

        async def overwrite(content: bytes) -> None:
            try:
                results.append(await upload(backend, at(entry), content, entry.version))
            except (RemoteLocked, VersionMismatch) as exc:
                results.append(exc)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(overwrite, b"one")
            nursery.start_soon(overwrite, b"three")

    assert sorted(isinstance(result, Entry) for result in results) == [False, True]
    assert (server.root / "busy" / "file").read_bytes() in (b"one", b"three")


class Memory:
    """A ticket that lives on."""

    token: str | None = None

    async def remember(self, token: str) -> None:
        self.token = token


async def test_a_large_upload_goes_on_where_it_was(server: FakeNextcloud) -> None:
    content = pattern(3 * CHUNK + 5)
    ticket = Memory()
    async with mounted(server, "large") as backend:
        entry = await upload(backend, free("file"), b"old")
        server.hook(refuse={"MOVE": [503, 1]})
        with pytest.raises(RemoteUnavailable):
            await backend.upload(
                at(entry), BytesBody(content), replaces=entry.version, attributes=NO_ATTRIBUTES, ticket=ticket
            )
    server.hook()
    parts = server.work / "uploads" / str(ticket.token).partition(";")[0]
    (parts / "00002").unlink()  # as if it had never arrived
    server.clear_requests()
    async with mounted(server, "large") as backend:  # another process
        done = await backend.upload(
            at(entry), BytesBody(content), replaces=entry.version, attributes=NO_ATTRIBUTES, ticket=ticket
        )
        sent = [line.split()[1].rpartition("/")[2] for line in server.every_request() if line.startswith("PUT")]

    assert sent == ["00002"]
    assert (server.root / "large" / "file").read_bytes() == content
    assert done.checksums["SHA1"] == hashlib.sha1(content).hexdigest()
    assert not parts.exists()


async def test_a_large_new_file_goes_in_parts_and_never_over_one_that_came_meanwhile(server: FakeNextcloud) -> None:
    content = pattern(CHUNK + 1)
    async with mounted(server, "new") as backend:
        made = await upload(backend, free("file"), content)
        with pytest.raises(RemoteError):
            await upload(backend, free("file"), content)
        with pytest.raises((ParentMissing, RemoteError)):
            await upload(backend, Place(("absent", "file")), content)

    assert made.size == CHUNK + 1
    assert (server.root / "new" / "file").read_bytes() == content
    assert not [line for line in server.every_request() if line.startswith("PUT") and "/files/" in line]


async def test_a_full_server_says_so_before_all_was_sent(server: FakeNextcloud) -> None:
    async with mounted(server, "full") as backend:
        entry = await upload(backend, free("file"), b"old")
        server.hook(quota=CHUNK)
        body = BytesBody(bytes(8 * CHUNK))
        with pytest.raises(RemoteFull):
            await backend.upload(
                at(entry), body, replaces=entry.version, attributes=NO_ATTRIBUTES, ticket=NoTicket()
            )
        quota = await backend.quota()

    assert body.position < body.size
    assert quota.available == CHUNK
    assert (server.root / "full" / "file").read_bytes() == b"old"


# --- versions ---


async def test_contents_of_one_size_and_second_are_told_apart(server: FakeNextcloud) -> None:
    """Nextcloud gives them one ETag; we do not repeat size and second, and others' lack our checksum."""
    async with mounted(server, "same") as backend:
        wanted = Attributes(mtime_ns=MTIME)
        first = await upload(backend, free("file"), b"aaaa", attributes=wanted)
        second = await upload(backend, at(first), b"bbbb", first.version, wanted)
        stamp = str((second.attributes.mtime_ns or 0) // 10**9)
        assert another_client(server, "PUT", "same/file", b"cccc", **{"X-OC-Mtime": stamp}) == 204
        theirs = await backend.stat(at(first))
        with pytest.raises(VersionMismatch):
            await upload(backend, at(second), b"dddd", second.version, wanted)
        with pytest.raises(VersionMismatch):
            await read(backend, at(second), second.version, 0, 4)

    assert strong_tag(first.version or "") != strong_tag(second.version or "")  # type: ignore[arg-type]
    assert strong_tag(theirs.version or "") == strong_tag(second.version or "")  # type: ignore[arg-type]
    assert theirs.version != second.version
    assert (server.root / "same" / "file").read_bytes() == b"cccc"


def test_an_answer_of_another_checksum_is_another_version() -> None:
    version = nextcloud_version("tag", 4, 1_600_000_000, "SHA1:AA")
    headers = {"etag": '"tag"', "last-modified": "Sun, 13 Sep 2020 12:26:40 GMT"}

    assert tells(version, headers, 4) is None
    assert tells(version, {**headers, "oc-checksum": "SHA1:aa"}, 4) is True
    assert tells(version, {**headers, "oc-checksum": "MD5:bb"}, 4) is True
    assert tells(version, {**headers, "oc-checksum": "SHA1:bb"}, 4) is False
    assert tells(version, headers, 5) is False
    assert tells(version, {}, 4) is None


async def test_setting_the_time_keeps_bytes_and_id(server: FakeNextcloud) -> None:
    async with mounted(server, "times") as backend:
        entry = await upload(backend, free("file"), b"content")
        changed = await backend.set_attributes(at(entry), Attributes(mtime_ns=MTIME), kind=Kind.FILE)
        content = await read(backend, at(changed), changed.version, 0, 7)

    assert changed.attributes.mtime_ns == MTIME
    assert (changed.id, changed.checksums, content) == (entry.id, entry.checksums, b"content")


async def test_a_time_that_would_be_a_server_error_is_moved(server: FakeNextcloud) -> None:
    async with mounted(server, "early") as backend:
        entry = await upload(backend, free("file"), b"1", attributes=Attributes(mtime_ns=0))

    assert entry.attributes.mtime_ns == nextcloud.FIRST_SECOND * 10**9


async def test_a_folder_s_version_tells_of_everything_below_it_and_of_nothing_beside(server: FakeNextcloud) -> None:
    async with mounted(server, "etags") as backend:
        left, right = [await backend.make_directory(free(name), NO_ATTRIBUTES) for name in ("left", "right")]
        deep = await backend.make_directory(free("deep", at(left)), NO_ATTRIBUTES)
        before = {entry.name: entry.version for entry in await backend.list(Place())}
        root = await backend.stat(Place())
        await upload(backend, free("file", at(deep, at(left))), b"1")
        after = {entry.name: entry.version for entry in await backend.list(Place())}

        assert (await backend.stat(Place())).version != root.version
    assert before["left"] != after["left"]
    assert before["right"] == after["right"] == right.version


# --- asking politely ---


async def test_too_many_requests_and_maintenance_pause_the_mount(server: FakeNextcloud) -> None:
    async with mounted(server, "pause") as backend:
        server.hook(refuse={"PROPFIND": [429, 1]})
        with pytest.raises(RemoteUnavailable) as throttled:
            await backend.list(Place())
        server.hook(maintenance=True)
        with pytest.raises(RemoteUnavailable, match="maintenance mode") as away:
            await backend.list(Place())

    assert (throttled.value.retry_after or 0) >= 30
    assert (away.value.retry_after or 0) >= 10


@pytest.mark.parametrize("forget", [False, True])
async def test_a_huge_folder_is_listed_in_pages_and_is_whole(
    server: FakeNextcloud, monkeypatch: pytest.MonkeyPatch, forget: bool
) -> None:
    monkeypatch.setattr(nextcloud, "PAGE", 40)  # a constant of ours, so that the folder need not be huge
    async with mounted(server, "pages") as backend:
        for number in range(100):
            (server.root / "pages" / f"{number:03}").touch()
        server.hook(forget_pages=forget)
        server.clear_requests()
        names = [entry.name for entry in await backend.list(Place())]
        requests = len(server.requests("pages"))

    assert sorted(names) == [f"{number:03}" for number in range(100)]
    assert requests == 3


ODD_NAMES = [
    ".htaccess", "film.part", "film.FilePart", "a\\b", "new\nline", "cafe\u0301", "\u241b5c;", "\u212b", "\u1100\u1161",
    "not \udcff text",
]  # fmt: skip


async def test_a_name_that_the_server_refuses_or_changes_comes_back_as_it_was_written(server: FakeNextcloud) -> None:
    async with mounted(server, "names") as backend:
        await upload(backend, free("caf\u00e9"), b"composed")
        for name in ODD_NAMES:
            content = ascii(name).encode()
            entry = await upload(backend, free(name), content)
            assert await read(backend, at(entry), entry.version, 0, len(content)) == content
            await backend.make_directory(free(f"d {name}"), NO_ATTRIBUTES)
        found = await listing(backend)

    assert set(found) == {"caf\u00e9", *ODD_NAMES, *(f"d {name}" for name in ODD_NAMES)}
    assert (server.root / "names" / "caf\u00e9").read_bytes() == b"composed"


@given(st.text(st.sampled_from("ab.\\\n\u241b5c;e\u0301\u00e9\u212b\u1100\u1161.part\udcff"), min_size=1, max_size=12))
def test_every_name_is_kept_and_no_two_are_one(name: str) -> None:
    there = NEXTCLOUD.stored(name)

    assert NEXTCLOUD.shown(there) == name
    assert unicodedata.is_normalized("NFC", there)
    assert not set(there) & {"\\", "\n", "\udcff"}
    assert not there.lower().endswith((".part", ".filepart"))
    if unicodedata.is_normalized("NFC", name):  # as somebody else may have called a file
        assert NEXTCLOUD.stored(NEXTCLOUD.shown(name)) == name or not NEXTCLOUD._is_kept(name)


@pytest.mark.parametrize("name", ["x" * 251, "\u00fc" * 126, "x" * 245 + "\\"])
async def test_a_name_that_is_too_long_is_refused(server: FakeNextcloud, name: str) -> None:
    async with mounted(server, "long") as backend:
        with pytest.raises(NameRefused):
            await upload(backend, free(name), b"1")
        with pytest.raises(NameRefused):
            await backend.make_directory(free(name), NO_ATTRIBUTES)

    assert list((server.root / "long").iterdir()) == []


# --- logging in ---


@pytest.mark.parametrize("form", ["", "/remote.php/webdav/", "/remote.php/dav/files/whoever/"])
async def test_a_person_agrees_in_the_browser_and_the_password_works(server: FakeNextcloud, form: str) -> None:
    pages: list[str] = []

    def agree(page: str) -> None:
        pages.append(page)
        assert server.grant(page) == 200

    granted = await log_in(NextcloudOptions(url=server.origin + form), agree, poll=0.01)
    backend = WebDAVBackend(NextcloudOptions(url=server.origin, user=granted.user, password=granted.password))
    await backend.connect()
    await backend.aclose()

    assert granted.user == server.user
    assert granted.password not in repr(pages)


async def test_a_log_in_that_leads_elsewhere_is_refused(server: FakeNextcloud) -> None:
    """The address that the person is shown, and the one that gets the token, are the configured server's."""
    server.hook(elsewhere="https://evil.example")
    with pytest.raises(RemoteProtocolError, match="elsewhere"):
        await log_in(NextcloudOptions(url=server.origin), lambda page: pytest.fail(page), poll=0.01)


async def test_a_server_that_takes_its_time_gets_no_more_requests_for_it(server: FakeNextcloud) -> None:
    """50 ms a request, whatever it is: what counts is how many there are."""
    async with mounted(server, "slow") as backend:
        server.hook(delay=0.05)
        server.clear_requests()
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(upload, backend, free(f"{number}"), b"1")
        seconds = trio.current_time() - began

    assert methods(server) == ["PUT files"] * 8
    assert seconds < 8 * 0.05 + 1.0
