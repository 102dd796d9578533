"""A Onezone's REST face: the scope of a token, temporary tokens, names of spaces (oz-worker: token_logic_plugin.erl)."""

from __future__ import annotations

import secrets
import time
from typing import Any

from .access import authenticate, token_of
from .provider import Provider
from .refusal import Refusal, bad_value, unauthorized
from .server import Request, Response, json_response
from .world import Token, World

PREFIX = ["api", "v3", "onezone"]
MAX_TTL = 604_800


class Zone:
    """Knows all providers. `identities` maps Check-in tokens (without `egi:`) to users."""

    def __init__(self, world: World, providers: dict[str, Provider], identities: dict[str, str]) -> None:
        self.world = world
        self.providers = providers
        self.identities = identities
        self.minted: list[str] = []

    def handle(self, request: Request) -> Response:
        self.world.catch_up()
        route = request.segments[3:] if request.segments[:3] == PREFIX else []
        if (request.method, route) == ("POST", ["tokens", "infer_access_token_scope"]):
            return self._scope(request)
        if (request.method, route) == ("POST", ["user", "tokens", "temporary"]):
            return self._mint(request)
        if request.method == "PATCH" and route[:1] == ["spaces"] and len(route) == 2:
            return self._rename(request, route[1])
        raise Refusal(404, "notFound", "The resource could not be found.")

    def _scope(self, request: Request) -> Response:
        """Public; of the caveats only time is looked at."""
        token = self.world.tokens.get(str(request.json().get("token")))
        if token is None:
            raise bad_value("badValueToken", "token")
        if token.revoked or (token.valid_until is not None and token.valid_until <= time.time()):
            raise Refusal(400, "badValueToken", "The token is no longer valid.")
        allowed = {id for id in self.providers if token.services is None or self._serves(token.services, id)}
        spaces = {
            space.id: {
                "name": space.name,
                "supports": {id: {"readonly": readonly} for id, readonly in space.supports.items() if id in allowed},
            }
            for space in self.world.spaces.values()
            if token.user in space.members
        }
        providers = {
            id: {"name": one.name, "domain": one.domain, "version": one.version, "online": one.online}
            for id, one in self.providers.items()
            if id in allowed
        }
        scope: dict[str, Any] = {"readonly": token.readonly, "spaces": spaces, "providers": providers}
        return json_response({"validUntil": token.valid_until, "dataAccessScope": scope})

    @staticmethod
    def _serves(services: list[str], provider: str) -> bool:
        return f"opw-{provider}" in services or "ozw-onezone" in services

    def _caller(self, request: Request) -> str:
        text = token_of(request)
        if text is not None and text.startswith("egi:"):
            user = self.identities.get(text[4:])
            if user is None:
                raise unauthorized("idpAccessTokenUnauthorized")
            return user
        return authenticate(self.world, text, "ozw-onezone").user

    def _mint(self, request: Request) -> Response:
        user = self._caller(request)
        asked = request.json()
        if asked.get("type") != {"accessToken": {}}:
            raise bad_value("badValueNotAllowed", "type")
        token = Token(user)
        for caveat in asked.get("caveats", []):
            if caveat["type"] == "time":
                token.valid_until = float(caveat["validUntil"])
            elif caveat["type"] == "interface":
                token.interface = caveat["interface"]
            elif caveat["type"] == "service":
                token.services = caveat["whitelist"]
            else:
                raise bad_value("badValueCaveat", "caveats")
        if token.valid_until is None or token.valid_until > time.time() + MAX_TTL:
            raise Refusal(400, "tokenTimeCaveatRequired", "A time caveat is required.", {"maxTtl": MAX_TTL})
        text = "temporary-" + secrets.token_hex(16)
        self.world.tokens[text] = token
        self.minted.append(text)
        return json_response({"token": text}, 201)

    def _rename(self, request: Request, space: str) -> Response:
        self._caller(request)
        self.world.spaces[space].name = request.json()["name"]
        return Response(204)
