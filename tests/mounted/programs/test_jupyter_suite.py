"""jupyter_server's own tests of its contents managers and handlers, with their directories on the mount.

The tests are in its source archive only, and bring dozens of packages: only the large edition loads them. They run on the
local disk first, and must end there as they do on the mount. Their home directory is beside their files in both runs: with
files on another device than HOME, `test_delete_non_empty_folder` of jupyter_server 2.21 expects a refusal (HTTP 400) that its
manager gives on Windows only, so that it fails on any disk but that of HOME.
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

pytestmark = pytest.mark.skipif(
    not LARGE, reason="it downloads jupyter_server's sources and what they need (NBMOUNTD_TEST_LARGE=1)"
)


@pytest.fixture
def python(run: Run, tmp_path: Path) -> Path:
    """Python in an environment that has what the tests need."""
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", f"jupyter_server=={version('jupyter_server')}", *NEEDED, cwd=tmp_path)
    return python


@pytest.fixture
def sources(run: Run, python: Path, tmp_path: Path) -> Path:
    """jupyter_server's source tree."""
    wanted = f"jupyter_server=={version('jupyter_server')}"
    run(python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "jupyter_server", wanted, cwd=tmp_path)
    with tarfile.open(next(tmp_path.glob("jupyter_server-*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    return next(path for path in tmp_path.glob("jupyter_server-*") if path.is_dir())


def outcomes(run: Run, python: Path, sources: Path, where: Path) -> dict[str, str]:
    """How each test ends (PASSED, SKIPPED, ...) with all its files, and HOME, below `where`. Fails if one fails."""
    (where / "home").mkdir(parents=True)
    said = run(
        python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "log_cli=false",
        "-o", "timeout=600",  # one of them copies a large directory
        f"--basetemp={where}/files", "tests/services/contents", cwd=sources, HOME=str(where / "home"),
    )  # fmt: skip
    return dict(re.findall(r"^(tests/\S+.*?) ([A-Z]+)(?: .*)?$", said, re.MULTILINE))


def test_its_contents_tests_end_on_the_mount_as_on_the_local_disk(
    folder: Rig, run: Run, python: Path, sources: Path, tmp_path: Path
) -> None:
    reference = outcomes(run, python, sources, tmp_path / "local")

    found = outcomes(run, python, sources, folder.mount / "jupyter")

    assert found == reference
    assert list(found.values()).count("PASSED") > 300
    assert any((folder.mount / "jupyter").rglob("*.ipynb")), "they ran elsewhere"
    folder.daemon.sync(folder.mount, timeout=LIMIT)
    shutil.rmtree(folder.mount / "jupyter")
