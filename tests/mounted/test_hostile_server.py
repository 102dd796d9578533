"""A server that answers anything at all: the worker lives, programs get files or errnos, and nothing leaves the mount."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from tests.fuzz.hostile import hostile
from tests.mounted.harness import daemon_over

ROUNDS = int(os.environ.get("NBMOUNTD_HOSTILE_ROUNDS", "8"))


@pytest.mark.expects_log(".")
@pytest.mark.parametrize("seed", [1])
def test_random_answers_neither_end_the_worker_nor_leave_the_mount(seed: int) -> None:
    with hostile(seed) as server:
        keys = {"backend": "webdav", "url": server.url, "user": "a", "password": "b", "freshness": "0s"}
        keys |= {"request_deadline": "0.5s", "write_back_delay": "0s"}
        with daemon_over({"dav": keys}, drain_timeout=1.0) as daemon:
            mount, worker = daemon.path("dav"), daemon.status("dav").pid
            seen = set()
            for number in range(ROUNDS):
                with contextlib.suppress(OSError):
                    for entry in os.scandir(mount):
                        seen.add(entry.name)
                        assert "/" not in entry.name and entry.name not in (".", "..")
                        with contextlib.suppress(OSError):
                            status = entry.stat(follow_symlinks=False)
                            assert 0 <= status.st_size < 2**62
                            if entry.is_file(follow_symlinks=False):
                                Path(entry.path).read_bytes()[:100]
                with contextlib.suppress(OSError):
                    (mount / f"ours-{number}").write_bytes(b"ours")
                    assert (mount / f"ours-{number}").read_bytes() == b"ours"
                    os.rename(mount / f"ours-{number}", mount / "renamed")

            assert len(seen) >= 2, "some answers made sense"
            assert server.answered > 3 * ROUNDS
            status = daemon.status("dav")
            assert status.pid == worker and status.restarts == 0
            bugs = [line for line in daemon.log.read_text().splitlines() if "traceback" in json.loads(line)]
            assert bugs == []
