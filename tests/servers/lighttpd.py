"""lighttpd with mod_webdav: strong ETags, conditions on PUT honoured, atomic PUT; 308 for a folder without slash."""

from __future__ import annotations

from pathlib import Path

from tests.servers.process import ServerMissing, ServerProcess, program

MODULE = Path("/usr/lib/lighttpd/mod_webdav.so")
PACKAGES = "lighttpd and lighttpd-mod-webdav"

CONFIGURATION = """
server.modules = ("mod_alias", "mod_auth", "mod_authn_file", "mod_accesslog", "mod_webdav")
server.bind = "127.0.0.1"
server.port = {port}
server.document-root = "{work}"
server.errorlog = "{work}/error.log"
server.upload-dirs = ("{work}")
server.max-request-size = 0
server.max-keep-alive-requests = 100000
server.stream-request-body = 0
accesslog.filename = "{work}/requests.log"
accesslog.format = "%m %U %s"
# Without a type for everything GET and HEAD carry neither ETag nor Last-Modified.
mimetype.assign = ("" => "application/octet-stream")
alias.url = ("{prefix}" => "{root}/")
auth.backend = "plain"
auth.backend.plain.userfile = "{work}/users"
$HTTP["url"] =~ "^{prefix}" {{
  webdav.activate = "enable"
  webdav.sqlite-db-name = "{work}/webdav.db"
  auth.require = ("" => ("method" => "basic", "realm" => "nbmountd", "require" => "valid-user"))
}}
"""


class LighttpdServer(ServerProcess):
    logs_late = True

    def configure(self) -> None:
        if not MODULE.exists():
            raise ServerMissing(f"lighttpd lacks mod_webdav; the tests need the Debian packages {PACKAGES}")
        users = self.work / "users"
        users.touch(mode=0o600)
        users.write_text(f"{self.user}:{self.password}\n")
        text = CONFIGURATION.format(work=self.work, port=self.port, prefix=self.prefix, root=self.root)
        (self.work / "lighttpd.conf").write_text(text)

    def command(self) -> list[str]:
        return [program("lighttpd", PACKAGES), "-D", "-f", str(self.work / "lighttpd.conf")]
