"""What the two command lines share: the meaning of their arguments."""

from __future__ import annotations

import os
import sys
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


def setting(text: str) -> tuple[str, object]:
    """KEY=VALUE; the value as JSON where it is a number, a list, true or false, else as text."""
    import json

    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise click.BadParameter(f"{text!r} is not like read_only=true")
    try:
        told = json.loads(value)
    except ValueError:
        return key, value
    return key, told if isinstance(told, bool | int | float | list) else value


def read_secret() -> str:
    """A password or token: asked for on a terminal, without showing it, else the first line of standard input."""
    if sys.stdin.isatty():
        secret: str = click.prompt("Password or token", hide_input=True, err=True)
        return secret
    return sys.stdin.readline()


def passed_descriptors(_context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    """Callback of NAME=FD options, FD being a descriptor of this process or the path of a unix socket that sends one.

    After an upgrade in place the connections come from the program before, and what the options said is long used.
    """
    from nbmountd.handover import VARIABLE

    if VARIABLE in os.environ:
        return {}
    found = {}
    for value in values:
        name, _, source = value.partition("=")
        try:
            fd = int(source) if source.isdigit() else _receive(source)
            os.set_inheritable(fd, False)
        except (OSError, ValueError) as exc:
            raise click.BadParameter(f"{value!r} leads to no descriptor: {exc}", param=parameter) from exc
        found[name] = fd
    return found


def _receive(path: str) -> int:
    """One descriptor (SCM_RIGHTS) from whoever listens at `path`. Raises OSError, ValueError."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sender:
        sender.settimeout(10.0)
        sender.connect(path)
        fds = socket.recv_fds(sender, 1, 1)[1]
    if len(fds) != 1:
        raise ValueError("nothing was sent")
    return fds[0]
