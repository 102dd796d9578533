"""`nbmountctl login`: gets an app password for a configured mount and puts it where the mount reads it.

It does not know how a Nextcloud grants one (backends/nextcloud_login.py). No daemon is needed; one that runs sees the new
file by itself.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from nbmountd.backends.nextcloud_login import log_in
from nbmountd.config import MountConfig, WebDAVOptions
from nbmountd.configfile import load_config
from nbmountd.errors import ConfigError


def login(config: Path | None, name: str, say: Callable[[str], None]) -> None:
    """Has a person log in for the mount `name` and stores the password, readable by its owner only.

    Raises ConfigError when the mount has no place for one, RemoteError when none was granted.
    """
    loaded = load_config(config)
    options = _options(loaded.mounts, name)
    assert options.password_file is not None
    place = Path(options.password_file)

    def show(page: str) -> None:
        say(f"To let {name} use your files, open this page in any browser and agree:\n\n  {page}\n\nWaiting for it...")

    granted = trio.run(partial(log_in, options, show))
    _store(place, granted.password)
    say(f"The password is in {place}; it can be revoked in the security settings of the server.")
    if granted.user != options.user:
        say(f'In the configuration of {name}, write: user = "{granted.user}"')


def _options(mounts: tuple[MountConfig, ...], name: str) -> WebDAVOptions:
    found = [mount.options for mount in mounts if mount.name == name]
    if not found:
        raise ConfigError(f"there is no mount {name!r}; there are {', '.join(mount.name for mount in mounts) or 'none'}")
    options = found[0]
    if not isinstance(options, WebDAVOptions):
        raise ConfigError(f"{name}: only a Nextcloud can be logged in to")
    if options.password_file is None:
        raise ConfigError(f"{name}: say with `password_file` where its password is to be kept")
    return options


def _store(place: Path, password: str) -> None:
    """Writes the file at once or not at all; nobody else can read it at any moment."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(password + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except BaseException:
        os.unlink(temporary)
        raise
