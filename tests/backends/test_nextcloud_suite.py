"""The conformance suite over a server that behaves as a Nextcloud does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest
import trio

from nbmountd.backends.webdav import WebDAVBackend
from nbmountd.config import WebDAVOptions
from nbmountd.errors import RemoteLocked, VersionMismatch
from nbmountd.escapes import NEXTCLOUD
from nbmountd.model import Entry
from tests.backends.suite import BackendSuite, FolderOutside, Remote, at, free, upload
from tests.servers import FakeNextcloud


@pytest.fixture(scope="class")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeNextcloud]:
    directory = tmp_path_factory.mktemp("nextcloud")
    server = FakeNextcloud(directory / "root", directory / "work")
    with server:
        yield server


class TestNextcloud(BackendSuite):
    number = 0

    @pytest.fixture
    async def remote(self, server: FakeNextcloud) -> AsyncIterator[Remote]:
        TestNextcloud.number += 1
        root = server.root / f"mount {TestNextcloud.number}"
        root.mkdir()
        url = f"{server.origin}/remote.php/webdav/mount%20{TestNextcloud.number}"
        backend = WebDAVBackend(WebDAVOptions(url=url, user=server.user, password=server.password))
        yield Remote(backend, await backend.connect(), FolderOutside(root, NEXTCLOUD))
        await backend.aclose()

    async def test_of_two_conditional_uploads_at_once_one_wins(self, remote: Remote) -> None:
        """The other one may be told "locked" as well (423 while the first is put together): then its caller asks."""
        old = await upload(remote.backend, free("file"), b"old")
        contents = [b"a" * 300_000, b"b" * 400_000]
        winners: list[Entry] = []

        async def contend(content: bytes) -> None:
            with suppress(VersionMismatch, RemoteLocked):
                winners.append(await upload(remote.backend, at(old), content, old.version))

        async with trio.open_nursery() as nursery:
            for content in contents:
                nursery.start_soon(contend, content)

        assert len(winners) == 1
        assert len(remote.outside.read("file")) == winners[0].size
        assert remote.outside.read("file") in contents
