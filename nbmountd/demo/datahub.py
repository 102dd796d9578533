"""The demo's EGI DataHub: a Onezone with two Oneproviders over TLS, the stand-in of the tests, and what is shown of it.

It knows nothing of the other remotes.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import secrets
import shutil
import socket
import ssl
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import h5py
import trustme

from nbmountd.demo.stage import SERVERS, Check, Stage

SPACES = {"ocean": "Ocean data", "forest": "Forest"}
SIZE, CHANGED = 32 * 2**20, 4096
RUN = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module(sys.argv.pop(1), None, '__main__')"


class DataHub:
    """Spaces of a user, over the stand-in for Onedata."""

    name = "datahub"
    what = "EGI DataHub"
    title = "EGI DataHub in the same home: spaces of Onedata (its servers are stand-ins made from public documentation)"

    def start(self, stage: Stage) -> dict[str, object]:
        work = stage.home / "onedata"
        (work / "files").mkdir(parents=True)
        authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self._authority = str(work / "authority.pem")
        authority.cert_pem.write_to_path(self._authority)
        certificate = authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.ECDSA)
        certificate.private_key_and_cert_chain_pem.write_to_path(str(work / "certificate.pem"))
        checkin, self._token = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
        door, zone, krakow, paris = free_ports(4)
        self._provider, version = f"127.0.0.1:{krakow}", "25.0.1"
        settings = {
            "port": door, "zone_port": zone, "certificate": str(work / "certificate.pem"),
            "directory": str(work / "files"), "log": str(work / "requests.log"),
            "providers": {
                "prov-krakow": {"name": "Krakow", "port": krakow, "version": version, "events": True},
                "prov-paris": {"name": "Paris", "port": paris, "version": version, "events": True},
            },
            "tokens": {self._token: {"user": "ada"}}, "identities": {checkin: "ada"},
        }  # fmt: skip
        (work / "settings.json").write_text(json.dumps(settings))
        stage.start_python("-c", RUN, SERVERS.parents[1], "tests.servers.onedata_double", work / "settings.json")
        supports = {"prov-krakow": False, "prov-paris": False}
        for id, name in SPACES.items():
            tell(door, "space", {"id": id, "name": name, "owner": "ada", "members": ["ada"], "supports": supports})
        token = stage.home / "checkin-token"
        token.touch(mode=0o600)
        token.write_text(checkin)
        return {
            "backend": "onedata", "onezone": f"127.0.0.1:{zone}", "oneprovider": self._provider,
            "checkin_token_file": str(token), "ca_bundle": self._authority,
        }  # fmt: skip

    def show(self, stage: Stage, mount: Path, check: Check) -> None:
        check("each space is a directory; the login's token was enough", sorted(os.listdir(mount)) == sorted(SPACES.values()))
        ocean, forest = mount / "Ocean data", mount / "Forest"
        with h5py.File(ocean / "waves.h5", "w") as file:
            file["height"] = list(range(1000))
        (ocean / "raw.bin").write_bytes(bytes(SIZE))
        stage.ctl_output("sync", str(mount))
        before = self._sent(stage)
        with h5py.File(ocean / "waves.h5", "a") as file:
            file["height"][10] = -1
        with (ocean / "raw.bin").open("r+b") as raw:
            raw.seek(SIZE // 2)
            raw.write(b"x" * CHANGED)
        stage.ctl_output("sync", str(mount))
        sent = self._sent(stage) - before
        check(f"4 KiB changed in a file of {SIZE // 2**20} MiB, and an array in HDF5: {sent / 1000:.0f} kB sent", sent < 2**20)
        same = all(self._download(f"Ocean data/{name}") == (ocean / name).read_bytes() for name in ("waves.h5", "raw.bin"))
        check("the provider gives the same bytes", same)
        try:
            (ocean / "waves.h5").rename(forest / "waves.h5")
            refusal = 0
        except OSError as exc:
            refusal = exc.errno or 0
        shutil.move(ocean / "waves.h5", forest / "waves.h5")
        stage.ctl_output("sync", str(mount))
        there = self._download("Forest/waves.h5") == (forest / "waves.h5").read_bytes()
        check("mv from one space into another copies, as between two disks", refusal == errno.EXDEV and there)

    def _sent(self, stage: Stage) -> int:
        return next(mount.bytes_sent for mount in stage.statuses() if mount.name == self.name)

    def _download(self, path: str) -> bytes:
        """A file's bytes as the provider gives them to somebody who has nothing to do with nbmountd."""
        id = json.loads(self._ask("POST", f"/lookup-file-id/{quote(path)}"))["fileId"]
        return self._ask("GET", f"/data/{id}/content")

    def _ask(self, method: str, path: str) -> bytes:
        context = ssl.create_default_context(cafile=self._authority)
        connection = http.client.HTTPSConnection(self._provider, timeout=60, context=context)
        connection.request(method, "/api/v3/oneprovider" + path, headers={"X-Auth-Token": self._token})
        body = connection.getresponse().read()
        connection.close()
        return body


def tell(port: int, operation: str, values: dict[str, object]) -> None:
    """One call through the stand-in's own door."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", f"/{operation}", json.dumps(values))
    answer = connection.getresponse()
    answer.read()
    connection.close()
    if answer.status != 200:
        raise RuntimeError(f"{operation}: status {answer.status}")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
