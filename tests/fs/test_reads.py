"""What is asked of a remote that gives a few bytes no sooner than many: aligned pieces, each once."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from tests.sync.test_both_sides import WHOLE_UPLOADS, tell
from tests.sync.world import World

KIB = 1024
UNIT = 512 * KIB
CONTENT = random.Random(3).randbytes(5 * UNIT + 1000)


def test_scattered_reads_of_one_neighbourhood_share_an_aligned_request(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    async def story(world: World) -> None:
        world.remote.put("large", CONTENT)
        inner = world.memory.read

        async def read(place, version, start, stop, sink):  # type: ignore[no-untyped-def]
            asked.append((start, stop))
            await inner(place, version, start, stop, sink)

        world.memory.read = read  # type: ignore[method-assign]
        node = await world.find("large")
        world.fs.open(node.ino, writing=False, truncate=False)

        async def says(start: int, size: int) -> bool:
            return bytes(await world.fs.read(node.ino, start, size)) == CONTENT[start : start + size]

        for start in (3 * UNIT + 700, 4 * UNIT - 4096, 3 * UNIT, 3 * UNIT + 100 * KIB):
            assert await says(start, 4096)
        assert [each for each in asked if each[0] < 4 * UNIT] == [(3 * UNIT, 4 * UNIT)]  # what follows may be asked ahead
        assert await says(2 * UNIT - 10, 20)
        assert await says(5 * UNIT + 990, 10)
        world.fs.close_file(node.ino, writing=False)

    tell(tmp_path, story, replace(WHOLE_UPLOADS, read_unit=UNIT))
    assert all(start % UNIT == 0 and (stop % UNIT == 0 or stop == len(CONTENT)) for start, stop in asked)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(sorted(asked))), "no byte was asked for twice"
