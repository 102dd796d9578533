"""jupyter_server's own tests of its contents managers and handlers, with their directories on the mount.

The tests are in its source archive only, and bring dozens of packages: only the large edition loads them.
"""

from __future__ import annotations

import re
import shutil
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.programs.conftest import LARGE, LIMIT, Run

NEEDED = ("pytest-jupyter[server]>=0.7", "pytest-timeout", "pytest-console-scripts", "ipykernel", "flaky", "requests")


@pytest.mark.skipif(not LARGE, reason="it downloads jupyter_server's sources and what they need (NBMOUNTD_TEST_LARGE=1)")
def test_its_contents_tests_pass_with_their_root_on_the_mount(folder: Rig, run: Run, tmp_path: Path) -> None:
    server = f"jupyter_server=={version('jupyter_server')}"
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", server, *NEEDED, cwd=tmp_path)
    run(python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "jupyter_server", server, cwd=tmp_path)
    with tarfile.open(next(tmp_path.glob("jupyter_server-*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    sources = next(path for path in tmp_path.glob("jupyter_server-*") if path.is_dir())

    said = run(
        python, "-m", "pytest", "-q", "-o", "addopts=", "-o", "log_cli=false", "-o", "timeout=600",  # copying a large directory
        f"--basetemp={folder.mount}/jupyter", "tests/services/contents", cwd=sources,
    )  # fmt: skip

    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) > 300, said
    assert "failed" not in said
    assert any((folder.mount / "jupyter").rglob("*.ipynb")), "they ran elsewhere"
    folder.daemon.sync(folder.mount, timeout=LIMIT)
    shutil.rmtree(folder.mount / "jupyter")
