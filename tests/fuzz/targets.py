"""Everything that reads what strangers wrote, as functions of bytes: what each may raise, and what must hold of its result.

A target returns normally or raises one of its declared errors; anything else is a finding. What comes out of a remote's answer
has passed backends/hygiene.py, and must then be something that database and kernel can hold, inside its directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from nbmountd.backends.credentials import FileSecret
from nbmountd.backends.d4science_answers import exception_class, failure, refuses_the_token
from nbmountd.backends.d4science_items import entry_of as d4science_entry
from nbmountd.backends.d4science_items import parse_item, parse_list, shown_names, stored_attributes
from nbmountd.backends.d4science_token import expiry
from nbmountd.backends.http import HTTPClient
from nbmountd.backends.http_errors import error_of, retry_after
from nbmountd.backends.http_exchange import Answer
from nbmountd.backends.hygiene import NOT_JSON, fit_entries
from nbmountd.backends.multistatus import DAV, MultiStatusParser, Resource
from nbmountd.backends.nextcloud import NextcloudShare
from nbmountd.backends.onedata_answers import Made, Page, checked_id, parse_version, shown_xattrs
from nbmountd.backends.onedata_answers import entry_of as onedata_entry
from nbmountd.backends.onedata_errors import error_of_answer, refusal_reason
from nbmountd.backends.onedata_events import Listener
from nbmountd.backends.onedata_zone import Scope, origin_of
from nbmountd.backends.webdav_client import WebDAVClient
from nbmountd.backends.webdav_entries import Directory, entry_of, nextcloud_version, parse_date, parse_etag, tells, version_of
from nbmountd.backends.webdav_habits import recognise
from nbmountd.backends.webdav_overlay import PROPERTY, parse, seen
from nbmountd.configfile import load_config
from nbmountd.control import wire
from nbmountd.control.schema import AnyReply, AnyRequest
from nbmountd.errors import ConfigError, RemoteError, StateError, Unauthenticated
from nbmountd.model import Attributes, Entry, Kind, Version
from nbmountd.show import lines_of


@dataclass(frozen=True)
class Target:
    """`read` takes an input; `errors` are those it may raise. `share` of the inputs it is given, for slow ones are few."""

    name: str
    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    share: float = 1.0


def must_be_fit(entries: list[Entry]) -> None:
    """What the node table, SQLite (signed 64 bits, UTF-8) and the kernel (names) can hold."""
    for entry in fit_entries(entries, "fuzz"):
        name = os.fsencode(entry.name)
        assert name not in (b"", b".", b"..") and b"/" not in name and b"\0" not in name and len(name) <= 255, name
        assert entry.size is None or 0 <= entry.size < 2**62
        told = entry.attributes
        assert told.mtime_ns is None or -(2**63) <= told.mtime_ns < 2**63
        assert told.mode is None or 0 <= told.mode <= 0o7777
        assert told.target is None or 0 < len(os.fsencode(told.target)) < 4096
        for text in (entry.version or "", entry.id or "", *(told.xattrs or {})):
            text.encode("utf-8", "surrogateescape")


# --- WebDAV and Nextcloud ----------------------------------------------------------------------------------------------

WHEN = "Sun, 06 Nov 1994 08:49:37 GMT"


def response(href: str, extra: str = "", status: str = "HTTP/1.1 200 OK") -> str:
    return (
        f"<d:response><d:href>{href}</d:href><d:propstat><d:prop><d:resourcetype/><d:getcontentlength>12</d:getcontentlength>"
        f'<d:getlastmodified>{WHEN}</d:getlastmodified><d:getetag>"5f-1a"</d:getetag>{extra}</d:prop>'
        f"<d:status>{status}</d:status></d:propstat></d:response>"
    )


OVERLAY = '{"mode":420,"mtime_ns":1700000000123456789,"of":"e:5f-1a","target":"a/b","xattrs":{"user.colour":"cmVk"}}'
OC = (
    "<oc:fileid>00000042</oc:fileid><oc:permissions>RGDNVW</oc:permissions>"
    "<oc:checksums><oc:checksum>SHA1:0a1b MD5:2c3d</oc:checksum></oc:checksums>"
)
HEAD = (
    '<?xml version="1.0"?><d:multistatus xmlns:d="DAV:" xmlns:oc="http://owncloud.org/ns" '
    + f'xmlns:n="{PROPERTY.split()[0]}">'
)
MULTISTATUS = tuple(
    (HEAD + "".join(parts) + "</d:multistatus>").encode()
    for parts in (
        [response("/dav/dir/"), response("/dav/dir/a%20file"), response("/dav/dir/sub/", "<d:x><d:y>z</d:y></d:x>")],
        [response("http://host/dav/dir/f", OC), response("/dav/dir/g", f"<n:attributes>{OVERLAY}</n:attributes>")],
        [
            response("/dav/dir/x", status="HTTP/1.1 404 Not Found"),
            "<d:response><d:href>/dav/dir/y</d:href><d:status>HTTP/1.1 423 L</d:status></d:response>",
        ],
        [],
    )
)


def read_multistatus(data: bytes) -> None:
    parser = MultiStatusParser()
    cut = len(data) // 3
    for piece in (data[:cut], data[cut : 2 * cut], data[2 * cut :]):
        parser.feed(piece)
    directory = Directory("/dav/dir/")
    entries = []
    for resource in parser.close():
        name = directory.name(resource.href)
        if name:
            entry = entry_of(resource, name)
            entries.append(NextcloudShare._entry(cast(NextcloudShare, None), resource, name))
            entries += [entry, seen(entry, parse(resource.properties.get(PROPERTY)))]
    must_be_fit(entries)


def read_overlay(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    entry = entry_of(Resource("/dav/dir/f", None, {DAV + "getetag": '"5f-1a"'}, False), "f")
    must_be_fit([seen(entry, parse(text))])


HEADERS = tuple(
    json.dumps(headers).encode()
    for headers in (
        {
            "etag": '"5f-1a"',
            "last-modified": WHEN,
            "oc-checksum": "SHA1:0a",
            "retry-after": "7",
            "server": "Apache/2.4",
            "dav": "1,2",
        },
        {"etag": 'W/"5f"', "retry-after": WHEN, "server": "nginx", "dav": "1", "oc-etag": '"1"', "allow": "GET, PUT"},
        {"etag": '"abc--gzip"', "last-modified": "0", "x-powered-by": "PHP", "location": "http://host:8/dav/dir/?x"},
    )
)
VERSIONS = (
    Version("e:5f-1a"),
    Version("w:5f;12;784111777"),
    Version("t:12;784111777"),
    nextcloud_version("5f", 12, 784111777, "SHA1:0a"),
)


ORIGIN = SimpleNamespace(origin="http://host")


def _as_header(value: str) -> str:
    """As http.client gives it: bytes as Latin-1."""
    return value.encode("utf-8", "replace").decode("latin-1")


def read_headers(data: bytes) -> None:
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(told, dict):
        return
    headers = {str(name): _as_header(value) for name, value in told.items() if isinstance(value, str)}
    for version in VERSIONS:
        tells(version, headers, 12)
    version_of(headers.get("etag"), 12, parse_date(headers.get("last-modified")))
    parse_etag(headers.get("oc-etag"))
    wait = retry_after(headers)
    assert wait is None or 0 <= wait <= 86400
    recognise(headers, "/dav/")
    WebDAVClient(cast(HTTPClient, ORIGIN))._adds_slash(Answer(301, headers), "/dav/dir")
    for status in (301, 401, 404, 429, 503, 507, 599):
        error_of(Answer(status, headers, data), "PUT /x")


# --- Onedata -----------------------------------------------------------------------------------------------------------

FILE = {
    "fileId": "abc_DEF-123",
    "name": "file.nc",
    "type": "REG",
    "size": 12,
    "mtime": 1700000000,
    "ctime": 1700000001,
    "posixPermissions": "0664",
    "hardlinkCount": 1,
    "hasCustomMetadata": False,
}
OLD = {"file_id": "abc", "name": "old", "type": "DIR", "size": 0, "mtime": 1, "ctime": 1, "mode": "0775", "hardlinks_count": 1}
LINK = {**FILE, "type": "SYMLNK", "symlinkValue": "<__onedata_space_id:s1>/a/b", "name": "link"}
ONEDATA = tuple(
    json.dumps(value).encode()
    for value in (
        {"children": [FILE, OLD, LINK], "isLast": False, "nextPageToken": "t"},
        {"fileId": "abc"},
        {
            "dataAccessScope": {
                "spaces": {"s1": {"name": "Space", "supports": {"p1": {"readonly": False}}}},
                "providers": {"p1": {"domain": "provider.example", "version": "21.02.8", "online": True}},
            }
        },
        {"error": {"id": "posix", "details": {"errno": "eacces"}}},
        {
            "error": {
                "id": "unauthorized",
                "details": {"authError": {"id": "tokenCaveatUnverified", "details": {"caveat": {"type": "time"}}}},
            }
        },
        {"user.colour": "red", "onedata_json": {"a": [1, 2]}, "binary": {"nbmountd.base64": "AAEC"}},
    )
)


class _Inferred(msgspec.Struct):
    scope: Scope = msgspec.field(name="dataAccessScope")


def read_onedata(data: bytes) -> None:
    answer = Answer(400, {"retry-after": "5"}, data)
    error_of_answer(answer, "PUT x")
    refusal_reason(data)
    for kind in (Page, Made, _Inferred, dict[str, Any]):
        try:
            told: Any = msgspec.json.decode(data, type=kind)
        except NOT_JSON:
            continue
        if isinstance(told, Page):
            must_be_fit(list(_onedata_entries(told)))
        elif isinstance(told, Made):
            _declared(checked_id, told.id)
        elif isinstance(told, _Inferred):
            for provider in told.scope.providers.values():
                _declared(origin_of, provider.domain, "domain")
                parse_version(provider.version)
        else:
            entry = Entry("f", Kind.FILE, 1, Version("v"), "i", Attributes(xattrs=shown_xattrs(told)))
            must_be_fit([entry])


def _onedata_entries(page: Page) -> Iterator[Entry]:
    for told in page.children:
        name = told.name
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            continue  # as onedata.py does
        entry = _declared(onedata_entry, told, name, depth=2, space="s1", writable=True)
        if isinstance(entry, Entry):
            yield entry


def _declared(call: Callable[..., object], *args: object, **kwargs: object) -> object:
    try:
        return call(*args, **kwargs)
    except (RemoteError, ConfigError):
        return None


EVENTS = (
    b'id: 12\nevent: changedOrCreated\ndata: {"fileId":"a","parentFileId":"b"}\n\n'
    b'id: 13\r\nevent: deleted\r\ndata: {"parentFileId":\r\ndata: "c"}\r\n\r\n: heartbeat\n\n',
)


def read_events(data: bytes) -> None:
    listener = Listener(None)
    for start in range(0, len(data), 50 if len(data) < 5000 else 5000):
        listener.feed(data[start : start + (50 if len(data) < 5000 else 5000)])
    assert listener.last is None or (listener.last.isascii() and len(listener.last) < 20)


# --- D4Science ---------------------------------------------------------------------------------------------------------

ITEM = {
    "@class": "org.gcube.common.storagehub.model.items.GenericFileItem",
    "id": "i-1",
    "name": "a file.csv",
    "title": "a file.csv",
    "primaryType": "nthl:externalFile",
    "parentId": "p-1",
    "owner": "ada",
    "lastModificationTime": 1700000000123,
    "shared": False,
    "content": {"size": 12, "storageId": "s-1", "mimeType": "text/csv"},
    "metadata": {"map": {"nbmountd-mtime-ns": "1700000000123456789", "nbmountd-mode": "664", "nbmountd-content": "s-1"}},
}
FOLDER = {"@class": "FolderItem", "id": "f-1", "name": "folder", "primaryType": "nthl:workspaceItem", "lastModificationTime": 1}
SHARE = {**FOLDER, "id": "v-1", "primaryType": "nthl:workspaceVreItem", "displayName": "My VRE", "vreFolder": True}
D4SCIENCE = tuple(
    json.dumps(value).encode()
    for value in (
        {"itemlist": [ITEM, FOLDER, SHARE, {**ITEM, "id": "i-2"}]},
        {"item": ITEM},
        {"item": {**ITEM, "content": {"size": 1e300}}},
        {"cause": "x", "exceptionClass": "org.gcube.common.storagehub.model.exceptions.IdNotFoundException"},
    )
)
D4SCIENCE += (b"org.gcube.common.ItemLockedException@5d6f: message", b"<html><body>Invalid token</body></html>")


def read_d4science(data: bytes) -> None:
    for status in (400, 401, 406, 500):
        answer = Answer(status, {"etag": "GXErrorResponse"} if status == 406 else {}, data)
        refuses_the_token(answer)
        failure(answer, "PUT x")
    assert len(exception_class(Answer(500, {}, data))) <= 80
    items = []
    try:
        items = [parse_item(data, "GET x")]
    except RemoteError:
        items, _ = parse_list(data, "GET x")
    entries = []
    for name, item in shown_names(items).items():
        entries.append(d4science_entry(item, name))
        stored_attributes(item, Attributes(mode=0o644, mtime_ns=5))
    must_be_fit(entries)


# --- tokens, configuration, control socket -----------------------------------------------------------------------------

JWT = (
    b"eyJhbGciOiJSUzI1NiJ9.eyJleHAiOjE3MDAwMDAwMDAsInN1YiI6ImFkYSJ9.c2lnbmF0dXJl",
    b"eyJhbGciOiJub25lIn0.eyJleHAiOjFlOTk5fQ.x",
    b"opaque-token-without-dots",
    b"a.bnVsbA.c",
)


def read_jwt(data: bytes) -> None:
    at = expiry(data.decode("utf-8", "replace"))
    assert at is None or 0 < at < 2**40


class TokenFile:
    """One file that is rewritten for each input."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "token"

    def __call__(self, data: bytes) -> None:
        self._path.write_bytes(data)
        secret = FileSecret(self._path)
        coroutine = secret.get(again=True)
        try:
            coroutine.send(None)
        except StopIteration as done:
            assert done.value and done.value.isprintable() and len(done.value) <= 64 * 1024
        else:
            raise AssertionError("reading a file waits for nobody")


CONFIG = (
    b"""[daemon]
state_dir = "/s"
cache_dir = "/c"
cache_size = "10G"
drain_timeout = "30s"
metrics_listen = "127.0.0.1:9180"

[[mount]]
name = "b2drop"
path = "~/b2drop"
backend = "webdav"
url = "https://b2drop.eudat.eu/remote.php/webdav/"
user = "ada"
password_file = "/run/secret"
exclude = ["*.tmp", ".~*"]
freshness = "1h 30min"
""",
    b"""mount = [{name = "d", path = "${HOME}/d", backend = "directory", source = "/mnt"}]\n""",
    b"""[[mount]]
name = "datahub"
path = "~/datahub"
backend = "onedata"
onezone = "datahub.egi.eu"
token_env = "T"
read_only = true
[[mount]]
name = "workspace"
path = "/w"
backend = "d4science"
token_command = ["cat", "/t"]
""",
)


class ConfigFile:
    """One file that is rewritten for each input."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "config.toml"

    def __call__(self, data: bytes) -> None:
        self._path.write_bytes(data)
        config = load_config(self._path, environ={"HOME": "/home/ada"})
        for mount in config.mounts:
            assert (
                mount.path.startswith("/")
                and "\0" not in mount.path
                and "/" not in mount.name
                and not mount.name.startswith(".")
            )


REQUESTS = (
    b'{"verb":"status"}',
    b'{"verb":"sync","paths":["/a","/b"],"timeout":5.5,"mount":"m"}',
    b'{"verb":"explain","path":"/x\\u0000ffy"}',
    b'{"verb":"parked","action":"export","path":"/p","directory":"/d"}',
    b'{"verb":"stop","timeout":0,"handover":true}',
    b'{"verb":"conflicts","path":"/x","keep":"both"}',
    b'{"verb":"cache","evict":true,"path":null}',
    b'{"verb":"events"}',
)
REPLIES = (
    b'{"type":"done","message":"m"}',
    b'{"type":"failed","message":"x","code":4}',
    b'{"type":"queue","items":[],"total":0}',
    b'{"type":"event","at":1.5,"mount":"m","event":"e","path":"\\u0000ff","details":{"a":[1]}}',
    b'{"type":"status","version":"1","pid":1,"safe":true,"mounts":[{"name":"m","path":"/m","backend":"b","state":"live"}]}',
)
NOT_A_LINE = (msgspec.MsgspecError, ValueError, RecursionError)
"""What the server and the clients of the socket catch."""


def read_request(data: bytes) -> None:
    must_be_sendable(wire.decode_request(data))


def must_be_sendable(message: AnyRequest | AnyReply) -> None:
    try:
        wire.encode_line(message)
    except ValueError as error:  # which would be taken for a refusal
        raise AssertionError(f"cannot be sent on: {error!r}") from error


def read_reply(data: bytes) -> None:
    reply = wire.decode_reply(data)
    must_be_sendable(reply)
    for line in lines_of(reply):
        assert line.isprintable() or not line, ascii(line)


def targets(directory: Path) -> tuple[Target, ...]:
    """All of them; `directory` for files of theirs."""
    remote = (RemoteError,)
    return (
        Target("multistatus", MULTISTATUS, read_multistatus, remote),
        Target("overlay", (OVERLAY.encode(), b'{"xattrs":"no room"}'), read_overlay, remote),
        Target("headers", HEADERS, read_headers, remote),
        Target("onedata", ONEDATA, read_onedata, remote),
        Target("events", EVENTS, read_events, remote),
        Target("d4science", D4SCIENCE, read_d4science, remote),
        Target("jwt", JWT, read_jwt, ()),
        Target("request", REQUESTS, read_request, NOT_A_LINE),
        Target("reply", REPLIES, read_reply, NOT_A_LINE),
        Target("token file", (b"token-1\n", b"  a.b.c \n", b""), TokenFile(directory), (Unauthenticated,), 0.3),
        Target("config", CONFIG, ConfigFile(directory), (ConfigError, StateError), 0.1),
    )
