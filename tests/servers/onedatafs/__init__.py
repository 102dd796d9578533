"""The interpreter of a site that has Onedata's library: ours, with a stand-in for `fs.onedatafs` (fake.py)."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

FAKE = Path(__file__).with_name("fake.py")
TOKEN = "the-token-of-the-test"
_SITE = """\
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fs.onedatafs", {fake!r})
sys.modules["fs.onedatafs"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


class FakeSite:
    """A directory with an interpreter, `python`, and the spaces that its library shows, `spaces`."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.spaces = base / "spaces"
        self.spaces.mkdir(parents=True)
        self.python = base / "python"
        (base / "site").mkdir()
        (base / "site" / "sitecustomize.py").write_text(_SITE.format(fake=str(FAKE)))
        command = shlex.join([sys.executable])
        variables = f"PYTHONPATH={shlex.quote(str(base / 'site'))} FAKE_ONEDATAFS_ROOT={shlex.quote(str(base))}"
        self.python.write_text(f'#!/bin/sh\nexec env {variables} {command} "$@"\n')
        self.python.chmod(0o755)
