"""The entry points of the two command lines, and the verbs of `nbmountd`: arguments in, exit status out.

What a verb does is elsewhere and imported only when it is done, so that both start fast. `nbmountctl`'s verbs are in ctl.py.
Exit status: 0 done, 1 failed, 2 usage or configuration, 3 daemon not running, 4 not safe in time, 5 no way to mount here,
130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

import click

from nbmountd.arguments import CONTEXT, config_option, passed_descriptors, version_option
from nbmountd.errors import ConfigError, NbmountdError

FAILED, USAGE, NO_WAY, INTERRUPTED = 1, 2, 5, 130


def nbmountd() -> NoReturn:
    """Entry point of the daemon's command line."""
    _main(_daemon_group, "nbmountd")


def nbmountctl() -> NoReturn:
    """Entry point of the user's command line."""
    from nbmountd.ctl import control_group

    _main(control_group, "nbmountctl")


def _main(group: click.Group, name: str) -> NoReturn:
    """Runs `group`; the one place where an error becomes a line and an exit status."""
    try:
        group.main(prog_name=name, standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(INTERRUPTED)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except NbmountdError as exc:
        from nbmountd.log import mask

        click.echo(f"{name}: {mask(str(exc))}", err=True)
        sys.exit(_status_of(exc))
    sys.exit(0)


def _status_of(exc: NbmountdError) -> int:
    from nbmountd.ways import NoWayToMount

    return USAGE if isinstance(exc, ConfigError) else NO_WAY if isinstance(exc, NoWayToMount) else FAILED


# --- nbmountd ----------------------------------------------------------------------------------------------------------


@click.group(name="nbmountd", context_settings=CONTEXT)
@version_option
def _daemon_group() -> None:
    """Remote storages as ordinary directories. Nothing that was saved is ever lost."""


@_daemon_group.command("run")
@config_option
@click.option(
    "--fuse-fd", "passed", metavar="NAME=FD", multiple=True, callback=passed_descriptors,
    help="Serve the mount NAME on a FUSE connection that somebody else has mounted: a descriptor, or the path of a unix socket"
    " to receive it from. May be repeated.",
)
@click.option(
    "--mount-helper", "helper", envvar="NBMOUNTD_MOUNT_HELPER", metavar="SOCKET",
    help="Have everything mounted by the `nbmountd mount-helper` that listens there (also NBMOUNTD_MOUNT_HELPER).",
)
def _run(config: Path | None, passed: dict[str, int], helper: str | None) -> None:
    """Mount everything that is configured and serve it, in the foreground."""
    from nbmountd import handover, ways
    from nbmountd.fuse import borrow
    from nbmountd.privileges import keep_memory_private

    if helper:
        os.environ[borrow.VARIABLE] = helper
    if not passed and not borrow.is_named() and not {handover.VARIABLE, "LISTEN_FDS"} & os.environ.keys():
        ways.choose(trials=False)  # raises NoWayToMount
    keep_memory_private()
    import trio

    from nbmountd import launch, log, supervisor
    from nbmountd.configfile import load_config

    # After the last import, so that all of them are in memory once; before the configuration is read, so that a worker knows
    # the secrets of its own mount only.
    server = launch.ForkServer(supervisor.WORKER)
    server.fork()
    try:
        loaded = load_config(config)
        log.configure(loaded.daemon.log_level, loaded.daemon.log_format)
        trio.run(partial(supervisor.run, loaded, server=server, load=partial(load_config, config), passed=passed))
    except (KeyboardInterrupt, ConfigError):
        raise
    except BaseException as exc:
        ours = _ours(exc)
        if ours is not None:
            raise ours from None
        log.get_logger(__name__).exception("the daemon ended by a bug")
        sys.exit(FAILED)
    finally:
        server.close()


def _ours(exc: BaseException) -> NbmountdError | None:
    """The error of ours in `exc`, which may be groups of groups; None if there is anything else in it."""
    if isinstance(exc, NbmountdError):
        return exc
    inner = getattr(exc, "exceptions", None)
    if not isinstance(inner, tuple):
        return None
    found = [_ours(each) for each in inner]
    return found[0] if None not in found else None


@_daemon_group.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@config_option
@click.option("--userns", is_flag=True, help="Mount in a user namespace: needs /dev/fuse and no privilege at all.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def _exec(config: Path | None, userns: bool, command: tuple[str, ...]) -> None:
    """Run COMMAND with the mounts beside it; send what is unsent after its end; return its exit status.

    For containers: `nbmountd exec -- start-notebook.py`. Whatever goes wrong with mounting, COMMAND runs.
    """
    from nbmountd.wrapper import run

    sys.exit(run(command, config, userns=userns))


@_daemon_group.command("mount-helper")
@click.option("--socket", "path", type=click.Path(path_type=Path), metavar="PATH", help="Where to listen.")
@click.option("--allow-uid", "uids", type=int, multiple=True, required=True, help="A uid that may mount. May be repeated.")
@click.option(
    "--allow-prefix", "prefixes", multiple=True, default=("/home",), show_default=True, metavar="DIRECTORY",
    help="Mount points lie below it. May be repeated.",
)
@click.option("--socket-mode", default="666", show_default=True, metavar="OCTAL", help="Who may connect at all.")
def _mount_helper(path: Path | None, uids: tuple[int, ...], prefixes: tuple[str, ...], socket_mode: str) -> None:
    """Mount for daemons that may not, as root: they ask over a socket and get the connection to the kernel.

    For a node or a pod whose notebook containers have neither /dev/fuse nor any right; see docker/kubernetes.
    """
    from nbmountd.fuse.borrow import DEFAULT
    from nbmountd.mounthelper import Rules, serve

    bad = [prefix for prefix in prefixes if not prefix.startswith("/") or not prefix.strip("/")]
    if bad or not re.fullmatch("[0-7]{3}", socket_mode):
        raise click.UsageError("a prefix is an absolute directory below /, a mode three octal digits")
    serve(path or Path(DEFAULT), Rules(frozenset(uids), prefixes), mode=int(socket_mode, 8))


@_daemon_group.command("demo")
@click.option("--keep", is_flag=True, help="Leave the mounts up at the end, to look around.")
@click.option("--stop", is_flag=True, help="End what an earlier --keep left up.")
@click.option("--directory", type=click.Path(path_type=Path), help="Where to make everything.")
def _demo(keep: bool, stop: bool, directory: Path | None) -> None:
    """Show the main things on remotes of its own, in a directory of its own."""
    from nbmountd.demo import run_demo

    sys.exit(run_demo(keep=keep, stop=stop, directory=directory))


@_daemon_group.group("config")
def _config_group() -> None:
    """Look at the configuration."""


@_config_group.command("check")
@config_option
def _config_check(config: Path | None) -> None:
    """Check the configuration; print one line per mount."""
    from nbmountd.configfile import load_config
    from nbmountd.show import aligned, clean

    loaded = load_config(config)
    click.echo(f"{clean(loaded.source)}: correct, {len(loaded.mounts)} mounts")
    rows = [
        (mount.name, mount.backend, "read-only" if mount.read_only else "read-write", clean(mount.path))
        for mount in loaded.mounts
    ]
    for line in aligned(rows):
        click.echo(line)


@_config_group.command("schema")
def _config_schema() -> None:
    """Print the JSON schema of the configuration file, for editors."""
    import json

    from nbmountd.configschema import config_schema

    click.echo(json.dumps(config_schema(), indent=2))
