"""The spaces that a mount shows, and for each the provider that is asked: found at Onezone or at one provider.

It knows nothing of files. A space stays with its provider (what was just written is only there for sure); the others
that support it are kept in order, for reads of bytes whose version can be checked.

Touched by several tasks: the tables here, replaced as a whole by `refresh`, which runs under a lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import trio

from nbmountd.backends.http import HTTPStatistics
from nbmountd.backends.hygiene import NOT_JSON
from nbmountd.backends.onedata_answers import parse_version
from nbmountd.backends.onedata_client import API, OnedataClient
from nbmountd.backends.onedata_tokens import (
    LIFETIME,
    TRY_AGAIN_EVERY,
    Chain,
    Minting,
    Source,
    TokenRefused,
    Tokens,
    cure_for,
    sources_for_onezone,
    sources_for_rest,
)
from nbmountd.backends.onedata_zone import JSONClient, ProviderScope, Scope, SpaceScope, Support, Zone, origin_of
from nbmountd.config import OnedataOptions
from nbmountd.errors import ConfigError, RemoteLocked, RemoteNotFound, RemoteProtocolError, RemoteUnavailable, Unauthenticated

log = logging.getLogger(__name__)

OLDEST = (21, 2, 1)
"""Providers before that list no attributes with names."""


OTHERS_ANSWERED = 60.0
"""Seconds within which another provider must have answered for the trouble to be that of one."""


class SpaceAway(RemoteLocked):
    """The provider of one space of several does not answer. Not RemoteUnavailable, which would count against all."""


@dataclass
class Space:
    """One space. `shown` is its name as a directory; `clients` the providers to ask, the one it stays with first."""

    id: str
    name: str
    shown: str
    writable: bool
    clients: list[OnedataClient]
    root: str | None = None
    """File id of its root, once known."""
    paths: dict[tuple[str, ...], str] = field(default_factory=dict)

    @property
    def client(self) -> OnedataClient:
        if not self.clients:
            raise SpaceAway(f"no provider of the space {self.shown!r} is online")
        return self.clients[0]


class _Configuration(msgspec.Struct, frozen=True):
    """What any provider tells anybody of itself."""

    id: str = msgspec.field(name="providerId")
    name: str = ""
    version: str = ""


class Spaces:
    """The spaces of one mount. Raises ConfigError for options that cannot work."""

    def __init__(self, options: OnedataOptions) -> None:
        if options.onezone is None and options.oneprovider is None:
            raise ConfigError("onedata: give `onezone` or `oneprovider`")
        if options.folder is not None and options.space is None:
            raise ConfigError("onedata: `folder` needs `space`")
        self._options = options
        self._preferred = None if options.oneprovider is None else origin_of(options.oneprovider, "oneprovider")
        self._zone = None
        if options.onezone is not None:
            self._zone = Zone(self._json_client(origin_of(options.onezone, "onezone")))
        self._for_rest = sources_for_rest(options)
        self._for_onezone: list[Source] = sources_for_onezone(options)
        chain = Chain(self._for_onezone)
        self._minting = Minting(chain, None if self._zone is None else self._zone.mint)
        self._scope_tokens = Chain(self._for_rest)
        self._scope_token: tuple[str, float] = ("", 0.0)
        self._clients: dict[str, OnedataClient] = {}
        self._pinned: dict[str, str] = {}
        self._by_name: dict[str, Space] = {}
        self._refreshing = trio.Lock()

    @property
    def clients(self) -> Iterable[OnedataClient]:
        return self._clients.values()

    def fingerprint(self) -> object:
        """Equal as long as there is no other token to try."""
        files = tuple(source.secret.fingerprint() for source in (*self._for_rest, *self._for_onezone))
        return files, int(time.time() // TRY_AGAIN_EVERY) if self._for_onezone else 0

    @contextmanager
    def one_of_several(self, space: Space) -> Iterator[None]:
        """Around requests for one space: that its provider is away must not make the whole mount offline."""
        try:
            yield
        except RemoteUnavailable as exc:
            since = trio.current_time() - OTHERS_ANSWERED
            others = [client for client in self._clients.values() if client not in space.clients[:1]]
            if self._options.space is not None or all(client.answered_at < since for client in others):
                raise
            raise SpaceAway(str(exc), retry_after=exc.retry_after, in_doubt=exc.in_doubt) from exc

    def all(self) -> list[Space]:
        return list(self._by_name.values())

    async def named(self, shown: str) -> Space:
        """The space shown as `shown`. Asks once more before it raises RemoteNotFound."""
        if shown not in self._by_name:
            await self.refresh()
        try:
            return self._by_name[shown]
        except KeyError:
            raise RemoteNotFound(f"there is no space {shown!r}") from None

    async def only(self) -> Space:
        """The space that the configuration names."""
        wanted = self._options.space or ""
        if not self._by_name:
            await self.refresh()
        for space in self.all():
            if wanted in (space.id, space.name, space.shown, f"{space.name}@{space.id}"):
                return space
        raise RemoteNotFound(f"the token reaches no space {wanted!r}")

    async def refresh(self) -> None:
        """Asks which spaces there are. Raises Unauthenticated, RemoteError; then the old ones stay."""
        async with self._refreshing:
            try:
                scope = await self._scope_at_zone() if self._zone is not None else await self._scope_at_provider()
            except (RemoteUnavailable, RemoteProtocolError) as exc:
                if self._zone is None or self._preferred is None:
                    raise
                log.info("Onezone cannot be asked, so the provider is: %s", exc)
                scope = await self._scope_at_provider()
            self._take(scope)

    # --- asking ---

    async def _scope_at_zone(self) -> Scope:
        assert self._zone is not None
        problems: list[str] = []
        for chain in (self._scope_tokens, Chain([one for one in self._for_onezone if not one.prefix])):
            while (token := await chain.get()) is not None:
                try:
                    return await self._zone.scope(token)
                except TokenRefused as exc:
                    chain.refuse(token, str(exc))
            problems += chain.problems
        token, until = self._scope_token
        if not token or time.time() > until:
            until = time.time() + LIFETIME
            token = await self._minting.token_for("", until) or ""
            self._scope_token = (token, until - LIFETIME / 10)
        if token:
            try:
                return await self._zone.scope(token)
            except TokenRefused as exc:
                self._scope_token = ("", 0.0)
                problems.append(f"the token that Onezone made {exc}")
        because = "; ".join([*problems, *self._minting.chain.problems]) or "no token is given"
        raise Unauthenticated(f"no token that Onezone accepts: {because}. To cure it: {cure_for(self._options)}")

    async def _scope_at_provider(self) -> Scope:
        """The spaces that the configured provider supports."""
        assert self._preferred is not None
        client = self._json_client(self._preferred)
        answer, content = await client.send("GET", f"{API}/configuration", None)
        try:
            configuration = msgspec.json.decode(content, type=_Configuration)
        except NOT_JSON:
            raise RemoteProtocolError(f"{self._preferred} is no Oneprovider (status {answer.status})") from None
        finally:
            await client.aclose()
        domain = self._preferred.partition("://")[2]
        provider = ProviderScope(domain, configuration.name, configuration.version)
        told = await self._client(configuration.id, provider).spaces()
        spaces = {}
        for one in told:
            id, name = one.get("spaceId"), one.get("name")
            if isinstance(id, str) and isinstance(name, str) and configuration.id in _supporting(one):
                spaces[id] = SpaceScope(name, {configuration.id: Support()})
        return Scope(spaces, {configuration.id: provider})

    def _client(self, id: str, provider: ProviderScope) -> OnedataClient:
        client = self._clients.get(id)
        origin = origin_of(provider.domain, "domain")
        if self._preferred is not None and self._preferred.partition("://")[2] == provider.domain:
            origin = self._preferred
        if client is None or client.authority != provider.domain:
            tokens = Tokens(id, self._for_rest, self._minting, cure_for(self._options))
            client = self._clients[id] = OnedataClient(self._json_client(origin), tokens, provider.version)
        client.version = parse_version(provider.version)
        return client

    def _json_client(self, origin: str) -> JSONClient:
        options = self._options
        return JSONClient(
            origin, connections=options.connections, timeout=options.request_timeout, ca_bundle=options.ca_bundle
        )

    # --- taking ---

    def _take(self, scope: Scope) -> None:
        names = [space.name for space in scope.spaces.values()]
        old = {space.id: space for space in self._by_name.values()}
        found: dict[str, Space] = {}
        for id, told in sorted(scope.spaces.items()):
            shown = told.name
            if names.count(told.name) > 1 or not told.name or told.name in (".", "..") or set(told.name) & {"/", "\0"}:
                shown = f"{told.name.replace('/', '_').replace(chr(0), '_')}@{id}"
            order = self._order(id, told, scope)
            if order:
                self._pinned[id] = order[0]
            writable = not scope.readonly and bool(order) and not told.supports[order[0]].readonly
            clients = [self._client(provider, scope.providers[provider]) for provider in order]
            space = old.get(id) or Space(id, told.name, shown, writable, clients)
            space.name, space.shown, space.writable, space.clients = told.name, shown, writable, clients
            found[shown] = space
        self._by_name = found

    def _order(self, space: str, told: SpaceScope, scope: Scope) -> list[str]:
        """The providers of a space that can be asked, best first. The one it stays with is first even when offline."""

        def rank(id: str) -> tuple[Any, ...]:
            provider = scope.providers[id]
            preferred = self._preferred is not None and self._preferred.partition("://")[2] == provider.domain
            newest = tuple(-number for number in parse_version(provider.version))
            return id != self._pinned.get(space), not preferred, told.supports[id].readonly, newest, id

        able = [
            id
            for id in told.supports
            if id in scope.providers
            and parse_version(scope.providers[id].version) >= OLDEST
            and (scope.providers[id].online or id == self._pinned.get(space))
        ]
        return sorted(able, key=rank)

    def statistics(self) -> HTTPStatistics:
        counts = [client.statistics() for client in self._clients.values()]
        if self._zone is not None:
            counts.append(self._zone.client.statistics())
        return HTTPStatistics(
            sum(one.requests for one in counts),
            sum(one.bytes_sent for one in counts),
            sum(one.bytes_received for one in counts),
        )

    async def aclose(self) -> None:
        for client in self._clients.values():
            await client.aclose()
        if self._zone is not None:
            await self._zone.client.aclose()


def _supporting(space: dict[str, Any]) -> set[str]:
    providers = space.get("providers")
    if not isinstance(providers, list):
        return set()
    return {str(one.get("providerId")) for one in providers if isinstance(one, dict)}
