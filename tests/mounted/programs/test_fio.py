"""fio writes blocks with checksums in random order and finds each again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.kernel import drop_pages
from tests.mounted.programs.conftest import Run, needed, sized


@pytest.mark.parametrize("engine", ["psync", "mmap"])
def test_four_jobs_find_every_block_as_they_wrote_it(folder: Rig, run: Run, tmp_path: Path, engine: str) -> None:
    job = [
        needed("fio"), "--name=job", f"--directory={folder.mount}", f"--ioengine={engine}", "--numjobs=4",
        f"--size={sized(2, 64)}m", "--bsrange=1k-64k", "--rw=randrw", "--verify=crc32c", "--verify_fatal=1", "--thread",
        "--group_reporting", "--output-format=json", "--randseed=7", "--fallocate=none", "--do_verify=1",
    ]  # fmt: skip

    report = json.loads(run(*job, cwd=tmp_path))

    assert report["jobs"][0]["error"] == 0
    assert report["jobs"][0]["write"]["total_ios"] > 0
    folder.daemon.sync(folder.mount)
    for file in folder.mount.iterdir():
        drop_pages(file)
