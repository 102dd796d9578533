"""nginx with dav-ext: no ETags in listings, no conditions on changes, slashes matter; a PUT is atomic."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

from tests.servers.process import ServerMissing, ServerProcess, program

MODULE = Path("/usr/lib/nginx/modules/ngx_http_dav_ext_module.so")

CONFIGURATION = """
{user}
load_module {module};
daemon off;
worker_processes 2;
pid {work}/pid;
error_log {work}/error.log warn;
events {{ worker_connections 256; }}
http {{
  log_format short "$request_method $uri $status";
  access_log {work}/requests.log short;
  client_body_temp_path {work}/bodies;
  proxy_temp_path {work}/unused1;
  fastcgi_temp_path {work}/unused2;
  uwsgi_temp_path {work}/unused3;
  scgi_temp_path {work}/unused4;
  client_max_body_size 0;
  keepalive_requests 1000000;
  sendfile on;
  default_type application/octet-stream;
  dav_ext_lock_zone zone=locks:1m;
  server {{
    listen 127.0.0.1:{port};
    location {prefix} {{
      alias {root}/;
      auth_basic nbmountd;
      auth_basic_user_file {work}/users;
      dav_methods PUT DELETE MKCOL COPY MOVE;
      dav_ext_methods PROPFIND OPTIONS LOCK UNLOCK;
      dav_ext_lock zone=locks;
      dav_access user:rw group:rw all:r;
    }}
  }}
}}
"""


class NginxServer(ServerProcess):
    def configure(self) -> None:
        if not MODULE.exists():
            raise ServerMissing("nginx lacks dav-ext; the tests need the Debian packages nginx and libnginx-mod-http-dav-ext")
        digest = base64.b64encode(hashlib.sha1(self.password.encode(), usedforsecurity=False).digest()).decode()
        (self.work / "users").write_text(f"{self.user}:{{SHA}}{digest}\n")
        text = CONFIGURATION.format(
            user="user root;" if os.geteuid() == 0 else "",
            module=MODULE, work=self.work, port=self.port, prefix=self.prefix, root=self.root,
        )  # fmt: skip
        (self.work / "nginx.conf").write_text(text)

    def command(self) -> list[str]:
        return [
            program("nginx", "nginx"), "-e", str(self.work / "error.log"), "-p", str(self.work),
            "-c", str(self.work / "nginx.conf"),
        ]  # fmt: skip
