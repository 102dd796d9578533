"""Small tools of every day: each script prints the same and leaves the same tree as in a local directory."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.mounted.posix.twins import Twins, tree

TEXT = Path(__file__).with_name("shell_tools.txt").read_text()
SCRIPTS = dict(part.split("\n", 1) for part in TEXT.split("## ")[1:])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_and_leaves_what_it_does_locally(name: str, twins: Twins) -> None:
    def call(place: Path) -> object:
        done = subprocess.run(
            ["bash", "-c", SCRIPTS[name]], cwd=place, capture_output=True, text=True, timeout=60, check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8"}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        said = done.stderr.replace(str(place), "HERE")
        return done.returncode, done.stdout, said, tree(place)

    twins.same(call)
