"""The asking side of the control socket, once for trio and once without it (the command line must start fast).

It does not know what the requests mean. A request goes out, replies come until one that is not Progress or Event.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator, Generator, Iterator
from pathlib import Path

import msgspec

from nbmountd.control.schema import MAX_LINE, AnyReply, AnyRequest, Event, Progress
from nbmountd.control.wire import decode_reply, encode_line
from nbmountd.errors import NbmountdError
from nbmountd.places import socket_address

_RECEIVE_SIZE = 65536


class ControlError(NbmountdError):
    """The daemon could not be asked, or its answer makes no sense."""


class DaemonNotRunning(ControlError):
    """Nobody listens on the socket, or the daemon ended before it had answered."""


async def ask(path: Path, request: AnyRequest) -> AsyncGenerator[AnyReply, None]:
    """The replies to `request`, as they come; Failed is one of them. Raises DaemonNotRunning, ControlError.

    An async generator: close it (`contextlib.aclosing`) when leaving early, which ends the request at the daemon too.
    """
    import trio

    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        lines = _Lines()
        try:
            with socket_address(path) as address:
                await connection.connect(address)
            stream = trio.SocketStream(connection)
            await stream.send_all(encode_line(request))
            while True:
                for reply in lines.take():
                    yield reply
                    if _is_last(reply):
                        return
                lines.give(await stream.receive_some(_RECEIVE_SIZE))
        except trio.BrokenResourceError as exc:
            raise _gone(path) from exc
        except OSError as exc:
            raise _unreachable(path, exc) from exc


def ask_sync(path: Path, request: AnyRequest, *, timeout: float | None = None) -> Generator[AnyReply, None, None]:
    """`ask` without trio. `timeout`: longest wait for the next reply in seconds, then ControlError; None: for ever."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        lines = _Lines()
        try:
            with socket_address(path) as address:
                connection.connect(address)
            # MSG_NOSIGNAL: a daemon that hangs up is an error to report, not a SIGPIPE.
            connection.sendall(encode_line(request), socket.MSG_NOSIGNAL)
            while True:
                for reply in lines.take():
                    yield reply
                    if _is_last(reply):
                        return
                lines.give(connection.recv(_RECEIVE_SIZE))
        except TimeoutError as exc:
            raise ControlError(f"the daemon at {path} did not answer within {timeout:g} seconds") from exc
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise _gone(path) from exc
        except OSError as exc:
            raise _unreachable(path, exc) from exc


def _is_last(reply: AnyReply) -> bool:
    return not isinstance(reply, (Progress, Event))


def _gone(path: Path) -> DaemonNotRunning:
    return DaemonNotRunning(f"the daemon at {path} ended the connection before it had answered")


def _unreachable(path: Path, exc: OSError) -> ControlError:
    if isinstance(exc, (FileNotFoundError, ConnectionRefusedError, NotADirectoryError)):
        return DaemonNotRunning(f"the daemon is not running (nobody answers at {path})")
    if isinstance(exc, PermissionError):
        return ControlError(f"{path}: not allowed: this daemon belongs to another user")
    return ControlError(f"{path}: the daemon cannot be asked: {exc}")


class _Lines:
    """Splits what arrives into replies."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0

    def give(self, received: bytes) -> None:
        """Takes what a receive returned. Raises DaemonNotRunning at the end of the stream."""
        if not received:
            raise DaemonNotRunning("the daemon ended the connection before it had answered")
        self._buffer += received

    def take(self) -> Iterator[AnyReply]:
        """The whole replies there are so far. Raises ControlError when a line is none."""
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end < 0:
                self._searched = len(self._buffer)
                if self._searched > MAX_LINE:
                    raise ControlError(f"the daemon's answer is longer than {MAX_LINE} bytes")
                return
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._searched = 0
            try:
                reply = decode_reply(line)
            except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
                raise ControlError(f"the daemon's answer makes no sense (another version?): {exc}") from exc
            yield reply
