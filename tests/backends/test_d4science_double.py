"""The StorageHub double against the requests of public clients, written from the notes on them in our own words.

Sources of the exchanges: the R client's test (d4storagehub4R, test_storagehub.R), the Galaxy client's `StorageHub` class,
the StorageHubCommand scripts, and the training scripts.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import urllib3

from tests.servers.d4science_double import D4ScienceServer, DoubleUser

numbers = count()
R_ROOT = "c158abd3-89fd-40a8-b3a8-d38da88c355e"


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
def user(server: D4ScienceServer) -> DoubleUser:
    return server.new_user()


class Client:
    """Plain requests with one style of log-in: "bearer", "header" or "query" (old clients)."""

    def __init__(self, server: D4ScienceServer, token: str, style: str = "bearer") -> None:
        self.base = server.url
        self._token = token
        self._style = style
        self._pool = urllib3.PoolManager(retries=False)

    def send(self, method: str, path: str, *, fields: dict[str, Any] | None = None, **options: Any) -> Any:
        url = path if path.startswith("http") else self.base + path
        headers = options.pop("headers", {})
        if self._style == "bearer":
            headers["Authorization"] = f"Bearer {self._token}"
        elif self._style == "header":
            headers["gcube-token"] = self._token
        else:
            url += ("&" if "?" in url else "?") + f"gcube-token={self._token}"
        return self._pool.request(method, url, fields=fields, headers=headers, **options)

    def json(self, path: str) -> Any:
        answer = self.send("GET", path)
        assert answer.status == 200, answer.data
        assert answer.headers["content-type"] == "application/json"
        return json.loads(answer.data)

    def close(self) -> None:
        self._pool.clear()


@pytest.fixture(params=["bearer", "header", "query"])
def client(request: pytest.FixtureRequest, server: D4ScienceServer, user: DoubleUser) -> Iterator[Client]:
    client = Client(server, user.token, request.param)
    yield client
    client.close()


def test_the_exchanges_of_the_r_client_work(server: D4ScienceServer, user: DoubleUser, client: Client) -> None:
    server.share("vre", "My VRE", user.name, {user.name: "WRITE_ALL"}, context="/d4science/My/VRE")
    quiet = "exclude=hl%3Aaccounting"

    profile = json.loads(client.send("GET", client.base.replace("/workspace", "/rest/2/people/profile")).data)
    assert profile["result"]["username"] == user.name
    assert set(profile["result"]) == {"username", "fullname", "avatar", "roles", "context"}

    root = client.json(f"?{quiet}")["item"]
    assert (root["id"], root["path"]) == (user.root, f"/Home/{user.name}/Workspace")
    assert "accounting" not in root

    assert client.json(f"/items/{root['id']}/children?{quiet}&showHidden=true")["itemlist"] == []
    vre = client.json(f"/vrefolder?{quiet}")["item"]
    assert client.json(f"/items/{vre['id']}/children?{quiet}&showHidden=true")["itemlist"] == []

    parent = root["id"]
    created = []
    for name in ("one", "two", "three", "four"):
        form = {"name": name, "description": "", "hidden": "FALSE"}
        answer = client.send("POST", f"/items/{parent}/create/FOLDER", fields=form, encode_multipart=False)
        assert answer.status == 200
        parent = answer.data.decode()
        created.append(parent)
    listed = client.json(f"/items/{root['id']}/children?{quiet}&showHidden=true")["itemlist"]
    assert listed[0]["id"] == created[0]
    assert listed[0]["path"] == f"/Home/{user.name}/Workspace/one"

    upload = client.send(
        "POST",
        f"/items/{created[-1]}/create/FILE",
        fields={"name": "a.csv", "description": "some data", "file": ("a.csv", b"a,b\n1,2\n", "text/csv")},
    )
    assert upload.status == 200
    file_id = upload.data.decode()

    link = json.loads(client.send("GET", f"/items/{file_id}/publiclink?{quiet}").data)
    assert "/shub/" in link
    assert client.send("GET", link).data == b"a,b\n1,2\n"

    assert client.send("DELETE", f"/items/{created[0]}").status == 200
    assert client.json(f"/items/{root['id']}/children?{quiet}")["itemlist"] == []


def test_the_root_and_the_user_of_the_r_test_can_be_set(server: D4ScienceServer) -> None:
    """Its assertions want the author's own user and root id."""
    number = next(numbers)  # users of a double are not removed
    root = R_ROOT[:-1] + str(number)
    user = server.new_user(f"emmanuel.blondel{number}", root)
    server.settings(public_prefix="https://data.d4science.org/shub/")
    client = Client(server, user.token)

    assert client.json("")["item"]["id"] == root
    file_id = user.write("file", b"1")
    assert json.loads(client.send("GET", f"/items/{file_id}/publiclink").data).startswith("https://data.d4science.org/shub")
    client.close()


def test_the_requests_of_the_galaxy_client_work(server: D4ScienceServer, user: DoubleUser, client: Client) -> None:
    answer = client.send("GET", client.base.replace("/workspace", "/icproxy/gcube/service/GCoreEndpoint/DataAccess/StorageHub"))
    endpoint = ElementTree.fromstring(answer.data).find("Resource/Profile/AccessPoint/RunningInstanceInterfaces/Endpoint")
    assert endpoint is not None
    assert endpoint.text == server.url

    root = client.json("")["item"]["id"]
    made = client.send(
        "POST",
        f"/items/{root}/create/FOLDER",
        fields={"name": "galaxy", "description": "x", "hidden": "False"},
        encode_multipart=False,
    )
    folder = made.data.decode()
    # It sends every field of the upload as a file part, with a file name.
    parts = {"name": ("name", "in.txt"), "description": ("description", "d"), "file": ("in.txt", b"input")}
    sent = client.send("POST", f"/items/{folder}/create/FILE", fields=parts)

    assert sent.status == 200
    assert [item["name"] for item in client.json(f"/items/{folder}/children")["itemlist"]] == ["in.txt"]
    link = client.send("GET", f"/items/{sent.data.decode()}/publiclink").data.decode()
    assert link[0] == link[-1] == '"'
    assert client.send("GET", link.strip('"')).data == b"input"


def test_the_requests_of_the_command_scripts_and_the_training_scripts_work(
    server: D4ScienceServer, user: DoubleUser, client: Client
) -> None:
    root = client.json("/?exclude=hl:accounting")["item"]["id"]
    fields = {"name": "result.zip", "description": "r", "file": ("file", b"bytes")}
    sent = client.send("POST", f"/items/{root}/create/FILE", fields=fields)
    assert sent.status == 200

    # The training scripts double a slash.
    got = client.send("GET", f"//items/{sent.data.decode()}/download")

    assert got.data == b"bytes"
    assert got.headers["content-disposition"] == "attachment; filename = result.zip"
    assert client.json("/")["item"]["id"] == root


def test_the_token_endpoint_gives_tokens_that_work(server: D4ScienceServer) -> None:
    server.settings(expires_in=600.0)
    plain = Client(server, "none")
    url = server.url.replace("/workspace", "/auth/realms/d4science/protocol/openid-connect/token")
    context = "/d4science.research-infrastructures.eu/D4Research/AnalyticsLab"
    grants = [
        {"grant_type": "password", "username": "trainee", "password": "x", "scope": f"d4s-context:{context}"},
        {"grant_type": "urn:ietf:params:oauth:grant-type:uma-ticket", "audience": context.replace("/", "%2F")},
    ]
    for grant in grants:
        answer = json.loads(plain.send("POST", url, fields=grant, encode_multipart=False).data)
        assert answer["expires_in"] == 600
        refresh = {"grant_type": "refresh_token", "client_id": "c", "refresh_token": answer["refresh_token"]}
        renewed = json.loads(plain.send("POST", url, fields=refresh, encode_multipart=False).data)
        for token in (answer["access_token"], renewed["access_token"]):
            client = Client(server, token)
            assert client.json("")["item"]["name"] == "Workspace"
            client.close()
    plain.close()


@pytest.mark.parametrize("status", [401, 403])
def test_a_bad_token_is_refused_before_the_service(server: D4ScienceServer, user: DoubleUser, status: int) -> None:
    server.settings(bad_token_status=status)
    client = Client(server, "wrong")

    answer = client.send("GET", "")

    assert answer.status == status
    assert "etag" not in answer.headers
    client.close()


def test_a_missing_id_is_404_or_406_as_the_generation_has_it(server: D4ScienceServer, user: DoubleUser) -> None:
    client = Client(server, user.token)
    newer = client.json("")["item"].get("metadata") is not None
    expected = {
        "/items/none": 406 if newer else 404,
        "/items/none/children": 406 if newer else 404,
        "/items/none/items/x": 406 if newer else 404,
        "/items/none/download": 406,
        "?relPath=none": 406,
    }

    for path, status in expected.items():
        answer = client.send("GET", path)
        assert (path, answer.status) == (path, status)
        assert answer.headers["etag"] == '"GXErrorResponse"'
        assert re.search(r"\.exceptions\.\w+$", json.loads(answer.data)["exceptionClass"])
    client.close()


def test_names_collide_silently_and_titles_go_their_own_way(server: D4ScienceServer, user: DoubleUser) -> None:
    client = Client(server, user.token)
    user.mkdir("a.d")
    user.mkdir("a(1).d")
    form = {"name": "a.d", "description": "", "hidden": "false"}

    made = client.send("POST", f"/items/{user.root}/create/FOLDER", fields=form, encode_multipart=False).data.decode()
    assert client.json(f"/items/{made}")["item"]["name"] == "a(2).d"

    assert user.listdir("") == ["a(1).d", "a(2).d", "a.d"]
    below = user.mkdir("a.d/a.d")
    moved = client.send(
        "PUT", f"/items/{below}/move", fields={"destinationId": user.root}, encode_multipart=False
    ).data.decode()
    item = client.json(f"/items/{moved}")["item"]
    assert (item["name"], item["title"]) == ("a(3).d", "a.d")
    client.close()


def test_listings_drop_what_the_server_hides(server: D4ScienceServer, user: DoubleUser) -> None:
    client = Client(server, user.token)
    user.mkdir("Trash")
    user.write("plain", b"")
    user.write("secret", b"", hidden=True)
    url = f"/items/{user.root}/children"

    names = [item["name"] for item in client.json(url)["itemlist"]]
    everything = [item["name"] for item in client.json(url + "?showHidden=true")["itemlist"]]
    page = [item["name"] for item in client.json(url + "/paged?start=1&limit=1&showHidden=true")["itemlist"]]

    assert names == ["plain"]
    assert everything == ["plain", "secret"]
    assert page == ["secret"]
    assert client.send("GET", url + "/paged").status == 500
    assert client.json(url + "/count?showHidden=true") == 2
    assert [item["name"] for item in client.json(f"/items/{user.root}/items/pl*")["itemlist"]] == ["plain"]
    client.close()


def test_a_deleted_item_is_in_the_trash_and_can_be_restored(server: D4ScienceServer, user: DoubleUser) -> None:
    client = Client(server, user.token)
    file_id = user.write("file", b"1")

    client.send("DELETE", f"/items/{file_id}")
    assert client.json(f"/items/{file_id}")["item"]["trashed"] is True
    trash = client.json("/trash")["item"]["id"]
    (wrapper,) = client.json(f"/items/{trash}/children")["itemlist"]
    assert (wrapper["name"], wrapper["title"]) == (file_id, "file")

    assert client.send("PUT", "/trash/restore", body=wrapper["id"].encode()).status == 200
    assert user.read("file") == b"1"
    client.send("DELETE", f"/items/{file_id}")
    client.send("DELETE", f"/items/{file_id}")
    assert client.send("GET", f"/items/{file_id}").status in (404, 406)
    client.close()


def test_versions_keep_their_bytes(server: D4ScienceServer, user: DoubleUser) -> None:
    client = Client(server, user.token)
    for content in (b"first", b"second"):
        file_id = user.write("file", content)

    versions = client.json(f"/items/{file_id}/versions")["itemlist"]

    assert [(each["name"], each["current"]) for each in versions] == [("1.0", False), ("1.1", True)]
    got = [client.send("GET", f"/items/{file_id}/versions/{each['name']}/download").data for each in versions]
    assert got == [b"first", b"second"]
    client.close()


def test_create_calls_of_the_newer_generation_insist_on_text(server: D4ScienceServer, user: DoubleUser) -> None:
    client = Client(server, user.token)
    newer = client.json("")["item"].get("metadata") is not None
    form = {"name": "a", "description": "", "hidden": "false"}

    answer = client.send(
        "POST",
        f"/items/{user.root}/create/FOLDER",
        fields=form,
        encode_multipart=False,
        headers={"Accept": "application/json"},
    )

    assert answer.status == (406 if newer else 200)
    client.close()
