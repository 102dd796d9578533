"""What a mount must show after the operations of a manifest (crash_writer.py). It knows no daemon."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.mounted.crash_writer import DIRECTORIES, body

PAGE = 4096


@dataclass(frozen=True)
class Item:
    """A file, a directory or a symlink. What nobody can know is None."""

    kind: str
    data: bytes = b""
    target: str = ""
    mode: int | None = None
    mtime_ns: int | None = None


@dataclass
class Tree:
    """The expected tree, brought up to date with each line that is read."""

    manifest: Path
    items: dict[str, Item] = field(default_factory=dict)
    lines: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    _at: int = 0
    _pending: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.items = {directory.rstrip("/"): Item("directory") for directory in DIRECTORIES if directory}

    def read_on(self) -> None:
        """Takes in what was written to the manifest since the last call."""
        if not self.manifest.exists():
            return  # the writer has not come to its first operation
        with self.manifest.open("rb") as file:
            file.seek(self._at)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self._at += len(text)
        for raw in text.splitlines():
            self._take(json.loads(raw))

    def _take(self, line: dict[str, Any]) -> None:
        self.lines += 1
        if "op" in line:
            assert self._pending is None
            self._pending = line
        elif "done" in line:
            assert self._pending is not None
            self.items = self.after(self._pending)
            name = self._pending.get("target") if self._pending["op"] == "rename" else self._pending["name"]
            if line["stat"] is not None and self.items[str(name)].kind == "file":
                size, mode, mtime_ns = line["stat"]
                item = self.items[str(name)]
                assert size == len(item.data), f"{name}: {size} bytes instead of {len(item.data)}: {self._pending}"
                if item.mtime_ns is not None:
                    assert mtime_ns == item.mtime_ns, f"{name}: its mtime moved by itself: {self._pending}"
                self.items[str(name)] = replace(item, mode=mode, mtime_ns=mtime_ns)
            self._pending = None
        else:
            self.failures.append(line)

    def after(self, line: dict[str, Any]) -> dict[str, Item]:
        """The tree with one more operation done."""
        items, name, op = dict(self.items), str(line["name"]), line["op"]
        if op == "create":
            items[name] = Item("file")
        elif op == "mkdir":
            items[name] = Item("directory")
        elif op == "symlink":
            items[name] = Item("symlink", target=line["target"])
        elif op in ("unlink", "rmdir"):
            del items[name]
        elif op == "rename":
            items[line["target"]] = items.pop(name)
        else:
            items[name] = _changed(items[name], line)
        return items

    def differences(self, mount: Path, *, may_be_undecided: bool) -> list[str]:
        """Where the mount is not as it must be. An operation without an answer may or may not have happened; what is so
        then holds from now on. None may be without an answer unless `may_be_undecided`."""
        self.read_on()
        seen = look(mount)
        differences = compare(self.items, seen)
        if self._pending is not None:
            if not may_be_undecided:
                return [f"no answer to {self._pending}: {self.failures[-1:]}"]
            if differences:
                for other in self._outcomes(seen):
                    if not compare(other, seen):
                        self.items, differences = other, []
                        break
            name = str(self._pending.get("target") if self._pending["op"] == "rename" else self._pending["name"])
            if name in self.items and not differences:
                self.items[name] = replace(self.items[name], mode=seen[name].mode, mtime_ns=seen[name].mtime_ns)
            self._pending = None
        return differences


    def _outcomes(self, seen: dict[str, Item]) -> Iterator[dict[str, Item]]:
        """What the operation without an answer may have led to, beside nothing. The kernel may make two requests of a write
        that does not begin at a page: then only its beginning may be there."""
        assert self._pending is not None
        yield self.after(self._pending)
        if self._pending["op"] == "write" and self._pending["name"] in seen:
            written = len(seen[self._pending["name"]].data) // PAGE * PAGE - self._pending["offset"]
            for length in {written, PAGE - self._pending["offset"] % PAGE}:
                if 0 < length < self._pending["length"]:
                    yield self.after({**self._pending, "only": length})


def _changed(item: Item, line: dict[str, Any]) -> Item:
    if line["op"] == "write":
        offset, length = line["offset"], line["length"]
        data = bytearray(item.data)
        data.extend(bytes(max(0, offset - len(data))))
        written = body(line["n"], length)[: line.get("only", length)]
        data[offset : offset + len(written)] = written
        return replace(item, data=bytes(data), mtime_ns=None)
    if line["op"] == "truncate":
        return replace(item, data=item.data[: line["size"]].ljust(line["size"], b"\0"), mtime_ns=None)
    if line["op"] == "chmod":
        return replace(item, mode=line["mode"])
    assert line["op"] == "utime"
    return replace(item, mtime_ns=line["mtime_ns"])


def look(root: Path) -> dict[str, Item]:
    """All that is below `root`, as whoever serves it says it now: not from the kernel's pages."""
    found: dict[str, Item] = {}
    for directory, _, _ in os.walk(root):
        for entry in os.scandir(directory) if ".DAV" not in directory else ():
            if entry.name in (".DAV", ".sabredav"):  # Apache and sabre/dav keep properties there
                continue
            path = Path(entry.path)
            status = path.lstat()
            mode, mtime_ns = stat.S_IMODE(status.st_mode), status.st_mtime_ns
            name = str(path.relative_to(root))
            if stat.S_ISLNK(status.st_mode):
                found[name] = Item("symlink", target=str(path.readlink()))
            elif stat.S_ISDIR(status.st_mode):
                found[name] = Item("directory")
            else:
                with path.open("rb", buffering=0) as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    data = file.readall()
                found[name] = Item("file", data or b"", mode=mode, mtime_ns=mtime_ns)
    return found


def compare(expected: dict[str, Item], seen: dict[str, Item]) -> list[str]:
    differences = [f"{name} is gone" for name in sorted(expected.keys() - seen.keys())]
    differences += [f"{name} should not be there" for name in sorted(seen.keys() - expected.keys())]
    for name in sorted(expected.keys() & seen.keys()):
        item, other = expected[name], seen[name]
        if (item.kind, item.target) != (other.kind, other.target):
            differences.append(f"{name}: {other.kind} {other.target} instead of {item.kind} {item.target}")
        elif item.data != other.data:
            at = next((at for at, (a, b) in enumerate(zip(item.data, other.data, strict=False)) if a != b), "the end")
            differences.append(f"{name}: {len(other.data)} bytes instead of {len(item.data)}, other from {at} on")
        elif item.mode not in (None, other.mode):
            differences.append(f"{name}: mode {other.mode} instead of {item.mode}")
        elif item.mtime_ns not in (None, other.mtime_ns):
            differences.append(f"{name}: mtime {other.mtime_ns} instead of {item.mtime_ns}")
    return differences
