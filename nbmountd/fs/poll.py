"""Freshness from versions that propagate: one question about the root tells whether anything below has changed.

Used where `capabilities.propagating_versions` says so (Nextcloud): there a directory's version changes with anything below
it. Of every directory that was listed we keep the version that was known before its listing began. As long as what we
hear of the directory is the same version, its listing is as good as the news, and the news is as good as that of its
parent, up to the root, which is asked for. After a change only the directories on the way to it are listed again.

A directory listed once costs nothing more however often it is looked at. It knows no backend and no kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import trio

from nbmountd.backends.base import Backend
from nbmountd.disk.database import Node
from nbmountd.errors import RemoteError
from nbmountd.fs.nodes import Nodes
from nbmountd.fs.refresh import SOFT_SHARE, Refresh
from nbmountd.model import ROOT_INODE, Place, Version


class PollingRefresh(Refresh):
    """`Refresh` that asks about the root before it lists anything again. Where versions do not propagate it is the same."""

    def __init__(self, nodes: Nodes, backend: Backend, *, freshness: float, deadline: float) -> None:
        super().__init__(nodes, backend, freshness=freshness, deadline=deadline)
        self._versions: dict[int, str] = {}
        """Directory -> the version that was known before its last listing began."""
        self._root_version: Version | None = None
        self._root_at = float("-inf")
        self._asking: trio.Event | None = None
        self.questions = 0
        """How often the root was asked about."""

    async def ensure_fresh(self, directory: Node) -> None:
        if self._may_be_known(directory) and not self._is_known(directory):
            try:
                with trio.fail_after(self._deadline):
                    await self._bring(directory)
            except (RemoteError, trio.TooSlowError):
                return  # it was listed once: that counts while the remote is away
        await super().ensure_fresh(directory)

    def forget(self, ino: int | None = None) -> None:
        if ino is None:
            self._versions.clear()
            self._root_at = float("-inf")
        else:
            self._versions.pop(ino, None)
        super().forget(ino)

    async def _list_once(self, directory: Node) -> bool:
        version, listed = self._heard(directory), self._listed_mark.get(directory.ino)
        mark = self._nodes.listing_begins()
        try:
            settled = await super()._list_once(directory)
            left_out = self._nodes.touched_since(directory.ino, mark)  # names that steps of ours were changing meanwhile
        finally:
            self._nodes.listing_ends(mark)
        if version and not left_out and self._listed_mark.get(directory.ino) != listed:
            self._versions[directory.ino] = version
        else:
            self._versions.pop(directory.ino, None)
        return settled

    def _is_worth_listing(self, directory: Node) -> bool:
        return super()._is_worth_listing(directory) and not self._may_be_known(directory)  # there a question is enough

    # --- what is known -----------------------------------------------------------------------------------------------

    def _heard(self, directory: Node) -> str | None:
        """The directory's version as we heard last; None or "" if we never did."""
        return self._root_version if directory.ino == ROOT_INODE else directory.base_version

    def _may_be_known(self, directory: Node) -> bool:
        return (
            self._nodes.capabilities.propagating_versions
            and directory.listed
            and not directory.local_only
            and directory.base_parent is not None
            and directory.ino in self._listed_at
        )

    def _is_known(self, directory: Node) -> bool:
        """Whether the listing is as good as one just made; notes it as such."""
        known = self._known_at(directory)
        if trio.current_time() - known >= self._freshness * SOFT_SHARE:
            return False
        self._listed_at[directory.ino] = known
        return True

    def _known_at(self, directory: Node) -> float:
        """The moment at which the directory was, for certain, as its nodes are."""
        latest = float("-inf")
        for each in self._ancestry(directory):
            latest = max(latest, self._listed_at.get(each.ino, float("-inf")))
            version = self._heard(each)
            if not version or self._versions.get(each.ino) != version:
                return latest
            if each.ino == ROOT_INODE:
                return max(latest, self._root_at)
        return latest

    def _ancestry(self, directory: Node) -> Iterator[Node]:
        """The directory, its parent on the remote, and so on to the root."""
        at: Node | None = directory
        while at is not None:
            yield at
            if at.ino == ROOT_INODE or at.base_parent is None:
                return
            at = self._nodes.database.get(at.base_parent)

    # --- asking ------------------------------------------------------------------------------------------------------

    async def _bring(self, directory: Node) -> None:
        """Makes the directory known: by the question alone, or by listing what is on the way to it and has changed."""
        if trio.current_time() - self._root_at >= self._freshness * SOFT_SHARE:
            await self._ask()
        for each in reversed(list(self._ancestry(directory))):
            if each.ino not in self._listed_at or not each.listed:
                break  # nothing is known of the way; the directory itself will do
            if not self._is_known(each):
                await self.list_now(each)
            if directory.base_parent is None:
                return  # it is gone, as the listing of a parent has told

    async def _ask(self) -> None:
        """What version the root has now. Callers at the same time share one question."""
        if self._asking is not None:
            await self._asking.wait()
            return
        self._asking = trio.Event()
        began = trio.current_time()
        try:
            self.questions += 1
            entry = await self._backend.stat(Place())
            self._root_version, self._root_at = entry.version, began
        finally:
            self._asking.set()
            self._asking = None
