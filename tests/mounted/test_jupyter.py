"""JupyterLab's own contents manager works on a mount, and finds nothing changed behind its back.

The manager is the one that jupyter_server starts by default, with its checkpoints; it runs in this process.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import nbformat
import pytest
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

from tests.mounted.conftest import Rig
from tests.mounted.kernel import listed

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


@pytest.fixture
def folder(apache: Rig, request: pytest.FixtureRequest) -> Rig:
    name = request.node.originalname
    (apache.mount / name).mkdir()
    return apache.below(name)


@pytest.fixture
def contents(folder: Rig) -> Any:
    """The manager; jupyter_server has no types, so this is where `Any` comes from."""
    return AsyncLargeFileManager(root_dir=str(folder.mount), delete_to_trash=False)


def notebook(text: str) -> dict[str, Any]:
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("1 + 1")]
    return {"type": "notebook", "format": "json", "content": nbformat.v4.new_notebook(cells=cells)}


def source_of(path: Path) -> str:
    return str(nbformat.read(path, as_version=4).cells[0].source)


def test_a_notebook_is_saved_listed_opened_renamed_and_deleted(contents: Any, folder: Rig) -> None:
    run(contents.save(notebook("first"), "work.ipynb"))
    run(contents.save(notebook("second"), "work.ipynb"))
    listed = run(contents.get("", content=True))["content"]
    opened = run(contents.get("work.ipynb", content=True))["content"]
    run(contents.rename("work.ipynb", "renamed.ipynb"))
    folder.daemon.sync(folder.mount)
    on_the_server = source_of(folder.root / "renamed.ipynb")
    run(contents.delete("renamed.ipynb"))
    folder.daemon.sync(folder.mount)

    assert [(entry["name"], entry["type"]) for entry in listed] == [("work.ipynb", "notebook")]
    assert opened["cells"][0]["source"] == "second"
    assert on_the_server == "second"
    assert not list(folder.root.glob("*.ipynb"))


def test_last_modified_and_hash_do_not_change_after_the_upload(contents: Any, folder: Rig) -> None:
    """The server stamps a time of its own; JupyterLab would ask the user whether to overwrite, and real-time editing
    compares for exact equality."""
    run(contents.save(notebook("mine"), "work.ipynb"))
    before = run(contents.get("work.ipynb", content=False, require_hash=True))

    folder.daemon.sync(folder.mount)
    uploaded = run(contents.get("work.ipynb", content=False, require_hash=True))
    folder.daemon.refresh(folder.mount)
    looked_again = run(contents.get("work.ipynb", content=False, require_hash=True))

    assert source_of(folder.root / "work.ipynb") == "mine"
    for model in (uploaded, looked_again):
        assert (model["last_modified"], model["hash"]) == (before["last_modified"], before["hash"])


def test_checkpoints_are_made_restored_and_deleted(contents: Any, folder: Rig) -> None:
    run(contents.save(notebook("good"), "work.ipynb"))
    checkpoint = run(contents.create_checkpoint("work.ipynb"))
    run(contents.save(notebook("spoiled"), "work.ipynb"))

    listed = run(contents.list_checkpoints("work.ipynb"))
    run(contents.restore_checkpoint(checkpoint["id"], "work.ipynb"))
    restored = run(contents.get("work.ipynb", content=True))["content"]["cells"][0]["source"]
    run(contents.delete_checkpoint(checkpoint["id"], "work.ipynb"))
    folder.daemon.sync(folder.mount)

    assert [entry["id"] for entry in listed] == [checkpoint["id"]]
    assert restored == "good"
    assert source_of(folder.root / "work.ipynb") == "good"


def test_checkpoints_and_intermediate_files_stay_here(contents: Any, folder: Rig) -> None:
    run(contents.save(notebook("one"), "work.ipynb"))
    run(contents.create_checkpoint("work.ipynb"))
    run(contents.save(notebook("two"), "work.ipynb"))

    folder.daemon.sync(folder.mount)

    assert listed(folder.root) == ["work.ipynb"]
    assert (folder.mount / ".ipynb_checkpoints").is_dir()


def test_a_large_upload_from_the_browser_arrives_whole(contents: Any, folder: Rig) -> None:
    """The browser sends chunks of 1 MiB; each is opened for appending, written and closed."""
    part = bytes(range(256)) * 4096
    for number in (1, 2, 3, 4, -1):
        chunk = {"type": "file", "format": "base64", "content": base64.b64encode(part).decode(), "chunk": number}
        run(contents.save(chunk, "upload.bin"))
    folder.daemon.sync(folder.mount)

    assert (folder.root / "upload.bin").read_bytes() == part * 5


def test_a_folder_with_notebooks_is_deleted(contents: Any, folder: Rig) -> None:
    run(contents.save({"type": "directory"}, "project"))
    run(contents.save(notebook("inside"), "project/work.ipynb"))
    run(contents.create_checkpoint("project/work.ipynb"))
    folder.daemon.sync(folder.mount)

    run(contents.delete("project/work.ipynb"))
    run(contents.delete("project"))
    folder.daemon.sync(folder.mount)

    assert not (folder.mount / "project").exists()
    assert listed(folder.root) == []
