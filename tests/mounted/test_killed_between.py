"""A worker that dies when it has carried out a request and not answered it: the request comes again, and is recognised.

For each call that must not be carried out twice, and for those that may. The kernel sends again what was not answered (Linux
6.9 and later).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mounted import modes
from tests.mounted.conftest import directory_mount
from tests.mounted.harness import Daemon, daemon_over
from tests.mounted.kernel import same_tree

pytestmark = pytest.mark.expects_log("worker ended unasked.*SIGKILL")


@dataclass(frozen=True)
class Aim:
    """`mount` over `source`; `at(request)` makes the worker die at the next such request."""

    daemon: Daemon
    mount: Path
    source: Path
    place: Path

    def at(self, request: str) -> None:
        (self.place / request).touch()
        os.chown(self.place / request, *modes.OWNER)


@pytest.fixture(scope="module")
def aim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aim]:
    with pytest.MonkeyPatch.context() as patch:
        place, source = tmp_path_factory.mktemp("requests"), tmp_path_factory.mktemp("source")
        place.chmod(0o777)
        patch.setenv("KILL_BETWEEN", str(place))
        path = [str(Path(__file__).with_name("killed_between")), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        with daemon_over({"folder": {**directory_mount(source), "write_back_delay": 3600.0}}) as daemon:
            yield Aim(daemon, daemon.path("folder"), source, place)


def exclusively(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def append(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        assert file.write(b", and more") == 10


CALLS: dict[str, tuple[str, Callable[[Path], object], dict[str, object]]] = {
    "create": ("create", lambda at: exclusively(at / "new"), {"new": b""}),
    "mkdir": ("mkdir", lambda at: (at / "new").mkdir(), {"new": None}),
    "mkfifo": ("mknod", lambda at: os.mknod(at / "new", 0o100644), {"new": b""}),
    "symlink": ("symlink", lambda at: (at / "new").symlink_to("file"), {"new": "file"}),
    "link": ("link", lambda at: os.link(at / "file", at / "new"), {"new": b"content"}),
    "unlink": ("unlink", lambda at: (at / "file").unlink(), {"file": 0}),
    "rmdir": ("rmdir", lambda at: (at / "empty").rmdir(), {"empty": 0}),
    "rename": ("rename", lambda at: (at / "file").rename(at / "new"), {"file": 0, "new": b"content"}),
    "rename over": ("rename", lambda at: (at / "file").rename(at / "other"), {"file": 0, "other": b"content"}),
    "truncate": ("setattr", lambda at: os.truncate(at / "file", 3), {"file": b"con"}),
    "open with O_TRUNC": ("open", lambda at: (at / "file").write_bytes(b"anew"), {"file": b"anew"}),
    "write at the end": ("write", lambda at: append(at / "file"), {"file": b"content, and more"}),
}
"""The request, the call that makes it, and what is to be so then: content, None for a directory, a target, 0 for nothing."""


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_was_carried_out_and_not_answered_succeeds_and_happens_once(aim: Aim, name: str) -> None:
    request, call, changed = CALLS[name]
    at = aim.mount / name
    (at / "empty").mkdir(parents=True)
    (at / "file").write_bytes(b"content")
    (at / "other").write_bytes(b"another")
    before = aim.daemon.status("folder")
    aim.at(request)

    call(at)

    assert not list(aim.place.iterdir()), "it was never asked for"
    expected: dict[str, object] = {"empty": None, "file": b"content", "other": b"another"}
    expected = {path: value for path, value in (expected | changed).items() if value != 0}
    found: dict[str, object] = {}
    for path in at.iterdir():
        found[path.name] = os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()
    assert found == expected
    aim.daemon.wait_for_state("folder", "live")
    after = aim.daemon.status("folder")
    assert after.restarts == before.restarts + 1
    assert after.conflicts == 0
    aim.daemon.sync(aim.mount)
    assert same_tree(aim.mount, aim.source) == []
