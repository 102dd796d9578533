"""The double's tokens: which user each stands for, until when, and the JWTs that its token endpoint gives out."""

from __future__ import annotations

import base64
import json
import time
import uuid
from dataclasses import dataclass


@dataclass
class Token:
    user: str
    context: str
    expires_at: float


class Tokens:
    """`issue` makes one; `user_of` is None for what is unknown or expired."""

    def __init__(self) -> None:
        self._tokens: dict[str, Token] = {}
        self._refresh: dict[str, Token] = {}

    def issue(self, user: str, *, context: str = "/root/VO/VRE", seconds: float = 3600.0, jwt: bool = True) -> str:
        expires_at = time.time() + seconds
        text = self._jwt(user, context, expires_at) if jwt else f"{uuid.uuid4()}-98187548"
        self._tokens[text] = Token(user, context, expires_at)
        return text

    def refresh_token(self, user: str, context: str) -> str:
        text = uuid.uuid4().hex
        self._refresh[text] = Token(user, context, float("inf"))
        return text

    def refreshed(self, text: str) -> Token | None:
        return self._refresh.get(text)

    def expire(self, text: str, seconds: float = 0.0) -> None:
        self._tokens[text].expires_at = time.time() + seconds

    def find(self, text: str) -> Token | None:
        token = self._tokens.get(text)
        return token if token is not None and token.expires_at > time.time() else None

    @staticmethod
    def _jwt(user: str, context: str, expires_at: float) -> str:
        def part(values: dict[str, object]) -> str:
            return base64.urlsafe_b64encode(json.dumps(values).encode()).decode().rstrip("=")

        claims: dict[str, object] = {
            "exp": int(expires_at),
            "preferred_username": user,
            "aud": context.replace("/", "%2F"),
            "jti": uuid.uuid4().hex,
        }
        return f"{part({'alg': 'none', 'typ': 'JWT'})}.{part(claims)}.c2ln"
