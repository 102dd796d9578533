"""Names that an administrator forbids, as a Nextcloud tells them, and as anything else might."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbmountd.backends.nextcloud_names import refused_names

WINDOWS = {
    "forbidden_filenames": [".htaccess", "thumbs.db"],
    "blacklisted_files": [".htaccess"],
    "forbidden_filename_basenames": ["con", "com0"],
    "forbidden_filename_characters": ["<", ">", ":", '"', "|", "?", "*", "\\", "/", "]", "^"],
    "forbidden_filename_extensions": [" ", ".", ".part"],
}
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=9), lambda inner: st.lists(inner, max_size=4))


def told(files: object) -> bytes:
    return json.dumps({"ocs": {"meta": {"status": "ok"}, "data": {"capabilities": {"files": files}}}}).encode()


@pytest.mark.parametrize(
    "name", ["THUMBS.DB", "con", "Con.txt", "com0.tar.gz", "12:30", "what?", "a]b", "x^2", "ends with dot.", "blank ", "x.part"]
)
def test_a_forbidden_name_is_refused_in_any_case(name: str) -> None:
    assert re.search(refused_names(told(WINDOWS)), name, re.IGNORECASE)


@pytest.mark.parametrize("name", ["a.thumbs.db", "console", "icon.txt", "xcon", "com00", "a.partial", "a b.c", "part"])
def test_what_only_looks_like_it_is_not(name: str) -> None:
    assert not re.search(refused_names(told(WINDOWS)), name, re.IGNORECASE)


@pytest.mark.parametrize(
    "answer",
    [b"", b"<?xml", b"[]", b"null", b"[" * 100_000, b"\xff", told(None), told([]), told({"forbidden_filenames": "con"})],
)
def test_what_tells_nothing_forbids_nothing(answer: bytes) -> None:
    assert refused_names(answer) == ""


@given(st.dictionaries(st.sampled_from(list(WINDOWS)), JSON), st.text(max_size=20))
def test_whatever_is_told_is_an_expression_that_does_not_refuse_all(files: dict[str, object], name: str) -> None:
    expression = refused_names(told(files))
    texts = [each for kind in files.values() if isinstance(kind, list) for each in kind if isinstance(each, str) and each]

    if expression and re.search(expression, name, re.IGNORECASE):
        assert any(each.casefold() in name.casefold() or re.search(re.escape(each), name, re.IGNORECASE) for each in texts)
