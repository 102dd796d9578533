"""The conformance suite over WebDAV: Apache, nginx and WsgiDAV, each a real server in a process of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nbmountd.backends.webdav import WebDAVBackend
from nbmountd.config import WebDAVOptions
from tests.backends.suite import BackendSuite, FolderOutside, Remote
from tests.servers import ApacheServer, NginxServer, ServerProcess, WsgiDAVServer


@pytest.fixture(scope="class")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server_class: type[ServerProcess] = request.cls.server_class
    directory: Path = tmp_path_factory.mktemp(server_class.__name__)
    with server_class(directory / "root", directory / "work") as server:
        yield server


class WebDAVSuite(BackendSuite):
    """The suite with a server of `server_class` that stays up; each test gets a directory of its own as the root."""

    server_class: type[ServerProcess]
    number = 0

    @pytest.fixture
    async def remote(self, server: ServerProcess) -> AsyncIterator[Remote]:
        WebDAVSuite.number += 1
        root = server.root / f"mount {WebDAVSuite.number}"
        root.mkdir()
        url = f"{server.url}mount%20{WebDAVSuite.number}"
        backend = WebDAVBackend(WebDAVOptions(url=url, user=server.user, password=server.password))
        yield Remote(backend, await backend.connect(), FolderOutside(root))
        await backend.aclose()


class TestApache(WebDAVSuite):
    server_class = ApacheServer


class TestNginx(WebDAVSuite):
    server_class = NginxServer


class TestWsgiDAV(WebDAVSuite):
    server_class = WsgiDAVServer
