"""Log lines: readable, one each, and without secrets."""

from __future__ import annotations

import io
import json
import logging
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbmountd import log


@pytest.fixture
def text() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    log.configure("info", stream=stream)
    yield stream
    log.configure("info")


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    log.configure("debug", "json", "b2drop", stream=stream)
    yield stream
    log.configure("info")


logger = log.get_logger("nbmountd.test")


def test_a_line_names_mount_operation_node_and_cause(text: io.StringIO) -> None:
    log.configure("info", mount="b2drop", stream=text)

    logger.warning("upload failed", path="/a/b c.txt", cause="507 quota", retry_in=30, nothing=None)

    stamp, rest = text.getvalue().split(" ", 1)
    assert len(stamp) == len("12:03:04")
    assert rest == 'warning b2drop upload failed path="/a/b c.txt" cause="507 quota" retry_in=30\n'


def test_a_line_may_name_another_mount_and_bound_fields_stay(text: io.StringIO) -> None:
    logger.bind(mount="shared", node=7).info("mounted")

    assert text.getvalue().endswith("info shared mounted node=7\n")


def test_a_json_line_holds_the_fields_as_they_are(lines: io.StringIO) -> None:
    logger.debug("listed", path="/a", entries=3, took=0.5, path_object=Path("/x"))

    line = json.loads(lines.getvalue())
    assert line["time"].endswith("Z")
    assert {**line, "time": ""} == {
        "time": "", "level": "debug", "logger": "nbmountd.test", "mount": "b2drop", "message": "listed",
        "path": "/a", "entries": 3, "took": 0.5, "path_object": "/x",
    }


@pytest.mark.parametrize("name", ["/a\n12:00:00 error all is lost", "/a\x1b[2J", "/a\udcff", "/\u2028"])
def test_a_file_name_cannot_forge_a_line_or_steer_the_terminal(text: io.StringIO, lines: io.StringIO, name: str) -> None:
    for stream, kind in ((text, "text"), (lines, "json")):
        log.configure("info", "json" if kind == "json" else "text", stream=stream)
        logger.info("looked up " + name, path=name)

        assert len(stream.getvalue().splitlines()) == 1
        assert "\x1b" not in stream.getvalue()
        stream.getvalue().encode()


def test_a_traceback_follows_its_line(text: io.StringIO, lines: io.StringIO) -> None:
    for stream, kind in ((text, "text"), (lines, "json")):
        log.configure("info", "json" if kind == "json" else "text", stream=stream)
        try:
            raise ValueError("broken")
        except ValueError:
            logger.exception("failed", path="/a")

    assert text.getvalue().splitlines()[0].endswith("error failed path=/a")
    assert text.getvalue().endswith("ValueError: broken\n")
    assert json.loads(lines.getvalue())["traceback"].endswith("ValueError: broken")


def test_levels_can_be_changed_while_running(text: io.StringIO) -> None:
    logger.debug("unheard")
    log.set_level("debug")
    logger.debug("heard")
    log.set_level("error")
    logger.warning("unheard again")

    assert [line.split()[-1] for line in text.getvalue().splitlines()] == ["heard"]


def test_other_packages_are_heard_from_warning_up(text: io.StringIO) -> None:
    logging.getLogger("other.package").debug("GET / with %s", "headers")
    logging.getLogger("other.package").warning("odd answer %d", 1)

    assert text.getvalue().split(" ", 1)[1] == "warning odd answer 1\n"


SECRET = "s3cr:t /ä\"'pass"


@pytest.mark.parametrize(
    "leak",
    [
        SECRET,
        "password s3cr%3At%20%2F%C3%A4%22%27pass in a URL",
        f"headers {({'X': SECRET})!r}",
        "body " + json.dumps({"p": SECRET}),
        "Authorization: Basic " + b64encode(f"alice:{SECRET}".encode()).decode(),
        f"request headers {({'authorization': 'Bearer ' + 's3cr' * 5})}",
        "X-Auth-Token: s3cr-anything",
        "sent 'Bearer s3crabcdefgh.s3cr-b.s3cr_c'",
        "https://alice:s3cr@t@host/path failed",
        "GET https://host/path?access_token=s3cr&x=1",
    ],
)
@pytest.mark.parametrize("kind", ["text", "json"])
def test_no_secret_leaves_by_the_log(text: io.StringIO, leak: str, kind: log.Format) -> None:
    log.register_secret(SECRET)
    log.configure("debug", kind, stream=text)

    try:
        raise ValueError(leak)
    except ValueError as exc:
        logger.exception(leak, cause=exc, url=leak)
        logging.getLogger("other").error("see %s", leak)

    assert "s3cr" not in text.getvalue()
    assert b64encode(b"alice:s3cr").decode()[:12] not in text.getvalue()
    assert log.MASK in text.getvalue()


def test_masking_leaves_ordinary_text_alone(text: io.StringIO) -> None:
    log.register_secret("")
    log.register_secret("cat")
    ordinary = "concatenate https://host:8080/a@b?x=token basic facts: bearer of news"

    assert log.mask(ordinary) == ordinary
    assert log.mask("the cat sat") == "the *** sat"
