"""Metrics: what a strict reader of Prometheus' text format finds in them, and the listener that gives them away."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from nbmountd import exporter
from nbmountd.control.schema import Calls, MountStatus, StatusReply
from nbmountd.metrics import exposition
from nbmountd.units import parse_address


def status() -> StatusReply:
    busy = MountStatus(
        name="b2drop", path="/home/ada/b2drop", backend="nextcloud", state="live", unsent_files=2, unsent_bytes=2048,
        quota_used=5, quota_available=None, requests={"lookup": 7, "read": 1}, restarts=3, token_warning="ends in 3 min",
        calls={"upload": Calls(count=4, errors=1, retries=2, seconds=1.25)},
    )  # fmt: skip
    idle = MountStatus(name="datahub", path="/home/ada/datahub", backend="onedata", state="unauthenticated", reason="no token")
    return StatusReply(version="1.2.3", pid=1, safe=False, mounts=(busy, idle))


def sample(text: str, name: str, **labels: str) -> float:
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, (name, labels, found)
    return float(found[0])


def test_prometheus_reads_what_status_says() -> None:
    text = exposition(status())

    assert sample(text, "nbmountd_unsent_bytes", mount="b2drop") == 2048
    assert sample(text, "nbmountd_quota_used_bytes", mount="b2drop") == 5
    assert sample(text, "nbmountd_worker_restarts_total", mount="b2drop") == 3
    assert sample(text, "nbmountd_fuse_requests_total", mount="b2drop", operation="lookup") == 7
    assert sample(text, "nbmountd_remote_calls_total", mount="b2drop", verb="upload") == 4
    assert sample(text, "nbmountd_remote_calls_seconds_total", mount="b2drop", verb="upload") == 1.25
    assert sample(text, "nbmountd_state", mount="datahub", state="unauthenticated") == 1
    assert sample(text, "nbmountd_state", mount="datahub", state="live") == 0
    assert sample(text, "nbmountd_token_ending", mount="b2drop") == 1
    assert sample(text, "nbmountd_safe") == 0
    assert 'nbmountd_quota_available_bytes{' not in text, "what is not known is absent, not 0"


def test_the_format_is_strict_every_metric_in_one_group_with_one_help_and_type() -> None:
    """Prometheus' own parser takes a second TYPE line for an error, which Python's does not."""
    metric, seen, families = "", set(), set()
    for line in exposition(status()).splitlines():
        if match := re.fullmatch(r"# (HELP|TYPE) (nbmountd_[a-z_]+) (.+)", line):
            assert (match[1], match[2]) not in seen
            seen.add((match[1], match[2]))
            if match[1] == "TYPE":
                assert match[3] in ("gauge", "counter") and match[2] not in families
                assert (match[3] == "counter") == match[2].endswith("_total")
                metric = match[2]
                families.add(metric)
        else:
            pattern = r'(nbmountd_[a-z_]+)(\{[a-z]+="[^"\\]*"(,[a-z]+="[^"\\]*")*\})? -?[0-9]+(\.[0-9]+)?'
            match = re.fullmatch(pattern, line)
            assert match and match[1] == metric, line


def test_metrics_hold_no_path_no_reason_and_no_warning() -> None:
    text = exposition(status())

    assert "/home" not in text and "no token" not in text and "ends in" not in text


@pytest.mark.parametrize("text", ["127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", "http://x:1", "a b:1", ":x"])
def test_an_address_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no address"):
        parse_address(text)


def test_addresses_are_understood() -> None:
    assert parse_address(":9180") == (None, 9180)
    assert parse_address("[::1]:9180") == ("::1", 9180)


async def ask(port: int, request: bytes) -> bytes:
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(request)
        answer = b""
        async for piece in stream:
            answer += piece
        return answer


@pytest.mark.parametrize(
    "request_bytes, expected",
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"200 OK"),
        (b"GET /metrics?name=x HTTP/1.0\r\n\r\n", b"200 OK"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404 "),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405 "),
        (b"\x16\x03\x01\0\0\r\n\r\n", b"400 "),
    ],
)
async def test_the_listener_gives_metrics_and_nothing_else(
    nursery: trio.Nursery, request_bytes: bytes, expected: bytes
) -> None:
    async def text() -> str:
        return exposition(status())

    port = await nursery.start(exporter.serve, "127.0.0.1:0", text)

    answer = await ask(port, request_bytes)

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + expected)
    if expected == b"200 OK":
        assert body.decode() == exposition(status())
        assert f"Content-Length: {len(body)}".encode() in head


@pytest.mark.parametrize("sent", [b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 5000, b"x" * 100_000])
async def test_a_request_without_end_is_not_gathered(nursery: trio.Nursery, sent: bytes) -> None:
    async def text() -> str:
        raise AssertionError("nobody asked for that")

    port = await nursery.start(exporter.serve, "127.0.0.1:0", text)

    with trio.fail_after(exporter.TIME_LIMIT):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            with suppress(trio.BrokenResourceError):
                await stream.send_all(sent)
                async for piece in stream:
                    assert b"400 Bad Request" in piece


async def test_a_port_that_is_taken_stops_nothing(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    async def text() -> str:
        return ""

    port = await nursery.start(exporter.serve, "127.0.0.1:0", text)

    assert await nursery.start(exporter.serve, f"127.0.0.1:{port}", text) == 0
    assert "metrics cannot be listened for" in caplog.text
