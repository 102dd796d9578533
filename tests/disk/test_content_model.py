"""The content store against a bytearray: every way in which bytes come, go, move and survive, in any order."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from contextlib import ExitStack
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nbmountd.disk.layers import Content, Layer
from tests.disk.rig import NOW, Rig
from tests.disk.small_disk import SmallDisk, small_disk

BLOCK = 128 * 2**10
SCALE = 50_000
"""Offsets are multiples of this plus a little, so that files of a few blocks are exercised at their edges."""
OFFSET = st.builds(lambda coarse, fine: coarse * SCALE + fine, st.integers(0, 8), st.integers(0, 3))
LENGTH = st.one_of(
    st.integers(1, 20), st.builds(lambda coarse, fine: coarse * SCALE + fine, st.integers(0, 4), st.integers(1, 3))
)


class Store(RuleBasedStateMachine):
    """One file with a base on a remote, and everything that may happen to it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.disk: SmallDisk | None = self.stack.enter_context(small_disk(32 * 2**20))
        self.home = self.disk.path if self.disk else Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.rig = Rig(self.home, journal_limit=2000, keep_open=1)
        self.base = b""
        self.local = bytearray()
        self.open: Content | None = None
        self.sending: tuple[Content, list[Layer], bytes] | None = None
        self.version = 0
        self.written = 0
        self.full = False

    def teardown(self) -> None:
        try:
            self.make_room()
            self.a_reader_sees_what_was_written()
            self.rig.abandon()
        finally:
            self.stack.close()

    @initialize(base=st.one_of(st.none(), st.integers(0, 4 * BLOCK)))
    def begin(self, base: int | None) -> None:
        if base is not None:
            self.base = os.urandom(base)
            self.local = bytearray(self.base)
        self.rig.new_file(base=None if base is None else self.base, version="0")
        self.rig.new_file("other", base=b"other")

    # -- a program ----------------------------------------------------------------------------------------------------

    @rule()
    def open_or_close(self) -> None:
        if self.open is None:
            self.open = self.rig.store.open(self.rig.node())
        else:
            self.rig.store.release(self.open)
            self.open = None

    @rule()
    def touch_another_file(self) -> None:
        """With room for one idle content, this unloads ours."""
        try:
            assert self.rig.read(self.rig.node("other"), b"other") == b"other"
        except OSError:
            assert self.full

    @rule(offset=OFFSET, length=LENGTH)
    def write(self, offset: int, length: int) -> None:
        self.written += 1
        data = bytes([self.written % 255 + 1]) * length
        try:
            self.rig.write(self.rig.node(), offset, data)
        except (OSError, sqlite3.OperationalError):
            assert self.full
            return
        self.local.extend(bytes(max(0, offset - len(self.local))))
        self.local[offset : offset + length] = data

    @rule(size=OFFSET)
    def truncate(self, size: int) -> None:
        try:
            self.rig.truncate(self.rig.node(), size)
        except (OSError, sqlite3.OperationalError):
            assert self.full
            return
        self.local.extend(bytes(max(0, size - len(self.local))))
        del self.local[size:]

    @rule(mtime=st.integers(0, 9))
    def set_mtime(self, mtime: int) -> None:
        node = self.rig.node()
        try:
            self.rig.store.touch(node, NOW + mtime)
            with self.rig.database.transaction() as change:
                change.update(node, mtime_ns=NOW + mtime)
        except (OSError, sqlite3.OperationalError):
            assert self.full
            return
        self.mtime = NOW + mtime

    @rule()
    def fsync(self) -> None:
        try:
            self.rig.fsync(self.rig.node())
        except OSError:
            assert self.full

    # -- the daemon ---------------------------------------------------------------------------------------------------

    @rule(start=OFFSET, length=LENGTH)
    def fetch(self, start: int, length: int) -> None:
        content = self.rig.store.open(self.rig.node())
        try:
            self.rig.fetch(content, self.base, start, start + length)
            data = content.read(start, length)
        except OSError:
            assert self.full
            return
        finally:
            self.rig.store.release(content)
        assert data == self.local[start : start + length]

    @rule()
    def evict(self) -> None:
        self.rig.store.evict(self.rig.node())

    @rule()
    def settle(self) -> None:
        try:
            self.rig.settle()
        except (OSError, sqlite3.OperationalError):
            assert self.full

    @rule()
    def save(self) -> None:
        self.rig.store.save_all_present()

    @precondition(lambda self: self.sending is None and self.rig.node().unsent)
    @rule()
    def upload_begins(self) -> None:
        content = self.rig.store.open(self.rig.node())
        self.sending = (content, self.rig.store.freeze(content), bytes(self.local))

    @precondition(lambda self: self.sending is not None)
    @rule()
    def upload_fails(self) -> None:
        assert self.sending is not None
        content = self.sending[0]
        self.rig.store.thaw(content)
        self.rig.store.release(content)
        self.sending = None

    @precondition(lambda self: self.sending is not None)
    @rule(died=st.booleans(), fetching=st.booleans(), writing=st.booleans())
    def upload_arrives(self, died: bool, fetching: bool, writing: bool) -> None:
        """`died`: between the transaction and what follows it. `fetching`, `writing`: somebody does meanwhile."""
        assert self.sending is not None
        content, layers, sent = self.sending
        store, node = self.rig.store, content.node
        try:
            self.rig.fetch(content, self.base, 0, len(sent), layers)
            assert b"".join(
                bytes(part.stop - part.start) if part.fd is None else os.pread(part.fd, part.stop - part.start, part.start)
                for part in content.readable(0, len(sent), layers)
            ) == sent, "what is sent is the snapshot"
        except OSError:
            assert self.full
        fill = None
        if fetching and self.base and not self.full:
            fill = store.fill(content, 0)
        try:
            with self.rig.database.transaction() as change:
                for layer in layers:
                    change.execute("DELETE FROM layers WHERE id = ?", (layer.id,))
                change.update(
                    node, base_parent=1, base_name="file", base_version=str(self.version + 1), base_size=len(sent),
                    unsent=len(content.layers) > len(layers), size=node.size, mtime_ns=node.mtime_ns,
                )  # fmt: skip
        except sqlite3.OperationalError:
            assert self.full
            if fill:
                fill.close()
            return
        self.version += 1
        self.sending = None
        if died:
            self.base = sent
            self.kill(reboot=False)
            if fill:
                fill.close()
            return
        absorption = store.begin_absorb(content, layers, size=len(sent))
        if writing:
            self.write(1, 3)
        absorption.copy()
        if fill:
            fill.write(memoryview(self.base))
        store.finish_absorb(absorption)
        if fill:
            fill.note()
            fill.close()
        store.thaw(content)
        self.base = sent
        store.release(content)

    # -- the machine --------------------------------------------------------------------------------------------------

    @rule(reboot=st.booleans())
    def kill(self, reboot: bool) -> None:
        """A SIGKILL; with `reboot` one of the machine, a while after the last write."""
        self.make_room()
        if reboot:
            for call in self.rig.store.settling(now=True):
                call()
        self.rig.kill(reboot=reboot)
        self.open = self.sending = None

    @rule()
    def restart(self) -> None:
        if self.open is not None:
            self.rig.store.release(self.open)
        if self.sending is not None:
            self.rig.store.release(self.sending[0])
        self.make_room()
        self.rig.restart()
        self.open = self.sending = None

    @rule(what=st.sampled_from(["deleted", "flipped", "cut"]))
    def cache_is_meddled_with_while_nobody_runs(self, what: str) -> None:
        self.kill(reboot=False)
        self.rig.abandon()
        self.rig.meddled = True
        if what == "deleted":
            shutil.rmtree(self.rig.cache_dir, ignore_errors=True)
        for path in self.rig.cache_dir.glob("base/*/*") if what != "deleted" else ():
            data = bytearray(path.read_bytes())
            if what == "cut":
                del data[len(data) // 2 :]
            for at in range(0, len(data), BLOCK // 3) if what == "flipped" else ():
                data[at] ^= 255
            path.write_bytes(data)
        self.rig._open()

    @precondition(lambda self: self.disk is not None and not self.full)
    @rule(leave=st.sampled_from([0, 4096, 60_000]))
    def disk_becomes_full(self, leave: int) -> None:
        assert self.disk is not None
        self.disk.fill(leave)
        self.full = True

    @rule()
    def make_room(self) -> None:
        if self.disk is not None:
            self.disk.free()
        self.full = False

    # -- what must always be so ---------------------------------------------------------------------------------------

    mtime: int | None = None

    @invariant()
    def size_and_counters_are_right(self) -> None:
        node = self.rig.database.child(1, "file")
        if node is None:
            return
        assert node.size == len(self.local)
        self.rig.check_counters()

    @rule()
    def a_reader_sees_what_was_written(self) -> None:
        if self.rig.database.child(1, "file") is None or self.full:
            return
        assert self.rig.read(self.rig.node(), self.base) == self.local


EXAMPLES = int(os.environ.get("EXAMPLES", "100"))

TestStore = Store.TestCase
TestStore.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
