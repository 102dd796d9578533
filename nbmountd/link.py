"""Asks the daemon for `nbmountctl` and prints what it says; a failure ends the program with its exit status.

It does not know the verbs. Standard output holds replies and events alone, so that scripts can read it.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from nbmountd.control.schema import AnyReply, AnyRequest

FAILED, NOT_RUNNING = 1, 3

_REPLY_TIMEOUT = 60.0  # for verbs that do not wait for a remote; a guess, well above any deadline in the daemon
_PROGRESS_PERIOD = 5.0


@dataclass(frozen=True)
class Link:
    """How to reach the daemon and how to print what it says."""

    socket: Path | None
    as_json: bool

    def ask(self, request: AnyRequest, *, timeout: float | None = _REPLY_TIMEOUT) -> None:
        """Prints the replies; ends the program unless the last one is a success."""
        self.print(self.reply(request, timeout=timeout))

    def reply(self, request: AnyRequest, *, timeout: float | None = _REPLY_TIMEOUT) -> AnyReply:
        """The last reply, which is not Failed. Events are printed to standard output, progress to standard error."""
        from nbmountd import places
        from nbmountd.control import client, schema

        path = self.socket if self.socket is not None else places.find_control_socket()
        meter = _Meter(self)
        try:
            with closing(client.ask_sync(path, request, timeout=timeout)) as replies:
                for reply in replies:
                    if isinstance(reply, schema.Event):
                        self.print(reply)
                    elif isinstance(reply, schema.Progress):
                        meter.show(reply)
                    elif isinstance(reply, schema.Failed):
                        meter.close()
                        self.fail(reply.message, reply.code)
                    else:
                        return reply
        except client.DaemonNotRunning as exc:
            self.fail(f"{exc}; start it with 'nbmountd run'", NOT_RUNNING)
        except client.ControlError as exc:
            self.fail(str(exc), FAILED)
        finally:
            meter.close()
        raise AssertionError("ask_sync ends with a reply or an error")

    def print(self, reply: AnyReply) -> None:
        if self.as_json:
            click.echo(_json_line(reply))
            return
        from nbmountd.show import lines_of

        for line in lines_of(reply):
            click.echo(line)

    def fail(self, message: str, code: int) -> NoReturn:
        if self.as_json:
            from nbmountd.control.schema import Failed

            click.echo(_json_line(Failed(message=message, code=code)))
        else:
            from nbmountd.show import clean

            click.echo(f"nbmountctl: {clean(message)}", err=True)
        sys.exit(code)


def _json_line(reply: AnyReply) -> str:
    from nbmountd.control.wire import encode_line

    return encode_line(reply).decode().removesuffix("\n")


class _Meter:
    """Progress on standard error: a bar on a terminal, now and then a line elsewhere, JSON lines if so asked."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._bar: Any = None
        self._task: Any = None
        self._next_line = 0.0

    def show(self, reply: Any) -> None:
        if self._link.as_json:
            click.echo(_json_line(reply), err=True)
        elif sys.stderr.isatty():
            self._draw(reply)
        elif time.monotonic() >= self._next_line:
            from nbmountd.show import progress

            self._next_line = time.monotonic() + _PROGRESS_PERIOD
            click.echo(progress(reply), err=True)

    def _draw(self, reply: Any) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.markup import escape
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            self._escape = escape
            columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=reply.bytes_total)
        from nbmountd.show import clean

        text = f"{reply.files_left} left  {self._escape(clean(reply.current))}"
        done = max(reply.bytes_total - reply.bytes_left, 0)
        self._bar.update(self._task, total=reply.bytes_total, completed=done, description=text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
