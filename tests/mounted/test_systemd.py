"""The shipped units under a real systemd: start, status line, reload, crashes that open files outlive, stop with drain."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mounted.booted import UID, USER, Booted, Unbootable
from tests.mounted.kernel import eventually
from tests.mounted.modes import MODE, ROOT, python_for_users

SHIPPED = ROOT / "systemd"
HOME = Path("/home") / USER

CONFIGURATION = f"""
[daemon]
log_format = "json"
[[mount]]
name = "shared"
path = "{HOME}/shared"
backend = "directory"
source = "{HOME}/remote"
write_back_delay = "1h"
"""

OPEN_FILE = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_APPEND)
for line in sys.stdin:
    os.write(fd, line.encode())
    print(os.pread(fd, 1000, 0).decode().count("\\n"), flush=True)
"""

USER_MANAGER = f"""
[Service]
PAMName=
Environment=XDG_RUNTIME_DIR=/run/user/{UID}
ExecStartPre=+/usr/bin/install -d -o {UID} -g {UID} -m 700 /run/user/{UID}
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[Booted]:
    if MODE != "root":
        pytest.skip("has its own ways to mount")
    python = python_for_users()
    if python is None:
        pytest.skip("no interpreter with pyfuse3 that an ordinary user may execute")
    path = ":".join([str(ROOT), *(each for each in sys.path if each)])
    start = f"#!/bin/sh\nPYTHONPATH='{path}' exec {python} -c"
    scripts = {
        f"usr/local/bin/{name}": f"{start} 'from nbmountd.cli import {name}; {name}()' \"$@\"\n"
        for name in ("nbmountd", "nbmountctl")
    }
    files = {
        "etc/systemd/system/nbmountd@.service": (SHIPPED / "nbmountd@.service").read_text(),
        "etc/systemd/user/nbmountd.service": (SHIPPED / "nbmountd.service").read_text(),
        f"etc/systemd/system/user@{UID}.service.d/alone.conf": USER_MANAGER,
        "etc/tmpfiles.d/nbmountd.conf": (SHIPPED / "tmpfiles.conf").read_text(),
        f"etc/nbmountd/{USER}.toml": CONFIGURATION,
        "usr/local/bin/hold-open": f"#!/usr/bin/env {python}\n{OPEN_FILE}",
        **scripts,
    }
    try:
        booted = Booted(python, files)
    except Unbootable as exc:
        pytest.skip(f"no systemd can be booted here: {exc}")
    try:
        booted.must("install", "-d", "-o", USER, "-g", str(UID), str(HOME / "remote"))
        yield booted
    finally:
        booted.end()


class OpenFile:
    """A program of the user's with a file open in the mount."""

    def __init__(self, machine: Booted, path: Path) -> None:
        self._process = subprocess.Popen(
            machine.inside("hold-open", str(path), user=True), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
        )
        self.lines = 0

    def write(self) -> None:
        """Appends a line and sees all that were written so far."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("line\n")
        self._process.stdin.flush()
        self.lines += 1
        assert self._process.stdout.readline() == f"{self.lines}\n"

    def close(self) -> None:
        self._process.communicate(timeout=30)


@pytest.mark.parametrize("manager", [(), ("--user",)], ids=["nbmountd@.service", "nbmountd.service"])
def test_the_unit_starts_reloads_outlives_crashes_and_drains(machine: Booted, manager: tuple[str, ...]) -> None:
    as_user = bool(manager)
    unit = "nbmountd.service" if as_user else f"nbmountd@{USER}.service"
    configuration = HOME / ".config/nbmountd/config.toml" if as_user else Path(f"/etc/nbmountd/{USER}.toml")
    remote, mount = HOME / "remote", HOME / "shared"

    def systemctl(*arguments: str) -> None:
        done = machine.run("systemctl", *manager, *arguments, unit, user=as_user)
        assert done.returncode == 0, done.stderr + machine.run("journalctl", "--no-pager", "-n", "50").stdout

    def worker() -> int:
        status = json.loads(machine.must("nbmountctl", "--json", "status", user=True))
        return int(status["mounts"][0]["pid"])

    def live() -> bool:
        done = machine.run("nbmountctl", "--json", "status", user=True)
        return done.returncode == 0 and json.loads(done.stdout)["mounts"][0]["state"] == "live"

    if as_user:
        machine.must("install", "-d", str(configuration.parent), user=True)
        machine.must("cp", f"/etc/nbmountd/{USER}.toml", str(configuration), user=True)
        machine.must("systemctl", "start", f"user@{UID}.service")

    # start: ready when the mount answers; somebody else than the daemon sees it
    systemctl("start")
    assert machine.show(unit, "ActiveState", manager) == "active"
    assert machine.show(unit, "StatusText", manager) == "1 live"
    machine.must("sh", "-c", f"echo hello > {mount}/hello.txt; cat {mount}/hello.txt", user=True)
    file = OpenFile(machine, mount / f"open{as_user}")
    file.write()

    # the worker is killed, then the main process with everything: a pause, no more
    machine.must("kill", "-9", str(worker()))
    file.write()
    before = machine.show(unit, "MainPID", manager)
    systemctl("kill", "-s", "KILL", "--kill-whom=main")
    file.write()
    eventually(lambda: machine.show(unit, "ActiveState", manager) == "active", 30, "it is back")
    assert machine.show(unit, "MainPID", manager) != before
    assert machine.show(unit, "NRestarts", manager) == "1"
    eventually(live, 30, "live again")

    # reload: a change is taken up in place
    machine.must("sed", "-i", f"s/^write_back_delay.*/write_back_delay = '{3 if as_user else 2}h'/", str(configuration))
    pid = worker()
    systemctl("reload")
    eventually(lambda: worker() != pid, 30, "a worker with the new settings")
    file.write()
    file.close()

    # stop: what was not sent yet is sent first, and nothing is left mounted
    assert machine.run("cat", f"{remote}/open{as_user}").returncode != 0
    systemctl("stop")
    assert machine.must("cat", f"{remote}/open{as_user}") == "line\n" * 4
    assert machine.show(unit, "Result", manager) == "success"
    assert "nbmountd" not in machine.must("cat", "/proc/1/mountinfo")
    assert machine.show(unit, "NFileDescriptorStore", manager) == "0"
