"""A disk that is really full when it is full: a small tmpfs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


class SmallDisk:
    """A mounted file system of a few MiB. `fill` takes all of its room, `free` gives it back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self, leave: int = 0) -> None:
        """Leaves `leave` bytes free, rounded down to pages."""
        stat = os.statvfs(self.path)
        room = stat.f_bavail * stat.f_frsize - leave
        with self._filler.open("ab") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), file.tell(), max(room, 1))

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[SmallDisk | None]:
    """A disk of `size` bytes; None where this process may not mount one."""
    with tempfile.TemporaryDirectory(prefix="nbm-disk-") as directory:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "nbmountd-test", directory],
            check=False, capture_output=True,
        )  # fmt: skip
        if mounted.returncode:
            yield None
            return
        try:
            yield SmallDisk(Path(directory))
        finally:
            subprocess.run(["umount", "-l", directory], check=True)
