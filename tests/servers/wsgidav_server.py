"""WsgiDAV: needs nothing but Python. Unquoted coarse ETags in listings; a cut PUT leaves the target truncated."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
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
            self.write_settings(settings)

        def write_settings(self, settings: dict[str, Any]) -> None:
            path = self.work / "settings.json"
            path.touch(mode=0o600)
            path.write_text(json.dumps(settings))

        def command(self) -> list[str]:
            return python_script(Path(__file__), str(self.work / "settings.json"))

    class TokenServer(WsgiDAVServer):
        """The same behind bearer tokens, and slower: `seconds_per_mebibyte` of every body. `allow` says which tokens are good
        from now on; the log has the token's name, "-" for none, as a fourth word."""

        def __init__(self, root: Path, work: Path, *, seconds_per_mebibyte: float = 0.0) -> None:
            self.seconds_per_mebibyte = seconds_per_mebibyte
            super().__init__(root, work)

        def write_settings(self, settings: dict[str, Any]) -> None:
            self.allow()
            tokens = {"tokens": str(self.work / "tokens"), "slow": self.seconds_per_mebibyte}
            super().write_settings({**settings, **tokens})

        def allow(self, *tokens: str) -> None:
            new = self.work / "tokens.new"
            new.write_text("\n".join(tokens))
            new.replace(self.work / "tokens")

        def _answers(self) -> bool:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 2):
                self.log.write_text(f"OPTIONS {self.prefix} 401 -\n")  # what the others log of the same question
                return True
            return False


def serve(settings: dict[str, Any]) -> None:
    """Serves until the process is ended."""
    from cheroot import wsgi
    from wsgidav import __version__, wsgidav_app

    users = {settings["user"]: {"password": settings["password"]}}
    app = wsgidav_app.WsgiDAVApp(
        {
            "provider_mapping": {settings["prefix"]: settings["root"]},
            "simple_dc": {"user_mapping": {"*": True if "tokens" in settings else users}},
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
            token = environ.pop("HTTP_AUTHORIZATION", "").removeprefix("Bearer ") if "tokens" in settings else ""

            def start(status: str, *rest: Any) -> Any:
                fourth = f" {token or '-'}" if "tokens" in settings else ""
                log.write(f"{environ['REQUEST_METHOD']} {path} {status[:3]}{fourth}\n")
                return start_response(status, *rest)

            if "tokens" not in settings:
                answer: Iterable[bytes] = app(environ, start)
                return answer
            if token not in Path(settings["tokens"]).read_text().split():
                start("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Length", "0")])
                return [b""]
            environ["wsgi.input"] = _Slow(environ["wsgi.input"], settings["slow"])
            return _slowly(app(environ, start), settings["slow"])

        # The name that its own command line gives the server.
        name = f"WsgiDAV/{__version__} {wsgi.Server.version} Python/{sys.version_info.major}.{sys.version_info.minor}"
        server = wsgi.Server(("127.0.0.1", settings["port"]), logged, numthreads=16, server_name=name, timeout=60)
        server.start()


class _Slow:
    """A body that comes slowly."""

    def __init__(self, body: Any, seconds_per_mebibyte: float) -> None:
        self._body = body
        self._seconds = seconds_per_mebibyte / 2**20

    def read(self, *size: int) -> bytes:
        data: bytes = self._body.read(*size)
        time.sleep(self._seconds * len(data))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


def _slowly(body: Iterable[bytes], seconds_per_mebibyte: float) -> Iterator[bytes]:
    for piece in body:
        time.sleep(seconds_per_mebibyte * len(piece) / 2**20)
        yield piece
    if hasattr(body, "close"):
        body.close()


if __name__ == "__main__":
    serve(json.loads(Path(sys.argv[1]).read_text()))
