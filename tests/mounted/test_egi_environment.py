"""The environment of an EGI notebook, without any configuration file, gives the four folders that its users know."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.mounted.harness import program
from tests.servers.d4science_double import D4ScienceServer
from tests.servers.fake_nextcloud import FakeNextcloud
from tests.servers.onedata_double import DoubleOutside, OnedataDouble

SCRIPT = """
set -e
cat datahub/*/from-there.txt b2drop/from-there.txt workspace/from-there.txt datasets/from-there.txt
for place in datahub/* b2drop workspace; do echo result > "$place/result.txt"; done
if echo x > datasets/x 2>/dev/null; then echo datasets can be written to; fi
env | grep -E 'WEBDAV_PWD|TOKEN' || true
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount the volume read-only, as the hub does")
def test_the_environment_alone_gives_the_four_folders(tmp_path: Path) -> None:
    home, datasets, secrets = tmp_path / "home", tmp_path / "volume", tmp_path / "secrets"
    for directory in (home, datasets, secrets, tmp_path / "run"):
        directory.mkdir(mode=0o700)
    (datasets / "from-there.txt").write_text("datasets\n")
    subprocess.run(["mount", "--bind", "-o", "ro", datasets, datasets], check=True)  # the hub mounts it read-only
    (secrets / "access_token").write_text("checkin-alice")
    try:
        with (
            FakeNextcloud(tmp_path / "b2drop", tmp_path / "b2drop-work", password="pass word") as nextcloud,
            OnedataDouble(tmp_path / "onedata") as onedata,
            D4ScienceServer(tmp_path / "storagehub") as storagehub,
        ):
            assert isinstance(onedata, OnedataDouble)
            onedata.add_space("ocean", "Ocean")
            ocean, user = DoubleOutside(onedata, "ocean"), storagehub.new_user()
            ocean.write("from-there.txt", b"datahub\n")
            user.write("from-there.txt", b"workspace\n")
            (nextcloud.root / "from-there.txt").write_text("b2drop\n")
            environment = {
                "PATH": os.environ["PATH"], "HOME": str(home), "XDG_RUNTIME_DIR": str(tmp_path / "run"),
                "SSL_CERT_FILE": onedata.ca_bundle,
                # what the hub sets
                "ONEZONE_URL": f"https://{onedata.zone_host}", "ONEPROVIDER_HOST": onedata.krakow_host,
                "SECRETS_MOUNT_PATH": str(secrets),
                "WEBDAV_URL": f"{nextcloud.origin}/remote.php/webdav", "WEBDAV_USER": nextcloud.user, "WEBDAV_PWD": "pass word",
                "D4SCIENCE_TOKEN": user.token, "D4SCIENCE_CONTEXT": "/d4science.research-infrastructures.eu/D4Research/Lab",
                # what an operator adds
                "NBMOUNTD_DATASETS": str(datasets), "D4SCIENCE_WORKSPACE_URL": storagehub.url,
            }  # fmt: skip

            done = subprocess.run(
                [*program("nbmountd"), "exec", "--", "sh", "-c", SCRIPT], cwd=home, env=environment, capture_output=True,
                text=True, timeout=120, check=False,
            )  # fmt: skip

            assert done.returncode == 0, done.stderr
            assert done.stdout.split() == ["datahub", "b2drop", "workspace", "datasets"], done.stderr
            assert ocean.read("result.txt") == b"result\n"
            assert (nextcloud.root / "result.txt").read_text() == "result\n"
            assert user.read("result.txt") == b"result\n"
            assert "checkin-alice" not in done.stderr and "pass word" not in done.stderr and user.token not in done.stderr
    finally:
        subprocess.run(["umount", "-l", datasets], check=True)


def test_secrets_may_be_in_files_that_the_environment_names(tmp_path: Path) -> None:
    """So that they are in no process's environment at all."""
    (tmp_path / "home").mkdir()
    (tmp_path / "run").mkdir(mode=0o700)
    password = tmp_path / "password"
    password.write_text("pass word\n")
    with FakeNextcloud(tmp_path / "b2drop", tmp_path / "b2drop-work", password="pass word") as nextcloud:
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "XDG_RUNTIME_DIR": str(tmp_path / "run"),
            "WEBDAV_URL": nextcloud.url, "WEBDAV_USER": nextcloud.user, "WEBDAV_PWD_FILE": str(password),
        }  # fmt: skip

        done = subprocess.run(
            [*program("nbmountd"), "exec", "--", "sh", "-c", "echo result > b2drop/result.txt"], cwd=tmp_path / "home",
            env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

        assert done.returncode == 0, done.stderr
        assert (nextcloud.root / "result.txt").read_text() == "result\n"
