"""Decides when unsent work goes out, runs the planned steps side by side, and remembers what failed.

State: `_ready` and `_waiting` (the current plan), `_running` (steps at work, by inode), `_failures` (when to try again)
and `_parking` (what waits for a person). All of it is touched by plain functions between awaits. It does not know how a
step is carried out (steps.py) nor what depends on what (plan.py). What a finished step costs does not depend on how much
waits; only `_look` reads all that is unsent, and it runs when the last plan is used up, for at most a tenth of the time.
"""

from __future__ import annotations

import errno
import random
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

import trio

from nbmountd.control.schema import ParkedItem, QueueItem
from nbmountd.disk.database import Node
from nbmountd.errors import (
    FileTooLarge,
    LocalError,
    NameRefused,
    RemoteDenied,
    RemoteError,
    RemoteFull,
    RemoteTooLarge,
    RemoteUnsupported,
    StaleFile,
    Unauthenticated,
)
from nbmountd.fs.nodes import Nodes
from nbmountd.log import get_logger
from nbmountd.model import ROOT_INODE, FileState, Kind
from nbmountd.sync.parking import Parking
from nbmountd.sync.plan import Ask, Change, MakeDirectory, Move, Position, Remove, SetAttributes, Step, Upload, plan
from nbmountd.sync.steps import Steps

FIRST_RETRY, LAST_RETRY = 1.0, 300.0
"""Seconds between attempts: doubling, with jitter."""
FULL_RETRY = 60.0
"""A full remote is asked again this often: somebody may have made room."""
HURRIED_FULL_RETRY = 5.0
"""The same while somebody waits for the file to be safe."""
OPEN_DELAY = 300.0
"""A file that stays open for writing is sent as it is this long after its first unsent change."""
HURRIED_LEAD = 0.5
"""Seconds until other work is looked at again, while what somebody waits for is under way; or until a step has ended."""
LOOK_SHARE = 10
"""At most one part in so many of the time goes into looking for work."""
LARGE = 8 * 2**20
"""Uploads from this size on are few at once, and leave one worker free for everything else."""
LARGE_AT_ONCE = 5
FINAL = (RemoteDenied, RemoteTooLarge, NameRefused, RemoteUnsupported, StaleFile, FileTooLarge)
"""Errors that time alone does not heal: the work is parked. Whatever else is wrong is looked at again."""
CURABLE = (RemoteDenied, RemoteTooLarge)
"""Those of them that an administrator of the remote may heal: tried again now and then (parking.py)."""
BELIEVED_AFTER = 2
"""A refusal must be heard so often in a row: a request that was damaged on its way is answered with 400 or 413 as well."""

_log = get_logger(__name__)


@dataclass
class Failure:
    """What went wrong with a node's work last, and when it is tried again (trio's clock)."""

    attempts: int
    error: str
    next_at: float
    refusals: int = 0
    """How often in a row the remote has refused it for good."""


class Engine:
    """Sends the unsent work of one mount. `emit(event, path, details)` tells whoever follows events; `away()` says that the
    remote is known to be away, so that nothing is tried until `health_changed`."""

    def __init__(
        self,
        nodes: Nodes,
        steps: Steps,
        *,
        write_back_delay: float,
        emit: Callable[..., None],
        away: Callable[[], bool] = lambda: False,
        chance: random.Random | None = None,
    ) -> None:
        self._nodes = nodes
        self._steps = steps
        self._delay = write_back_delay
        self._emit = emit
        self._away = away
        self._chance = chance or random.Random()
        self._ready: deque[tuple[int, Step]] = deque()
        self._ready_large: deque[tuple[int, Step]] = deque()
        self._waiting: dict[int, tuple[Step, set[int]]] = {}
        self._let_go_by: dict[int, list[int]] = defaultdict(list)
        """Number of a step -> those in `_waiting` that wait for it."""
        self._numbered = 0
        """Steps planned so far: numbers are never used twice, as steps of an earlier plan may still be at work."""
        self._running: dict[int, Step] = {}
        self._large_running = 0
        self._workers = 0
        self._failures: dict[int, Failure] = {}
        self._hurry: list[str] = []
        self._hurried: Counter[int] = Counter()
        self._look_at = 0.0
        self._not_before = 0.0
        self._work = trio.Event()
        self._parking = Parking(nodes, self._chance)

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Looks for work when some may be due. Started by worker.py, once."""
        while True:
            changed = self._nodes.changed
            now = trio.current_time()
            idle = not self._ready and not self._ready_large and not self._away()
            if idle and now >= self._look_at and now >= self._not_before:
                self._look()
                idle = not self._ready and not self._ready_large
            until = max(self._look_at, self._not_before) if idle else float("inf")
            with trio.move_on_at(until):
                await changed.wait()
            hurry = self._hurry or self._hurried
            self._look_at = min(self._look_at, trio.current_time() + (0.0 if hurry else self._delay))

    def _look(self) -> None:
        clock = trio.current_time()
        self._parking.begin_trial(clock)
        changes, next_due = self._collect(clock)
        self._waiting.clear()
        self._let_go_by.clear()
        for ino in self._to_ask():
            failure = self._failures.get(ino)
            if failure is None or failure.next_at <= clock:
                doubt = self._nodes.doubts.get(ino)
                assert doubt is not None
                self._enqueue(self._numbered, Ask(ino, Position(doubt.parent, doubt.name)))
                self._numbered += 1
            else:
                next_due = min(next_due, failure.next_at)
        steps = plan(changes) if any(change.due for change in changes.values()) else ()
        first = self._numbered
        self._numbered += len(steps)
        dropped: set[int] = set()
        found: list[tuple[float, int, Step]] = []
        for index, step in enumerate(steps, first):
            after = {first + each for each in step.after}
            if self._is_held_back(step.ino, clock) or not dropped.isdisjoint(after):
                dropped.add(index)  # somebody needs it, but it has just failed: all of them wait for its next turn
                continue
            if after:
                self._waiting[index] = (step, after)
                for each in after:
                    self._let_go_by[each].append(index)
            else:
                node = self._nodes.database.get(step.ino)
                found.append((node.changed_at if node else 0.0, index, step))
        for _, index, step in sorted(found, key=lambda each: each[:2]):
            self._enqueue(index, step)
        self._look_at = min(next_due, self._parking.next_trial)
        self._not_before = clock + LOOK_SHARE * (trio.current_time() - clock)

    def _collect(self, clock: float) -> tuple[dict[int, Change], float]:
        """All differences as the planner wants them, and when the next one becomes due (trio's clock)."""
        now = self._nodes.now()[1]
        changes: dict[int, Change] = {}
        next_due = float("inf")
        unsent = self._nodes.database.to_send()
        due_at = {node.ino: self._due_at(node, now, clock) for node in unsent}
        only: set[int] | None = None
        if self._hurry or self._hurried:  # what somebody waits for goes first, with what it needs
            only = {node.ino for node in unsent if due_at[node.ino] <= clock and self._is_hurried(node)} or None
        busy = [self._nodes.database.get(ino) for ino in (*self._running, *self._to_ask())]
        awaited = {(node.parent, node.name) for node in busy if node is not None}  # where they want to be in the end
        for node in unsent:
            due = due_at[node.ino] <= clock and (only is None or node.ino in only)
            if not due:
                next_due = min(next_due, due_at[node.ino] if due_at[node.ino] > clock else clock + HURRIED_LEAD)
            elif node.removed and (node.base_parent, node.base_name) in awaited:
                due = False  # that one is to replace it when its present step is done, and the remote is never without either
            changes[node.ino] = self._change(node, due=due)
        for running in busy:
            if running is not None:
                changes[running.ino] = self._change(running, due=False)
        for node_change in list(changes.values()):
            for position in (node_change.local, node_change.base):
                self._add_ancestors(position, changes)
        return changes, next_due

    def _to_ask(self) -> list[int]:
        """Nodes of which an earlier step may have gone where they no longer want to be; what is so is asked first."""
        found = []
        for doubt in self._nodes.doubts.all():
            node = self._nodes.database.get(doubt.ino)
            if doubt.ino not in self._running and node is not None and self._steps.is_to_be_asked(node):
                found.append(doubt.ino)
        return found

    def _unsent(self) -> list[Node]:
        """All that the remote has not confirmed."""
        unsent = self._nodes.database.to_send()
        known = {node.ino for node in unsent}
        asked = [self._nodes.database.get(ino) for ino in self._to_ask() if ino not in known]
        return unsent + [node for node in asked if node is not None]

    def _is_held_back(self, ino: int, clock: float) -> bool:
        failure = self._failures.get(ino)
        return self._parking.holds(ino) or (failure is not None and failure.next_at > clock)

    def _enqueue(self, index: int, step: Step) -> None:
        node = self._nodes.database.get(step.ino)
        large = isinstance(step, Upload) and node is not None and node.size >= LARGE
        (self._ready_large if large else self._ready).append((index, step))
        self._tell_workers()

    def _tell_workers(self) -> None:
        self._work.set()
        self._work = trio.Event()

    def _change(self, node: Node, *, due: bool) -> Change:
        local = None if node.parent is None else Position(node.parent, node.name)
        base = None if node.base_parent is None else Position(node.base_parent, node.base_name)
        step = self._running.get(node.ino)
        if step is None and self._steps.is_to_be_asked(node):  # as if that step were still running
            doubt = self._nodes.doubts.get(node.ino)
            step = None if doubt is None else Ask(node.ino, Position(doubt.parent, doubt.name))
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
        if node.ino in self._parking and self._parking.is_another(node):
            self.unpark(node.ino)
        if node.ino in self._running or self._parking.holds(node.ino):
            return float("inf")
        if node.ino in self._parking:
            return clock  # a trial
        failure = self._failures.get(node.ino)
        if failure is not None and failure.next_at > clock:
            return failure.next_at
        if self._is_hurried(node):
            return clock
        delay = self._delay
        if (node.link_of or node.ino) in self._nodes.writers and (node.unsent or node.base_parent is None):
            delay = OPEN_DELAY  # also what is still empty: git's index.lock stays so for as long as a checkout takes
        elif node.removed and self._nodes.opens[node.ino] and self._steps.incomplete(node):
            delay = OPEN_DELAY  # a reader needs bytes that only the remote has; closing wakes us
        wait = node.changed_at + delay - now
        return clock if wait > delay + 1.0 else clock + max(0.0, wait)  # changed in the future: the wall clock was set back

    # -- workers ------------------------------------------------------------------------------------------------------

    async def run_worker(self) -> None:
        """Carries out steps, one at a time. Several are started by worker.py; their number is the limit of uploads."""
        self._workers += 1
        while True:
            while (taken := self._take()) is None:
                await self._work.wait()
            index, step, large = taken
            self._large_running += large
            try:
                await self._carry_out(index, step)
            finally:
                self._large_running -= large

    def _take(self) -> tuple[int, Step, bool] | None:
        """The next step in the plan's order; large uploads only if a worker stays free for the rest."""
        if self._away():
            return None
        room = self._ready_large and self._large_running < max(1, min(LARGE_AT_ONCE, self._workers - 1))
        if room and (not self._ready or self._ready_large[0][0] < self._ready[0][0]):
            return (*self._ready_large.popleft(), True)
        return (*self._ready.popleft(), False) if self._ready else None

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
            if not isinstance(step, Ask):
                self._emit("sent", path, step=step_name(step))
                self._cured(step.ino)
        except (RemoteError, LocalError, OSError) as exc:
            self._failed(node, step, path, exc)
        except Exception as exc:  # a bug, or SQLite without room: one file's trouble must not stop all others
            _log.exception("bug", path=path, step=step_name(step))
            self._failed(node, step, path, exc)
        finally:
            del self._running[step.ino]
            self._finished(index, succeeded=succeeded)

    def _finished(self, index: int, *, succeeded: bool) -> None:
        """Lets go what waited for the step; what waited for a failed one is planned anew."""
        for other in self._let_go_by.pop(index, ()):
            if other not in self._waiting:
                continue
            step, after = self._waiting[other]
            after.discard(index)
            if not succeeded:
                del self._waiting[other]
            elif not after:
                del self._waiting[other]
                self._enqueue(other, step)
        if not self._ready and not self._ready_large and not (self._waiting and self._running):
            self._look_at = 0.0
        if self._ready_large:
            self._tell_workers()
        self._nodes.wake()

    def _cured(self, ino: int) -> None:
        """What was tried although it was parked has got through, if it was."""
        for each in self._parking.cured(ino) if ino in self._parking else ():
            self.unpark(each)

    def _failed(self, node: Node, step: Step, path: str, exc: Exception) -> None:
        if node.ino in self._parking and not isinstance(step, Ask):
            curable = isinstance(exc, CURABLE) or not isinstance(exc, FINAL)
            self._parking.failed(node.ino, may_be_cured=curable)
            _log.info("stays parked", path=path, step=step_name(step), cause=exc)
            return
        failure = self._failures.setdefault(node.ino, Failure(0, "", 0.0))
        failure.attempts += 1
        failure.error = str(exc) or type(exc).__name__
        failure.refusals = failure.refusals + 1 if isinstance(exc, FINAL) else 0
        if isinstance(exc, RemoteError) and 0 < failure.refusals < BELIEVED_AFTER:
            retry_in = FIRST_RETRY
        elif isinstance(exc, Unauthenticated):
            retry_in = LAST_RETRY  # a new credential wakes us: `health_changed`
        elif isinstance(exc, RemoteFull):
            retry_in = HURRIED_FULL_RETRY if self._is_hurried(node) else FULL_RETRY
        elif not isinstance(step, Ask) and (isinstance(exc, FINAL) or (isinstance(exc, OSError) and exc.errno == errno.EIO)):
            self.park(node, failure.error, may_be_cured=isinstance(exc, CURABLE))
            _log.warning("parked", path=path, step=step_name(step), cause=exc)
            return
        else:
            retry_in = min(LAST_RETRY, FIRST_RETRY * 2 ** min(failure.attempts - 1, 10))
            retry_in *= self._chance.uniform(0.5, 1.0)
            if isinstance(exc, RemoteError) and exc.retry_after is not None:
                retry_in = max(retry_in, min(exc.retry_after, LAST_RETRY))
        failure.next_at = trio.current_time() + retry_in
        _log.info("will try again", path=path, step=step_name(step), cause=exc, retry_in=round(retry_in, 1))
        self._emit("retry", path, step=step_name(step), error=failure.error)

    def health_changed(self) -> None:
        """The remote answers again, or another credential is there: what failed is tried at once."""
        self._parking.try_soon()
        self._forgive()
        self._tell_workers()

    def _look_soon(self) -> None:
        """Looks at once, whatever an older plan wanted next."""
        self._ready.clear()
        self._ready_large.clear()
        self._look_at = self._not_before = 0.0
        self._nodes.wake()

    # -- parked work --------------------------------------------------------------------------------------------------

    def park(self, node: Node, error: str, *, may_be_cured: bool) -> None:
        """Keeps the node's work, shown and not sent, until `unpark`; what the remote may come to allow is tried again."""
        self._failures.pop(node.ino, None)
        self._parking.park(node, error, may_be_cured=may_be_cured, clock=trio.current_time())
        self._emit("parked", self._nodes.local_path(node), error=error)
        self._look_at = min(self._look_at, self._parking.next_trial)

    def unpark(self, ino: int) -> None:
        """The node's work is tried again now."""
        if self._parking.unpark(ino):
            self._look_soon()

    def try_parked(self) -> None:
        """Somebody says that the remote may be another by now: what it denied is tried again soon."""
        self._parking.try_soon()
        self._look_soon()

    def parked_nodes(self) -> list[Node]:
        return [node for node, _ in self._parking.items()]

    def parked(self, mount: str) -> list[ParkedItem]:
        return [
            ParkedItem(
                mount=mount, path=self._nodes.local_path(node), step=_kind_of_work(node), size=node.size, error=work.error,
                at=work.at,
            )
            for node, work in self._parking.items()
        ]  # fmt: skip

    def all_stuck(self, nodes: Iterable[Node]) -> bool:
        """Whether all of these wait for a person, and nothing is at work that could change that."""
        idle = not self._running and not self._ready and not self._ready_large
        return idle and all(self._stuck_by(node) is not None for node in nodes)

    def _stuck_by(self, node: Node) -> str | None:
        """Why the node's work waits for a person: itself, a directory above it, or what is to replace it on the remote, is
        parked. None: it does not."""
        at: Node | None = node
        if node.removed and node.base_parent is not None:
            at = self._nodes.database.child(node.base_parent, node.base_name) or node
        while at is not None and at.ino != ROOT_INODE:
            if at.ino in self._parking and not self._parking.is_another(at):
                return self._parking.error(at.ino)
            at = None if at.parent is None else self._nodes.database.get(at.parent)
        return None

    # -- waiting for safety -------------------------------------------------------------------------------------------

    async def send_now(self, prefixes: Iterable[str]) -> AsyncIterator[tuple[list[Node], str]]:
        """Hurries what is unsent below these paths (relative to the mount; "" is all) and yields what is left, and what
        goes out now, whenever that changes, until nothing is left. Parked work stays in the list; it does not end then."""
        prefixes = list(prefixes)
        self._hurry += prefixes
        try:
            self._forgive()
            while True:
                changed = self._nodes.changed
                began = trio.current_time()
                left = [node for node in self._unsent() if _below_any(prefixes, *self._paths(node))]
                current = next((self._nodes.database.get(ino) for ino in self._running), None)
                cost = trio.current_time() - began
                yield left, "" if current is None else self._nodes.local_path(current)
                if not left:
                    return
                with trio.move_on_after(0.5):
                    await changed.wait()
                await trio.sleep(max(0.02, LOOK_SHARE * cost))  # many small files finish in one breath
        finally:
            for prefix in prefixes:
                self._hurry.remove(prefix)

    async def wait_until_safe(self, node: Node) -> None:
        """Returns when the remote has confirmed the node as it is now, by each of its names. Raises the reason when work on
        one of them is parked."""
        self._hurried[node.ino] += 1
        try:
            self._forgive()
            while unsent := [name for name in self._nodes.names(node) if name.to_send]:
                stuck = next(filter(None, map(self._stuck_by, unsent)), None)
                if stuck is not None:
                    raise RemoteError(stuck)
                await self._nodes.changed.wait()
        finally:
            self._hurried[node.ino] -= 1
            if not self._hurried[node.ino]:
                del self._hurried[node.ino]

    def _forgive(self) -> None:
        """Whoever asks for safety now does not wait for the next turn of what failed before."""
        for failure in self._failures.values():
            failure.next_at = 0.0
        self._look_soon()

    def _is_hurried(self, node: Node) -> bool:
        if node.ino in self._hurried or node.link_of in self._hurried:
            return True
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
        if node.ino in self._parking and node.to_send:
            return FileState.PARKED
        step = self._running.get(node.ino)
        if isinstance(step, Upload):
            return FileState.UPLOADING
        row = self._nodes.database.connection.execute("SELECT 1 FROM conflicts WHERE ino = ?", (node.ino,)).fetchone()
        return FileState.CONFLICT if row else None

    @property
    def parkings(self) -> int:
        """How often something was parked since the start."""
        return self._parking.count

    def write_error(self, node: Node) -> tuple[int, str] | None:
        """Of a file whose bytes, as they are now, were parked since the start: which parking that was, and why."""
        return self._parking.write_error(node)

    def failure(self, node: Node) -> Failure | None:
        return self._failures.get(node.ino)

    def queue(self, mount: str, limit: int = 1000) -> tuple[list[QueueItem], int]:
        """What is unsent, running first, and how much there is in all."""
        now, clock = self._nodes.now()[1], trio.current_time()
        unsent = self._unsent()
        unsent.sort(key=lambda node: (node.ino not in self._running, node.changed_at))
        items = []
        for node in unsent[:limit]:
            failure = self._failures.get(node.ino)
            step = self._running.get(node.ino)
            due_at = self._due_at(node, now, clock)
            state = (
                "running" if step is not None
                else "parked" if node.ino in self._parking
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
                    error=failure.error if failure else self._parking.error(node.ino) or "",
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
    names = {Upload: "upload", Move: "move", Remove: "remove", MakeDirectory: "make", SetAttributes: "attributes", Ask: "ask"}
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
