"""What the suite cannot ask of any backend: several spaces and providers, lag, lost answers, hostile ones, requests counted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import trio

from nbmountd.backends.base import NoTicket, Piece
from nbmountd.backends.http_exchange import Answer
from nbmountd.backends.onedata import OnedataBackend
from nbmountd.backends.onedata_answers import (
    Told,
    entry_of,
    local_target,
    parse_version,
    remote_key,
    remote_value,
    shown_xattrs,
)
from nbmountd.backends.onedata_errors import error_of_answer
from nbmountd.backends.onedata_paths import TEMPORARY
from nbmountd.backends.onedata_spaces import SpaceAway
from nbmountd.errors import (
    RemoteDenied,
    RemoteError,
    RemoteExists,
    RemoteFull,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteUnavailable,
    RemoteUnsupported,
    VersionMismatch,
)
from nbmountd.model import Attributes, Kind, Place
from tests.backends.onedata_fixtures import VARIABLE, connected, new_space, options
from tests.backends.suite import NO_ATTRIBUTES, BytesBody, Collector, at, free, listing, pattern, read, upload
from tests.servers.onedata_double import KRAKOW, PARIS, DoubleOutside, OnedataDouble

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnedataDouble]:
    with OnedataDouble(tmp_path_factory.mktemp("onedata")) as server:
        assert isinstance(server, OnedataDouble)
        yield server


@pytest.fixture
def double(running: OnedataDouble, monkeypatch: pytest.MonkeyPatch) -> Iterator[OnedataDouble]:
    monkeypatch.setenv(VARIABLE, "alice-rest")
    running.do("clear")
    yield running
    running.do("clear")
    running.do("lag", seconds=0)
    for face in (KRAKOW, PARIS, "zone"):
        running.do("down", face=face, down=False)


def piece(start: int, content: bytes) -> Piece:
    return Piece(start, start + len(content), lambda offset, count: content[offset - start : offset - start + count])


def about_files(double: OnedataDouble) -> list[dict[str, Any]]:
    """The record, without streams of events: these end whenever the server notices."""
    return [record for record in double.do("records") if "/data/" in record["target"]]


# --- spaces ---


async def test_every_space_is_a_directory_and_their_directory_is_read_only(double: OnedataDouble) -> None:
    space = new_space(double, name="Ocean data")
    space.write("file", b"content")

    async with connected(double, None) as backend:
        root = await backend.stat(Place())
        entries = await listing(backend)
        below = at(entries["Ocean data"])
        [file] = await backend.list(below)
        content = await read(backend, at(file, below), file.version, 0, 7)
        made = await upload(backend, free("new", below), b"new")

        assert (root.kind, root.writable) == (Kind.DIRECTORY, False)
        assert (file.name, content) == ("file", b"content")
        assert space.read("new") == b"new"
        assert (await backend.stat(Place(("Ocean data", "new")))).version == made.version
        with pytest.raises(RemoteDenied):
            await backend.make_directory(free("another space"), NO_ATTRIBUTES)
        with pytest.raises(RemoteDenied):
            await backend.remove(below, kind=Kind.DIRECTORY, version=None)
        with pytest.raises(RemoteNotFound):
            await backend.stat(Place(("no such space",)))


async def test_two_spaces_of_one_name_are_told_apart(double: OnedataDouble) -> None:
    spaces = [new_space(double, name="Twin"), new_space(double, name="Twin")]

    async with connected(double, None) as backend:
        names = {entry.name for entry in await backend.list(Place())}

    assert {f"Twin@{space.base}" for space in spaces} <= names
    assert "Twin" not in names


async def test_nothing_moves_from_one_space_into_another(double: OnedataDouble) -> None:
    one, other = new_space(double), new_space(double)
    one.write("file", b"content")

    async with connected(double, None) as backend:
        entry = await backend.stat(Place((one.base, "file")))
        source = Place((one.base, "file"), entry.id)
        with pytest.raises(RemoteUnsupported):
            await backend.move(source, Place((other.base, "file")), kind=Kind.FILE, version=None, replaces=None)

    assert (one.listdir(""), other.listdir("")) == (["file"], [])


async def test_a_space_whose_provider_is_away_does_not_take_the_others_along(double: OnedataDouble) -> None:
    here = new_space(double, supports={KRAKOW: False})
    there = new_space(double, supports={PARIS: False})

    async with connected(double, None) as backend:
        double.do("down", face=PARIS, down=True)
        await backend.list(Place((here.base,)))
        with pytest.raises(SpaceAway):
            await backend.list(Place((there.base,)))
        double.do("down", face=KRAKOW, down=True)
        with pytest.raises(RemoteError) as caught:
            await backend.list(Place((here.base,)))

    assert not isinstance(caught.value, RemoteNotFound)


async def test_while_onezone_is_away_the_spaces_stay(double: OnedataDouble) -> None:
    space = new_space(double)

    async with connected(double, space.base) as backend:
        double.do("down", face="zone", down=True)
        await upload(backend, free("file"), b"content")
        await backend.connect()

    assert space.read("file") == b"content"


# --- several providers ---


async def test_bytes_come_from_another_provider_when_it_has_that_very_version(double: OnedataDouble) -> None:
    space = new_space(double)
    space.write("file", b"content")

    async with connected(double, space.base) as backend:
        [entry] = await backend.list(Place())
        double.do("down", face=KRAKOW, down=True)

        assert await read(backend, at(entry), entry.version, 0, 7) == b"content"
        with pytest.raises(RemoteUnavailable):
            await backend.stat(at(entry))
        with pytest.raises(RemoteUnavailable):
            await backend.list(Place())
        with pytest.raises(RemoteUnavailable):
            await read(backend, at(entry), None, 0, 7)


async def test_what_another_provider_has_not_heard_of_is_not_taken_for_gone(double: OnedataDouble) -> None:
    space = new_space(double)
    space.write("old", b"first")
    double.do("lag", seconds=30)

    async with connected(double, space.base) as backend:
        new = await upload(backend, free("new"), b"content")
        old = await backend.stat(free("old"))
        old = await upload(backend, at(old), b"second one", old.version)
        double.do("down", face=KRAKOW, down=True)
        for entry in (new, old):
            with pytest.raises(RemoteUnavailable):
                await read(backend, at(entry), entry.version, 0, entry.size or 0)
        double.do("down", face=KRAKOW, down=False)

        assert await read(backend, at(old), old.version, 0, 10) == b"second one"
    assert DoubleOutside(double, space.base, PARIS).listdir("") == ["old"]


async def test_two_files_of_one_name_made_on_two_providers_are_both_shown(double: OnedataDouble) -> None:
    space = new_space(double)
    elsewhere = DoubleOutside(double, space.base, PARIS)
    double.do("lag", seconds=0.2)
    space.write("same", b"from krakow")
    elsewhere.write("same", b"from paris!")

    async with connected(double, space.base) as backend:
        with trio.fail_after(5):
            while len(entries := await listing(backend)) < 2:  # noqa: ASYNC110  what a server does sets no event here
                await trio.sleep(0.05)
        contents = {
            name: await read(backend, at(await backend.stat(free(name))), entry.version, 0, 11)
            for name, entry in entries.items()
        }

    assert contents == {"same": b"from krakow", f"same@{PARIS[:6]}": b"from paris!"}


async def test_a_provider_that_supports_the_space_read_only_is_not_written_to(double: OnedataDouble) -> None:
    space = new_space(double, supports={PARIS: True})

    async with connected(double, space.base) as backend:
        with pytest.raises(RemoteDenied):
            await upload(backend, free("file"), b"content")


# --- reading ---


async def test_no_byte_of_a_version_that_came_meanwhile_is_given_away(double: OnedataDouble) -> None:
    space = new_space(double)
    space.write("file", b"a" * 1000, mtime=1_700_000_000)
    change = {"operation": "write", "provider": KRAKOW, "path": f"{space.base}/file", "content": "YmJi" * 333 + "Yg=="}

    async with connected(double, space.base) as backend:
        [entry] = await backend.list(Place())
        double.fault("^GET .*/content", "call", then=change)
        collector = Collector()
        with pytest.raises(VersionMismatch):
            await backend.read(at(entry), entry.version, 0, 1000, collector)

    assert space.read("file") == b"b" * 1000
    assert bytes(collector.content) == b""


async def test_an_answer_that_is_cut_is_an_error(double: OnedataDouble) -> None:
    space = new_space(double)
    space.write("file", pattern(200_000))

    async with connected(double, space.base) as backend:
        [entry] = await backend.list(Place())
        double.fault("^GET .*/content", "cut", size=70_000)
        collector = Collector()
        with pytest.raises((RemoteProtocolError, RemoteUnavailable)):
            await backend.read(at(entry), entry.version, 0, 200_000, collector)
        again = await read(backend, at(entry), entry.version, 0, 200_000)

    assert bytes(collector.content) == b""
    assert again == pattern(200_000)


async def test_the_middle_of_a_sparse_file_of_100_gib_is_read_with_two_requests(double: OnedataDouble) -> None:
    space = new_space(double)
    double.do("sparse", provider=KRAKOW, path=f"{space.base}/large", size=100 * 2**30)

    async with connected(double, space.base) as backend:
        [entry] = await backend.list(Place())
        double.do("clear")
        content = await read(backend, at(entry), entry.version, 50 * 2**30, 50 * 2**30 + 4096)

    assert entry.size == 100 * 2**30
    assert content == bytes(4096)
    assert len(about_files(double)) == 2


async def test_a_directory_in_the_place_of_a_file_is_not_read_as_a_tar(double: OnedataDouble) -> None:
    space = new_space(double)
    space.mkdir("folder")

    async with connected(double, space.base) as backend:
        entry = await backend.stat(free("folder"))
        with pytest.raises(RemoteProtocolError):
            await read(backend, at(entry), None, 0, 10)


# --- listing ---


async def test_10000_entries_come_whole_in_two_pages(double: OnedataDouble) -> None:
    space = new_space(double)
    double.do("fill", provider=KRAKOW, path=space.base, count=10_000)

    async with connected(double, space.base) as backend:
        double.do("clear")
        entries = await listing(backend)

    assert sorted(entries) == [f"{number:05}" for number in range(10_000)]
    assert len(about_files(double)) == 2


async def test_a_provider_that_dies_in_the_middle_of_a_listing_gives_an_error_not_a_part(double: OnedataDouble) -> None:
    space = new_space(double)
    double.do("fill", provider=KRAKOW, path=space.base, count=6000)

    async with connected(double, space.base) as backend:
        double.fault("children.*token=", "reset", count=-1)
        with pytest.raises(RemoteUnavailable):
            await backend.list(Place())
        double.do("clear")
        assert len(await backend.list(Place())) == 6000


async def test_a_directory_that_may_be_passed_but_not_listed_is_looked_into_by_path(
    double: OnedataDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "bob-rest")
    space = new_space(double)
    space.mkdir("closed")
    space.write("closed/file", b"content")
    double.do("chmod", provider=KRAKOW, path=f"{space.base}/closed", mode=0o710)

    async with connected(double, space.base) as backend:
        closed = await backend.stat(free("closed"))
        entry = await backend.stat(free("file", at(closed)))
        with pytest.raises(RemoteDenied):
            await backend.list(at(closed))

    assert (entry.name, entry.size) == ("file", 7)


async def test_a_server_that_takes_no_name_for_an_index_is_asked_by_path(double: OnedataDouble) -> None:
    space = new_space(double)
    space.write("file", b"content")
    double.do("provider", id=KRAKOW, plain_index=False)

    async with connected(double, space.base) as backend:
        try:
            entry = await backend.stat(free("file"))
            with pytest.raises(RemoteNotFound):
                await backend.stat(free("absent"))
        finally:
            double.do("provider", id=KRAKOW, plain_index=True)

    assert entry.size == 7


async def test_an_absolute_symlink_of_onedata_leads_to_the_same_place_here(double: OnedataDouble) -> None:
    space = new_space(double)
    space.mkdir("a")
    space.mkdir("a/b")
    double.do("symlink", provider=KRAKOW, path=f"{space.base}/a/b/link", target=f"<__onedata_space_id:{space.base}>/data/x")

    async with connected(double, space.base) as backend:
        link = await backend.stat(Place(("a", "b", "link")))
    async with connected(double, None) as backend:
        same = await backend.stat(Place((space.base, "a", "b", "link")))

    assert link.attributes.target == same.attributes.target == "../../data/x"


# --- writing ---


async def test_a_change_of_4_kib_in_a_gib_sends_4_kib(double: OnedataDouble) -> None:
    space = new_space(double)
    double.do("sparse", provider=KRAKOW, path=f"{space.base}/large", size=2**30)

    async with connected(double, space.base) as backend:
        [entry] = await backend.list(Place())
        assert entry.version is not None
        double.do("clear")
        new = await backend.write_ranges(
            at(entry), [piece(2**29, b"x" * 4096)], 2**30, replaces=entry.version, attributes=NO_ATTRIBUTES
        )
        content = await read(backend, at(new), new.version, 2**29 - 1, 2**29 + 4097)

    assert content == b"\0" + b"x" * 4096 + b"\0"
    assert sum(record["received"] for record in about_files(double)) == 4096


async def test_a_ranged_write_that_failed_half_way_is_taken_up_again(double: OnedataDouble) -> None:
    """The first half has changed the version; that is no conflict, it was us."""
    space = new_space(double)
    space.write("file", b"." * 1000, mtime=1_700_000_000)
    pieces = [piece(0, b"first"), piece(500, b"second")]

    async with connected(double, space.base) as backend:
        [entry] = await backend.list(Place())
        assert entry.version is not None
        writing = partial(
            backend.write_ranges, at(entry), pieces, 1000, replaces=entry.version, attributes=NO_ATTRIBUTES
        )
        double.fault("offset=500", "reset", count=3)
        with pytest.raises(RemoteUnavailable) as caught:
            await writing()
        half = space.read("file")
        await writing()

    assert not caught.value.in_doubt
    assert half == b"first" + b"." * 995
    assert space.read("file") == b"first" + b"." * 495 + b"second" + b"." * 494


async def test_a_change_by_others_after_our_failed_write_is_a_conflict(double: OnedataDouble) -> None:
    space = new_space(double)
    space.write("file", b"." * 1000, mtime=1_700_000_000)

    async with connected(double, space.base) as backend:
        [entry] = await backend.list(Place())
        assert entry.version is not None
        writing = partial(
            backend.write_ranges, at(entry), [piece(0, b"a"), piece(500, b"b")], 1000,
            replaces=entry.version, attributes=NO_ATTRIBUTES,
        )  # fmt: skip
        double.fault("offset=500", "reset", count=3)
        with pytest.raises(RemoteUnavailable):
            await writing()
        space.write("file", b"somebody else's")
        with pytest.raises(VersionMismatch):
            await writing()

    assert space.read("file") == b"somebody else's"


async def test_shortening_keeps_what_is_before_the_cut_and_takes_the_dirty_pieces(double: OnedataDouble) -> None:
    space = new_space(double)
    content = pattern(9 * MIB)
    space.write("file", content)
    double.do("xattrs", provider=KRAKOW, path=f"{space.base}/file", values={"colour": "blue"})

    async with connected(double, space.base) as backend:
        entry = await backend.stat(free("file"))
        assert entry.version is not None
        new = await backend.write_ranges(
            at(entry), [piece(10, b"dirty")], 8 * MIB + 1, replaces=entry.version, attributes=Attributes(mode=0o600)
        )
        told = await backend.stat(at(new))

    assert space.read("file") == content[:10] + b"dirty" + content[15 : 8 * MIB + 1]
    assert (told.attributes.mode, told.attributes.xattrs) == (0o600, {"user.colour": b"blue"})
    assert space.listdir("") == ["file"]


async def test_a_lost_answer_to_the_last_step_of_a_replacement_is_settled_by_looking(double: OnedataDouble) -> None:
    space = new_space(double)
    space.write("file", b"old")

    async with connected(double, space.base) as backend:
        entry = await backend.stat(free("file"))
        double.fault("^PUT /cdmi/", "lost")
        new = await upload(backend, at(entry), b"new content", entry.version)

    assert new.size == 11
    assert space.read("file") == b"new content"
    assert space.listdir("") == ["file"]


async def test_a_replacement_keeps_mode_and_metadata(double: OnedataDouble) -> None:
    space = new_space(double)
    space.write("file", b"old")
    double.do("chmod", provider=KRAKOW, path=f"{space.base}/file", mode=0o640)
    double.do("xattrs", provider=KRAKOW, path=f"{space.base}/file", values={"colour": "blue", "onedata_json": {"a": [1]}})

    async with connected(double, space.base) as backend:
        entry = await backend.stat(free("file"))
        new = await upload(backend, at(entry), b"new content", entry.version)
        told = await backend.stat(at(new))

    assert told.attributes.mode == 0o640
    assert told.attributes.xattrs == {"user.colour": b"blue", "user.onedata.json": b'{"a": [1]}'}


async def test_a_file_with_two_names_stays_one_file(double: OnedataDouble) -> None:
    space = new_space(double)
    space.write("one", b"old")
    double.do("link", provider=KRAKOW, path=f"{space.base}/two", target=f"{space.base}/one")

    async with connected(double, space.base) as backend:
        entry = await backend.stat(free("one"))
        await upload(backend, at(entry), b"new content", entry.version)

    assert (space.read("one"), space.read("two")) == (b"new content", b"new content")


async def test_a_file_its_owner_may_not_write_can_be_uploaded(
    double: OnedataDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "bob-rest")
    space = new_space(double)

    async with connected(double, space.base) as backend:
        entry = await upload(backend, free("file"), b"content", attributes=Attributes(mode=0o444))

    assert entry.attributes.mode == 0o444
    assert space.read("file") == b"content"


async def test_quota_is_told_as_full(double: OnedataDouble) -> None:
    space = new_space(double)
    double.do("provider", id=KRAKOW, quota=1000)

    async with connected(double, space.base) as backend:
        try:
            with pytest.raises(RemoteFull):
                await upload(backend, free("file"), b"x" * 1001)
        finally:
            double.do("provider", id=KRAKOW, quota=None)

    assert space.listdir("") == []


async def test_a_directory_with_an_upload_under_way_is_not_removed(double: OnedataDouble) -> None:
    space = new_space(double)
    space.mkdir("folder")
    space.write(f"folder/{TEMPORARY}1", b"half")

    async with connected(double, space.base) as backend:
        entry = await backend.stat(free("folder"))
        shown = await backend.list(at(entry))
        with pytest.raises(RemoteExists):
            await backend.remove(at(entry), kind=Kind.DIRECTORY, version=None)

    assert shown == []
    assert space.listdir("folder") == [f"{TEMPORARY}1"]


async def test_what_an_upload_left_a_day_ago_is_cleared_away(double: OnedataDouble) -> None:
    space = new_space(double)
    space.write(f"{TEMPORARY}1", b"half", mtime=1_700_000_000)
    space.write(f"{TEMPORARY}2", b"half")

    async with connected(double, space.base) as backend:
        assert await backend.list(Place()) == []

    assert space.listdir("") == [f"{TEMPORARY}2"]


async def test_a_cut_upload_that_is_taken_up_again_leaves_nothing_behind(double: OnedataDouble) -> None:
    space = new_space(double)
    space.write("file", b"old")
    space.write(f"{TEMPORARY}killed", b"half")
    ticket = NoTicket()
    ticket.token = f"{TEMPORARY}killed"

    async with connected(double, space.base) as backend:
        entry = await backend.stat(free("file"))
        await backend.upload(
            at(entry), BytesBody(b"new"), replaces=entry.version, attributes=NO_ATTRIBUTES, ticket=ticket
        )

    assert space.listdir("") == ["file"]
    assert space.read("file") == b"new"


# --- extended attributes ---


async def test_only_attributes_that_were_told_are_removed(double: OnedataDouble) -> None:
    space = new_space(double)
    space.write("file", b"1")
    path = f"{space.base}/file"
    double.do("xattrs", provider=KRAKOW, path=path, values={"known": "1", "number": 5})

    async with connected(double, space.base) as backend:
        entry = await backend.stat(free("file"))
        double.do("xattrs", provider=KRAKOW, path=path, values={"unknown": "2"})
        await backend.set_attributes(
            at(entry), Attributes(xattrs={"user.number": b"5", "user.new": b"3"}), kind=Kind.FILE
        )

    assert double.do("xattrs", provider=KRAKOW, path=path) == {"number": 5, "unknown": "2", "new": "3"}


@pytest.mark.parametrize("value", [b"text", "\u00fc".encode(), b"\0\xff", b"", b'{"a": 1}'])
def test_bytes_of_an_attribute_come_back(value: bytes) -> None:
    stored = json.loads(json.dumps(remote_value("user.a", value)))

    assert shown_xattrs({"a": stored}) == {"user.a": value}


def test_names_of_attributes_that_are_not_ours_to_set_have_no_key() -> None:
    names = ["user.onedata.json", "user.colour", "user.", "trusted.a", "user.cdmi_acl", "user.onedata_json"]

    assert [remote_key(name) for name in names] == ["onedata_json", "colour", None, None, None, None]


# --- connections ---


@pytest.mark.parametrize("says_close", [True, False])
async def test_connections_that_the_server_ends_after_30_requests_are_not_noticed(
    double: OnedataDouble, says_close: bool
) -> None:
    space = new_space(double)
    double.do("connections", says_close=says_close, max_requests=30)

    async with connected(double, space.base) as backend:
        double.do("clear")
        for _ in range(100):
            await backend.stat(Place())
    double.do("connections", says_close=True)

    assert len({record["connection"] for record in about_files(double)}) in range(4, 7)


# --- hostile answers ---

HOSTILE = [
    ("children", '{"children": [{"name": "a", "type": "REG", "size": 1, "fileId": "A"}], "isLast": false}'),
    ("children", '{"children": [], "isLast": false, "nextPageToken": "same"}'),
    ("children", '{"children": [{"name": "a", "type": "REG", "size": -1, "mtime": 1, "fileId": "A"}], "isLast": true}'),
    ("children", '{"children": [{"name": "a", "type": "REG", "fileId": "A"}], "isLast": true}'),
    ("children", '{"children": [{"name": "a", "type": "REG", "size": 1, "fileId": "../../x"}], "isLast": true}'),
    ("children", '{"children": [{"name": "a", "type": "DEV", "size": 1, "fileId": "A"}], "isLast": true}'),
    ("children", '{"children": [{"name": 1, "type": "REG", "size": 1, "fileId": "A"}], "isLast": true}'),
    ("children", '{"children": [{"name": "a", "type": "REG", "size": 1e400, "fileId": "A"}], "isLast": true}'),
    ("children", '{"children": 5'),
    ("children", "<html>log in here</html>"),
    ("children", "[" * 100_000),
]


@pytest.mark.parametrize(("pattern", "body"), HOSTILE)
async def test_a_listing_that_makes_no_sense_is_an_error(double: OnedataDouble, pattern: str, body: str) -> None:
    space = new_space(double)

    async with connected(double, space.base) as backend:
        double.fault(pattern, "status", count=-1, status=200, body=body)
        with pytest.raises(RemoteProtocolError), trio.fail_after(10):
            await backend.list(Place())


async def test_names_that_no_program_could_use_are_left_out(double: OnedataDouble) -> None:
    space = new_space(double)
    names = [".", "..", "", "a/b", "nul\0", "good"]
    children = [{"name": name, "type": "DIR", "fileId": "A"} for name in names]

    async with connected(double, space.base) as backend:
        double.fault("children", "status", status=200, body=json.dumps({"children": children, "isLast": True}))
        entries = await backend.list(Place())

    assert [entry.name for entry in entries] == ["good"]


@pytest.mark.parametrize("domain", ["evil.example/x", "user@evil.example", "", "a b", "evil.example?x"])
async def test_a_provider_at_an_address_that_is_none_is_not_asked(double: OnedataDouble, domain: str) -> None:
    space = new_space(double)
    scope = {"spaces": {}, "providers": {"p": {"domain": domain, "version": "25.0"}}}
    double.fault("infer_access", "status", status=200, body=json.dumps({"dataAccessScope": scope}))
    backend = OnedataBackend(options(double, space.base, oneprovider=None))

    with pytest.raises(RemoteProtocolError):
        await backend.connect()
    await backend.aclose()


@pytest.mark.parametrize("headers", [{}, {"Content-Range": "bytes 0-4/5"}, {"Content-Range": "bytes 1-2/5"}])
async def test_content_with_the_wrong_range_is_refused(double: OnedataDouble, headers: dict[str, str]) -> None:
    space = new_space(double)
    space.write("file", b"12345")

    async with connected(double, space.base) as backend:
        [entry] = await backend.list(Place())
        double.fault("/content", "status", status=206, body="xx", headers=headers)
        collector = Collector()
        with pytest.raises(RemoteProtocolError):
            await backend.read(at(entry), entry.version, 0, 2, collector)

    assert bytes(collector.content) == b""


# --- values ---


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, {"id": "posix", "details": {"errno": "enoent"}}, RemoteNotFound),
        (400, {"id": "posix", "details": {"errno": "eexist"}}, RemoteExists),
        (400, {"id": "posix", "details": {"errno": "enospc"}}, RemoteFull),
        (400, {"id": "posix", "details": {"errno": "eagain"}}, RemoteUnavailable),
        (400, {"id": "posix", "details": {"errno": "enew"}}, RemoteProtocolError),
        (400, {"id": "posix", "details": 5}, RemoteProtocolError),
        (400, {"id": "quotaExceeded"}, RemoteFull),
        (400, {"id": "badValueTooLow", "details": {"key": "x"}}, RemoteUnsupported),
        (403, {"id": "forbidden"}, RemoteDenied),
        (404, {"id": "notFound"}, RemoteNotFound),
        (500, {"id": "internalServerError"}, RemoteUnavailable),
        (503, {"id": "temporaryFailure"}, RemoteUnavailable),
        (503, None, RemoteUnavailable),
        (403, None, RemoteDenied),
    ],
)
def test_errors_become_ours(status: int, error: dict[str, Any] | None, kind: type[RemoteError]) -> None:
    body = b"<html>" if error is None else json.dumps({"error": {"description": "secret", **error}}).encode()

    found = error_of_answer(Answer(status, {}, body), "GET /x")

    assert isinstance(found, kind)
    assert "secret" not in str(found)


def test_versions_of_providers_are_numbers() -> None:
    assert parse_version("21.02.8") == (21, 2, 8)
    assert parse_version("25.0-rc1") == (25, 0)
    assert parse_version("") == ()


@pytest.mark.parametrize(
    ("text", "here"),
    [
        ("../a", "../a"),
        ("/abs", "/abs"),
        ("<__onedata_space_id:s>/a/b", "../../a/b"),
        ("<__onedata_space_id:s>", "../../"),
        ("<__onedata_space_id:other>/a", "<__onedata_space_id:other>/a"),
    ],
)
def test_texts_of_symlinks(text: str, here: str) -> None:
    assert local_target(text, 2, "s") == here


def test_times_beyond_reason_are_refused() -> None:
    told = Told(name="a", type="REG", size=1, mtime=2**60, new_id="A")

    with pytest.raises(RemoteProtocolError):
        entry_of(told, "a", depth=0, space="s", writable=True)
