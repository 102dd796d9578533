"""No more travels than must, and no more memory is used than must, however large the file is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.kernel import drop_pages

MIB = 2**20
GIB = 2**30
MARKS = {0: b"first bytes", 512 * MIB: b"the middle of the file", GIB - 20: b"the very last bytes."}


def put_sparse(path: Path, size: int, marks: dict[int, bytes]) -> None:
    """A file of `size` with `marks` in it; the rest are holes, which cost the server's disk nothing."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, text in marks.items():
            file.seek(offset)
            file.write(text)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        sha = hashlib.sha256()
        while block := file.read(4 * MIB):
            sha.update(block)
        return sha.hexdigest()


@pytest.fixture
def large(apache: Rig, request: pytest.FixtureRequest) -> Rig:
    """A remote file of 1 GiB that the mount has not looked into."""
    name = f"{request.node.originalname}.bin"
    put_sparse(apache.root / name, GIB, MARKS)
    apache.daemon.refresh(apache.mount)
    return apache.below(name)


def test_a_mebibyte_in_the_middle_of_a_gibibyte_transfers_at_most_two(large: Rig) -> None:
    before = large.status.bytes_received

    with large.mount.open("rb", buffering=0) as file:
        text = os.pread(file.fileno(), MIB, 512 * MIB)

    assert len(text) == MIB
    assert text.startswith(b"the middle of the file")
    assert large.status.bytes_received - before <= 2 * MIB


def test_four_kibibytes_into_a_gibibyte_need_no_download_and_arrive_merged(large: Rig) -> None:
    before = large.status.bytes_received

    with large.mount.open("r+b", buffering=0) as file:
        assert os.pwrite(file.fileno(), b"w" * 4096, 300 * MIB + 7) == 4096
    received = large.status.bytes_received - before
    large.daemon.sync(large.mount, timeout=120)

    # Beside the file's bytes there may be a listing on the way; 64 KiB is room for that and for no block of the file.
    assert received < 65536
    expected = large.root.with_name("expected.bin")
    put_sparse(expected, GIB, {**MARKS, 300 * MIB + 7: b"w" * 4096})
    assert digest(large.root) == digest(expected)


def test_uploading_two_gibibytes_keeps_every_process_small(apache: Rig) -> None:
    """Nearly all of it is holes, so that the local writing is quick; the upload sends each of the 2 GiB."""
    put_sparse(apache.mount / "upload.bin", 2 * GIB, {**MARKS, 2 * GIB - 5: b"ends."})

    apache.daemon.sync(apache.mount, timeout=140)

    uploaded = apache.root / "upload.bin"
    assert uploaded.stat().st_size == 2 * GIB
    with uploaded.open("rb") as file:
        for offset, text in {**MARKS, 2 * GIB - 5: b"ends."}.items():
            assert os.pread(file.fileno(), len(text), offset) == text
    peaks = {process.pid: process.peak_resident for process in apache.daemon.processes()}
    assert apache.status.pid in peaks
    assert {pid: peak for pid, peak in peaks.items() if peak >= 150_000_000} == {}
    (apache.mount / "upload.bin").unlink()


def test_writing_a_large_file_keeps_every_process_small(apache: Rig) -> None:
    block = os.urandom(4 * MIB)
    with (apache.mount / "written.bin").open("wb", buffering=0) as file:
        for _ in range(64):
            file.write(block)

    apache.daemon.sync(apache.mount, timeout=120)

    assert (apache.root / "written.bin").stat().st_size == 256 * MIB
    assert digest(apache.root / "written.bin") == hashlib.sha256(block * 64).hexdigest()
    assert max(process.peak_resident for process in apache.daemon.processes()) < 150_000_000


def test_a_second_read_of_an_unchanged_file_asks_the_daemon_nothing(apache: Rig) -> None:
    (apache.root / "again.bin").write_bytes(os.urandom(3 * MIB))
    apache.daemon.refresh(apache.mount)
    first = (apache.mount / "again.bin").read_bytes()
    reads = apache.status.requests.get("read", 0)

    second = (apache.mount / "again.bin").read_bytes()

    assert second == first
    assert reads > 0
    assert apache.status.requests.get("read", 0) == reads


def test_a_second_read_without_the_page_cache_comes_from_the_local_disk(apache: Rig) -> None:
    (apache.root / "local.bin").write_bytes(os.urandom(3 * MIB))
    apache.daemon.refresh(apache.mount)
    first = (apache.mount / "local.bin").read_bytes()
    received = apache.status.bytes_received
    drop_pages(apache.mount / "local.bin")

    second = (apache.mount / "local.bin").read_bytes()

    assert second == first
    assert apache.status.bytes_received - received < MIB


def test_a_thousand_writes_are_one_upload(apache: Rig) -> None:
    with (apache.mount / "appended.log").open("wb", buffering=0) as file:
        for number in range(1000):
            file.write(f"line {number}\n".encode())
    size = (apache.mount / "appended.log").stat().st_size
    before = apache.status.bytes_sent

    apache.daemon.sync(apache.mount)

    assert (apache.root / "appended.log").stat().st_size == size
    assert apache.status.bytes_sent - before < 3 * size
