"""Which token a provider is shown: a configured one, or a temporary one that Onezone makes of another token of the user.

It knows nothing of files. EGI's hub hands out a token for oneclient, which REST refuses, one for Onezone alone, and
files with EGI Check-in tokens that are rotated; with either of the last two Onezone makes a token for REST that is good
for one provider and some hours. A token that was refused is never shown again to the same provider.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from nbmountd.backends.credentials import EnvironmentSecret, FileSecret, Secret
from nbmountd.config import OnedataOptions
from nbmountd.errors import RemoteError, Unauthenticated
from nbmountd.log import register_secret

LIFETIME = 6 * 3600.0
"""Seconds that a temporary token is asked for. Onezone allows a week; less is lost with a shorter one."""
RENEW_BEFORE = 900.0
"""Seconds before its end that a token is replaced."""
TRY_AGAIN_EVERY = 300.0
"""Seconds after which refused sources are tried again, when Onezone could make another token of the same one."""

IDENTITY_PREFIX = "egi:"
"""Tells Onezone that what follows is a token of EGI Check-in (egi-notebooks-hub: onedata.py)."""


@dataclass(frozen=True)
class Source:
    """A place that a token comes from. `label` names it for a person."""

    label: str
    secret: Secret
    prefix: str = ""


def sources_for_rest(options: OnedataOptions) -> list[Source]:
    """Tokens to show to providers as they are."""
    return _sources(options.token_env, options.token_file)


def sources_for_onezone(options: OnedataOptions) -> list[Source]:
    """Tokens that Onezone may make others of, the better first."""
    found = _sources(options.onezone_token_env, options.onezone_token_file)
    if options.checkin_token_file is not None:
        found += _sources(None, options.checkin_token_file, IDENTITY_PREFIX)
    return found


def _sources(variable: str | None, file: str | None, prefix: str = "") -> list[Source]:
    found: list[Source] = []
    if variable is not None and os.environ.get(variable):
        found.append(Source(f"the environment variable {variable}", EnvironmentSecret(variable), prefix))
    if file is not None:
        found.append(Source(file, FileSecret(file), prefix))
    return found


class Chain:
    """The first token of several sources that has not been refused."""

    def __init__(self, sources: list[Source]) -> None:
        self._sources = sources
        self._refused: dict[str, str] = {}
        self.problems: list[str] = []
        """Why the last `get` found nothing, source by source."""

    async def get(self) -> str | None:
        """The token to show next, None if there is none."""
        self.problems = []
        for source in self._sources:
            try:
                token = source.prefix + await source.secret.get(again=False)
                if token in self._refused:
                    token = source.prefix + await source.secret.get(again=True)
            except Unauthenticated as exc:
                self.problems.append(str(exc))
                continue
            if token not in self._refused:
                register_secret(token)
                register_secret(token.removeprefix(source.prefix))
                return token
            self.problems.append(f"the token of {source.label} {self._refused[token]}")
        return None

    def refuse(self, token: str, reason: str) -> None:
        """Notes that `token` was answered with 401."""
        self._refused[token] = reason

    def fingerprint(self) -> object:
        return tuple(source.secret.fingerprint() for source in self._sources)


Mint = Callable[[str, str, float], Awaitable[str]]
"""(token for Onezone, provider id, valid until) -> a temporary token. Raises TokenRefused, RemoteError."""


class TokenRefused(RemoteError):
    """401, with the reason in words of ours."""


class Minting:
    """The part that all providers of a mount share: how to ask Onezone, and with which token."""

    def __init__(self, chain: Chain, mint: Mint | None) -> None:
        self.chain = chain
        self._mint = mint

    async def token_for(self, provider: str, until: float) -> str | None:
        """A new temporary token, None if Onezone cannot be asked or refuses all that could be shown."""
        if self._mint is None:
            return None
        while (token := await self.chain.get()) is not None:
            try:
                made = await self._mint(token, provider, until)
            except TokenRefused as exc:
                self.chain.refuse(token, str(exc))
                continue
            register_secret(made)
            return made
        return None


class Tokens:
    """The tokens for one provider."""

    def __init__(
        self,
        provider: str,
        sources: list[Source],
        minting: Minting,
        cure: str,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._provider = provider
        self._given = Chain(sources)
        self._minting = minting
        self._cure = cure
        self._wall_clock = wall_clock
        self._minted: str | None = None
        self._until = 0.0
        self._minting_now = trio.Lock()
        self._why = ""

    async def get(self) -> str:
        """The token to show now. Raises Unauthenticated with what would cure it, RemoteError if Onezone is away."""
        token = await self._given.get()
        if token is not None:
            return token
        async with self._minting_now:
            if self._minted is None or self._wall_clock() > self._until - RENEW_BEFORE:
                await self._renew()
            if self._minted is not None:
                return self._minted
        problems = [*self._given.problems, *self._minting.chain.problems]
        if self._why:
            problems.append(self._why)
        because = "; ".join(problems) or "no token is given"
        raise Unauthenticated(f"no token that Onedata accepts: {because}. To cure it: {self._cure}")

    async def _renew(self) -> None:
        until = self._wall_clock() + LIFETIME
        try:
            made = await self._minting.token_for(self._provider, until)
        except RemoteError:
            if self._minted is not None and self._wall_clock() < self._until:
                return  # Onezone is away; the old one is good for some minutes yet
            raise
        self._minted, self._until = made, until

    def refuse(self, token: str, reason: str) -> None:
        """Notes that the provider answered 401 to `token`."""
        if token == self._minted:
            self._minted = None
            self._why = f"the token that Onezone made {reason}"
        else:
            self._given.refuse(token, reason)


def cure_for(options: OnedataOptions) -> str:
    """What a person does to bring a usable token in."""
    onezone_variable = options.onezone_token_env or "ONEZONE_ACCESS_TOKEN"
    ways = []
    if options.onezone is not None:
        where = options.checkin_token_file
        ways.append(
            f"write an EGI Check-in access token to {where}" if where is not None
            else "name a file with an EGI Check-in access token in `checkin_token_file`"
        )  # fmt: skip
        ways.append(f"set {onezone_variable} to a token for Onezone's REST interface")
    rest = options.token_file
    ways.append(
        f"write an access token for REST to {rest}" if rest is not None
        else "name a file with an access token for REST in `token_file`"
    )  # fmt: skip
    return ", or ".join(ways)
