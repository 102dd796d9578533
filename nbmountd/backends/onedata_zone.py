"""Onezone: which spaces a token reaches, which providers support them, and temporary tokens.

It knows nothing of files. Answers are checked: a provider's domain becomes an address that tokens are sent to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec

from nbmountd.backends.base import Body
from nbmountd.backends.credentials import anonymous
from nbmountd.backends.http import HTTPClient, HTTPStatistics
from nbmountd.backends.http_exchange import Answer, Incoming, Receive, Send
from nbmountd.backends.hygiene import NOT_JSON
from nbmountd.backends.onedata_errors import error_of_answer, refusal_reason
from nbmountd.backends.onedata_tokens import TokenRefused
from nbmountd.errors import ConfigError, RemoteProtocolError

T = TypeVar("T")

HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")
ANSWER_LIMIT = 64 * 1024 * 1024
"""Bytes of a JSON answer. 10,000 entries are 5 MB."""


class Support(msgspec.Struct, frozen=True):
    readonly: bool = False


class SpaceScope(msgspec.Struct, frozen=True):
    name: str
    supports: dict[str, Support] = {}


class ProviderScope(msgspec.Struct, frozen=True):
    domain: str
    name: str = ""
    version: str = ""
    online: bool = True


class Scope(msgspec.Struct, frozen=True):
    """What a token reaches."""

    spaces: dict[str, SpaceScope]
    providers: dict[str, ProviderScope]
    readonly: bool = False


class _Inferred(msgspec.Struct, frozen=True):
    scope: Scope | None = msgspec.field(default=None, name="dataAccessScope")


class _Token(msgspec.Struct, frozen=True):
    token: str


def origin_of(host: str, key: str) -> str:
    """"https://host[:port]" of a host or an address. Raises ConfigError that names `key`."""
    scheme, sep, rest = host.partition("://")
    if not sep:
        scheme, rest = "https", host
    rest = rest.rstrip("/")
    if scheme not in ("https", "http") or not HOST.fullmatch(rest):
        raise ConfigError(f"onedata: `{key}` must be a host, or https:// and a host")
    return f"{scheme}://{rest}"


NO_HEADERS: Mapping[str, str] = {}


class Ask(Protocol):
    """Sends one request from within a worker thread: its answer, and the whole body that `receive` did not take."""

    def __call__(
        self, method: str, path: str, headers: Mapping[str, str] = ..., body: Body | bytes | None = None,
        receive: Receive | None = None,
    ) -> tuple[Answer, bytes]: ...  # fmt: skip


class JSONClient:
    """Requests with a token in X-Auth-Token and JSON answers, on our HTTP layer."""

    def __init__(self, origin: str, *, connections: int, timeout: float, ca_bundle: str | None) -> None:
        self.origin = origin
        self._http = HTTPClient(
            origin, credential=anonymous(), connections=connections, timeout=timeout, ca_bundle=ca_bundle
        )

    async def send(
        self,
        method: str,
        path: str,
        token: str | None,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | bytes | None = None,
        receive: Receive | None = None,
    ) -> tuple[Answer, bytes]:
        """The answer and its whole body (that `receive` did not take). Raises TokenRefused for 401, RemoteError."""
        results: list[tuple[Answer, bytes]] = []

        def call(ask: Ask) -> Answer:
            results.append(ask(method, path, headers or {}, body, receive))
            return results[-1][0]

        await self.converse(f"{method} {path.partition('?')[0]}", token, call, body)
        return results[-1]

    async def converse(
        self, what: str, token: str | None, call: Callable[[Ask], Answer], body: Body | bytes | None = None
    ) -> None:
        """Runs `call` in a worker thread with the means to ask, several times if need be; it returns the last answer.

        What `call` raises comes out unchanged. Raises TokenRefused for 401, RemoteError.
        """

        def in_thread(send: Send) -> Answer:
            return call(partial(self._ask, send, token))

        await self._http.perform(what, in_thread, body)

    def _ask(
        self, send: Send, token: str | None, method: str, path: str, headers: Mapping[str, str] = NO_HEADERS,
        body: Body | bytes | None = None, receive: Receive | None = None,
    ) -> tuple[Answer, bytes]:  # fmt: skip
        content = bytearray()

        def take(incoming: Incoming) -> None:
            for piece in incoming.pieces():
                content.extend(piece)
                if len(content) > ANSWER_LIMIT:
                    raise RemoteProtocolError(f"{method}: an answer of more than {ANSWER_LIMIT} bytes")

        sent = dict(headers)
        if token is not None:
            sent["X-Auth-Token"] = token
        answer = send(method, self.origin + path, sent, body, receive or take)
        if answer.status == 401:
            raise TokenRefused(refusal_reason(answer.body))
        return answer, bytes(content)

    def statistics(self) -> HTTPStatistics:
        return self._http.statistics()

    async def aclose(self) -> None:
        await self._http.aclose()


class Zone:
    """One Onezone."""

    def __init__(self, client: JSONClient) -> None:
        self.client = client

    async def scope(self, token: str) -> Scope:
        """What `token` reaches. The request is public, and caveats of interface and service do not matter to it
        (Onezone since 21.02.4). Raises TokenRefused when it is not a valid token of a user.
        """
        answer, content = await self._post("/api/v3/onezone/tokens/infer_access_token_scope", None, {"token": token})
        if answer.status == 400:
            raise TokenRefused("is not valid")
        scope = _decoded(answer, content, _Inferred, "the scope of a token").scope
        if scope is None:
            raise TokenRefused("is no token of a user")
        for provider in scope.providers.values():
            if not HOST.fullmatch(provider.domain):
                raise RemoteProtocolError("Onezone names a provider at an address that is none")
        return scope

    async def mint(self, token: str, provider: str, until: float) -> str:
        """A temporary token for REST at `provider` ("" for no provider: it is for `scope` only)."""
        caveats: list[dict[str, Any]] = [
            {"type": "time", "validUntil": int(until)},
            {"type": "interface", "interface": "rest"},
        ]
        if provider:
            caveats.append({"type": "service", "whitelist": [f"opw-{provider}"]})
        asked = {"type": {"accessToken": {}}, "caveats": caveats}
        answer, content = await self._post("/api/v3/onezone/user/tokens/temporary", token, asked)
        made = _decoded(answer, content, _Token, "a temporary token").token
        if not made or not made.isascii() or not made.isprintable() or " " in made:
            raise RemoteProtocolError("Onezone gives a token that is none")
        return made

    async def _post(self, path: str, token: str | None, value: Any) -> tuple[Answer, bytes]:
        headers = {"Content-Type": "application/json"}
        return await self.client.send("POST", path, token, headers=headers, body=msgspec.json.encode(value))


def _decoded(answer: Answer, content: bytes, kind: type[T], what: str) -> T:
    if answer.status >= 300:
        raise error_of_answer(answer, f"POST {what}")
    try:
        return msgspec.json.decode(content, type=kind)
    except NOT_JSON:
        raise RemoteProtocolError(f"Onezone's answer for {what} makes no sense") from None
