"""Reads the configuration: TOML files, or else the environment of a notebook; every error names file, table and key.

It does not open what the configuration names (credentials, mount points) and imports no backend. Values of secret keys
are neither expanded nor shown.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn
from urllib.parse import urlsplit

import msgspec

from nbmountd import places, units
from nbmountd.config import (
    BACKENDS,
    BackendOptions,
    Config,
    D4ScienceOptions,
    DaemonConfig,
    DirectoryOptions,
    MountConfig,
    OnedataNativeOptions,
    OnedataOptions,
    WebDAVOptions,
)
from nbmountd.errors import ConfigError, StateError
from nbmountd.log import register_secret

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SYSTEM_FILE = Path("/etc/nbmountd/config.toml")
VARIABLE = "NBMOUNTD_CONFIG"

_PATHS = frozenset({"state_dir", "cache_dir", "path", "source", "password_file", "token_file", "ca_bundle"}
                   | {"onezone_token_file", "checkin_token_file"})
SIZES = frozenset({"cache_size", "unsent_size"})
DURATIONS = frozenset({"drain_timeout", "freshness", "write_back_delay", "request_deadline", "request_timeout"}
                      | {"report_activity_limit"})
_SECRETS = frozenset({"password"})

_MOUNT_KEYS = frozenset(MountConfig.__struct_fields__) - {"options"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_REFERENCE = re.compile(r"\$\{([^}]*)\}")


# --- where the configuration is ----------------------------------------------------------------------------------------


def load_config(
    path: Path | None = None, *, environ: Mapping[str, str] = os.environ, system_file: Path = SYSTEM_FILE
) -> Config:
    """The configuration from `path`, else from the file that NBMOUNTD_CONFIG names, else from /etc and then the user's
    file (which wins, key by key and mount by mount). The environment says what to mount where /etc and the user's file name
    no mount. What `nbmountctl add` made comes on top. Raises ConfigError.
    """
    named = str(path) if path is not None else environ.get(VARIABLE, "")
    files = [Path(named)] if named else [file for file in (system_file, user_file(environ)) if file.is_file()]
    sources = [_read(file) for file in files]
    accounts = [_read(file) for file in _accounts(environ)]
    if not named and not any("mount" in source.document for source in sources):
        mounts = environment_mounts(environ)
        if not mounts and not sources and not accounts:
            raise ConfigError(
                f"there is nothing to mount: no file {system_file} or {user_file(environ)}, none given by --config or "
                f"{VARIABLE}, and the environment names no remote (ONEPROVIDER_HOST, WEBDAV_URL, D4SCIENCE_TOKEN, "
                "NBMOUNTD_DATASETS)"
            )
        if mounts:
            sources.append(_Source("the environment", "", {"mount": mounts}))
    return _build([*sources, *accounts], environ)


def user_file(environ: Mapping[str, str]) -> Path:
    """`~/.config/nbmountd/config.toml`."""
    base = environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base.startswith("/") else places.home(environ) / ".config") / "nbmountd" / "config.toml"


def accounts_directory(environ: Mapping[str, str]) -> Path:
    """Where `nbmountctl add` keeps mounts and their secrets (accounts.py)."""
    return user_file(environ).parent / "accounts"


def _accounts(environ: Mapping[str, str]) -> list[Path]:
    directory = accounts_directory(environ)
    try:
        found = [directory / name for name in sorted(os.listdir(directory)) if name.endswith(".toml")]
        if found:
            places.private_directory(directory)  # not if others could write to it
    except FileNotFoundError:
        return []
    except (OSError, StateError) as exc:
        raise ConfigError(f"{directory}: {exc}") from exc
    return found


@dataclass(frozen=True)
class _Source:
    """A parsed file; `text` finds the line of a key in it."""

    name: str
    text: str
    document: Mapping[str, Any]


def _read(path: Path) -> _Source:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8 text") from exc
    try:
        return _Source(str(path), text, tomllib.loads(text))
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path}: is not TOML: {exc}") from exc
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deep") from None


# --- the environment of a notebook -------------------------------------------------------------------------------------


def _b2drop(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Names of the WebDAV sidecars of egi-notebooks-images (webdav-sidecar, webdav-rclone-sidecar), and with `_FILE` behind
    them the paths of files with the secret, which others cannot read from a process's environment."""
    url = environ.get("WEBDAV_URL", "")
    if not url:
        return None
    mount = {"name": "b2drop", "path": "~/b2drop", "backend": "webdav", "url": url}
    if user := environ.get("WEBDAV_USER", ""):
        mount["user"] = user
    for key, variable in (("token", "WEBDAV_TOKEN"), ("password", "WEBDAV_PWD")):
        if file := environ.get(f"{variable}_FILE", ""):
            return {**mount, f"{key}_file": file}
        if environ.get(variable, ""):
            return {**mount, f"{key}_env": variable}
    return {**mount, "password_env": "WEBDAV_PWD"}


def _workspace(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Names that EGI's hub sets for users of D4Science (d4science-hub, spawner.py), the newer one first."""
    for variable in ("D4SCIENCE_TOKEN", "GCUBE_TOKEN"):
        if environ.get(variable, ""):
            mount = {"name": "workspace", "path": "~/workspace", "backend": "d4science", "token_env": variable}
            url = environ.get("D4SCIENCE_WORKSPACE_URL", "")  # ours: for another infrastructure than production's
            return {**mount, "url": url} if url else mount
    return None


def _datahub(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Names that EGI's hub sets (egi-notebooks-hub: onedata.py), and those of onedatarestfsspec."""
    onezone = environ.get("ONEZONE_URL", "") or environ.get("ONEDATA_ONEZONE_HOST", "")
    oneprovider = environ.get("ONEPROVIDER_HOST", "") or environ.get("ONEDATA_PREFERRED_PROVIDERS", "").partition(",")[0]
    if not onezone and not oneprovider:
        return None
    mount = {"name": "datahub", "path": "~/datahub", "backend": "onedata"}
    mount |= {key: value for key, value in (("onezone", onezone), ("oneprovider", oneprovider.strip())) if value}
    # A token for oneclient is refused by REST, but it tells which spaces there are.
    for key, variables in (
        ("token_env", ("ONEDATA_TOKEN", "ONECLIENT_ACCESS_TOKEN")), ("onezone_token_env", ("ONEZONE_ACCESS_TOKEN",))
    ):  # fmt: skip
        given = [variable for variable in variables if environ.get(variable, "")]
        if given:
            mount[key] = given[0]
    secrets = environ.get("SECRETS_MOUNT_PATH", "") or "/var/run/secrets/egi.eu"
    if secrets.startswith("/"):
        mount["checkin_token_file"] = f"{secrets.rstrip('/')}/access_token"
    return mount


def _datasets(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Ours: a volume with shared data, where the hub does not put it at ~/datasets itself."""
    source = environ.get("NBMOUNTD_DATASETS", "")
    if not source:
        return None
    mount = {"name": "datasets", "path": "~/datasets", "backend": "directory", "source": source}
    return mount if os.access(source, os.W_OK) else {**mount, "read_only": True}


_RECOGNISERS: tuple[Callable[[Mapping[str, str]], dict[str, Any] | None], ...] = (_b2drop, _workspace, _datahub, _datasets)
"""Each looks for the variables of one service and gives the `[[mount]]` it would be in a file, or None."""


def environment_mounts(environ: Mapping[str, str]) -> list[dict[str, Any]]:
    """The mounts that the environment of an EGI notebook asks for, in the shape of the file."""
    return [mount for recognise in _RECOGNISERS if (mount := recognise(environ)) is not None]


# --- tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    value: Any
    place: str
    """`file:line`, for messages."""


@dataclass
class _Table:
    """One table, perhaps merged from several files; knows where each key came from."""

    label: str
    place: str
    values: dict[str, _Value] = field(default_factory=dict)

    def fail(self, key: str | None, problem: str) -> NoReturn:
        place = self.values[key].place if key in self.values and key is not None else self.place
        raise ConfigError(f"{place}: {self.label}: {problem}" if key is None else
                          f"{place}: {self.label}: {key}: {problem}")

    def get(self, key: str) -> Any:
        return self.values[key].value if key in self.values else None


def _build(sources: list[_Source], environ: Mapping[str, str]) -> Config:
    daemon = _Table("[daemon]", sources[0].name)
    mounts: dict[str, _Table] = {}
    for source in sources:
        _take_source(source, daemon, mounts)
    config = Config(
        daemon=_daemon(daemon, environ),
        mounts=tuple(_mount(table, environ) for table in mounts.values()),
        source=", ".join(source.name for source in sources),
    )
    _check_places(config, mounts, places.home(environ))
    return config


def _take_source(source: _Source, daemon: _Table, mounts: dict[str, _Table]) -> None:
    for key in source.document:
        if key not in ("daemon", "mount"):
            raise ConfigError(
                f"{_place(source, None, key)}: unknown table or key {key!r}" + _suggestion(key, ("daemon", "mount"))
            )
    table = source.document.get("daemon", {})
    if not isinstance(table, dict):
        raise ConfigError(f"{source.name}: daemon must be a table: [daemon]")
    daemon.values.update({key: _Value(value, _place(source, "daemon", key)) for key, value in table.items()})
    listed = source.document.get("mount", [])
    if not isinstance(listed, list) or not all(isinstance(mount, dict) for mount in listed):
        raise ConfigError(f"{_place(source, None, 'mount')}: mounts are written as [[mount]], with two brackets")
    seen = set()
    for number, mount in enumerate(listed, start=1):
        name = mount.get("name")
        label = f'[[mount]] "{name}"' if isinstance(name, str) else f"[[mount]] number {number}"
        values = {key: _Value(value, _place(source, number, key)) for key, value in mount.items()}
        table = _Table(label, _place(source, number, None), values)
        if not isinstance(name, str):
            table.fail("name", 'must be a string, such as "b2drop"' if "name" in mount else "is missing")
        if not NAME.fullmatch(name):
            table.fail("name", "must be letters, digits, '-', '_' and '.', at most 64, and begin with a letter or digit")
        if name in seen:
            table.fail("name", f'there are two mounts named "{name}"')
        seen.add(name)
        mounts.setdefault(name, _Table(label, table.place)).values.update(values)


def _place(source: _Source, table: int | str | None, key: str | None) -> str:
    """`file:line` of a key (None: of the header) in [daemon], in the nth [[mount]], or outside; `file` if not found."""
    current: int | str | None = None
    mounts = 0
    for number, line in enumerate(source.text.splitlines(), start=1):
        text = line.strip()
        if re.match(r"\[\[\s*mount\s*\]\]", text):
            mounts += 1
            current = mounts
        elif header := re.match(r"\[+\s*([\w-]+)", text):
            current = header[1]
        at_header = text.startswith("[")
        if key is None:
            found = at_header and current == table
        elif at_header:
            found = table is None and current == key
        else:
            found = current == table and re.match(rf"[\"']?{re.escape(key)}[\"']?\s*[=.]", text) is not None
        if found:
            return f"{source.name}:{number}"
    return source.name


def _suggestion(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(known)}"


# --- values ------------------------------------------------------------------------------------------------------------


def _daemon(table: _Table, environ: Mapping[str, str]) -> DaemonConfig:
    values = _prepared(table, environ, frozenset(DaemonConfig.__struct_fields__))
    if "state_dir" not in values:
        values["state_dir"] = str(places.default_state_directory(environ))
    if "cache_dir" not in values:
        values["cache_dir"] = str(places.default_cache_directory(environ))
    return _converted(table, values, DaemonConfig)


def _mount(table: _Table, environ: Mapping[str, str]) -> MountConfig:
    backend = table.get("backend")
    if backend is None:
        table.fail("backend", f"is missing; one of: {', '.join(sorted(BACKENDS))}")
    if not isinstance(backend, str) or backend not in BACKENDS:
        table.fail("backend", f"unknown backend {backend!r}" + _suggestion(str(backend), BACKENDS))
    own = BACKENDS[backend]
    values = _prepared(table, environ, _MOUNT_KEYS | frozenset(own.__struct_fields__))
    common = {key: value for key, value in values.items() if key in _MOUNT_KEYS}
    options = _converted(table, {key: value for key, value in values.items() if key not in _MOUNT_KEYS}, own)
    _check_options(table, options)
    mount = _converted(table, common, MountKeys)
    return MountConfig(**{**msgspec.structs.asdict(mount), "options": options})


class MountKeys(MountConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """MountConfig for msgspec, which cannot tell the structs of `options` apart: here they are anything."""

    options: Any = None


def _prepared(table: _Table, environ: Mapping[str, str], known: frozenset[str]) -> dict[str, Any]:
    """The values of `table` with variables, `~`, sizes and durations understood."""
    values = {}
    for key, entry in table.values.items():
        if key not in known:
            table.fail(key, "unknown key" + _suggestion(key, known))
        values[key] = _prepared_value(table, key, entry.value, environ)
    return values


def _prepared_value(table: _Table, key: str, value: Any, environ: Mapping[str, str]) -> Any:
    if key in _SECRETS:
        if isinstance(value, str):
            register_secret(value)
            if match := _REFERENCE.fullmatch(value):
                table.fail(key, f'passwords are taken as they are; for a variable write {key}_env = "{match[1]}"')
        return value
    if isinstance(value, list):
        return [_prepared_value(table, key, item, environ) for item in value]
    if isinstance(value, bool) and key in SIZES | DURATIONS:
        table.fail(key, 'must be a number, or text such as "10G" or "30s"')
    if not isinstance(value, str):
        return value
    value = _expanded(table, key, value, environ)
    try:
        if key in SIZES:
            return units.parse_size(value)
        if key in DURATIONS:
            return units.parse_duration(value)
        if key == "metrics_listen":
            units.parse_address(value)
    except ValueError as exc:
        table.fail(key, str(exc))
    return _absolute(table, key, value, environ) if key in _PATHS else value


def _expanded(table: _Table, key: str, text: str, environ: Mapping[str, str]) -> str:
    """Replaces `${VAR}`, once: what a variable holds is not looked into."""

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in environ:
            table.fail(key, f"the environment has no variable {match[1]}")
        return environ[match[1]]

    return _REFERENCE.sub(value_of, text)


def _absolute(table: _Table, key: str, text: str, environ: Mapping[str, str]) -> str:
    if text == "~" or text.startswith("~/"):
        text = str(places.home(environ)) + text[1:]
    if not text.startswith("/"):
        table.fail(key, f'"{text}" must be an absolute path, or begin with ~/')
    if "\0" in text:
        table.fail(key, "a path cannot hold a NUL")
    return os.path.normpath(text)


_T = typing.TypeVar("_T", bound=msgspec.Struct)


def _converted(table: _Table, values: dict[str, Any], struct: type[_T]) -> _T:
    for key, choices in _choices(struct).items():
        if key in values and values[key] not in choices:
            table.fail(key, "must be one of " + ", ".join(f'"{choice}"' for choice in choices))
    try:
        return msgspec.convert(values, struct)
    except msgspec.ValidationError as exc:
        text = str(exc)
        if missing := re.fullmatch(r"Object missing required field `(\w+)`", text):
            table.fail(missing[1], "is missing")
        problem, _, path = text.partition(" - at `$.")
        table.fail(re.split(r"\W", path)[0] or None, problem[0].lower() + problem[1:])


def _choices(struct: type[msgspec.Struct]) -> dict[str, tuple[Any, ...]]:
    hints = typing.get_type_hints(struct)
    return {key: typing.get_args(hint) for key, hint in hints.items() if typing.get_origin(hint) is Literal}


# --- what fits together ------------------------------------------------------------------------------------------------


def _check_options(table: _Table, options: BackendOptions) -> None:
    if isinstance(options, WebDAVOptions):
        _check_url(table, options.url)
        _check_one_way(table, ("password", "password_file", "password_env"))
        _check_one_way(table, ("token_file", "token_env", "token_command"))
    if isinstance(options, D4ScienceOptions):
        _check_url(table, options.url)
        _check_one_way(table, ("token_file", "token_env", "token_command"))
        if "/" in options.vre_folders:
            table.fail("vre_folders", "must be the name of one directory, or empty")

    if isinstance(options, OnedataOptions):
        if options.onezone is None and options.oneprovider is None:
            table.fail(None, "needs `onezone` or `oneprovider`")
        if options.folder is not None and options.space is None:
            table.fail("folder", "needs `space`")
        for key in ("onezone", "oneprovider"):
            host = getattr(options, key)
            if host is not None:
                _check_url(table, host if "://" in host else f"https://{host}", key)
        _check_one_way(table, ("token_file", "token_env"))
        _check_one_way(table, ("onezone_token_file", "onezone_token_env"))
    if isinstance(options, OnedataNativeOptions):
        if options.token_file is None and options.token_env is None:
            table.fail(None, "needs `token_file` or `token_env`")
        _check_one_way(table, ("token_file", "token_env"))
        if options.folder is not None and options.space is None:
            table.fail("folder", "needs `space`")
        if not options.python.startswith("/"):
            table.fail("python", "must be the absolute path of an interpreter")
        if options.io != "auto" and options.library != "onedatafs":
            table.fail("io", "is for onedatafs")


def _check_one_way(table: _Table, keys: tuple[str, ...]) -> None:
    given = [key for key in keys if key in table.values]
    if len(given) > 1:
        table.fail(given[1], f"only one of {', '.join(given)} can be given")


def _check_url(table: _Table, url: str, key: str = "url") -> None:
    """Never shows the URL: it may hold a password."""
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:
        table.fail(key, "is not a URL")
    if parts.scheme not in ("http", "https") or not host:
        table.fail(key, "must begin with https:// (or http://) and name a host")
    if parts.username is not None or parts.password is not None:
        table.fail(key, "must not hold user or password; they have keys of their own (user, password_file)")
    if parts.query or parts.fragment:
        table.fail(key, 'must end with the path: no "?" or "#" (write %3F or %23 for these in names)')


def _check_places(config: Config, tables: Mapping[str, _Table], home: Path) -> None:
    """No mount may hide another, its own source, our state, or the home directory."""
    taken: list[MountConfig] = []
    for mount in config.mounts:
        table = tables[mount.name]
        if _holds(mount.path, str(home)):
            table.fail("path", f'"{mount.path}" would hide the home directory {home}; choose a directory in it')
        for other in taken:
            if other.path == mount.path:
                table.fail("path", f'"{mount.path}" is the path of mount "{other.name}" too')
            if _holds(other.path, mount.path) or _holds(mount.path, other.path):
                table.fail("path", f'"{mount.path}" and "{other.path}" (mount "{other.name}") are inside one another')
        for key in ("state_dir", "cache_dir"):
            if _holds(mount.path, place := getattr(config.daemon, key)):
                table.fail("path", f'"{mount.path}" would hide {key} = "{place}"; they must be apart')
        if isinstance(mount.options, DirectoryOptions):
            source = mount.options.source
            if _holds(mount.path, source) or _holds(source, mount.path):
                table.fail("source", f'"{source}" and the path "{mount.path}" are inside one another')
        taken.append(mount)


def _holds(outer: str, inner: str) -> bool:
    return PurePosixPath(inner).is_relative_to(outer)
