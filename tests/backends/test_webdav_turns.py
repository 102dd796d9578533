"""Of two nbmountds that change one name of an Apache at the same moment, one is told that it came too late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from nbmountd.backends.base import NoTicket
from nbmountd.backends.webdav import WebDAVBackend
from nbmountd.backends.webdav_share import TURN, TURN_LIMIT
from nbmountd.backends.webdav_turns import STALE
from nbmountd.errors import ParentMissing, RemoteDenied, RemoteError, RemoteExists, RemoteNotFound, VersionMismatch
from nbmountd.model import Attributes, Kind, Place, Version
from tests.backends.suite import BytesBody, free, listing, upload
from tests.backends.test_webdav import mounted, old_file
from tests.servers import ApacheServer, ServerProcess

ROUNDS = 8


@pytest.fixture(scope="module")
def apache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("turns")
    with ApacheServer(directory / "root", directory / "work") as server:
        yield server


async def put(backend: WebDAVBackend, place: Place, content: bytes, replaces: Version | None) -> Version | None:
    entry = await backend.upload(place, BytesBody(content), replaces=replaces, attributes=Attributes(), ticket=NoTicket())
    return entry.version


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".DAV")


@pytest.mark.parametrize("size", [3000, TURN_LIMIT + 1], ids=["straight", "beside"])
@pytest.mark.parametrize("there", [False, True], ids=["made", "replaced"])
async def test_of_uploads_of_one_moment_on_one_condition_one_is_done(apache: ServerProcess, size: int, there: bool) -> None:
    folder = apache.root / f"race-{size}-{there}"
    async with (
        mounted(apache, folder.name) as a, mounted(apache, folder.name) as b,
        mounted(apache, folder.name) as c, mounted(apache, folder.name) as d,
    ):  # fmt: skip
        for number in range(ROUNDS):
            name = f"file{number}"
            replaces = None
            if there:
                old_file(folder / name, b"old")
                replaces = (await a.stat(free(name))).version
            winners: dict[bytes, Version | None] = {}

            async def play(backend: WebDAVBackend, mark: bytes, name: str = name, replaces: Version | None = replaces,
                           winners: dict[bytes, Version | None] = winners) -> None:  # fmt: skip
                with suppress(RemoteExists, VersionMismatch):
                    winners[mark] = await put(backend, free(name), mark * size, replaces)

            async with trio.open_nursery() as nursery:
                for mark, backend in zip((b"a", b"b", b"c", b"d"), (a, b, c, d), strict=True):
                    nursery.start_soon(play, backend, mark)

            [(mark, version)] = winners.items()
            assert (folder / name).read_bytes() == mark * size
            assert version == (await a.stat(free(name))).version
    assert left_in(folder) == sorted(f"file{number}" for number in range(ROUNDS))


async def test_a_removal_and_an_upload_of_one_moment_never_lose_the_upload(apache: ServerProcess) -> None:
    folder = apache.root / "removed"
    async with mounted(apache, "removed") as a, mounted(apache, "removed") as b:
        for number in range(ROUNDS):
            name = f"file{number}"
            old_file(folder / name, b"old")
            version = (await a.stat(free(name))).version
            done: list[str] = []

            async def remove(name: str = name, version: Version | None = version, done: list[str] = done) -> None:
                try:
                    await a.remove(free(name), kind=Kind.FILE, version=version)
                    done.append("removed")
                except VersionMismatch:
                    pass

            async def replace(name: str = name, version: Version | None = version, done: list[str] = done) -> None:
                try:
                    await put(b, free(name), b"new", version)
                    done.append("replaced")
                except (VersionMismatch, RemoteNotFound):
                    pass

            async with trio.open_nursery() as nursery:
                nursery.start_soon(remove)
                nursery.start_soon(replace)

            assert done in (["removed"], ["replaced"])
            assert (folder / name).exists() == (done == ["replaced"])


async def test_a_directory_is_not_removed_with_what_another_mount_has_just_put_into_it(apache: ServerProcess) -> None:
    async with mounted(apache, "filled") as a, mounted(apache, "filled") as b:
        for number in range(ROUNDS):
            inner = Place((f"inner{number}",))
            await a.make_directory(inner, Attributes())
            done: list[str] = []

            async def remove(inner: Place = inner, done: list[str] = done) -> None:
                try:
                    await a.remove(inner, kind=Kind.DIRECTORY, version=None)
                    done.append("removed")
                except RemoteExists:
                    pass

            async def fill(inner: Place = inner, done: list[str] = done) -> None:
                try:
                    await put(b, Place((*inner.path, "file")), b"new", None)
                    done.append("filled")
                except RemoteError:
                    assert not (apache.root / "filled" / inner.name).exists()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(remove)
                nursery.start_soon(fill)

            assert done in (["removed"], ["filled"])
            assert (apache.root / "filled" / inner.name / "file").exists() == (done == ["filled"])


async def test_into_a_directory_that_is_not_there_nothing_is_sent(apache: ServerProcess) -> None:
    """Sent without a turn it could meet others in a directory made anew meanwhile, with nothing between them."""
    async with mounted(apache, "missing") as backend:
        await upload(backend, free("file"), b"content")
        version = (await backend.stat(free("file"))).version
        inner = Place(("inner", "file"))
        for failing in (
            partial(put, backend, inner, b"content", None),
            partial(put, backend, inner, b"x" * (TURN_LIMIT + 1), None),
            partial(backend.move, free("file"), inner, kind=Kind.FILE, version=version, replaces=None),
        ):
            with pytest.raises(ParentMissing):
                await failing()
        with pytest.raises(RemoteNotFound):
            await backend.move(inner, free("other"), kind=Kind.FILE, version=version, replaces=None)
        await backend.remove(inner, kind=Kind.FILE, version=version)

    sent = [line.split()[:2] for line in apache.wait_for_requests(1, "missing/")]
    assert [method for method, path in sent if path.endswith("/inner/file")] == []
    assert left_in(apache.root / "missing") == ["file"]


async def test_many_uploads_into_a_directory_share_turns(apache: ServerProcess) -> None:
    async with mounted(apache, "many") as backend:
        before = backend.statistics().requests
        limit = trio.CapacityLimiter(4)

        async def one(number: int) -> None:
            async with limit:
                await upload(backend, free(f"file{number}"), b"content")

        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(one, number)
        spent = backend.statistics().requests - before

    assert len(left_in(apache.root / "many")) == 200
    assert spent <= 2 * 200 + 40  # a PUT and a PROPFIND each, and now and then a turn


async def test_the_turn_of_a_killed_mount_is_ended_by_whoever_waits(apache: ServerProcess) -> None:
    folder = apache.root / "killed"
    async with mounted(apache, "killed") as backend:
        (folder / TURN).mkdir()
        began = trio.current_time()

        assert list(await listing(backend)) == []
        await upload(backend, free("file"), b"content")

        assert trio.current_time() - began >= STALE
    assert left_in(folder) == ["file"]


async def test_a_turn_that_goes_along_with_its_directory_is_ended_there(apache: ServerProcess) -> None:
    async with mounted(apache, "along") as backend:
        await backend.make_directory(free("old"), Attributes())
        await upload(backend, Place(("old", "file")), b"content")
        await backend.move(free("old"), free("new"), kind=Kind.DIRECTORY, version=None, replaces=None)

        entry = (await listing(backend))["new"]
        assert entry.kind is Kind.DIRECTORY
    assert left_in(apache.root / "along" / "new") == ["file"]


async def test_where_no_turn_can_be_made_the_refusal_is_that_of_the_change(tmp_path: Path) -> None:
    """Without the right to write, which MKCOL may tell as if the name were taken, nobody waits for others' turns."""
    extra = "<If \"%{REQUEST_METHOD} in {'MKCOL', 'PUT'}\">\nAuthMerging And\nRequire all denied\n</If>"
    with ApacheServer(tmp_path / "root", tmp_path / "work", extra=extra) as server:
        async with mounted(server) as backend:
            with trio.fail_after(STALE), pytest.raises(RemoteDenied):
                await upload(backend, free("file"), b"content")
