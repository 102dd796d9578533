"""What the WebDAV backend promises beyond the suite: odd servers, cut transfers, damage prevented, requests saved."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from nbmountd.backends import multistatus
from nbmountd.backends.base import NoTicket
from nbmountd.backends.http_exchange import Answer
from nbmountd.backends.multistatus import MultiStatusParser
from nbmountd.backends.policy import PolicyBackend
from nbmountd.backends.webdav import WebDAVBackend
from nbmountd.backends.webdav_client import WebDAVClient
from nbmountd.backends.webdav_entries import Addresses, Directory, parse_date, parse_etag, version_of
from nbmountd.backends.webdav_habits import recognise
from nbmountd.backends.webdav_share import DIRECT_LIMIT, TEMPORARY
from nbmountd.config import WebDAVOptions
from nbmountd.errors import (
    ConfigError,
    NameRefused,
    RemoteDenied,
    RemoteError,
    RemoteExists,
    RemoteFull,
    RemoteLocked,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteUnavailable,
    RemoteUnsupported,
    Unauthenticated,
    VersionMismatch,
)
from nbmountd.model import Attributes, Health, Kind, Place, Version
from tests.backends.suite import BytesBody, Collector, at, free, listing, pattern, read, upload
from tests.servers import ApacheServer, BrokenServer, NginxServer, ServerProcess, WsgiDAVServer
from tests.servers.broken import CONTENT

LONG_AGO = 1_000_000_000
"""An mtime (s) of a file whose ETag is strong on Apache."""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokenServer]:
    server = BrokenServer(tmp_path_factory.mktemp("broken"))
    with server:
        yield server


@pytest.fixture(scope="module", params=[ApacheServer, NginxServer, WsgiDAVServer])
def any_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("server")
    with request.param(directory / "root", directory / "work") as server:
        yield server


@pytest.fixture(scope="module")
def apache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("apache")
    with ApacheServer(directory / "root", directory / "work") as server:
        yield server


@asynccontextmanager
async def mounted(
    server: ServerProcess, folder: str = "", *, read_only: bool = False, **options: object
) -> AsyncIterator[WebDAVBackend]:
    """A connected backend on `folder` of the server, which is made."""
    (server.root / folder).mkdir(exist_ok=True)
    settings = WebDAVOptions(url=server.url + folder, user=server.user, password=server.password, **options)  # type: ignore[arg-type]
    backend = WebDAVBackend(settings, read_only=read_only)
    try:
        await backend.connect()
        yield backend
    finally:
        await backend.aclose()


@asynccontextmanager
async def odd(broken: BrokenServer, behaviour: str) -> AsyncIterator[WebDAVBackend]:
    """A backend, not connected, on a share of the broken server."""
    broken.clear_requests()
    backend = WebDAVBackend(WebDAVOptions(url=broken.at(behaviour), request_timeout=5))
    try:
        yield backend
    finally:
        await backend.aclose()


async def methods(server: ServerProcess, count: int, folder: str = "") -> list[str]:
    """The methods of the requests below `folder`, when there are `count`."""
    lines = await trio.to_thread.run_sync(server.wait_for_requests, count, folder)
    return [line.split()[0] for line in lines]


CONNECTING = ["OPTIONS", "PROPFIND"]


def old_file(path: Path, content: bytes, mtime: int = LONG_AGO) -> None:
    path.write_bytes(content)
    os.utime(path, (mtime, mtime))


class HalvesBody(BytesBody):
    """A body that never gives more than its half at once, so that a cut comes in the middle."""

    def read(self, count: int = -1, /) -> bytes:
        return super().read(min(count, self.size // 2))


# --- recognising servers ---


@pytest.mark.parametrize(
    ("server_class", "name", "conditions", "strong"),
    [(ApacheServer, "Apache", True, True), (NginxServer, "nginx", False, False), (WsgiDAVServer, "WsgiDAV", True, False)],
)
async def test_a_server_is_recognised_with_two_requests_that_leave_nothing(
    tmp_path: Path, server_class: type[ServerProcess], name: str, conditions: bool, strong: bool
) -> None:
    with server_class(tmp_path / "root", tmp_path / "work") as server:
        async with mounted(server) as backend:
            capabilities = await backend.connect()

            assert backend.habits.name == name
            assert (capabilities.conditional_writes, capabilities.strong_versions) == (conditions, strong)
            assert capabilities.atomic_replace
            assert capabilities.ranged_reads
            assert backend.statistics().requests <= 5
        assert list(server.root.iterdir()) == []


async def test_an_unknown_server_is_taken_for_the_worst(broken: BrokenServer) -> None:
    async with odd(broken, "plain") as backend:
        capabilities = await backend.connect()

    assert (capabilities.conditional_writes, capabilities.strong_versions) == (False, False)


@pytest.mark.parametrize(
    ("headers", "path", "name"),
    [
        ({"dav": "1,2, <http://apache.org/dav/propset/fs/1>", "server": "nginx/1.22"}, "/", "Apache"),
        ({"dav": "1, 3, extended-mkcol, nextcloud-checksum-update", "server": "Apache"}, "/dav/", "Nextcloud"),
        ({"dav": "1, 3, extended-mkcol", "server": "Apache"}, "/remote.php/webdav/", "Nextcloud"),
        ({"dav": "1, 3, extended-mkcol"}, "/", "sabre/dav"),
        ({"dav": "2", "server": "nginx/1.22.1"}, "/", "nginx"),
        ({"dav": "1, 3, something-behind-a-proxy", "server": "nginx"}, "/", "unknown"),
        ({"server": "rclone/v1.60.1", "dav": "1, 2"}, "/", "rclone"),
        ({"server": "Apache/2.4", "dav": "1,2"}, "/", "unknown"),
        ({}, "/", "unknown"),
    ],
)
def test_what_stands_behind_a_proxy_counts_not_the_proxy(headers: dict[str, str], path: str, name: str) -> None:
    assert recognise(headers, path).name == name


async def test_a_proxy_s_error_is_not_taken_for_a_server(broken: BrokenServer) -> None:
    async with odd(broken, "status-503") as backend:
        with pytest.raises(RemoteUnavailable):
            await backend.connect()

    assert await methods(broken, 1) == ["OPTIONS"]


@pytest.mark.parametrize(
    ("url", "text"),
    [("https://alice:pw@dav.example/", "user"), ("https://dav.example/?x", "path"), ("ftp://dav.example/", "http")],
)
def test_a_url_that_cannot_work_is_a_configuration_error(url: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        WebDAVBackend(WebDAVOptions(url=url))

    assert "pw" not in str(caught.value)


async def test_a_rotated_password_file_brings_the_mount_back_by_itself(apache: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("wrong\n")
    options = WebDAVOptions(url=apache.url, user=apache.user, password_file=str(path))
    backend = WebDAVBackend(options)
    policy = PolicyBackend(backend, credential=backend.credential_fingerprint)
    with pytest.raises(Unauthenticated):
        await policy.connect()
    refused = backend.statistics().requests
    async with trio.open_nursery() as nursery:
        nursery.start_soon(policy.run)
        path.write_text(f"{apache.password}\n")
        with trio.fail_after(10):
            while policy.health is not Health.LIVE:
                await policy.wait_health_change()
        nursery.cancel_scope.cancel()
    await policy.aclose()

    assert refused == 1
    assert "wrong" not in repr(backend.credential_fingerprint())


async def test_a_wrong_password_is_sent_once_and_says_what_to_change(apache: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("wrong")
    (apache.root / "login").mkdir()
    backend = WebDAVBackend(WebDAVOptions(url=apache.url + "login", user=apache.user, password_file=str(path)))

    for _ in range(3):
        with pytest.raises(Unauthenticated, match=str(path)):
            await backend.connect()
    path.write_text(apache.password + "\n")
    await backend.connect()
    await backend.aclose()

    lines = await trio.to_thread.run_sync(apache.wait_for_requests, 3, "login")
    assert [line.split()[-1] for line in lines] == ["401", "200", "207"]


# --- listings are hostile input ---


@pytest.mark.parametrize("behaviour", ["html", "garbage", "cut", "doctype", "outside", "empty"])
async def test_a_listing_that_is_not_one_is_an_error_and_never_empty(broken: BrokenServer, behaviour: str) -> None:
    async with odd(broken, behaviour) as backend:
        with pytest.raises(RemoteProtocolError):
            await backend.list(Place())


async def test_a_property_without_status_200_is_not_believed(broken: BrokenServer) -> None:
    async with odd(broken, "denied-size") as backend:
        (entry,) = await backend.list(Place())

    assert entry.size is None


async def test_addresses_with_another_host_are_read_as_paths(broken: BrokenServer) -> None:
    """A proxy that ends TLS leaves the inner scheme and host in addresses; only names are taken from them."""
    async with odd(broken, "foreign") as backend:
        (entry,) = await backend.list(Place())

    assert entry.name == "file"


async def test_a_redirect_elsewhere_is_an_error_and_is_not_followed(broken: BrokenServer) -> None:
    async with odd(broken, "away") as backend:
        with pytest.raises(RemoteProtocolError, match="redirect"):
            await backend.stat(Place())

    assert await methods(broken, 1) == ["PROPFIND"]


async def test_a_missing_slash_is_added_when_the_server_says_so(broken: BrokenServer) -> None:
    async with odd(broken, "slash") as backend:
        entry = await backend.stat(Place(("folder",)))

    assert entry.name == "folder"
    assert [line.split()[:3] for line in broken.requests()] == [
        ["PROPFIND", "/dav/slash/folder", "301"],
        ["PROPFIND", "/dav/slash/folder/", "207"],
    ]


async def test_a_listing_of_100000_entries_is_whole_and_the_loop_goes_on_meanwhile(broken: BrokenServer) -> None:
    """In seconds of our processor, so that a machine that stands still says nothing of the loop."""
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = time.process_time()
            await trio.sleep(0.001)
            longest = max(longest, time.process_time() - before)

    async with odd(broken, "many-100000") as backend, trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        started = time.process_time()
        entries = await backend.list(Place())
        whole = time.process_time() - started
        nursery.cancel_scope.cancel()

    assert len(entries) == 100_000
    assert entries[-1].name == "entry 099999"
    assert longest < whole / 4


@pytest.mark.parametrize(
    ("status", "kind"),
    [(403, RemoteDenied), (404, RemoteNotFound), (423, RemoteLocked), (503, RemoteUnavailable), (507, RemoteFull)],
)
async def test_a_status_becomes_our_error_without_the_server_s_text(
    broken: BrokenServer, status: int, kind: type[RemoteError]
) -> None:
    async with odd(broken, f"status-{status}") as backend:
        with pytest.raises(kind) as caught:
            await backend.stat(Place(("x",)))
        with pytest.raises(RemoteError):
            await upload(backend, free("x"), b"1")

    assert "SECRET" not in str(caught.value)
    assert caught.value.retry_after == (7 if caught.value.transient else None)


def test_the_parser_refuses_what_would_eat_memory() -> None:
    for body in (
        b'<d:multistatus xmlns:d="DAV:">' + b"<d:a>" * 100,
        b'<d:multistatus xmlns:d="DAV:"><d:response><d:href>' + b"x" * 100_000,
        b"<!DOCTYPE x [<!ENTITY a 'b'>]><x/>",
        b'<d:multistatus xmlns:d="DAV:"><d:response><d:href>/x</d:href><d:status>what</d:status>',
    ):
        parser = MultiStatusParser()
        with pytest.raises(RemoteProtocolError):
            parser.feed(body)
            parser.close()


def test_a_listing_without_end_is_refused_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multistatus, "RESOURCE_LIMIT", 100)
    one = "<d:response><d:href>/x</d:href></d:response>"
    many = "".join(f"<d:p{number}/>" for number in range(1000))
    for body in (one * 101, f"<d:response><d:href>/x</d:href><d:propstat><d:prop>{many}</d:prop></d:propstat></d:response>"):
        parser = MultiStatusParser()
        with pytest.raises(RemoteProtocolError, match=r"more than 100 resources|too many properties"):
            parser.feed(f'<d:multistatus xmlns:d="DAV:">{body}'.encode())


async def test_a_slash_is_not_added_on_the_word_of_a_redirect_to_another_host(broken: BrokenServer, tmp_path: Path) -> None:
    """Neither there, where the credential would go with it, nor here."""
    with BrokenServer(tmp_path / "other") as other:
        async with odd(broken, f"slash-at-{other.port}") as backend:
            with pytest.raises(RemoteProtocolError, match="redirect"):
                await backend.stat(Place(("folder",)))

        assert await methods(broken, 1) == ["PROPFIND"]
        assert other.requests() == []


def test_a_body_may_come_in_pieces_of_any_size() -> None:
    body = (
        '<D:multistatus xmlns:D="DAV:"><D:response><D:href>/d\u00e9</D:href><D:propstat><D:prop><D:resourcetype>'
        "<D:collection/></D:resourcetype><D:getetag>\"a&amp;b\"</D:getetag></D:prop>"
        "<D:status>HTTP/1.1 200 OK</D:status></D:propstat></D:response></D:multistatus>"
    ).encode()
    parser = MultiStatusParser()

    for position in range(len(body)):
        parser.feed(body[position : position + 1])
    (resource,) = parser.close()

    assert (resource.href, resource.collection) == ("/d\u00e9", True)
    assert resource.properties["DAV: getetag"] == '"a&b"'


# --- addresses, versions ---


def test_names_become_paths_and_come_back() -> None:
    addresses = Addresses("https://dav.example/remote.php/web dav//")

    assert addresses.path(Place()) == "/remote.php/web%20dav/"
    assert addresses.path(Place(("a%2F", "\udcff"))) == "/remote.php/web%20dav/a%252F/%FF"
    assert addresses.url(Place(("d",)), directory=True) == "https://dav.example/remote.php/web%20dav/d/"
    directory = Directory("/remote.php/web%20dav/caf%C3%A9/")
    assert directory.name("/remote.php/web%20dav/cafe%CC%81/") is None
    assert directory.name("https://other/remote.php/web%20dav/caf%c3%a9/a%252F") == "a%2F"
    assert directory.name("//remote.php/web dav//caf\u00e9/%FF") == "\udcff"
    assert Directory("/").name("/") is None
    assert Directory("/").name("/file") == "file"
    for outside in ("/remote.php/web%20dav/", "/etc/passwd", "/remote.php/web%20dav/caf%C3%A9/a/b", "a", "ftp://x/y"):
        with pytest.raises(RemoteProtocolError):
            directory.name(outside)
    for name in ("", ".", "..", "a/b", "a\0"):
        with pytest.raises(NameRefused):
            addresses.path(Place((name,)))


def test_etags_are_compared_without_their_spelling() -> None:
    assert parse_etag('"x"') == parse_etag("x") == parse_etag('"x-gzip"') == parse_etag(' "x;gzip" ') == ("x", False)
    assert parse_etag('W/"x"') == ("x", True)
    assert parse_etag('"a b"') is parse_etag("") is parse_etag('""') is parse_etag("\u00e9") is parse_etag(None) is None
    assert version_of('W/"5-62a"', 5, 1) == version_of('"5-62a"', 5, 1)
    assert version_of('W/"opaque"', 5, 1) != version_of('W/"opaque"', 6, 1) != version_of('W/"opaque"', 6, 2)
    assert version_of(None, 5, 1) != version_of(None, 5, 2)
    assert version_of(None, None, None) is None
    assert parse_date("Sun, 06 Nov 1994 08:49:37 GMT") == 784111777
    assert parse_date("Sunday, 06-Nov-94 08:49:37 GMT") is parse_date("") is None


# --- reading ---


async def test_a_server_that_ignores_ranges_is_read_through_and_learned(broken: BrokenServer) -> None:
    async with odd(broken, "ranges-ignored") as backend:
        entry = await backend.stat(free("file"))

        assert await read(backend, at(entry), entry.version, 1000, 300_000) == CONTENT[1000:300_000]
        assert await read(backend, at(entry), entry.version, 0, 10) == CONTENT[:10]
        capabilities = await backend.connect()

    assert not capabilities.ranged_reads


@pytest.mark.parametrize("behaviour", ["wrong-range", "short", "short-framed"])
async def test_bytes_other_than_asked_are_an_error(broken: BrokenServer, behaviour: str) -> None:
    async with odd(broken, behaviour) as backend:
        entry = await backend.stat(free("file"))

        collector = Collector()
        with pytest.raises(RemoteProtocolError):
            await backend.read(at(entry), entry.version, 1000, 100_000, collector)

    assert CONTENT[1000:100_000].startswith(bytes(collector.content))


async def test_bytes_of_another_version_are_not_given_away(broken: BrokenServer) -> None:
    collector = Collector()

    async with odd(broken, "other-etag") as backend:
        entry = await backend.stat(free("file"))
        with pytest.raises(VersionMismatch):
            await backend.read(at(entry), entry.version, 0, 1000, collector)

    assert collector.calls == 0


async def test_an_answer_that_tells_no_version_is_checked_by_asking(broken: BrokenServer) -> None:
    async with odd(broken, "no-version") as backend:
        entry = await backend.stat(free("file"))

        assert await read(backend, at(entry), entry.version, 5, 1000) == CONTENT[5:1000]
        broken.clear_requests()
        with pytest.raises(VersionMismatch):
            await read(backend, at(entry), Version("e:older"), 5, 1000)

    assert await methods(broken, 1) == ["PROPFIND"]


async def test_a_cancelled_read_leaves_no_thread(broken: BrokenServer) -> None:
    async with odd(broken, "stall-body") as backend:
        entry = await backend.stat(free("file"))
        with trio.move_on_after(0.1) as scope:
            await read(backend, at(entry), entry.version, 0, 500_000)
        took = trio.current_time() - scope.deadline

    assert scope.cancelled_caught
    assert took < 2


async def test_a_read_is_one_request(any_server: ServerProcess) -> None:
    async with mounted(any_server) as backend:
        old_file(any_server.root / "one", pattern(100_000))
        entry = await backend.stat(free("one"))
        before = backend.statistics()
        await read(backend, at(entry), entry.version, 10, 90_000)
        after = backend.statistics()

    assert after.requests - before.requests == 1
    assert after.bytes_received - before.bytes_received == 89_990


async def test_a_file_just_written_reads_though_its_etag_is_weak(apache: ServerProcess) -> None:
    async with mounted(apache, "weak") as backend:
        for number in range(5):
            (apache.root / "weak" / "young").write_bytes(b"%d" % number)
            entry = (await listing(backend))["young"]
            assert await read(backend, at(entry), entry.version, 0, 1) == b"%d" % number


# --- writing ---


async def test_a_weak_etag_that_turns_strong_is_the_same_version(apache: ServerProcess) -> None:
    async with mounted(apache, "turning") as backend:
        young = await upload(backend, free("file"), b"content")
        await trio.sleep(1.2)  # nothing but time turns it
        same = await backend.stat(free("file"))

        assert same.version == young.version
        new = await upload(backend, at(same), b"newer", young.version)
        newest = await upload(backend, at(same), b"newest", new.version)
        assert newest.version not in (new.version, young.version)


async def test_a_strong_version_is_checked_by_the_server_itself(apache: ServerProcess) -> None:
    async with mounted(apache, "strong") as backend:
        old_file(apache.root / "strong" / "file", b"old")
        entry = await backend.stat(free("file"))
        await upload(backend, at(entry), b"new", entry.version)

        assert await methods(apache, 7, "strong") == [*CONNECTING, "PROPFIND", "MKCOL", "PUT", "PROPFIND", "DELETE"]
        old_file(apache.root / "strong" / "file", b"theirs", LONG_AGO + 1)
        with pytest.raises(VersionMismatch):
            await upload(backend, at(entry), b"mine", entry.version)
    assert (apache.root / "strong" / "file").read_bytes() == b"theirs"


@pytest.mark.parametrize("when", ["new", "replace"])
async def test_a_change_by_others_during_a_long_upload_is_not_overwritten(any_server: ServerProcess, when: str) -> None:
    """Apache and nginx look at the target when a PUT begins and never again."""
    folder = f"during-{when}"
    target = any_server.root / folder / "file"

    def interfere(position: int) -> None:
        if position == 2 * 1024 * 1024:
            old_file(target, b"theirs", LONG_AGO + 5)

    async with mounted(any_server, folder) as backend:
        replaces = None
        if when == "replace":
            old_file(target, b"old")
            replaces = (await backend.stat(free("file"))).version
        with pytest.raises((VersionMismatch, RemoteExists)):
            await backend.upload(
                free("file"),
                BytesBody(bytes(4 * DIRECT_LIMIT), interfere),
                replaces=replaces,
                attributes=Attributes(),
                ticket=NoTicket(),
            )

    assert target.read_bytes() == b"theirs"
    assert sorted(path.name for path in target.parent.iterdir() if not path.name.startswith(".DAV")) == ["file"]


@pytest.mark.parametrize("size", [DIRECT_LIMIT // 2, 4 * DIRECT_LIMIT])
async def test_a_cut_upload_leaves_the_old_content(any_server: ServerProcess, size: int) -> None:
    class CutError(Exception):
        pass

    folder = any_server.root / f"cut{size}"

    def cut(position: int) -> None:
        if position:
            raise CutError

    async with mounted(any_server, folder.name) as backend:
        old_file(folder / "file", b"old content")
        entry = await backend.stat(free("file"))
        body = HalvesBody(bytes(size), cut)
        with pytest.raises(CutError):
            await backend.upload(
                at(entry), body, replaces=entry.version, attributes=Attributes(), ticket=NoTicket()
            )

        assert (await backend.stat(at(entry))).version == entry.version
    assert (folder / "file").read_bytes() == b"old content"


async def test_a_cancelled_upload_leaves_the_old_content_and_nothing_else(any_server: ServerProcess) -> None:
    folder = any_server.root / "cancelled"
    hold = threading.Event()

    async with mounted(any_server, "cancelled") as backend:
        old_file(folder / "file", b"old content")
        entry = await backend.stat(free("file"))

        with trio.CancelScope() as scope:

            def cancel(position: int) -> None:
                if position:
                    trio.from_thread.run_sync(scope.cancel)
                    hold.wait(0.05)

            await backend.upload(
                at(entry),
                BytesBody(bytes(8 * DIRECT_LIMIT), cancel),
                replaces=entry.version,
                attributes=Attributes(),
                ticket=NoTicket(),
            )

        assert scope.cancelled_caught
        assert list(await listing(backend)) == ["file"]
    assert (folder / "file").read_bytes() == b"old content"


async def test_what_a_killed_upload_left_is_removed_when_it_is_taken_up_again(apache: ServerProcess) -> None:
    ticket = NoTicket()
    async with mounted(apache, "again") as backend:
        left = TEMPORARY + "0123456789abcdef"
        (apache.root / "again" / left).write_bytes(b"half")
        await ticket.remember(left)

        await backend.upload(
            free("file"), BytesBody(bytes(2 * DIRECT_LIMIT)), replaces=None, attributes=Attributes(), ticket=ticket
        )

    assert [path.name for path in (apache.root / "again").iterdir() if path.name != ".DAV"] == ["file"]
    assert ticket.token is not None
    assert ticket.token.startswith(TEMPORARY)


async def test_what_a_server_makes_of_a_cut_upload_after_it_was_removed_is_removed_too(
    apache: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wsgidav may take up the request only when its sender has already given up."""
    folder = apache.root / "late"
    removed: list[str] = []

    async def cut(*_: object) -> Answer:
        raise RemoteUnavailable("the connection is gone")

    async def remove(client: WebDAVClient, path: str, headers: Mapping[str, str]) -> Answer:
        answer = await delete(client, path, headers)
        if not removed:
            (folder / path.rpartition("/")[2]).write_bytes(b"half")
        removed.append(path)
        return answer

    async with mounted(apache, "late") as backend:
        delete = WebDAVClient.delete
        monkeypatch.setattr(WebDAVClient, "put", cut)
        monkeypatch.setattr(WebDAVClient, "delete", remove)
        with pytest.raises(RemoteUnavailable):
            await upload(backend, free("file"), bytes(2 * DIRECT_LIMIT))

        assert removed == [removed[0]] * 2
        assert list(folder.iterdir()) == []


async def test_uploads_under_way_are_hidden_and_stale_ones_removed(apache: ServerProcess) -> None:
    folder = apache.root / "stale"
    async with mounted(apache, "stale") as backend:
        old_file(folder / (TEMPORARY + "old"), b"1")
        (folder / (TEMPORARY + "young")).write_bytes(b"2")
        (folder / "file").write_bytes(b"3")

        entries = await listing(backend)

        assert list(entries) == ["file"]
        with pytest.raises(NameRefused):
            await upload(backend, free(TEMPORARY + "mine"), b"4")
    assert sorted(path.name for path in folder.iterdir()) == [TEMPORARY + "young", "file"]


async def test_atomic_replace_may_be_said_in_the_configuration(apache: ServerProcess) -> None:
    async with mounted(apache, "said", atomic_replace=False) as backend:
        await upload(backend, free("file"), b"small")

        assert await methods(apache, 7, "said") == [*CONNECTING, "PUT", "PROPFIND", "MKCOL", "MOVE", "DELETE"]


async def test_an_upload_that_has_another_size_afterwards_is_in_doubt(apache: ServerProcess) -> None:
    """The look after a PUT may find the next writer's file, or what a proxy has made of ours: neither is what was sent."""
    async with mounted(apache, "overtaken") as backend:
        await upload(backend, free("file"), b"ours")
        (apache.root / "overtaken" / "file").write_bytes(b"theirs, longer")

        with pytest.raises(RemoteProtocolError) as refused:
            await backend._share._look_after(free("file"), size=4)

    assert refused.value.in_doubt


async def test_a_directory_that_was_filled_since_it_was_seen_empty_is_kept(any_server: ServerProcess) -> None:
    folder = any_server.root / "filled"
    async with mounted(any_server, "filled") as backend:
        (folder / "inner").mkdir(exist_ok=True)
        assert await backend.list(free("inner")) == []
        (folder / "inner" / "new").write_bytes(b"somebody else's")

        with pytest.raises(RemoteExists):
            await backend.remove(free("inner"), kind=Kind.DIRECTORY, version=None)

    assert (folder / "inner" / "new").read_bytes() == b"somebody else's"


async def test_a_read_only_mount_sends_no_change(apache: ServerProcess) -> None:
    async with mounted(apache, "fixed", read_only=True) as backend:
        old_file(apache.root / "fixed" / (TEMPORARY + "old"), b"1")

        for change in (
            upload(backend, free("x"), b"1"),
            backend.make_directory(free("x"), Attributes()),
            backend.remove(free("x"), kind=Kind.FILE, version=None),
            backend.move(free("x"), free("y"), kind=Kind.FILE, version=None, replaces=None),
            backend.set_attributes(free("x"), Attributes(mtime_ns=1), kind=Kind.FILE),
        ):
            with pytest.raises(RemoteDenied):
                await change
        await backend.list(Place())

    assert await methods(apache, 3, "fixed") == [*CONNECTING, "PROPFIND"]


async def test_attributes_are_refused_where_there_is_no_place_for_them(tmp_path: Path) -> None:
    with NginxServer(tmp_path / "root", tmp_path / "work") as nginx:
        await attributes_are_refused(nginx)


async def attributes_are_refused(server: ServerProcess) -> None:
    async with mounted(server, "attributes") as backend:
        await upload(backend, free("x"), b"1")
        with pytest.raises(RemoteUnsupported):
            await backend.set_attributes(free("x"), Attributes(mtime_ns=1, mode=0o600), kind=Kind.FILE)
        with pytest.raises(RemoteUnsupported):
            backend.changes()


# --- the network goes and comes back ---


async def test_a_server_that_is_gone_is_unavailable_and_comes_back(tmp_path: Path) -> None:
    with ApacheServer(tmp_path / "root", tmp_path / "work") as server:
        async with mounted(server) as backend:
            await upload(backend, free("file"), b"content")
            await trio.to_thread.run_sync(server.stop)

            with pytest.raises(RemoteUnavailable) as caught:
                await upload(backend, free("other"), b"content")
            assert not caught.value.in_doubt
            with pytest.raises(RemoteUnavailable):
                await backend.list(Place())

            await trio.to_thread.run_sync(server.start)
            assert list(await listing(backend)) == ["file"]


async def test_a_frozen_server_ends_no_sooner_than_asked_and_lets_itself_be_cancelled(tmp_path: Path) -> None:
    with ApacheServer(tmp_path / "root", tmp_path / "work") as server:
        async with mounted(server) as backend:
            server.freeze()
            started = time.monotonic()
            with trio.move_on_after(0.3) as scope:
                await backend.list(Place())
            took = time.monotonic() - started
            server.thaw()

            assert scope.cancelled_caught
            assert took < 2
            assert await backend.list(Place()) == []
