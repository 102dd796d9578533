"""The double as the official clients see it: onedatafilerestclient's own test cases by name, and PyFilesystem's suite.

The cases of `onedatafilerestclient` 25.2.0 (tests/test_client.py) are told anew here with the same promises: its package
leaves out the fixtures they need. What is left out: cases of the client's own bookkeeping (graylists, dummy providers).
"""

from __future__ import annotations

import contextlib
import unittest
import uuid
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers.onedata_double import KRAKOW, PARIS, DoubleOutside, OnedataDouble

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # `fs` declares its namespace with pkg_resources
    import fs.test
    from fs.onedatarestfs import OnedataRESTFS
    from onedatafilerestclient import OnedataFileRESTClient
    from onedatafilerestclient.errors import OnedataRESTError, ReadonlyTokenError, SpaceNotFoundError

pytestmark = [
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),  # it cannot be told of a CA
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # it leaves its sessions open
]


@pytest.fixture(scope="module", params=["25.0.1", "21.02.3"])
def double(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnedataDouble]:
    with OnedataDouble(tmp_path_factory.mktemp("onedata"), version=request.param) as server:
        assert isinstance(server, OnedataDouble)
        yield server


@pytest.fixture
def space(double: OnedataDouble) -> DoubleOutside:
    double.do("clear")
    return double.add_space(uuid.uuid4().hex[:12])


def client_of(double: OnedataDouble, token: str = "alice-rest", **values: Any) -> OnedataFileRESTClient:
    return OnedataFileRESTClient(double.zone_host, token, verify_ssl=False, **values)


@contextlib.contextmanager
def refused(errno: str) -> Iterator[None]:
    with pytest.raises(OnedataRESTError) as caught:
        yield
    assert caught.value.category == "posix"
    assert caught.value.description == f"Operation failed with POSIX error: {errno}."


def test_list_spaces_and_get_space_id(double: OnedataDouble, space: DoubleOutside) -> None:
    client = client_of(double)

    assert space.base in client.list_spaces()
    assert client.get_space_id(space.base) == space.base
    with pytest.raises(SpaceNotFoundError):
        client.get_space_id("no such space")


def test_provider_selector(double: OnedataDouble, space: DoubleOutside) -> None:
    for preferred, host in ((KRAKOW, double.krakow_host), (PARIS, double.paris_host)):
        double.do("clear")
        client_of(double, preferred_providers=[preferred]).create_file(space.base, f"by {preferred}")
        faces = {record["face"] for record in double.do("records")} - {"zone"}
        assert faces == {preferred}, host


def test_provider_selector_with_readonly_and_offline_provider(double: OnedataDouble) -> None:
    readonly = double.add_space(uuid.uuid4().hex[:12], supports={KRAKOW: True, PARIS: False})
    double.do("clear")
    client_of(double, preferred_providers=[KRAKOW]).create_file(readonly.base, "file")
    written = {record["face"] for record in double.do("records")} - {"zone"}
    double.do("provider", id=KRAKOW, online=False)
    try:
        double.do("clear")
        client_of(double, preferred_providers=[KRAKOW]).list_children(readonly.base)
        listed = {record["face"] for record in double.do("records")} - {"zone"}
    finally:
        double.do("provider", id=KRAKOW, online=True)

    assert written == listed == {PARIS}


def test_get_file_id_is_the_same_everywhere(double: OnedataDouble, space: DoubleOutside) -> None:
    space.write("file", b"1")

    ids = {client_of(double, preferred_providers=[one]).get_file_id(space.base, file_path="file") for one in (KRAKOW, PARIS)}

    assert ids == {space.stat("file")["id"]}


def test_get_attributes(double: OnedataDouble, space: DoubleOutside) -> None:
    client = client_of(double)
    space.write("file", b"content")

    root = client.get_attributes(space.base)
    file = client.get_attributes(space.base, file_path="file")
    selected = client.get_attributes(space.base, attributes=["size", "name"], file_path="file")

    assert (root["type"], root["parentFileId"], root["name"]) == ("DIR", None, space.base)
    assert (file["type"], file["size"], file["posixPermissions"]) == ("REG", 7, "664")
    assert file["parentFileId"] == root["fileId"]
    assert selected == {"size": 7, "name": "file"}


def test_set_attributes(double: OnedataDouble, space: DoubleOutside) -> None:
    client = client_of(double)
    space.write("file", b"content")

    client.set_attributes(space.base, {"mode": "0640"}, file_path="file")

    assert client.get_attributes(space.base, file_path="file")["posixPermissions"] == "640"


def test_list_children_in_pages(double: OnedataDouble, space: DoubleOutside) -> None:
    client = client_of(double)
    for number in range(5):
        space.write(f"file{number}", b"")

    found: list[str] = []
    token = None
    while True:
        page = client.list_children(space.base, limit=2, continuation_token=token)
        found += [child["name"] for child in page["children"]]
        if page["isLast"]:
            break
        token = page["nextPageToken"]

    assert found == [f"file{number}" for number in range(5)]
    assert page["nextPageToken"] is not None


def test_get_and_iter_file_content(double: OnedataDouble, space: DoubleOutside) -> None:
    client = client_of(double)
    space.write("file", b"0123456789")

    assert client.get_file_content(space.base, file_path="file") == b"0123456789"
    assert client.get_file_content(space.base, offset=3, size=4, file_path="file") == b"3456"
    assert client.get_file_content(space.base, offset=8, size=100, file_path="file") == b"89"
    assert list(client.iter_file_content(space.base, chunk_size=4, file_path="file")) == [b"0123", b"4567", b"89"]


def test_put_file_content(double: OnedataDouble, space: DoubleOutside) -> None:
    client = client_of(double)
    space.write("file", b"0123456789")

    client.put_file_content(space.base, b"ab", offset=2, file_path="file")
    kept = space.read("file")
    client.put_file_content(space.base, b"end", offset=12, file_path="file")
    holed = space.read("file")
    client.put_file_content(space.base, b"new", file_path="file")

    assert kept == b"01ab456789"
    assert holed == b"01ab456789\0\0end"
    assert space.read("file") == b"new"


def test_create_file_and_remove(double: OnedataDouble, space: DoubleOutside) -> None:
    client = client_of(double)

    client.create_file(space.base, "a/b/file", create_parents=True, mode=0o600)
    with refused("eexist"):
        client.create_file(space.base, "a/b/file")
    client.remove(space.base, file_path="a")

    assert space.listdir("") == []


def test_move(double: OnedataDouble, space: DoubleOutside) -> None:
    client = client_of(double)
    space.write("from", b"content")
    space.write("over", b"old")
    identifier = client.get_file_id(space.base, file_path="from")

    client.move(space.base, "from", space.base, "to")
    client.move(space.base, "to", space.base, "over")

    assert space.listdir("") == ["over"]
    assert client.get_file_id(space.base, file_path="over") == identifier


def test_enoent_and_eacces(double: OnedataDouble, space: DoubleOutside) -> None:
    space.write("secret", b"1")
    double.do("chmod", provider=KRAKOW, path=f"{space.base}/secret", mode=0o600)

    with refused("enoent"):
        client_of(double).get_file_content(space.base, file_path="absent")
    with refused("eacces"):
        client_of(double, "bob-rest").get_file_content(space.base, file_path="secret")


def test_a_readonly_token(double: OnedataDouble, space: DoubleOutside) -> None:
    client = client_of(double, "alice-readonly")
    space.write("file", b"content")

    assert client.get_file_content(space.base, file_path="file") == b"content"
    with pytest.raises(ReadonlyTokenError):
        client.remove(space.base, file_path="file")


def test_extended_attributes_and_metadata(double: OnedataDouble, space: DoubleOutside) -> None:
    client = client_of(double)
    space.write("file", b"content")

    client.set_extended_attribute(space.base, {"colour": "blue"}, file_path="file")
    client.set_json_metadata(space.base, {"a": [1, 2]}, file_path="file")
    client.set_rdf_metadata(space.base, "<rdf/>", file_path="file")

    assert client.get_extended_attribute(space.base, file_path="file") == {"colour": "blue"}
    assert client.get_json_metadata(space.base, file_path="file") == {"a": [1, 2]}
    assert client.get_rdf_metadata(space.base, file_path="file") == "<rdf/>"


def test_a_token_for_oneclient_is_refused_with_its_caveat(double: OnedataDouble, space: DoubleOutside) -> None:
    with pytest.raises(OnedataRESTError) as caught:
        client_of(double, "alice-oneclient").list_children(space.base)

    assert caught.value.http_code == 401


def test_what_one_provider_was_told_the_other_hears_after_the_lag(double: OnedataDouble, space: DoubleOutside) -> None:
    double.do("lag", seconds=3600)
    try:
        client_of(double, preferred_providers=[KRAKOW]).create_file(space.base, "file")
        with refused("enoent"):
            client_of(double, preferred_providers=[PARIS]).get_file_id(space.base, file_path="file")
    finally:
        double.do("lag", seconds=0)


class PyFilesystemCases(fs.test.FSTestCases):
    """PyFilesystem's own suite, through fs-onedatarestfs."""

    version: str
    double: OnedataDouble

    @pytest.fixture(scope="class", autouse=True)
    def _double(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with OnedataDouble(tmp_path_factory.mktemp("onedata"), version=self.version) as server:
            request.cls.double = server
            yield

    def make_fs(self) -> Any:
        space = self.double.add_space(uuid.uuid4().hex[:12])
        return OnedataRESTFS(self.double.zone_host, "alice-rest", space=space.base, verify_ssl=False)


class TestNewestThroughPyFilesystem(PyFilesystemCases, unittest.TestCase):
    version = "25.0.1"


class TestOldThroughPyFilesystem(PyFilesystemCases, unittest.TestCase):
    version = "21.02.3"
