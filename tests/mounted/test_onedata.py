"""Spaces of EGI DataHub as directories: a mount over the double, all spaces and one, as programs see it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest

from tests.mounted.harness import Daemon, daemon_over
from tests.servers.onedata_double import DoubleOutside, OnedataDouble


@pytest.fixture(scope="module", params=["25.0.1", "21.02.3"])
def double(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnedataDouble]:
    """Both generations; the other provider hears of changes after 2 s."""
    with OnedataDouble(tmp_path_factory.mktemp("onedata"), version=request.param) as server:
        assert isinstance(server, OnedataDouble)
        server.do("lag", seconds=2)
        server.add_space("ocean", "Ocean data")
        server.add_space("forest", "Forest")
        yield server


@pytest.fixture(scope="module")
def daemon(double: OnedataDouble, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    token = tmp_path_factory.mktemp("secrets") / "access_token"
    token.write_text("checkin-alice")
    token.chmod(0o644)
    token.parent.chmod(0o755)
    common = {
        "backend": "onedata", "onezone": double.zone_host, "oneprovider": double.krakow_host,
        "checkin_token_file": str(token), "ca_bundle": double.ca_bundle, "write_back_delay": 0.1,
    }  # fmt: skip
    with daemon_over({"datahub": common, "forest": {**common, "space": "Forest"}}) as running:
        yield running


@pytest.fixture
def ocean(double: OnedataDouble) -> DoubleOutside:
    return DoubleOutside(double, "ocean")


def test_spaces_are_directories_and_files_travel_both_ways(daemon: Daemon, ocean: DoubleOutside) -> None:
    ocean.mkdir("in")
    ocean.write("in/data.bin", b"from there")
    mount = daemon.path("datahub")
    daemon.refresh(mount)

    assert sorted(os.listdir(mount)) == ["Forest", "Ocean data"]
    assert (mount / "Ocean data" / "in" / "data.bin").read_bytes() == b"from there"
    (mount / "Ocean data" / "out").mkdir()
    (mount / "Ocean data" / "out" / "résumé #1?.txt").write_text("from here")
    daemon.sync()

    assert ocean.read("out/résumé #1?.txt") == b"from here"


def test_a_change_of_4_kib_in_a_large_file_sends_little(daemon: Daemon, double: OnedataDouble) -> None:
    double.do("sparse", provider="prov-krakow", path="forest/large", size=2**30)
    mount = daemon.path("forest")
    daemon.refresh(mount)
    double.do("clear")

    with (mount / "large").open("r+b") as file:
        file.seek(2**29)
        file.write(b"x" * 4096)
    daemon.sync()

    sent = sum(record["received"] for record in double.do("records") if "content" in record["target"])
    assert sent <= 2**20
    assert double.do("stat", provider="prov-krakow", path="forest/large")["size"] == 2**30


def test_hdf5_is_written_and_read(daemon: Daemon, double: OnedataDouble) -> None:
    mount = daemon.path("forest")

    with h5py.File(mount / "trees.h5", "w") as file:
        file["heights"] = list(range(1000))
    daemon.sync()
    with h5py.File(mount / "trees.h5", "a") as file:
        file["heights"][10] = -1
    daemon.sync()
    copy = Path(double.work) / "copy.h5"
    copy.write_bytes(DoubleOutside(double, "forest").read("trees.h5"))

    with h5py.File(copy, "r") as file:
        assert list(file["heights"][8:12]) == [8, 9, -1, 11]


def test_an_editor_that_renames_over_the_file_replaces_it_once(daemon: Daemon, double: OnedataDouble) -> None:
    mount, outside = daemon.path("forest"), DoubleOutside(double, "forest")
    (mount / "notes.txt").write_text("first")
    daemon.sync()

    (mount / ".notes.tmp").write_text("second version")
    (mount / ".notes.tmp").replace(mount / "notes.txt")
    daemon.sync()

    assert outside.read("notes.txt") == b"second version"
    assert not [name for name in outside.listdir("") if name.startswith(".n")]


def test_names_links_and_attributes_come_back(
    daemon: Daemon, double: OnedataDouble, request: pytest.FixtureRequest
) -> None:
    """An older provider does not say which files have attributes; there they are kept here only."""
    mount, outside = daemon.path("forest"), DoubleOutside(double, "forest")
    (mount / "a").mkdir()
    (mount / "a" / "file").write_text("x")
    os.setxattr(mount / "a" / "file", "user.colour", b"green")
    (mount / "a" / "file").chmod(0o640)
    (mount / "link").symlink_to("a/file")
    daemon.sync()
    (mount / "a").rename(mount / "b")
    daemon.sync()

    told = outside.stat("b/file")
    older = "21.02.3" in request.node.name
    assert (told["mode"], told["xattrs"]) == (0o640, {} if older else {"colour": "green"})
    assert os.getxattr(mount / "b" / "file", "user.colour") == b"green"
    assert outside.stat("link")["target"] == "a/file"
