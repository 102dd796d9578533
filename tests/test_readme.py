"""README's tables of promises name tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def rows(heading: str) -> list[str]:
    """The rows of the table below a heading, without its first two lines."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def named(row: str) -> list[str]:
    return re.findall(r"`([^`\s]+(?:\.py(?:::\w+)?|/))`", row.rstrip("| ").rpartition(" | ")[2])


def missing(name: str, base: Path) -> bool:
    file, _, test = name.partition("::")
    path = base / file
    if file.endswith("/"):
        return not any(path.glob("test_*.py"))
    return not path.is_file() or (bool(test) and f"def {test}(" not in path.read_text())


@pytest.mark.parametrize(
    ("heading", "base"),
    [("What programs may rely on", ROOT / "tests" / "mounted"), ("Threat model", ROOT / "tests")],
)
def test_every_row_names_a_test_that_there_is(heading: str, base: Path) -> None:
    table = rows(heading)

    assert len(table) > 8
    assert [row for row in table if not named(row)] == []
    assert [name for row in table for name in named(row) if missing(name, base)] == []
