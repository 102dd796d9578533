"""Mounting and unmounting as root and as an ordinary user; what is refused, and that the refusal says what to do."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbmountd.fuse import mounting
from nbmountd.fuse.agreement import Flag
from nbmountd.fuse.mounting import MountError

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/dev/fuse"), reason="needs root and /dev/fuse"),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "point"
    yield path
    for _ in range(3):
        subprocess.run(["umount", "-l", path], capture_output=True, check=False)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """Not pytest's own, which each session closes to other users."""
    with tempfile.TemporaryDirectory(prefix="nbmountd-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def mount(path: Path, **options: object) -> mounting.Mounted:
    return mounting.mount(str(path), "test", **{"uid": 0, "gid": 0, **options})  # type: ignore[arg-type]


# --- as root -----------------------------------------------------------------------------------------------------------


def test_programs_that_read_on_and_on_get_a_mebibyte_a_request(point: Path) -> None:
    mounted = mount(point)
    there = mounting.find(str(point))
    assert there is not None
    setting = Path(f"/sys/class/bdi/{there.device}/read_ahead_kb")
    if not os.access(setting, os.W_OK) or os.statvfs(setting).f_flag & os.ST_RDONLY:
        pytest.skip("sysfs cannot be written to here, so the kernel's 128 KiB stay")

    assert setting.read_text() == "1024\n"

    mounting.unmount(str(point))
    mounted.close()


def test_a_process_with_thousands_of_open_files_can_mount(point: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        mounted = mount(point)
        assert mounted.fuse_fd > 1023
        os.close(mounted.fuse_fd)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)


def test_a_mount_is_there_with_its_options_and_gone_after_unmount(point: Path) -> None:
    mounted = mount(point, uid=0, read_only=True)
    there = mounting.find(str(point))
    assert there is not None
    assert (there.source, there.type, there.is_ours) == ("nbmountd#test", "fuse.nbmountd", True)
    line = next(line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {point} " in line)
    assert {"ro", "nosuid", "nodev", "user_id=0", "default_permissions"} <= set(line.split()[3].split(","))
    assert "allow_other" not in line
    assert Flag.HANDLE_KILLPRIV_V2 in mounted.agreement.flags

    mounting.unmount(str(point))
    mounted.close()

    assert mounting.find(str(point)) is None
    mounting.unmount(str(point))  # nothing to do is fine


def test_the_empty_directory_below_is_guarded_between_mounts(point: Path) -> None:
    for _ in range(2):
        mounted = mount(point)
        mounting.unmount(str(point))
        mounted.close()
        assert mode_of(point) == 0o555
    touch = ["setpriv", "--reuid=0", "--bounding-set=-all", "touch", str(point / "x")]
    assert subprocess.run(touch, capture_output=True, check=False).returncode, "root without CAP_DAC_OVERRIDE wrote there"


def test_a_missing_directory_is_made_by_its_owner(open_directory: Path) -> None:
    home = open_directory / "home"
    home.mkdir()
    os.chown(home, 1234, 1234)
    point = home / "new" / "point"

    mounted = mount(point, uid=1234, gid=1234)

    line = next(line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {point} " in line)
    assert {"user_id=1234", "group_id=1234", "allow_other"} <= set(line.split()[3].split(","))
    mounting.unmount(str(point))
    mounted.close()
    assert point.stat().st_uid == 1234


def test_a_dead_mount_of_ours_is_found_cleaned_and_mounted_over(point: Path) -> None:
    mount(point).close()
    there = mounting.find(str(point))
    assert there is not None and there.is_dead()
    with pytest.raises(OSError, match="not connected"):
        os.listdir(point)

    mounted = mount(point)

    assert len([entry for entry in mounting.mounts() if entry.path == str(point)]) == 1
    mounting.unmount(str(point))
    mounted.close()


def test_clean_leaves_a_live_mount_of_others_alone(point: Path) -> None:
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", point], check=True)

    assert mounting.clean(str(point)) is False
    mounting.unmount(str(point))

    assert mounting.find(str(point)) is not None


def test_abort_ends_a_request_that_nobody_answers(point: Path) -> None:
    mounted = mount(point)
    client = subprocess.Popen(["stat", "-f", point], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.read(mounted.fuse_fd, 2 << 20)  # taken: from now on the client cannot be killed

    mounting.abort(str(point))

    assert client.wait(10) == 1
    there = mounting.find(str(point))
    assert there is not None
    assert not mounted.is_connected()
    mounting.unmount(str(point))
    mounted.close()


def test_names_with_commas_blanks_and_backslashes_survive(tmp_path: Path) -> None:
    point = tmp_path / "with blank, comma\\ and\ttab"
    mounted = mounting.mount(str(point), "my, name", uid=0, gid=0)

    there = mounting.find(str(point))

    assert there is not None
    assert there.source == "nbmountd#my, name"
    mounting.unmount(str(point))
    mounted.close()
    assert mounting.find(str(point)) is None


# --- refused -----------------------------------------------------------------------------------------------------------


def test_a_directory_with_files_is_refused(point: Path) -> None:
    point.mkdir()
    for number in range(5):
        (point / f"file{number}").touch()

    with pytest.raises(MountError, match=r"not empty \(5 entries: 'file0', 'file1', 'file2', \.\.\.\).*mv .*\.local"):
        mount(point)

    assert mode_of(point) != 0o555


def test_a_file_is_refused(point: Path) -> None:
    point.touch()
    with pytest.raises(MountError, match="not a directory; move it aside"):
        mount(point)


def test_a_symlink_is_refused(point: Path) -> None:
    point.symlink_to("/etc")
    with pytest.raises(MountError, match="symbolic link"):
        mount(point)


def test_the_mount_of_somebody_else_is_refused(point: Path) -> None:
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "theirs", point], check=True)
    with pytest.raises(MountError, match=r"mount point of theirs \(tmpfs\)"):
        mount(point)


def test_a_live_mount_of_another_daemon_is_refused(point: Path) -> None:
    mounted = mount(point)
    server = subprocess.Popen(
        [sys.executable, "-c", ANSWER_ENOSYS, str(mounted.fuse_fd)], pass_fds=[mounted.fuse_fd], stdout=subprocess.DEVNULL
    )
    with pytest.raises(MountError, match="served by another nbmountd"):
        mount(point)
    with pytest.raises(MountError, match="lies inside"):
        mount(point / "below")
    mounting.unmount(str(point))
    mounted.close()
    server.kill()
    server.wait()


ANSWER_ENOSYS = """
import errno, os, struct, sys
while True:
    request = os.read(int(sys.argv[1]), 2 << 20)
    os.write(int(sys.argv[1]), struct.pack("=IiQ", 16, -errno.ENOSYS, struct.unpack_from("=Q", request, 8)[0]))
"""


def test_root_does_not_mount_over_what_its_user_does_not_own(point: Path) -> None:
    point.mkdir()
    with pytest.raises(MountError, match=rf"belongs to uid 0.*chown 1234:1234 {point}"):
        mount(point, uid=1234, gid=1234)


def test_root_makes_no_directory_where_its_user_could_not(tmp_path: Path) -> None:
    with pytest.raises(MountError, match=r"cannot be made by uid 1234.*make it as root and `chown"):
        mount(tmp_path / "no" / "way", uid=1234, gid=1234)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("path", ["relative", "/", "//"])
def test_a_path_that_cannot_be_a_mount_point_is_refused(path: str) -> None:
    with pytest.raises(MountError, match="absolute directory below /"):
        mounting.mount(path, "test", uid=0, gid=0)


# --- as an ordinary user -----------------------------------------------------------------------------------------------

NOBODY = 65534  # has a name in /etc/passwd, which fusermount3 insists on
AS_USER = ["setpriv", f"--reuid={NOBODY}", "--clear-groups"]
IN_NAMESPACE = r"""
set -e
mount --make-rprivate /
if [ -n "$3" ]; then
    mknod -m "$3" "$1/fuse" c 10 229
    mount --bind "$1/fuse" /dev/fuse
else
    mount -t tmpfs -o mode=755 none /dev
    mknod -m 666 /dev/null c 1 3
fi
setpriv --reuid=$7 --regid=$7 --clear-groups ${4:---inh-caps=-all} $5 env PATH="$USER_PATH" "$6" -c "$2" "$1/home"
"""

MOUNT_AND_REPORT = """
import json, os, sys
from pathlib import Path
from nbmountd.fuse import mounting
point = sys.argv[1] + "/point"
report = {}
try:
    mounting.mount(point, "a,b", uid=os.geteuid(), gid=os.getegid()).close()  # dead at once
    report["dead"] = mounting.find(point).is_dead()
    mounted = mounting.mount(point, "a,b", uid=os.geteuid(), gid=os.getegid())
    report["way"] = mounted.way
    report["source"] = mounting.find(point).source
    report["killpriv"] = mounted.agreement.flags.HANDLE_KILLPRIV_V2 in mounted.agreement.flags
    mounting.unmount(point)
    mounted.close()
    report["left"] = mounting.find(point) is not None
    report["mode"] = oct(os.stat(point).st_mode & 0o777)
except mounting.MountError as exc:
    report["error"] = str(exc)
print(json.dumps(report))
"""


@pytest.fixture
def user_directory(open_directory: Path) -> Path:
    home = open_directory / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    return open_directory


@pytest.fixture(scope="module")
def user_python() -> str:
    """An interpreter that an ordinary user may run; this one may lie in root's home."""
    for python in (sys.executable, shutil.which("python3", path="/usr/bin:/bin") or "python3"):
        if subprocess.run([*AS_USER, "env", python, "-c", ""], capture_output=True, check=False).returncode == 0:
            return python
    pytest.skip("no Python interpreter that an ordinary user may execute")


def as_user(
    python: str, directory: Path, *, device_mode: str = "666", setpriv: str = "", wrapper: str = "", path: str | None = None,
    uid: int = NOBODY,
) -> dict[str, object]:  # fmt: skip
    """What MOUNT_AND_REPORT says as `uid` in a mount namespace of its own, so that nothing outside changes."""
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", IN_NAMESPACE, "sh",
         directory, MOUNT_AND_REPORT, device_mode, setpriv, wrapper, python, str(uid)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=30,
        env={**os.environ, "PYTHONPATH": str(ROOT), "USER_PATH": path or os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report: dict[str, object] = json.loads(done.stdout)
    return report


WORKS = {"dead": True, "source": "nbmountd#a,b", "killpriv": True, "left": False, "mode": "0o555"}


def test_an_ordinary_user_mounts_by_the_setuid_helper(user_python: str, user_directory: Path) -> None:
    assert as_user(user_python, user_directory) == {**WORKS, "way": "fusermount3"}


def test_a_user_with_an_ambient_capability_mounts_without_the_helper(user_python: str, user_directory: Path) -> None:
    capability = "--inh-caps=+sys_admin --ambient-caps=+sys_admin --no-new-privs"
    assert as_user(user_python, user_directory, setpriv=capability) == {**WORKS, "way": "mount"}


def test_a_user_in_a_user_namespace_of_its_own_needs_no_privilege(user_python: str, user_directory: Path) -> None:
    report = as_user(user_python, user_directory, setpriv="--no-new-privs", wrapper="unshare -c -m --keep-caps")
    assert report == {**WORKS, "way": "mount"}


def test_no_new_privs_is_named_as_the_reason(user_python: str, user_directory: Path) -> None:
    error = str(as_user(user_python, user_directory, setpriv="--no-new-privs")["error"])
    assert "no_new_privs is set" in error and "exec --userns" in error


def test_a_missing_capability_is_named_as_the_reason(user_python: str, user_directory: Path) -> None:
    error = str(as_user(user_python, user_directory, setpriv="--bounding-set=-sys_admin")["error"])
    assert "--cap-add SYS_ADMIN" in error


def test_a_device_without_permission_is_named_as_the_reason(user_python: str, user_directory: Path) -> None:
    error = str(as_user(user_python, user_directory, device_mode="600")["error"])
    assert "/dev/fuse: Permission denied" in error and "--device /dev/fuse" in error


def test_a_missing_device_is_named_as_the_reason(user_python: str, user_directory: Path) -> None:
    error = str(as_user(user_python, user_directory, device_mode="")["error"])
    assert "--device /dev/fuse" in error


def test_a_missing_helper_is_named_as_the_reason(user_python: str, user_directory: Path) -> None:
    error = str(as_user(user_python, user_directory, path="/nonexistent")["error"])
    assert "install the package fuse3" in error


def test_a_user_without_a_name_is_told_what_the_helper_misses(user_python: str, user_directory: Path) -> None:
    os.chown(user_directory / "home", 4321, 4321)
    error = str(as_user(user_python, user_directory, uid=4321)["error"])
    assert "uid 4321 in /etc/passwd" in error
