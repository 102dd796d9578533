"""What others change on the server is seen in time, and never in the middle of an open file."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator

import pytest

from tests.mounted.conftest import Rig, webdav_mount
from tests.mounted.harness import daemon_over
from tests.mounted.kernel import eventually
from tests.servers import ServerProcess

FRESHNESS = 2.0


@pytest.fixture(scope="module")
def quick(apache_server: ServerProcess) -> Iterator[Rig]:
    """A mount that looks every two seconds."""
    root = apache_server.root / "freshness"
    root.mkdir()
    keys = {**webdav_mount(apache_server, "freshness/"), "freshness": FRESHNESS}
    with daemon_over({"quick": keys}) as daemon:
        yield Rig(daemon, "quick", daemon.path("quick"), root)


@pytest.fixture(scope="module")
def patient(apache_server: ServerProcess) -> Iterator[Rig]:
    """A mount that would look again only after ten minutes."""
    root = apache_server.root / "patience"
    root.mkdir()
    keys = {**webdav_mount(apache_server, "patience/"), "freshness": 600.0}
    with daemon_over({"patient": keys}) as daemon:
        yield Rig(daemon, "patient", daemon.path("patient"), root)


def test_a_change_on_the_server_is_seen_within_the_freshness_time(quick: Rig) -> None:
    (quick.root / "changing.txt").write_text("first")
    eventually(lambda: (quick.mount / "changing.txt").exists(), FRESHNESS + 2, "the new file is there")
    assert (quick.mount / "changing.txt").read_text() == "first"

    (quick.root / "changing.txt").write_text("second, and longer")
    changed_at = time.monotonic()
    eventually(lambda: (quick.mount / "changing.txt").read_text() != "first", FRESHNESS + 2, "the new content is there")

    assert (quick.mount / "changing.txt").read_text() == "second, and longer"
    # A second on top for the listing itself on a busy machine.
    assert time.monotonic() - changed_at < FRESHNESS + 1


def test_removals_and_new_names_are_seen_within_the_freshness_time(quick: Rig) -> None:
    (quick.root / "comes-and-goes").mkdir()
    eventually(lambda: "comes-and-goes" in os.listdir(quick.mount), FRESHNESS + 2, "the directory is listed")

    (quick.root / "comes-and-goes").rename(quick.root / "renamed")
    eventually(lambda: "renamed" in os.listdir(quick.mount), FRESHNESS + 2, "the new name is listed")

    assert not (quick.mount / "comes-and-goes").exists()


def test_refresh_shows_a_change_at_once(patient: Rig) -> None:
    (patient.root / "kept.txt").write_text("first")
    (patient.root / "gone.txt").write_text("soon gone")
    patient.daemon.refresh(patient.mount)
    assert (patient.mount / "kept.txt").read_text() == "first"
    assert (patient.mount / "gone.txt").exists()

    (patient.root / "kept.txt").write_text("second, and longer")
    (patient.root / "gone.txt").unlink()
    (patient.root / "came.txt").write_text("new")
    unchanged = (patient.mount / "kept.txt").read_text()
    refreshed = patient.daemon.ctl("refresh", str(patient.mount))

    assert unchanged == "first"
    assert refreshed.returncode == 0, refreshed.stderr
    assert (patient.mount / "kept.txt").read_text() == "second, and longer"
    assert sorted(name for name in os.listdir(patient.mount) if name != "open.bin") == ["came.txt", "kept.txt"]


def test_an_open_file_keeps_its_version(patient: Rig) -> None:
    """Both versions are 64 MiB, so that neither the page cache nor a read-ahead has all of the first one."""
    size = 64 * 2**20
    (patient.root / "open.bin").write_bytes(b"1" * size)
    patient.daemon.refresh(patient.mount)
    with (patient.mount / "open.bin").open("rb", buffering=0) as opened:
        assert os.pread(opened.fileno(), 4096, 0) == b"1" * 4096

        (patient.root / "open.bin.new").write_bytes(b"2" * size)
        (patient.root / "open.bin.new").rename(patient.root / "open.bin")
        patient.daemon.refresh(patient.mount)

        with (patient.mount / "open.bin").open("rb", buffering=0) as newer:
            assert os.pread(newer.fileno(), 4096, 0) == b"2" * 4096
        assert os.pread(opened.fileno(), 4096, 0) == b"1" * 4096
        try:
            rest = os.pread(opened.fileno(), 4096, size - 4096)
        except OSError as error:
            # The server no longer has the old bytes: an honest error is allowed, bytes of the new version are not.
            assert error.errno == errno.ESTALE
        else:
            assert rest == b"1" * 4096


def test_the_mount_follows_when_its_own_file_is_changed_by_another(patient: Rig) -> None:
    (patient.mount / "shared.txt").write_text("mine")
    patient.daemon.sync(patient.mount)

    (patient.root / "shared.txt").write_text("theirs, later")
    patient.daemon.refresh(patient.mount)

    assert (patient.mount / "shared.txt").read_text() == "theirs, later"
    assert patient.status.conflicts == 0
