"""WsgiDAV: needs nothing but Python. Unquoted coarse ETags in listings; a cut PUT leaves the target truncated."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

if __package__:
    from tests.servers.process import ServerProcess, python_script

    class WsgiDAVServer(ServerProcess):
        def configure(self) -> None:
            settings = {
                "root": str(self.root),
                "port": self.port,
                "prefix": self.prefix.rstrip("/"),
                "user": self.user,
                "password": self.password,
                "log": str(self.log),
            }
            path = self.work / "settings.json"
            path.touch(mode=0o600)
            path.write_text(json.dumps(settings))

        def command(self) -> list[str]:
            return python_script(Path(__file__), str(self.work / "settings.json"))


def serve(settings: dict[str, Any]) -> None:
    """Serves until the process is ended."""
    from cheroot import wsgi
    from wsgidav import __version__, wsgidav_app

    app = wsgidav_app.WsgiDAVApp(
        {
            "provider_mapping": {settings["prefix"]: settings["root"]},
            "simple_dc": {"user_mapping": {"*": {settings["user"]: {"password": settings["password"]}}}},
            "http_authenticator": {"accept_basic": True, "accept_digest": False, "default_to_digest": False},
            "lock_storage": True,
            "property_manager": True,
            "verbose": 1,
            "logging": {"enable": False},
        }
    )
    with Path(settings["log"]).open("a", buffering=1) as log:

        def logged(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ["PATH_INFO"]  # the application takes its own prefix off

            def start(status: str, *rest: Any) -> Any:
                log.write(f"{environ['REQUEST_METHOD']} {path} {status[:3]}\n")
                return start_response(status, *rest)

            answer: Iterable[bytes] = app(environ, start)
            return answer

        # The name that its own command line gives the server.
        name = f"WsgiDAV/{__version__} {wsgi.Server.version} Python/{sys.version_info.major}.{sys.version_info.minor}"
        server = wsgi.Server(("127.0.0.1", settings["port"]), logged, numthreads=16, server_name=name, timeout=60)
        server.start()


if __name__ == "__main__":
    serve(json.loads(Path(sys.argv[1]).read_text()))
