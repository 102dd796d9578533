"""What the two command lines share: the meaning of their arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        from nbmountd import __version__

        click.echo(__version__)
        context.exit()


version_option = click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Print the version."
)
config_option = click.option(
    "--config", type=click.Path(path_type=Path), metavar="FILE", help="Read this file, and no other."
)


def duration(_context: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    """Callback of an option that is a time: seconds, from "30", "30s" or "5 min"."""
    from nbmountd.units import parse_duration

    try:
        return None if value is None else parse_duration(value)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from exc


def absolute_path(_context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
    """Callback of an argument that is a path, or several: `absolute` of each."""
    if isinstance(value, str):
        return absolute(value)
    return value if value is None else tuple(absolute(each) for each in value)


def absolute(path: str) -> str:
    """`path` from the root, with the symlinks in its parents resolved and the last name as it is."""
    parent, name = os.path.split(path.rstrip("/") or "/")
    if name in ("", ".", ".."):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(parent), name)
