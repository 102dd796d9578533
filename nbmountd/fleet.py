"""All mounts of a daemon: which there are, and how that changes when the configuration does.

It does not know how one mount is kept (keeper.py). Its list is touched by the tasks of signals and control requests; each
change of the list happens between two awaits, and one reload at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import msgspec
import trio

from nbmountd import systemd
from nbmountd.config import Config, MountConfig, secret_variables
from nbmountd.control.schema import Done, Failed
from nbmountd.errors import NbmountdError
from nbmountd.fuse import mounting
from nbmountd.handover import Inherited
from nbmountd.keeper import Keeper, Resources
from nbmountd.log import configure, get_logger

log = get_logger(__name__)

_TRIAL = "import nbmountd.cli, nbmountd.supervisor, nbmountd.worker"
_TRIAL_LIMIT = 60.0
_BY_A_NEW_WORKER = frozenset(("freshness", "write_back_delay", "durability", "request_deadline", "exclude"))
"""Keys of a mount that another worker on the same mount can take up. All others need another mount."""


class Fleet:
    """The keepers of one daemon. `nursery` runs them; `load` reads the configuration again, None if that cannot be done."""

    def __init__(
        self, config: Config, resources: Resources, nursery: trio.Nursery, load: Callable[[], Config] | None
    ) -> None:
        self.config = config
        self.resources = resources
        self.keepers: list[Keeper] = []
        self.upgrading = trio.Event()
        """Set when this program is to become the installed one."""
        self._nursery = nursery
        self._load = load
        self._scopes: dict[Keeper, trio.CancelScope] = {}
        self._one_reload = trio.Lock()
        resources.changed = self._tell

    def begin(self, inherited: Mapping[str, Inherited]) -> None:
        """Starts a keeper for each mount. What was inherited and is configured no longer is unmounted. Once."""
        for mount in self.config.mounts:
            self._add(mount, inherited.get(mount.name))
        names = {mount.name for mount in self.config.mounts}
        for name, left in inherited.items():
            if name not in names:
                self._nursery.start_soon(_let_go, left)

    def _add(self, mount: MountConfig, inherited: Inherited | None = None) -> Keeper:
        keeper = Keeper(mount, self.resources, inherited)
        self.keepers.append(keeper)
        self._scopes[keeper] = trio.CancelScope()
        self._nursery.start_soon(self._keep, keeper)
        return keeper

    async def _keep(self, keeper: Keeper) -> None:
        with self._scopes[keeper]:
            await keeper.run()

    def _tell(self) -> None:
        states = [keeper.state for keeper in self.keepers]
        parts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
        systemd.notify(f"STATUS={', '.join(parts)}", self.resources.environ)

    # --- another configuration -----------------------------------------------------------------------------------------

    async def reload(self) -> Done | Failed:
        """Reads the configuration again and makes the mounts what it says. A wrong one changes nothing."""
        if self._load is None:
            return Failed(message="this daemon cannot read its configuration again")
        async with self._one_reload:
            environ = self.resources.environ
            systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", environ)
            try:
                config = await trio.to_thread.run_sync(self._load)
            except NbmountdError as exc:
                log.warning("the configuration is wrong; going on with the one before", cause=exc)
                systemd.notify("READY=1", environ)
                return Failed(message=str(exc))
            done, failures = await self._become(config)
            systemd.notify("READY=1", environ)
            message = "; ".join([*done, *failures]) or "nothing is different"
            log.info("configuration read again", changes=message)
            return Failed(message=message) if failures else Done(message=message)

    async def _become(self, config: Config) -> tuple[list[str], list[str]]:
        done, failures = [], []
        daemon = config.daemon
        if (daemon.state_dir, daemon.cache_dir) != (self.config.daemon.state_dir, self.config.daemon.cache_dir):
            failures.append("another state_dir or cache_dir needs a new start of the daemon")
            daemon = msgspec.structs.replace(
                daemon, state_dir=self.config.daemon.state_dir, cache_dir=self.config.daemon.cache_dir
            )
        all_workers = msgspec.structs.replace(daemon, drain_timeout=self.config.daemon.drain_timeout) != self.config.daemon
        configure(daemon.log_level, daemon.log_format)
        self.config = msgspec.structs.replace(config, daemon=daemon)
        self.resources.daemon, self.resources.hidden = daemon, secret_variables(config)
        wanted = {mount.name: mount for mount in config.mounts}
        for keeper in list(self.keepers):
            new = wanted.pop(keeper.mount.name, None)
            if new is None:
                await self._remove(keeper)
                done.append(f"{keeper.mount.name} is no more")
            elif not _is_same_mount(keeper.mount, new):
                await self._remove(keeper)
                self._add(new)
                done.append(f"{new.name} was made anew")
            elif new != keeper.mount or all_workers:
                keeper.mount = new
                if keeper.state in ("live", "degraded", "starting"):
                    answer = await keeper.restart()
                    failures += [answer.message] if isinstance(answer, Failed) else []
                done.append(f"{new.name} has other settings")
        for mount in wanted.values():
            self._add(mount)
            done.append(f"{mount.name} is new")
        self._tell()
        return done, failures

    async def _remove(self, keeper: Keeper) -> None:
        answer = await keeper.stop(self.config.daemon.drain_timeout)
        if isinstance(answer, Failed):
            log.warning("unmounted with unsent work; it is kept", mount=keeper.mount.name, cause=answer.message)
        self.keepers.remove(keeper)
        self._scopes.pop(keeper).cancel()

    # --- another program -----------------------------------------------------------------------------------------------

    async def try_installed(self) -> Failed | None:
        """None if what is installed now can at least be started; else why not, and nothing has happened."""
        environ = {name: value for name, value in os.environ.items() if name not in self.resources.hidden}

        def run() -> subprocess.CompletedProcess[bytes]:
            return subprocess.run(
                [sys.executable, "-c", _TRIAL], capture_output=True, timeout=_TRIAL_LIMIT, check=False,
                stdin=subprocess.DEVNULL, env=environ,
            )  # fmt: skip

        try:
            tried = await trio.to_thread.run_sync(run)
        except (OSError, subprocess.TimeoutExpired) as exc:
            return Failed(message=f"the installed version cannot be started: {exc}")
        if tried.returncode:
            lines = tried.stderr.decode(errors="replace").strip().splitlines() or ["it ended without a word"]
            return Failed(message=f"the installed version cannot be started: {lines[-1]}")
        return None

    def leave_behind(self) -> None:
        """Nothing is unmounted or ended from now on: the next program takes it over."""
        for keeper in self.keepers:
            keeper.leave_behind()

    def legacy(self) -> Iterator[Inherited]:
        """What was left behind."""
        for keeper in self.keepers:
            left = keeper.legacy()
            if left is not None:
                yield left


def _is_same_mount(old: MountConfig, new: MountConfig) -> bool:
    return all(
        getattr(old, name) == getattr(new, name) for name in MountConfig.__struct_fields__ if name not in _BY_A_NEW_WORKER
    )


async def _let_go(left: Inherited) -> None:
    """A mount of the program before us that nobody wants any more. Its worker ends when the connection does."""
    mounted = left.mounted()
    log.info("unmounting what is configured no longer", path=mounted.path)
    try:
        if mounted.is_ours:
            await trio.to_thread.run_sync(mounting.unmount, mounted.path)
    except NbmountdError as exc:
        log.error("cannot unmount", cause=exc)
    left.close()
