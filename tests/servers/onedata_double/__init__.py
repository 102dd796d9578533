"""A Onezone with two Oneproviders in a process of its own, over TLS, as reference/onedata.md (section 10) says they behave.

The official clients check it (test_onedata_double.py). From the bottom: `ids` and `refusal` are formats, `world` is the
truth, `server` speaks HTTP and makes faults, `provider`, `cdmi`, `events` and `zone` are the faces, `control` is the
door for tests. Here is the side of the tests: the process, and calls through that door.
"""

from __future__ import annotations

import base64
import http.client
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import trustme

from tests.servers.process import ServerProcess, free_port

KRAKOW, PARIS = "prov-krakow", "prov-paris"


class OnedataDouble(ServerProcess):
    """`alice` owns every space, `bob` is a member. Tokens: see `TOKENS`."""

    prefix = "/"

    TOKENS: ClassVar[dict[str, dict[str, Any]]] = {
        "alice-rest": {"user": "alice"},
        "bob-rest": {"user": "bob"},
        "alice-readonly": {"user": "alice", "readonly": True},
        "alice-oneclient": {"user": "alice", "interface": "oneclient"},
        "alice-onezone": {"user": "alice", "interface": "rest", "services": ["ozw-onezone"]},
    }

    def __init__(self, work: Path, *, version: str = "25.0.1", other_version: str | None = None, events: bool = True) -> None:
        self.zone_port, self.krakow_port, self.paris_port = free_port(), free_port(), free_port()
        self._version, self._other_version, self._events = version, other_version or version, events
        super().__init__(work / "files", work)

    def configure(self) -> None:
        authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        authority.cert_pem.write_to_path(self.ca_bundle)
        certificate = authority.issue_cert("127.0.0.1", "localhost", key_type=trustme.KeyType.ECDSA)
        certificate.private_key_and_cert_chain_pem.write_to_path(self.work / "certificate.pem")
        settings = {
            "port": self.port,
            "zone_port": self.zone_port,
            "certificate": str(self.work / "certificate.pem"),
            "directory": str(self.root),
            "log": str(self.log),
            "providers": {
                KRAKOW: {"name": "Krakow", "port": self.krakow_port, "version": self._version, "events": self._events},
                PARIS: {"name": "Paris", "port": self.paris_port, "version": self._other_version, "events": self._events},
            },
            "tokens": self.TOKENS,
            "identities": {"checkin-alice": "alice"},
        }
        (self.work / "settings.json").write_text(json.dumps(settings))

    def command(self) -> list[str]:
        return [sys.executable, "-u", "-m", "tests.servers.onedata_double", str(self.work / "settings.json")]

    @property
    def ca_bundle(self) -> str:
        return str(self.work / "authority.pem")

    @property
    def zone_host(self) -> str:
        return f"127.0.0.1:{self.zone_port}"

    @property
    def krakow_host(self) -> str:
        return f"127.0.0.1:{self.krakow_port}"

    @property
    def paris_host(self) -> str:
        return f"127.0.0.1:{self.paris_port}"

    def do(self, operation: str, **arguments: Any) -> Any:
        """One call through the door for tests. Raises DoorError with the double's answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(
                "POST", f"/{operation}", json.dumps(arguments), {"Content-Type": "application/json", "Connection": "close"}
            )
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise DoorError(body.decode())
        return json.loads(body)

    def fault(self, pattern: str, action: str, face: str = "*", **values: Any) -> None:
        """See server.Fault."""
        self.do("fault", face=face, pattern=pattern, action=action, **values)

    def records(self) -> list[str]:
        """"METHOD target status" of each request to a face since `do("clear")`."""
        return [f"{one['method']} {one['target']} {one['status']}" for one in self.do("records")]

    def add_space(self, id: str, name: str | None = None, supports: dict[str, bool] | None = None) -> DoubleOutside:
        """A new space of alice, with bob in it, on both providers if nothing is said; its view from outside."""
        if supports is None:
            supports = {KRAKOW: False, PARIS: False}
        self.do("space", id=id, name=name or id, owner="alice", members=["alice", "bob"], supports=supports)
        return DoubleOutside(self, id, next(iter(supports)))


class DoorError(Exception):
    """The double refused an operation of a test."""


@dataclass
class DoubleOutside:
    """A space (or a folder in it) as another client on `provider` sees it: the suite's `Outside`."""

    double: OnedataDouble
    base: str
    provider: str = KRAKOW

    def read(self, path: str) -> bytes:
        return base64.b64decode(self.double.do("read", provider=self.provider, path=self._at(path)))

    def write(self, path: str, content: bytes, mtime: int | None = None) -> None:
        text = base64.b64encode(content).decode()
        self.double.do("write", provider=self.provider, path=self._at(path), content=text, mtime=mtime)

    def listdir(self, path: str) -> list[str]:
        return sorted(self.double.do("listdir", provider=self.provider, path=self._at(path)))

    def mkdir(self, path: str) -> None:
        self.double.do("mkdir", provider=self.provider, path=self._at(path))

    def remove(self, path: str) -> None:
        self.double.do("remove", provider=self.provider, path=self._at(path))

    def stat(self, path: str) -> dict[str, Any]:
        told: dict[str, Any] = self.double.do("stat", provider=self.provider, path=self._at(path))
        return told

    def _at(self, path: str) -> str:
        return f"{self.base}/{path}" if path else self.base
