"""Mounts that the user adds by `nbmountctl add`: one file with the keys and one with the secret each, beside the configuration.

`~/.config/nbmountd/accounts/NAME.toml` is read like a `[[mount]]` of the configuration (configfile.py); `NAME.secret` is its
password_file or token_file, so another secret is noticed like any rotation. It asks no daemon. Directory 0700, files 0600.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from nbmountd import places
from nbmountd.config import BACKENDS, MountConfig
from nbmountd.configfile import NAME, accounts_directory, load_config
from nbmountd.errors import ConfigError, StateError

SECRET_LIMIT = 64 * 1024


def add(
    name: str, keys: Mapping[str, object], secret: str | None, config: Path | None = None,
    *, environ: Mapping[str, str] = os.environ,
) -> str:  # fmt: skip
    """Makes the account, or changes the keys and the secret of one that is there; None leaves a secret as it is.

    Returns where the secret is, "" if there is none. Raises ConfigError, and changes nothing then; StateError when the
    directory cannot be used. `config`: the configuration that it has to fit to.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot be a mount's name: letters, digits, '-', '_' and '.', at most 64")
    directory = places.private_directory(accounts_directory(environ))
    table, secret_path = directory / f"{name}.toml", directory / f"{name}.secret"
    old = _content(table)
    if old is None and "backend" not in keys:
        raise ConfigError(f"there is no account {name}; to make one, say which --backend ({', '.join(sorted(BACKENDS))})")
    if old is None and any(mount.name == name for mount in _configured(config, environ)):
        raise ConfigError(f"a mount {name} is configured already; its credential is where the configuration says")
    if secret is not None and not (secret.strip() and secret.strip().isprintable() and len(secret) <= SECRET_LIMIT):
        raise ConfigError("the secret must be one line of text")
    had_secret = secret_path.exists()
    if keys or (secret is not None and not had_secret):
        known = {**_keys_of(old), **keys}
        if secret is not None or had_secret:
            known.setdefault(_secret_key(str(known["backend"]), known), str(secret_path))
        lines = (f"{key} = {json.dumps(value)}\n" for key, value in {"name": name, **known}.items())
        _write(table, "[[mount]]\n" + "".join(lines))
        try:
            load_config(config, environ=environ)
        except ConfigError:
            _write(table, old) if old is not None else table.unlink()
            raise
    if secret is not None:
        _write(secret_path, secret.strip() + "\n")
    return str(secret_path) if secret is not None or had_secret else ""


def remove(name: str, *, environ: Mapping[str, str] = os.environ) -> None:
    """Forgets the account with its secret. Unsent work stays in the state directory. Raises ConfigError if there is none."""
    directory = accounts_directory(environ)
    if not NAME.fullmatch(name) or not (directory / f"{name}.toml").is_file():
        raise ConfigError(f"there is no account {name}; what a configuration file names is removed there")
    for suffix in ("toml", "secret"):
        with suppress(FileNotFoundError):
            (directory / f"{name}.{suffix}").unlink()


def _secret_key(backend: str, keys: Mapping[str, object]) -> str:
    """Under which key the path of the secret goes: a password where there is a user, else a token."""
    known = BACKENDS[backend].__struct_fields__ if backend in BACKENDS else ()
    if "password_file" in known and "user" in keys:
        return "password_file"
    return "token_file"


def _configured(config: Path | None, environ: Mapping[str, str]) -> tuple[MountConfig, ...]:
    with suppress(ConfigError):
        return load_config(config, environ=environ).mounts
    return ()


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as exc:
        raise StateError(f"{path}: cannot be read: {exc}") from exc


def _keys_of(text: str | None) -> dict[str, object]:
    """The keys that `add` has written: one a line, values in JSON."""
    found: dict[str, object] = {}
    for line in (text or "").splitlines():
        key, equals, value = line.partition(" = ")
        if equals and key != "name":
            with suppress(ValueError):
                found[key] = json.loads(value)
    return found


def _write(path: Path, text: str) -> None:
    """The whole file or none, for its owner alone, through no link."""
    new = path.with_name(path.name + ".new")
    with suppress(FileNotFoundError):
        new.unlink()
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    new.replace(path)
