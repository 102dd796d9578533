"""Who may import whom (DESIGN.md, section 4), read from the source. The table is the rule; each failure names the line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nbmountd"

FOUNDATION = ("errors", "model", "threads", "log", "config", "units", "escapes")
CONTROL = (*FOUNDATION, "places", "control")

ALLOWED: dict[str, tuple[str, ...]] = {
    # values and small tools: each knows only what stands before it
    "errors": (),
    "units": (),
    "escapes": (),
    "model": ("errors", "escapes"),
    "threads": ("errors",),
    "log": ("errors",),
    "config": ("errors",),
    "places": ("errors",),
    "configfile": ("errors", "units", "log", "config", "places"),
    "accounts": ("errors", "config", "places", "configfile"),
    "configschema": ("config", "configfile"),
    # remotes know nothing of nodes, disks or the kernel
    "backends": (*FOUNDATION, "backends"),
    # the core: disk below fs below sync; of remotes only the contract, of the control socket only its words
    "disk": (*FOUNDATION, "disk"),
    "fs": (*FOUNDATION, "disk", "fs", "backends.base"),
    "sync": (*FOUNDATION, "disk", "fs", "sync", "backends.base", "control.schema"),
    # the kernel's side
    "fuse": (*FOUNDATION, "disk", "fs", "sync", "fuse"),
    # the mount helper is privileged: it imports next to nothing
    "mounthelper": ("errors",),
    "fuse.borrow": ("errors",),
    "namespace": ("errors",),
    "ways": ("errors", "namespace", "fuse.borrow"),
    # asking and being asked
    "control": CONTROL,
    "show": ("units", "control.schema"),
    "doctor": (*CONTROL, "configfile", "show", "ways", "doctor"),
    # whole programs
    "worker": ("",),
    "supervisor": ("",),
    "cli": ("",),
    "demo": ("",),
}
"""Module prefix -> prefixes that it may import; the longest prefix counts. "" is everything. A module that is in no row may
import everything too, except what FORBIDDEN says."""

FORBIDDEN: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    # who, what, except whom, why
    ("", "pyfuse3", ("fuse",), "only fuse/ knows pyfuse3"),
    ("", "nbmountd.worker", ("forkserver",), "a worker is started by name, in a process of its own"),
    ("", "nbmountd.demo", ("demo", "cli"), "the product does not need its demo"),
    ("", "nbmountd.cli", ("cli",), "nothing stands above the command line"),
    ("errors", "trio", (), "values do not wait"),
    ("model", "trio", (), "values do not wait"),
    ("disk.extents", "trio", (), "extents are pure"),
    ("sync.plan", "trio", (), "the plan is pure"),
    ("sync.plan", "sqlite3", (), "the plan is pure"),
    ("fs", "urllib3", (), "the core does not know how a remote is spoken to"),
    ("sync", "urllib3", (), "the core does not know how a remote is spoken to"),
)

SUPERVISOR_SIDE = ("supervisor", "keeper", "relay", "launch", "forkserver", "privileges", "systemd")
"""Runs in the process that does no remote I/O and outlives the workers."""

IN_THE_WORKER = (("forkserver", "nbmountd.worker"),)
"""Deferred imports in modules of the supervisor that are done only in the new process."""

AT_START = ("cli", "ctl", "link", "arguments", "errors")
"""Loaded before a command line knows its verb."""

SLOW = ("trio", "rich", "msgspec", "pyfuse3", "urllib3", "webdav3", "sqlite3", "asyncio", "nbmountd.backends")


@dataclass(frozen=True)
class Import:
    """One import: `module` (without the package's name) imports `target` (with it, for ours) at `place`."""

    module: str
    target: str
    place: str
    deferred: bool

    def __str__(self) -> str:
        return f"{self.place}: {self.module} imports {self.target}"


def below(module: str, prefix: str) -> bool:
    return prefix == "" or module == prefix or module.startswith(f"{prefix}.")


def read_imports(package: Path) -> list[Import]:
    """All imports in `package` but those for type checking only."""
    found = []
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node, deferred in _imports_in(tree, deferred=False):
            assert not isinstance(node, ast.ImportFrom) or node.level == 0, f"{file}:{node.lineno}: a relative import"
            place = f"{package.name}/{file.relative_to(package)}:{node.lineno}"
            found += [Import(module, target, place, deferred) for target in _targets(node, package)]
    return found


def _imports_in(node: ast.AST, *, deferred: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, deferred
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield from _imports_in(other, deferred=deferred)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports_in(child, deferred=deferred or inside)


def _targets(node: ast.Import | ast.ImportFrom, package: Path) -> list[str]:
    """Full names of the modules that are imported: `from a import b` is `a.b` where that is a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.module is not None
    if node.module.split(".")[0] != package.name:
        return [node.module]
    directory = package.parent.joinpath(*node.module.split("."))
    return sorted(
        {
            f"{node.module}.{alias.name}"
            if (directory / f"{alias.name}.py").exists() or (directory / alias.name / "__init__.py").exists()
            else node.module
            for alias in node.names
        }
    )


IMPORTS = read_imports(PACKAGE)


def breaks_the_order(imports: list[Import], allowed: dict[str, tuple[str, ...]]) -> list[str]:
    """One line for each import that the table does not allow."""
    broken = []
    for each in imports:
        row = max((prefix for prefix in allowed if below(each.module, prefix)), key=len, default=None)
        if row is None or not below(each.target, "nbmountd") or each.target == "nbmountd":
            continue
        target = each.target.removeprefix("nbmountd.")
        if not any(below(target, prefix) for prefix in allowed[row]):
            broken.append(f"{each}, but {row} may import only: {', '.join(allowed[row]) or 'nothing of ours'}")
    return broken


def test_imports_go_one_way() -> None:
    assert breaks_the_order(IMPORTS, ALLOWED) == []


@pytest.mark.parametrize(("who", "what", "exceptions", "why"), FORBIDDEN)
def test_what_is_forbidden_is_not_imported(who: str, what: str, exceptions: tuple[str, ...], why: str) -> None:
    broken = [
        f"{each}: {why}"
        for each in IMPORTS
        if below(each.module, who) and below(each.target, what) and not any(below(each.module, other) for other in exceptions)
    ]
    assert broken == []


def reached_from(modules: tuple[str, ...], *, deferred_too: bool) -> dict[str, str]:
    """What these modules import, and what that imports, and so on: full name -> the import that reached it first."""
    reached: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        for each in IMPORTS:
            if each.deferred and (not deferred_too or (each.module, each.target) in IN_THE_WORKER):
                continue
            if each.module == module and each.target not in reached:
                reached[each.target] = str(each)
                if below(each.target, "nbmountd"):
                    waiting.append(each.target.removeprefix("nbmountd").removeprefix("."))
    return reached


def test_the_command_lines_load_nothing_slow_before_they_know_the_verb() -> None:
    reached = reached_from(AT_START, deferred_too=False)

    assert [place for target, place in reached.items() if any(below(target, slow) for slow in SLOW)] == []


def test_the_supervisor_needs_neither_pyfuse3_nor_a_remote() -> None:
    """Its process must stay small and must not be able to hang on a remote."""
    reached = reached_from(SUPERVISOR_SIDE, deferred_too=True)
    unwanted = ("pyfuse3", "urllib3", "webdav3", "nbmountd.backends", "nbmountd.fs", "nbmountd.sync", "nbmountd.disk")

    assert [place for target, place in reached.items() if any(below(target, each) for each in unwanted)] == []


# --- the test itself ---------------------------------------------------------------------------------------------------


def test_a_broken_order_is_found_wherever_it_hides(tmp_path: Path) -> None:
    package = tmp_path / "nbmountd"
    (package / "fs").mkdir(parents=True)
    (package / "backends").mkdir()
    for name in ("__init__.py", "fs/__init__.py", "backends/__init__.py", "backends/base.py", "backends/webdav.py"):
        (package / name).write_text("")
    (package / "fs" / "reads.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "from nbmountd.backends.base import Backend\n"
        "if TYPE_CHECKING:\n    from nbmountd.fuse import session\n"
        "def f():\n    from nbmountd.backends import base, webdav\n"
    )

    broken = breaks_the_order(read_imports(package), ALLOWED)

    assert len(broken) == 1
    assert broken[0].startswith("nbmountd/fs/reads.py:6: fs.reads imports nbmountd.backends.webdav, but fs may import only")
