"""Decides when unsent work goes out, runs the planned steps side by side, and remembers what failed.

State: `_ready` and `_waiting` (the current plan), `_running` (steps at work, by inode), `_failures` (when to try again)
and what is parked. All of it is touched by plain functions between awaits. It does not know how a step is carried out
(steps.py) nor what depends on what (plan.py).
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

import trio

from nbmountd.control.schema import ParkedItem, QueueItem
from nbmountd.disk.database import Node
from nbmountd.errors import LocalError, NbmountdError, RemoteError, RemoteFull, StaleFile, Unauthenticated
from nbmountd.fs.nodes import Nodes
from nbmountd.log import get_logger
from nbmountd.model import ROOT_INODE, FileState, Kind
from nbmountd.sync.plan import Change, MakeDirectory, Move, Position, Remove, SetAttributes, Step, Upload, plan
from nbmountd.sync.steps import Steps

FIRST_RETRY, LAST_RETRY = 1.0, 300.0
"""Seconds between attempts: doubling, with jitter."""
FULL_RETRY = 60.0
"""A full remote is asked again this often: somebody may have made room."""
OPEN_DELAY = 300.0
"""A file that stays open for writing is sent as it is this long after its first unsent change."""
LOOK_SHARE = 10
"""At most one part in so many of the time goes into looking for work."""

_log = get_logger(__name__)


@dataclass
class Failure:
    """What went wrong with a node's work last, and when it is tried again (trio's clock)."""

    attempts: int
    error: str
    next_at: float


class Engine:
    """Sends the unsent work of one mount. `emit(event, path, details)` tells whoever follows events."""

    def __init__(
        self,
        nodes: Nodes,
        steps: Steps,
        *,
        write_back_delay: float,
        emit: Callable[..., None],
        chance: random.Random | None = None,
    ) -> None:
        self._nodes = nodes
        self._steps = steps
        self._delay = write_back_delay
        self._emit = emit
        self._chance = chance or random.Random()
        self._ready: deque[tuple[int, Step]] = deque()
        self._waiting: dict[int, tuple[Step, set[int]]] = {}
        self._numbered = 0
        """Steps planned so far: numbers are never used twice, as steps of an earlier plan may still be at work."""
        self._running: dict[int, Step] = {}
        self._failures: dict[int, Failure] = {}
        self._hurry: list[str] = []
        self._look_at = 0.0
        self._not_before = 0.0
        self._work = trio.Event()
        self._parked: dict[int, tuple[str, float]] = {
            ino: (error, at)
            for ino, error, at in nodes.database.connection.execute("SELECT ino, error, at FROM work WHERE parked")
        }

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Looks for work when some may be due. Started by worker.py, once."""
        while True:
            changed = self._nodes.changed
            now = trio.current_time()
            if not self._ready and now >= self._look_at and now >= self._not_before:
                self._look()
            until = max(self._look_at, self._not_before) if not self._ready else float("inf")
            with trio.move_on_at(until):
                await changed.wait()
            self._look_at = min(self._look_at, trio.current_time() + (0.0 if self._hurry else self._delay))

    def _look(self) -> None:
        began = time.perf_counter()
        changes, next_due = self._collect()
        self._waiting.clear()
        steps = plan(changes) if any(change.due for change in changes.values()) else ()
        first = self._numbered
        self._numbered += len(steps)
        for index, step in enumerate(steps, first):
            if step.after:
                self._waiting[index] = (step, {first + after for after in step.after})
            else:
                self._ready.append((index, step))
        now = trio.current_time()
        self._look_at = next_due
        self._not_before = now + LOOK_SHARE * (time.perf_counter() - began)
        if self._ready:
            self._work.set()
            self._work = trio.Event()

    def _collect(self) -> tuple[dict[int, Change], float]:
        """All differences as the planner wants them, and when the next one becomes due (trio's clock)."""
        now, clock = time.time(), trio.current_time()
        changes: dict[int, Change] = {}
        next_due = float("inf")
        for node in self._nodes.database.to_send():
            due_at = self._due_at(node, now, clock)
            due = due_at <= clock
            if not due:
                next_due = min(next_due, due_at)
            changes[node.ino] = self._change(node, due=due)
        for ino in self._running:
            running = self._nodes.database.get(ino)
            if running is not None:
                changes[ino] = self._change(running, due=False)
        for node_change in list(changes.values()):
            for position in (node_change.local, node_change.base):
                self._add_ancestors(position, changes)
        return changes, next_due

    def _change(self, node: Node, *, due: bool) -> Change:
        local = None if node.parent is None else Position(node.parent, node.name)
        base = None if node.base_parent is None else Position(node.base_parent, node.base_name)
        step = self._running.get(node.ino)
        if step is not None:
            local = _left_by(step, base)
        return Change(
            node.ino, node.kind, local, base, node.unsent, bool(node.unsent_attributes), due=due, busy=step is not None
        )

    def _add_ancestors(self, position: Position | None, changes: dict[int, Change]) -> None:
        while position is not None and position.parent not in changes:
            parent = self._nodes.database.get(position.parent)
            if parent is None:
                return
            changes[parent.ino] = change = self._change(parent, due=False)
            if parent.ino == ROOT_INODE:
                return
            if change.base is not None and change.base != change.local:
                self._add_ancestors(change.base, changes)
            position = change.local

    def _due_at(self, node: Node, now: float, clock: float) -> float:
        """When the node's work may go out; inf: only when something else happens first."""
        if node.ino in self._running or node.ino in self._parked:
            return float("inf")
        failure = self._failures.get(node.ino)
        hurried = self._is_hurried(node)
        if failure is not None and (failure.next_at > clock):
            return failure.next_at
        if hurried:
            return clock
        delay = self._delay
        if (node.link_of or node.ino) in self._nodes.writers and node.unsent:
            delay = OPEN_DELAY
        elif node.removed and self._nodes.opens[node.ino] and self._steps.incomplete(node):
            return float("inf")  # a reader needs bytes that only the remote has; closing wakes us
        return clock + max(0.0, node.changed_at + delay - now)

    # -- workers ------------------------------------------------------------------------------------------------------

    async def run_worker(self) -> None:
        """Carries out steps, one at a time. Several are started by worker.py; their number is the limit of uploads."""
        while True:
            while not self._ready:
                await self._work.wait()
            index, step = self._ready.popleft()
            await self._carry_out(index, step)

    async def _carry_out(self, index: int, step: Step) -> None:
        node = self._nodes.database.get(step.ino)
        if node is None or step.ino in self._running or not self._steps.still_fits(step, node):
            self._finished(index, succeeded=False)
            return
        self._running[step.ino] = step
        path = self._nodes.local_path(node)
        succeeded = False
        try:
            await self._steps.carry_out(step, node)
            succeeded = True
            self._failures.pop(step.ino, None)
            self._emit("sent", path, step=step_name(step))
        except (RemoteError, LocalError, OSError) as exc:
            self._failed(node, step, path, exc)
        finally:
            del self._running[step.ino]
            self._finished(index, succeeded=succeeded)

    def _finished(self, index: int, *, succeeded: bool) -> None:
        """Lets go what waited for the step; what waited for a failed one is planned anew."""
        for other, (step, after) in list(self._waiting.items()):
            if index in after:
                if succeeded:
                    after.discard(index)
                    if not after:
                        del self._waiting[other]
                        self._ready.append((other, step))
                else:
                    del self._waiting[other]
        if self._ready:
            self._work.set()
            self._work = trio.Event()
        else:
            self._look_at = 0.0
        self._nodes.wake()

    def _failed(self, node: Node, step: Step, path: str, exc: NbmountdError | OSError) -> None:
        failure = self._failures.setdefault(node.ino, Failure(0, "", 0.0))
        failure.attempts += 1
        failure.error = str(exc)
        if isinstance(exc, Unauthenticated):
            retry_in = LAST_RETRY  # a new credential wakes us: `health_changed`
        elif isinstance(exc, RemoteFull):
            retry_in = FULL_RETRY
        elif isinstance(exc, (StaleFile, LocalError)) or (isinstance(exc, RemoteError) and not exc.transient):
            self.park(node, str(exc))
            _log.warning("parked", path=path, step=step_name(step), cause=exc)
            return
        else:
            retry_in = min(LAST_RETRY, FIRST_RETRY * 2 ** min(failure.attempts - 1, 10))
            retry_in *= self._chance.uniform(0.5, 1.0)
            if isinstance(exc, RemoteError) and exc.retry_after is not None:
                retry_in = max(retry_in, exc.retry_after)
        failure.next_at = trio.current_time() + retry_in
        _log.info("will try again", path=path, step=step_name(step), cause=exc, retry_in=round(retry_in, 1))
        self._emit("retry", path, step=step_name(step), error=str(exc))

    def health_changed(self) -> None:
        """The remote answers again, or another credential is there: what failed is tried at once."""
        for failure in self._failures.values():
            failure.next_at = 0.0
        self._look_soon()

    def _look_soon(self) -> None:
        self._look_at = self._not_before = 0.0
        self._nodes.wake()

    # -- parked work --------------------------------------------------------------------------------------------------

    def park(self, node: Node, error: str) -> None:
        """Keeps the node's work, shown and not retried, until `unpark`."""
        now = time.time()
        self._parked[node.ino] = (error, now)
        self._failures.pop(node.ino, None)
        with self._nodes.database.transaction() as change:
            change.execute(
                "INSERT INTO work (ino, parked, error, at) VALUES (?, 1, ?, ?)"
                " ON CONFLICT (ino) DO UPDATE SET parked = 1, error = excluded.error, at = excluded.at",
                (node.ino, error, now),
            )
        self._emit("parked", self._nodes.local_path(node), error=error)

    def unpark(self, ino: int) -> None:
        """The node's work is tried again now."""
        if self._parked.pop(ino, None) is not None:
            with self._nodes.database.transaction() as change:
                change.execute("UPDATE work SET parked = 0 WHERE ino = ?", (ino,))
            self._look_soon()

    def parked(self, mount: str) -> list[ParkedItem]:
        items = []
        for ino, (error, at) in list(self._parked.items()):
            node = self._nodes.database.get(ino)
            if node is None or not node.to_send:
                self._parked.pop(ino)
                continue
            path = self._nodes.local_path(node)
            items.append(ParkedItem(mount=mount, path=path, step=_kind_of_work(node), size=node.size, error=error, at=at))
        return items

    def all_stuck(self, nodes: Iterable[Node]) -> bool:
        """Whether all of these are parked and nothing is at work that could change that."""
        return not self._running and not self._ready and all(node.ino in self._parked for node in nodes)

    # -- waiting for safety -------------------------------------------------------------------------------------------

    async def send_now(self, prefixes: Iterable[str]) -> AsyncIterator[tuple[list[Node], str]]:
        """Hurries what is unsent below these paths (relative to the mount; "" is all) and yields what is left, and what
        goes out now, whenever that changes, until nothing is left. Parked work stays in the list; it does not end then."""
        prefixes = list(prefixes)
        self._hurry += prefixes
        try:
            for failure in self._failures.values():
                failure.next_at = 0.0
            self._look_soon()
            while True:
                changed = self._nodes.changed
                left = [node for node in self._nodes.database.to_send() if _below_any(prefixes, *self._paths(node))]
                current = next((self._nodes.database.get(ino) for ino in self._running), None)
                yield left, "" if current is None else self._nodes.local_path(current)
                if not left:
                    return
                with trio.move_on_after(0.5):
                    await changed.wait()
                await trio.sleep(0.02)  # many small files finish in one breath
        finally:
            for prefix in prefixes:
                self._hurry.remove(prefix)

    async def wait_until_safe(self, node: Node) -> None:
        """Returns when the remote has confirmed the node as it is now. Raises the reason when its work is parked."""
        async for _ in self.send_now([self._nodes.local_path(node)]):
            if node.ino in self._parked:
                raise RemoteError(self._parked[node.ino][0])
            if not node.to_send:
                return

    def _is_hurried(self, node: Node) -> bool:
        return bool(self._hurry) and ("" in self._hurry or _below_any(self._hurry, *self._paths(node)))

    def _paths(self, node: Node) -> tuple[str, ...]:
        if node.parent is not None:
            return (self._nodes.local_path(node),)
        try:
            return (self._nodes.local_path(node), "/".join(self._nodes.place(node).path))
        except LocalError:
            return (self._nodes.local_path(node),)

    # -- for status ---------------------------------------------------------------------------------------------------

    @property
    def uploading(self) -> int:
        return len(self._running)

    def state(self, node: Node) -> FileState | None:
        if node.ino in self._parked and node.to_send:
            return FileState.PARKED
        step = self._running.get(node.ino)
        if isinstance(step, Upload):
            return FileState.UPLOADING
        row = self._nodes.database.connection.execute("SELECT 1 FROM conflicts WHERE ino = ?", (node.ino,)).fetchone()
        return FileState.CONFLICT if row else None

    def failure(self, node: Node) -> Failure | None:
        return self._failures.get(node.ino)

    def queue(self, mount: str, limit: int = 1000) -> tuple[list[QueueItem], int]:
        """What is unsent, running first, and how much there is in all."""
        now, clock = time.time(), trio.current_time()
        unsent = self._nodes.database.to_send()
        unsent.sort(key=lambda node: (node.ino not in self._running, node.changed_at))
        items = []
        for node in unsent[:limit]:
            failure = self._failures.get(node.ino)
            step = self._running.get(node.ino)
            due_at = self._due_at(node, now, clock)
            state = (
                "running" if step is not None
                else "parked" if node.ino in self._parked
                else "retrying" if failure is not None
                else "open" if node.ino in self._nodes.writers
                else "waiting"
            )  # fmt: skip
            items.append(
                QueueItem(
                    mount=mount, path=self._nodes.local_path(node), state=state,  # type: ignore[arg-type]
                    step=step_name(step) if step is not None else _kind_of_work(node),
                    size=node.size if node.kind is Kind.FILE else 0, sent=self._steps.sent(node),
                    due_in=0.0 if due_at == float("inf") else max(0.0, due_at - clock),
                    attempts=failure.attempts if failure else 0,
                    error=failure.error if failure else self._parked.get(node.ino, ("", 0))[0],
                )
            )  # fmt: skip
        return items, len(unsent)


def _left_by(step: Step, base: Position | None) -> Position | None:
    """Where a running step will leave its node on the remote."""
    if isinstance(step, Remove):
        return None
    if isinstance(step, Move):
        return step.target
    if isinstance(step, SetAttributes):
        return base
    return getattr(step, "at", base)


def step_name(step: Step) -> str:
    names = {Upload: "upload", Move: "move", Remove: "remove", MakeDirectory: "make", SetAttributes: "attributes"}
    return names.get(type(step), "make")


def _kind_of_work(node: Node) -> str:
    if node.removed:
        return "remove"
    if node.base_parent is None:
        return "make" if node.is_directory else "upload"
    if node.unsent:
        return "upload"
    return "attributes" if node.in_place else "move"


def _below_any(prefixes: Iterable[str], *paths: str) -> bool:
    return any(
        prefix == "" or path == prefix or path.startswith((prefix + "/", prefix + " (removed)"))
        for prefix in prefixes
        for path in paths
    )
