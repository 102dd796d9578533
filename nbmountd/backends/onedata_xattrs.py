"""Extended attributes of files: told to the caller, and brought to what the caller wants.

It knows nothing of places. The remote's values are JSON (onedata_answers.py says how bytes and names are written).
Between tasks it shares which names the caller was told: only such a name can be missing on purpose.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from nbmountd.backends.onedata_answers import Told, remote_key, remote_value, shown_xattrs
from nbmountd.backends.onedata_client import OnedataClient

REMEMBERED = 10_000
SETTABLE = frozenset({"onedata_json", "onedata_rdf"})
"""The attributes of Onedata's own that a client may set."""


class Xattrs:
    """The extended attributes of one mount."""

    def __init__(self) -> None:
        self._told: OrderedDict[str, frozenset[str]] = OrderedDict()

    async def of(self, client: OnedataClient, told: Told) -> dict[str, bytes] | None:
        """Those of an object; one request if it has any. None: a provider before 21.02.5, which does not say whether."""
        if not client.new_names:
            return None
        return await self.read(client, told.id) if told.has_metadata else {}

    async def read(self, client: OnedataClient, id: str) -> dict[str, bytes]:
        shown = shown_xattrs(await client.xattrs(id))
        self._told[id] = frozenset(shown)
        self._told.move_to_end(id)
        if len(self._told) > REMEMBERED:
            self._told.popitem(last=False)
        return shown

    async def add(self, client: OnedataClient, id: str, wanted: Mapping[str, bytes] | None) -> None:
        """Sets `wanted` on a new object. What has no place on the remote is left out."""
        if values := _values(wanted or {}):
            await client.set_xattrs(id, values)

    async def copy(self, client: OnedataClient, source: str, target: str) -> None:
        """Gives `target` what `source` has."""
        values = await client.xattrs(source)
        values = {key: value for key, value in values.items() if not key.startswith("onedata_") or key in SETTABLE}
        if values:
            await client.set_xattrs(target, values)

    async def store(self, client: OnedataClient, id: str, wanted: Mapping[str, bytes]) -> None:
        """Brings the remote's to `wanted`; of others only those are removed that the caller was told of."""
        before = shown_xattrs(await client.xattrs(id))
        changed = _values({name: value for name, value in wanted.items() if before.get(name) != value})
        known = self._told.get(id, frozenset())
        gone = [remote_key(name) or "" for name in before if name in known and name not in wanted]
        if changed:
            await client.set_xattrs(id, changed)
        if gone:
            await client.remove_xattrs(id, gone)


def _values(wanted: Mapping[str, bytes]) -> dict[str, Any]:
    return {key: remote_value(name, value) for name, value in wanted.items() if (key := remote_key(name)) is not None}
