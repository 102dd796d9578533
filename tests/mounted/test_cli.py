"""`nbmountctl` against a real daemon: what each verb prints, as text and as JSON, and its exit codes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.mounted.conftest import Rig, webdav_mount
from tests.mounted.harness import Daemon, daemon_over
from tests.mounted.kernel import mounts_below
from tests.mounted.modes import MODE
from tests.servers import ServerProcess, WsgiDAVServer

DONE, FAILED, USAGE, NOT_RUNNING, NOT_SAFE = 0, 1, 2, 3, 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    base = tmp_path_factory.mktemp("cli")
    with WsgiDAVServer(base / "dav", base / "work") as running:
        yield running


@pytest.fixture(scope="module")
def rig(server: ServerProcess) -> Iterator[Rig]:
    mount = {**webdav_mount(server), "write_back_delay": 3600.0}
    with daemon_over({"dav": mount}) as daemon:
        yield Rig(daemon, "dav", daemon.path("dav"), server.root)


def as_json(daemon: Daemon, *arguments: str, code: int = DONE) -> Any:
    ended = daemon.ctl("--json", *arguments)
    assert ended.returncode == code, (ended.stdout, ended.stderr)
    return json.loads(ended.stdout)


def test_status_says_whether_everything_is_safe(rig: Rig) -> None:
    rig.daemon.sync()
    safe = as_json(rig.daemon, "status")
    (rig.mount / "unsafe.txt").write_text("unsafe")
    unsafe = as_json(rig.daemon, "status")
    shown = rig.daemon.ctl("status")

    assert safe["safe"] is True
    assert unsafe["safe"] is False
    (mount,) = unsafe["mounts"]
    assert (mount["name"], mount["path"], mount["state"]) == ("dav", str(rig.mount), "live")
    assert (mount["unsent_files"], mount["unsent_bytes"]) == (1, 6)
    assert shown.returncode == DONE
    assert "dav" in shown.stdout
    assert "live" in shown.stdout


def test_queue_lists_unsent_work_and_sync_empties_it(rig: Rig) -> None:
    (rig.mount / "queued.txt").write_text("queued")
    listed = as_json(rig.daemon, "queue")
    shown = rig.daemon.ctl("queue")
    synced = rig.daemon.ctl("sync")
    after = as_json(rig.daemon, "queue")

    assert str(rig.mount / "queued.txt") in [item["path"] for item in listed["items"]]
    assert "queued.txt" in shown.stdout
    assert synced.returncode == DONE, synced.stderr
    assert (after["items"], after["total"]) == ([], 0)
    assert (rig.root / "queued.txt").read_text() == "queued"


def test_sync_of_a_path_sends_what_is_below_it(rig: Rig) -> None:
    (rig.mount / "now").mkdir()
    (rig.mount / "now" / "a.txt").write_text("a")
    (rig.mount / "later.txt").write_text("later")

    synced = as_json(rig.daemon, "sync", str(rig.mount / "now"))

    assert synced["type"] == "done"
    assert (rig.root / "now" / "a.txt").read_text() == "a"
    assert not (rig.root / "later.txt").exists()
    rig.daemon.sync()


@pytest.mark.expects_log("offline|timeout|time limit|not answer|degraded|retry")
def test_sync_that_is_not_done_in_time_ends_with_4(rig: Rig, server: ServerProcess) -> None:
    server.freeze()
    try:
        (rig.mount / "stuck.txt").write_text("stuck")
        ended = rig.daemon.ctl("sync", "--timeout", "1")
        failed = as_json(rig.daemon, "sync", "--timeout", "1", code=NOT_SAFE)
    finally:
        server.thaw()

    assert ended.returncode == NOT_SAFE
    assert ended.stderr
    assert failed["code"] == NOT_SAFE
    rig.daemon.wait_for_state("dav", "live", within=60)
    rig.daemon.sync()
    assert (rig.root / "stuck.txt").read_text() == "stuck"


def test_without_a_daemon_every_verb_ends_with_3(tmp_path: Path) -> None:
    stopped = Daemon({})
    try:
        endings = {
            verb: stopped.ctl("--socket", str(tmp_path / "none.sock"), verb, *arguments)
            for verb, *arguments in (["status"], ["sync"], ["queue"], ["refresh"], ["mount", "dav"], ["explain", "/x"])
        }
    finally:
        stopped.discard()

    assert {verb: ended.returncode for verb, ended in endings.items()} == dict.fromkeys(endings, NOT_RUNNING)
    assert all("not running" in ended.stderr for ended in endings.values())
    assert not any("Traceback" in ended.stderr for ended in endings.values())


def test_a_wrong_use_ends_with_2(rig: Rig) -> None:
    assert rig.daemon.ctl("no-such-verb").returncode == USAGE
    assert rig.daemon.ctl("mount").returncode == USAGE
    assert rig.daemon.ctl("sync", "--timeout", "soon").returncode == USAGE


def test_an_unknown_mount_ends_with_1_and_names_the_known_ones(rig: Rig) -> None:
    ended = rig.daemon.ctl("unmount", "nowhere")

    assert ended.returncode == FAILED
    assert "nowhere" in ended.stderr
    assert "dav" in ended.stderr


@pytest.mark.skipif(MODE == "fd", reason="who passed the descriptor mounts and unmounts")
def test_unmount_drains_and_mount_brings_it_back(rig: Rig) -> None:
    (rig.mount / "drained.txt").write_text("drained")

    unmounted = rig.daemon.ctl("unmount", "dav")
    gone = mounts_below(rig.daemon.home)
    state = as_json(rig.daemon, "status")["mounts"][0]["state"]
    mounted = rig.daemon.ctl("mount", "dav")

    assert unmounted.returncode == DONE, unmounted.stderr
    assert (gone, state) == ([], "unmounted")
    assert (rig.root / "drained.txt").read_text() == "drained"
    assert mounted.returncode == DONE, mounted.stderr
    assert (rig.mount / "drained.txt").read_text() == "drained"


@pytest.mark.skipif(MODE == "fd", reason="who passed the descriptor mounts and unmounts")
def test_nobody_can_write_below_an_unmounted_mount_point(rig: Rig) -> None:
    """root may write anywhere, so the mode is what can be tested."""
    rig.daemon.ctl("unmount", "dav")
    try:
        assert rig.mount.stat().st_mode & 0o222 == 0
    finally:
        rig.daemon.ctl("mount", "dav")


def test_refresh_shows_what_changed_on_the_server(rig: Rig) -> None:
    os.listdir(rig.mount)
    (rig.root / "appeared.txt").write_text("new")

    refreshed = rig.daemon.ctl("refresh", str(rig.mount))

    assert refreshed.returncode == DONE, refreshed.stderr
    assert "appeared.txt" in os.listdir(rig.mount)


def test_explain_tells_what_is_known_of_a_file(rig: Rig) -> None:
    (rig.mount / "explained.txt").write_text("what is this")

    fields = dict(as_json(rig.daemon, "explain", str(rig.mount / "explained.txt"))["fields"])
    shown = rig.daemon.ctl("explain", str(rig.mount / "explained.txt"))
    missing = rig.daemon.ctl("explain", str(rig.mount / "no such file"))

    assert "dirty" in fields.values()
    assert "12" in " ".join(fields.values())
    assert "explained.txt" in shown.stdout
    assert missing.returncode == FAILED
    assert "no such file" in missing.stderr


def test_explain_finds_a_file_by_a_relative_path(rig: Rig) -> None:
    (rig.mount / "relative.txt").write_text("here")

    ended = rig.daemon.ctl("explain", os.path.relpath(rig.mount / "relative.txt"))

    assert ended.returncode == DONE, ended.stderr
    assert "relative.txt" in ended.stdout


def test_the_state_attribute_follows_a_file(rig: Rig) -> None:
    rig.daemon.sync()
    (rig.root / "state.txt").write_text("text")
    rig.daemon.refresh(rig.mount)
    states = []

    def look() -> None:
        states.append(os.getxattr(rig.mount / "state.txt", "user.nbmountd.state").decode())

    look()
    (rig.mount / "state.txt").read_bytes()
    look()
    (rig.mount / "state.txt").write_text("changed")
    look()
    rig.daemon.sync()
    look()

    assert states[0] == "remote"
    assert states[1] in ("cached", "safe")
    assert states[2] == "dirty"
    assert states[3] in ("cached", "safe")


def test_doctor_checks_the_machine_and_the_mounts(rig: Rig) -> None:
    ended = rig.daemon.ctl("doctor")
    checks = as_json(rig.daemon, "doctor")

    assert ended.returncode == DONE, ended.stdout
    assert "/dev/fuse" in ended.stdout
    assert checks


def test_the_version_and_the_help_need_no_daemon(rig: Rig) -> None:
    helped = rig.daemon.ctl("--help")

    assert helped.returncode == DONE
    for verb in ("status", "mount", "unmount", "sync", "queue", "refresh", "explain", "doctor"):
        assert verb in helped.stdout
