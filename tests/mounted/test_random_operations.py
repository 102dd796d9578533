"""Random operations never find a byte that is not the model's, and the server ends up with the model.

NBMOUNTD_TEST_OPERATIONS sets how many operations there are over all seeds (200000 for the large edition), and
NBMOUNTD_TEST_SEEDS which seeds ("1 2 3").
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.mounted.conftest import Rig, webdav_mount
from tests.mounted.harness import daemon_over
from tests.mounted.random_files import RandomFiles
from tests.servers import ServerProcess

OPERATIONS = int(os.environ.get("NBMOUNTD_TEST_OPERATIONS", "6000"))
SEEDS = [int(seed) for seed in os.environ.get("NBMOUNTD_TEST_SEEDS", "1 2 3 4").split()]


@pytest.fixture(scope="module")
def restless(apache_server: ServerProcess) -> Iterator[Rig]:
    """A mount that sends and lists all the time, so that both happen in the middle of everything else."""
    root = apache_server.root / "restless"
    root.mkdir()
    keys = {**webdav_mount(apache_server, "restless/"), "write_back_delay": 0.05, "freshness": 0.5}
    with daemon_over({"restless": keys}) as daemon:
        yield Rig(daemon, "restless", daemon.path("restless"), root)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_read_gives_what_was_written_and_the_server_gets_it(restless: Rig, seed: int) -> None:
    (restless.mount / str(seed)).mkdir()
    files = RandomFiles(restless.below(str(seed)), seed)

    files.run(OPERATIONS // len(SEEDS))

    files.assert_the_server_has_it()
    assert (restless.status.parked, restless.status.conflicts) == (0, 0)


@pytest.mark.expects_log("worker.*(died|ended|SIGKILL)", "restart")
@pytest.mark.parametrize("seed", [seed + 1000 for seed in SEEDS[:2]])
def test_no_byte_is_lost_or_mixed_when_the_worker_is_killed(restless: Rig, seed: int) -> None:
    (restless.mount / str(seed)).mkdir()
    files = RandomFiles(restless.below(str(seed)), seed)

    files.run(OPERATIONS // len(SEEDS) // 4, kills=2)

    files.assert_the_server_has_it()
    assert restless.status.restarts >= files.kills
