"""Answers control requests about what waits for a person: conflicts, parked work, and state that was put aside.

It reads what the layers below keep and asks them to act; it holds nothing of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import trio

from nbmountd.config import MountConfig
from nbmountd.control import schema
from nbmountd.disk import quarantine
from nbmountd.disk.database import Node
from nbmountd.disk.quarantine import PutAside, all_put_aside
from nbmountd.errors import LocalError, NotFound
from nbmountd.fs.filesystem import FileSystem
from nbmountd.fs.resolve import conflicts as all_conflicts
from nbmountd.log import get_logger
from nbmountd.sync.engine import Engine
from nbmountd.sync.parked import discard, export

_log = get_logger(__name__)


class Unresolved:
    """What one mount has of that. `state` is its state directory."""

    def __init__(self, config: MountConfig, filesystem: FileSystem, engine: Engine, state: Path) -> None:
        self._config = config
        self._fs = filesystem
        self._engine = engine
        self._state = state

    @property
    def parked_count(self) -> int:
        return len(self._engine.parked_nodes()) + len(all_put_aside(self._state))

    def conflicts(self, path: str | None = None) -> list[schema.Conflict]:
        """All, or those of the file at `path` and below."""
        prefix = relative(path, self._config.path) if path else ""
        nodes, found = self._fs.nodes, []
        for conflict in all_conflicts(self._fs):
            remote = "" if conflict.remote is None else nodes.local_path(conflict.remote)
            copy = nodes.local_path(conflict.copy)
            if prefix and not any(name == prefix or name.startswith(prefix + "/") for name in (remote, copy)):
                continue
            found.append(
                schema.Conflict(
                    mount=self._config.name,
                    path=absolute(self._config, remote) if remote else "(gone)",
                    copy=absolute(self._config, copy),
                    at=conflict.at,
                    local_size=conflict.local_size,
                    local_mtime=_seconds(conflict.local_mtime_ns),
                    remote_size=conflict.remote_size,
                    remote_mtime=_seconds(conflict.remote_mtime_ns),
                )
            )
        return found

    async def parked(self, request: schema.Parked) -> schema.AnyReply:
        below = relative(request.path, self._config.path) if request.path else None
        parked = [(self._fs.nodes.local_path(node), node) for node in self._engine.parked_nodes()]
        parked = [(path, node) for path, node in parked if below in (None, path)]
        kept = {_aside(each): each for each in all_put_aside(self._state) if below in (None, _aside(each))}
        if request.action == "list":
            return self._reply(below)
        if below is not None and not parked and not kept:
            raise NotFound(f"{request.path} is not parked")
        if request.action == "retry":
            for _, node in parked:
                self._engine.unpark(node.ino)
            return self._reply(below)
        if request.action == "export":
            return await self._export(Path(request.directory or ""), parked, kept)
        problems: list[str] = []
        for path, node in parked:
            try:
                discard(self._fs, node)
                self._engine.unpark(node.ino)
                _log.warning("unsent work was given up, as asked", path=path)
            except LocalError as exc:
                problems.append(f"{path}: {exc}")
        for name, each in kept.items():
            await trio.to_thread.run_sync(quarantine.discard, each)
            _log.warning("what had been put aside was deleted, as asked", directory=str(each.directory), name=name)
        return _done_or_not(problems, f"{len(parked) + len(kept) - len(problems)} given up")

    def _reply(self, below: str | None) -> schema.ParkedReply:
        items = [item for item in self._engine.parked(self._config.name) if below in (None, item.path)]
        for kept in all_put_aside(self._state):
            if below in (None, _aside(kept)):
                error = f"the state could not be read; what was unsent then is in {kept.directory}"
                items.append(
                    schema.ParkedItem(
                        mount=self._config.name, path=_aside(kept), step="quarantine", size=kept.size, error=error, at=kept.at
                    )
                )
        return schema.ParkedReply(
            items=tuple(msgspec.structs.replace(item, path=absolute(self._config, item.path)) for item in items)
        )

    async def _export(self, directory: Path, parked: list[tuple[str, Node]], kept: dict[str, PutAside]) -> schema.AnyReply:
        """Copies of these in `directory`/NAME OF THE MOUNT."""
        if not directory.is_absolute() or directory.is_relative_to(self._config.path):
            return schema.Failed(message=f"{directory or 'nothing'} is no directory outside of the mount", code=2)
        target, problems = directory / self._config.name, []
        for path, node in parked:
            problems += await export(self._fs, node, target / path)
        for name, each in kept.items():
            try:
                await trio.to_thread.run_sync(quarantine.export, each, target / name)
            except OSError as exc:
                problems.append(f"{name}: {exc}")
        return _done_or_not(problems, f"{len(parked) + len(kept)} copied to {target}" if parked or kept else "")


def absolute(config: MountConfig, path: str) -> str:
    """A path relative to the mount as people can paste it."""
    return f"{config.path}/{path}" if path else config.path


def relative(path: str, mount: str) -> str:
    """A path as a person gives it, relative to the mount; "" is the mount itself."""
    below = str(Path(os.path.relpath(path, mount)))
    return "" if below == "." else below


def _aside(kept: PutAside) -> str:
    """What a quarantine is called where a path below the mount is wanted; there is no file of that name."""
    return f"(put aside {kept.directory.name})"


def _done_or_not(problems: list[str], done: str) -> schema.Done | schema.Failed:
    if problems:
        return schema.Failed(message="; ".join([*([done] if done else []), *problems]))
    return schema.Done(message=done)


def _seconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / 1e9
