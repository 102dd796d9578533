"""Refusals in Onedata's shape: `{"error": {"id", "description", "details"}}` (ctool: src/errors.erl)."""

from __future__ import annotations

import json
from typing import Any


class Refusal(Exception):
    """Ends the handling of a request with an error body."""

    def __init__(self, status: int, id: str, description: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(id)
        self.status = status
        self.error: dict[str, Any] = {"id": id, "description": description}
        if details is not None:
            self.error["details"] = details

    def body(self) -> bytes:
        return json.dumps({"error": self.error}).encode()


def posix(errno: str) -> Refusal:
    return Refusal(400, "posix", f"Operation failed with POSIX error: {errno}.", {"errno": errno})


def bad_value(id: str, key: str, **details: Any) -> Refusal:
    return Refusal(400, id, f'Bad value: provided "{key}" is wrong.', {"key": key, **details})


def unauthorized(auth_error: str, details: dict[str, Any] | None = None) -> Refusal:
    nested: dict[str, Any] = {"id": auth_error, "description": "The provided token was refused."}
    if details is not None:
        nested["details"] = details
    return Refusal(
        401, "unauthorized", "Provided authentication is not valid (see details).", {"authError": nested}
    )


def forbidden() -> Refusal:
    return Refusal(403, "forbidden", "You are not authorized to perform this operation.")
