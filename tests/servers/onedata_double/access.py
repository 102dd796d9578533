"""Who may do what: tokens and their caveats first, then membership, support, and the bits of a file's mode."""

from __future__ import annotations

import time

from .refusal import Refusal, forbidden, posix, unauthorized
from .server import Request
from .world import Node, Space, Token, World


def token_of(request: Request) -> str | None:
    """In the server's order (ctool: tokens.erl parse_access_token_header)."""
    headers = request.headers
    if "x-auth-token" in headers:
        return headers["x-auth-token"]
    if headers.get("authorization", "").lower().startswith("bearer "):
        return headers["authorization"][7:].strip()
    return headers.get("macaroon")


def authenticate(world: World, text: str | None, service: str) -> Token:
    """The token, if it may be used at `service` ("opw-<provider>" or "ozw-onezone") through REST."""
    if text is None:
        raise Refusal(401, "unauthorized", "You must authenticate yourself to perform this operation.")
    token = world.tokens.get(text)
    if token is None:
        raise unauthorized("tokenInvalid")
    if token.revoked:
        raise unauthorized("tokenRevoked")
    if token.valid_until is not None and token.valid_until <= time.time():
        caveat = {"type": "time", "validUntil": int(token.valid_until)}
        raise unauthorized("tokenCaveatUnverified", {"caveat": caveat})
    if token.interface not in (None, "rest"):
        caveat = {"type": "interface", "interface": token.interface}
        raise unauthorized("tokenCaveatUnverified", {"caveat": caveat})
    if token.services is not None and service not in token.services:
        caveat = {"type": "service", "whitelist": ",".join(token.services)}
        raise unauthorized("tokenCaveatUnverified", {"caveat": caveat})
    return token


def check_space(world: World, token: Token, space: str, provider: str) -> Space:
    found = world.spaces.get(space)
    if found is None or token.user not in found.members:
        raise forbidden()
    if provider not in found.supports:
        details = {"spaceId": space, "providerId": provider}
        raise Refusal(400, "spaceNotSupportedBy", "The space is not supported by this provider.", details)
    return found


def check_file(space: Space, token: Token, node: Node, wanted: str) -> None:
    """`wanted` of "rwx" by the owner's or the group's bits. The space's owner may everything."""
    if token.user == space.owner:
        return
    shift = 6 if token.user == node.owner else 3
    bits = node.mode >> shift & 7
    need = sum({"r": 4, "w": 2, "x": 1}[letter] for letter in wanted)
    if bits & need != need:
        raise posix("eacces")


def check_writable(space: Space, token: Token, provider: str) -> None:
    if token.readonly:
        raise posix("eacces")
    if space.supports[provider]:
        raise posix("erofs")
