"""The serving side of the control socket: who may speak, one line in, lines out, and nobody waits for anybody else.

It does not know what a request means: the handler does. One task a client; each ends with its client.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path

import msgspec
import trio

from nbmountd import places
from nbmountd.control.schema import MAX_LINE, AnyReply, AnyRequest, Done, Event, Events, Failed, Progress
from nbmountd.control.wire import decode_request, encode_line
from nbmountd.errors import NbmountdError, StateError
from nbmountd.log import get_logger, mask

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

log = get_logger(__name__)

Handler = Callable[[AnyRequest], AsyncIterator[AnyReply]]
"""Answers a request: any number of Progress and Event, then one other reply. An async generator function. It is closed
when its client goes away, wherever it waits then. NbmountdError becomes Failed with its text, anything else is a bug."""

_BACKLOG = 64
_RECEIVE_SIZE = 65536
_PEER_CREDENTIALS = struct.Struct("3i")  # struct ucred, unix(7)


def open_listener(path: Path, *, owner: tuple[int, int] | None = None) -> socket.socket:
    """A listening socket at `path` that only our user (and root) can reach; the caller closes it.

    Makes the directory (0700) when it is missing. Replaces a socket that nobody answers; raises StateError when somebody
    does, or when directory or path cannot be trusted. `owner` (uid, gid): root makes it for this user.
    """
    with places.locked_directory(path.parent, owner=owner) as directory:
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Linux gives the name the mode of the socket's own inode (net/unix/af_unix.c, unix_bind): 0600 from the
            # first moment, without touching the umask, which belongs to all threads.
            os.fchmod(listener.fileno(), 0o600)
            with places.socket_address(path) as address:
                listener.bind(address)
            if owner is not None:
                os.chown(path.name, *owner, dir_fd=directory, follow_symlinks=False)
            listener.listen(_BACKLOG)
        except OSError as exc:
            listener.close()
            raise StateError(f"{path}: the control socket cannot be made: {exc.strerror}") from exc
        except BaseException:
            listener.close()
            raise
    return listener


def _remove_stale(path: Path) -> None:
    """Runs under the lock of the directory, so that of two daemons starting at once one finds the other."""
    if not path.is_symlink() and not path.exists():
        return
    if path.is_symlink() or not path.is_socket():
        raise StateError(f"{path}: is in the way of the control socket and is not a socket; remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a living one with a full backlog answers EAGAIN instead of making us wait
        try:
            with places.socket_address(path) as address:
                probe.connect(address)
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as exc:
            raise StateError(f"{path}: somebody holds this control socket ({exc.strerror})") from exc
    raise StateError(f"{path}: another daemon is running here (nbmountctl status shows it)")


async def serve_requests(
    listener: trio.SocketListener | trio.socket.SocketType | socket.socket,
    handler: Handler,
    *,
    allowed_uids: Collection[int] | None = None,
) -> None:
    """Answers clients until cancelled; closes the listener then, and ends all handlers.

    `allowed_uids`: whose processes may speak; None means our own user and root. Nothing a client sends or does raises
    here, and no exception of a handler does.
    """
    if isinstance(listener, socket.socket):
        listener = trio.socket.from_stdlib_socket(listener)
    if not isinstance(listener, trio.SocketListener):
        listener = trio.SocketListener(listener)
    allowed = frozenset((0, os.geteuid()) if allowed_uids is None else allowed_uids)
    await trio.serve_listeners(partial(_serve_client, handler, allowed), [listener])


async def _serve_client(handler: Handler, allowed: frozenset[int], stream: trio.SocketStream) -> None:
    async with stream:
        uid = _peer_uid(stream)
        if uid not in allowed:
            log.warning("control connection refused: not our user", uid=uid)
            return
        lines = _Lines(stream)
        with suppress(_ClientGoneError):
            while await _answer_next(handler, stream, lines):
                pass


def _peer_uid(stream: trio.SocketStream) -> int:
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return int(_PEER_CREDENTIALS.unpack(credentials)[1])


async def _answer_next(handler: Handler, stream: trio.SocketStream, lines: _Lines) -> bool:
    """Reads one request and answers it; False when the connection should end."""
    try:
        line = await lines.next()
    except _TooLongError:
        await _send(stream, Failed(message=f"the request is longer than {MAX_LINE} bytes", code=2))
        return False
    if line is None:
        return False
    try:
        request = decode_request(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        await _send(stream, Failed(message=f"not a request: {exc}", code=2))
        return True
    again = False  # and stays so when the client goes away while the handler is at work
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_at_hangup, lines, nursery.cancel_scope)
        again = await _answer(handler, request, stream)
        nursery.cancel_scope.cancel()
    return again


async def _cancel_at_hangup(lines: _Lines, scope: trio.CancelScope) -> None:
    with suppress(_TooLongError):
        while await lines.fill():
            pass
    scope.cancel()


async def _answer(handler: Handler, request: AnyRequest, stream: trio.SocketStream) -> bool:
    """Sends what the handler yields; False when the connection should end: after a bug, or without a client."""
    verb = request.__struct_config__.tag
    try:
        replies = handler(request)
        async with aclosing(_Closable(replies)):
            async for reply in replies:
                await _send(stream, reply)
                if not isinstance(reply, (Progress, Event)):
                    return True
        if isinstance(request, Events):
            last: AnyReply = Done()
        else:
            log.error("control request was not answered to the end by its handler", verb=verb)
            last = Failed(message=f"{verb}: the daemon ended the answer early")
        await _send(stream, last)
        return True
    except _ClientGoneError:
        return False
    except Exception as exc:
        leaves = _leaves(exc)
        if again := all(isinstance(leaf, NbmountdError) for leaf in leaves):
            log.info("control request failed", verb=verb, cause=leaves[0])
            failure = Failed(message=mask(str(leaves[0])))
        else:
            log.exception("control request failed by a bug", verb=verb)
            failure = Failed(message=f"{verb}: {mask(_text_of(leaves[0]))} (a bug in nbmountd; its log has more)")
    except BaseExceptionGroup as group:  # out of nurseries of the handler's while it was being cancelled
        failed, cancelled = group.split(Exception)
        if failed is not None and not all(isinstance(leaf, NbmountdError) for leaf in _leaves(failed)):
            log.exception("control request failed by a bug", verb=verb)
        raise cancelled from None  # type: ignore[misc]  # not None: an ExceptionGroup would have been caught above
    with suppress(_ClientGoneError):
        await _send(stream, failure)
        return again
    return False


async def _send(stream: trio.SocketStream, reply: AnyReply) -> None:
    """Raises _ClientGoneError."""
    line = encode_line(reply)
    if len(line) > MAX_LINE:
        line = encode_line(Failed(message=f"the answer is longer than {MAX_LINE} bytes; ask for a part of it"))
    try:
        await stream.send_all(line)
    except trio.BrokenResourceError as exc:
        raise _ClientGoneError from exc


class _ClientGoneError(Exception):
    """There is nobody left to answer. (Not trio's own error: a handler may raise that for a connection of its own.)"""


class _Closable:
    """`aclose` for any async iterator: generators have one, hand-made iterators need none."""

    def __init__(self, replies: AsyncIterator[AnyReply]) -> None:
        self._aclose = getattr(replies, "aclose", None)

    async def aclose(self) -> None:
        if self._aclose is not None:
            await self._aclose()


def _leaves(exc: BaseException) -> list[BaseException]:
    """The plain exceptions in `exc`, which may be groups of groups."""
    if not isinstance(exc, BaseExceptionGroup):
        return [exc]
    return [leaf for inner in exc.exceptions for leaf in _leaves(inner)]


def _text_of(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__


class _TooLongError(Exception):
    """A line of more than MAX_LINE bytes."""


class _Lines:
    """Splits what arrives into lines. `fill` may be cancelled at any time without losing bytes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._searched = 0

    async def next(self) -> bytes | None:
        """The next line without its end, None at the end of the stream. Raises _TooLongError."""
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                self._searched = 0
                return line
            self._searched = len(self._buffer)
            if not await self.fill():
                return None

    async def fill(self) -> bool:
        """Waits for more bytes; False at the end of the stream. Raises _TooLongError."""
        if len(self._buffer) > MAX_LINE:
            raise _TooLongError
        try:
            received = await self._stream.receive_some(_RECEIVE_SIZE)
        except trio.BrokenResourceError:  # the client closed without reading all of our answer
            return False
        self._buffer += received
        return bool(received)
