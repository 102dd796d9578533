"""Fixtures for tests on a real mount: servers, daemons, and the rules every such test keeps.

The rules: the daemon's log holds no warning, error or traceback that the test did not announce with
`@pytest.mark.expects_log("regular expression", ...)`; a call that hangs in a mount is ended before the test's time limit;
a log is shown when its test fails.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest

from nbmountd.control.schema import MountStatus
from nbmountd.escapes import AS_THEY_ARE, NO_FIRST_DOT, Rules
from tests.mounted import harness
from tests.mounted.kernel import same_tree
from tests.mounted.spaces import GENERATIONS, space_on
from tests.mounted.workspaces import workspace_on
from tests.servers import (
    ApacheServer,
    FakeNextcloud,
    LighttpdServer,
    NginxServer,
    RcloneServer,
    SabreServer,
    ServerProcess,
    WsgiDAVServer,
)
from tests.servers.d4science_double import D4ScienceServer
from tests.servers.onedata_double import OnedataDouble

HANG_LIMIT = 150
"""Seconds after which every daemon of a test is killed: what waits in a dead mount cannot be ended in another way. Longer for
a test that is marked with a longer time limit of its own."""


def pytest_configure(config: pytest.Config) -> None:
    # As Ctrl-C does: through the fixtures, so that no mount and no server is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.addinivalue_line("markers", "expects_log(*patterns): log lines above `info` that this test brings about")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.mounted)


@pytest.fixture(scope="session", autouse=True)
def the_right_to_mount() -> Iterator[None]:
    """Skips where FUSE cannot work, but never in CI, where that would hide everything."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) and "CI" not in os.environ:
        pytest.skip("/dev/fuse cannot be opened here")
    yield
    judge_logs([])


@pytest.fixture(autouse=True)
def no_surprises(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends a test that hangs in a mount, and judges the logs of all daemons that lived during the test."""
    judge_logs([])  # of daemons that several tests shared and that were stopped since the last one
    patience = request.node.get_closest_marker("timeout")
    watchdog = threading.Timer(max([HANG_LIMIT, *(patience.args if patience else ())]), harness.abandon_all)
    watchdog.daemon = True
    watchdog.start()

    yield

    watchdog.cancel()
    judge_logs([str(pattern) for marker in request.node.iter_markers("expects_log") for pattern in marker.args])


def judge_logs(allowed: list[str]) -> None:
    """Fails if any daemon logged what nobody expected since the last call."""
    lines = [*harness.UNJUDGED, *(line for daemon in harness.LIVE for line in daemon.new_log_lines())]
    harness.UNJUDGED.clear()
    found = harness.surprises(lines, allowed)
    assert not found, "unexpected in the log:\n" + "\n".join(found)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = yield
    if report.failed:
        if harness.UNJUDGED:
            report.sections.append(("log of daemons that are gone", "\n".join(harness.UNJUDGED[-100:])))
        for daemon in harness.LIVE:
            tail = daemon.log.read_text(errors="replace").splitlines()[-100:]
            report.sections.append((f"log of the daemon in {daemon.home}", "\n".join(tail)))
    return report


# --- servers and daemons that the tests share --------------------------------------------------------------------------


@dataclass(frozen=True)
class Rig:
    """A place in a mount and the same place on its server."""

    daemon: harness.Daemon
    name: str
    mount: Path
    root: Path
    names: Rules = AS_THEY_ARE
    """How names are written on the server."""

    def below(self, name: str) -> Rig:
        return replace(self, mount=self.mount / name, root=self.root / self.names.stored(name))

    def differences(self) -> list[str]:
        """What `same_tree` finds between mount and server."""
        return same_tree(self.mount, self.root, self.names)

    @property
    def status(self) -> MountStatus:
        return self.daemon.status(self.name)


def webdav_mount(server: ServerProcess, below: str = "") -> dict[str, object]:
    """The keys of a mount over `server`, or over a directory of it (`below`, with a slash at its end)."""
    return {"backend": "webdav", "url": server.url + below, "user": server.user, "password": server.password}


def directory_mount(source: Path) -> dict[str, object]:
    """The keys of a mount over a local folder."""
    return {"backend": "directory", "source": str(source)}


@pytest.fixture(scope="session")
def apache_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    base = tmp_path_factory.mktemp("apache")
    with ApacheServer(base / "root", base / "work") as server:
        yield server


OTHER_SERVERS: dict[str, type[ServerProcess]] = {
    "nginx": NginxServer,
    "wsgidav": WsgiDAVServer,
    "lighttpd": LighttpdServer,
    "sabre": SabreServer,
    "rclone": RcloneServer,
    "nextcloud": FakeNextcloud,
}


NAMES = {"nginx": NO_FIRST_DOT}
"""How a server's names are written where that is not as programs write them in these tests."""


def asked_for(*usual: str) -> list[str]:
    """The servers that a long test is played over: `usual`, or what NBMOUNTD_TEST_SERVERS names ("nginx rclone", "all")."""
    names = os.environ.get("NBMOUNTD_TEST_SERVERS", " ".join(usual)).split()
    return ["apache", *OTHER_SERVERS] if names == ["all"] else names


@pytest.fixture(scope="session")
def over_all_servers(
    apache_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Rig]]:
    """One daemon with a mount over each kind of server, for all tests that need nothing special of them."""
    base = tmp_path_factory.mktemp("servers")
    own = apache_server.root / "shared-mount"
    own.mkdir()
    roots = {"apache": own}
    mounts = {"apache": webdav_mount(apache_server, "shared-mount/")}
    with ExitStack() as stack:
        for name, kind in OTHER_SERVERS.items():
            server = stack.enter_context(kind(base / name, base / f"{name}-work"))
            roots[name] = server.root
            mounts[name] = webdav_mount(server)
        with harness.daemon_over(mounts) as daemon:
            yield {name: Rig(daemon, name, daemon.path(name), roots[name], NAMES.get(name, AS_THEY_ARE)) for name in mounts}


@pytest.fixture(scope="session", params=["apache", *OTHER_SERVERS])
def webdav(over_all_servers: dict[str, Rig], request: pytest.FixtureRequest) -> Rig:
    """A mount over each kind of server in turn."""
    return over_all_servers[request.param]


@pytest.fixture(scope="session")
def apache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """The mount over Apache. NBMOUNTD_TEST_REMOTE puts another one below everything that asks for it: over one of
    OTHER_SERVERS ("nginx"), a D4Science workspace of one of workspaces.KINDS ("2.x"), or a space of Onedata ("onedata-25")."""
    kind = os.environ.get("NBMOUNTD_TEST_REMOTE", "apache")
    if kind == "apache":
        yield request.getfixturevalue("over_all_servers")["apache"]
        return
    base = tmp_path_factory.mktemp("remote")
    if kind in OTHER_SERVERS:
        with OTHER_SERVERS[kind](base / "root", base / "work") as webdav, harness.daemon_over(
            {kind: webdav_mount(webdav)}
        ) as daemon:
            yield Rig(daemon, kind, daemon.path(kind), webdav.root, NAMES.get(kind, AS_THEY_ARE))
        return
    if kind in GENERATIONS:
        with OnedataDouble(base / "onedata", version=GENERATIONS[kind]) as double:
            assert isinstance(double, OnedataDouble)
            keys, space = space_on(double, "space", base)
            with harness.daemon_over({"space": keys}) as daemon:
                yield Rig(daemon, "space", daemon.path("space"), cast(Path, space))
        return
    with D4ScienceServer(base / "storagehub") as server:
        keys, root = workspace_on(server, kind, base)
        with harness.daemon_over({"workspace": keys}) as daemon:
            yield Rig(daemon, "workspace", daemon.path("workspace"), root)
