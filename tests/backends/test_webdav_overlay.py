"""Mode, exact mtime, symlinks and extended attributes on servers that keep a property of ours, and only there."""

from __future__ import annotations

import http.client
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbmountd.backends.webdav_overlay import LIMIT, PROPERTY, Overlay, bounded, parse, seen, update_body, wanted, write
from nbmountd.model import Attributes, Entry, Kind, Version
from tests.backends.suite import at, free, listing, upload
from tests.backends.test_webdav import CONNECTING, methods, mounted
from tests.servers import ApacheServer, NginxServer, ServerProcess, WsgiDAVServer

MTIME = 1_600_000_000_123_456_789
BIG = b"b" * (1024 * 1024 + 1)
"""Goes to a hidden name first."""


@pytest.fixture(scope="module", params=[ApacheServer, WsgiDAVServer])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("server")
    with request.param(directory / "root", directory / "work") as server:
        yield server


@pytest.fixture(scope="module")
def apache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("apache")
    with ApacheServer(directory / "root", directory / "work") as server:
        yield server


def put(server: ServerProcess, path: str, body: bytes) -> None:
    """Another client, which knows nothing of our property."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    login = b64encode(f"{server.user}:{server.password}".encode()).decode()
    connection.request("PUT", server.prefix + path, body, {"Authorization": f"Basic {login}"})
    assert connection.getresponse().status < 300
    connection.close()


# --- the property itself ---

names = st.text(st.characters(blacklist_characters="\0"), max_size=20).map(lambda name: "user." + name)
targets = st.text(st.characters(blacklist_characters="\0", blacklist_categories=()), min_size=1, max_size=50)
overlays = st.builds(
    Overlay,
    mode=st.none() | st.integers(0, 0o7777),
    mtime_ns=st.none() | st.integers(-(2**62), 2**62),
    target=st.none() | targets,
    xattrs=st.none() | st.dictionaries(names, st.binary(max_size=50), max_size=4),
    of=st.just(Version('e:"5-<&>"')),
)


@given(overlays)
def test_what_is_written_is_what_is_read(overlay: Overlay) -> None:
    text = write(overlay)
    back = parse(text)

    assert text.isascii()
    assert (back.mode, back.mtime_ns, back.target, back.xattrs) == (
        overlay.mode, overlay.mtime_ns, overlay.target, overlay.xattrs
    )  # fmt: skip
    assert bool(back) == bool(overlay)
    if overlay.mtime_ns is not None or overlay.target is not None:
        assert back.of == overlay.of
    update_body(overlay).decode("ascii")


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", "7", '{"mode":"x"}', '{"mode":-1}', '{"mode":true}', '{"mtime_ns":1e300}', '{"target":""}',
     '{"target":"a\\u0000b"}', '{"xattrs":{"trusted.x":"aaaa"}}', '{"xattrs":{"user.x":"*"}}', '{"xattrs":[1]}',
     '{"mtime_ns":99999999999999999999}', "[" * 100_000],
)  # fmt: skip
def test_nonsense_in_the_property_says_nothing(text: str | None) -> None:
    assert not parse(text)


def test_what_is_said_of_another_version_counts_only_where_it_belongs_to_the_name() -> None:
    entry = Entry("f", Kind.FILE, 1, Version("e:new"), attributes=Attributes(mtime_ns=7))
    said = Overlay(mode=0o700, mtime_ns=MTIME, target="x", xattrs={"user.a": b"1"}, of=Version("e:old"))

    told = seen(entry, said)

    assert told.kind is Kind.FILE
    assert told.attributes == Attributes(mode=0o700, mtime_ns=7, target=None, xattrs={"user.a": b"1"})


def test_attributes_that_are_too_large_stay_away_and_say_so() -> None:
    entry = seen(Entry("f", Kind.FILE, 1, Version("e:v"), attributes=Attributes(mtime_ns=7)), Overlay())
    overlay = bounded(wanted(entry, Attributes(mode=0o700, xattrs={"user.a": bytes(LIMIT)})))

    assert len(write(overlay)) < LIMIT
    assert seen(entry, parse(write(overlay))).attributes == Attributes(mode=0o700, mtime_ns=7, target=None, xattrs=None)


# --- servers ---


@pytest.mark.parametrize("content", [b"small", BIG])
async def test_mode_exact_mtime_and_xattrs_come_back_in_another_container(server: ServerProcess, content: bytes) -> None:
    wanted = Attributes(mode=0o755, mtime_ns=MTIME, xattrs={"user.a": bytes(range(256))})
    async with mounted(server, f"again{len(content)}") as backend:
        entry = await upload(backend, free("run.sh"), content, attributes=wanted)
        second = await upload(backend, at(entry), content + b"!", entry.version, Attributes(mtime_ns=MTIME + 1))

    async with mounted(server, f"again{len(content)}") as other:
        found = (await listing(other))["run.sh"]

    assert entry.attributes == Attributes(mode=0o755, mtime_ns=MTIME, xattrs=wanted.xattrs)
    assert found.attributes == Attributes(mode=0o755, mtime_ns=MTIME + 1, xattrs=wanted.xattrs)
    assert (found.version, found.size) == (second.version, len(content) + 1)


async def test_content_put_by_others_keeps_mode_and_xattrs_and_loses_mtime(server: ServerProcess) -> None:
    async with mounted(server, "foreign") as backend:
        entry = await upload(
            backend, free("f"), b"ours", attributes=Attributes(mode=0o700, mtime_ns=MTIME, xattrs={"user.a": b"1"})
        )

        put(server, "foreign/f", b"theirs, longer")
        found = await backend.stat(at(entry))

    assert found.version != entry.version
    assert (found.attributes.mode, found.attributes.xattrs) == (0o700, {"user.a": b"1"})
    assert found.attributes.mtime_ns is not None
    assert found.attributes.mtime_ns > MTIME + 10**17


async def test_a_symlink_is_a_text_file_to_others_and_no_longer_a_symlink_when_they_write_it(
    server: ServerProcess,
) -> None:
    async with mounted(server, "links") as backend:
        link = await backend.make_symlink(free("latest"), "../results/ü & <b>", Attributes(mtime_ns=MTIME))
        found = (await listing(backend))["latest"]
        content = (server.root / "links" / "latest").read_bytes()
        put(server, "links/latest", b"a real file now")
        written = (await listing(backend))["latest"]

    assert (found.kind, found.attributes.target, found.attributes.mtime_ns) == (
        Kind.SYMLINK, "../results/ü & <b>", MTIME
    )  # fmt: skip
    assert found == link
    assert content == "../results/ü & <b>".encode()
    assert (written.kind, written.attributes.target, written.size) == (Kind.FILE, None, 15)


async def test_attributes_move_along_and_die_with_the_file(server: ServerProcess) -> None:
    async with mounted(server, "moves") as backend:
        entry = await upload(backend, free("a"), b"1", attributes=Attributes(mode=0o700, mtime_ns=MTIME))
        victim = await upload(backend, free("b"), b"22", attributes=Attributes(mode=0o600, xattrs={"user.x": b"1"}))
        moved = await backend.move(at(entry), at(victim), kind=Kind.FILE, version=entry.version, replaces=victim.version)
        folder = await backend.make_directory(free("d"), Attributes(mode=0o700, mtime_ns=MTIME))
        await upload(backend, free("inner", at(folder)), b"333", attributes=Attributes(mode=0o711, mtime_ns=MTIME))
        elsewhere = await backend.move(at(folder), free("e"), kind=Kind.DIRECTORY, version=None, replaces=None)
        inner = await backend.stat(free("inner", at(elsewhere)))
        await backend.remove(at(moved), kind=Kind.FILE, version=moved.version)
        fresh = await upload(backend, free("b"), b"1")

    assert moved.attributes == Attributes(mode=0o700, mtime_ns=MTIME, xattrs={})
    assert moved.version == entry.version
    assert elsewhere.attributes.mode == 0o700
    assert inner.attributes == Attributes(mode=0o711, mtime_ns=MTIME, xattrs={})
    assert (fresh.attributes.mode, fresh.attributes.xattrs) == (0o644, {})


async def test_setting_attributes_does_not_look_like_a_change_of_content(server: ServerProcess) -> None:
    async with mounted(server, "stable") as backend:
        entry = await upload(backend, free("f"), b"content", attributes=Attributes(mtime_ns=MTIME))
        changed = await backend.set_attributes(at(entry), Attributes(mode=0o700), kind=Kind.FILE)
        back = await backend.set_attributes(at(entry), Attributes(mode=0o644), kind=Kind.FILE)

        assert (await backend.stat(at(entry))) == back

    assert entry.version == changed.version == back.version
    assert (changed.attributes.mode, changed.attributes.mtime_ns) == (0o700, MTIME)
    assert back.attributes == entry.attributes


async def test_requests_of_an_upload(apache: ServerProcess) -> None:
    """The ETag has to be asked for on Apache; the property costs one request more, and none when there is nothing to say.

    A turn (webdav_turns.py) costs an MKCOL and a DELETE, shared by the uploads of one moment in one directory.
    """
    async with mounted(apache, "count") as backend:
        await upload(backend, free("a"), b"1", attributes=Attributes(mode=0o644))
        await upload(backend, free("b"), b"1", attributes=Attributes(mode=0o644, mtime_ns=MTIME))
        await backend.make_directory(free("d"), Attributes(mode=0o755, mtime_ns=MTIME))

    expected = [*CONNECTING, "MKCOL", "PUT", "PROPFIND", "DELETE", "MKCOL", "PUT", "PROPFIND", "PROPPATCH", "DELETE", "MKCOL"]
    assert await methods(apache, len(expected), "count") == expected


async def test_a_server_without_dead_properties_is_found_out_without_a_trace(tmp_path: Path) -> None:
    with NginxServer(tmp_path / "nginx", tmp_path / "work") as nginx:
        async with mounted(nginx) as backend:
            can = await backend.connect()
        assert list(nginx.root.iterdir()) == []
    with WsgiDAVServer(tmp_path / "wsgidav", tmp_path / "work2") as wsgidav:
        async with mounted(wsgidav) as backend:
            kept = await backend.connect()
        asked = [line.split()[0] for line in wsgidav.requests()]
        assert list(wsgidav.root.iterdir()) == []

    assert (can.native_mode, can.native_mtime, can.native_symlinks, can.native_xattrs) == (False, False, False, False)
    assert (kept.native_mode, kept.native_mtime, kept.native_symlinks, kept.native_xattrs) == (True, True, True, True)
    assert asked.count("PROPPATCH") == 1
    assert PROPERTY == "urn:nbmountd:1 attributes"
