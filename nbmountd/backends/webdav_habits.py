"""What is known of the habits of WebDAV servers, and how one is recognised by its answers.

Pure. Each row was measured (Apache 2.4 mod_dav, nginx 1.22 with dav-ext, lighttpd 1.4.69, WsgiDAV 4.4, rclone 1.60,
Nextcloud 32). An unknown server is taken for the worst.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nbmountd.escapes import AS_THEY_ARE, NO_FIRST_DOT, Rules
from nbmountd.escapes import NEXTCLOUD as NEXTCLOUD_NAMES


@dataclass(frozen=True)
class Habits:
    """How a kind of server behaves where servers differ."""

    name: str
    conditions: bool = False
    """If-Match and If-None-Match: * are honoured on PUT and DELETE.

    No server tests and changes in one step: of two PUTs at the same moment on the same condition Apache carries out both.
    """
    turns: bool = False
    """Of two MKCOLs of one name one is refused, however close they come: so nbmountds can take turns (webdav_turns.py)."""
    tagged_if: bool = False
    """`If: <target> (["etag"])` is honoured on MOVE. WsgiDAV and sabre/dav 1.8 ignore it, lighttpd refuses any."""
    atomic_put: bool = False
    """A cut PUT leaves the old content."""
    move_if_match: bool = False
    """If-Match on MOVE is tested against the source, and only there."""
    strong_versions: bool = False
    """ETags tell apart any two contents of a file, however fast they follow each other."""
    honest_mkcol: bool = False
    """MKCOL of what exists is refused."""
    honest_move: bool = False
    """MOVE into a missing directory is refused."""
    names: Rules = AS_THEY_ARE
    """How names are written that the server refuses, changes, or does not list, as if others had removed the file."""
    control_names: bool = False
    """Names with control characters are taken. lighttpd refuses them, WsgiDAV moves what is beside; sabre/dav 1.8 takes a
    path with a line feed for an empty one, and a MOVE then removes the whole share."""
    not_in_destination: str = ""
    """Characters that the server takes for something else in Destination, so that a MOVE would hit another file."""
    dead_properties: bool | None = False
    """PROPPATCH stores what is not the server's own, PUT keeps it, MOVE takes it along. None: it depends on the server's
    configuration; removing a property that is not there tells, and leaves no trace (WsgiDAV; Apache makes a directory)."""
    move_keeps_version: bool = False
    """A file has the same ETag after a MOVE."""
    owncloud: bool = False
    """oc: properties, X-OC-Mtime, directories' ETags change with anything below; a cut PUT to a free name leaves nothing."""
    max_name_bytes: int = 255


APACHE = Habits(
    "Apache",
    conditions=True,
    turns=True,
    tagged_if=True,
    atomic_put=True,
    move_if_match=True,
    strong_versions=True,
    honest_mkcol=True,
    honest_move=True,
    control_names=True,
    dead_properties=True,
    move_keeps_version=True,
)
LIGHTTPD = replace(
    APACHE, name="lighttpd", turns=False, tagged_if=False, control_names=False, dead_properties=None, move_keeps_version=False
)
NGINX = Habits("nginx", atomic_put=True, honest_mkcol=True, names=NO_FIRST_DOT, control_names=True)
WSGIDAV = Habits(
    "WsgiDAV",
    conditions=True,
    honest_mkcol=True,
    honest_move=True,
    not_in_destination="?;",
    dead_properties=None,
    move_keeps_version=True,
)
RCLONE = Habits("rclone", strong_versions=True, honest_move=True)
NEXTCLOUD = Habits(
    "Nextcloud",
    conditions=True,
    tagged_if=True,
    move_if_match=True,
    honest_mkcol=True,
    honest_move=True,
    owncloud=True,
    max_name_bytes=250,
    names=NEXTCLOUD_NAMES,
)
SABRE = Habits("sabre/dav", conditions=True, move_if_match=True, honest_mkcol=True, honest_move=True)
UNKNOWN = Habits("unknown")


def recognise(headers: Mapping[str, str], path: str) -> Habits:
    """The habits of the server that answered OPTIONS on `path` with `headers`.

    The DAV header comes first: it passes through proxies, the Server header is the proxy's.
    """
    dav = headers.get("dav", "").lower()
    server = headers.get("server", "").lower()
    if "nextcloud" in dav or "/remote.php/" in path:
        return NEXTCLOUD
    if "apache.org/dav/propset/fs" in dav:
        return APACHE
    if "extended-mkcol" in dav:
        return SABRE
    for prefix, habits in (("wsgidav", WSGIDAV), ("rclone", RCLONE), ("lighttpd", LIGHTTPD)):
        if server.startswith(prefix):
            return habits
    if server.startswith("nginx") and set(dav.replace(" ", "").split(",")) <= {"1", "2", ""}:
        return NGINX
    return UNKNOWN
