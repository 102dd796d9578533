"""What a server will not take waits for a person, who can see it, try again, copy it out, or give it up."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbmountd.control import schema
from tests.mounted import modes
from tests.mounted.conftest import Rig, directory_mount, webdav_mount
from tests.mounted.harness import Daemon, daemon_over
from tests.mounted.kernel import eventually, listed
from tests.servers import ApacheServer

pytestmark = pytest.mark.expects_log("parked|given up|403|forbidden|could be sent")


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A server that takes no name beginning with "forbidden", and none of the changes below "locked/"."""
    base = tmp_path_factory.mktemp("refusing")
    changes = "m#^(PUT|DELETE|MOVE|MKCOL|PROPPATCH)$#"
    extra = (
        'RedirectMatch 403 "/forbidden[^/]*/?$"\n'
        f'  <If "%{{REQUEST_METHOD}} =~ {changes} && %{{REQUEST_URI}} =~ m#^/dav/locked/.#">\n    Require all denied\n  </If>'
    )
    with ApacheServer(base / "root", base / "work", extra=extra) as server:
        (server.root / "locked").mkdir()
        (server.root / "locked" / "old.txt").write_text("as the server has it")
        with daemon_over({"dav": {**webdav_mount(server), "write_back_delay": 0.1}}, drain_timeout=1.0) as daemon:
            yield Rig(daemon, "dav", daemon.path("dav"), server.root)


@pytest.fixture
def rig(refusing: Rig) -> Iterator[Rig]:
    """The same, with nothing parked before and after."""
    yield refusing
    refusing.daemon.ctl("parked", "discard", "--yes", "--all")
    assert refusing.status.parked == 0


def wait_until_parked(rig: Rig, count: int = 1) -> list[dict[str, object]]:
    eventually(lambda: rig.status.parked >= count, 30, f"{count} parked: {rig.status}")
    items: list[dict[str, object]] = json.loads(rig.daemon.ctl("--json", "parked").stdout)["items"]
    return items


def is_safe(daemon: Daemon) -> bool:
    return bool(json.loads(daemon.ctl("--json", "status").stdout)["safe"])


def test_what_is_parked_is_listed_with_its_reason_and_tried_again_when_asked(rig: Rig) -> None:
    path = rig.mount / "forbidden.txt"
    path.write_text("not lost")

    (item,) = wait_until_parked(rig)
    shown = rig.daemon.ctl("parked").stdout

    assert (item["path"], item["size"]) == (str(path), 8)
    assert "403" in str(item["error"])
    assert str(path) in shown
    assert "403" in shown
    assert "parked" in rig.daemon.ctl("status").stdout
    assert rig.daemon.ctl("parked", "retry", str(path)).returncode == 0
    wait_until_parked(rig)
    nothing = rig.daemon.ctl("parked", "retry", str(rig.mount / "other"))
    assert nothing.returncode == 1
    assert "not parked" in nothing.stderr


def test_an_export_has_every_byte_and_overwrites_nothing(rig: Rig, tmp_path: Path) -> None:
    (rig.mount / "forbidden dir" / "sub").mkdir(parents=True)
    (rig.mount / "forbidden dir" / "sub" / "data.bin").write_bytes(os.urandom(9_000_000))
    (rig.mount / "locked" / "old.txt").open("a").write(", and more")
    wait_until_parked(rig, 2)
    out = tmp_path / "out"
    modes.hand_over(tmp_path)  # who exports writes with the rights of the user

    exported = rig.daemon.ctl("parked", "export", str(out))
    again = rig.daemon.ctl("parked", "export", str(out))

    assert exported.returncode == 0, exported.stderr
    data = (rig.mount / "forbidden dir" / "sub" / "data.bin").read_bytes()
    assert (out / "dav" / "forbidden dir" / "sub" / "data.bin").read_bytes() == data
    assert (out / "dav" / "locked" / "old.txt").read_text() == "as the server has it, and more"
    assert again.returncode == 1
    assert "exists" in again.stderr
    assert rig.daemon.ctl("parked", "export", str(rig.mount / "into the mount")).returncode == 2
    assert rig.status.parked == 2


def test_a_discard_asks_first_and_brings_back_what_the_server_has(rig: Rig) -> None:
    locked = rig.mount / "locked"
    (locked / "old.txt").write_text("edited here")
    (rig.mount / "forbidden dir").mkdir()
    (rig.mount / "forbidden dir" / "file").write_text("below")
    wait_until_parked(rig, 2)

    asked = rig.daemon.ctl("parked", "discard", str(locked / "old.txt"))
    assert asked.returncode != 0
    assert (locked / "old.txt").read_text() == "edited here"

    assert rig.daemon.ctl("parked", "discard", "--yes", str(locked / "old.txt")).returncode == 0
    assert (locked / "old.txt").read_text() == "as the server has it"
    assert rig.daemon.ctl("parked", "discard", "--yes", "--all").returncode == 0
    assert not (rig.mount / "forbidden dir").exists()
    assert rig.status.parked == 0
    rig.daemon.sync()
    assert is_safe(rig.daemon)
    assert (rig.root / "locked" / "old.txt").read_text() == "as the server has it"


def test_a_discarded_removal_or_rename_brings_the_file_back(rig: Rig) -> None:
    path = rig.mount / "locked" / "old.txt"
    path.read_text()
    path.unlink()
    (item,) = wait_until_parked(rig)

    assert rig.daemon.ctl("parked", "discard", "--yes", str(item["path"])).returncode == 0
    assert path.read_text() == "as the server has it"
    path.rename(rig.mount / "elsewhere.txt")
    wait_until_parked(rig)
    assert rig.daemon.ctl("parked", "discard", "--yes", "--all").returncode == 0

    assert path.read_text() == "as the server has it"
    assert not (rig.mount / "elsewhere.txt").exists()
    assert rig.status.parked == 0
    assert listed(rig.root / "locked") == ["old.txt"]


def test_an_error_after_the_write_is_told_once_to_each_open_handle(rig: Rig) -> None:
    path = rig.mount / "forbidden.txt"
    writers = [os.open(path, os.O_CREAT | os.O_WRONLY, 0o644) for _ in range(2)]
    reader = os.open(path, os.O_RDONLY)
    os.write(writers[0], b"not lost")
    os.fsync(writers[0])
    # No process may be started here: the child would close what it inherits, and each close is one more that may be told.
    assert isinstance(rig.daemon.ask(schema.Sync(paths=(str(path),), timeout=20)), schema.Failed)
    eventually(lambda: rig.status.parked, 20, "it is parked")

    with pytest.raises(OSError) as told:
        os.fsync(writers[0])
    os.fsync(writers[0])
    os.close(writers[0])
    with pytest.raises(OSError) as told_other:
        os.close(writers[1])
    os.close(reader)

    assert {told.value.errno, told_other.value.errno} == {errno.EIO}
    assert path.read_bytes() == b"not lost"
    assert rig.status.parked == 1
    with path.open("ab") as another:  # of its own: nothing of it has failed yet
        another.write(b", and more")
    assert isinstance(rig.daemon.ask(schema.Sync(paths=(str(path),), timeout=20)), schema.Failed)  # parked again, by now


def test_sync_says_by_its_status_that_it_is_not_safe_in_time(rig: Rig) -> None:
    (rig.mount / "forbidden.txt").write_text("kept")
    (rig.mount / "fine.txt").write_text("sent")

    assert rig.daemon.ctl("sync", str(rig.mount / "fine.txt")).returncode == 0
    late = rig.daemon.ctl("sync", "--timeout", "0.2")

    assert late.returncode == 4
    assert late.stderr


@pytest.mark.expects_log("put aside|deleted, as asked|supervisor is gone")
def test_what_was_put_aside_with_a_damaged_database_is_listed_exported_and_given_up(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    keys = {**directory_mount(source), "write_back_delay": 3600.0}
    with daemon_over({"folder": keys}, drain_timeout=0.1) as daemon:
        (daemon.path("folder") / "unsent.txt").write_bytes(b"never sent")
        daemon.abandon()
        assert daemon.child is not None
        daemon.child.wait(10)
        (database,) = (daemon.home / "state").rglob("nodes.db")
        database.write_bytes(b"no database at all" * 1000)
        for log in database.parent.glob("nodes.db-*"):
            log.unlink()
        daemon.start()

        (item,) = json.loads(daemon.ctl("--json", "parked").stdout)["items"]
        modes.hand_over(tmp_path)
        exported = daemon.ctl("parked", "export", str(tmp_path / "out"), item["path"])

        assert item["step"] == "quarantine"
        assert item["size"] == 10
        assert not is_safe(daemon)
        assert exported.returncode == 0, exported.stderr
        (copy,) = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert copy.read_bytes() == b"never sent"
        assert daemon.ctl("parked", "discard", "--yes", item["path"]).returncode == 0
        assert daemon.status("folder").parked == 0
        assert is_safe(daemon)
