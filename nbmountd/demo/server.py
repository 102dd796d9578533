"""A small WebDAV server (wsgidav on cheroot) as a process of its own: `python -m nbmountd.demo.server DIRECTORY`.

It listens on a free port of 127.0.0.1, says which on standard output, and takes one user. Name and password come as two
lines of standard input, so that they stand in no argument list and no environment. SIGTERM ends it.
"""

from __future__ import annotations

import logging
import signal
import sys

from cheroot import wsgi
from wsgidav.wsgidav_app import WsgiDAVApp


def main() -> None:
    """Serves until SIGTERM."""
    user, password = sys.stdin.readline().rstrip("\n"), sys.stdin.readline().rstrip("\n")
    application = WsgiDAVApp(
        {
            "provider_mapping": {"/": sys.argv[1]},
            "http_authenticator": {"accept_basic": True, "accept_digest": False, "default_to_digest": False},
            "simple_dc": {"user_mapping": {"*": {user: {"password": password}}}},
            "property_manager": True,
            "lock_storage": True,
            "verbose": 0,
            "logging": {"enable": False},
        }
    )
    logging.getLogger("wsgidav").setLevel(logging.ERROR)
    server = wsgi.Server(("127.0.0.1", 0), application, numthreads=10)
    server.prepare()

    def end(*_: object) -> None:
        raise SystemExit

    signal.signal(signal.SIGTERM, end)
    sys.stdout.write(f"{server.bind_addr[1]}\n")
    sys.stdout.flush()
    try:
        server.serve()
    finally:
        server.stop()


if __name__ == "__main__":
    main()
