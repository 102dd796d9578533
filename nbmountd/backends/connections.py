"""Connections of urllib3 that another thread can end at any moment: while connecting, shaking hands, sending, receiving.

It knows little of requests. Closing a response does not wake a thread that reads from its socket; `shutdown` on the
socket does, at once, in plain TCP and under TLS. So the thread of an exchange keeps a duplicate of the descriptor of
whatever socket it uses in a `Lever`, which the loop may pull. (The duplicate also spares us from racing with a close.)
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

Address = tuple[socket.AddressFamily, Any]
"""Family and socket address, resolved already: a thread waiting for a name server cannot be woken."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "PROPFIND", "SEARCH", "REPORT"})
"""Methods that change nothing: no answer leaves no doubt."""

IDLE = 4.0
"""Seconds. Apache and lighttpd end connections that were idle for 5 s; a request sent just then is lost or in doubt."""

_exchange = threading.local()


class Lever:
    """What one exchange and the loop share: `pull` ends the exchange's waiting on its socket, now or as soon as it starts."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self.addresses = addresses
        self.connected = False
        """A request may have reached the server."""
        self.kept = False
        """The last request went over a connection that had served before."""
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._pulled = False

    @contextmanager
    def in_hand(self) -> Iterator[None]:
        """For the worker thread: connections used inside are held by this lever."""
        _exchange.lever = self
        try:
            yield
        finally:
            _exchange.lever = None
            with self._lock:
                if self._socket is not None:
                    self._socket.close()
                self._socket = None

    def hold(self, sock: socket.socket) -> None:
        """Takes `sock` instead of the one held before. Raises ConnectionAbortedError if the lever was pulled already."""
        copy = socket.socket(fileno=os.dup(sock.fileno()))
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = copy
            if self._pulled:
                raise ConnectionAbortedError("cancelled")

    def pull(self) -> None:
        """For the loop: whatever the thread waits for on its socket ends with an error. May be called at any time."""
        with self._lock:
            self._pulled = True
            if self._socket is not None:
                with suppress(OSError):  # not connected (any more)
                    self._socket.shutdown(socket.SHUT_RDWR)


class _Held:
    """Mixed into urllib3's connections: their sockets are held by the lever of the thread that uses them."""

    answered = 0.0
    """When the head of the last answer came, by the monotonic clock."""

    def _new_conn(self: Any) -> socket.socket:
        lever: Lever = _exchange.lever
        error: OSError | None = None
        for family, address in lever.addresses:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                lever.hold(sock)
                for option in self.socket_options or ():
                    sock.setsockopt(*option)
                sock.settimeout(self.timeout)
                sock.connect(address)
            except OSError as exc:
                sock.close()
                error = exc
                continue
            return sock
        if isinstance(error, TimeoutError):
            raise ConnectTimeoutError(self, "no connection in time") from error
        raise NewConnectionError(self, str(error)) from error

    def request(self: Any, method: str, *args: Any, **kwargs: Any) -> None:
        lever: Lever = _exchange.lever
        if self.sock is not None and method not in SAFE_METHODS and time.monotonic() - self.answered > IDLE:
            self.close()
        lever.kept = self.sock is not None
        if self.sock is None:
            self.connect()
        else:
            lever.hold(self.sock)
        lever.connected = True
        super().request(method, *args, **kwargs)  # type: ignore[misc]

    def getresponse(self: Any) -> Any:
        response = super().getresponse()  # type: ignore[misc]
        self.answered = time.monotonic()
        return response


class _HeldHTTPConnection(_Held, HTTPConnection):
    pass


class _HeldHTTPSConnection(_Held, HTTPSConnection):
    pass


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _HeldHTTPConnection


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _HeldHTTPSConnection


def new_pool(**options: Any) -> urllib3.PoolManager:
    """A pool of held connections. Every request through it must run inside `Lever.in_hand`."""
    pool = urllib3.PoolManager(**options)
    pool.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}
    return pool
