"""Decides which steps bring the remote nearer to what is local: a pure function from differences to ordered steps.

It knows nothing of paths, versions, requests, time or the order in which programs did things; it sees two trees over the
same inodes. Each node has a *local* position (where programs see it) and a *base* position (where the remote has it).
Every position names its directory by inode, so moving a directory moves all that is in it without touching a child.

How it works, in the order of the code:

1. **Needs.** A node that has to change its position needs others to do so first: the directory it goes to must have been
   made, the node that occupies its place on the remote must leave, a directory that goes to another directory needs the
   directories above it in place (or it might be asked to go below itself), and a directory that is removed needs all that
   the remote has in it to be gone. Following needs from the nodes that are due gives all that could be part of the plan.
2. **Blocked.** A step that is running holds its node, its path and the place it aims at. What would disturb it is
   blocked, and so is what needs something blocked. The nodes that are due and not blocked, with all they need, are planned.
3. **Three stages.** First every node goes to its place: moves, directories that are made, removals that something waits
   for. A circle of needs always holds a node that needs another's place; that other one is moved aside to a temporary
   name, and on from there in its turn. Then what nobody waits for is sent (uploads, symlinks, attributes); then
   the other removals, leaves first. Run one by one in this order, every step finds what it needs.
4. **After.** So that workers can run steps at the same time, the list is read again as if steps took locks: a step that
   makes, moves or removes something writes that node and the places it touches, and reads every directory above those
   places. A step comes after the last one that took one of its locks in a way that does not go together with its own.

A removed node whose remote place another node wants is never removed for its own sake: it stays until that one is sent,
so that the remote is not without either. Between two files the newcomer replaces the old one in a single request.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from nbmountd.model import ROOT_INODE, Kind

TEMPORARY_PREFIX = ".nbmountd-swap-"
"""A node in a circle of renames waits under this name and its inode number. It is moved on as if due, whenever it is."""


@dataclass(frozen=True, slots=True)
class Position:
    """A name in a directory. `parent` is the inode of the directory, `name` is never empty (except the root's)."""

    parent: int
    name: str


@dataclass(frozen=True, slots=True)
class Change:
    """One node that differs from its base, or that is needed to understand one that does.

    `local` is None when the node was removed, `base` is None when the remote never saw it. **While `busy`, `local` is
    where the running step will leave the node** (its present position for Upload and SetAttributes of a node that has
    one, None for Remove), even if programs have moved it on meanwhile: this is how the plan knows which place and which
    directories the step holds. A node that a running step replaces need not be busy itself.
    """

    ino: int
    kind: Kind
    local: Position | None
    base: Position | None
    content: bool
    """Unsent content of a file. Implied for a file or symlink without base (the target of a symlink never changes)."""
    attributes: bool
    """Attributes differ from those of the base."""
    due: bool
    """May be sent now: its write-back delay is over."""
    busy: bool
    """A step for it is running right now."""

    @property
    def in_place(self) -> bool:
        return self.local == self.base


@dataclass(frozen=True, slots=True)
class Step:
    """One remote operation on node `ino`. `after` holds the indexes (in the plan's tuple) of steps that must be done first.

    If one of those fails, this step must not run; call `plan` again.
    """

    ino: int
    after: frozenset[int] = field(default=frozenset(), kw_only=True)


@dataclass(frozen=True, slots=True)
class MakeDirectory(Step):
    """Make the directory, with its attributes. Its base is then `at`."""

    at: Position


@dataclass(frozen=True, slots=True)
class MakeSymlink(Step):
    """Make the symlink, with its attributes. Its base is then `at`."""

    at: Position


@dataclass(frozen=True, slots=True)
class Upload(Step):
    """Send content and attributes of the file to `at`.

    `replaces` None: a new file if it has no base, else on condition of its own base version. Otherwise it is the inode of
    the file to replace at `at`, on condition of that one's base version: the node takes over that one's base and id, and
    that one has none from then on.
    """

    at: Position
    replaces: int | None


@dataclass(frozen=True, slots=True)
class Move(Step):
    """Move the node from `source` to `target`, which may be a temporary name (then perhaps of a removed directory, whose
    place one of its children takes). Its base is then `target`.

    `replaces` is the inode of the file that is replaced at `target`, which has no base from then on; None: it is free.
    """

    source: Position
    target: Position
    replaces: int | None


@dataclass(frozen=True, slots=True)
class Remove(Step):
    """Remove the file, symlink or empty directory at `at`. It has no base from then on."""

    at: Position


@dataclass(frozen=True, slots=True)
class SetAttributes(Step):
    """Send the attributes of a node that is in its place on the remote."""


@dataclass(frozen=True, slots=True)
class Ask(Step):
    """Find out whether an earlier step of the node, which aimed at `at`, was carried out. Never planned here: for the plan
    that earlier step is still running."""

    at: Position


def plan(changes: Mapping[int, Change]) -> tuple[Step, ...]:
    """Steps that may run now, in an order in which they can run one by one; the same input gives the same steps.

    `changes` holds every node with work to do or a step running, and every directory above those, by local and by base
    position. What is not in it is taken to be clean and to exist. Empty when nothing is due or all that is due must wait
    for a running step. Linear in nodes times depth, apart from circles of renames. Raises nothing for changes in which
    both positions form a tree.
    """
    planner = _Planner(changes)
    wanted = planner.wanted()
    placed_first = planner.closure(ino for ino in wanted if changes[ino].local is not None)
    planner.put_in_place({ino for ino in placed_first if not planner.is_leaf_to_make(ino)})
    planner.send(wanted)
    planner.put_in_place(wanted - placed_first)
    return _with_after(planner.steps, changes)


class _Planner:
    """Collects `steps` for one call of `plan`. Everything else in it is derived from `changes` and does not change."""

    def __init__(self, changes: Mapping[int, Change]) -> None:
        self.changes = changes
        self.steps: list[Step] = []
        self.aside: dict[int, Position] = {}  # nodes that an earlier step of this plan moved to a temporary name
        self.needs: dict[int, list[int]] = {}
        self.occupant: dict[Position, int] = {}  # who is at a place on the remote
        self.taker: dict[Position, int] = {}  # who wants to be there and is not
        self.base_children: dict[int, list[int]] = defaultdict(list)
        for ino, change in sorted(changes.items()):
            if change.base is not None:
                self.occupant[change.base] = ino
                self.base_children[change.base.parent].append(ino)
            if change.local is not None and not change.in_place and _has_remote_form(change):
                self.taker[change.local] = ino

    # --- what is part of the plan ---

    def wanted(self) -> set[int]:
        """The nodes that are due and can be handled now, with all nodes that must change place for them."""
        due = [ino for ino, change in self.changes.items() if self._is_due(change)]
        found = self.closure(due)
        blocked = self._blocked(found)
        return self.closure(ino for ino in due if ino not in blocked)

    def closure(self, starts: Iterable[int]) -> set[int]:
        """`starts` and all they need, directly or not."""
        return _reachable(starts, self._needs_of)

    def _is_due(self, change: Change) -> bool:
        if not change.due and not _is_temporary(change.base):
            return False
        if change.local is None:
            return change.base is not None and change.base not in self.taker  # else the taker sees to it
        return _has_remote_form(change) and (not change.in_place or change.content or change.attributes)

    def _needs_of(self, ino: int) -> list[int]:
        """The nodes that must change their place before this one can."""
        if ino not in self.needs:
            self.needs[ino] = self._find_needs(self.changes[ino])
        return self.needs[ino]

    def _find_needs(self, change: Change) -> list[int]:
        if change.in_place:
            return []
        if change.local is None:
            return self.base_children.get(change.ino, [])
        needs = []
        occupant = self.occupant.get(change.local)
        if occupant is not None:
            needs.append(occupant)
        if change.kind is Kind.DIRECTORY and change.base is not None and change.base.parent != change.local.parent:
            needs.extend(above.ino for above in self._local_ancestors(change) if not above.in_place)
        else:  # the directory has to exist; where it is for the moment does not matter
            directory = self.changes.get(change.local.parent)
            if directory is not None and directory.ino != ROOT_INODE and directory.base is None:
                needs.append(directory.ino)
        return needs

    def _local_ancestors(self, change: Change) -> Iterator[Change]:
        """The directories above the node, nearest first, without the root."""
        seen = {change.ino, ROOT_INODE}  # where busy nodes pose as being elsewhere, the way up may be a circle
        above = change
        while above.local is not None and above.local.parent in self.changes and above.local.parent not in seen:
            above = self.changes[above.local.parent]
            seen.add(above.ino)
            yield above

    # --- what must wait for running steps ---

    def _blocked(self, candidates: set[int]) -> set[int]:
        """Those of `candidates` that would disturb a running step, and those that need one of these."""
        busy = [change for change in self.changes.values() if change.busy]
        children: dict[int, list[int]] = defaultdict(list)
        for ino in self.changes if busy else ():
            for parent in self._parents(ino):
                children[parent].append(ino)
        shifting = [change.ino for change in busy if change.kind is Kind.DIRECTORY and not change.in_place]
        untouchable = _reachable(shifting, lambda ino: children.get(ino, ())) | {change.ino for change in busy}
        held = _reachable((change.ino for change in busy), self._parents)
        aims = {change.local for change in busy if change.local is not None}

        needed_by: dict[int, list[int]] = defaultdict(list)
        blocked = []
        for ino in candidates:
            change = self.changes[ino]
            leaves = change.base is not None and not change.in_place
            if ino in untouchable or (leaves and ino in held) or change.local in aims:
                blocked.append(ino)
            for needed in self.needs[ino]:
                needed_by[needed].append(ino)
        return _reachable(blocked, lambda ino: needed_by.get(ino, ()))

    def _parents(self, ino: int) -> list[int]:
        """The directories that hold the node, by local and by base position; none for a node that is not in `changes`."""
        change = self.changes.get(ino)
        if change is None:
            return []
        return [position.parent for position in (change.local, change.base) if position is not None]

    # --- the stages ---

    def is_leaf_to_make(self, ino: int) -> bool:
        change = self.changes[ino]
        return change.base is None and change.kind is not Kind.DIRECTORY

    def put_in_place(self, group: set[int]) -> None:
        """Appends the moves, makes and removals of `group`, each after those it needs; the lowest inode first where free."""
        waits = {ino: {needed for needed in self.needs[ino] if needed in group} for ino in group}
        waited_for_by: dict[int, list[int]] = defaultdict(list)
        for ino, needed in waits.items():
            for other in needed:
                waited_for_by[other].append(ino)
        ready = [ino for ino, needed in waits.items() if not needed]
        heapq.heapify(ready)
        for start in sorted(group):
            while start in waits:
                if ready:
                    ino = heapq.heappop(ready)
                    del waits[ino]
                    self._append_placing(self.changes[ino])
                    released = [(other, ino) for other in waited_for_by[ino] if ino in waits.get(other, ())]
                else:
                    released = [self._move_one_aside(start, waits)]
                for other, needed_one in released:
                    waits[other].remove(needed_one)
                    if not waits[other]:
                        heapq.heappush(ready, other)

    def _append_placing(self, change: Change) -> None:
        if change.in_place or self._is_replaced(change):
            return
        if change.local is None:
            assert change.base is not None
            self.steps.append(Remove(change.ino, self.aside.get(change.ino, change.base)))
        elif change.base is None:
            self.steps.append(MakeDirectory(change.ino, change.local))
        else:
            source = self.aside.get(change.ino, change.base)
            self.steps.append(Move(change.ino, source, change.local, self._replaced_by(change)))

    def _move_one_aside(self, start: int, waits: Mapping[int, set[int]]) -> tuple[int, int]:
        """Breaks a circle that `start` waits for: moves an occupant aside; returns who wanted its place, and the occupant.

        There is one in every circle: a removed directory needs what was in it, a node needs directories above it, and
        neither way leads back without going through somebody's place.
        """
        way: dict[int, None] = {}
        ino = start
        while ino not in way:
            way[ino] = None
            ino = min(waits[ino])
        walked = list(way)
        circle = walked[walked.index(ino) :]
        pairs = zip(circle, circle[1:] + circle[:1], strict=True)
        occupant, wanting = min((other, one) for one, other in pairs if self.changes[one].local == self.changes[other].base)
        base = self.changes[occupant].base
        assert base is not None
        self.aside[occupant] = Position(base.parent, f"{TEMPORARY_PREFIX}{occupant}")
        self.steps.append(Move(occupant, base, self.aside[occupant], None))
        return wanting, occupant

    def send(self, wanted: set[int]) -> None:
        """Appends uploads, symlinks and attributes of the nodes that are due, all of which are in place by now."""
        for ino in sorted(wanted):
            change = self.changes[ino]
            if change.local is None or not change.due:
                continue
            if change.kind is Kind.FILE and (change.content or change.base is None):
                replaces = self._replaced_by(change) if change.base is None else None
                self.steps.append(Upload(ino, change.local, replaces))
            elif change.kind is Kind.SYMLINK and change.base is None:
                self.steps.append(MakeSymlink(ino, change.local))
            elif change.base is not None and change.attributes:
                self.steps.append(SetAttributes(ino))

    def _replaced_by(self, change: Change) -> int | None:
        """The removed file whose place this file takes in the same request, if there is one."""
        if change.local is None or change.in_place or change.kind is not Kind.FILE:
            return None
        occupant = self.occupant.get(change.local)
        if occupant is None or self.changes[occupant].local is not None:
            return None
        return occupant if self.changes[occupant].kind is Kind.FILE else None

    def _is_replaced(self, change: Change) -> bool:
        taker = None if change.local is not None or change.base is None else self.taker.get(change.base)
        return taker is not None and self._replaced_by(self.changes[taker]) == change.ino


def _with_after(steps: list[Step], changes: Mapping[int, Change]) -> tuple[Step, ...]:
    """The steps with `after` filled in: what each must wait for if they are started as early as possible."""
    parent = {ino: change.base.parent for ino, change in changes.items() if change.base is not None}
    shifting = {step.ino for step in steps if isinstance(step, (MakeDirectory, Move, Remove))}
    last_writer: dict[int | Position, int] = {}
    readers: dict[int | Position, set[int]] = defaultdict(set)  # since the last writer

    def above(directory: int) -> Iterator[int]:
        while directory != ROOT_INODE:
            if directory in shifting:
                yield directory
            if directory not in parent:
                return
            directory = parent[directory]

    finished: list[Step] = []
    for index, step in enumerate(steps):
        places = _touched(step)
        writes: list[int | Position] = [*places]
        reads: set[int] = set()
        if shifting:
            for place in places:
                reads.update(above(place.parent))
        if isinstance(step, SetAttributes):
            reads.add(step.ino)
            reads.update(above(parent.get(step.ino, ROOT_INODE)))
        else:
            writes.append(step.ino)
        after: set[int] = set()
        for key in writes:
            after |= readers.pop(key, set())
        after.update(last_writer[key] for key in (*writes, *reads) if key in last_writer)
        last_writer.update(dict.fromkeys(writes, index))
        for ino in reads:
            readers[ino].add(index)
        if isinstance(step, (Move, MakeDirectory)):
            parent[step.ino] = places[-1].parent
        finished.append(replace(step, after=frozenset(after)) if after else step)
    return tuple(finished)


def _touched(step: Step) -> list[Position]:
    """The places whose occupant the step changes; the last one is where the node then is."""
    if isinstance(step, Move):
        return [step.source, step.target]
    return [step.at] if isinstance(step, (MakeDirectory, MakeSymlink, Upload, Remove)) else []


def _has_remote_form(change: Change) -> bool:
    """FIFOs and sockets are for the processes of one machine: no step for them, ever."""
    return change.kind not in (Kind.FIFO, Kind.SOCKET)


def _is_temporary(position: Position | None) -> bool:
    return position is not None and position.name.startswith(TEMPORARY_PREFIX)


def _reachable(starts: Iterable[int], following: Callable[[int], Iterable[int]]) -> set[int]:
    """`starts` and all that `following` leads to from there."""
    found: set[int] = set()
    unseen = list(starts)
    while unseen:
        ino = unseen.pop()
        if ino not in found:
            found.add(ino)
            unseen.extend(following(ino))
    return found
