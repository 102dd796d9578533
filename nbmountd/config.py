"""The configuration as types. Reading it from files and the environment is in configfile.py.

It imports no backend: each backend's own keys are a struct here, so that a wrong key is found without one.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Size = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Connections = Annotated[int, msgspec.Meta(ge=1, le=256)]


class DaemonConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[daemon]` table, after expansion. Directories are absolute; sizes are bytes; times are seconds."""

    state_dir: str
    cache_dir: str
    cache_size: Size = 10 * 2**30
    """Limit for clean cached bytes of all mounts together."""
    unsent_size: Size = 20 * 2**30
    """Limit for bytes that no remote has confirmed yet, per mount."""
    drain_timeout: Seconds = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"


class WebDAVOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Own keys of `backend = "webdav"`. At most one way to a password, and one to a token."""

    url: str
    user: str | None = None
    password: str | None = None
    password_file: str | None = None
    password_env: str | None = None
    token_file: str | None = None
    token_env: str | None = None
    token_command: tuple[str, ...] | None = None
    ca_bundle: str | None = None
    atomic_replace: bool | None = None
    """Whether a cut PUT leaves the old content; None: judged from the server's answers."""
    connections: Connections = 8
    request_timeout: Seconds = 30.0

    def __repr__(self) -> str:
        """Everything but the password."""
        shown = (
            f"{name}={'***' if name == 'password' and value is not None else repr(value)}"
            for name, value in ((name, getattr(self, name)) for name in self.__struct_fields__)
        )
        return f"WebDAVOptions({', '.join(shown)})"


class DirectoryOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Own keys of `backend = "directory"`."""

    source: str


BackendOptions = WebDAVOptions | DirectoryOptions

BACKENDS: dict[str, type[WebDAVOptions] | type[DirectoryOptions]] = {
    "webdav": WebDAVOptions,
    "directory": DirectoryOptions,
}
"""Backend name -> its own keys."""


class MountConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[mount]]`, after expansion. `path` is absolute. Times in seconds."""

    name: str
    path: str
    backend: str
    options: WebDAVOptions | DirectoryOptions
    read_only: bool = False
    freshness: Seconds = 30.0
    write_back_delay: Seconds = 5.0
    durability: Literal["local", "fsync", "close"] = "local"
    request_deadline: Seconds = 30.0
    """No file operation waits longer than this for the remote."""
    exclude: tuple[str, ...] = (
        ".~*", ".nfs*", ".fuse_hidden*", "*.swp", ".ipynb_checkpoints/", "__pycache__/", ".DS_Store"
    )


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything."""

    daemon: DaemonConfig
    mounts: tuple[MountConfig, ...]
    source: str = ""
    """Where it came from, for messages."""
