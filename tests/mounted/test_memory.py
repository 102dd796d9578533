"""Idle mounts cost little memory: what workers have in common is shared."""

from __future__ import annotations

import array
import mmap
import os
import re
from pathlib import Path

import pytest

from tests.mounted.conftest import directory_mount, webdav_mount
from tests.mounted.harness import daemon_over
from tests.servers import ServerProcess

LIMIT = 120 * 2**20
"""Bytes of proportional memory (PSS) for four mounts and everything that keeps them."""


def proportional_memory(pid: int) -> int:
    """Bytes; each page counted by its share (proc(5), smaps_rollup)."""
    match = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def pages_of(pid: int) -> set[int]:
    """The numbers of the physical pages that a process has in memory; all 0 for who is not root (pagemap, kernel docs)."""
    found: set[int] = set()
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            begin, end = (int(each, 16) // mmap.PAGESIZE for each in line.split()[0].split("-"))
            if "[vsyscall]" not in line:
                pagemap.seek(begin * 8)
                entries = array.array("Q", pagemap.read((end - begin) * 8))
                found.update(entry & (1 << 55) - 1 for entry in entries if entry >> 63)
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="the kernel shows physical pages to root only")
def test_four_idle_mounts_stay_below_120_megabytes(
    apache_server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (apache_server.root / f"memory-{name}").mkdir()
    mounts = {
        "dav-a": webdav_mount(apache_server, "memory-a/"),
        "dav-b": webdav_mount(apache_server, "memory-b/"),
        "folder-a": directory_mount(tmp_path / "a"),
        "folder-b": directory_mount(tmp_path / "b"),
    }
    with daemon_over(mounts) as daemon:
        for name in mounts:
            daemon.wait_for_state(name, "live")
        alone = len(set().union(*(pages_of(process.pid) for process in daemon.processes()))) * mmap.PAGESIZE
        used = {process.pid: (proportional_memory(process.pid), process.command) for process in daemon.processes()}

    total = sum(memory for memory, _ in used.values())
    with capsys.disabled():
        print(f"\nfour idle mounts: {total / 2**20:.1f} MiB PSS in {len(used)} processes, if nobody else ran Python", end=" ")
        print(f"{alone / 2**20:.1f} MiB")
        for pid, (memory, command) in used.items():
            print(f"  {pid} {memory / 2**20:6.1f} MiB  {command[:100]}")
    assert total < LIMIT
