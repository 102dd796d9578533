"""A space through Onedata's own Python library, mounted: what a notebook does, and a helper that dies or hangs meanwhile.

The library is a stand-in (tests/servers/onedatafs); the helper processes and what they are sent are real.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest

from tests.mounted import modes
from tests.mounted.harness import Daemon, daemon_over, eventually
from tests.servers.onedatafs import TOKEN, FakeSite


@pytest.fixture
def site(tmp_path: Path) -> FakeSite:
    site = FakeSite(tmp_path / "site")
    (site.spaces / "ocean").mkdir()
    return site


@pytest.fixture
def daemon(site: FakeSite) -> Iterator[Daemon]:
    token = site.base / "token"
    token.write_text(TOKEN)
    modes.hand_over(site.base)
    keys: dict[str, object] = {
        "backend": "onedata-native", "python": str(site.python), "host": "provider.example.org", "space": "ocean",
        "token_file": str(token), "connections": 2, "request_timeout": "2s", "write_back_delay": "0s", "freshness": "1s",
    }  # fmt: skip
    with daemon_over({"ocean": keys}) as daemon:
        yield daemon


def helpers_of(worker: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words, parent = (entry / "cmdline").read_bytes(), (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if b"onedata_helper.py" in words and int(parent) == worker:
                found.append(int(entry.name))
    return found


def test_files_of_a_space_are_ordinary_files(site: FakeSite, daemon: Daemon) -> None:
    mount, remote = daemon.path("ocean"), site.spaces / "ocean"
    (mount / "results").mkdir()
    with h5py.File(mount / "results" / "waves.h5", "w") as file:
        file["height"] = list(range(1000))
    (mount / "notes.txt").write_text("one\n")
    daemon.sync()
    with (mount / "notes.txt").open("a") as file:
        file.write("two\n")
    (mount / "results").rename(mount / "results of today")
    daemon.sync()

    assert (remote / "notes.txt").read_text() == "one\ntwo\n"
    with h5py.File(remote / "results of today" / "waves.h5", "r") as file:
        assert list(file["height"][990:]) == list(range(990, 1000))
    assert sorted(os.listdir(remote)) == ["notes.txt", "results of today"]


@pytest.mark.expects_log("the helper of onedatafs has ended", "did not answer in time", "the remote is")
def test_a_helper_that_is_killed_or_hangs_costs_time_and_no_byte(site: FakeSite, daemon: Daemon) -> None:
    mount, remote = daemon.path("ocean"), site.spaces / "ocean"
    content = os.urandom(4 * 1024 * 1024)
    (remote / "large").write_bytes(content)
    (remote / "cold").write_bytes(b"cold")
    worker = daemon.status("ocean").pid
    assert worker is not None
    (mount / "first").write_bytes(b"1")
    daemon.sync()

    for pid in helpers_of(worker):
        os.kill(pid, signal.SIGKILL)
    (mount / "second").write_bytes(content)
    assert (mount / "large").read_bytes() == content
    (site.base / ".held").touch()
    reader = subprocess.Popen(["cat", mount / "cold"], stdout=subprocess.PIPE)
    (mount / "third").write_bytes(b"3")
    eventually(lambda: (remote / "third").exists() or None, 60, "an upload beside a reader that hangs")
    (site.base / ".held").unlink()
    daemon.sync()

    assert reader.communicate(timeout=60)[0] == b"cold"
    assert (remote / "second").read_bytes() == content
    assert sorted(os.listdir(remote)) == ["cold", "first", "large", "second", "third"]


@pytest.mark.expects_log("worker ended unasked.*SIGKILL")
def test_no_helper_outlives_a_killed_worker(daemon: Daemon) -> None:
    worker = daemon.status("ocean").pid
    assert worker is not None
    helpers = eventually(lambda: helpers_of(worker) or None, 30, "a helper")

    daemon.kill_worker("ocean")

    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in helpers), 30, f"the helpers {helpers} end")
