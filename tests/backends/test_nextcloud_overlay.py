"""Mode, symlinks and extended attributes on a Nextcloud, which keeps properties by path and not by file."""

from __future__ import annotations

import pytest

from nbmountd.backends.nextcloud_overlay import seen, wanted
from nbmountd.backends.webdav_overlay import Overlay, write
from nbmountd.model import Attributes, Entry, Kind, Place, Version
from tests.backends.suite import at, free, listing, upload
from tests.backends.test_nextcloud import MTIME, another_client, methods, mounted, running, server
from tests.servers import FakeNextcloud

__all__ = ["running", "server"]

XATTRS = {"user.colour": b"blue \xff"}


async def test_mode_and_xattrs_come_back_in_another_container(server: FakeNextcloud) -> None:
    async with mounted(server, "again") as backend:
        executable = Attributes(mode=0o755, mtime_ns=MTIME, xattrs=XATTRS)
        entry = await upload(backend, free("run.sh"), b"1", attributes=executable)
        folder = await backend.make_directory(free("private"), Attributes(mode=0o700))
        later = await upload(backend, free("plain"), b"2")
        later = await backend.set_attributes(at(later), Attributes(mode=0o600, mtime_ns=MTIME), kind=Kind.FILE)
        second = await upload(backend, at(entry), b"other", entry.version, executable)

    async with mounted(server, "again") as other:
        found = await listing(other)

    assert found == {"run.sh": second, "private": folder, "plain": later}
    assert (second.attributes.mode, second.attributes.xattrs, second.attributes.mtime_ns) == (0o755, XATTRS, MTIME)
    assert (folder.attributes.mode, later.attributes.mode, later.attributes.mtime_ns) == (0o700, 0o600, MTIME)


async def test_what_has_nothing_to_say_costs_no_request_and_what_stays_costs_none_again(server: FakeNextcloud) -> None:
    plain, executable = Attributes(mode=0o644, mtime_ns=MTIME), Attributes(mode=0o755, mtime_ns=MTIME)
    counts = []
    async with mounted(server, "requests") as backend:
        server.clear_requests()
        await upload(backend, free("plain"), b"1", attributes=plain)
        counts.append(methods(server))
        server.clear_requests()
        entry = await upload(backend, free("run.sh"), b"1", attributes=executable)
        counts.append(methods(server))
        server.clear_requests()
        entry = await upload(backend, at(entry), b"more", entry.version, executable)
        counts.append(methods(server))
        server.clear_requests()
        await upload(backend, at(entry), b"and more", entry.version, plain)
        counts.append(methods(server))

    tell = ["PROPPATCH files", "PROPFIND files"]
    over = ["MKCOL uploads", "PUT uploads", "PROPFIND files", "MOVE uploads"]
    assert counts == [["PUT files"], ["PUT files", *tell], over, [*over, *tell]]


async def test_whoever_looks_at_the_folder_s_version_hears_of_a_mode(server: FakeNextcloud) -> None:
    """No version tells of a property, so a time is set with it."""
    async with mounted(server, "heard") as backend:
        entry = await upload(backend, free("file"), b"1", attributes=Attributes(mtime_ns=MTIME))
        before = await backend.stat(Place())
        changed = await backend.set_attributes(at(entry), Attributes(mode=0o755), kind=Kind.FILE)
        after = await backend.stat(Place())

    assert before.version != after.version
    assert (changed.version, changed.attributes.mtime_ns, changed.attributes.mode) == (entry.version, MTIME, 0o755)


async def test_what_was_said_of_another_file_of_that_name_is_not_believed(server: FakeNextcloud) -> None:
    async with mounted(server, "names") as backend:
        folder = await backend.make_directory(free("d"), Attributes())
        await upload(backend, free("run.sh", at(folder)), b"1", attributes=Attributes(mode=0o755))
        assert another_client(server, "DELETE", "names/d") == 204  # which leaves the property of d/run.sh behind
        folder = await backend.make_directory(free("d"), Attributes())
        made = await upload(backend, free("run.sh", at(folder)), b"2")
        found = (await listing(backend, at(folder)))["run.sh"]

    assert made.attributes.mode is None
    assert found.attributes.mode is None


async def test_attributes_move_along_with_a_file_and_are_unknown_after_their_folder_has_moved(server: FakeNextcloud) -> None:
    async with mounted(server, "moves") as backend:
        can = await backend.connect()
        folder = await backend.make_directory(free("d"), Attributes(mode=0o700))
        entry = await upload(backend, free("a"), b"1", attributes=Attributes(mode=0o755))
        moved = await backend.move(at(entry), free("b", at(folder)), kind=Kind.FILE, version=entry.version, replaces=None)
        elsewhere = await backend.move(at(folder), free("e"), kind=Kind.DIRECTORY, version=None, replaces=None)
        inner = (await listing(backend, at(elsewhere)))["b"]
        told = await backend.set_attributes(at(inner, at(elsewhere)), Attributes(mode=0o755), kind=Kind.FILE)

    assert not can.attributes_move
    assert moved.attributes.mode == 0o755
    assert elsewhere.attributes.mode == 0o700
    assert (inner.attributes.mode, inner.id, inner.version) == (None, moved.id, moved.version)
    assert told.attributes.mode == 0o755


async def test_a_symlink_is_a_text_file_to_others_and_no_longer_a_symlink_when_they_write_it(server: FakeNextcloud) -> None:
    async with mounted(server, "links") as backend:
        link = await backend.make_symlink(free("latest"), "../results/ü & <b>", Attributes())
        found = (await listing(backend))["latest"]
        content = (server.root / "links" / "latest").read_bytes()
        names = [path.name for path in (server.root / "links").iterdir()]
        assert another_client(server, "PUT", "links/latest", b"a real file now") == 204
        written = (await listing(backend))["latest"]

    assert found == link
    assert (found.kind, found.attributes.target) == (Kind.SYMLINK, "../results/ü & <b>")
    assert (content, names) == ("../results/ü & <b>".encode(), ["latest"])
    assert (written.kind, written.attributes.target, written.size) == (Kind.FILE, None, 15)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"id":7,"mode":493}', '{"mode":493}', '{"id":"8","mode":493}'])
def test_nonsense_and_what_names_another_file_say_nothing(text: str | None) -> None:
    entry = Entry("f", Kind.FILE, 1, Version("n:a;1;2;"), "7", attributes=Attributes(mtime_ns=7))

    assert seen(entry, text) == entry


def test_a_property_that_somebody_else_wrote_makes_no_symlink_of_a_file() -> None:
    entry = Entry("f", Kind.FILE, 3, Version("n:a;3;2;"), "7", attributes=Attributes(mtime_ns=7))
    text = write(Overlay(mode=0o777, target="abc", id="7"))

    assert seen(entry, text).kind is Kind.FILE
    assert wanted(entry, Attributes(target="abc")) is None
