"""sabre/dav on PHP's built-in server: what Nextcloud is built on. ETags are of the content; conditions are honoured."""

from __future__ import annotations

import json
from pathlib import Path

from tests.servers.process import ServerMissing, ServerProcess, program

LIBRARY = Path("/usr/share/php/Sabre/autoload.php")
PACKAGES = "php-cli and php-sabre-dav"
PROCESSES = 4


class SabreServer(ServerProcess):
    def configure(self) -> None:
        if not LIBRARY.exists():
            raise ServerMissing(f"sabre/dav is not installed; the tests need the Debian packages {PACKAGES}")
        settings = {
            "root": str(self.root), "prefix": self.prefix, "user": self.user, "password": self.password, "log": str(self.log)
        }  # fmt: skip
        path = self.work / "settings.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(settings))

    def environment(self) -> dict[str, str]:
        return {"SABRE_SETTINGS": str(self.work / "settings.json"), "PHP_CLI_SERVER_WORKERS": str(PROCESSES)}

    def command(self) -> list[str]:
        script = str(Path(__file__).with_name("sabre.php"))
        limits = ["-d", "memory_limit=-1", "-d", "post_max_size=0", "-d", f"opcache.lockfile_path={self.work}"]
        # PHP spools bodies there. Where it cannot write, it keeps the first 8 KiB and answers 201 all the same; /tmp is not
        # open to every user on every machine.
        spool = ["-d", f"sys_temp_dir={self.work}"]
        return [program("php", PACKAGES), *limits, *spool, "-S", f"127.0.0.1:{self.port}", script]
