"""What could not be read and was put aside: how it gets there, which there is, and how a person gets it out or gives it up.

It lies in `quarantine/<date>` of a mount's state directory: the damaged database, the journal, and all unsent bytes as the
files they were in, one a layer. Names are found as far as the damaged database can still be read. It knows no node.
"""

from __future__ import annotations

import datetime
import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from nbmountd.errors import StateError

COPY_PIECE = 2**20


@dataclass(frozen=True, slots=True)
class PutAside:
    """One quarantine: where it is, since when (seconds since 1970), and how many bytes of files it holds."""

    directory: Path
    at: float
    size: int


def put_aside(state: Path) -> Path:
    """Puts database, journal and unsent bytes aside; returns where they are now. Raises StateError."""
    target = state / "quarantine" / datetime.datetime.now().strftime("%Y-%m-%d %H%M%S")
    try:
        number = 1
        while target.exists():
            number += 1
            target = target.with_name(f"{target.name.partition(' (')[0]} ({number})")
        target.mkdir(mode=0o700, parents=True)
        # The unsent bytes first: if we die in between, they are not left beside a new database that does not know them.
        for name in ("unsent", "journal.*", "nodes.db-*", "nodes.db"):
            for path in sorted(state.glob(name)):
                path.rename(target / path.name)
    except OSError as exc:
        raise StateError(f"{state} cannot be read, and cannot be put aside: {exc}") from exc
    return target


def all_put_aside(state: Path) -> list[PutAside]:
    """What nobody has dealt with, oldest first."""
    try:
        directories = sorted((state / "quarantine").iterdir())
    except FileNotFoundError:
        return []
    return [
        PutAside(directory, directory.stat().st_mtime, sum(path.stat().st_size for path in _layers(directory)))
        for directory in directories
    ]


def export(kept: PutAside, target: Path) -> int:
    """Copies each layer of unsent bytes into the new directory `target`; returns how many. Raises OSError.

    A copy is as long as what was written up to its end, with zeros where nothing was written; its name is the layer's
    number, and the file's last name where the database still tells.
    """
    target.mkdir(mode=0o700, parents=True)
    names = _names(kept.directory / "nodes.db")
    count = 0
    for path in _layers(kept.directory):
        name = names.get(path.name, "").replace("/", "_")
        with path.open("rb") as source, (target / f"{path.name} {name}".rstrip()[:200]).open("xb") as copy:
            shutil.copyfileobj(source, copy, COPY_PIECE)
        count += 1
    return count


def discard(kept: PutAside) -> None:
    """Deletes it for good. Raises OSError."""
    shutil.rmtree(kept.directory)


def _layers(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / "unsent").glob("*/*") if path.name.isdigit() and path.is_file())


def _names(database: Path) -> dict[str, str]:
    """Number of a layer -> last name of its file. Read-only, and as far as it goes."""
    names: dict[str, str] = {}
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
            for layer, name in connection.execute("SELECT layers.id, nodes.name FROM layers JOIN nodes USING (ino)"):
                names[str(layer)] = os.fsdecode(name)
    except (sqlite3.Error, TypeError):
        pass
    return names
