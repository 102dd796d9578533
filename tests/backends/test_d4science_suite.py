"""The conformance suite over the StorageHub double: both profiles, with and without ranges."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nbmountd.backends.d4science import D4ScienceBackend
from nbmountd.backends.d4science_names import decode, encode
from nbmountd.config import D4ScienceOptions
from tests.backends.suite import BackendSuite, Remote
from tests.servers.d4science_double import D4ScienceServer, DoubleUser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[D4ScienceServer]:
    with D4ScienceServer(tmp_path_factory.mktemp("storagehub")) as server:
        yield server


@dataclass
class NamesAsPrograms:
    """The workspace as another mount would see it: names through the encoding, which has tests of its own."""

    user: DoubleUser

    def read(self, path: str) -> bytes:
        return self.user.read(self._wire(path))

    def write(self, path: str, content: bytes) -> None:
        self.user.write(self._wire(path), content)

    def listdir(self, path: str) -> list[str]:
        return sorted(decode(name) for name in self.user.listdir(self._wire(path)))

    def mkdir(self, path: str) -> None:
        self.user.mkdir(self._wire(path))

    def remove(self, path: str) -> None:
        self.user.remove(self._wire(path))

    @staticmethod
    def _wire(path: str) -> str:
        return "/".join(encode(name) for name in path.split("/")) if path else ""


class D4ScienceSuite(BackendSuite):
    settings: dict[str, Any]

    @pytest.fixture
    async def remote(self, server: D4ScienceServer, tmp_path: Path) -> AsyncIterator[Remote]:
        server.reset()
        server.settings(**self.settings)
        user = server.new_user()
        token = tmp_path / "token"
        token.write_text(user.token)
        backend = D4ScienceBackend(D4ScienceOptions(url=server.url, token_file=str(token)))
        user.write("probe", b"12")  # whether ranges work is found out with a file
        capabilities = await backend.connect()
        user.remove("probe")
        yield Remote(backend, capabilities, NamesAsPrograms(user))
        await backend.aclose()


class TestNewWithoutRanges(D4ScienceSuite):
    settings = {"profile": "2.x"}  # noqa: RUF012


class TestNewWithRanges(D4ScienceSuite):
    settings = {"profile": "2.x", "ranges": True, "missing_class": "IdNotFoundException", "escapes_quotes": True}  # noqa: RUF012


class TestOldWithoutRanges(D4ScienceSuite):
    settings = {"profile": "1.x", "absent": "missing", "has_size": False}  # noqa: RUF012


class TestOldWithRanges(D4ScienceSuite):
    settings = {"profile": "1.x", "ranges": True}  # noqa: RUF012
