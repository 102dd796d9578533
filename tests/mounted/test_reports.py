"""What the daemon tells others of itself: metrics for Prometheus, and in status that a token ends soon."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.mounted.conftest import directory_mount
from tests.mounted.harness import daemon_over
from tests.mounted.kernel import eventually
from tests.servers.d4science_double import D4ScienceServer
from tests.servers.process import free_port


def test_metrics_of_all_mounts_are_there_by_command_and_over_http(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.txt").write_text("content")
    address = f"127.0.0.1:{free_port()}"
    mounts = {name: directory_mount(tmp_path / name) for name in ("one", "two")}
    with daemon_over(mounts, metrics_listen=address) as daemon:
        assert (daemon.path("one") / "file.txt").read_text() == "content"

        by_command = daemon.ctl("metrics").stdout
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
            over_http = answer.read().decode()

        for text in (by_command, over_http):
            samples = {
                (sample.name, *sorted(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
            assert text.count("# TYPE nbmountd_unsent_bytes ") == 1
            assert samples["nbmountd_unsent_bytes", ("mount", "two")] == 0
            assert samples["nbmountd_state", ("backend", "directory"), ("mount", "one"), ("state", "live")] == 1
            assert samples["nbmountd_fuse_requests_total", ("mount", "one"), ("operation", "lookup")] >= 1
            assert samples["nbmountd_remote_calls_total", ("mount", "one"), ("verb", "list")] >= 1


def issue(server: D4ScienceServer, user: str, seconds: float) -> str:
    """Another token of the user's, which ends in that time."""
    token = json.loads(server.call("token", user=user, seconds=seconds))
    assert isinstance(token, str)
    return token


@pytest.mark.expects_log("expires in 10 min")
def test_status_warns_before_a_token_ends_and_no_longer_when_there_is_another(tmp_path: Path) -> None:
    with D4ScienceServer(tmp_path / "server") as server:
        user = server.new_user()
        token = tmp_path / "token"
        token.write_text(issue(server, user.name, 10 * 60))
        with daemon_over({"workspace": {"backend": "d4science", "url": server.url, "token_file": str(token)}}) as daemon:
            daemon.wait_for_state("workspace", "live")

            warning = eventually(lambda: daemon.status("workspace").token_warning, 20, "a warning")
            shown = daemon.ctl("status").stdout
            token.write_text(issue(server, user.name, 3600))
            daemon.refresh()

            assert "expires in 10 min" in warning and str(token) in warning
            assert warning in shown
            assert daemon.status("workspace").token_warning == ""
