"""Spaces of EGI DataHub as directories: a mount over the double, all spaces and one, as programs see it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import pytest

from tests.mounted.harness import Daemon, daemon_over
from tests.mounted.kernel import eventually
from tests.servers.onedata_double import PARIS, DoubleOutside, OnedataDouble

LAG = float(os.environ.get("NBMOUNTD_TEST_LAG", "4"))
"""Seconds after which the other provider knows; 30 is what EGI's are allowed."""


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
    forest = {**common, "space": "Forest"}
    with daemon_over({"datahub": common, "forest": forest, "slow": {**forest, "freshness": 3600.0}}) as running:
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
    double.do("lag", seconds=0)  # with one the double copies a file that is changed
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


def test_scattered_reads_of_one_neighbourhood_share_their_requests(daemon: Daemon, double: OnedataDouble) -> None:
    mount, outside = daemon.path("forest"), DoubleOutside(double, "forest")
    content = os.urandom(4 * 2**20)
    outside.write("scattered", content)
    daemon.refresh(mount)
    double.do("clear")

    with (mount / "scattered").open("rb", buffering=0) as file:
        for number in range(300):
            start = number * 7919 * 4096 % (len(content) - 4096)
            assert os.pread(file.fileno(), 4096, start) == content[start : start + 4096]

    assert len([record for record in double.records() if "content" in record]) <= 4


def test_a_sparse_file_of_100_gib_is_listed_and_read_in_the_middle(daemon: Daemon, double: OnedataDouble) -> None:
    mount = daemon.path("forest")
    double.do("sparse", provider="prov-krakow", path="forest/huge", size=100 * 2**30)
    daemon.refresh(mount)
    double.do("clear")
    before = daemon.received("forest")

    with os.scandir(mount) as listed:
        sizes = {entry.name: entry.stat().st_size for entry in listed}
    with (mount / "huge").open("rb", buffering=0) as file:
        piece = os.pread(file.fileno(), 4096, 50 * 2**30)

    assert sizes["huge"] == 100 * 2**30
    assert piece == bytes(4096)
    assert daemon.received("forest") - before < 8 * 2**20


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


def test_the_directory_of_spaces_takes_nothing_and_spaces_stay(daemon: Daemon) -> None:
    mount = daemon.path("datahub")
    space = mount / "Ocean data"
    refused = []

    for act in (
        lambda: (mount / "new").mkdir(),
        lambda: (mount / "new").write_text("x"),
        lambda: (mount / "new").symlink_to("Forest"),
        lambda: space.rename(mount / "Sea data"),
        space.rmdir,
        lambda: space.chmod(0o700),
    ):
        with pytest.raises(OSError) as refusal:
            act()
        refused.append(refusal.value.errno)

    assert set(refused) <= {errno.EACCES, errno.EPERM}
    assert sorted(os.listdir(mount)) == ["Forest", "Ocean data"]
    assert daemon.status("datahub").unsent_files == 0


def test_a_move_into_another_space_is_exdev_so_mv_copies(daemon: Daemon, double: OnedataDouble, ocean: DoubleOutside) -> None:
    mount = daemon.path("datahub")
    (mount / "Ocean data" / "wave").mkdir()
    (mount / "Ocean data" / "wave" / "height").write_text("3 m")
    refused = []

    for act in (
        lambda: (mount / "Ocean data" / "wave").rename(mount / "Forest" / "wave"),
        lambda: (mount / "Ocean data" / "wave" / "height").rename(mount / "Forest" / "height"),
        lambda: (mount / "Forest" / "height").hardlink_to(mount / "Ocean data" / "wave" / "height"),
    ):
        with pytest.raises(OSError) as refusal:
            act()
        refused.append(refusal.value.errno)
    shutil.move(mount / "Ocean data" / "wave", mount / "Forest" / "wave")
    daemon.sync()

    assert refused == [errno.EXDEV] * 3
    assert DoubleOutside(double, "forest").read("wave/height") == b"3 m"
    assert "wave" not in ocean.listdir("")


def test_what_the_provider_tells_is_seen_long_before_the_freshness_time(
    daemon: Daemon, double: OnedataDouble, request: pytest.FixtureRequest
) -> None:
    if "21.02.3" in request.node.name:
        pytest.skip("providers of this generation tell of no changes")
    mount, outside = daemon.path("slow"), DoubleOutside(double, "forest")
    outside.mkdir("told")
    daemon.refresh(mount)
    assert os.listdir(mount / "told") == []
    eventually(lambda: double.do("streams") > 0, 30, "the provider is listened to")

    numbers = itertools.count()

    def is_seen() -> bool:
        """Until the first event there is none to go on from: what happens while a stream is opened is not told."""
        name = str(next(numbers))
        outside.write(f"told/{name}", b"new")
        with contextlib.suppress(AssertionError):
            return eventually(lambda: name in os.listdir(mount / "told"), 3, "the file is seen")
        return False

    eventually(is_seen, 60, "the first one is seen")
    for name in ("one", "two", "three"):
        outside.write(f"told/{name}", b"new")
        eventually((mount / "told" / name).exists, 60, "every later one is seen")


def test_what_another_provider_makes_known_late_is_seen_then_and_nothing_is_lost_meanwhile(
    daemon: Daemon, double: OnedataDouble
) -> None:
    mount, elsewhere = daemon.path("forest"), DoubleOutside(double, "forest", PARIS)
    (mount / "early.txt").write_text("known in Krakow")
    daemon.sync()
    double.do("lag", seconds=LAG)
    try:
        (mount / "early.txt").write_text("changed in Krakow")
        daemon.sync()
        elsewhere.write("late.txt", b"made in Paris")
        daemon.refresh(mount)
        before = sorted(os.listdir(mount))
        (mount / "late.txt").write_text("made here, too")
        daemon.sync()
        text = (mount / "early.txt").read_text()
    finally:
        double.do("lag", seconds=2)

    def both_are_there() -> bool:
        daemon.refresh(mount)
        return {entry.read_bytes() for entry in mount.glob("late*")} == {b"made in Paris", b"made here, too"}

    assert ("late.txt" in before, text) == (False, "changed in Krakow")
    eventually(both_are_there, 60, "both files of one name are shown")


@pytest.mark.expects_log("offline", "degraded", "not connected")
def test_a_provider_that_dies_and_comes_back_costs_no_byte(daemon: Daemon, double: OnedataDouble) -> None:
    mount, outside = daemon.path("forest"), DoubleOutside(double, "forest")
    (mount / "kept.txt").write_text("read while it is away")
    daemon.sync()
    for face in ("prov-krakow", "prov-paris"):
        double.do("down", face=face, down=True)
    try:
        (mount / "meanwhile.txt").write_text("written while it is away")
        kept = (mount / "kept.txt").read_text()
        daemon.wait_for_state("forest", "offline", within=60)
        names = os.listdir(mount)
    finally:
        for face in ("prov-krakow", "prov-paris"):
            double.do("down", face=face, down=False)
    daemon.wait_for_state("forest", "live", within=60)
    daemon.sync()

    assert kept == "read while it is away"
    assert {"kept.txt", "meanwhile.txt"} <= set(names)
    assert outside.read("meanwhile.txt") == b"written while it is away"


@pytest.mark.expects_log("degraded", "not connected", "upload", "HTTP 500")
def test_a_provider_that_breaks_only_some_requests_is_not_asked_again_and_again(daemon: Daemon, double: OnedataDouble) -> None:
    """It is degraded and live in turns: each turn tried at once what had just failed, fourteen times a second."""
    mount = daemon.path("forest")
    mount.stat()
    double.do("clear")
    double.fault("^(POST|PUT) .*(children|content)", "status", count=-1, status=500)
    try:
        (mount / "stubborn.txt").write_text("arrives in the end")
        eventually(lambda: [one for one in double.records() if one.endswith(" 500")] or None, 30, "a failed request")
        time.sleep(4)  # what is counted is how often it is tried in a time: 1,800 times, or after 0.7, 1.5 and 3 s
        failed = [one for one in double.records() if one.endswith(" 500")]
    finally:
        double.do("clear")
    daemon.sync()

    assert len(failed) <= 6, failed
    assert DoubleOutside(double, "forest").read("stubborn.txt") == b"arrives in the end"
