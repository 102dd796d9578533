"""A part of the mounted suite in each way to run the daemon (modes.py says which); the whole takes minutes in each:

    python -m tests.mounted.modes user tests/mounted
"""

from __future__ import annotations

import os

import pytest

from tests.mounted.modes import MODE, MODES, run_tests

PART = (
    "tests/mounted/test_webdav_basics.py",
    "tests/mounted/posix/test_attributes.py::test_somebody_elses_ownership_is_refused_and_changes_nothing",
    "tests/mounted/posix/test_attributes.py::test_access_answers_from_the_mode",
)  # fmt: skip
CHOSEN = "(apache or test_attributes) and not ten_thousand"
pytestmark = pytest.mark.skipif(MODE != "root" or os.geteuid() != 0, reason="needs root, to be others")


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "root"])
def test_programs_work_whoever_mounts_and_serves(mode: str, capfd: pytest.CaptureFixture[str]) -> None:
    done = run_tests(mode, "-q", "-k", CHOSEN, *PART)
    if done is None:
        pytest.skip("no interpreter with pyfuse3 that an ordinary user may execute")
    printed = capfd.readouterr().out

    assert done.returncode == 0, printed[-20_000:]
    assert " passed" in printed
