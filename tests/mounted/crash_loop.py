"""Kills a daemon again and again under a program that writes, and compares what is there with what the program was told.

Used by test_crash_loop.py and by the benchmark. It knows what is killed and when to look; what must be there then says
crash_model.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.mounted.crash_model import Item, Tree, compare, look
from tests.mounted.crash_writer import DIRECTORIES
from tests.mounted.harness import Daemon
from tests.mounted.kernel import eventually

ROOT = Path(__file__).parent.parent.parent

UNFINISHED = ".nbmountd-upload-"
"""What uploads that a worker died in leave behind on a server that takes no other way; no mount shows them."""


class Writing:
    """The writer's process, and how it is made to stand still."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def pause(self) -> None:
        """Returns when no operation is under way; it may have paused by itself, after a failure."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("pause\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "paused\n"

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(30) == 0


@contextmanager
def writing(mount: Path, manifest: Path, seed: int) -> Iterator[Writing]:
    for directory in filter(None, DIRECTORIES):
        (mount / directory).mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.mounted.crash_writer", str(mount), str(manifest), str(seed)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        yield Writing(process)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


@dataclass
class Outcome:
    """What a loop has seen. It ends at the first `differences`, of which there should be none."""

    kills: int = 0
    operations: int = 0
    """Calls of the writer that returned, each looked at after every later kill at which the loop looked."""
    differences: list[str] = field(default_factory=list)
    away: list[float] = field(default_factory=list)
    """Seconds from each kill until the mount answers again."""


@dataclass(frozen=True)
class Loop:
    """`kills` kills of the daemon that serves `mount`, over a server that keeps what it has in `remote`."""

    daemon: Daemon
    mount: Path
    remote: Path
    manifest: Path
    kills: int
    seed: int
    keeps_symlinks: bool = True
    """Apache keeps a symlink as a file with its target."""

    def kill_workers(self) -> Outcome:
        """The program notices nothing but a pause."""
        chance = random.Random(self.seed)
        outcome, tree = Outcome(), Tree(self.manifest)
        with writing(self.mount, self.manifest, self.seed) as writer:
            while outcome.kills < self.kills and not outcome.differences:
                # The moment is what is tested. Few die young: ten such in a minute are taken for a fault of the mount.
                time.sleep(chance.uniform(0.02, 0.3) if outcome.kills % 8 == 1 else chance.uniform(0.6, 1.0))
                pid = eventually(lambda: self.daemon.status(self.mount.name).pid, 30, "a worker")
                outcome.away.append(self._away(lambda pid=pid: os.kill(pid, signal.SIGKILL)))  # type: ignore[misc]
                outcome.kills += 1
                if outcome.kills % 3 == 0:
                    writer.pause()
                    outcome.differences += tree.differences(self.mount, may_be_undecided=False)
                    writer.go()
            self._end(writer, tree, outcome)
        return outcome

    def kill_everything(self) -> Outcome:
        """The program's calls fail; what happened before is there at the next start."""
        chance = random.Random(self.seed)
        outcome, tree = Outcome(), Tree(self.manifest)
        with writing(self.mount, self.manifest, self.seed) as writer:
            while outcome.kills < self.kills and not outcome.differences:
                time.sleep(chance.uniform(0.05, 0.7))

                def die_and_start() -> None:
                    self.daemon.abandon()
                    assert self.daemon.child is not None
                    self.daemon.child.wait(10)
                    writer.pause()
                    self.daemon.start()

                outcome.away.append(self._away(die_and_start))
                outcome.kills += 1
                outcome.differences += tree.differences(self.mount, may_be_undecided=True)
                writer.go()
            self._end(writer, tree, outcome)
        return outcome

    def _away(self, kill: Callable[[], None]) -> float:
        began = time.monotonic()
        kill()
        os.statvfs(self.mount)  # which the kernel never answers by itself
        return time.monotonic() - began

    def _end(self, writer: Writing, tree: Tree, outcome: Outcome) -> None:
        """The mount once more, then the server, then the mount when all is sent."""
        writer.pause()
        if not outcome.differences:
            outcome.differences += tree.differences(self.mount, may_be_undecided=False)
        if not outcome.differences:
            self.daemon.sync(timeout=300)
            outcome.differences += [f"on the server: {each}" for each in self._differences_on_the_server(tree)]
            outcome.differences += tree.differences(self.mount, may_be_undecided=False)
        outcome.operations = tree.lines // 2
        writer.end()

    def _differences_on_the_server(self, tree: Tree) -> list[str]:
        """Names, directories and bytes; modes and times have no place there."""
        expected = {
            name: Item("file", item.target.encode()) if item.kind == "symlink" else Item(item.kind, item.data)
            for name, item in tree.items.items()
            if self.keeps_symlinks or item.kind != "symlink"
        }
        there = {
            name: Item(item.kind, item.data) for name, item in look(self.remote).items()
            if not name.rpartition("/")[2].startswith(UNFINISHED)
        }  # fmt: skip
        return compare(expected, there)
