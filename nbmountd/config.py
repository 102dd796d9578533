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
    metrics_listen: str | None = None
    """"host:port" where Prometheus may ask for /metrics; there is no log-in. None: nowhere."""
    report_activity: bool = False
    """Tell JupyterHub that the server is in use while something is being sent."""
    report_activity_limit: Seconds = 4 * 3600.0
    """For so long on end at most."""


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
        return f"{type(self).__name__}({', '.join(shown)})"


class D4ScienceOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Own keys of `backend = "d4science"`. At most one way to a token; with none, `D4SCIENCE_TOKEN` of the environment."""

    url: str = "https://api.d4science.org/workspace"
    token_file: str | None = None
    token_command: tuple[str, ...] | None = None
    token_env: str | None = None
    token_kind: Literal["bearer", "gcube"] = "bearer"  # noqa: S105  a kind, not a token
    """gcube: the old token, in a `gcube-token` header."""
    vre_folders: str = "VREFolders"
    """Directory in the root that shows the VRE folders; empty: none."""
    trash: bool = True
    """Removed items go to the workspace's trash; False: for good."""
    attributes: Literal["metadata", "local"] = "metadata"
    """Where times and modes are kept: in the items' metadata (one more request an upload), or here only."""
    ranged_reads: bool | None = None
    """Whether downloads honour ranges; None: found out once a mount."""
    ca_bundle: str | None = None
    connections: Connections = 6
    request_timeout: Seconds = 60.0


class NextcloudOptions(WebDAVOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Own keys of `backend = "nextcloud"`: those of webdav. `url` may be the address of the web pages."""

    connections: Connections = 10
    """At most: 8 to begin with, more while that does not make answers slower (backends/parallel.py). No more than the refused
    log-ins that a Nextcloud forgives: a revoked password is refused to all that are under way, and the eleventh within half an
    hour locks out everybody behind our address."""


class B2DROPOptions(NextcloudOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Own keys of `backend = "b2drop"`: EUDAT's Nextcloud."""

    url: str = "https://b2drop.eudat.eu"


class DirectoryOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Own keys of `backend = "directory"`."""

    source: str


class OnedataOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Own keys of `backend = "onedata"`. At least one of `onezone` and `oneprovider`, and some way to a token."""

    onezone: str | None = None
    """Host (or https address) of Onezone. Without it only the spaces that `oneprovider` supports are seen."""
    oneprovider: str | None = None
    """Host of the provider to prefer."""
    space: str | None = None
    """Name, id, or name@id of the one space to show; None: every space is a directory."""
    folder: str | None = None
    """Path in `space` of the directory to show."""
    token_file: str | None = None
    token_env: str | None = None
    """Where an access token for REST is."""
    onezone_token_file: str | None = None
    onezone_token_env: str | None = None
    """Where a token for Onezone's REST interface is, of which it makes one for the providers."""
    checkin_token_file: str | None = None
    """A file with an EGI Check-in access token, of which Onezone makes one as well."""
    ca_bundle: str | None = None
    connections: Connections = 8
    request_timeout: Seconds = 60.0
    """A provider may have to fetch the bytes from another one first."""


class OnedataNativeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Own keys of `backend = "onedata-native"`: Onedata's own Python library, which a site has installed."""

    python: str
    """Path of the interpreter that has the library."""
    library: Literal["onedatafs", "onedatarestfs"] = "onedatafs"
    """Which driver of PyFilesystem, in the package `fs`."""
    host: str
    """Of a Oneprovider for onedatafs, of Onezone for onedatarestfs."""
    token_file: str | None = None
    token_env: str | None = None
    """Where an access token is. onedatafs takes one that is made for oneclient."""
    space: str | None = None
    """Name of the one space to show; None: every space is a directory."""
    folder: str | None = None
    """Path in `space` of the directory to show."""
    io: Literal["auto", "direct", "proxy"] = "auto"
    """onedatafs: past the provider where its storage is reachable; always so, or an error; through the provider."""
    ca_bundle: str | None = None
    """onedatarestfs: certificates to trust instead of the system's."""
    connections: Connections = 4
    """Helper processes."""
    request_timeout: Seconds = 60.0
    """A helper that does not answer for so long is killed."""


BackendOptions = WebDAVOptions | DirectoryOptions | D4ScienceOptions | OnedataOptions | OnedataNativeOptions

BACKENDS: dict[str, type[BackendOptions]] = {
    "webdav": WebDAVOptions,
    "nextcloud": NextcloudOptions,
    "b2drop": B2DROPOptions,
    "directory": DirectoryOptions,
    "d4science": D4ScienceOptions,
    "onedata": OnedataOptions,
    "onedata-native": OnedataNativeOptions,
}
"""Backend name -> its own keys."""


class MountConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[mount]]`, after expansion. `path` is absolute. Times in seconds."""

    name: str
    path: str
    backend: str
    options: BackendOptions
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


def secret_variables(config: Config) -> tuple[str, ...]:
    """The environment variables that hold credentials of mounts."""
    found = {
        str(getattr(mount.options, key) or "")
        for mount in config.mounts
        for key in mount.options.__struct_fields__
        if key.endswith("_env")
    }
    return tuple(sorted(found - {""}))
