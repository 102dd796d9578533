"""`nbmountctl doctor`: what this machine and this configuration allow, line by line, and what to do about it.

It changes nothing, needs no daemon and sends nothing to any remote. How a mount is made it knows only from its outside:
which rights the kernel asks for. What could hang (a mount, a foreign library) is asked in a child process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from nbmountd import places
from nbmountd.config import Config
from nbmountd.configfile import SYSTEM_FILE, VARIABLE, load_config, user_file
from nbmountd.control import client, schema
from nbmountd.doctor import machine, mounts
from nbmountd.doctor.check import Check
from nbmountd.errors import ConfigError, NbmountdError
from nbmountd.show import aligned, clean

_DAEMON_TIMEOUT = 10.0


def examine(*, config: Path | None = None, socket: Path | None = None) -> list[Check]:
    """All findings, in the order in which to read them. Raises nothing: a check that breaks is a finding."""
    loaded: list[Config] = []
    checks: list[Check] = []
    groups: tuple[Callable[[], Iterable[Check]], ...] = (
        machine.examine,
        lambda: _configuration(config, loaded),
        lambda: mounts.examine(loaded[0]) if loaded else (),
        lambda: _daemon(socket),
    )
    for group in groups:
        try:
            checks += group()
        except Exception as exc:
            checks.append(Check("warn", "doctor", f"a check broke: {type(exc).__name__}: {exc}", "please report this"))
    return checks


def lines_of(checks: Iterable[Check]) -> list[str]:
    """The findings as text, advice below each, and a last line with the verdict."""
    checks = list(checks)
    lines = []
    heads = aligned([(check.level, check.subject, clean(check.finding)) for check in checks])
    for check, head in zip(checks, heads, strict=True):
        lines.append(head)
        if check.advice:
            lines.append(f"      -> {clean(check.advice)}")
    failed = sum(check.level == "fail" for check in checks)
    warned = sum(check.level == "warn" for check in checks)
    lines.append(f"{failed} to repair, {warned} to look at" if failed or warned else "all is well")
    return lines


# --- configuration -----------------------------------------------------------------------------------------------------


def _configuration(path: Path | None, loaded: list[Config]) -> Iterable[Check]:
    """Puts the configuration into `loaded` when it can be read."""
    nothing = path is None and not os.environ.get(VARIABLE)
    try:
        config = load_config(path)
    except ConfigError as exc:
        nothing = nothing and not any(file.is_file() for file in (SYSTEM_FILE, user_file(os.environ)))
        if nothing and not os.environ.get("WEBDAV_URL"):
            yield Check("warn", "configuration", "none found", f"write {user_file(os.environ)}, or name one by --config")
        else:
            yield Check("fail", "configuration", str(exc), "correct it; 'nbmountd config check' looks again")
        return
    loaded.append(config)
    names = ", ".join(mount.name for mount in config.mounts) or "no mounts"
    yield Check("ok", "configuration", f"{config.source}: {names}")
    if any(getattr(mount.options, "password", None) for mount in config.mounts):
        for source in config.source.split(", "):
            file = Path(source)
            if file.is_file() and file.stat().st_mode & 0o077:
                yield Check("warn", "configuration", f"{file} holds a password and others can read it", f"chmod 600 {file}")


# --- the daemon --------------------------------------------------------------------------------------------------------


def _daemon(socket: Path | None) -> Iterable[Check]:
    path = socket if socket is not None else places.find_control_socket()
    try:
        *_, reply = client.ask_sync(path, schema.Status(), timeout=_DAEMON_TIMEOUT)
    except client.DaemonNotRunning:
        yield Check("warn", "daemon", f"not running (nobody answers at {path})", "start it with 'nbmountd run'")
        return
    except NbmountdError as exc:
        yield Check("fail", "daemon", str(exc), "see its log; restarting it loses nothing")
        return
    if not isinstance(reply, schema.StatusReply):
        yield Check("fail", "daemon", f"answered {getattr(reply, 'message', reply)}", "see its log")
        return
    yield Check("ok", "daemon", f"running, version {reply.version}, process {reply.pid}, at {path}")
    for mount in reply.mounts:
        yield _mount_state(mount)


def _mount_state(mount: schema.MountStatus) -> Check:
    subject = f"mount {mount.name}"
    unsafe = "" if not mount.unsent_files else f", {mount.unsent_files} files not yet safe"
    finding = f"{mount.state}{unsafe}" + (f": {mount.reason}" if mount.reason else "")
    if mount.state == "failed":
        return Check("fail", subject, finding, f"'nbmountctl mount {mount.name}' tries again; the daemon's log says more")
    if mount.state in ("live", "starting", "stopping", "unmounted"):
        attention = mount.conflicts or mount.parked
        advice = "see 'nbmountctl conflicts' and 'nbmountctl parked'" if attention else ""
        return Check("warn" if attention else "ok", subject, finding, advice)
    return Check("warn", subject, finding, "'nbmountctl status' says what to do")
