"""Two people change the same thing: nothing is overwritten, nothing is lost, and both can see it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

import pytest

from tests.mounted.conftest import Rig, webdav_mount
from tests.mounted.harness import daemon_over
from tests.mounted.kernel import listed
from tests.servers import ServerProcess

pytestmark = pytest.mark.expects_log("conflict", "changed on the remote: it comes back")


@pytest.fixture
def rig(apache_server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A mount that sends only when asked, so that a test says who comes first."""
    name = str(request.node.name)
    root = apache_server.root / name
    root.mkdir()
    keys = {**webdav_mount(apache_server, f"{name}/"), "write_back_delay": 3600.0, "freshness": 3600.0}
    with daemon_over({"dav": keys}) as daemon:
        yield Rig(daemon, "dav", daemon.path("dav"), root)


def copies(rig: Rig) -> list[str]:
    return sorted(name for name in os.listdir(rig.mount) if "(conflict " in name)


def test_both_versions_of_a_file_changed_on_both_sides_are_kept(rig: Rig) -> None:
    (rig.mount / "plan.txt").write_text("base")
    rig.daemon.sync()

    (rig.mount / "plan.txt").write_text("mine")
    (rig.root / "plan.txt").write_text("theirs, changed meanwhile")
    rig.daemon.sync()
    rig.daemon.refresh(rig.mount)

    (copy,) = copies(rig)
    assert re.fullmatch(r"plan \(conflict \d{4}-\d\d-\d\d \d{4}\)\.txt", copy)
    assert (rig.mount / "plan.txt").read_text() == "theirs, changed meanwhile"
    assert (rig.mount / copy).read_text() == "mine"
    assert (rig.root / "plan.txt").read_text() == "theirs, changed meanwhile"
    assert (rig.root / copy).read_text() == "mine"
    assert rig.status.conflicts == 1
    listed = json.loads(rig.daemon.ctl("--json", "conflicts").stdout)["items"]
    assert [os.path.basename(item["copy"]) for item in listed] == [copy]


def test_a_file_made_on_both_sides_is_kept_twice(rig: Rig) -> None:
    os.listdir(rig.mount)
    (rig.mount / "new.txt").write_text("mine")
    (rig.root / "new.txt").write_text("theirs")
    rig.daemon.sync()

    (copy,) = copies(rig)
    assert (rig.root / "new.txt").read_text() == "theirs"
    assert (rig.root / copy).read_text() == "mine"


def test_a_change_here_wins_over_a_removal_there(rig: Rig) -> None:
    (rig.mount / "kept.txt").write_text("base")
    rig.daemon.sync()

    (rig.mount / "kept.txt").write_text("changed here")
    (rig.root / "kept.txt").unlink()
    rig.daemon.sync()

    kept = [(rig.root / name).read_text() for name in listed(rig.root)]
    assert kept == ["changed here"]


def test_a_removal_here_does_not_take_a_change_there_along(rig: Rig) -> None:
    (rig.mount / "kept.txt").write_text("base")
    rig.daemon.sync()

    (rig.mount / "kept.txt").unlink()
    (rig.root / "kept.txt").write_text("changed there, in time")
    rig.daemon.sync()
    rig.daemon.refresh(rig.mount)

    assert (rig.root / "kept.txt").read_text() == "changed there, in time"
    assert (rig.mount / "kept.txt").read_text() == "changed there, in time"


def test_the_same_bytes_on_both_sides_are_no_conflict(rig: Rig) -> None:
    (rig.mount / "same.txt").write_text("base")
    rig.daemon.sync()

    (rig.mount / "same.txt").write_text("the same new text")
    (rig.root / "same.txt").write_text("the same new text")
    rig.daemon.sync()

    assert copies(rig) == []
    assert rig.status.conflicts == 0


def test_a_settled_conflict_is_no_longer_listed(rig: Rig) -> None:
    (rig.mount / "plan.txt").write_text("base")
    rig.daemon.sync()
    (rig.mount / "plan.txt").write_text("mine")
    (rig.root / "plan.txt").write_text("theirs, changed meanwhile")
    rig.daemon.sync()

    settled = rig.daemon.ctl("conflicts", str(rig.mount / "plan.txt"), "--keep", "local")
    rig.daemon.sync()
    rig.daemon.refresh(rig.mount)

    assert settled.returncode == 0, settled.stderr
    assert copies(rig) == []
    assert rig.status.conflicts == 0
    assert (rig.mount / "plan.txt").read_text() == "mine"
    assert (rig.root / "plan.txt").read_text() == "mine"


def make_conflict(rig: Rig) -> str:
    """plan.txt, changed on both sides and sent; returns the name of the local version."""
    (rig.mount / "plan.txt").write_text("base")
    rig.daemon.sync()
    (rig.mount / "plan.txt").write_text("mine")
    (rig.root / "plan.txt").write_text("theirs, changed meanwhile")
    rig.daemon.sync()
    rig.daemon.refresh(rig.mount)
    (copy,) = copies(rig)
    return copy


def test_conflicts_say_what_and_when_and_both_sizes_and_times(rig: Rig) -> None:
    copy = make_conflict(rig)

    shown = rig.daemon.ctl("conflicts").stdout
    (item,) = json.loads(rig.daemon.ctl("--json", "conflicts", str(rig.mount / "plan.txt")).stdout)["items"]

    assert str(rig.mount / "plan.txt") in shown
    assert str(rig.mount / copy) in shown
    assert "25 bytes" in shown or "25 B" in shown
    assert (item["local_size"], item["remote_size"]) == (4, 25)
    assert abs(item["local_mtime"] - (rig.mount / copy).stat().st_mtime) < 1
    assert abs(item["remote_mtime"] - (rig.root / "plan.txt").stat().st_mtime) < 2
    assert os.getxattr(rig.mount / copy, "user.nbmountd.state") == b"conflict"


@pytest.mark.parametrize(
    ("keep", "left"), [("remote", ["theirs, changed meanwhile"]), ("both", ["mine", "theirs, changed meanwhile"])]
)
@pytest.mark.parametrize("named_by", ["remote", "copy"])
def test_a_conflict_is_settled_as_chosen(rig: Rig, keep: str, left: list[str], named_by: str) -> None:
    copy = make_conflict(rig)

    settled = rig.daemon.ctl("conflicts", str(rig.mount / (copy if named_by == "copy" else "plan.txt")), "--keep", keep)
    rig.daemon.sync()
    rig.daemon.refresh(rig.mount)

    assert settled.returncode == 0, settled.stderr
    assert rig.status.conflicts == 0
    assert sorted(path.read_text() for path in rig.mount.iterdir()) == left
    assert sorted((rig.root / name).read_text() for name in listed(rig.root)) == left
    assert (rig.mount / "plan.txt").read_text() == "theirs, changed meanwhile"
    assert json.loads(rig.daemon.ctl("--json", "status").stdout)["safe"]


def test_keeping_ours_does_not_overwrite_a_change_that_nobody_here_has_seen(rig: Rig) -> None:
    make_conflict(rig)
    (rig.root / "plan.txt").write_text("theirs, and changed once more")

    settled = rig.daemon.ctl("conflicts", str(rig.mount / "plan.txt"), "--keep", "local")
    rig.daemon.sync()
    rig.daemon.refresh(rig.mount)

    assert settled.returncode == 0, settled.stderr
    assert (rig.root / "plan.txt").read_text() == "theirs, and changed once more"
    assert sorted((rig.root / name).read_text() for name in listed(rig.root)) == ["mine", "theirs, and changed once more"]
    assert rig.status.conflicts == 1


def test_a_copy_that_somebody_removed_or_renamed_is_no_longer_listed(rig: Rig) -> None:
    (rig.mount / make_conflict(rig)).rename(rig.mount / "plan.txt")  # as any program would settle it

    rig.daemon.sync()

    assert rig.status.conflicts == 0
    assert (rig.root / "plan.txt").read_text() == "mine"
    assert listed(rig.root) == ["plan.txt"]
    refused = rig.daemon.ctl("conflicts", str(rig.mount / "plan.txt"), "--keep", "local")
    assert refused.returncode == 1
    assert "no conflict" in refused.stderr
