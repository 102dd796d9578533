"""What the D4Science backend promises beyond the suite: misleading answers seen through, nothing done twice, nothing lost.

Every switch of the double that stands for an open point of the notes is tried on both sides here or in the suite.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from nbmountd.backends import d4science, d4science_api
from nbmountd.backends.base import NoTicket
from nbmountd.backends.credentials import InlineSecret
from nbmountd.backends.d4science import D4ScienceBackend
from nbmountd.backends.d4science_answers import failure
from nbmountd.backends.d4science_items import parse_list, shown_names
from nbmountd.backends.d4science_names import decode, encode
from nbmountd.backends.d4science_token import ExpiringSecret, expiry
from nbmountd.backends.d4science_told import version_lines
from nbmountd.backends.http_exchange import Answer
from nbmountd.backends.policy import PolicyBackend
from nbmountd.config import D4ScienceOptions
from nbmountd.configfile import load_config
from nbmountd.errors import (
    ConfigError,
    NameRefused,
    ParentMissing,
    RemoteDenied,
    RemoteError,
    RemoteExists,
    RemoteLocked,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteTooLarge,
    RemoteUnavailable,
    RemoteUnsupported,
    Unauthenticated,
    VersionMismatch,
)
from nbmountd.model import Attributes, Kind, Place
from tests.backends.suite import BytesBody, Collector, at, free, listing, pattern, read, upload
from tests.servers.d4science_double import D4ScienceServer, DoubleUser
from tests.servers.d4science_double.settings import Settings

NONE = Attributes()
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Iterator[D4ScienceServer]:
    with D4ScienceServer(tmp_path_factory.mktemp("storagehub")) as server:
        yield server


@pytest.fixture(params=["1.x", "2.x"])
def server(request: pytest.FixtureRequest, double: D4ScienceServer) -> D4ScienceServer:
    double.reset()
    double.settings(profile=request.param)
    return double


@pytest.fixture
def newer(double: D4ScienceServer) -> D4ScienceServer:
    """For what does not differ between the generations."""
    double.reset()
    return double


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    return tmp_path / "token"


@asynccontextmanager
async def mounted(
    server: D4ScienceServer, user: DoubleUser, token_file: Path, **options: Any
) -> AsyncIterator[D4ScienceBackend]:
    """A connected backend of the user."""
    token_file.write_text(user.token)
    backend = D4ScienceBackend(D4ScienceOptions(url=server.url, token_file=str(token_file), **options))
    try:
        await backend.connect()
        yield backend
    finally:
        await backend.aclose()


def changes(server: D4ScienceServer, user: DoubleUser) -> list[str]:
    """The user's requests that change something, without ids."""
    lines = [line for line in server.lines(user.name) if not line.startswith("GET ")]
    return [re.sub(r"/items/[0-9a-f-]{36}", "/items/ID", line) for line in lines]


# --- requests ----------------------------------------------------------------------------------------------------------


async def test_no_token_is_in_any_url_and_the_accounting_is_never_asked_for(
    server: D4ScienceServer, token_file: Path
) -> None:
    user = server.new_user()
    async with mounted(server, user, token_file) as backend:
        entry = await upload(backend, free("file"), b"content", attributes=Attributes(mode=0o600, mtime_ns=1))
        await read(backend, at(entry), entry.version, 0, 7)
        folder = await backend.make_directory(free("folder"), NONE)
        moved = await backend.move(
            at(entry), free("moved", at(folder)), kind=Kind.FILE, version=entry.version, replaces=None
        )
        await backend.list(at(folder))
        await backend.remove(at(moved, at(folder)), kind=Kind.FILE, version=moved.version)
        await backend.quota()

    lines = server.lines(user.name)

    assert len(lines) > 12
    assert not [line for line in lines if user.token in line or "token" in line]
    assert all("exclude=hl%3Aaccounting" in line for line in lines if line.startswith("GET "))
    assert not [line for line in lines if "jcr" in line]


async def test_a_new_file_costs_four_requests_and_a_new_version_four(newer: D4ScienceServer, token_file: Path) -> None:
    user = newer.new_user()
    async with mounted(newer, user, token_file) as backend:
        before = len(newer.lines(user.name))
        entry = await upload(backend, free("file"), b"1", attributes=Attributes(mtime_ns=5))
        first = len(newer.lines(user.name))
        await upload(backend, at(entry), b"2", entry.version, Attributes(mtime_ns=6))
        second = len(newer.lines(user.name))

    assert (first - before, second - first) == (4, 4)


async def test_fifty_saves_are_one_item_with_fifty_versions(server: D4ScienceServer, token_file: Path) -> None:
    user = server.new_user()
    async with mounted(server, user, token_file) as backend:
        entry = await upload(backend, free("a.ipynb"), b"0")
        for number in range(1, 50):
            entry = await upload(backend, at(entry), str(number).encode(), entry.version)

    assert user.listdir("") == ["a.ipynb"]
    assert user.item("a.ipynb")["versions"] == 50
    assert user.read("a.ipynb") == b"49"


async def test_changes_in_one_folder_go_one_by_one(server: D4ScienceServer, token_file: Path) -> None:
    user = server.new_user()
    server.hook(pattern="(POST|PUT) ", action="delay", seconds=0.02, times=100, user=user.name)
    async with mounted(server, user, token_file) as backend:
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(backend.make_directory, free(f"folder{number}"), NONE)
                nursery.start_soon(upload, backend, free(f"file{number}"), b"content")

    assert len(user.listdir("")) == 10
    assert server.overlaps() == {}


# --- collisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collisions", ["number", "refuse"])
async def test_a_name_taken_at_the_last_moment_is_found_out_and_undone(
    server: D4ScienceServer, token_file: Path, collisions: str
) -> None:
    user = server.new_user()
    server.settings(collisions=collisions)
    async with mounted(server, user, token_file) as backend:
        file = await upload(backend, free("file"), b"content")
        folder = await backend.make_directory(free("folder"), NONE)

        server.hook(pattern="create/FOLDER", action="race", user=user.name)
        with pytest.raises(RemoteExists):
            await backend.make_directory(free("made.d"), NONE)
        server.hook(pattern="create/FILE", action="race", user=user.name)
        with pytest.raises(RemoteExists):
            await upload(backend, free("sent"), b"mine")
        server.hook(pattern="^PUT .*/rename", action="race", user=user.name)
        with pytest.raises(RemoteExists):
            await backend.move(at(file), free("renamed"), kind=Kind.FILE, version=file.version, replaces=None)
        server.hook(pattern="^PUT .*/move", action="race", name="file", user=user.name)
        with pytest.raises(RemoteExists):
            await backend.move(at(file), free("file", at(folder)), kind=Kind.FILE, version=None, replaces=None)
        there = await backend.stat(at(file))

    assert user.listdir("") == ["file", "folder", "made.d", "renamed", "sent"]
    assert user.listdir("folder") == ["file"]
    assert user.item("folder/file")["kind"] == "folder"
    assert (there.id, user.read("file")) == (file.id, b"content")


async def test_an_upload_that_the_server_numbers_is_taken_back(newer: D4ScienceServer, token_file: Path) -> None:
    """No public material says that it happens to uploads; if it does, there must be no `file(1)`."""
    user = newer.new_user()
    async with mounted(newer, user, token_file) as backend:
        old = await upload(backend, free("file"), b"old")
        newer.settings(file_collision="number")

        with pytest.raises(NameRefused):
            await upload(backend, at(old), b"new", old.version)

    assert user.listdir("") == ["file"]
    assert user.read("file") == b"old"


async def test_a_move_that_meets_its_own_old_name_in_the_new_folder_gets_through(
    server: D4ScienceServer, token_file: Path
) -> None:
    user = server.new_user()
    user.mkdir("folder")
    user.write("folder/a", b"another")
    async with mounted(server, user, token_file) as backend:
        file = await upload(backend, free("a"), b"mine")
        folder = at(await backend.stat(free("folder")))

        moved = await backend.move(at(file), free("b", folder), kind=Kind.FILE, version=file.version, replaces=None)

    assert (moved.name, moved.id, moved.version) == ("b", file.id, file.version)
    assert user.listdir("") == ["folder"]
    assert user.listdir("folder") == ["a", "b"]
    assert (user.read("folder/a"), user.read("folder/b")) == (b"another", b"mine")


async def test_half_a_move_is_taken_back(server: D4ScienceServer, token_file: Path) -> None:
    user = server.new_user()
    async with mounted(server, user, token_file) as backend:
        file = await upload(backend, free("a"), b"mine")
        folder = at(await backend.make_directory(free("folder"), NONE))
        refusal = {"action": "status", "status": 403, "gx": "UserNotAuthorizedException"}
        server.hook(pattern="^PUT .*/rename", user=user.name, **refusal)

        with pytest.raises(RemoteDenied):
            await backend.move(at(file), free("b", folder), kind=Kind.FILE, version=file.version, replaces=None)

    assert user.listdir("") == ["a", "folder"]
    assert user.listdir("folder") == []


async def test_a_rename_over_keeps_the_targets_id_and_adds_a_version(server: D4ScienceServer, token_file: Path) -> None:
    user = server.new_user()
    async with mounted(server, user, token_file) as backend:
        target = await upload(backend, free("a.ipynb"), b"old")
        source = await upload(backend, free(".~a.ipynb"), b"new content")

        moved = await backend.move(
            at(source), at(target), kind=Kind.FILE, version=source.version, replaces=target.version
        )
        told = await backend.stat(at(moved))

    assert moved.id == target.id == user.item("a.ipynb")["id"]
    assert (told.version, told.size) == (moved.version, 11)
    assert user.item("a.ipynb")["versions"] == 2
    assert user.listdir("") == ["a.ipynb"]
    assert user.trash() == []


async def test_a_large_file_renamed_over_another_sends_that_to_the_trash(
    newer: D4ScienceServer, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = newer.new_user()
    monkeypatch.setattr(d4science, "SMALL_RENAME_OVER", 5)
    async with mounted(newer, user, token_file) as backend:
        target = await upload(backend, free("a"), b"old")
        source = await upload(backend, free("b"), b"longer than five")

        moved = await backend.move(
            at(source), at(target), kind=Kind.FILE, version=source.version, replaces=target.version
        )

    assert moved.id == source.id
    assert user.listdir("") == ["a"]
    assert user.trash() == ["a"]


# --- answers that are lost or untrue -----------------------------------------------------------------------------------


async def test_a_lost_answer_to_making_something_leaves_doubt_and_one_item(
    server: D4ScienceServer, token_file: Path
) -> None:
    """The core then looks: `stat` tells."""
    user = server.new_user()
    async with mounted(server, user, token_file) as plain:
        backend = PolicyBackend(plain)
        await backend.connect()
        calls: dict[str, Callable[[], Any]] = {
            "FOLDER": lambda: backend.make_directory(free("folder"), NONE),
            "FILE": lambda: backend.upload(
                free("file"), BytesBody(b"content"), replaces=None, attributes=NONE, ticket=NoTicket()
            ),
        }
        for what, call in calls.items():
            for action in ("lose-before", "lose-after"):
                server.hook(pattern=f"create/{what}", action=action, user=user.name)
                with pytest.raises(RemoteError) as caught:
                    await call()
                assert caught.value.in_doubt, action
                await backend.stat(Place())  # an answer: else three lost ones in a row mean offline
        found = {name: (await backend.stat(free(name))).size for name in ("folder", "file")}

    assert found == {"folder": None, "file": 7}
    assert user.listdir("") == ["file", "folder"]
    assert [line.split()[1] for line in changes(server, user) if "create" in line] == (
        ["/workspace/items/ID/create/FOLDER"] * 2 + ["/workspace/items/ID/create/FILE"] * 2
    )


async def test_a_lost_answer_to_a_rename_a_move_or_a_removal_is_found_out(
    server: D4ScienceServer, token_file: Path
) -> None:
    user = server.new_user()
    async with mounted(server, user, token_file) as backend:
        file = await upload(backend, free("a"), b"content")
        folder = at(await backend.make_directory(free("folder"), NONE))

        server.hook(pattern="^PUT .*/rename", action="lose-after", user=user.name)
        renamed = await backend.move(at(file), free("b"), kind=Kind.FILE, version=file.version, replaces=None)
        server.hook(pattern="^PUT .*/move", action="lose-after", user=user.name)
        moved = await backend.move(at(renamed), free("b", folder), kind=Kind.FILE, version=None, replaces=None)
        assert user.listdir("folder") == ["b"]
        server.hook(pattern="^DELETE", action="lose-after", user=user.name)
        await backend.remove(at(moved, folder), kind=Kind.FILE, version=moved.version)

    assert (renamed.name, moved.id) == ("b", file.id)
    assert user.listdir("folder") == []
    assert user.trash() == ["b"]
    assert [line.split()[0] for line in changes(server, user)][2:] == ["PUT", "PUT", "DELETE"]


async def test_a_request_that_never_arrived_is_known_not_to_have_been_done(
    server: D4ScienceServer, token_file: Path
) -> None:
    user = server.new_user()
    async with mounted(server, user, token_file) as backend:
        file = await upload(backend, free("a"), b"content")
        server.hook(pattern="^PUT .*/rename", action="lose-before", user=user.name)

        with pytest.raises(RemoteUnavailable) as caught:
            await backend.move(at(file), free("b"), kind=Kind.FILE, version=file.version, replaces=None)

    assert not caught.value.in_doubt
    assert user.listdir("") == ["a"]


async def test_an_answer_of_success_without_an_effect_is_noticed(server: D4ScienceServer, token_file: Path) -> None:
    user = server.new_user()
    async with mounted(server, user, token_file) as backend:
        file = await upload(backend, free("a"), b"content")
        folder = at(await backend.make_directory(free("folder"), NONE))

        server.hook(pattern="^DELETE", action="nothing", user=user.name)
        with pytest.raises(RemoteLocked):
            await backend.remove(at(file), kind=Kind.FILE, version=file.version)
        server.hook(pattern="^PUT .*/(rename|move)", action="nothing", times=2, user=user.name)
        for target in (free("b"), free("a", folder)):
            with pytest.raises(RemoteLocked):
                await backend.move(at(file), target, kind=Kind.FILE, version=file.version, replaces=None)

    assert user.read("a") == b"content"


@pytest.mark.parametrize("swallows", [False, True])
async def test_what_is_locked_is_tried_again_and_removed_when_free(
    server: D4ScienceServer, token_file: Path, swallows: bool
) -> None:
    user = server.new_user()
    server.settings(swallows_locks=swallows)
    async with mounted(server, user, token_file) as plain:
        file = await upload(plain, free("a"), b"content")
        assert file.id is not None
        user.lock(file.id)
        with pytest.raises(RemoteLocked):
            await plain.remove(at(file), kind=Kind.FILE, version=file.version)
        with pytest.raises(RemoteLocked):
            await upload(plain, at(file), b"more", file.version)
        assert user.read("a") == b"content"

        backend = PolicyBackend(plain)
        await backend.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: backend.remove(at(file), kind=Kind.FILE, version=file.version))
            while not [line for line in changes(server, user)[3:] if line.startswith("DELETE")]:  # noqa: ASYNC110
                await trio.sleep(0.01)
            user.unlock(file.id)

    assert user.listdir("") == []


@pytest.mark.parametrize("status", [200, 204])
async def test_either_status_of_a_removal_is_success(newer: D4ScienceServer, token_file: Path, status: int) -> None:
    user = newer.new_user()
    newer.settings(delete_status=status)
    async with mounted(newer, user, token_file) as backend:
        file = await upload(backend, free("a"), b"content")

        await backend.remove(at(file), kind=Kind.FILE, version=file.version)

    assert user.trash() == ["a"]


async def test_removed_for_good_where_configured(server: D4ScienceServer, token_file: Path) -> None:
    user = server.new_user()
    async with mounted(server, user, token_file, trash=False) as backend:
        file = await upload(backend, free("a"), b"content")

        await backend.remove(at(file), kind=Kind.FILE, version=file.version)

    assert user.listdir("") == []
    assert user.trash() == []


async def test_what_somebody_else_threw_away_is_not_destroyed(server: D4ScienceServer, token_file: Path) -> None:
    """A second DELETE of an item in the trash is final."""
    user = server.new_user()
    async with mounted(server, user, token_file) as backend:
        file = await upload(backend, free("a"), b"content")
        user.remove("a")

        await backend.remove(at(file), kind=Kind.FILE, version=file.version)

    assert user.trash() == ["a"]


async def test_an_upload_that_arrived_short_is_sent_again(newer: D4ScienceServer, token_file: Path) -> None:
    user = newer.new_user()
    async with mounted(newer, user, token_file) as backend:
        newer.hook(pattern="create/FILE", action="truncate", count=3, user=user.name)
        entry = await upload(backend, free("file"), b"content")
        newer.hook(pattern="create/FILE", action="truncate", count=3, times=2, user=user.name)
        with pytest.raises(RemoteProtocolError) as caught:
            await upload(backend, free("other"), b"content")

    assert entry.size == 7
    assert user.read("file") == b"content"
    assert caught.value.in_doubt


# --- what is not there -------------------------------------------------------------------------------------------------


async def test_a_406_for_something_that_is_listed_is_not_believed(server: D4ScienceServer, token_file: Path) -> None:
    user = server.new_user()
    async with mounted(server, user, token_file) as backend:
        file = await upload(backend, free("a"), b"content")
        server.hook(pattern=f"^GET .*/items/{file.id}", action="status", status=406, gx="BackendGenericError")

        assert (await backend.stat(at(file))).id == file.id


async def test_an_id_in_the_trash_is_not_there(server: D4ScienceServer, token_file: Path) -> None:
    user = server.new_user()
    user.mkdir("folder")
    user.write("folder/file", b"1")
    async with mounted(server, user, token_file) as backend:
        folder = at(await backend.stat(free("folder")))
        file = await backend.stat(free("file", folder))
        user.remove("folder")

        looks: list[Callable[[], Awaitable[object]]] = [
            lambda: backend.stat(folder),
            lambda: backend.list(folder),
            lambda: backend.stat(at(file, folder)),
            lambda: read(backend, at(file, folder), file.version, 0, 1),
        ]
        for look in looks:
            with pytest.raises(RemoteNotFound):
                await look()
        makes: list[Callable[[], Awaitable[object]]] = [
            lambda: upload(backend, free("new", folder), b"1"),
            lambda: backend.make_directory(free("new", folder), NONE),
        ]
        for change in makes:
            with pytest.raises(ParentMissing):
                await change()

    assert user.trash() == ["folder"]


async def test_a_folder_that_was_made_anew_under_its_name_is_found(server: D4ScienceServer, token_file: Path) -> None:
    user = server.new_user()
    user.mkdir("folder")
    user.write("folder/old", b"1")
    async with mounted(server, user, token_file) as backend:
        folder = at(await backend.stat(free("folder")))
        user.remove("folder")
        user.mkdir("folder")
        user.write("folder/new", b"1")

        assert list(await listing(backend, folder)) == ["new"]
        assert (await backend.stat(free("new", folder))).size == 1
        with pytest.raises(RemoteNotFound):
            await backend.stat(free("old", folder))


async def test_a_renamed_item_is_not_at_its_old_place(server: D4ScienceServer, token_file: Path) -> None:
    user = server.new_user()
    async with mounted(server, user, token_file) as backend:
        file = await upload(backend, free("a"), b"content")
        user.rename("a", "b")

        with pytest.raises(RemoteNotFound):
            await backend.stat(at(file))
        assert (await backend.stat(free("b"))).id == file.id


async def test_a_folder_with_a_hidden_file_is_not_empty(server: D4ScienceServer, token_file: Path) -> None:
    user = server.new_user()
    user.mkdir("folder")
    user.write("folder/secret", b"1", hidden=True)
    async with mounted(server, user, token_file) as backend:
        folder = at(await backend.stat(free("folder")))

        with pytest.raises(RemoteExists):
            await backend.remove(folder, kind=Kind.DIRECTORY, version=None)
        assert list(await listing(backend, folder)) == ["secret"]


# --- names -------------------------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_every_name_comes_back_from_the_wire(name: str) -> None:
    if name in (".", "..", "Trash", "MySpecialFolders", "Workspace") or len(name.encode()) > 255:
        return

    wire = encode(name)

    assert decode(wire) == name
    assert not set(wire) & set("%/:[]*|'\"\\\t\r\n")
    assert wire == wire.strip(" ")
    assert "." not in wire or len(wire) > 2


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_a_name_that_others_gave_is_shown_and_means_itself(wire: str) -> None:
    shown = decode(wire)

    assert shown == wire or encode(shown) == wire


@pytest.mark.parametrize("name", ["Trash", "MySpecialFolders", "Workspace"])
async def test_names_that_the_server_keeps_for_itself_are_refused(
    newer: D4ScienceServer, token_file: Path, name: str
) -> None:
    user = newer.new_user()
    async with mounted(newer, user, token_file) as backend:
        folder = at(await backend.make_directory(free("folder"), NONE))
        file = await upload(backend, free("file"), b"1")

        for place in (free(name), free(name, folder)):
            with pytest.raises(NameRefused):
                await backend.make_directory(place, NONE)
            with pytest.raises(NameRefused):
                await upload(backend, place, b"1")
            with pytest.raises(NameRefused):
                await backend.move(at(file), place, kind=Kind.FILE, version=None, replaces=None)

    assert user.listdir("") == ["file", "folder"]


@pytest.mark.parametrize("again", ["error", "duplicate", "correct"])
async def test_a_file_with_a_name_the_server_escapes_is_read_and_never_doubled(
    server: D4ScienceServer, token_file: Path, again: str
) -> None:
    user = server.new_user()
    server.settings(escaped_again=again)
    user.write("50% a:b.txt", b"old")
    async with mounted(server, user, token_file) as backend:
        entry = (await listing(backend))["50% a:b.txt"]
        assert await read(backend, at(entry), entry.version, 0, 3) == b"old"
        assert (await backend.stat(free("50% a:b.txt"))).id == entry.id
        with pytest.raises(RemoteExists):
            await upload(backend, free("50% a:b.txt"), b"another")

        if again == "correct":
            assert (await upload(backend, at(entry), b"new", entry.version)).id == entry.id
        else:
            with pytest.raises(NameRefused):
                await upload(backend, at(entry), b"new", entry.version)

    assert user.listdir("") == ["50% a:b.txt"]
    assert user.read("50% a:b.txt") == (b"new" if again == "correct" else b"old")


@pytest.mark.parametrize("taken", [False, True])
async def test_a_name_that_the_server_changes_is_refused_and_nobody_elses_file_is_harmed(
    server: D4ScienceServer, token_file: Path, taken: bool
) -> None:
    user = server.new_user()
    server.settings(composes=True)
    if taken:
        user.write("caf\u00e9", b"somebody else's")
    async with mounted(server, user, token_file) as backend:
        for make in (partial(upload, backend, content=b"mine"), partial(backend.make_directory, attributes=NONE)):
            with pytest.raises((NameRefused, RemoteExists)):
                await make(free("cafe\u0301"))

    assert user.listdir("") == (["caf\u00e9"] if taken else [])
    assert user.trash() == []


async def test_two_items_with_one_name_are_both_shown_always_alike(newer: D4ScienceServer, token_file: Path) -> None:
    user = newer.new_user()
    ids = sorted([user.write("a\uff1ab", b"1"), user.write("a:b", b"22")])
    async with mounted(newer, user, token_file) as backend:
        entries = await listing(backend)

        assert {name: entry.id for name, entry in entries.items()} == {"a:b": ids[0], f"a:b~{ids[1][:8]}": ids[1]}
        for name, entry in entries.items():
            assert (await backend.stat(at(entry))).name == name
            assert (await backend.stat(free(name))).id is not None


# --- shared and VRE folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parent", ["own", "share"])
async def test_shared_and_vre_folders_have_readable_names_and_appear_once(
    server: D4ScienceServer, token_file: Path, parent: str
) -> None:
    server.settings(shared_parent=parent)
    user, other = server.new_user(), server.new_user()
    members = {user.name: "WRITE_ALL", other.name: "ADMINISTRATOR"}
    shared = server.share("shared", "Our data", other.name, members)
    vre = server.share("vre", "AnalyticsLab", other.name, members, context="/d4science/D4Research/AnalyticsLab")
    async with mounted(server, user, token_file) as backend:
        root = await listing(backend)
        folder = at(root["VREFolders"])
        inside = await listing(backend, folder)
        file = await upload(backend, free("file", at(inside["AnalyticsLab"], folder)), b"content")
        lab = await listing(backend, at(inside["AnalyticsLab"], folder))
        by_name = await backend.stat(Place(("VREFolders", "AnalyticsLab", "file")))
        mine = await upload(backend, free("mine", at(root["Our data"])), b"1")

        assert {name: entry.id for name, entry in root.items()} == {"Our data": shared, "VREFolders": folder.id}
        assert {name: entry.id for name, entry in inside.items()} == {"AnalyticsLab": vre}
        assert (await backend.stat(at(root["Our data"]))).name == "Our data"
        assert (await backend.stat(at(inside["AnalyticsLab"], folder))).id == vre
        assert (lab["file"].id, by_name.id) == (file.id, file.id)
        assert (await backend.stat(at(mine, at(root["Our data"])))).details["shared"] == "yes"
        assert root["Our data"].details["owner"] == other.name
        refused: list[Callable[[], Awaitable[object]]] = [
            lambda: upload(backend, free("x", folder), b"1"),
            lambda: backend.remove(at(inside["AnalyticsLab"], folder), kind=Kind.DIRECTORY, version=None),
            lambda: backend.remove(at(root["Our data"]), kind=Kind.DIRECTORY, version=None),
            lambda: backend.make_directory(free("VREFolders"), NONE),
        ]
        for change in refused:
            with pytest.raises(RemoteDenied):
                await change()


@pytest.mark.parametrize(("status", "name"), [(status, "UserNotAuthorizedException") for status in (403, 401, 406)])
async def test_a_vre_folder_without_permission_is_denied_at_once(
    server: D4ScienceServer, token_file: Path, status: int, name: str
) -> None:
    server.settings(denied_status=status, denied_class=name)
    user, other = server.new_user(), server.new_user()
    server.share("vre", "Lab", other.name, {user.name: "READ_ONLY", other.name: "ADMINISTRATOR"}, context="/a/Lab")
    async with mounted(server, user, token_file) as plain:
        folder = at((await listing(plain))["VREFolders"])
        lab = (await listing(plain, folder))["Lab"]
        backend = PolicyBackend(plain)
        await backend.connect()

        assert not lab.writable
        attempts: list[Callable[[], Awaitable[object]]] = [
            lambda: backend.make_directory(free("x", at(lab, folder)), NONE),
            lambda: backend.upload(
                free("x", at(lab, folder)), BytesBody(b"1"), replaces=None, attributes=NONE, ticket=NoTicket()
            ),
        ]
        for change in attempts:
            with pytest.raises(RemoteDenied):
                await change()

    assert len(changes(server, user)) == 2


async def test_who_may_write_what_he_owns_sees_the_rest_as_read_only(server: D4ScienceServer, token_file: Path) -> None:
    user, head = server.new_user(), server.new_user()
    server.share("shared", "Ours", head.name, {user.name: "WRITE_OWNER", head.name: "ADMINISTRATOR"})
    head.mkdir("Ours/deep")
    head.write("Ours/deep/theirs", b"1")
    async with mounted(server, user, token_file) as backend:
        ours = at((await listing(backend))["Ours"])
        deep_entry = (await listing(backend, ours))["deep"]
        deep = at(deep_entry, ours)
        await upload(backend, free("mine", deep), b"1")
        entries = await listing(backend, deep)

        assert {name: entry.writable for name, entry in entries.items()} == {"theirs": False, "mine": True}
        assert {name: entry.removable for name, entry in entries.items()} == {"theirs": False, "mine": True}
        assert (deep_entry.writable, deep_entry.removable) == (True, False)
        with pytest.raises(RemoteDenied):
            await upload(backend, at(entries["theirs"], deep), b"2", entries["theirs"].version)


async def test_a_move_across_a_share_is_unsupported_and_changes_nothing(
    server: D4ScienceServer, token_file: Path
) -> None:
    user = server.new_user()
    server.share("shared", "Ours", user.name, {user.name: "ADMINISTRATOR"})
    server.share("shared", "Theirs", user.name, {user.name: "ADMINISTRATOR"})
    async with mounted(server, user, token_file) as backend:
        root = await listing(backend)
        ours, theirs = at(root["Ours"]), at(root["Theirs"])
        file = await upload(backend, free("file", ours), b"content")
        folder = await backend.make_directory(free("folder", ours), NONE)

        for entry, kind in ((file, Kind.FILE), (folder, Kind.DIRECTORY)):
            for target in (free("moved", theirs), free("moved")):
                with pytest.raises(RemoteUnsupported):
                    await backend.move(at(entry, ours), target, kind=kind, version=None, replaces=None)

        assert sorted(await listing(backend, ours)) == ["file", "folder"]
        assert await listing(backend, theirs) == {}


async def test_without_vre_folders_there_is_no_such_directory(server: D4ScienceServer, token_file: Path) -> None:
    user = server.new_user()
    async with mounted(server, user, token_file) as backend:
        assert await listing(backend) == {}
        made = await backend.make_directory(free("VREFolders"), NONE)
        assert (await backend.stat(at(made))).id == made.id


# --- listings ----------------------------------------------------------------------------------------------------------


async def test_a_listing_over_several_pages_is_whole(
    newer: D4ScienceServer, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(d4science_api, "PAGE", 100)
    user = newer.new_user()
    for number in range(250):
        user.write(f"{number:04}", b"x")
    async with mounted(newer, user, token_file) as backend:
        assert sorted(await listing(backend)) == [f"{number:04}" for number in range(250)]

    pages = [line for line in newer.lines(user.name) if "/paged" in line and "limit=100&showHidden" in line]
    assert len(pages) >= 3


async def test_a_listing_full_of_thumbnails_comes_in_smaller_pages(
    newer: D4ScienceServer, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(d4science_api, "ANSWER_LIMIT", 300_000)
    user = newer.new_user()
    newer.settings(thumbnails=50_000)
    for number in range(12):
        user.write(f"{number:02}.png", b"x")
    async with mounted(newer, user, token_file, ranged_reads=False) as backend:
        assert sorted(await listing(backend)) == [f"{number:02}.png" for number in range(12)]


async def test_an_item_too_large_for_any_page_is_an_error_not_a_gap(
    newer: D4ScienceServer, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(d4science_api, "ANSWER_LIMIT", 30_000)
    user = newer.new_user()
    newer.settings(thumbnails=50_000)
    user.write("a.png", b"x")
    async with mounted(newer, user, token_file, ranged_reads=False) as backend:
        with pytest.raises(RemoteProtocolError):
            await backend.list(Place())


def test_items_that_make_no_sense_are_left_out_and_the_rest_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    good = {"id": "1", "name": "a", "primaryType": "nthl:externalFile", "content": {"size": 3, "storageId": "s"}, "new": [1]}
    odd: list[Any] = [
        {**good, "id": 7},
        {**good, "id": "2", "name": "x/y"},
        {**good, "id": "3", "name": None},
        {**good, "id": "4", "primaryType": "nthl:gCubeItem"},
        {**good, "id": "5", "name": ".."},
        "text",
    ]
    broken = {**good, "id": "6", "name": "broken", "content": None}
    huge = {**good, "id": "8", "name": "huge", "content": {"size": 1e300}}

    with caplog.at_level(logging.WARNING):
        items, count = parse_list(json.dumps({"itemlist": [good, *odd, broken, huge]}).encode(), "GET x")

    assert count == 9
    shown = shown_names(items)
    assert {name: item.size for name, item in shown.items()} == {"a": 3, "broken": 0, "huge": 0}
    assert len(caplog.records) == 2
    for text in (b"<html>", b'{"item": {}}', b"\xff", b""):
        with pytest.raises(RemoteProtocolError):
            parse_list(text, "GET x")


# --- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [False, True])
async def test_ranges_are_found_out_once(newer: D4ScienceServer, token_file: Path, ranges: bool) -> None:
    newer.settings(ranges=ranges)
    user = newer.new_user()
    user.mkdir("folder")
    user.write("folder/file", b"content")
    async with mounted(newer, user, token_file) as backend:
        first = await backend.connect()
        again = await backend.connect()

    assert first.ranged_reads is again.ranged_reads is ranges
    assert len([line for line in newer.lines(user.name) if "/download" in line]) == 1


async def test_an_empty_workspace_learns_of_ranges_at_the_first_read(newer: D4ScienceServer, token_file: Path) -> None:
    newer.settings(ranges=True)
    user = newer.new_user()
    async with mounted(newer, user, token_file) as backend:
        assert not (await backend.connect()).ranged_reads
        entry = await upload(backend, free("file"), b"content")

        assert await read(backend, at(entry), entry.version, 0, 7) == b"content"

        assert (await backend.connect()).ranged_reads


@pytest.mark.parametrize("ranges", [False, True])
async def test_a_cut_download_is_noticed_and_taken_up_again(
    newer: D4ScienceServer, token_file: Path, ranges: bool
) -> None:
    newer.settings(ranges=ranges)
    user = newer.new_user()
    content = pattern(2 * MIB)
    user.write("file", content)
    async with mounted(newer, user, token_file) as plain:
        entry = await plain.stat(free("file"))
        newer.hook(pattern="/download", action="cut", count=MIB, user=user.name)
        with pytest.raises(RemoteProtocolError):
            await read(plain, at(entry), entry.version, 0, len(content))

        backend = PolicyBackend(plain)
        await backend.connect()
        newer.hook(pattern="/download", action="cut", count=MIB, user=user.name)
        assert await read(backend, at(entry), entry.version, 0, len(content)) == content


async def test_a_file_replaced_while_its_download_begins_gives_no_byte(
    newer: D4ScienceServer, token_file: Path
) -> None:
    user = newer.new_user()
    user.write("file", b"a" * 100_000)
    async with mounted(newer, user, token_file) as backend:
        entry = await backend.stat(free("file"))
        newer.hook(pattern="/download", action="drip", count=100, user=user.name)
        collector = Collector()

        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def replace() -> None:
                while not [line for line in newer.lines(user.name)[-2:] if "/download" in line]:  # noqa: ASYNC110
                    await trio.sleep(0.01)
                user.write("file", b"b" * 100_000)
                newer.release()

            with pytest.raises(VersionMismatch):
                await backend.read(at(entry), entry.version, 0, 100_000, collector)

    assert bytes(collector.content) == b""


async def test_many_reads_at_once_do_not_wait_for_each_other_for_ever(newer: D4ScienceServer, token_file: Path) -> None:
    """A read holds its connection while it looks at its item on another one."""
    user = newer.new_user()
    for number in range(12):
        user.write(f"file{number}", bytes([number]) * 200_000)
    async with mounted(newer, user, token_file, connections=2) as plain:
        backend = PolicyBackend(plain)
        await backend.connect()
        entries = await listing(backend)
        got: dict[str, bytes] = {}

        async def fetch(name: str) -> None:
            entry = entries[name]
            assert entry.size is not None
            got[name] = await read(backend, at(entry), entry.version, 0, entry.size)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for name in entries:
                    nursery.start_soon(fetch, name)

    assert got == {f"file{number}": bytes([number]) * 200_000 for number in range(12)}


# --- times, modes, versions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("touches", [False, True])
@pytest.mark.parametrize("storage_ids", [False, True])
async def test_times_and_modes_are_kept_in_the_metadata_beside_what_others_keep_there(
    server: D4ScienceServer, token_file: Path, touches: bool, storage_ids: bool
) -> None:
    server.settings(metadata_touches=touches, storage_ids=storage_ids)
    user = server.new_user()
    async with mounted(server, user, token_file) as backend:
        entry = await upload(backend, free("file"), b"1", attributes=Attributes(mode=0o640, mtime_ns=1_234_567_890_123))
        told = await backend.stat(at(entry))

    assert (told.attributes.mode, told.attributes.mtime_ns) == (0o640, 1_234_567_890_123)
    assert told.version == entry.version
    assert user.item("file")["metadata"]["nbmountd-mode"] == "640"


async def test_a_stored_time_does_not_outlive_the_content_it_was_of(server: D4ScienceServer, token_file: Path) -> None:
    user = server.new_user()
    async with mounted(server, user, token_file) as backend:
        entry = await upload(backend, free("file"), b"1", attributes=Attributes(mode=0o640, mtime_ns=5))
        user.write("file", b"changed by somebody in the portal")

        told = await backend.stat(at(entry))

    assert told.attributes.mode == 0o640
    assert told.attributes.mtime_ns is not None
    assert told.attributes.mtime_ns > 1_600_000_000_000_000_000


async def test_without_metadata_uploads_go_on_and_the_capability_goes(server: D4ScienceServer, token_file: Path) -> None:
    server.settings(takes_metadata=False)
    user = server.new_user()
    async with mounted(server, user, token_file) as backend:
        entry = await upload(backend, free("file"), b"1", attributes=Attributes(mtime_ns=5))

        assert entry.size == 1
        assert not (await backend.connect()).native_mtime
        with pytest.raises(RemoteUnsupported):
            await backend.set_attributes(at(entry), Attributes(mtime_ns=5), kind=Kind.FILE)


async def test_times_kept_here_only_cost_no_request(newer: D4ScienceServer, token_file: Path) -> None:
    user = newer.new_user()
    async with mounted(newer, user, token_file, attributes="local") as backend:
        await upload(backend, free("file"), b"1", attributes=Attributes(mtime_ns=5))

    assert not [line for line in newer.lines(user.name) if "metadata" in line]


async def test_versions_and_public_links_can_be_asked_for(server: D4ScienceServer, token_file: Path) -> None:
    user = server.new_user()
    user.mkdir("folder")
    async with mounted(server, user, token_file) as backend:
        names = (await backend.connect()).told_attributes
        first = await upload(backend, free("file"), b"1")
        second = await upload(backend, at(first), b"2", first.version)
        asked = len(server.lines(user.name))
        told = {name: (await backend.tell(at(second), f"user.d4science.{name}")).decode() for name in ("id", "owner", "shared")}
        links = [line for line in server.lines(user.name)[asked:] if "publiclink" in line]
        versions = (await backend.tell(at(second), "user.d4science.versions")).decode().split("\n")
        link = (await backend.tell(at(second), "user.d4science.publiclink")).decode()
        described = await backend.describe(at(second))
        for name in ("user.d4science.versions", "user.d4science.publiclink"):
            with pytest.raises(RemoteUnsupported):
                await backend.tell(free("folder"), name)

    assert {f"user.d4science.{name}" for name in ("id", "owner", "shared", "versions", "publiclink")} == set(names)
    assert told == {"id": second.id, "owner": user.name, "shared": "no"}
    assert not links, "a link is made by asking for it"
    assert [line.endswith(" current") for line in versions] == [False, True]
    assert link.startswith("http://")
    assert (described["id"], described["owner"]) == (second.id, user.name)
    assert len(described["versions"].split("; ")) == 2


def test_versions_that_make_no_sense_are_left_out_and_what_is_told_is_one_line_each() -> None:
    told: list[dict[str, object]] = [
        {"name": "1.1", "created": 1_700_000_001_000, "current": True}, {"name": "1.0", "created": 1_700_000_000_000},
        {"name": "a\nb", "created": -1}, {"name": 5}, {},
    ]  # fmt: skip

    lines = version_lines(told)

    assert lines == ["a?b ?", "1.0 2023-11-14T22:13:20Z", "1.1 2023-11-14T22:13:21Z current"]


# --- what is not settled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0.0, 60.0])
async def test_listings_that_lag_do_not_undo_what_we_have_just_done(
    server: D4ScienceServer, token_file: Path, lag: float
) -> None:
    """On a node of a cluster that has not heard of it yet. Others' changes come when they come."""
    user = server.new_user()
    user.write("old", b"1")
    user.write("going", b"1")
    user.write("moving", b"1")
    user.mkdir("sub")
    async with mounted(server, user, token_file) as backend:
        before = await listing(backend)
        server.settings(lag=lag)
        new = await upload(backend, free("new"), b"12")
        old = await upload(backend, at(before["old"]), b"123", before["old"].version)
        made = await backend.make_directory(free("made"), NONE)
        await upload(backend, free("inside", at(made)), b"1")
        await backend.remove(at(before["going"]), kind=Kind.FILE, version=None)
        await backend.move(
            at(before["moving"]), free("moved", at(before["sub"])), kind=Kind.FILE, version=None, replaces=None
        )
        now = await listing(backend)
        inside, sub = await listing(backend, at(made)), await listing(backend, at(before["sub"]))
        with pytest.raises(RemoteExists):
            await backend.make_directory(free("made"), NONE)
        with pytest.raises(RemoteExists):
            await backend.remove(at(made), kind=Kind.DIRECTORY, version=None)
        await backend.remove(at(inside["inside"], at(made)), kind=Kind.FILE, version=None)
        await backend.remove(at(made), kind=Kind.DIRECTORY, version=None)
        again = await upload(backend, free("going"), b"1234")

    assert now.keys() == {"new", "old", "made", "sub"}
    assert (now["new"].version, now["old"].version) == (new.version, old.version)
    assert (inside.keys(), sub.keys()) == ({"inside"}, {"moved"})
    assert again.id != before["going"].id


@pytest.mark.parametrize("knows", [False, True])
async def test_what_cannot_be_left_out_of_an_answer_is_ignored(
    newer: D4ScienceServer, token_file: Path, knows: bool
) -> None:
    newer.settings(knows_exclude=knows)
    user = newer.new_user()
    async with mounted(newer, user, token_file) as backend:
        made = await upload(backend, free("file"), b"123")
        for _ in range(5):
            await read(backend, at(made), made.version, 0, 3)

        assert (await listing(backend))["file"].size == 3


def test_every_open_point_is_a_switch_that_some_test_turns() -> None:
    here = Path(__file__).parent
    texts = [path.read_text() for folder in (here, here.parent / "mounted") for path in folder.glob("test_d4science*.py")]

    names = [field.name for field in fields(Settings)]
    assert [name for name in names if not any(re.search(rf'\b{name}=|"{name}"', text) for text in texts)] == []


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (502, "<html>Bad Gateway</html>", RemoteUnavailable),
        (503, "<html>busy</html>", RemoteUnavailable),
        (413, "<html>too large</html>", RemoteTooLarge),
        (406, "<html>Not Acceptable</html>", RemoteProtocolError),
        (409, "<html>locked</html>", RemoteLocked),
        (302, "", RemoteProtocolError),
    ],
)
async def test_answers_of_a_proxy_are_told_apart(
    newer: D4ScienceServer, token_file: Path, status: int, body: str, expected: type[RemoteError]
) -> None:
    user = newer.new_user()
    async with mounted(newer, user, token_file) as backend:
        newer.hook(pattern="create/FILE", action="status", status=status, body=body, user=user.name)
        with pytest.raises(expected) as caught:
            await upload(backend, free("file"), b"content")

    assert "html" not in str(caught.value)
    assert user.listdir("") == []


def test_the_exception_class_counts_before_the_status() -> None:
    def error(status: int, name: str, *, text: bool = False) -> RemoteError:
        full = f"org.gcube.common.storagehub.model.exceptions.{name}"
        body = f"{full}@@secret words" if text else json.dumps({"exceptionClass": full, "message": "secret words"})
        return failure(Answer(status, {"etag": '"GXErrorResponse"'}, body.encode()), "PUT /items/x/rename")

    assert isinstance(error(406, "IdNotFoundException"), RemoteNotFound)
    assert isinstance(error(406, "UserNotAuthorizedException"), RemoteDenied)
    assert isinstance(error(500, "ItemLockedException"), RemoteLocked)
    assert isinstance(error(500, "ItemLockedException", text=True), RemoteLocked)
    assert isinstance(error(400, "ItemAlreadyExistsException"), RemoteExists)
    assert isinstance(error(500, "InvalidItemException"), RemoteDenied)
    assert not error(500, "InvalidItemException").transient
    assert error(500, "BackendGenericError").in_doubt
    assert "secret" not in str(error(500, "BackendGenericError"))


@pytest.mark.parametrize("takes", [False, True])
async def test_an_empty_file_arrives_or_fails_openly(newer: D4ScienceServer, token_file: Path, takes: bool) -> None:
    newer.settings(takes_empty_files=takes)
    user = newer.new_user()
    async with mounted(newer, user, token_file) as backend:
        if takes:
            assert (await upload(backend, free("empty"), b"")).size == 0
        else:
            with pytest.raises(RemoteProtocolError):
                await upload(backend, free("empty"), b"")

    assert user.listdir("") == (["empty"] if takes else [])


async def test_an_upload_above_the_servers_limit_is_too_large(newer: D4ScienceServer, token_file: Path) -> None:
    newer.settings(max_body=10_000)
    user = newer.new_user()
    async with mounted(newer, user, token_file) as backend:
        with pytest.raises(RemoteTooLarge):
            await upload(backend, free("large"), bytes(20_000))


@pytest.mark.parametrize("has_size", [False, True])
async def test_the_used_space_is_told_where_the_server_tells_it(
    newer: D4ScienceServer, token_file: Path, has_size: bool
) -> None:
    newer.settings(has_size=has_size)
    user = newer.new_user()
    user.write("file", bytes(1000))
    async with mounted(newer, user, token_file) as backend:
        assert (await backend.quota()).used == (1000 if has_size else None)
        assert (await backend.quota()).available is None


# --- tokens ------------------------------------------------------------------------------------------------------------


def jwt(exp: object) -> str:
    claims = base64.urlsafe_b64encode(json.dumps({"exp": exp}).encode()).decode().rstrip("=")
    return f"aGVhZA.{claims}.c2ln"


def test_the_end_of_a_token_is_read_from_it() -> None:
    assert expiry(jwt(1_800_000_000)) == 1_800_000_000
    for other in (jwt("soon"), jwt(None), jwt(-1), "8b1f-98187548", "a.b.c", "a.%%%.c", "..", ""):
        assert expiry(other) is None


async def test_a_token_that_ends_is_warned_of_fifteen_minutes_before(caplog: pytest.LogCaptureFixture) -> None:
    now = 1_800_000_000.0
    secret = ExpiringSecret(InlineSecret(jwt(now + 1000), "token"), lambda: now)

    await secret.get(again=False)
    assert secret.warning == ""
    now += 200
    assert "13 min" in secret.warning
    with caplog.at_level(logging.WARNING):
        await secret.get(again=False)
        await secret.get(again=False)
    assert len([record for record in caplog.records if "expires" in record.getMessage()]) == 1
    now += 1000
    with pytest.raises(Unauthenticated, match="expired"):
        await secret.get(again=False)
    assert jwt(1_800_001_000) not in caplog.text


async def test_an_expired_token_is_not_sent_and_a_new_one_is_taken_up(
    newer: D4ScienceServer, token_file: Path
) -> None:
    user = newer.new_user()
    async with mounted(newer, user, token_file) as plain:
        backend = PolicyBackend(plain, credential=plain.credential_fingerprint)
        await backend.connect()
        token_file.write_text(jwt(time.time() - 3600))
        before = plain.statistics().requests
        with pytest.raises(Unauthenticated):
            await backend.stat(Place())
        assert plain.statistics().requests == before
        assert "expired" in plain.token_warning

        token_file.write_text(user.token + "\n")
        await backend.connect()

        assert (await backend.stat(Place())).kind is Kind.DIRECTORY
        assert plain.token_warning == ""
        assert plain.token_expires_at is not None


@pytest.mark.parametrize("status", [401, 403, 400, 500])
async def test_a_token_that_the_server_no_longer_takes_is_renewed_once(
    newer: D4ScienceServer, token_file: Path, status: int
) -> None:
    newer.settings(bad_token_status=status)
    user = newer.new_user()
    async with mounted(newer, user, token_file) as backend:
        newer.call("expire", user.token.encode())
        with pytest.raises(Unauthenticated):
            await upload(backend, free("file"), b"content")
        token_file.write_text(json.loads(newer.call("token", user=user.name)))

        entry = await upload(backend, free("file"), b"content")

    assert entry.size == 7
    assert user.read("file") == b"content"


async def test_a_token_that_ends_during_an_upload_is_found_out_and_the_upload_repeated_with_the_new_one(
    newer: D4ScienceServer, token_file: Path
) -> None:
    user = newer.new_user()
    async with mounted(newer, user, token_file) as backend:
        newer.hook(pattern="create/FILE", action="status", status=401, user=user.name)
        fresh = json.loads(newer.call("token", user=user.name))

        def renew(position: int) -> None:
            token_file.write_text(fresh)

        body = BytesBody(pattern(3 * MIB), renew)
        entry = await backend.upload(free("file"), body, replaces=None, attributes=NONE, ticket=NoTicket())

    assert entry.size == 3 * MIB
    assert user.read("file") == body.content


async def test_the_token_comes_from_a_command_or_the_environment_or_goes_in_the_old_header(
    newer: D4ScienceServer, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = newer.new_user()
    legacy = json.loads(newer.call("token", user=user.name, jwt="0"))
    token_file.write_text(user.token)
    monkeypatch.setenv("D4SCIENCE_TOKEN", user.token)
    monkeypatch.setenv("OLD", legacy)
    for options in (
        D4ScienceOptions(url=newer.url, token_command=("cat", str(token_file))),
        D4ScienceOptions(url=newer.url),
        D4ScienceOptions(url=newer.url + "/", token_env="OLD", token_kind="gcube"),
    ):
        backend = D4ScienceBackend(options)
        await backend.connect()
        assert (await backend.stat(Place())).id == user.root
        await backend.aclose()

    assert not [line for line in newer.lines(user.name) if legacy in line]


def test_the_token_of_the_environment_gives_a_workspace() -> None:
    for variable in ("D4SCIENCE_TOKEN", "GCUBE_TOKEN"):
        config = load_config(None, environ={"HOME": "/home/ann", variable: "t"}, system_file=Path("/nowhere"))

        (mount,) = config.mounts
        assert (mount.name, mount.path, mount.backend) == ("workspace", "/home/ann/workspace", "d4science")
        assert mount.options == D4ScienceOptions(token_env=variable)


def test_options_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for options in (
        D4ScienceOptions(url="https://ann:secret@example.org/workspace"),
        D4ScienceOptions(url="https://example.org/workspace?gcube-token=secret"),
        D4ScienceOptions(url="ftp://example.org/"),
        D4ScienceOptions(token_file=str(tmp_path), token_env="X"),
    ):
        with pytest.raises(ConfigError) as caught:
            D4ScienceBackend(options)
        assert "secret" not in str(caught.value)
