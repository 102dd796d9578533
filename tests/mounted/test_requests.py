"""The kernel asks as little as it can: what each thing that programs do costs in requests."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from bench.requests import count_requests, show
from tests.mounted.conftest import directory_mount
from tests.mounted.harness import daemon_over


def test_nothing_is_asked_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with daemon_over({"one": {**directory_mount(tmp_path), "freshness": 300.0}}) as daemon:
        (daemon.path("one") / "work").mkdir()
        found = count_requests(daemon.path("one") / "work", lambda: daemon.requests("one"))
    with capsys.disabled():
        print()
        show(found, Console(width=120))

    # GETXATTR security.capability comes once for each new inode, before its first write (fs/inode.c, file_remove_privs);
    # GETATTR once for a directory whose times a create has just moved. Neither can be avoided, neither is repeated.
    assert found["stat"] == {}
    assert found["open + read + close, cached"] == {"open": 1, "flush": 1, "release": 1}
    created = found["create + write 4 KiB + close"]
    assert created.items() >= {"create": 1, "lookup": 1, "write": 1, "flush": 1, "release": 1}.items()
    assert found["write 1 MiB in one call"].get("write") == 1
    assert found["write 1 MiB in calls of 4 KiB"].get("write") == 256
    for title in ("create + write 4 KiB + close", "write 1 MiB in one call", "write 1 MiB in calls of 4 KiB"):
        assert found[title].get("getxattr", 0) <= 1
        assert found[title].get("getattr", 0) <= 1
    assert sum(found["ls -l of 1000 files, cold"].values()) <= 10
    assert sum(found["ls -l of 1000 files, warm"].values()) <= 10
