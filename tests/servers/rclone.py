"""rclone serve webdav: no conditions, a cut PUT leaves the target truncated, MKCOL of what exists is a success."""

from __future__ import annotations

import re

from tests.servers.process import ServerProcess, program

REQUEST = re.compile(r"(?:INFO|DEBUG)\s*: (?P<path>.*): (?P<method>[A-Z]+) from 127\.0\.0\.1")


class RcloneServer(ServerProcess):
    """Its log has no status; `requests` gives 000 for each."""

    def environment(self) -> dict[str, str]:
        return {"RCLONE_USER": self.user, "RCLONE_PASS": self.password, "RCLONE_CONFIG": ""}

    def command(self) -> list[str]:
        return [
            program("rclone", "rclone"), "serve", "webdav", str(self.root), "--addr", f"127.0.0.1:{self.port}",
            "--baseurl", self.prefix.strip("/"), "--dir-cache-time", "0s", "--log-file", str(self.log), "-vv",
        ]  # fmt: skip

    def requests(self, below: str = "") -> list[str]:
        found = map(REQUEST.search, self.log.read_text("utf-8", "replace").splitlines())
        matches = [match for match in found if match is not None and match["path"].startswith(self.prefix + below)]
        return [f"{match['method']} {match['path']} 000" for match in matches]
