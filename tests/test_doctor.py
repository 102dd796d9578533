"""The doctor: each thing that can be wrong is found, named and comes with what to do; nothing secret is shown."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from nbmountd import doctor, ways
from nbmountd.config import Config, DaemonConfig, DirectoryOptions, MountConfig, OnedataNativeOptions, WebDAVOptions
from nbmountd.control import schema
from nbmountd.control.server import open_listener, serve_requests
from nbmountd.doctor import machine, mounts
from nbmountd.doctor.check import Check
from nbmountd.ways import Rights, Way
from tests.servers.onedatafs import FakeSite

SYS_ADMIN = 1 << 21


def found(checks: object, subject: str) -> Check:
    matches = [check for check in checks if check.subject == subject]  # type: ignore[attr-defined]
    assert len(matches) == 1, checks
    return matches[0]


def of(tmp_path: Path, *given: MountConfig) -> Config:
    return Config(daemon=DaemonConfig(state_dir=f"{tmp_path}/state", cache_dir=f"{tmp_path}/cache"), mounts=given)


def webdav(tmp_path: Path, **options: object) -> MountConfig:
    own = WebDAVOptions(url="https://h/", **options)  # type: ignore[arg-type]
    return MountConfig(name="m", path=f"{tmp_path}/m", backend="webdav", options=own)


# --- the machine -------------------------------------------------------------------------------------------------------


def test_the_machine_is_judged_line_by_line() -> None:
    checks = list(machine.examine())

    subjects = [check.subject for check in checks]
    assert set(subjects) >= {"python", "packages", "kernel", "rights", "way: fusermount3", "mounting", "open files"}
    assert [check for check in checks if check.level != "ok" and not check.advice] == []


def test_a_missing_or_closed_device_is_told_apart(tmp_path: Path) -> None:
    assert "--device" in machine._device(tmp_path / "none").advice
    assert machine._device(tmp_path / "none").level == "fail"
    (tmp_path / "file").write_text("")
    assert machine._device(tmp_path / "file").finding == "is not a device"
    assert machine._device(Path("/dev/null")).level == "ok"


def test_rights_are_read_as_the_kernel_writes_them() -> None:
    status = "Name:\tx\nCapEff:\t{:016x}\nCapBnd:\t{:016x}\nNoNewPrivs:\t{}\n"

    root = Rights.parse(status.format(SYS_ADMIN, SYS_ADMIN, 0))
    user = Rights.parse(status.format(0, SYS_ADMIN, 0))
    kubernetes = Rights.parse(status.format(0, SYS_ADMIN, 1))
    plain = Rights.parse(status.format(0, 0, 0))

    assert [each.may_mount for each in (root, user, kubernetes, plain)] == [True, False, False, False]
    assert [each.helper_may_mount for each in (root, user, kubernetes, plain)] == [True, True, False, False]
    assert Rights.of_this_process().no_new_privileges in (True, False)


DEVICE, NO_DEVICE = Check("ok", "/dev/fuse", "can be opened"), Check("fail", "/dev/fuse", "is missing", "add it")


@pytest.mark.parametrize(
    ("ways", "device", "sidecar", "level", "part"),
    [
        ([Way("direct")], DEVICE, "", "ok", "directly"),
        ([Way("direct", "no right"), Way("fusermount3")], DEVICE, "", "ok", "fusermount3"),
        ([Way("direct", "no right"), Way("userns")], DEVICE, "", "ok", "user namespace"),
        ([Way("helper")], NO_DEVICE, "", "ok", "helper"),
        ([Way("direct", "no right"), Way("userns", "seccomp")], NO_DEVICE, "", "fail", "no way"),
        ([Way("direct", "no right"), Way("userns", "seccomp")], NO_DEVICE, "/mnt/remotes", "ok", "/mnt/remotes"),
    ],
)
def test_the_start_mode_is_named_and_what_others_lack_is_no_fault_then(
    ways: list[Way], device: Check, sidecar: str, level: str, part: str
) -> None:
    checks = list(machine._ways(ways, device, sidecar))

    mounting = found(checks, "mounting")
    assert (mounting.level, part in mounting.finding) == (level, True)
    assert {check.level for check in checks} == ({"ok"} if level == "ok" else {"warn", "fail"})
    assert mounting.advice or level == "ok"


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_a_way_is_tried_where_it_can_be_and_the_trial_leaves_no_trace() -> None:
    before = Path("/proc/self/mountinfo").read_text()

    assert ways.direct(Rights.of_this_process(), ways.device_lacks(), trial=True).is_open
    assert ways.namespace(ways.device_lacks()).is_open

    assert "trial" not in Path("/proc/self/mountinfo").read_text().removeprefix(before)


# --- places and credentials --------------------------------------------------------------------------------------------


def test_directories_are_named_with_their_file_system_and_space(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)

    checks = list(mounts.examine(of(tmp_path), {"HOME": str(tmp_path)}))

    assert found(checks, "state_dir").level != "fail"
    assert " free on " in found(checks, "state_dir").finding
    assert "not made yet" in found(checks, "cache_dir").finding
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("kind", "subject", "level"), [
    ("tmpfs", "state_dir", "warn"), ("overlay", "state_dir", "warn"), ("nfs4", "state_dir", "ok"), ("ext4", "state_dir", "ok"),
    ("tmpfs", "cache_dir", "ok"), ("nfs4", "cache_dir", "warn"),
])
def test_unsent_bytes_belong_on_lasting_disks_and_the_cache_on_local_ones(
    tmp_path: Path, kind: str, subject: str, level: str
) -> None:
    check = mounts._directory(subject, tmp_path / "x", {str(tmp_path): kind}, keeps_unsent=subject == "state_dir")

    if "little space" not in check.advice:
        assert (check.level, kind in check.finding) == (level, True)


def test_a_directory_that_others_can_write_to_is_to_be_repaired(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)

    assert "others can write" in found(mounts.examine(of(tmp_path), {}), "state_dir").finding


def test_local_files_under_a_mount_point_are_found(tmp_path: Path) -> None:
    mount = webdav(tmp_path)
    assert found(mounts.examine(of(tmp_path, mount), {}), "m at").finding.endswith("will be made")
    (tmp_path / "m").mkdir()
    assert found(mounts.examine(of(tmp_path, mount), {}), "m at").finding.endswith("empty, not mounted")
    (tmp_path / "m" / "lost.txt").write_text("")

    check = found(mounts.examine(of(tmp_path, mount), {}), "m at")
    assert (check.level, "holds 1 local files" in check.finding, "mv " in check.advice) == ("warn", True, True)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "m"
    point.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a tmpfs")
    subprocess.run(["mount", "-t", "tmpfs", "none", str(point)], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


@pytest.mark.mounted
def test_another_file_system_at_a_mount_point_is_found(tmp_path: Path, mounted: Path) -> None:
    check = found(mounts.examine(of(tmp_path, webdav(tmp_path)), {}), "m at")

    assert (check.level, "another file system (tmpfs)" in check.finding) == ("fail", True)


@pytest.mark.parametrize(
    ("content", "mode", "level", "part"),
    [
        (None, 0, "warn", "is not there"),
        ("", 0o600, "warn", "is empty"),
        ("hunter2", 0o600, "ok", "only for its owner"),
        ("hunter2", 0o644, "warn", "others can read it"),
    ],
)
def test_credential_files_are_judged_and_not_shown(
    tmp_path: Path, content: str | None, mode: int, level: str, part: str
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)

    check = found(mounts.examine(of(tmp_path, webdav(tmp_path, user="a", password_file=str(file))), {}), "m credentials")

    assert (check.level, part in check.finding) == (level, True)
    assert check.advice or level == "ok"
    assert "hunter2" not in str(check)


@pytest.mark.parametrize(
    ("options", "environ", "level", "part"),
    [
        ({"password_env": "PW"}, {"PW": "hunter2"}, "ok", "variable PW"),
        ({"password_env": "PW"}, {}, "warn", "not set"),
        ({"password": "hunter2"}, {}, "ok", "password_file is safer"),
        ({"token_command": ("sh", "-c", "x")}, {}, "ok", "program sh"),
        ({"token_command": ("no-such-program",)}, {}, "fail", "no program"),
        ({"user": "alice"}, {}, "warn", "without a password"),
    ],
)
def test_other_credentials_are_judged_and_not_shown(
    tmp_path: Path, options: dict[str, object], environ: dict[str, str], level: str, part: str
) -> None:
    check = found(mounts.examine(of(tmp_path, webdav(tmp_path, **options)), environ), "m credentials")

    assert (check.level, part in check.finding) == (level, True)
    assert "hunter2" not in str(check)


def test_a_missing_source_directory_is_to_be_repaired(tmp_path: Path) -> None:
    mount = MountConfig(name="m", path=f"{tmp_path}/m", backend="directory", options=DirectoryOptions(source="/nowhere"))

    assert found(mounts.examine(of(tmp_path, mount), {}), "m source").level == "fail"


@pytest.mark.parametrize(
    ("python", "level", "part"),
    [
        ("/nowhere/python3", "fail", "cannot be run"),
        (sys.executable, "fail", "cannot import fs.onedatafs"),
        (None, "ok", "fs.onedatafs of"),
    ],
    ids=["no-interpreter", "no-library", "right"],
)
def test_the_interpreter_with_onedatas_library_is_tried(tmp_path: Path, python: str | None, level: str, part: str) -> None:
    own = OnedataNativeOptions(python=python or str(FakeSite(tmp_path / "site").python), host="h", token_env="TOKEN")
    mount = MountConfig(name="m", path=f"{tmp_path}/m", backend="onedata-native", options=own)

    check = found(mounts.examine(of(tmp_path, mount), {}), "m library")

    assert (check.level, part in check.finding) == (level, True), check


# --- the whole ---------------------------------------------------------------------------------------------------------


def run_doctor(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NBMOUNTD_", "WEBDAV_", "XDG_"))}
    return subprocess.run(
        [sys.executable, "-c", "from nbmountd.cli import nbmountctl; nbmountctl()", *arguments],
        capture_output=True, text=True, check=False, timeout=60,
        env={**kept, "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}, cwd=Path(__file__).parent.parent,
    )


def test_without_daemon_and_configuration_it_says_how_to_go_on(tmp_path: Path) -> None:
    ended = run_doctor(tmp_path, "doctor")
    as_json = json.loads(run_doctor(tmp_path, "--json", "doctor").stdout)

    assert "nbmountd run" in ended.stdout
    assert "config.toml" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr
    assert {check["subject"] for check in as_json} >= {"python", "configuration", "daemon"}
    assert ended.returncode == (1 if any(check["level"] == "fail" for check in as_json) else 0)


def test_a_wrong_configuration_is_to_be_repaired_and_the_status_says_so(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[deamon]\n")

    ended = run_doctor(tmp_path, "doctor", "--config", str(tmp_path / "c.toml"))

    assert ended.returncode == 1
    assert 'did you mean "daemon"' in ended.stdout
    assert "to repair" in ended.stdout.splitlines()[-1]


def test_a_configuration_with_a_password_that_others_can_read_is_found(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[[mount]]\nname="m"\npath="~/m"\nbackend="webdav"\nurl="https://h/"\npassword="hunter2"\n')
    file.chmod(0o644)

    ended = run_doctor(tmp_path, "doctor", "--config", str(file))

    assert f"chmod 600 {file}" in ended.stdout
    assert "hunter2" not in ended.stdout


async def test_a_running_daemon_is_asked_for_its_mounts(tmp_path: Path) -> None:
    async def handle(request: schema.AnyRequest) -> AsyncIterator[schema.AnyReply]:
        live = schema.MountStatus(name="good", path="/g", backend="webdav", state="live")
        bad = schema.MountStatus(name="bad", path="/b", backend="webdav", state="failed", reason="no /dev/fuse")
        yield schema.StatusReply(version="9", pid=1, safe=True, mounts=(live, bad))

    listener = open_listener(tmp_path / "s")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_requests, listener, handle)
        checks = await trio.to_thread.run_sync(lambda: doctor.examine(socket=tmp_path / "s"))
        nursery.cancel_scope.cancel()

    assert "version 9" in found(checks, "daemon").finding
    assert found(checks, "mount good").level == "ok"
    assert (found(checks, "mount bad").level, "no /dev/fuse" in found(checks, "mount bad").finding) == ("fail", True)


def test_a_check_that_breaks_is_a_finding_and_not_the_end(tmp_path: Path) -> None:
    checks = doctor.examine(config=tmp_path, socket=tmp_path / "s")

    assert found(checks, "configuration").level == "fail"
    assert found(checks, "daemon").level == "warn"
    assert doctor.lines_of(checks)[-1].endswith("to look at")
