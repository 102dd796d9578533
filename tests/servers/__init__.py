"""Real servers for tests, `make bench` and demos: processes of their own on 127.0.0.1, ended for certain.

    with ApacheServer(root, work) as server:         # started, answers requests
        server.url, server.user, server.password     # "http://127.0.0.1:PORT/dav/", Basic log-in
        server.root                                  # the directory that the URL shows; change it as "another client"
        server.requests()                            # ["PROPFIND /dav/ 207", ...] since the last clear_requests()
        server.stop()                                # gone as if the network were: connections are refused
        server.start()                               # back, on the same port, with the same files

`root` is made if it is missing; `work` is a directory for configuration, logs and locks, one per server. Both belong to
the caller. Leaving the `with` stops the server; `start` and `stop` may be called in any order and repeated. All calls
block, for some 50 ms at a start. ApacheServer, LighttpdServer, NginxServer, RcloneServer, SabreServer and WsgiDAVServer
serve WebDAV, TokenServer does behind bearer tokens; FakeNextcloud does as a Nextcloud would (fake_nextcloud.py says how
far); BrokenServer answers wrongly on purpose (broken.py says how).
A server that is not installed raises ServerMissing and names its packages.

When the tests run as root the server process is an ordinary user that keeps the right to read and write everything, so
that roots below a private temporary directory work.
"""

from tests.servers.apache import ApacheServer
from tests.servers.broken import BrokenServer
from tests.servers.fake_nextcloud import FakeNextcloud
from tests.servers.lighttpd import LighttpdServer
from tests.servers.nginx import NginxServer
from tests.servers.process import ServerMissing, ServerProcess
from tests.servers.rclone import RcloneServer
from tests.servers.sabre import SabreServer
from tests.servers.wsgidav_server import TokenServer, WsgiDAVServer

__all__ = [
    "ApacheServer",
    "BrokenServer",
    "FakeNextcloud",
    "LighttpdServer",
    "NginxServer",
    "RcloneServer",
    "SabreServer",
    "ServerMissing",
    "ServerProcess",
    "TokenServer",
    "WsgiDAVServer",
]
