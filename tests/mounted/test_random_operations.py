"""Random operations never find a byte that is not the model's, and the server ends up with the model.

The seeds run side by side, each on files of its own, so that the seconds in which they wait for the server fall together.
NBMOUNTD_TEST_OPERATIONS sets how many operations there are over all seeds (200000 for the large edition), NBMOUNTD_TEST_SEEDS
which seeds ("1 2 3"), and NBMOUNTD_TEST_RANDOM_SERVER over which server: apache, or a name in conftest.OTHER_SERVERS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.mounted.conftest import OTHER_SERVERS, Rig, webdav_mount
from tests.mounted.harness import daemon_over
from tests.mounted.random_files import RandomFiles
from tests.servers import ApacheServer

OPERATIONS = int(os.environ.get("NBMOUNTD_TEST_OPERATIONS", "12000"))
SEEDS = [int(seed) for seed in os.environ.get("NBMOUNTD_TEST_SEEDS", "1 2 3 4").split()]
SERVER = os.environ.get("NBMOUNTD_TEST_RANDOM_SERVER", "apache")
EACH = OPERATIONS // len(SEEDS)

LISTINGS_THAT_FAIL = ("degraded.*PROPFIND.*500",) if SERVER == "wsgidav" else ()
"""wsgidav says 500 when a file is replaced behind its back while it lists."""

pytestmark = pytest.mark.timeout(240 + OPERATIONS // 50)


@pytest.fixture(scope="module")
def restless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A mount that sends and lists all the time, so that both happen in the middle of everything else."""
    base = tmp_path_factory.mktemp("restless")
    kind = OTHER_SERVERS.get(SERVER, ApacheServer)
    with kind(base / "root", base / "work") as server:
        keys = {**webdav_mount(server), "write_back_delay": 0.05, "freshness": 0.5}
        with daemon_over({"restless": keys}) as daemon:
            yield Rig(daemon, "restless", daemon.path("restless"), server.root)


def run_side_by_side(rig: Rig, seeds: list[int], operations: int, *, kills: int = 0) -> list[RandomFiles]:
    """Runs `operations` for each seed in a directory of its own. Fails with the first mismatch, when all have ended."""
    worlds = []
    for seed in seeds:
        (rig.mount / str(seed)).mkdir()
        worlds.append(RandomFiles(rig.below(str(seed)), seed))
    with ThreadPoolExecutor(len(worlds)) as pool:
        runs = [pool.submit(world.run, operations, kills=kills) for world in worlds]
    for run in runs:
        run.result()
    return worlds


@pytest.mark.expects_log(*LISTINGS_THAT_FAIL)
def test_every_read_gives_what_was_written_and_the_server_gets_it(restless: Rig) -> None:
    worlds = run_side_by_side(restless, SEEDS, EACH)

    for world in worlds:
        world.assert_the_server_has_it()
    assert (restless.status.parked, restless.status.conflicts) == (0, 0)


@pytest.mark.expects_log("worker.*(died|ended|SIGKILL)", "restart", *LISTINGS_THAT_FAIL)
@pytest.mark.parametrize("seed", [seed + 1000 for seed in SEEDS[:2]])
def test_no_byte_is_lost_or_mixed_when_the_worker_is_killed(restless: Rig, seed: int) -> None:
    [world] = run_side_by_side(restless, [seed], EACH // 8, kills=2)

    world.assert_the_server_has_it()
    assert restless.status.restarts >= world.kills
