"""Runs the double: `python -m tests.servers.onedata_double SETTINGS.json`, until it is ended."""

from __future__ import annotations

import json
import ssl
import sys
import threading
from pathlib import Path

from .control import Control
from .provider import Provider
from .server import Face, Faces
from .world import Token, World
from .zone import Zone


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(settings["certificate"])
    world = World(Path(settings["directory"]), list(settings["providers"]))
    providers = {
        id: Provider(
            world, id, one["name"], f"127.0.0.1:{one['port']}", one["version"], has_events=one.get("events", False)
        )
        for id, one in settings["providers"].items()
    }
    zone = Zone(world, providers, settings["identities"])
    for text, values in settings["tokens"].items():
        world.tokens[text] = Token(**values)
    with Path(settings["log"]).open("a", buffering=1) as log:
        shared = Faces(log)
        faces = {
            id: Face(id, settings["providers"][id]["port"], context, shared, provider.handle)
            for id, provider in providers.items()
        }
        faces["zone"] = Face("zone", settings["zone_port"], context, shared, zone.handle)
        control = Control(world, providers, zone, shared, faces)
        shared.call = control.perform
        Face("control", settings["port"], None, shared, control.handle)
        print(settings["port"], flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
