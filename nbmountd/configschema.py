"""The JSON schema of the configuration file, for editors: the shape of the TOML, not of the structs behind it."""

from __future__ import annotations

from typing import Any

import msgspec

from nbmountd.config import BACKENDS, DaemonConfig
from nbmountd.configfile import DURATIONS, SIZES, MountKeys

_WRITTEN = {
    "size": {"type": "string", "description": 'with a unit, such as "10G" or "512 MiB"'},
    "duration": {"type": "string", "description": 'with a unit, such as "30s" or "5 min"'},
}


def config_schema() -> dict[str, Any]:
    """JSON Schema 2020-12."""
    daemon = _table(DaemonConfig)
    daemon.pop("required", None)  # the directories have defaults that depend on the environment
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "nbmountd configuration",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "daemon": daemon,
            "mount": {"type": "array", "items": {"oneOf": [_mount(backend) for backend in sorted(BACKENDS)]}},
        },
    }


def _mount(backend: str) -> dict[str, Any]:
    common, own = _table(MountKeys), _table(BACKENDS[backend])
    common["properties"].pop("options")
    return {
        "title": f"mount of backend {backend}",
        "type": "object",
        "additionalProperties": False,
        "properties": {**common["properties"], "backend": {"const": backend}, **own["properties"]},
        "required": [*common["required"], *own.get("required", ())],
    }


def _table(struct: type[msgspec.Struct]) -> dict[str, Any]:
    _, components = msgspec.json.schema_components([struct])
    table: dict[str, Any] = components[struct.__name__]
    table.pop("title", None)
    for key, value in table["properties"].items():
        kind = "size" if key in SIZES else "duration" if key in DURATIONS else None
        if kind is not None:
            default = {"default": value.pop("default")} if "default" in value else {}
            table["properties"][key] = {"anyOf": [value, _WRITTEN[kind]], **default}
    return table
