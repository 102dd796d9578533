"""The token of a D4Science workspace: where it comes from, when it ends, and when to warn of that.

It knows nothing of requests. A token is mostly a JWT: its `exp` is read, nothing is verified (the server does). Tokens
appear in no message.
"""

from __future__ import annotations

import base64
import binascii
import os
import time
from collections.abc import Callable

import msgspec

from nbmountd.backends.credentials import CommandSecret, Credential, EnvironmentSecret, FileSecret, Secret
from nbmountd.config import D4ScienceOptions
from nbmountd.errors import ConfigError, Unauthenticated
from nbmountd.log import get_logger

VARIABLES = ("D4SCIENCE_TOKEN", "GCUBE_TOKEN")
"""What EGI's hub sets in a notebook, newer name first. Nothing renews them there."""

WARN_BEFORE = 15 * 60.0
"""Seconds."""

LEEWAY = 60.0
"""Seconds by which our clock may be ahead before a token that works is taken for expired."""

_log = get_logger(__name__)


def expiry(token: str) -> float | None:
    """When a JWT ends, in seconds since 1970; None for another kind of token, or one that does not say."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = msgspec.json.decode(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError, RecursionError):  # msgspec.DecodeError is a ValueError
        return None
    at = claims.get("exp") if isinstance(claims, dict) else None
    return float(at) if isinstance(at, (int, float)) and 0 < at < 2**40 else None


class ExpiringSecret:
    """A secret that is not given out when it has expired for certain: the source is asked again instead."""

    def __init__(self, source: Secret, wall_clock: Callable[[], float] = time.time) -> None:
        self._source = source
        self._wall_clock = wall_clock
        self._warned_of: float | None = None
        self.expires_at: float | None = None
        """Of the token given out last; None: unknown."""

    @property
    def cure(self) -> str:
        return self._source.cure

    @property
    def warning(self) -> str:
        """A sentence for a person from 15 minutes before the end on; "" before, and when the end is unknown."""
        if self.expires_at is None:
            return ""
        left = self.expires_at - self._wall_clock()
        if left > WARN_BEFORE:
            return ""
        when = f"expires in {max(1, round(left / 60))} min" if left > 0 else "has expired"
        return f"the D4Science token {when}; {self.cure}"

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at + LEEWAY < self._wall_clock()

    def fingerprint(self) -> object:
        return self._source.fingerprint()

    async def get(self, *, again: bool) -> str:
        token = await self._source.get(again=again)
        self._note(token)
        if self.expired and not again:
            token = await self._source.get(again=True)
            self._note(token)
        if self.expired:
            raise Unauthenticated(f"the D4Science token has expired; {self.cure}")
        return token

    def _note(self, token: str) -> None:
        self.expires_at = expiry(token)
        if self.warning and self._warned_of != self.expires_at:
            self._warned_of = self.expires_at
            _log.warning(self.warning)


def secret_for(options: D4ScienceOptions) -> ExpiringSecret:
    """The token's source: a file, a command or a variable, in that order. Raises ConfigError when there are several."""
    given = [key for key in ("token_file", "token_command", "token_env") if getattr(options, key) is not None]
    if len(given) > 1:
        raise ConfigError(f"d4science: only one of {', '.join(given)} can be given")
    if options.token_file is not None:
        return ExpiringSecret(FileSecret(options.token_file))
    if options.token_command:
        return ExpiringSecret(CommandSecret(options.token_command))
    return ExpiringSecret(EnvironmentSecret(_variable(options)))


def credential_of(options: D4ScienceOptions, secret: ExpiringSecret) -> Credential:
    """A bearer token, or the old gCube token in a header of its own. Never in a URL."""
    if options.token_kind == "gcube":  # noqa: S105  a kind, not a token
        return Credential(secret, str, header_name="gcube-token")
    return Credential(secret, lambda token: f"Bearer {token}")


def _variable(options: D4ScienceOptions) -> str:
    return options.token_env or next((name for name in VARIABLES if os.environ.get(name)), VARIABLES[0])
