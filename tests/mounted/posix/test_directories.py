"""Directories: what names may be, and lists that stay true while names come and go."""

from __future__ import annotations

import ctypes
import os
import re
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mounted.conftest import Rig
from tests.mounted.kernel import eventually, listed
from tests.mounted.posix.twins import Twins

libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long
libc.telldir.argtypes = libc.readdir.argtypes = libc.closedir.argtypes = libc.rewinddir.argtypes = (ctypes.c_void_p,)
libc.seekdir.argtypes = (ctypes.c_void_p, ctypes.c_long)
NAME_AT = 19
"""Where d_name begins in struct dirent on 64-bit Linux."""


class Stream:
    """A DIR of the C library: readdir, telldir, seekdir, rewinddir."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def next(self) -> str | None:
        entry = libc.readdir(self.pointer)
        return None if entry is None else os.fsdecode(ctypes.string_at(entry + NAME_AT))

    def rest(self) -> list[str]:
        found = []
        while (name := self.next()) is not None:
            found.append(name)
        return found

    def tell(self) -> int:
        return int(libc.telldir(self.pointer))

    def seek(self, position: int) -> None:
        libc.seekdir(self.pointer, position)

    def rewind(self) -> None:
        libc.rewinddir(self.pointer)


@contextmanager
def stream(path: Path) -> Iterator[Stream]:
    pointer = libc.opendir(os.fsencode(path))
    assert pointer is not None
    try:
        yield Stream(pointer)
    finally:
        libc.closedir(pointer)


def fill(place: Path, count: int) -> set[str]:
    names = {f"entry-{number:04}" for number in range(count)}
    for name in names:
        (place / name).touch()
    return names


def test_a_place_in_a_directory_is_come_back_to(folder: Rig) -> None:
    names = fill(folder.mount, 300)
    with stream(folder.mount) as entries:
        first = [entries.next() for _ in range(100)]
        place = entries.tell()
        rest = entries.rest()

        entries.seek(place)

        assert entries.rest() == rest
        assert {*first, *rest} - {".", ".."} == names


def test_every_place_of_a_directory_leads_on_to_the_same_name(folder: Rig) -> None:
    fill(folder.mount, 60)
    with stream(folder.mount) as entries:
        places = []
        while True:
            place = entries.tell()
            name = entries.next()
            if name is None:
                break
            places.append((place, name))

        for place, name in reversed(places):
            entries.seek(place)
            assert entries.next() == name


def test_entries_that_stay_are_listed_once_while_others_come_and_go(folder: Rig) -> None:
    names = fill(folder.mount, 1500)
    staying = {name for name in names if int(name[-4:]) % 3}
    stop = threading.Event()

    def disturb() -> None:
        number = 0
        while not stop.is_set():
            (folder.mount / f"entry-{number % 500 * 3:04}").unlink(missing_ok=True)
            (folder.mount / f"new-{number}").touch()
            number += 1

    other = threading.Thread(target=disturb)
    other.start()
    try:
        for _ in range(3):
            with stream(folder.mount) as entries:
                listed = entries.rest()
            assert sorted(name for name in listed if name in staying) == sorted(staying)
            assert len(listed) == len(set(listed))
    finally:
        stop.set()
        other.join()


def test_removing_while_listing_leaves_nothing(folder: Rig) -> None:
    """What rm -r and shutil.rmtree do."""
    fill(folder.mount, 1500)

    with os.scandir(folder.mount) as entries:
        for entry in entries:
            os.unlink(entry.path)

    assert os.listdir(folder.mount) == []


def test_a_rewound_stream_sees_what_is_new(folder: Rig) -> None:
    fill(folder.mount, 10)
    with stream(folder.mount) as entries:
        before = entries.rest()
        (folder.mount / "new").touch()
        (folder.mount / "entry-0003").unlink()

        entries.rewind()

        assert set(entries.rest()) == {*before, "new"} - {"entry-0003"}


def test_two_streams_of_one_directory_do_not_disturb_each_other(folder: Rig) -> None:
    names = fill(folder.mount, 1500)
    with stream(folder.mount) as one, stream(folder.mount) as other:
        left = [one.next() for _ in range(10)]
        right = other.rest()
        left += one.rest()

    assert set(left) == set(right) == {*names, ".", ".."}


def test_a_stream_goes_on_after_another_was_closed_and_names_changed(folder: Rig) -> None:
    names = fill(folder.mount, 1500)
    with stream(folder.mount) as slow:
        seen = [slow.next() for _ in range(10)]
        with stream(folder.mount) as quick:
            quick.rest()
        for name in sorted(names)[1000:1100]:
            (folder.mount / name).unlink()
        seen += slow.rest()

    assert set(seen) >= names - set(sorted(names)[1000:1100])
    assert len(seen) == len(set(seen))


def test_list_kinds_agree_with_stat(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "file").touch()
        (place / "directory").mkdir()
        (place / "link").symlink_to("directory")
        os.mkfifo(place / "fifo")
        return sorted(
            (entry.name, entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False), entry.is_symlink(),
             entry.inode() == entry.stat(follow_symlinks=False).st_ino)
            for entry in os.scandir(place)
        )  # fmt: skip

    twins.same(call)


def test_dot_and_dot_dot_are_there(twins: Twins) -> None:
    def call(place: Path) -> object:
        (place / "sub").mkdir()
        same = os.path.samefile(place, place / "sub" / ".."), os.path.samefile(place / "sub", place / "sub" / ".")
        with stream(place / "sub") as entries:
            return same, sorted(entries.rest())

    twins.same(call)


LONGEST = 250 if os.environ.get("NBMOUNTD_TEST_REMOTE") == "nextcloud" else 255
"""Bytes; Nextcloud takes no longer ones, and they are refused when they are made (test_nextcloud.py)."""


def every_byte() -> list[bytes]:
    """Names that together hold every byte but / and NUL. Where bytes that are no text are escaped, each takes 8 of LONGEST."""
    allowed = bytes(byte for byte in range(1, 256) if byte != ord("/"))
    return [b"at " + allowed[start : start + 28] + b" end" for start in range(0, len(allowed), 28)]


def test_a_name_may_hold_every_byte_but_slash_and_nul(twins: Twins) -> None:
    def call(place: Path) -> object:
        for number, name in enumerate(every_byte()):
            (place / os.fsdecode(name)).write_bytes(b"%d" % number)
        found = sorted(os.listdir(os.fsencode(place)))
        return found, [(place / os.fsdecode(name)).read_bytes() for name in found]

    twins.same(call)


@pytest.mark.parametrize("length", [LONGEST - 1, LONGEST, 256, 300])
@pytest.mark.parametrize("letter", ["x", "é", "文"])
def test_a_name_of_255_bytes_is_the_longest(twins: Twins, letter: str, length: int) -> None:
    name = letter * (length // len(letter.encode())) + "x" * (length % len(letter.encode()))

    def call(place: Path) -> object:
        (place / name).write_bytes(b"x")
        (place / name).rename(place / (name[:-1] + "y"))
        (place / "d").mkdir()
        (place / (name[:-1] + "y")).rename(place / "d" / name)
        return os.listdir(place / "d")

    twins.same(call)


@pytest.mark.parametrize("call", ["mkdir", "symlink", "mkfifo", "rename", "stat", "link"])
def test_a_name_that_is_too_long_is_refused_by_every_call(twins: Twins, call: str) -> None:
    def use(place: Path) -> object:
        (place / "file").touch()
        long = place / ("x" * 256)
        match call:
            case "mkdir":
                long.mkdir()
            case "symlink":
                long.symlink_to("x")
            case "mkfifo":
                os.mkfifo(long)
            case "rename":
                (place / "file").rename(long)
            case "link":
                os.link(place / "file", long)
            case _:
                long.stat()
        return None

    assert twins.same(use).error == "ENAMETOOLONG"


def test_both_ways_to_write_an_accent_are_two_names(twins: Twins) -> None:
    def call(place: Path) -> object:
        names = {form: unicodedata.normalize(form, "Å é ﬁ 각") for form in ("NFC", "NFD", "NFKC", "NFKD")}
        for form, name in names.items():
            (place / name).write_text(form)
        return sorted(os.listdir(place)), [(place / name).read_text() for name in names.values()]

    twins.same(call)


def test_capital_and_small_letters_are_two_names(twins: Twins) -> None:
    def call(place: Path) -> object:
        for name in ("name", "Name", "NAME"):
            (place / name).write_text(name)
        return sorted(os.listdir(place)), (place / "Name").read_text()

    twins.same(call)


ODD_NAMES = (
    "..x", "...", " leading", "trailing ", "trailing.", "a:b", "a\\b", 'a*?<>|"b', "%2e%2e", "%", "~", "-rf", "#x", "a\nb",
    "a\tb", "CON", "nul.txt", "e\u0301", "\u202eexe", "x&y;z=1", "[a]", "{a}", "$HOME", "`id`", "a'b", "\x01\x7f",
)  # fmt: skip


REFUSED_BY = dict.fromkeys(("lighttpd", "wsgidav", "sabre", "rclone"), r".*[\x00-\x1f\x7f]")
"""Names that a server does not take or takes for another one (backends/test_webdav_quirks.py): they are not sent."""


@pytest.mark.expects_log('"parked"')
@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_arrive_and_come_back(folder: Rig, name: str) -> None:
    refused = re.match(REFUSED_BY.get(folder.name, "(?!)"), name) is not None
    (folder.mount / name).mkdir()
    (folder.mount / name / name).write_text(name)

    if refused:
        parked = eventually(lambda: folder.status.parked, 60, "the name is parked")
    else:
        folder.daemon.sync(folder.mount)
    folder.daemon.refresh(folder.mount)

    assert os.listdir(folder.mount) == [name]
    assert (folder.mount / name / name).read_text() == name
    if refused:  # nothing of it on the server, nothing lost here, and it can be renamed to what is taken
        assert listed(folder.root) == []
        (folder.mount / name / name).rename(folder.mount / name / "plain")
        (folder.mount / name).rename(folder.mount / "plain")
        folder.daemon.sync(folder.mount)
        assert (folder.root / "plain" / "plain").read_text() == name
        assert folder.status.parked < parked
    assert folder.status.parked == 0


def test_odd_names_that_are_not_text_are_kept_whatever_the_server_thinks(folder: Rig) -> None:
    for number, name in enumerate(every_byte()):
        (folder.mount / os.fsdecode(name)).write_bytes(b"%d" % number)

    folder.daemon.refresh(folder.mount)

    assert sorted(os.listdir(os.fsencode(folder.mount))) == sorted(every_byte())


def test_an_empty_name_and_the_dots_cannot_be_made_or_removed(twins: Twins) -> None:
    def removed(place: Path) -> object:
        (place / "sub").mkdir()
        os.rmdir(f"{place}/sub/.")
        return None

    def above(place: Path) -> object:
        (place / "above" / "below").mkdir(parents=True)
        os.rmdir(f"{place}/above/below/..")
        return None

    assert twins.same(lambda place: os.mkdir(f"{place}/.")).error == "EEXIST"
    assert twins.same(removed).error == "EINVAL"
    assert twins.same(above).error == "ENOTEMPTY"
    assert twins.same(lambda place: os.mkdir("")).error == "ENOENT"


def test_unlink_and_rmdir_know_what_is_theirs(twins: Twins) -> None:
    def unlink_directory(place: Path) -> object:
        (place / "d").mkdir()
        os.unlink(place / "d")
        return None

    def rmdir_file(place: Path) -> object:
        (place / "f").touch()
        os.rmdir(place / "f")
        return None

    def rmdir_full(place: Path) -> object:
        (place / "full" / "below").mkdir(parents=True)
        os.rmdir(place / "full")
        return None

    assert twins.same(unlink_directory).error == "EISDIR"
    assert twins.same(rmdir_file).error == "ENOTDIR"
    assert twins.same(rmdir_full).error == "ENOTEMPTY"
    assert twins.same(lambda place: os.rmdir(place / "none")).error == "ENOENT"


def test_a_path_as_deep_as_the_kernel_allows_is_walked(folder: Rig) -> None:
    here = os.open(folder.mount, os.O_RDONLY)
    for _ in range(60):
        os.mkdir("deep", dir_fd=here)
        below = os.open("deep", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    fd = os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here)
    os.write(fd, b"at the bottom")
    os.close(fd)
    os.close(here)

    folder.daemon.sync(folder.mount)

    path = "/".join(["deep"] * 60) + "/file"
    assert (folder.mount / path).read_bytes() == (folder.root / path).read_bytes() == b"at the bottom"
