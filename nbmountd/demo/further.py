"""The demo's further remotes: stand-ins for services that nobody can install, from the project's own tests.

A pip install has no tests, so it has none of these either, and the demo says so. To add one: a class with the three things
of `Further`, and its name in `further_remotes`.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
from pathlib import Path
from typing import Protocol
from urllib.parse import urlencode, urlsplit

from nbmountd.demo.datahub import DataHub
from nbmountd.demo.samples import notebook_text
from nbmountd.demo.stage import SERVERS, Check, Stage


class Further(Protocol):
    """A remote beside the demo's own."""

    name: str
    """Of its mount."""
    what: str
    """With an article."""
    title: str
    """Of its step."""

    def start(self, stage: Stage) -> dict[str, object]:
        """Starts its server as a process of the stage; the keys of its `[[mount]]` but for name and path."""

    def show(self, stage: Stage, mount: Path, check: Check) -> None:
        """Uses the mount as programs do, and looks at the server afterwards."""


def further_remotes() -> list[Further]:
    """Those whose servers are here."""
    return [DataHub(), Workspace()] if (SERVERS / "d4science_double").is_dir() else []


class Workspace:
    """A D4Science workspace, over the stand-in for StorageHub."""

    name = "workspace"
    what = "a D4Science workspace"
    title = "A D4Science workspace in the same home (its server is a stand-in made from public documentation)"
    _url = ""
    _token = ""

    def start(self, stage: Stage) -> dict[str, object]:
        work = stage.home / "storagehub"
        work.mkdir()
        port = stage.start_python(SERVERS / "d4science_double" / "__main__.py", "0", str(work), str(work / "requests.log"))
        self._url = f"http://127.0.0.1:{port}/workspace"
        door = {"user": "ada"}
        self._ask("POST", f"/_double/user?{urlencode(door)}")
        self._token = json.loads(self._ask("POST", f"/_double/token?{urlencode(door)}"))
        members = {"ada": "WRITE_ALL"}
        vre = {"kind": "vre", "title": "OceanLab", "owner": "ada", "members": members, "context": "/d4science/Ocean/OceanLab"}
        self._ask("POST", "/_double/share", json.dumps(vre).encode())
        token = stage.home / "workspace-token"
        token.touch(mode=0o600)
        token.write_text(self._token)
        return {"backend": "d4science", "url": self._url, "token_file": str(token)}

    def show(self, stage: Stage, mount: Path, check: Check) -> None:
        check("the VRE's folder is there by its readable name", os.listdir(mount / "VREFolders") == ["OceanLab"])
        path = mount / "notes.ipynb"
        for title in ("First thoughts", "Second thoughts", "Final thoughts"):
            saving = path.with_name(f".~{secrets.token_hex(4)}")
            saving.write_text(notebook_text(title))
            saving.replace(path)  # as editors save; StorageHub itself makes "notes(1).ipynb" of such a thing
            stage.ctl_output("sync", str(mount))
        (mount / "VREFolders" / "OceanLab" / "for-all.txt").write_text("shared with the laboratory\n")
        stage.ctl_output("sync", str(mount))
        id = os.getxattr(path, "user.d4science.id").decode()
        versions = os.getxattr(path, "user.d4science.versions").decode().splitlines()
        check(f"three saves are one item with {len(versions)} versions", len(versions) == 3)
        arrived = self._ask("GET", f"/workspace/items/{id}/download")
        check("the server gives the last one, byte by byte", arrived == path.read_bytes() and b"Final" in arrived)
        names = sorted(os.listdir(mount))
        listed = json.loads(self._ask("GET", f"/workspace/items/{self._root()}/children?exclude=hl%3Aaccounting"))["itemlist"]
        check("and has no second item", [item["name"] for item in listed] == ["notes.ipynb"] and names[-1] == "notes.ipynb")

    def _root(self) -> str:
        return str(json.loads(self._ask("GET", "/workspace?exclude=hl%3Aaccounting"))["item"]["id"])

    def _ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The answer to a request that has nothing to do with nbmountd."""
        connection = http.client.HTTPConnection(urlsplit(self._url).netloc, timeout=60)
        connection.request(method, path, body, {"Authorization": f"Bearer {self._token}"})
        answer = connection.getresponse().read()
        connection.close()
        return answer
