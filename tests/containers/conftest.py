"""The engine, the image and a user's home with a remote, for tests that run the real image in real containers.

They take minutes and packages (Debian's docker.io, debootstrap, chromium), so they run when `NBMOUNTD_TEST_CONTAINERS` is set,
as `make test-containers` does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.containers.engine import ROOT, Container, Engine, open_device
from tests.servers.fake_nextcloud import FakeNextcloud

VARIABLE = "NBMOUNTD_TEST_CONTAINERS"
PLACE = ROOT / "build" / "containers"
PASSWORD = "wonderland"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(1800))


def why_not() -> str | None:
    """Why there can be no containers here."""
    if not os.environ.get(VARIABLE):
        return f"containers take minutes: `make test-containers`, or set {VARIABLE}"
    if os.geteuid() != 0:
        return "an engine of our own takes root"
    missing = [name for name in ("dockerd", "docker", "runc", "debootstrap") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if not Path("/dev/fuse").exists():
        return "this machine has no /dev/fuse"
    return None


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    reason = why_not()
    if reason is not None:
        print(f"tests/containers skipped: {reason}")
        pytest.skip(reason)
    try:
        engine = Engine(PLACE)
    except (RuntimeError, OSError) as exc:
        if "CI" in os.environ:
            raise
        pytest.skip(f"dockerd does not run here: {exc}")
    try:
        engine.build()
        yield engine
    finally:
        engine.close()


@dataclass
class Home:
    """A user's persistent home, her B2DROP, and the containers that were run with both."""

    engine: Engine
    path: Path
    base: Path
    server: FakeNextcloud
    device: Path
    stack: ExitStack

    @property
    def remote(self) -> Path:
        """Her files as they are on the server."""
        return self.server.root

    def container(self, role: str, options: list[str], *command: str) -> Container:
        return self.stack.enter_context(Container(self.engine, f"nbm-{self.base.name}-{role}", options, *command))

    def notebook(self, options: list[str], *command: str, environ: dict[str, str] | None = None) -> Container:
        """A container with her home and the environment that EGI's hub gives; started by nobody yet."""
        variables = {
            "WEBDAV_URL": self.server.url, "WEBDAV_USER": self.server.user, "WEBDAV_PWD": self.server.password,
            "JUPYTER_ENV_VARS_TO_UNSET": "WEBDAV_PWD", **(environ or {}),
        }  # fmt: skip
        given = [option for name, value in variables.items() for option in ("-e", f"{name}={value}")]
        return self.container("notebook", ["-v", f"{self.path}:/home/jovyan", *options, *given], *command)


@pytest.fixture
def home(engine: Engine) -> Iterator[Home]:
    base = Path(tempfile.mkdtemp(prefix="nbmc-"))
    base.chmod(0o755)
    path = base / "home"
    path.mkdir()
    os.chown(path, 1000, 100)
    with ExitStack() as stack:
        try:
            server = stack.enter_context(FakeNextcloud(base / "remote", base / "work", password=PASSWORD))
            yield Home(engine, path, base, server, open_device(PLACE), stack)
        finally:
            stack.close()
            shutil.rmtree(base)


# --- start modes -------------------------------------------------------------------------------------------------------

Prepare = Callable[[Home], list[str]]
"""Does what a mode needs besides the notebook's container, and gives that container's options: no more than the mode needs."""

BARE = ["--cap-drop=ALL", "--security-opt=no-new-privileges"]


def mode_a(home: Home) -> list[str]:
    """The setuid fusermount3."""
    return ["--user=1000:100", "--device", f"{home.device}:/dev/fuse", "--cap-add=SYS_ADMIN"]


def mode_f(home: Home) -> list[str]:
    """A root hook."""
    return ["--user=0:0", "--device", f"{home.device}:/dev/fuse", "--cap-add=SYS_ADMIN"]


def mode_d(home: Home) -> list[str]:
    """A user namespace: no right at all, but docker's seccomp profile forbids it."""
    return ["--user=1000:100", "--device", f"{home.device}:/dev/fuse", *BARE, "--security-opt=seccomp=unconfined"]


def mode_p(home: Home) -> list[str]:
    """A mount helper in another container: the notebook's has neither device nor right."""
    (home.base / "helper").mkdir()
    helper = home.container(
        "helper",
        ["--user=0:0", "--entrypoint=nbmountd", "--device", f"{home.device}:/dev/fuse", "--read-only", "--cap-drop=ALL",
         *(f"--cap-add={name}" for name in ("SYS_ADMIN", "SYS_CHROOT", "SETUID", "SETGID")),  # as in mount-helper.yaml
         "-v", f"{home.base}/helper:/run/nbmountd-helper"],
        "mount-helper", "--allow-uid", "1000", "--allow-prefix", "/home/jovyan",
    )  # fmt: skip
    helper.start()
    return ["--user=1000:100", *BARE, "-v", f"{home.base}/helper:/run/nbmountd-helper:ro"]


def mode_s(home: Home) -> list[str]:
    """A sidecar that mounts for the notebook's container, which has no right, device or credential."""
    shared = home.base / "shared"
    shared.mkdir()
    shared.chmod(0o777)  # as Kubernetes makes an emptyDir
    subprocess.run(["mount", "--bind", shared, shared], check=True)
    home.stack.callback(subprocess.run, ["umount", "-l", str(shared)], check=True)
    subprocess.run(["mount", "--make-shared", shared], check=True)
    config = home.base / "sidecar.toml"
    config.write_text(
        '[daemon]\nstate_dir = "/home/jovyan/.nbmountd"\ncache_dir = "/tmp/cache"\n[[mount]]\nname = "b2drop"\n'
        f'path = "/mnt/remotes/b2drop"\nbackend = "webdav"\nurl = "{home.server.url}"\nuser = "{home.server.user}"\n'
        'password_env = "SIDECAR_PASSWORD"\n'
    )
    sidecar = home.container(
        "sidecar",
        ["--user=0:0", "--entrypoint=nbmountd", "--device", f"{home.device}:/dev/fuse", "--cap-add=SYS_ADMIN",
         "-v", f"{shared}:/mnt/remotes:rshared", "-v", f"{home.path}:/home/jovyan",
         "-v", f"{config}:/etc/nbmountd/config.toml:ro",
         "-e", "NBMOUNTD_SIDECAR=/mnt/remotes", "-e", f"SIDECAR_PASSWORD={home.server.password}"],
        "run",
    )  # fmt: skip
    sidecar.start()
    return ["--user=1000:100", *BARE, "-v", f"{shared}:/mnt/remotes:rslave", "-e", "NBMOUNTD_SIDECAR=/mnt/remotes"]


MODES: dict[str, Prepare] = {"A": mode_a, "F": mode_f, "D": mode_d, "P": mode_p, "S": mode_s}
