"""The promises of `plan`: first each rule by an example, then all together against a strict remote with several workers.

The model at the end makes random changes to a local tree, plans with random nodes due, starts and finishes steps in any
order that `after` allows (while programs go on, and with plans made before they did), and lets a request take effect
anywhere between start and finish. The remote refuses whatever a real one would refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbmountd.model import ROOT_INODE, Kind
from nbmountd.sync.plan import (
    TEMPORARY_PREFIX,
    Change,
    MakeDirectory,
    MakeSymlink,
    Move,
    Position,
    Remove,
    SetAttributes,
    Step,
    Upload,
    plan,
)

ROOT = Change(ROOT_INODE, Kind.DIRECTORY, Position(0, ""), Position(0, ""), False, False, False, False)


def change(
    kind: Kind,
    ino: int,
    local: tuple[int, str] | None,
    base: tuple[int, str] | None,
    *,
    content: bool = False,
    attributes: bool = False,
    due: bool = True,
    busy: bool = False,
) -> Change:
    return Change(
        ino, kind, Position(*local) if local else None, Position(*base) if base else None, content, attributes, due, busy
    )


def file(ino: int, local: tuple[int, str] | None, base: tuple[int, str] | None, **flags: bool) -> Change:
    return change(Kind.FILE, ino, local, base, **flags)


def directory(ino: int, local: tuple[int, str] | None, base: tuple[int, str] | None, **flags: bool) -> Change:
    return change(Kind.DIRECTORY, ino, local, base, **flags)


def plan_of(*changes: Change) -> list[Step]:
    return list(plan({one.ino: one for one in (ROOT, *changes)}))


def at(parent: int, name: str) -> Position:
    return Position(parent, name)


# --- rule 1: parents first, and only what is due ---


def test_new_parents_are_made_before_their_children() -> None:
    steps = plan_of(file(2, (3, "f"), None), directory(3, (4, "d"), None), directory(4, (1, "e"), None))

    assert steps == [
        MakeDirectory(4, at(1, "e")),
        MakeDirectory(3, at(4, "d"), after=frozenset({0})),
        Upload(2, at(3, "f"), None, after=frozenset({0, 1})),
    ]


def test_a_due_child_pulls_in_the_parent_that_is_not_due_and_not_its_siblings() -> None:
    steps = plan_of(directory(2, (1, "d"), None, due=False), file(3, (2, "f"), None), file(4, (2, "g"), None, due=False))

    assert steps == [MakeDirectory(2, at(1, "d")), Upload(3, at(2, "f"), None, after=frozenset({0}))]


def test_nothing_is_planned_when_nothing_is_due() -> None:
    assert plan_of(file(2, (1, "f"), None, due=False), file(3, (1, "h"), (1, "g"), due=False)) == []


def test_a_file_in_a_directory_whose_rename_is_not_due_is_sent_where_the_remote_has_the_directory() -> None:
    steps = plan_of(directory(2, (1, "new"), (1, "old"), due=False), file(3, (2, "f"), None))

    assert steps == [Upload(3, at(2, "f"), None)]


def test_a_directory_that_moves_below_another_waits_until_that_one_has_left_it() -> None:
    """a/b -> b, a -> b/a: the move of a is due, the one of b it cannot do without."""
    steps = plan_of(directory(2, (3, "a"), (1, "a")), directory(3, (1, "b"), (2, "b"), due=False))

    assert steps == [
        Move(3, at(2, "b"), at(1, "b"), None),
        Move(2, at(1, "a"), at(3, "a"), None, after=frozenset({0})),
    ]


# --- rule 2: taking the place of a removed file ---


def test_a_new_file_over_a_removed_one_is_one_conditional_upload() -> None:
    assert plan_of(file(2, None, (1, "f"), due=False), file(3, (1, "f"), None)) == [Upload(3, at(1, "f"), 2)]


def test_a_known_file_renamed_over_another_replaces_it_by_one_move_and_is_uploaded_afterwards() -> None:
    steps = plan_of(file(2, None, (1, "f")), file(3, (1, "f"), (1, "g"), content=True))

    assert steps == [Move(3, at(1, "g"), at(1, "f"), 2), Upload(3, at(1, "f"), None, after=frozenset({0}))]


def test_a_removed_file_waits_on_the_remote_for_its_successor() -> None:
    assert plan_of(file(2, None, (1, "f")), file(3, (1, "f"), None, due=False)) == []


def test_a_removed_directory_waits_on_the_remote_for_its_successor() -> None:
    assert plan_of(directory(2, None, (1, "f")), file(3, (1, "f"), None, due=False)) == []


def test_a_removed_file_does_not_wait_for_a_fifo_in_its_place() -> None:
    assert plan_of(file(2, None, (1, "f")), change(Kind.FIFO, 3, (1, "f"), None)) == [Remove(2, at(1, "f"))]


def test_a_replacement_of_another_kind_removes_first() -> None:
    steps = plan_of(change(Kind.SYMLINK, 2, None, (1, "f"), due=False), file(3, (1, "f"), None))

    assert steps == [Remove(2, at(1, "f")), Upload(3, at(1, "f"), None, after=frozenset({0}))]


def test_a_directory_renamed_over_an_empty_one_removes_that_first() -> None:
    steps = plan_of(directory(2, None, (1, "d"), due=False), directory(3, (1, "d"), (1, "e")))

    assert steps == [Remove(2, at(1, "d")), Move(3, at(1, "e"), at(1, "d"), None, after=frozenset({0}))]


def test_a_file_in_the_place_of_a_removed_tree_waits_for_the_removal_of_the_whole_tree() -> None:
    steps = plan_of(directory(2, None, (1, "d"), due=False), file(3, None, (2, "x"), due=False), file(4, (1, "d"), None))

    assert steps == [
        Remove(3, at(2, "x")),
        Remove(2, at(1, "d"), after=frozenset({0})),
        Upload(4, at(1, "d"), None, after=frozenset({1})),
    ]


# --- rule 3: places that others are about to leave ---


def test_a_backup_is_moved_away_before_the_new_file_takes_its_place() -> None:
    steps = plan_of(file(2, (1, "f~"), (1, "f"), due=False), file(3, (1, "f"), None))

    assert steps == [Move(2, at(1, "f"), at(1, "f~"), None), Upload(3, at(1, "f"), None, after=frozenset({0}))]


def test_a_chain_of_renames_starts_at_its_free_end() -> None:
    steps = plan_of(*(file(ino, (1, f"log.{ino}"), (1, f"log.{ino - 1}")) for ino in range(2, 2000)))

    assert [step.ino for step in steps] == list(range(1999, 1, -1))


def test_two_files_swap_through_a_temporary_name() -> None:
    steps = plan_of(file(2, (1, "b"), (1, "a")), file(3, (1, "a"), (1, "b"), due=False))

    temporary = at(1, f"{TEMPORARY_PREFIX}2")
    assert steps == [
        Move(2, at(1, "a"), temporary, None),
        Move(3, at(1, "b"), at(1, "a"), None, after=frozenset({0})),
        Move(2, temporary, at(1, "b"), None, after=frozenset({0, 1})),
    ]


@pytest.mark.parametrize(("above", "below"), [(2, 3), (3, 2)])
def test_a_directory_and_its_own_child_swap_through_a_temporary_name(above: int, below: int) -> None:
    """a/b -> a, a -> a/b: a must leave its place before b can have it, and b must leave a before a can go below it."""
    steps = plan_of(directory(above, (below, "b"), (1, "a")), directory(below, (1, "a"), (above, "b")))

    temporary = at(1, f"{TEMPORARY_PREFIX}{above}")
    assert steps == [
        Move(above, at(1, "a"), temporary, None),
        Move(below, at(above, "b"), at(1, "a"), None, after=frozenset({0})),
        Move(above, temporary, at(below, "b"), None, after=frozenset({0, 1})),
    ]


def test_a_child_that_takes_the_place_of_its_removed_parent_leaves_it_first() -> None:
    """mv d/x t; rmdir d; mv t d: d is moved aside, because x must be out of it before it can be removed."""
    steps = plan_of(directory(2, None, (1, "d")), file(3, (1, "d"), (2, "x")))

    temporary = at(1, f"{TEMPORARY_PREFIX}2")
    assert [type(step) for step in steps] == [Move, Move, Remove]
    assert steps[0] == Move(2, at(1, "d"), temporary, None)
    assert steps[1] == Move(3, at(2, "x"), at(1, "d"), None, after=frozenset({0}))
    assert steps[2] == Remove(2, temporary, after=frozenset({0, 1}))


def test_a_node_left_at_a_temporary_name_is_moved_on_even_if_it_is_not_due() -> None:
    temporary = (1, f"{TEMPORARY_PREFIX}2")

    assert plan_of(file(2, (1, "b"), temporary, due=False)) == [Move(2, at(*temporary), at(1, "b"), None)]


def test_a_file_that_is_not_due_is_only_moved_when_its_place_is_needed() -> None:
    steps = plan_of(file(2, (1, "f~"), (1, "f"), content=True, attributes=True, due=False), file(3, (1, "f"), None))

    assert [step for step in steps if step.ino == 2] == [Move(2, at(1, "f"), at(1, "f~"), None)]


# --- rule 4: removals ---


def test_a_directory_is_removed_after_what_was_moved_out_and_what_was_removed_in_it() -> None:
    steps = plan_of(directory(2, None, (1, "d")), file(3, None, (2, "x"), due=False), file(4, (1, "y"), (2, "y"), due=False))

    assert steps == [
        Move(4, at(2, "y"), at(1, "y"), None),
        Remove(3, at(2, "x")),
        Remove(2, at(1, "d"), after=frozenset({0, 1})),
    ]


def test_a_directory_is_not_removed_while_a_step_runs_for_something_in_it() -> None:
    steps = plan_of(directory(2, None, (1, "d")), file(3, None, (2, "x"), busy=True), file(4, None, (2, "y")))

    assert steps == [Remove(4, at(2, "y"))]


def test_removals_that_nobody_waits_for_come_last() -> None:
    steps = plan_of(file(2, None, (1, "a")), file(3, (1, "b"), None), file(4, (1, "d"), (1, "c")))

    assert [type(step) for step in steps] == [Move, Upload, Remove]


# --- rule 5: nothing runs below a directory that moves ---


def test_what_acts_below_a_moved_directory_comes_after_the_move() -> None:
    steps = plan_of(
        directory(9, (1, "new"), (1, "old")),
        file(3, (9, "made"), None),
        file(4, (9, "written"), (9, "written"), content=True),
        file(5, None, (9, "removed")),
        file(6, (1, "out"), (9, "out")),
        file(7, (8, "mode"), (8, "mode"), attributes=True),
        directory(8, (9, "below"), (9, "below"), due=False),
    )

    move = steps.index(Move(9, at(1, "old"), at(1, "new"), None, after=steps[_index_of(steps, 9)].after))
    below = {step.ino: step for step in steps if step.ino in (3, 4, 5, 7)}
    assert sorted(below) == [3, 4, 5, 7]
    assert all(move in step.after for step in below.values())
    assert steps[_index_of(steps, 6)].after or steps[move].after, "the move out of it does not run beside the move"


def _index_of(steps: list[Step], ino: int) -> int:
    return next(index for index, step in enumerate(steps) if step.ino == ino)


# --- rule 6: running steps are not disturbed ---


def test_a_busy_node_gets_no_step() -> None:
    assert plan_of(file(2, (1, "f"), (1, "f"), content=True, busy=True)) == []


def test_nothing_is_planned_below_a_directory_that_is_being_moved_or_made() -> None:
    moving = directory(2, (1, "new"), (1, "old"), busy=True)

    assert plan_of(moving, file(3, (2, "f"), None), file(4, (1, "g"), (2, "g")), file(5, None, (2, "h"))) == []
    assert plan_of(directory(2, (1, "new"), None, busy=True), file(3, (2, "f"), None)) == []


def test_steps_go_on_below_a_directory_whose_attributes_are_being_set() -> None:
    busy = directory(2, (1, "d"), (1, "d"), attributes=True, busy=True)

    assert plan_of(busy, file(3, (2, "f"), None)) == [Upload(3, at(2, "f"), None)]


def test_a_directory_is_not_moved_while_a_step_runs_anywhere_below() -> None:
    steps = plan_of(
        directory(2, (1, "new"), (1, "old")),
        directory(3, (2, "d"), (2, "d"), due=False),
        file(4, (3, "f"), (3, "f"), content=True, busy=True),
        directory(5, (1, "old"), None),
        file(6, (1, "free"), None),
    )

    assert steps == [Upload(6, at(1, "free"), None)], "nor is what waits for its place sent"


def test_a_directory_is_not_moved_while_something_is_moved_into_it() -> None:
    assert plan_of(directory(2, (1, "new"), (1, "old")), file(3, (2, "f"), (1, "f"), busy=True)) == []


def test_the_place_a_running_step_aims_at_is_taken() -> None:
    running = file(2, (1, "f"), None, busy=True)

    assert plan_of(running, file(3, None, (1, "f"))) == [], "it is being replaced"
    assert plan_of(running, file(3, (1, "f"), None)) == []


def test_the_places_of_busy_nodes_may_make_circles_with_those_of_others() -> None:
    """e/d (attributes being set) was moved out of e meanwhile, e into it, and x into e: for the plan d is still in e."""
    steps = plan_of(
        directory(2, (3, "e"), (1, "e")),
        directory(3, (2, "d"), (2, "d"), attributes=True, busy=True),
        directory(4, (2, "x"), (1, "x")),
    )

    assert steps == []


def test_a_place_whose_occupant_is_busy_is_waited_for() -> None:
    assert plan_of(file(2, None, (1, "f"), busy=True), file(3, (1, "f"), None)) == []


# --- rules 7 to 10 ---


def test_a_file_that_was_renamed_and_written_is_moved_and_then_uploaded() -> None:
    steps = plan_of(file(2, (1, "g"), (1, "f"), content=True, attributes=True))

    assert steps == [Move(2, at(1, "f"), at(1, "g"), None), Upload(2, at(1, "g"), None, after=frozenset({0}))]


def test_attributes_are_set_after_the_move_and_not_beside_what_carries_them() -> None:
    steps = plan_of(
        file(2, (1, "g"), (1, "f"), attributes=True),
        directory(3, (1, "d"), None, attributes=True),
        change(Kind.SYMLINK, 4, (1, "s"), None, content=True, attributes=True),
        file(5, (1, "h"), (1, "h"), content=True, attributes=True),
    )

    assert [step for step in steps if isinstance(step, SetAttributes)] == [SetAttributes(2, after=frozenset({0}))]
    assert MakeSymlink(4, at(1, "s")) in steps
    assert len(steps) == 5


def test_fifos_and_sockets_stay_local() -> None:
    assert plan_of(change(Kind.FIFO, 2, (1, "p"), None), change(Kind.SOCKET, 3, (1, "s"), None, attributes=True)) == []


def test_what_was_made_and_removed_between_two_plans_gives_no_step() -> None:
    assert plan_of(file(2, None, None, content=True), directory(3, None, None)) == []


def test_an_empty_new_file_is_uploaded() -> None:
    assert plan_of(file(2, (1, "f"), None, content=False)) == [Upload(2, at(1, "f"), None)]


def test_the_order_of_the_input_does_not_matter() -> None:
    changes = [ROOT, *(file(ino, (1, f"n{(ino + 1) % 50}"), (1, f"n{ino % 50}")) for ino in range(50, 100))]

    forwards = plan({one.ino: one for one in changes})

    assert plan({one.ino: one for one in reversed(changes)}) == forwards


# --- everything together ---


class RefusedError(AssertionError):
    """The remote would have refused this request."""


@dataclass
class RemoteObject:
    kind: Kind
    content: int = 0
    mode: int = 0
    version: int = 0
    children: dict[str, int] = field(default_factory=dict)


Path = tuple[str, ...]


class StrictRemote:
    """A remote that is spoken to by paths and keeps objects by id; everything doubtful is refused."""

    def __init__(self) -> None:
        self.objects = {0: RemoteObject(Kind.DIRECTORY)}
        self.last_id = 0

    def id_at(self, path: Path) -> int:
        found = 0
        for name in path:
            if name not in self.objects[found].children:
                raise RefusedError(f"nothing at {path}")
            found = self.objects[found].children[name]
        return found

    def _free_place(self, path: Path) -> dict[str, int]:
        parent = self.objects[self.id_at(path[:-1])]
        if parent.kind is not Kind.DIRECTORY or path[-1] in parent.children:
            raise RefusedError(f"{path} is not free")
        return parent.children

    def make(self, path: Path, kind: Kind, content: int, mode: int) -> int:
        place = self._free_place(path)
        self.last_id += 1
        place[path[-1]] = self.last_id
        self.objects[self.last_id] = RemoteObject(kind, content, mode)
        return self.last_id

    def replace_content(self, path: Path, content: int, mode: int, id_: int, version: int) -> int:
        found = self.objects[self.id_at(path)]
        if self.id_at(path) != id_ or found.version != version or found.kind is not Kind.FILE:
            raise RefusedError(f"{path} is not the expected version")
        found.content, found.mode, found.version = content, mode, version + 1
        return id_

    def move(self, source: Path, target: Path, id_: int, replaces: int | None) -> int:
        if self.id_at(source) != id_ or target[: len(source)] == source:
            raise RefusedError(f"{source} cannot go to {target}")
        if replaces is not None:
            if self.id_at(target) != replaces or self.objects[replaces].kind is not Kind.FILE:
                raise RefusedError(f"{target} is not the expected file")
            self.remove(target, replaces)
        self._free_place(target)[target[-1]] = id_
        del self.objects[self.id_at(source[:-1])].children[source[-1]]
        return id_

    def remove(self, path: Path, id_: int) -> int:
        if self.id_at(path) != id_ or self.objects[id_].children:
            raise RefusedError(f"{path} is not empty or not the expected object")
        del self.objects[self.id_at(path[:-1])].children[path[-1]]
        del self.objects[id_]
        return id_

    def set_mode(self, path: Path, mode: int) -> int:
        found = self.id_at(path)
        self.objects[found].mode = mode
        return found

    def tree(self, path: Path = ()) -> dict[Path, tuple[Kind, int, int]]:
        found = {}
        for name, id_ in self.objects[self.id_at(path)].children.items():
            one, below = self.objects[id_], (*path, name)
            found[below] = (one.kind, one.content, one.mode)
            found.update(self.tree(below))
        return found


@dataclass
class Node:
    ino: int
    kind: Kind
    local: Position | None
    content: int = 0
    mode: int = 0
    base: Position | None = None
    id: int | None = None
    sent_content: int = 0
    sent_mode: int = 0

    @property
    def has_unsent_content(self) -> bool:
        return self.kind is Kind.FILE and self.base is not None and self.content != self.sent_content

    @property
    def has_unsent_attributes(self) -> bool:
        return self.base is not None and self.mode != self.sent_mode


@dataclass
class Running:
    step: Step
    paths: list[Path]
    content: int
    mode: int
    request: Callable[[], int]
    answer: int | None


class Mount(RuleBasedStateMachine):
    """Programs, planner, workers and remote. Numbers given to the rules choose among what there is at that moment."""

    # --- set-up and programs ---

    @initialize(busy=st.booleans())
    def start_mount(self, busy: bool) -> None:
        self.marks_replaced_as_busy = busy
        self.remote = StrictRemote()
        self.nodes = {ROOT_INODE: Node(ROOT_INODE, Kind.DIRECTORY, Position(0, ""), base=Position(0, ""), id=0)}
        self.last_content = 0
        self.steps: tuple[Step, ...] = ()
        self.done: set[int] = set()
        self.started: set[int] = set()
        self.running: dict[int, Running] = {}

    def live(self, *kinds: Kind) -> list[Node]:
        return [n for n in self.nodes.values() if n.local and n.ino != ROOT_INODE and (not kinds or n.kind in kinds)]

    def at_local(self, position: Position) -> Node | None:
        return next((node for node in self.live() if node.local == position), None)

    def is_below(self, node: Node, above: Node) -> bool:
        while node.ino != ROOT_INODE and node is not above:
            assert node.local is not None
            node = self.nodes[node.local.parent]
        return node is above

    def place(self, parent: int, name: str) -> Position:
        directories = [ROOT_INODE, *(node.ino for node in self.live(Kind.DIRECTORY))]
        return Position(directories[parent % len(directories)], name)

    def children(self, node: Node) -> list[Node]:
        return [other for other in self.live() if other.local and other.local.parent == node.ino]

    def new_content(self) -> int:
        self.last_content += 1
        return self.last_content

    PARENTS = st.integers(0, 5)
    NAMES = st.sampled_from("abc")
    CHOICES = st.integers(0, 12)
    KINDS = st.sampled_from([Kind.FILE, Kind.DIRECTORY, Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK, Kind.FIFO])

    @rule(parent=PARENTS, name=NAMES, kind=KINDS)
    def create(self, parent: int, name: str, kind: Kind) -> None:
        place = self.place(parent, name)
        if self.at_local(place) is None:
            ino = max(self.nodes) + 1
            self.nodes[ino] = Node(ino, kind, place, self.new_content() if kind is Kind.SYMLINK else 0)

    @precondition(lambda self: self.live(Kind.FILE))
    @rule(choice=CHOICES)
    def write(self, choice: int) -> None:
        files = self.live(Kind.FILE)
        files[choice % len(files)].content = self.new_content()

    @precondition(lambda self: self.live())
    @rule(choice=CHOICES, mode=st.integers(0, 2))
    def change_mode(self, choice: int, mode: int) -> None:
        self.live()[choice % len(self.live())].mode = mode

    @precondition(lambda self: self.live())
    @rule(choice=CHOICES, parent=PARENTS, name=NAMES)
    def rename(self, choice: int, parent: int, name: str) -> None:
        self.rename_to(self.live()[choice % len(self.live())], self.place(parent, name))

    def rename_to(self, node: Node, place: Position) -> None:
        target = self.at_local(place)
        if target is node or self.is_below(self.nodes[place.parent], node):
            return
        if target is not None:
            both = (node.kind is Kind.DIRECTORY) + (target.kind is Kind.DIRECTORY)
            if both == 1 or self.children(target):
                return
            target.local = None
        node.local = place

    @precondition(lambda self: len(self.live()) > 1)
    @rule(one=CHOICES, other=CHOICES)
    def exchange(self, one: int, other: int) -> None:
        first, second = self.live()[one % len(self.live())], self.live()[other % len(self.live())]
        if not self.is_below(first, second) and not self.is_below(second, first):
            first.local, second.local = second.local, first.local

    @precondition(lambda self: self.live(Kind.DIRECTORY))
    @rule(choice=CHOICES)
    def swap_with_own_child(self, choice: int) -> None:
        """mv a/b t; mv a t/b; mv t a"""
        directories = self.live(Kind.DIRECTORY)
        above = directories[choice % len(directories)]
        below = next((child for child in self.children(above) if child.kind is Kind.DIRECTORY), None)
        if below is not None and above.local and below.local:
            inner_name = below.local.name
            if all(child.local and child.local.name != inner_name for child in self.children(below)):
                below.local, above.local = above.local, Position(below.ino, inner_name)

    @precondition(lambda self: self.live())
    @rule(choice=CHOICES)
    def remove(self, choice: int) -> None:
        node = self.live()[choice % len(self.live())]
        if not self.children(node):
            node.local = None

    @precondition(lambda self: self.live(Kind.FILE))
    @rule(choice=CHOICES)
    def save_by_renaming_a_temporary_file_over(self, choice: int) -> None:
        node = self.live(Kind.FILE)[choice % len(self.live(Kind.FILE))]
        ino = max(self.nodes) + 1
        self.nodes[ino] = Node(ino, Kind.FILE, node.local, self.new_content())
        node.local = None

    # --- the planner ---

    def path_of(self, position: Position) -> Path:
        path: Path = (position.name,)
        while position.parent != ROOT_INODE:
            base = self.nodes[position.parent].base
            if base is None:
                raise RefusedError(f"the parent of {path} is not on the remote")
            position = base
            path = (position.name, *path)
        return path

    def posed_local(self, node: Node) -> Position | None:
        running = self.running.get(node.ino)
        if running is None:
            return node.local
        return node.base if isinstance(running.step, SetAttributes) else _leads_to(running.step)

    def changes(self, is_due: Callable[[int], bool]) -> dict[int, Change]:
        replaced = {_replaced(one.step) for one in self.running.values()} if self.marks_replaced_as_busy else set()
        found: dict[int, Change] = {}
        unseen = [
            node.ino
            for node in self.nodes.values()
            if node.local != node.base or node.has_unsent_content or node.has_unsent_attributes or node.ino in self.running
        ]
        while unseen:
            node = self.nodes[unseen.pop()]
            if node.ino in found:
                continue
            local = self.posed_local(node)
            found[node.ino] = Change(
                node.ino,
                node.kind,
                local,
                node.base,
                node.has_unsent_content,
                node.has_unsent_attributes,
                is_due(node.ino),
                node.ino in self.running or node.ino in replaced,
            )
            unseen += [position.parent for position in (local, node.base) if position is not None and position.parent]
        return found

    @rule(mask=st.integers(0, 255), density=st.sampled_from(["some", "all", "all"]))
    def make_plan(self, mask: int, density: str) -> None:
        self.plan(lambda ino: density == "all" or bool(mask >> (ino % 8) & 1))

    def plan(self, is_due: Callable[[int], bool]) -> None:
        changes = self.changes(is_due)
        self.steps = plan(changes)
        self.done, self.started = set(), set()

        assert plan(dict(reversed(changes.items()))) == self.steps
        none_due = {ino: replace(change, due=False) for ino, change in changes.items()}
        assert plan(none_due) == () or _has_temporary(changes), "nothing due, nothing done"
        for index, step in enumerate(self.steps):
            node = self.nodes[step.ino]
            assert all(0 <= other < index for other in step.after)
            assert not changes[step.ino].busy
            assert node.kind in (Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK)
            assert node.local is not None or node.base is not None, "made and removed again"
            if isinstance(step, Remove) and node.kind is Kind.FILE:
                successors = [one for one in changes.values() if one.local == node.base and one.kind is Kind.FILE]
                assert successors == [], "a file is replaced by its successor, never removed before that one is there"
        for ino in {step.ino for step in self.steps}:
            self.check_steps_of(ino, [step for step in self.steps if step.ino == ino])

    def check_steps_of(self, ino: int, steps: list[Step]) -> None:
        """No request more than needed: aside at most once, then to the place, then one that sends."""
        kinds = [type(step) for step in steps]
        if self.nodes[ino].base is None:
            assert len(kinds) == 1, "a new node is one request"
        assert kinds.count(Move) <= 2
        assert len([kind for kind in kinds if kind is not Move]) <= 1

    # --- the workers ---

    def startable(self) -> list[int]:
        return [
            index
            for index, step in enumerate(self.steps)
            if index not in self.started and step.after <= self.done and not self.is_obsolete(step)
        ]

    def is_obsolete(self, step: Step) -> bool:
        """Removed since the plan was made: there are no bytes to send. What comes after it is not started either."""
        return self.nodes[step.ino].local is None and isinstance(step, (Upload, MakeSymlink, MakeDirectory, SetAttributes))

    @precondition(lambda self: self.startable())
    @rule(choice=CHOICES, early=st.booleans())
    def start_step(self, choice: int, early: bool) -> None:
        indexes = self.startable()
        self.start(indexes[choice % len(indexes)], early)

    def start(self, index: int, early: bool) -> None:
        step = self.steps[index]
        node = self.nodes[step.ino]
        assert step.ino not in self.running
        self.started.add(index)
        request = self.request_for(step, node)
        running = Running(step, self.paths(step), node.content, node.mode, request, None)
        if early:
            running.answer = request()
        self.running[step.ino] = running

    def paths(self, step: Step) -> list[Path]:
        if isinstance(step, SetAttributes):
            base = self.nodes[step.ino].base
            assert base is not None
            return [self.path_of(base) if step.ino != ROOT_INODE else ()]
        if isinstance(step, Move):
            return [self.path_of(step.source), self.path_of(step.target)]
        assert isinstance(step, (MakeDirectory, MakeSymlink, Upload, Remove))
        return [self.path_of(step.at)]

    def request_for(self, step: Step, node: Node) -> Callable[[], int]:
        paths, content, mode, remote = self.paths(step), node.content, node.mode, self.remote
        if isinstance(step, (MakeDirectory, MakeSymlink)):
            assert node.base is None
            kind = Kind.DIRECTORY if isinstance(step, MakeDirectory) else Kind.SYMLINK
            assert node.kind is kind
            return lambda: remote.make(paths[0], kind, content, mode)
        if isinstance(step, Upload):
            replaced = node if step.replaces is None else self.nodes[step.replaces]
            assert replaced is node or (replaced.local is None and node.base is None)
            id_ = replaced.id
            if id_ is None:
                return lambda: remote.make(paths[0], Kind.FILE, content, mode)
            version = remote.objects[id_].version
            return lambda: remote.replace_content(paths[0], content, mode, id_, version)
        own = node.id
        assert own is not None
        if isinstance(step, Move):
            assert node.base == step.source
            over = None if step.replaces is None else self.nodes[step.replaces].id
            assert step.replaces is None or self.nodes[step.replaces].local is None
            return lambda: remote.move(paths[0], paths[1], own, over)
        if isinstance(step, Remove):
            assert node.local is None and node.base == step.at
            return lambda: remote.remove(paths[0], own)
        return lambda: remote.set_mode(paths[0], mode)

    @precondition(lambda self: self.running)
    @rule(choice=CHOICES)
    def finish_step(self, choice: int) -> None:
        self.finish(sorted(self.running)[choice % len(self.running)])

    def finish(self, ino: int) -> None:
        running, node = self.running[ino], self.nodes[ino]
        step = running.step
        assert self.paths(step) == running.paths, "the path shifted under a running step"
        answer = running.request() if running.answer is None else running.answer
        replaced = _replaced(step)
        if replaced is not None:
            self.nodes[replaced].base = self.nodes[replaced].id = None
        if isinstance(step, Remove):
            node.base = node.id = None
        else:
            node.id = answer
            node.base = _leads_to(step) or node.base
            if not isinstance(step, Move):
                node.sent_mode = running.mode
            if isinstance(step, (Upload, MakeSymlink)):
                node.sent_content = running.content
        del self.running[ino]
        for index, planned in enumerate(self.steps):
            if planned is step:
                self.done.add(index)

    @invariant()
    def what_is_in_the_local_tree_and_was_sent_is_still_on_the_remote(self) -> None:
        for node in self.live() if hasattr(self, "nodes") else ():
            assert node.id is None or node.id in self.remote.objects
            if node.id is not None and node.ino not in self.running and node.kind is Kind.FILE:
                assert self.remote.objects[node.id].content == node.sent_content

    # --- the end ---

    def teardown(self) -> None:
        if hasattr(self, "nodes"):
            self.send_all()

    @rule()
    def send_all(self) -> None:
        for ino in list(self.running):
            self.finish(ino)
        self.plan(lambda ino: True)
        while indexes := self.startable():  # the latest first: as far from the order of the plan as `after` allows
            self.start(indexes[-1], early=False)
            self.finish(self.steps[indexes[-1]].ino)
        self.plan(lambda ino: True)

        assert self.steps == (), "one round does it all when nothing runs beside it"
        assert self.remote.tree() == dict(self.local_tree())

    def local_tree(self) -> Iterable[tuple[Path, tuple[Kind, int, int]]]:
        for node in self.live(Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK):
            names: Path = ()
            above = node
            while above.ino != ROOT_INODE:
                assert above.local is not None
                names = (above.local.name, *names)
                above = self.nodes[above.local.parent]
            yield names, (node.kind, node.content, node.mode)


def _replaced(step: Step) -> int | None:
    return step.replaces if isinstance(step, (Upload, Move)) else None


def _leads_to(step: Step) -> Position | None:
    if isinstance(step, Move):
        return step.target
    return step.at if isinstance(step, (MakeDirectory, MakeSymlink, Upload)) else None


def _has_temporary(changes: dict[int, Change]) -> bool:
    """Whether some node waits at a temporary name, which is reason enough for steps."""
    return any(c.base is not None and c.base.name.startswith(TEMPORARY_PREFIX) for c in changes.values())


TestMount = Mount.TestCase
TestMount.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
