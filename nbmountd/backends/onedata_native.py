"""Onedata through the site's own Python library (`fs.onedatafs`), which lives in helper processes under its own interpreter.

It knows nothing of PyFilesystem (onedata_helper.py does) and sees no more than names, sizes and times in seconds. There
are no conditional requests: conditions are checked just before a change. A file is replaced by a new one that is written
beside it and moved over it, so a helper that dies leaves the old content.

The library keeps the interpreter to itself while it waits for the network, so a helper does one thing at a time and there
are several. One that does not answer in time is killed, and the next request gets a new one.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio

from nbmountd.backends import onedata_helper
from nbmountd.backends.base import Body, Change, Piece, Sink, Ticket
from nbmountd.backends.credentials import EnvironmentSecret, FileSecret, Secret
from nbmountd.backends.http import HTTPStatistics
from nbmountd.backends.onedata_helper import LARGEST_PART, Channel
from nbmountd.backends.onedata_paths import MAX_NAME_BYTES, TEMPORARY
from nbmountd.config import OnedataNativeOptions
from nbmountd.errors import (
    NameRefused,
    ParentMissing,
    RemoteDenied,
    RemoteError,
    RemoteExists,
    RemoteFull,
    RemoteNotFound,
    RemoteProtocolError,
    RemoteTimeout,
    RemoteUnavailable,
    RemoteUnsupported,
    Unauthenticated,
    VersionMismatch,
)
from nbmountd.log import mask, register_secret
from nbmountd.model import Attributes, Capabilities, Entry, Kind, Place, Quota, Version
from nbmountd.threads import run_interruptible

log = logging.getLogger(__name__)

T = TypeVar("T")

ANSWER_GRACE = 5.0
"""Seconds beyond `request_timeout` before a helper is killed from outside; it ends itself first."""
CLEANING_LIMIT = 5.0
"""Seconds for taking away what a failed or cancelled upload has left."""
ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH")
"""All that a helper sees of ours."""
METADATA_CACHE = 100_000
"""Entries that onedatafs keeps of its own; its default of five million is memory for each helper."""

_ERRORS: dict[str, type[RemoteError]] = {
    "not-found": RemoteNotFound, "exists": RemoteExists, "not-empty": RemoteExists, "kind": VersionMismatch,
    "denied": RemoteDenied, "full": RemoteFull, "name": NameRefused, "unsupported": RemoteUnsupported,
    "cut": RemoteProtocolError, "unauthenticated": Unauthenticated,
}  # fmt: skip


class OnedataNativeBackend:
    """A `Backend` over all spaces of a user, one space, or a folder in one."""

    def __init__(self, options: OnedataNativeOptions, *, read_only: bool = False) -> None:
        self._options = options
        self._read_only = read_only
        self._secret: Secret
        if options.token_env is not None:
            self._secret = EnvironmentSecret(options.token_env)
        else:
            self._secret = FileSecret(options.token_file or "")
        self._idle: list[_Helper] = []
        self._busy: set[_Helper] = set()
        self._limiter = trio.CapacityLimiter(options.connections)
        self._requests = self._received = self._sent = 0
        self._closed = False
        parts = [part for part in (options.folder or "").split("/") if part]
        # onedatafs shows the space as a directory even where it is the only one.
        self._root = [options.space, *parts] if options.space and options.library == "onedatafs" else parts

    def statistics(self) -> HTTPStatistics:
        """Requests to helpers and bytes so far."""
        return HTTPStatistics(self._requests, self._sent, self._received)

    def credential_fingerprint(self) -> object:
        """Equal as long as there is no other token to try."""
        return self._secret.fingerprint()

    async def connect(self) -> Capabilities:
        if (await self.stat(Place())).kind is not Kind.DIRECTORY:
            raise RemoteProtocolError(f"{'/'.join(self._root)} is not a directory")
        return Capabilities(
            conditional_writes=False,
            strong_versions=False,
            moves_directories=self._options.library == "onedatafs",
            partitions=self._options.space is None,
            connections=self._options.connections,
        )

    async def stat(self, place: Place) -> Entry:
        return await self._do(lambda helper: self._look(helper, place))

    async def list(self, place: Place) -> list[Entry]:
        def list_it(helper: _Helper) -> list[Entry]:
            told = helper.ask({"do": "list", "path": self._path(place)})
            entries = told.get("entries")
            if not isinstance(entries, list):
                raise RemoteProtocolError("a helper sent no listing")
            found = (_entry(one, top=self._is_top(place)) for one in entries)
            return [entry for entry in found if entry is not None and not entry.name.startswith(TEMPORARY)]

        return await self._do(list_it)

    async def read(self, place: Place, version: Version | None, start: int, stop: int, sink: Sink) -> None:
        def read_it(helper: _Helper) -> None:
            _check(place, before := self._look(helper, place), version)
            if before.size is None or stop > before.size:
                raise RemoteProtocolError(f"{place} ends at {before.size}, before {stop}")
            done = start
            for part in helper.stream({"do": "read", "path": self._path(place), "start": start, "stop": stop}):
                self._received += len(part)
                done += len(part)
                if done > stop:
                    raise RemoteProtocolError(f"{place}: more bytes than asked for")
                sink(part)
            if done != stop:
                raise RemoteProtocolError(f"{place}: {stop - done} bytes fewer than asked for")
            _check(place, self._look(helper, place), before.version)

        await self._do(read_it)

    async def upload(
        self, place: Place, body: Body, *, replaces: Version | None, attributes: Attributes, ticket: Ticket
    ) -> Entry:
        self._check_change(place)
        beside = Place((*place.path[:-1], TEMPORARY + secrets.token_hex(8)))
        if ticket.token is not None and ticket.token.startswith(TEMPORARY):
            await self._clear_away(Place((*place.path[:-1], ticket.token)))
        await ticket.remember(beside.name)

        def upload_it(helper: _Helper) -> Entry:
            self._check_target(helper, place, replaces)
            helper.send_file(self._path(beside), self._counted(body))
            if (written := self._look(helper, beside)).size != body.size:
                raise RemoteProtocolError(f"{place}: {written.size} bytes of {body.size} have arrived")
            self._check_target(helper, place, replaces)
            with _changing():
                helper.ask({"do": "rename", "path": self._path(beside), "target": self._path(place)})
                return self._look(helper, place)

        try:
            return await self._do(upload_it)
        except BaseException:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLEANING_LIMIT):
                await self._clear_away(beside)
            raise

    async def write_ranges(
        self, place: Place, pieces: Sequence[Piece], size: int, *, replaces: Version, attributes: Attributes
    ) -> Entry:
        await trio.lowlevel.checkpoint()
        raise RemoteUnsupported("ranges are not written through this library")

    async def make_directory(self, place: Place, attributes: Attributes) -> Entry:
        self._check_change(place)

        def make_it(helper: _Helper) -> Entry:
            self._check_target(helper, place, None)
            with _changing():
                helper.ask({"do": "make", "path": self._path(place)})
                return self._look(helper, place)

        return await self._do(make_it)

    async def make_symlink(self, place: Place, target: str, attributes: Attributes) -> Entry:
        await trio.lowlevel.checkpoint()
        raise RemoteUnsupported("this library knows no symlinks")

    async def move(
        self, source: Place, target: Place, *, kind: Kind, version: Version | None, replaces: Version | None
    ) -> Entry:
        self._check_change(source)
        self._check_change(target)
        if kind is Kind.DIRECTORY and self._options.library != "onedatafs":
            raise RemoteUnsupported("fs.onedatarestfs moves no directories")
        if target.path[: len(source.path)] == source.path:
            raise RemoteDenied(f"{source} cannot be moved to {target}, into itself")

        def move_it(helper: _Helper) -> Entry:
            _check(source, self._look(helper, source), version, kind)
            try:
                self._check_target(helper, target, replaces)
            except RemoteNotFound as exc:
                raise VersionMismatch(f"{target} is gone") from exc
            with _changing():
                helper.ask({"do": "rename", "path": self._path(source), "target": self._path(target)})
                return self._look(helper, target)

        return await self._do(move_it)

    async def remove(self, place: Place, *, kind: Kind, version: Version | None) -> None:
        self._check_change(place)

        def remove_it(helper: _Helper) -> None:
            try:
                _check(place, self._look(helper, place), version if kind is Kind.FILE else None, kind)
                with _changing():
                    verb = "remove-directory" if kind is Kind.DIRECTORY else "remove"
                    helper.ask({"do": verb, "path": self._path(place)})
            except RemoteNotFound:
                return

        await self._do(remove_it)

    async def set_attributes(self, place: Place, attributes: Attributes, *, kind: Kind) -> Entry:
        await trio.lowlevel.checkpoint()
        raise RemoteUnsupported("attributes are not kept through this library")

    async def quota(self) -> Quota:
        await trio.lowlevel.checkpoint()
        return Quota()

    def changes(self) -> AsyncIterator[Change]:
        raise RemoteUnsupported("this library tells of no changes")

    async def aclose(self) -> None:
        self._closed = True
        for helper in self._busy:
            helper.kill()
        idle, self._idle = self._idle, []
        with trio.CancelScope(shield=True):
            for helper in idle:
                await trio.to_thread.run_sync(helper.end)

    # --- helpers ---

    async def _do(self, call: Callable[[_Helper], T]) -> T:
        """What `call` returns, in a worker thread, with a helper that nobody else uses meanwhile."""
        token = await self._secret.get(again=False)
        register_secret(token)
        self._requests += 1
        async with self._limiter:
            if self._closed:
                raise RemoteUnavailable("the driver is closed")
            stale = [helper for helper in self._idle if not helper.is_good_for(token)]
            self._idle = [helper for helper in self._idle if helper not in stale]
            helper = self._idle.pop() if self._idle else _Helper(self._options, token)
            self._busy.add(helper)
            try:
                return await run_interruptible(partial(_run, helper, call, stale), helper.kill, trio.CapacityLimiter(1))
            finally:
                self._busy.remove(helper)
                if helper.usable:
                    self._idle.append(helper)

    async def _clear_away(self, leftover: Place) -> None:
        with suppress(RemoteError):
            await self._do(lambda helper: helper.ask({"do": "remove", "path": self._path(leftover)}))

    def _counted(self, body: Body) -> Iterator[bytes]:
        done = 0
        while part := body.read(LARGEST_PART):
            done += len(part)
            self._sent += len(part)
            yield part
        if done != body.size:
            raise RemoteProtocolError(f"the body gave {done} bytes of {body.size}")

    # --- places ---

    def _is_top(self, place: Place) -> bool:
        return self._options.space is None and not place.path

    def _path(self, place: Place) -> str:
        return "/" + "/".join([*self._root, *place.path])

    def _look(self, helper: _Helper, place: Place) -> Entry:
        told = helper.ask({"do": "stat", "path": self._path(place)}).get("entry")
        entry = _entry(told, top=self._options.space is None and len(place.path) == 1)
        if entry is None:
            raise RemoteNotFound(f"{place} is neither a file nor a directory")
        return replace(entry, name=place.name, writable=not self._is_top(place))

    def _check_change(self, place: Place) -> None:
        if self._read_only:
            raise RemoteDenied("the mount is read-only")
        if len(place.path) < (1 if self._options.space is not None else 2):
            raise RemoteDenied("spaces are made and removed at Onezone")
        name = place.name
        try:
            length = len(name.encode())
        except UnicodeEncodeError:
            raise NameRefused(f"not UTF-8: {name!r}") from None
        if length > MAX_NAME_BYTES or name in ("", ".", "..") or "/" in name or "\0" in name:
            raise NameRefused(f"no name: {name!r}")
        if name.startswith(TEMPORARY):
            raise NameRefused(f"names that begin with {TEMPORARY} are for uploads under way")
        if self._options.library == "onedatafs" and not name.isascii():
            raise NameRefused(f"fs.onedatafs cannot spell it: {name!r}")

    def _check_target(self, helper: _Helper, place: Place, replaces: Version | None) -> None:
        """`place` is free, or the file there has the version to be replaced. Raises what the contract says."""
        try:
            there = self._look(helper, place)
        except RemoteNotFound:
            if replaces is not None:
                raise
            parent = Place(place.path[:-1])
            try:
                kind = self._look(helper, parent).kind
            except RemoteNotFound as exc:
                raise ParentMissing(f"the directory of {place} is not there") from exc
            if kind is not Kind.DIRECTORY:
                raise ParentMissing(f"what should hold {place} is no directory") from None
            return
        if replaces is None:
            raise RemoteExists(f"{place} is there")
        _check(place, there, replaces)


class _Helper:
    """One helper process. All but `kill` and `end` is called in one thread at a time."""

    def __init__(self, options: OnedataNativeOptions, token: str) -> None:
        self._options = options
        self._token = token
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._channel: Channel | None = None
        self._killed = False
        self.usable = True
        """Whether it may be given another request: false after anything but an answer."""

    def is_good_for(self, token: str) -> bool:
        return self._token == token and self._process is not None and self._process.poll() is None

    def open(self) -> None:
        """Starts the process if there is none and has it log in. In a worker thread, because it takes its time."""
        if self._process is not None:
            return
        ours, theirs = socket.socketpair()
        ours.settimeout(self._options.request_timeout + ANSWER_GRACE)
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        command = [self._options.python, "-B", str(Path(onedata_helper.__file__))]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
                    cwd="/", start_new_session=True,
                )  # fmt: skip
        except OSError as exc:
            ours.close()
            raise RemoteUnavailable(f"{self._options.python} cannot be run: {exc.strerror}") from exc
        self._connection, self._channel = ours, Channel(ours)
        if self._killed:
            self.kill()
        wanted = {"library": self._options.library, "host": self._options.host, "token": self._token}
        try:
            self.ask({**wanted, "options": _options_of(self._options), "limit": self._options.request_timeout})
        except RemoteError:
            self.usable = False  # it said why and is ending
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The last frame of the answer."""
        header: dict[str, Any] = {}
        self._exchange(lambda channel: channel.send(request))
        while not header.get("done"):
            header, _ = self._next()
        return header

    def stream(self, request: dict[str, Any]) -> Iterator[memoryview]:
        """The contents of an answer's frames. One that is left early cannot be used again."""
        finished, self.usable = False, False
        self._exchange(lambda channel: channel.send(request))
        while not finished:
            header, content = self._next()
            finished = bool(header.get("done"))
            if len(content):
                yield content
        self.usable = True

    def send_file(self, path: str, parts: Iterator[bytes]) -> None:
        """Writes a new file; asks for a part when the helper has taken the one before."""
        self.usable = False
        self._exchange(lambda channel: channel.send({"do": "write", "path": path}))
        header, _ = self._next()
        while not header.get("done"):
            part = next(parts, None)
            frame = {"last": part is None}
            self._exchange(partial(Channel.send, header=frame, content=part or b""))
            header, _ = self._next()
        self.usable = True

    def _next(self) -> tuple[dict[str, Any], memoryview]:
        header, content = self._exchange(Channel.receive)
        if "failed" in header:
            self.usable = True
            text = mask(str(header.get("text", "")))[:500]
            error = _ERRORS.get(str(header["failed"]), RemoteUnavailable)
            raise error(f"{self._options.library}: {text}")
        return header, content

    def _exchange(self, call: Callable[[Channel], T]) -> T:
        assert self._channel is not None
        try:
            return call(self._channel)
        except TimeoutError as exc:
            self.usable = False
            self.kill()
            raise RemoteTimeout(f"{self._options.library} did not answer in time; its helper was killed") from exc
        except (OSError, EOFError) as exc:
            self.usable = False
            raise RemoteUnavailable(f"the helper of {self._options.library} has ended") from exc
        except ValueError as exc:
            self.usable = False
            raise RemoteProtocolError(f"the helper of {self._options.library} sent nonsense") from exc

    def kill(self) -> None:
        """Ends it at once: a call that waits for it fails. May be called from any thread."""
        self._killed = True
        self.usable = False
        if self._process is not None and self._process.returncode is None:  # else its number may be somebody else's by now
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Takes it away and waits for it; nobody may be using it."""
        self.kill()
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.wait()


def _run(helper: _Helper, call: Callable[[_Helper], T], stale: Sequence[_Helper]) -> T:
    """`call` with `helper`, in a worker thread: a process that the kernel does not let go holds up nobody else."""
    for one in stale:
        one.end()
    try:
        helper.open()
        return call(helper)
    finally:
        if not helper.usable:
            helper.end()


@contextmanager
def _changing() -> Iterator[None]:
    """What gets no answer in here may have been done."""
    try:
        yield
    except (RemoteUnavailable, RemoteProtocolError) as exc:
        exc.in_doubt = True
        raise


def _options_of(options: OnedataNativeOptions) -> dict[str, Any]:
    if options.library == "onedatarestfs":
        # It hands `verify_ssl` on to requests, where the path of a file means the certificates in it.
        verified = True if options.ca_bundle is None else options.ca_bundle
        return {"space": options.space, "timeout": options.request_timeout, "verify_ssl": verified}
    return {
        "space": [options.space] if options.space else [],
        "force_direct_io": options.io == "direct",
        "force_proxy_io": options.io == "proxy",
        "no_buffer": True,  # a write has arrived when it returns
        "provider_timeout": int(options.request_timeout),
        "metadata_cache_size": METADATA_CACHE,
    }


def _entry(told: object, *, top: bool) -> Entry | None:
    """What a helper says of an object; None for what cannot be shown. `top`: it is a space."""
    if not isinstance(told, dict):
        raise RemoteProtocolError("a helper sent no entry")
    name, size, modified = told.get("name"), told.get("size"), told.get("modified")
    kind = {"file": Kind.FILE, "directory": Kind.DIRECTORY}.get(str(told.get("kind")))
    if not isinstance(name, str) or "/" in name or "\0" in name or name in (".", ".."):
        return None
    if kind is None:
        log.info("%r is neither a file nor a directory: left out of listings", name)
        return None
    if kind is Kind.DIRECTORY:
        return Entry(name, kind, removable=not top, border=top)
    if not isinstance(size, int) or size < 0 or not isinstance(modified, (int, float)):
        raise RemoteProtocolError(f"a helper sent no size or time of {name!r}")
    attributes = Attributes(mtime_ns=int(modified * 1_000_000_000))
    return Entry(name, kind, size=size, version=Version(f"{modified!r}-{size}"), attributes=attributes)


def _check(place: Place, there: Entry, version: Version | None, kind: Kind = Kind.FILE) -> None:
    if there.kind is not kind:
        raise VersionMismatch(f"{place} is no {kind.name.lower()} any more")
    if version is not None and there.version != version:
        raise VersionMismatch(f"{place} has another version now")
