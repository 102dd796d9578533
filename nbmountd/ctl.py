"""The verbs of `nbmountctl`: each makes a request of its arguments and prints the replies.

It does not know what the daemon does with a request, nor how a reply looks as text (show.py). schema.py and all else that is
slow to import is imported by the verb that needs it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nbmountd.arguments import CONTEXT, absolute_path, config_option, duration, read_secret, setting, version_option
from nbmountd.link import FAILED, Link

if TYPE_CHECKING:
    from nbmountd.control.schema import StatusReply

F = TypeVar("F", bound=Callable[..., Any])


@click.group(name="nbmountctl", context_settings=CONTEXT)
@click.option(
    "--socket", envvar="NBMOUNTD_SOCKET", type=click.Path(path_type=Path), metavar="PATH",
    help="The daemon's control socket (also NBMOUNTD_SOCKET).",
)
@click.option("--json", "as_json", is_flag=True, help="Print replies as JSON, one a line.")
@version_option
@click.pass_context
def control_group(context: click.Context, socket: Path | None, as_json: bool) -> None:
    """See and steer the mounts of a running nbmountd.

    Exit status: 0 done, 1 failed, 2 usage, 3 daemon not running, 4 not safe in time.
    """
    context.obj = Link(socket, as_json)


def _mount_option(command: F) -> F:
    return click.option("--mount", metavar="NAME", help="Only this mount.")(command)


@control_group.command("status")
@click.option("--watch", is_flag=True, help="Show it again whenever it changes, until interrupted.")
@_mount_option
@click.pass_obj
def _status(link: Link, watch: bool, mount: str | None) -> None:
    """How the mounts are, and whether everything is safe."""
    from nbmountd.control import schema

    if not watch:
        link.ask(schema.Status(mount=mount))
        return
    shown: StatusReply | None = None
    while True:
        reply = link.reply(schema.Status(mount=mount))
        if isinstance(reply, schema.StatusReply) and reply != shown:
            if sys.stdout.isatty() and not link.as_json:
                click.clear()
            elif shown is not None and not link.as_json:
                click.echo()
            link.print(reply)
            shown = reply
        time.sleep(1)


@control_group.command("login")
@click.argument("name")
@config_option
def _login(name: str, config: Path | None) -> None:
    """Get an app password for the Nextcloud mount NAME.

    Prints the address of a page to agree on, in any browser, and stores the password in the mount's `password_file`.
    """
    from nbmountd.login import login

    login(config, name, click.echo)


@control_group.command("mount")
@click.argument("name")
@click.pass_obj
def _mount(link: Link, name: str) -> None:
    """Mount a configured mount that is not mounted."""
    from nbmountd.control import schema

    link.ask(schema.Mount(mount=name))


@control_group.command("unmount")
@click.argument("name")
@click.option("--timeout", metavar="TIME", callback=duration, help="How long to wait; what is unsent then stays kept.")
@click.pass_obj
def _unmount(link: Link, name: str, timeout: float | None) -> None:
    """Send what is unsent, then unmount."""
    from nbmountd.control import schema

    link.ask(schema.Unmount(mount=name, timeout=timeout), timeout=None)


@control_group.command("add")
@click.argument("name")
@click.option("--backend", metavar="KIND", help="What it is: webdav, b2drop, onedata, ... (needed for a new one).")
@click.option("--path", metavar="PATH", help="Where to mount it; ~/NAME if not said.")
@click.option("--url", metavar="URL", help="The remote's address.")
@click.option("--user", metavar="USER", help="Who logs in, with a password; without it the secret is a token.")
@click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="Any other key of [[mount]]. May be repeated.")
@click.option("--no-secret", is_flag=True, help="There is no password or token to read, or it stays the same.")
@config_option
@click.pass_obj
def _add(
    link: Link, /, name: str, settings: tuple[str, ...], no_secret: bool, config: Path | None, **given: str | None
) -> None:
    """Add a mount of yours, or change one that you added.

    The password or token is read from standard input, never from an argument. For a mount that is there, it is enough to give
    another secret. It is kept in ~/.config/nbmountd/accounts, readable to you alone.
    """
    from nbmountd import accounts

    keys: dict[str, object] = {key: value for key, value in given.items() if value is not None}
    keys |= dict(setting(text) for text in settings)
    if "backend" in keys:
        keys.setdefault("path", f"~/{name}")
    secret = None if no_secret else read_secret()
    where = accounts.add(name, keys, secret, config)
    _reload_if_running(link, f"{name} is added" + (f"; its secret is in {where}" if where else ""))


@control_group.command("remove")
@click.argument("name")
@click.pass_obj
def _remove(link: Link, name: str) -> None:
    """Unmount and forget a mount that was added, with its secret. What was not sent yet stays kept."""
    from nbmountd import accounts

    accounts.remove(name)
    _reload_if_running(link, f"{name} is removed")


def _reload_if_running(link: Link, done: str) -> None:
    """A daemon that does not run reads its configuration when it starts."""
    from nbmountd import places
    from nbmountd.control import client, schema

    try:
        with closing(client.ask_sync(link.socket or places.find_control_socket(), schema.Ping(), timeout=5.0)) as replies:
            next(replies)
    except client.DaemonNotRunning:
        link.print(schema.Done(message=f"{done}; the daemon is not running"))
        return
    except client.ControlError as exc:
        link.fail(f"{done}, but the daemon cannot be told: {exc}", FAILED)
    reply = link.reply(schema.Reload(), timeout=None)
    link.print(schema.Done(message=f"{done}; {reply.message}" if isinstance(reply, schema.Done) else done))


@control_group.command("restart")
@click.argument("name", required=False)
@click.pass_obj
def _restart(link: Link, name: str | None) -> None:
    """Replace the worker of the mount NAME, or of all. Open files stay open."""
    from nbmountd.control import schema

    link.ask(schema.Restart(mount=name), timeout=None)


@control_group.command("upgrade")
@click.pass_obj
def _upgrade(link: Link) -> None:
    """Have the daemon become the version that is installed now. Mounts and open files stay."""
    from nbmountd.control import schema

    link.ask(schema.Upgrade())


@control_group.command("reload")
@click.pass_obj
def _reload(link: Link) -> None:
    """Have the daemon read its configuration again and change what is different."""
    from nbmountd.control import schema

    link.ask(schema.Reload(), timeout=None)


@control_group.command("sync")
@click.argument("paths", nargs=-1, callback=absolute_path)
@click.option("--timeout", metavar="TIME", callback=duration, help="Give up waiting after this time, with exit status 4.")
@_mount_option
@click.pass_obj
def _sync(link: Link, paths: tuple[str, ...], timeout: float | None, mount: str | None) -> None:
    """Send everything (or what is below PATHS) now, and wait until the remotes have it."""
    from nbmountd.control import schema

    reply = link.reply(schema.Sync(paths=paths, timeout=timeout, mount=mount), timeout=None)
    if reply == schema.Done() and not link.as_json:
        reply = schema.Done(message="safe")
    link.print(reply)


@control_group.command("queue")
@_mount_option
@click.pass_obj
def _queue(link: Link, mount: str | None) -> None:
    """What is not sent yet, and why."""
    from nbmountd.control import schema

    link.ask(schema.Queue(mount=mount))


@control_group.command("refresh")
@click.argument("path", required=False, callback=absolute_path)
@_mount_option
@click.pass_obj
def _refresh(link: Link, path: str | None, mount: str | None) -> None:
    """Ask the remote anew for what is below PATH, or for everything."""
    from nbmountd.control import schema

    link.ask(schema.Refresh(path=path, mount=mount))


@control_group.command("explain")
@click.argument("path", required=False, callback=absolute_path)
@click.option("--requests", is_flag=True, help="Instead of a file: what programs are waiting for now, and how long.")
@_mount_option
@click.pass_obj
def _explain(link: Link, path: str | None, requests: bool, mount: str | None) -> None:
    """Everything that is known of one file, or of what programs wait for."""
    from nbmountd.control import schema

    if requests:
        link.ask(schema.Requests(mount=mount))
        return
    if path is None:
        raise click.UsageError("name a PATH, or --requests")
    link.ask(schema.Explain(path=path))


@control_group.command("conflicts")
@click.argument("path", required=False, callback=absolute_path)
@click.option("--keep", type=click.Choice(["local", "remote", "both"]), help="Resolve the conflict at PATH.")
@_mount_option
@click.pass_obj
def _conflicts(link: Link, path: str | None, keep: Any, mount: str | None) -> None:
    """Files that changed here and on the remote; both versions are kept."""
    from nbmountd.control import schema

    if keep is not None and path is None:
        raise click.UsageError("--keep needs the PATH of the conflict")
    link.ask(schema.Conflicts(path=path, keep=keep, mount=mount))


@control_group.group("parked", invoke_without_command=True)
@click.pass_context
def _parked(context: click.Context) -> None:
    """Unsent work that only a person can help."""
    if context.invoked_subcommand is None:
        context.invoke(_parked_list)


@_parked.command("list")
@_mount_option
@click.pass_obj
def _parked_list(link: Link, mount: str | None = None) -> None:
    """Show it."""
    from nbmountd.control import schema

    link.ask(schema.Parked(mount=mount))


@_parked.command("retry")
@click.argument("path", required=False, callback=absolute_path)
@_mount_option
@click.pass_obj
def _parked_retry(link: Link, path: str | None, mount: str | None) -> None:
    """Try the one at PATH again, or all."""
    from nbmountd.control import schema

    link.ask(schema.Parked(action="retry", path=path, mount=mount))


@_parked.command("export")
@click.argument("directory", callback=absolute_path)
@click.argument("path", required=False, callback=absolute_path)
@_mount_option
@click.pass_obj
def _parked_export(link: Link, directory: str, path: str | None, mount: str | None) -> None:
    """Copy the one at PATH, or all, into DIRECTORY."""
    from nbmountd.control import schema

    link.ask(schema.Parked(action="export", directory=directory, path=path, mount=mount), timeout=None)


@_parked.command("discard")
@click.argument("path", required=False, callback=absolute_path)
@click.option("--all", "everything", is_flag=True, help="All that is parked, instead of one PATH.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_mount_option
@click.pass_obj
def _parked_discard(link: Link, path: str | None, everything: bool, yes: bool, mount: str | None) -> None:
    """Give up what was written and not sent at PATH. It cannot be brought back."""
    from nbmountd.control import schema

    if (path is None) is not everything:
        raise click.UsageError("name one PATH, or --all")
    if not yes:
        click.confirm(f"Lose what was not sent of {path or 'everything that is parked'}?", abort=True, err=True)
    link.ask(schema.Parked(action="discard", path=path, mount=mount))


@control_group.group("cache", invoke_without_command=True)
@click.pass_context
def _cache(context: click.Context) -> None:
    """The local copies of what is safe."""
    if context.invoked_subcommand is None:
        context.invoke(_cache_usage)


@_cache.command("usage")
@_mount_option
@click.pass_obj
def _cache_usage(link: Link, mount: str | None = None) -> None:
    """How much space they take."""
    from nbmountd.control import schema

    link.ask(schema.Cache(mount=mount))


@_cache.command("evict")
@click.argument("path", required=False, callback=absolute_path)
@_mount_option
@click.pass_obj
def _cache_evict(link: Link, path: str | None, mount: str | None) -> None:
    """Give up the copies below PATH, or all. Nothing unsent is touched."""
    from nbmountd.control import schema

    link.ask(schema.Cache(evict=True, path=path, mount=mount))


@control_group.command("pin")
@click.argument("path", callback=absolute_path)
@click.pass_obj
def _pin(link: Link, path: str) -> None:
    """Keep PATH in the cache."""
    from nbmountd.control import schema

    link.ask(schema.Pin(path=path))


@control_group.command("unpin")
@click.argument("path", callback=absolute_path)
@click.pass_obj
def _unpin(link: Link, path: str) -> None:
    """Keep PATH in the cache no longer."""
    from nbmountd.control import schema

    link.ask(schema.Pin(path=path, on=False))


@control_group.command("prefetch")
@click.argument("path", callback=absolute_path)
@click.pass_obj
def _prefetch(link: Link, path: str) -> None:
    """Bring everything below PATH into the cache."""
    from nbmountd.control import schema

    link.ask(schema.Prefetch(path=path), timeout=None)


@control_group.command("events")
@_mount_option
@click.pass_obj
def _events(link: Link, mount: str | None) -> None:
    """Follow what happens, until interrupted."""
    from nbmountd.control import schema

    link.ask(schema.Events(mount=mount), timeout=None)


@control_group.command("log-level")
@click.argument("level", type=click.Choice(["debug", "info", "warning", "error"]))
@_mount_option
@click.pass_obj
def _log_level(link: Link, level: Any, mount: str | None) -> None:
    """Change how much the daemon logs, until it ends."""
    from nbmountd.control import schema

    link.ask(schema.LogLevel(level=level, mount=mount))


@control_group.command("metrics")
@_mount_option
@click.pass_obj
def _metrics(link: Link, mount: str | None) -> None:
    """Counters in Prometheus' text format."""
    from nbmountd.control import schema

    link.ask(schema.Metrics(mount=mount))


@control_group.command("doctor")
@config_option
@click.pass_obj
def _doctor(link: Link, config: Path | None) -> None:
    """Check this machine and this configuration; needs no daemon."""
    import json

    from nbmountd import doctor

    checks = doctor.examine(config=config, socket=link.socket)
    if link.as_json:
        click.echo(json.dumps([check.as_dict() for check in checks]))
    else:
        for line in doctor.lines_of(checks):
            click.echo(line)
    if any(check.level == "fail" for check in checks):
        sys.exit(FAILED)
