"""Calls that few programs make, and that some cannot do without: handles, leases, watches, loaders, io_uring."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.kernel import listed
from tests.mounted.posix.twins import Twins

LIBC = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def said(call: Callable[[], object]) -> object:
    """What it returned, or the name of its errno."""
    try:
        return call()
    except OSError as exc:
        return errno.errorcode.get(exc.errno or 0)


# --- descriptors and names ---------------------------------------------------------------------------------------------


def test_a_path_descriptor_leads_to_the_file_and_reads_nothing(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"content")
        fd = os.open(place / "file", os.O_PATH)
        (place / "file").rename(place / "moved")
        found = [
            os.fstat(fd).st_size,
            said(lambda: os.read(fd, 1)),
            Path(f"/proc/self/fd/{fd}").read_bytes(),
            os.readlink(f"/proc/self/fd/{fd}").rpartition("/")[2],
        ]
        os.close(fd)
        return found

    twins.same(call)


def test_an_open_file_is_given_another_name_through_its_descriptor(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").write_bytes(b"content")
        with (place / "file").open("rb") as file:
            os.link(f"/proc/self/fd/{file.fileno()}", place / "second", follow_symlinks=True)
        return (place / "second").read_bytes(), (place / "file").stat().st_nlink

    twins.same(call)


def test_the_working_directory_follows_a_rename_and_survives_its_removal(twins: Twins) -> None:
    code = """if True:
        import os, sys
        os.mkdir("d"); os.chdir("d"); open("f", "w").write("x")
        os.rename("../d", "../e")
        print(os.path.basename(os.getcwd()), open("f").read(), os.listdir("."))
        os.unlink("f"); os.rmdir("../e")
        for call in (os.getcwd, lambda: open("g", "w"), lambda: os.listdir(".")):
            try: print(call())
            except OSError as exc: print(exc.errno)
    """
    twins.same(lambda place: subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True).stdout)


def test_a_file_is_opened_again_by_its_handle_or_the_file_system_says_that_it_has_none(folder: Rig) -> None:
    """name_to_handle_at(2), which NFS servers, inotify tools and CRIU use."""
    path = folder.mount / "file"
    path.write_bytes(b"content")
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128), 136)
    mount_id = ctypes.c_int()
    got = LIBC.name_to_handle_at(AT_FDCWD, os.fsencode(path), handle, ctypes.byref(mount_id), 0)

    if got < 0:
        assert ctypes.get_errno() in (errno.EOPNOTSUPP, errno.EOVERFLOW)
        return
    here = os.open(folder.mount, os.O_RDONLY)
    try:
        fd = LIBC.open_by_handle_at(here, handle, os.O_RDONLY)
        assert fd >= 0 or ctypes.get_errno() in (errno.EPERM, errno.ESTALE, errno.EOPNOTSUPP)
        if fd >= 0:
            assert os.read(fd, 100) == b"content"
            os.close(fd)
    finally:
        os.close(here)


def test_statx_gives_every_basic_field(twins: Twins) -> None:
    """Also with what asks for more than there is: a birth time, or no waiting for the network (AT_STATX_DONT_SYNC)."""

    def call(place: Path) -> object:
        (place / "file").write_bytes(b"12345")
        found = []
        for flags in (0, 0x2000, 0x4000):  # as stat, force, do not wait
            buffer = ctypes.create_string_buffer(256)
            checked(LIBC.statx(AT_FDCWD, os.fsencode(place / "file"), flags, 0xFFF, buffer))
            mask, _, _, nlink, _, _, mode, _, _, size = struct.unpack_from("IIQIIIHHQQ", buffer.raw)
            found.append((mask & 0x7FF, nlink, oct(mode), size))
        return found

    twins.same(call)


# --- bytes ---------------------------------------------------------------------------------------------------------------


def test_splice_moves_bytes_from_a_pipe_and_back(twins: Twins) -> None:
    def call(place: Path) -> object:
        reader, writer = os.pipe()
        os.write(writer, b"through a pipe")
        fd = os.open(place / "file", os.O_RDWR | os.O_CREAT)
        moved = checked(LIBC.splice(reader, None, fd, None, 100, 0))
        os.lseek(fd, 0, os.SEEK_SET)
        back = checked(LIBC.splice(fd, None, writer, None, 100, 0))
        found = moved, back, os.read(reader, 100), (place / "file").read_bytes()
        for each in (reader, writer, fd):
            os.close(each)
        return found

    twins.same(call)


@pytest.mark.parametrize("size", [5 * 2**30 + 3, 2**40])
def test_places_far_behind_four_gibibytes_are_written_and_read(twins: Twins, size: int) -> None:
    def call(place: Path) -> object:
        with (place / "huge").open("w+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"far away", size)
            found: list[object] = [file.seek(0, os.SEEK_END) - size]
            found += [os.pread(file.fileno(), 20, at) for at in (size - 3, 2**32 - 2)]
            with mmap.mmap(file.fileno(), size % 4096 + 8, offset=size // 4096 * 4096) as view:
                found.append(view[size % 4096 : size % 4096 + 8])
            file.truncate(2**32 + 1)
            found.append((place / "huge").stat().st_size)
        (place / "huge").unlink()
        return found

    twins.same(call)


def test_a_limit_on_the_size_of_files_is_kept(twins: Twins) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    code = """if True:
        import os
        fd = os.open("file", os.O_RDWR | os.O_CREAT)
        for call, *rest in ((os.pwrite, bytes(20_000), 0), (os.pwrite, b"x", 10_000), (os.ftruncate, 10_001)):
            try: print(call(fd, *rest))
            except OSError as exc: print(exc.errno)
    """

    def call(place: Path) -> object:
        done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, preexec_fn=limited)
        return done.stdout, done.stderr, (place / "file").stat().st_size

    twins.same(call)


def test_holes_are_punched_or_refused_and_never_half_done(folder: Rig) -> None:
    """Programs that punch holes fall back to zeros on EOPNOTSUPP; fallocate(1) and qemu do."""
    path = folder.mount / "file"
    path.write_bytes(b"x" * 20_000)
    fd = os.open(path, os.O_RDWR)
    try:
        for mode in (0, 1, 2 | 1, 0x10, 0x10 | 1, 8, 0x20, 0x40):  # allocate, keep size, punch, zero, collapse, insert, unshare
            if LIBC.fallocate(fd, mode, ctypes.c_long(4096), ctypes.c_long(4096)) < 0:
                assert ctypes.get_errno() in (errno.EOPNOTSUPP, errno.EINVAL), (mode, ctypes.get_errno())
    finally:
        os.close(fd)

    assert path.read_bytes() == b"x" * 20_000
    done = subprocess.run(["fallocate", "-p", "-o", "4096", "-l", "4096", path], capture_output=True, text=True)
    assert done.returncode == 0 or "supported" in done.stderr
    subprocess.run(["fallocate", "-x", "-l", "30000", path], check=True)  # the posix way
    assert path.stat().st_size == 30_000


def test_writing_to_a_program_that_runs_is_refused_and_replacing_it_is_not(twins: Twins) -> None:
    def call(place: Path) -> object:
        shutil.copy(shutil.which("sleep") or "", place / "sleeper")
        running = subprocess.Popen([place / "sleeper", "60"], stdout=subprocess.DEVNULL)
        try:
            busy = said(lambda: os.close(os.open(place / "sleeper", os.O_WRONLY)))
            shutil.copy(shutil.which("true") or "", place / "next")
            (place / "next").rename(place / "sleeper")
            return busy, subprocess.run([place / "sleeper"]).returncode, running.poll()
        finally:
            running.kill()
            running.wait()

    twins.same(call)


def test_a_shared_library_is_loaded_from_the_mount(folder: Rig) -> None:
    """pip install --target and venvs end in dlopen: pages are mapped executable."""
    import zlib

    library = getattr(zlib, "__file__", None) or __import__("_ctypes").__file__
    shutil.copy(library, folder.mount / "library.so")

    code = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]) is not None)"
    done = subprocess.run([sys.executable, "-c", code, folder.mount / "library.so"], capture_output=True, text=True)

    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("engine", ["libaio", "io_uring", "pvsync2", "posixaio", "splice"])
def test_every_way_to_ask_the_kernel_finds_the_blocks_that_it_wrote(folder: Rig, engine: str) -> None:
    fio = shutil.which("fio")
    if fio is None:
        pytest.skip("fio is not installed")
    direct = ["--direct=1", "--bs=4k"] if engine in ("libaio", "io_uring") else ["--bsrange=1k-64k"]
    job = [
        fio, "--name=job", f"--directory={folder.mount}", f"--ioengine={engine}", "--size=2m", "--rw=randwrite",
        "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--iodepth=8", "--fallocate=none", "--randseed=3",
        "--thread", *direct,
    ]  # fmt: skip

    done = subprocess.run(job, capture_output=True, text=True, cwd="/tmp", timeout=100)

    lacking = ("not loadable", "not available", "Operation not permitted", "not implemented")
    if any(text in done.stdout + done.stderr for text in lacking):
        pytest.skip(f"fio or the kernel here has no {engine}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("seconds", [-2_000_000_000, -1, 0, 2**31 + 5, 2**32 + 5, 2**33])
def test_times_before_1970_and_after_2038_are_kept(twins: Twins, folder: Rig, seconds: int) -> None:
    def call(place: Path) -> object:
        for path in (place / "file", place / "directory"):
            path.mkdir() if path.name == "directory" else path.write_bytes(b"x")
            os.utime(path, ns=(seconds * 10**9 + 7, seconds * 10**9 + 999_999_999))
        return [(path.stat().st_atime_ns, path.stat().st_mtime_ns) for path in (place / "file", place / "directory")]

    found = twins.same(call).value
    folder.daemon.sync(folder.mount)
    folder.daemon.refresh(folder.mount)
    assert isinstance(found, list) and (folder.mount / "file").stat().st_mtime_ns == found[0][1]


def test_a_file_without_a_name_keeps_taking_everything(twins: Twins) -> None:
    def call(place: Path) -> object:
        with (place / "file").open("w+b", buffering=0) as file:
            fd = file.fileno()
            file.write(b"0123456789")
            (place / "file").unlink()
            os.fchmod(fd, 0o640)
            os.utime(fd, ns=(10**18, 10**18 + 5))
            os.ftruncate(fd, 5)
            os.setxattr(fd, "user.k", b"v")
            os.fchown(fd, os.getuid(), -1)
            os.fsync(fd)
            with mmap.mmap(fd, 5) as view:
                view[0:1] = b"X"
            found = os.fstat(fd)
            back = Path(f"/proc/self/fd/{fd}").read_bytes()
            linked = said(lambda: os.link(f"/proc/self/fd/{fd}", place / "back", follow_symlinks=True))
            return found.st_nlink, oct(found.st_mode), found.st_size, os.getxattr(fd, "user.k"), back, linked

    twins.same(call)


def test_a_set_group_bit_of_a_directory_is_inherited(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "shared").mkdir()
        (place / "shared").chmod(0o2775)
        (place / "shared" / "sub" / "deeper").mkdir(parents=True)
        (place / "shared" / "file").write_bytes(b"")
        return [oct((place / "shared" / name).stat().st_mode) for name in ("sub", "sub/deeper", "file")]

    twins.same(call)


def test_a_directory_is_locked_and_synced_like_a_file(twins: Twins) -> None:
    def call(place: Path) -> object:
        one, other = os.open(place, os.O_RDONLY), os.open(place, os.O_RDONLY)
        fcntl.flock(one, fcntl.LOCK_EX)
        held = said(lambda: fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB))
        os.close(one)
        free = said(lambda: fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB))
        os.fsync(other)
        os.close(other)
        return held, free

    twins.same(call)


# --- watching ------------------------------------------------------------------------------------------------------------

EVENTS = {
    0x2: "modify", 0x4: "attrib", 0x8: "close after writing", 0x20: "open", 0x40: "from", 0x80: "to", 0x100: "create",
    0x200: "delete", 0x10: "close",
}  # fmt: skip


def test_a_watch_tells_what_other_processes_do(twins: Twins) -> None:
    """inotify works among the processes of a container as on a local disk."""
    script = "echo 1 > a; echo 2 >> a; chmod 600 a; mv a b; ln b c; rm b; mkdir d; : > c; rm c; rmdir d; ln -s x l; rm l"

    def call(place: Path) -> object:
        fd = checked(LIBC.inotify_init1(os.O_NONBLOCK))
        checked(LIBC.inotify_add_watch(fd, os.fsencode(place), 0xFFF))
        subprocess.run(["sh", "-c", script], cwd=place, check=True)
        data = os.read(fd, 100_000)
        os.close(fd)
        events, at = [], 0
        while at < len(data):
            _, mask, _, length = struct.unpack_from("iIII", data, at)
            name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode()
            events.append((EVENTS.get(mask & 0xFFF, hex(mask)), name, bool(mask & 0x40000000)))
            at += 16 + length
        return events

    twins.same(call)


def test_a_lease_is_broken_by_who_opens_the_file_or_not_given(twins: Twins) -> None:
    """Samba asks for leases; where there are none it does without."""

    def call(place: Path) -> object:
        (place / "file").write_bytes(b"x")
        fd = os.open(place / "file", os.O_RDONLY)
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        finally:
            os.close(fd)
        return None

    call(twins.local)
    assert said(lambda: call(twins.mounted)) in (None, "EINVAL", "EAGAIN", "ENOLCK")


def test_an_ioctl_that_there_is_not_is_refused(twins: Twins) -> None:
    """lsattr, chattr, tar and cp ask for flags of the file; they go on when there are none."""
    path = twins.mounted / "file"
    path.write_bytes(b"x")
    with path.open("r+b") as file:
        assert said(lambda: fcntl.ioctl(file, 0x80086601, bytes(8))) in ("ENOTTY", "ENOSYS", "ENOTSUP")  # FS_IOC_GETFLAGS
        assert said(lambda: fcntl.ioctl(file, 0x5413, bytes(8))) == "ENOTTY"  # TIOCGWINSZ
        assert said(lambda: fcntl.ioctl(file, 0x40049409, file.fileno())) in ("ENOTSUP", "EINVAL", "ENOTTY", "EXDEV")  # FICLONE


# --- many at once --------------------------------------------------------------------------------------------------------


def test_a_tree_is_removed_while_others_list_and_fill_it(folder: Rig) -> None:
    """rm -rf, find and a writer at the same time: each ends, and afterwards rm -rf leaves nothing."""
    root = folder.mount / "tree"
    for number in range(100):
        directory = root / f"{number % 5}" / f"{number % 7}" / "deep" / "deeper"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{number}").write_bytes(b"x")
    filler = "i=0; while [ -d tree ] && [ $i -lt 500 ]; do i=$((i+1)); : > tree/$((i % 5))/new$i; done 2> /dev/null"
    find = "for i in 1 2 3; do find tree > /dev/null 2>&1; done"
    others = [subprocess.Popen(["sh", "-c", script], cwd=folder.mount) for script in (find, filler, find)]

    subprocess.run(["rm", "-rf", root], capture_output=True)  # "Directory not empty", if it was filled behind its back
    for other in others:
        other.wait(60)
    subprocess.run(["rm", "-rf", root], check=True)

    assert os.listdir(folder.mount) == []
    folder.daemon.sync(folder.mount)
    assert listed(folder.root) == []


def test_two_processes_never_both_make_one_name(folder: Rig) -> None:
    """O_EXCL, mkdir, link and symlink are what lock files are made of."""
    code = """if True:
        import os, sys
        won = 0
        for number in range(200):
            for call in (
                lambda: os.close(os.open(f"o{number}", os.O_CREAT | os.O_EXCL)), lambda: os.mkdir(f"m{number}"),
                lambda: os.link("source", f"l{number}"), lambda: os.symlink("x", f"s{number}"),
            ):
                try: call(); won += 1
                except FileExistsError: pass
        print(won)
    """
    (folder.mount / "source").touch()
    racers = [
        subprocess.Popen([sys.executable, "-c", code], cwd=folder.mount, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    won = [int(racer.communicate(timeout=100)[0]) for racer in racers]

    assert sum(won) == 800
    assert len(os.listdir(folder.mount)) == 801


def test_reading_a_directory_as_a_file_is_refused(twins: Twins) -> None:
    def call(place: Path) -> object:
        fd = os.open(place, os.O_RDONLY)
        found = [said(lambda: os.read(fd, 10)), said(lambda: os.pwrite(fd, b"x", 0)), said(lambda: os.ftruncate(fd, 0))]
        found.append(os.fsync(fd))
        found.append(said(lambda: os.truncate(place, 0)))
        found.append(said(lambda: os.open(place, os.O_WRONLY)))
        os.close(fd)
        return found

    twins.same(call)


def test_a_write_moves_the_time_at_once_also_through_a_map(twins: Twins) -> None:
    def call(place: Path) -> object:
        path = place / "file"
        path.write_bytes(bytes(4096))
        os.utime(path, ns=(10**18, 10**18))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            view[0] = 1
            view.flush()
        by_map = path.stat().st_mtime_ns > 10**18
        os.utime(path, ns=(10**18, 10**18))
        with path.open("r+b", buffering=0) as file:
            file.write(b"x")
            by_write = os.fstat(file.fileno()).st_mtime_ns > 10**18
        return by_map, by_write, time.time_ns() - path.stat().st_mtime_ns < 60 * 10**9

    twins.same(call)
