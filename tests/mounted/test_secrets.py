"""Secrets stay inside: in no file, log, error, argument list, child or dump; only the owner gets at socket and files."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nbmountd.control import schema
from tests.mounted import modes
from tests.mounted.conftest import webdav_mount
from tests.mounted.harness import Daemon
from tests.mounted.kernel import eventually
from tests.servers import ApacheServer, ServerProcess, TokenServer

PASSWORD = 's3cret "pass/wörd" & more'
TOKEN = "header.eyJzdWIiOiJhZGEifQ.s1gnature-of-the-token"
SPELLINGS = (PASSWORD, quote(PASSWORD), quote(PASSWORD, safe=""), json.dumps(PASSWORD)[1:-1], PASSWORD[:8], TOKEN, TOKEN[-12:])


@pytest.fixture
def apache(tmp_path: Path) -> Iterator[ServerProcess]:
    with ApacheServer(tmp_path / "apache", tmp_path / "apache-work", password=PASSWORD) as server:
        yield server


@pytest.fixture
def daemon(apache: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """Two mounts: a password in the environment, and a token that a command prints."""
    with TokenServer(tmp_path / "wsgidav", tmp_path / "wsgidav-work") as tokens:
        tokens.allow(TOKEN)
        (tmp_path / "token").write_text(TOKEN)
        command = tmp_path / "print-token"
        command.write_text(f"#!/bin/sh\nenv > {tmp_path}/environment-of-the-command\ncat {tmp_path}/token\n")
        command.chmod(0o700)
        modes.hand_over(command)
        os.chown(tmp_path, *modes.OWNER)
        monkeypatch.setenv("DAV_PASSWORD", PASSWORD)
        dav = {key: value for key, value in webdav_mount(apache).items() if key != "password"}
        daemon = Daemon(
            {
                "dav": {**dav, "password_env": "DAV_PASSWORD", "write_back_delay": "0s"},
                "tokens": {"backend": "webdav", "url": tokens.url, "token_command": [str(command)]},
            },
            log_level="debug",
        )
        try:
            yield daemon.start()
        finally:
            daemon.discard()


def files_below(*directories: Path) -> Iterator[Path]:
    for directory in directories:
        for root, _, names in os.walk(directory):
            yield Path(root)
            yield from (Path(root) / name for name in names)


def assert_no_secret(text: str, where: object) -> None:
    found = [spelling for spelling in SPELLINGS if spelling in text]
    assert found == [], f"in {where}"


def test_a_secret_is_in_no_file_log_answer_argument_list_or_child(
    daemon: Daemon, apache: ServerProcess, tmp_path: Path
) -> None:
    for name in ("dav", "tokens"):
        daemon.wait_for_state(name, "live")
        (daemon.path(name) / "file.txt").write_text("content")
    (apache.root / "directory").mkdir()
    daemon.sync()
    daemon.refresh()
    apache.freeze()
    waiting = threading.Thread(target=_list, args=(daemon.path("dav") / "directory",))
    waiting.start()
    assert daemon.child is not None

    eventually(lambda: "dav" in daemon.ctl("explain", "--requests").stdout, 20, "somebody waits for the frozen server")
    daemon.child.send_signal(signal.SIGUSR1)
    eventually(lambda: len(mounts_that_dumped(daemon)) == 3, 20, "the supervisor and each worker dump their tasks")
    apache.thaw()
    lines = log_lines(daemon)
    verbs = (("status",), ("--json", "status"), ("queue",), ("metrics",), ("explain", str(daemon.path("dav") / "file.txt")))
    answers = [daemon.ctl(*verb).stdout for verb in verbs]
    processes = daemon.processes()
    waiting.join(60)

    assert any("engine" in line["at"] for line in lines if line["message"] == "task")
    assert any(line["mount"] == "dav" and line["seconds"] >= 0 for line in lines if line["message"] == "request")
    assert "debug" in {line["level"].lower() for line in lines}
    assert_no_secret(daemon.log.read_text(), "the log")
    for answer in answers:
        assert answer
        assert_no_secret(answer, "what nbmountctl says")
    assert list(text_string_to_metric_families(answers[3]))
    for process in processes:
        command_line = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode(errors="replace")
        assert_no_secret(command_line, command_line)
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        assert [line.split()[4:6] for line in limits.splitlines() if line.startswith("Max core")] == [["0", "0"]]
    environment = (tmp_path / "environment-of-the-command").read_text()
    assert "HOME=" in environment
    assert_no_secret(environment, "the environment of a token command")
    for path in files_below(daemon.home / "state", daemon.home / "cache", daemon.home / "run"):
        if path.is_file():
            content = path.read_bytes()
            assert not [spelling for spelling in SPELLINGS if spelling.encode() in content], f"in {path}"


def log_lines(daemon: Daemon) -> list[dict[str, Any]]:
    """The whole lines of its log so far."""
    return [json.loads(line) for line in daemon.log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def mounts_that_dumped(daemon: Daemon) -> set[str | None]:
    return {line.get("mount") for line in log_lines(daemon) if line["message"] == "task"}


def _list(directory: Path) -> None:
    try:
        os.listdir(directory)
    except OSError:
        return


def test_only_the_owner_gets_at_socket_state_and_cache(daemon: Daemon) -> None:
    daemon.wait_for_state("dav", "live")
    (daemon.path("dav") / "file.txt").write_text("content")
    daemon.sync(daemon.path("dav"))
    assert (daemon.path("dav") / "file.txt").read_text() == "content"

    seen = []
    places = (daemon.home / "state", daemon.home / "cache", daemon.socket.parent)
    for path in (*places, *(place / name for place in places[:2] for name in daemon.mounts), daemon.socket.parent / "workers"):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o700, path
    for path in files_below(*places):
        found = path.lstat()
        assert found.st_uid in (modes.OWNER[0], os.geteuid()) and not path.is_symlink()
        seen.append(stat.S_IFMT(found.st_mode))
    assert {stat.S_IFSOCK, stat.S_IFDIR, stat.S_IFREG} <= set(seen)
    for path in (daemon.socket, *daemon.socket.parent.glob("workers/*.sock")):
        assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    daemon.terminate()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_another_user_reaches_neither_socket_nor_files(daemon: Daemon) -> None:
    daemon.home.chmod(0o755)
    daemon.socket.parent.parent.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        reached = 0
        for path in (daemon.home / "state", daemon.home / "cache", daemon.socket.parent):
            reached += os.access(path, os.R_OK) or os.access(path, os.X_OK)
        reached += daemon.ctl("--socket", str(daemon.socket), "status").returncode != 1
        os._exit(reached)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert isinstance(daemon.ask(schema.Ping()), schema.Done)
    daemon.terminate()
