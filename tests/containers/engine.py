"""A docker engine of the tests' own, its images, and containers that are gone afterwards.

Everything is below one directory (`build/containers`, kept between runs so that images need not be made anew); no other engine
on the machine is touched. The base image is Debian, made on the spot, with this machine's own settings for apt and pip, so
that the project's Dockerfile needs to name none. Containers have the host's network: the servers listen on loopback.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE, IMAGE = "debian:bookworm-slim", "nbmountd-notebook"
BUILD_LIMIT = 1200.0


class Engine:
    """dockerd. `close()` when done."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.log = place / "dockerd.log"
        self.socket = f"unix://{place}/docker.sock"
        place.mkdir(parents=True, exist_ok=True)
        (place / "docker.pid").unlink(missing_ok=True)
        command = [
            "dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=overlay2",
            f"--data-root={place}/data", f"--exec-root={place}/exec", f"--pidfile={place}/docker.pid", "-H", self.socket,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while self.run("version", check=False).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"dockerd does not start:\n{self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)

    def run(
        self, *arguments: str, check: bool = True, timeout: float = 120.0, stdin: int = subprocess.DEVNULL
    ) -> subprocess.CompletedProcess[str]:
        """`docker` with these arguments. Its output is text, both streams in one when it fails."""
        done = subprocess.run(
            [docker_client(), "-H", self.socket, *arguments], env={**os.environ, "DOCKER_BUILDKIT": "1"}, stdin=stdin,
            capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"docker {' '.join(arguments)}:\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
        return done

    def build(self) -> None:
        """The notebook image from the project's Dockerfile, and before it the base image if there is none."""
        if self.run("image", "inspect", BASE, check=False).returncode != 0:
            self._make_base()
        self.run(
            "build", "--network=host", "-f", "docker/Dockerfile", "-t", IMAGE, ".", timeout=BUILD_LIMIT
        )

    def _make_base(self) -> None:
        tree = self.place / "debian"
        shutil.rmtree(tree, ignore_errors=True)
        with (self.place / "debootstrap.log").open("wb") as log:
            subprocess.run(
                ["debootstrap", "--variant=minbase", "bookworm", str(tree)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                timeout=BUILD_LIMIT, check=True,
            )  # fmt: skip
        settings = _machine_settings(tree)
        changes = [f"--change=ENV {name}={value}" for name, value in settings.items()]
        files = subprocess.Popen(
            ["tar", "-C", str(tree), "--exclude=./dev", "--exclude=./var/lib/apt/lists/*", "--exclude=./var/cache/apt/*",
             "-c", "."],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert files.stdout is not None
        with files.stdout:
            self.run("import", *changes, "-", BASE, stdin=files.stdout.fileno(), timeout=BUILD_LIMIT)
        assert files.wait(60) == 0
        shutil.rmtree(tree)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(10)
        subprocess.run(["umount", self.place / "exec/netns/default"], stderr=subprocess.DEVNULL, check=False)  # it forgets that


def docker_client() -> str:
    """Debian's own client has BuildKit built in; another one may need a plugin for it."""
    return "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"


def _machine_settings(tree: Path) -> dict[str, str]:
    """Puts what this machine needs to reach its package sources into the tree; gives the variables that go with it."""
    apt = Path("/etc/apt")
    for source in [*apt.glob("sources.list.d/*.sources"), *apt.glob("sources.list.d/*.list"), *apt.glob("apt.conf.d/99*")]:
        shutil.copy(source, tree / source.relative_to("/"))
    listed = (apt / "sources.list").read_text() if (apt / "sources.list").exists() else ""
    (tree / "etc/apt/sources.list").write_text(listed)
    # Not at ca-certificates' own place: that package is installed later and writes there.
    bundle = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
    variables = {}
    if bundle.exists():
        (tree / "etc/machine-ca.pem").write_bytes(bundle.read_bytes())
        variables |= {"PIP_CERT": "/etc/machine-ca.pem"}
    if index := os.environ.get("PIP_INDEX_URL"):
        variables["PIP_INDEX_URL"] = index
    return variables


class Container:
    """One container, removed by force in the end. `name` must be unused."""

    def __init__(self, engine: Engine, name: str, options: Sequence[str], *command: str) -> None:
        self.engine, self.name = engine, name
        engine.run("rm", "-f", name, check=False)
        engine.run("create", "--name", name, "--network=host", *options, IMAGE, *command)

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.run("rm", "-f", self.name, check=False)

    def start(self) -> Container:
        self.engine.run("start", self.name)
        return self

    def wait(self, timeout: float = 120.0) -> int:
        """Its exit status, when it has ended."""
        return int(self.engine.run("wait", self.name, timeout=timeout).stdout)

    def stop(self, grace: int) -> None:
        """SIGTERM, and SIGKILL after `grace` seconds, as Kubernetes does it."""
        self.engine.run("stop", "-t", str(grace), self.name, timeout=grace + 60)

    def kill(self) -> None:
        self.engine.run("kill", self.name)

    @property
    def log(self) -> str:
        done = self.engine.run("logs", self.name)
        return done.stdout + done.stderr

    def inside(self, *command: str, user: str = "1000:100", check: bool = True) -> str:
        """What a command prints that is run in it."""
        return self.engine.run("exec", "-u", user, self.name, *command, check=check).stdout


def open_device(place: Path) -> Path:
    """A node of /dev/fuse that every user may open: on this machine the real one may be for root alone."""
    node = place / "fuse"
    if not node.exists():
        os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(10, 229))
    node.chmod(0o666)
    return node
