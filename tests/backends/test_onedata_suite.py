"""The conformance suite over Onedata: a space of a double of the 25 line, and a folder in one of the 21.02.3 line."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from nbmountd.backends.onedata import OnedataBackend
from nbmountd.config import OnedataOptions
from tests.backends.suite import BackendSuite, Remote
from tests.servers.onedata_double import DoubleOutside, OnedataDouble


@pytest.fixture(scope="class")
def double(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnedataDouble]:
    with OnedataDouble(tmp_path_factory.mktemp("onedata"), version=request.cls.version) as server:
        assert isinstance(server, OnedataDouble)
        server.do("lag", seconds=request.cls.lag)
        yield server


class OnedataSuite(BackendSuite):
    """Each test gets a space of its own. The providers hear of each other's changes after 2 s, for which nothing here waits."""

    version: str
    lag = 2.0
    folder: str | None = None
    number = 0

    @pytest.fixture(autouse=True)
    def token(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TOKEN_OF_THE_TEST", "alice-rest")

    @pytest.fixture
    async def remote(self, double: OnedataDouble, token: None) -> AsyncIterator[Remote]:
        OnedataSuite.number += 1
        space = f"space{OnedataSuite.number}"
        outside = double.add_space(space, f"Space {OnedataSuite.number}")
        if self.folder is not None:
            for number, _ in enumerate(parts := self.folder.split("/"), start=1):
                outside.mkdir("/".join(parts[:number]))
            outside = DoubleOutside(double, f"{space}/{self.folder}")
        options = OnedataOptions(
            onezone=double.zone_host,
            oneprovider=double.krakow_host,
            space=space,
            folder=self.folder,
            token_env="TOKEN_OF_THE_TEST",
            ca_bundle=double.ca_bundle,
        )
        backend = OnedataBackend(options)
        yield Remote(backend, await backend.connect(), outside)
        await backend.aclose()


class TestNewestGeneration(OnedataSuite):
    version = "25.0.1"


class TestNewestOfTheOldLine(OnedataSuite):
    version = "21.02.8"


class TestOldGeneration(OnedataSuite):
    version = "21.02.3"
    folder = "deep/folder with space"
