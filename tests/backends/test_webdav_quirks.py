"""How the servers behave where they differ, asked of each by plain HTTP; and what we take for granted is so.

The table is the truth of the versions in Debian 12 and on PyPI; when a row changes, so may `webdav_habits.py`.
"""

from __future__ import annotations

import base64
import http.client
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from nbmountd.backends.webdav_habits import Habits, recognise
from nbmountd.backends.webdav_overlay import NAMESPACE, Overlay, update_body
from tests.servers import (
    ApacheServer,
    FakeNextcloud,
    LighttpdServer,
    NginxServer,
    RcloneServer,
    SabreServer,
    ServerProcess,
    WsgiDAVServer,
)

ASK = (
    f'<?xml version="1.0"?><d:propfind xmlns:d="DAV:" xmlns:n="{NAMESPACE}"><d:prop><d:getetag/><n:attributes/></d:prop>'
    "</d:propfind>"
).encode()


@dataclass(frozen=True)
class Quirks:
    """What was measured. A condition is honoured if what it forbids is refused and what it allows is done."""

    name: str
    """What `recognise` calls it."""
    put_conditions: bool
    tagged_if: bool
    atomic_put: bool
    honest_mkcol: bool
    honest_move: bool
    lists_dot_names: bool
    etag: str
    """In a listing: "" (none), weak, bare (without quotes) or strong; of a file that was written just now."""
    properties: bool
    """PROPPATCH stores a property of ours."""
    properties_move: bool = False
    """MOVE takes it along."""
    control_names: str = "taken"
    """What becomes of names with line feeds and tabs: taken, refused, or lost (what was sent is not where it belongs), or
    harm (something else is gone)."""


TABLE: dict[type[ServerProcess], Quirks] = {
    #                       recognised as  PUT    If     cut    MKCOL  MOVE   dots   ETag      properties   control names
    ApacheServer: Quirks("Apache", True, True, True, True, True, True, "weak", True, True),
    NginxServer: Quirks("nginx", False, False, True, True, False, False, "", False),
    LighttpdServer: Quirks("lighttpd", True, False, True, True, True, True, "strong", True, True, "refused"),
    WsgiDAVServer: Quirks("WsgiDAV", True, False, False, True, True, True, "bare", True, True, "lost"),
    RcloneServer: Quirks("unknown", False, False, False, False, True, True, "strong", False, control_names="lost"),
    SabreServer: Quirks("sabre/dav", True, False, True, True, True, True, "strong", True, True, "harm"),
    FakeNextcloud: Quirks("Nextcloud", True, True, False, True, True, True, "strong", True, True, "refused"),
}


class Client:
    """Another client of the server's share."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.login = "Basic " + base64.b64encode(f"{server.user}:{server.password}".encode()).decode()

    def ask(self, method: str, name: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        sent = {"Authorization": self.login, **{key.replace("_", "-"): value for key, value in headers.items()}}
        connection.request(method, self.path(name), body, sent)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content, {key.lower(): value for key, value in answer.getheaders()}

    def path(self, name: str) -> str:
        return self.server.prefix + quote(name)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server.port}{self.path(name)}"

    def put(self, name: str, content: bytes, **headers: str) -> bool:
        return self.ask("PUT", name, content, **headers)[0] < 300

    def move(self, source: str, target: str, **headers: str) -> bool:
        return self.ask("MOVE", source, Destination=self.url(target), **headers)[0] < 300

    def etag(self, name: str) -> str:
        _, content, _ = self.ask("PROPFIND", name, ASK, Depth="0", Content_Type="application/xml")
        text = content.decode().replace("&quot;", '"').replace("&#34;", '"')
        return text.partition("getetag>")[2].partition("<")[0]

    def has_property(self, name: str) -> bool:
        return b'"mode":384' in self.ask("PROPFIND", name, ASK, Depth="0", Content_Type="application/xml")[1].replace(
            b"&quot;", b'"'
        ).replace(b"&#34;", b'"')

    def cut_put(self, name: str) -> None:
        """A PUT of 1 MB of which half is sent."""
        head = f"PUT {self.path(name)} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {self.login}\r\n"
        head += "Content-Length: 1000000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.server.port)) as connection:
            connection.sendall(head.encode() + bytes(500_000))


def strong(client: Client, name: str) -> str:
    """The file's ETag as conditions need it, once it is one."""
    deadline = time.monotonic() + 10
    while (etag := client.etag(name)).startswith("W/") and time.monotonic() < deadline:
        time.sleep(0.1)
    return etag if etag.startswith('"') else f'"{etag}"'


def control_names(client: Client, root: Path) -> str:
    client.ask("MKCOL", "kept/")
    client.put("kept/file", b"1")
    outcomes = set()
    for name in ("a\nb", "a\tb", "a\x01b"):
        answers = {client.ask("MKCOL", f"kept/{name}/")[0]}
        answers.add(client.ask("PUT", f"kept/{name}/x", b"1")[0])
        answers.add(client.ask("MOVE", f"kept/{name}/x", Destination=client.url(f"kept/{name}/y"))[0])
        if (root / "kept" / name / "y").exists():
            outcomes.add("taken")
        elif not (root / "kept" / "file").exists():
            return "harm"
        elif min(answers) >= 400:
            outcomes.add("refused")
        else:
            outcomes.add("lost")
    return max(outcomes, key=["taken", "refused", "lost"].index)


def measure(server: ServerProcess) -> tuple[Quirks, Habits]:
    client, root = Client(server), server.root
    habits = recognise(client.ask("OPTIONS", "")[2], server.prefix)
    for name in ("a", "b", ".dot", "cut"):
        client.put(name, b"old content")
    etag = client.etag("a")
    kind = "" if not etag else "weak" if etag.startswith("W/") else "strong" if etag.startswith('"') else "bare"
    put_conditions = (
        not client.put("a", b"x", If_None_Match="*")
        and not client.put("a", b"x", If_Match='"another"')
        and client.put("a", b"newer content", If_Match=strong(client, "a"))
    )
    client.put("c", b"c")
    tagged_if = not client.move("c", "b", If=f'<{client.url("b")}> (["another"])', Overwrite="T") and client.move(
        "c", "b", If=f'<{client.url("b")}> ([{strong(client, "b")}])', Overwrite="T"
    )
    client.cut_put("cut")
    time.sleep(0.5)  # for whatever the server makes of it
    atomic_put = (root / "cut").read_bytes() == b"old content"
    client.ask("MKCOL", "made/")
    honest_mkcol = client.ask("MKCOL", "made/")[0] >= 400
    client.put("d", b"d")
    honest_move = not client.move("d", "missing/d")
    listing = client.ask("PROPFIND", "", ASK, Depth="1", Content_Type="application/xml")[1]
    client.put("e", b"e")
    client.ask("PROPPATCH", "e", update_body(Overlay(mode=0o600)), Content_Type="application/xml")
    properties = client.has_property("e")
    client.move("e", "f")
    quirks = Quirks(
        habits.name, put_conditions, tagged_if, atomic_put, honest_mkcol, honest_move, b"/.dot<" in listing, kind,
        properties, client.has_property("f"), control_names(client, root),
    )  # fmt: skip
    return quirks, habits


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: str(kind.__name__))
def test_a_server_behaves_as_its_row_says_and_no_habit_claims_more(tmp_path: Path, kind: type[ServerProcess]) -> None:
    with kind(tmp_path / "root", tmp_path / "work") as server:
        measured, habits = measure(server)

    assert measured == TABLE[kind]
    assert not habits.conditions or measured.put_conditions
    assert not habits.tagged_if or measured.tagged_if
    assert not habits.atomic_put or measured.atomic_put
    assert not habits.honest_mkcol or measured.honest_mkcol
    assert not habits.honest_move or measured.honest_move
    assert habits.names.stored(".dot") != ".dot" or measured.lists_dot_names
    assert not habits.control_names or measured.control_names == "taken"
    assert habits.dead_properties is False or (measured.properties and measured.properties_move)
