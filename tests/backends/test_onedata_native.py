"""Onedata through a site's own Python library, in helper processes: the conformance suite, and what may happen to a helper.

The suite runs over PyFilesystem's driver for REST (against the double), which speaks the same interface, and over a stand-in
for Onedata's own library, which no index has.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from nbmountd.backends.base import NoTicket
from nbmountd.backends.onedata_native import OnedataNativeBackend
from nbmountd.config import OnedataNativeOptions
from nbmountd.errors import NameRefused, RemoteDenied, RemoteError, RemoteTimeout, RemoteUnavailable, Unauthenticated
from nbmountd.model import Attributes, Kind, Place
from tests.backends.suite import BackendSuite, Collector, FolderOutside, Remote, at, free, listing, pattern, read, upload
from tests.servers.onedata_double import DoubleOutside, OnedataDouble
from tests.servers.onedatafs import TOKEN, FakeSite

VARIABLE = "TOKEN_OF_THE_TEST"


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnedataDouble]:
    with OnedataDouble(tmp_path_factory.mktemp("onedata")) as server:
        assert isinstance(server, OnedataDouble)
        yield server


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSite:
    monkeypatch.setenv(VARIABLE, TOKEN)
    site = FakeSite(tmp_path / "site")
    (site.spaces / "ocean").mkdir()
    return site


@pytest.fixture(scope="module")
def lasting_site(tmp_path_factory: pytest.TempPathFactory) -> FakeSite:
    return FakeSite(tmp_path_factory.mktemp("sites") / "lasting")


def options(site: FakeSite, **values: object) -> OnedataNativeOptions:
    given = {"python": str(site.python), "host": "provider.example.org", "space": "ocean", "token_env": VARIABLE}
    return OnedataNativeOptions(**{**given, "connections": 2, **values})  # type: ignore[arg-type]


class EmptiedSpace(DoubleOutside):
    """A space that serves many tests: starting an interpreter for each would take a minute."""

    def empty(self, path: str = "") -> None:
        for name in self.listdir(path):
            below = f"{path}/{name}".lstrip("/")
            if self.stat(below)["type"] == "DIR":
                self.empty(below)
            self.remove(below)


class TestThroughTheDriverForREST(BackendSuite):
    shared: OnedataNativeBackend | None = None

    @pytest.fixture
    async def remote(self, double: OnedataDouble, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Remote]:
        monkeypatch.setenv(VARIABLE, "alice-rest")
        kind = type(self)
        if kind.shared is None:
            double.add_space("native", "Native")
            wanted = OnedataNativeOptions(
                python=sys.executable, library="onedatarestfs", host=double.zone_host, space="Native", token_env=VARIABLE,
                ca_bundle=double.ca_bundle,
            )  # fmt: skip
            kind.shared = OnedataNativeBackend(wanted)
        outside = EmptiedSpace(double, "native")
        outside.empty()
        yield Remote(kind.shared, await kind.shared.connect(), outside)

    async def test_after_closing_verbs_end_with_unavailable(self, remote: Remote) -> None:
        try:
            await super().test_after_closing_verbs_end_with_unavailable(remote)
        finally:
            type(self).shared = None


class TestThroughOnedatasOwnLibrary(BackendSuite):
    shared: OnedataNativeBackend | None = None
    number = 0

    @pytest.fixture
    async def remote(self, lasting_site: FakeSite, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Remote]:
        monkeypatch.setenv(VARIABLE, TOKEN)
        kind = type(self)
        if kind.shared is None:
            kind.shared = OnedataNativeBackend(options(lasting_site, connections=4))
        root = lasting_site.spaces / "ocean"
        if root.exists():
            root.rename(lasting_site.base / f"done{kind.number}")
        kind.number += 1
        root.mkdir()
        yield Remote(kind.shared, await kind.shared.connect(), FolderOutside(root))

    async def test_after_closing_verbs_end_with_unavailable(self, remote: Remote) -> None:
        try:
            await super().test_after_closing_verbs_end_with_unavailable(remote)
        finally:
            type(self).shared = None

    @pytest.mark.parametrize("name", ["plain.txt", "with space", "100%", "a#b", "a?b", "%41 is not A", "a\\b", "x" * 200])
    async def test_a_name_comes_back_as_it_was_given(self, remote: Remote, name: str) -> None:
        await super().test_a_name_comes_back_as_it_was_given(remote, name)

    @pytest.mark.parametrize("name", ["plain", "with space", "100%", "a#b", "%2e%2e"])
    async def test_a_directory_may_have_such_a_name_too(self, remote: Remote, name: str) -> None:
        await super().test_a_directory_may_have_such_a_name_too(remote, name)

    async def test_names_that_differ_only_in_composition_are_two_or_refused(self, remote: Remote) -> None:
        for name in ("caf\u00e9", "cafe\u0301"):
            with pytest.raises(NameRefused):
                await upload(remote.backend, free(name), b"content")

    @pytest.mark.parametrize("name", ["caf\u00e9", "\u65e5\u672c\u8a9e"])
    async def test_a_name_outside_ascii_is_refused_because_the_library_would_take_another_file(
        self, remote: Remote, name: str
    ) -> None:
        """`fs.onedatafs` spells it with question marks."""
        remote.outside.write("caf?", b"somebody's")

        with pytest.raises(NameRefused):
            await upload(remote.backend, free(name), b"content")
        remote.outside.write("caf\u00e9", b"there already")
        with pytest.raises(RemoteError):
            await read(remote.backend, free("caf\u00e9"), None, 0, 5)

        assert remote.outside.read("caf?") == b"somebody's"


# --- helpers -----------------------------------------------------------------------------------------------------------


def helpers_of(backend: OnedataNativeBackend) -> list[int]:
    """The processes that serve `backend`: children of ours that run the helper's file."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if b"onedata_helper.py" in words and parent == str(os.getpid()):
                found.append(int(entry.name))
    return found


async def opened(backend: OnedataNativeBackend) -> OnedataNativeBackend:
    await backend.connect()
    return backend


async def test_the_library_is_opened_with_what_avoids_its_traps(site: FakeSite) -> None:
    backend = await opened(OnedataNativeBackend(options(site, io="direct")))
    await backend.aclose()

    told = json.loads((site.base / ".opened").read_text())
    assert told == {"host": "provider.example.org", "space": ["ocean"], "direct": True, "proxy": False, "plain": True}


async def test_a_lost_connection_is_no_missing_file(site: FakeSite) -> None:
    """The library says "not found" of any failure; a removal must not be made of that."""
    (site.spaces / "ocean" / "file").write_bytes(b"precious")
    backend = await opened(OnedataNativeBackend(options(site)))
    (site.base / ".broken").touch()

    with pytest.raises(RemoteUnavailable):
        await backend.stat(free("file"))
    with pytest.raises(RemoteUnavailable):
        await backend.list(Place())

    (site.base / ".broken").unlink()
    assert (await backend.stat(free("file"))).size == 8
    await backend.aclose()


async def test_a_killed_helper_is_replaced_and_its_read_is_given_up(site: FakeSite) -> None:
    (site.spaces / "ocean" / "file").write_bytes(pattern(8 * 1024 * 1024))
    backend = await opened(OnedataNativeBackend(options(site)))

    def kill(got: int) -> None:
        for pid in helpers_of(backend):
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(RemoteUnavailable):
        await backend.read(free("file"), None, 0, 8 * 1024 * 1024, Collector(kill))

    assert await read(backend, free("file"), None, 4096, 8192) == pattern(8 * 1024 * 1024)[4096:8192]
    await backend.aclose()


async def test_a_helper_killed_in_the_middle_of_a_write_leaves_the_old_content_and_nothing_beside(site: FakeSite) -> None:
    backend = await opened(OnedataNativeBackend(options(site)))
    old = await upload(backend, free("file"), b"old content")

    class KillingBody:
        size = 8 * 1024 * 1024
        position = 0

        def read(self, count: int = -1, /) -> bytes:
            if self.position:
                for pid in helpers_of(backend):
                    os.kill(pid, signal.SIGKILL)
            self.position += count
            return bytes(count)

        def rewind(self) -> None:
            self.position = 0

    with pytest.raises(RemoteUnavailable):
        await backend.upload(at(old), KillingBody(), replaces=old.version, attributes=Attributes(), ticket=NoTicket())

    assert (site.spaces / "ocean" / "file").read_bytes() == b"old content"
    assert os.listdir(site.spaces / "ocean") == ["file"]
    assert list(await listing(backend)) == ["file"]
    await backend.aclose()


async def test_a_helper_that_hangs_with_its_interpreter_held_is_ended(site: FakeSite) -> None:
    (site.spaces / "ocean" / "file").write_bytes(b"content")
    backend = await opened(OnedataNativeBackend(options(site, request_timeout=1.0)))
    (site.base / ".held").touch()

    with trio.fail_after(60), pytest.raises((RemoteTimeout, RemoteUnavailable)):
        await read(backend, free("file"), None, 0, 7)

    (site.base / ".held").unlink()
    assert await read(backend, free("file"), None, 0, 7) == b"content"
    await backend.aclose()


async def test_a_cancelled_call_of_a_hanging_helper_ends_at_once(site: FakeSite) -> None:
    (site.spaces / "ocean" / "file").write_bytes(b"content")
    backend = await opened(OnedataNativeBackend(options(site, request_timeout=600.0)))
    (site.base / ".held").touch()

    with trio.fail_after(60), trio.move_on_after(0.5):
        await read(backend, free("file"), None, 0, 7)

    assert helpers_of(backend) == []
    await backend.aclose()


async def test_no_helper_outlives_its_daemon(site: FakeSite) -> None:
    """Here: the other end of its socket, which the kernel closes with any process."""
    backend = await opened(OnedataNativeBackend(options(site)))
    (pid,) = helpers_of(backend)
    status = os.pidfd_open(pid)

    await backend.aclose()

    with trio.fail_after(30):
        await trio.lowlevel.wait_readable(status)
    os.close(status)


async def test_a_refused_token_is_said_so_and_told_to_nobody(
    site: FakeSite, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "a-wrong-and-secret-token")
    backend = OnedataNativeBackend(options(site))

    with pytest.raises(Unauthenticated) as caught:
        await backend.connect()

    assert "a-wrong-and-secret-token" not in str(caught.value) + "".join(capfd.readouterr())
    await backend.aclose()


async def test_the_token_is_in_no_argument_and_no_environment(site: FakeSite) -> None:
    backend = await opened(OnedataNativeBackend(options(site)))

    for pid in helpers_of(backend):
        for name in ("cmdline", "environ"):
            assert TOKEN.encode() not in Path(f"/proc/{pid}/{name}").read_bytes()

    await backend.aclose()


@pytest.mark.parametrize(
    ("python", "expected"),
    [("/nowhere/python3", "/nowhere/python3 cannot be run: No such file"), (sys.executable, "cannot import fs.onedatafs")],
    ids=["no-interpreter", "no-library"],
)
async def test_an_interpreter_without_the_library_is_named(site: FakeSite, python: str, expected: str) -> None:
    backend = OnedataNativeBackend(options(site, python=python))

    with pytest.raises(RemoteUnavailable, match=expected):
        await backend.connect()

    await backend.aclose()


async def test_the_list_of_spaces_takes_nothing(site: FakeSite) -> None:
    backend = await opened(OnedataNativeBackend(options(site, space=None)))

    (entry,) = await backend.list(Place())
    assert (entry.name, entry.kind, entry.border, entry.removable) == ("ocean", Kind.DIRECTORY, True, False)
    with pytest.raises(RemoteDenied):
        await upload(backend, free("file"), b"content")
    await upload(backend, Place(("ocean", "file")), b"content")

    assert (site.spaces / "ocean" / "file").read_bytes() == b"content"
    await backend.aclose()
