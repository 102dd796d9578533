"""The remote of the benchmark: Apache as the tests run it, with a second log that counts the bytes of each answer.

It knows nothing of who asks.
"""

from __future__ import annotations

from tests.servers import ApacheServer


class MeteredApache(ApacheServer):
    """Tells how much it has sent, headers included (mod_logio's %O)."""

    def configure(self) -> None:
        super().configure()
        with (self.work / "apache.conf").open("a") as configuration:
            configuration.write(f"LogFormat %O size\nCustomLog {self.work}/sizes.log size\n")

    def bytes_sent(self) -> int:
        """Bytes sent since the start, of answers that are complete or cut."""
        return sum(map(int, (self.work / "sizes.log").read_text().split()))
