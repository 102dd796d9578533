"""A double of D4Science's StorageHub: a real HTTP server in a process of its own, made from public notes on the service.

    with D4ScienceServer(work) as server:            # started, answers requests; profile "2.x" unless told otherwise
        server.url                                   # "http://127.0.0.1:PORT/workspace"
        user = server.new_user()                     # a user with an empty workspace and a token
        user.token, user.write("a/b.txt", b"...")    # the workspace as another client sees it
        server.settings(ranges=True)                 # the switches of settings.py
        server.hook(pattern="POST .*FILE", action="lose-after", user=user.name)      # the faults of hooks.py

The two profiles and every point that the notes leave open are switches (settings.py). It was never compared with the live
service. Not there: create ARCHIVE, GCUBEITEM and URL, share and unshare, search.
"""

from __future__ import annotations

import http.client
import json
import threading
import urllib.parse
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from tests.servers.process import ServerProcess, python_script

_numbers = count(1)


class D4ScienceServer(ServerProcess):
    """All calls block. Calls to the double's own door are not in the log."""

    prefix = "/workspace"

    def __init__(self, work: Path) -> None:
        super().__init__(work / "unused", work)
        self._local = threading.local()

    def __enter__(self) -> D4ScienceServer:
        super().__enter__()
        return self

    def command(self) -> list[str]:
        return python_script(Path(__file__).with_name("__main__.py"), str(self.port), str(self.work), str(self.log))

    def reset(self) -> None:
        """Switches as at the start, no faults, no locks. Users stay."""
        self.call("reset")

    def settings(self, **values: Any) -> None:
        self.call("settings", body=json.dumps(values).encode())

    def hook(self, **values: Any) -> None:
        self.call("hook", body=json.dumps(values).encode())

    def release(self) -> None:
        self.call("release")

    def new_user(self, name: str = "", root: str | None = None) -> DoubleUser:
        name = name or f"user{next(_numbers)}"
        arguments = {"user": name, **({"root": root} if root else {})}
        root_id = json.loads(self.call("user", b"", **arguments))
        return DoubleUser(self, name, root_id, json.loads(self.call("token", user=name)))

    def share(self, kind: str, title: str, owner: str, members: dict[str, str], context: str = "") -> str:
        """The id of a new shared ("shared") or VRE ("vre") folder."""
        values = {"kind": kind, "title": title, "owner": owner, "members": members, "context": context}
        return str(json.loads(self.call("share", body=json.dumps(values).encode())))

    def lines(self, user: str) -> list[str]:
        """"METHOD PATH STATUS" of the user's requests so far."""
        found = []
        for line in self.log.read_text("utf-8").splitlines():
            request, _, whose = line.rpartition(" ")
            if whose == user:
                found.append(request)
        return found

    def overlaps(self) -> dict[str, int]:
        """Folders in which changes ran side by side, and how many."""
        found: dict[str, int] = json.loads(self.call("overlaps"))
        return found

    def call(self, what: str, body: bytes = b"", **arguments: str) -> bytes:
        """Opens the double's door. Raises FileNotFoundError for what is not there."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", f"/_double/{what}?{urllib.parse.urlencode(arguments)}", body)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise FileNotFoundError(f"{what} {arguments}: {content.decode()}")
        return content

    def stop(self) -> None:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            del self._local.connection
        super().stop()


@dataclass
class DoubleUser:
    """One user's workspace from outside; names are as on the wire. Paths are "a/b", "" is the root."""

    server: D4ScienceServer
    name: str
    root: str
    token: str

    def read(self, path: str) -> bytes:
        return self._call("read", path)

    def write(self, path: str, content: bytes, *, hidden: bool = False) -> str:
        return str(json.loads(self._call("write", path, content, **({"hidden": "1"} if hidden else {}))))

    def write_sparse(self, path: str, size: int, edge: bytes) -> str:
        """A file of `size` bytes, zeros but for `edge` at its beginning and its end."""
        return str(json.loads(self._call("write", path, edge, size=str(size))))

    def fill(self, path: str, sizes: dict[str, int]) -> None:
        """A new folder with a file for each name, so many bytes each."""
        self._call("fill", path, json.dumps(sizes).encode())

    def listdir(self, path: str) -> list[str]:
        found: list[str] = json.loads(self._call("list", path))
        return found

    def mkdir(self, path: str) -> str:
        return str(json.loads(self._call("mkdir", path)))

    def remove(self, path: str) -> None:
        self._call("remove", path)

    def rename(self, path: str, to: str) -> None:
        self._call("rename", path, to=to)

    def item(self, path: str = "", *, id: str = "") -> dict[str, Any]:
        """id, name, node, kind, size, versions, metadata, trashed, parent."""
        found: dict[str, Any] = json.loads(self._call("item", path, b"", **({"id": id} if id else {})))
        return found

    def trash(self) -> list[str]:
        found: list[str] = json.loads(self._call("trash", ""))
        return found

    def lock(self, id: str) -> None:
        self.server.call("lock", id=id)

    def unlock(self, id: str) -> None:
        self.server.call("unlock", id=id)

    def _call(self, what: str, path: str, body: bytes = b"", **arguments: str) -> bytes:
        return self.server.call(what, body, user=self.name, path=path, **arguments)


__all__ = ["D4ScienceServer", "DoubleUser"]
