"""Inputs for fuzzing: seeds changed at random, by a generator whose seed says everything.

It knows nothing of what reads them. Besides bits and slices it puts in what parsers stumble over: directions in paths, bytes
that are no text, numbers out of range, nesting without end, entities, long runs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

LONG = 100_000

WORDS: tuple[bytes, ...] = (
    b"..",
    b".",
    b"/",
    b"//",
    b"../../etc/passwd",
    b"%2e%2e%2f",
    b"%2F",
    b"%00",
    b"%",
    b"%ff",
    b"\0",
    b"\\",
    b"\n",
    b"\r\n\r\n",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\xed\xb3\xbf",
    b"\\ud800",
    b"\\udc80",
    b"\\u0000",
    b"\\u0000ff",
    b"\xc3",
    b"\xe2\x80\xae",
    b"\x1b[2J",
    b"null",
    b"true",
    b"false",
    b"-1",
    b"-0",
    b"0",
    b"1e999",
    b"-1e400",
    b"NaN",
    b"Infinity",
    b"1.5",
    b"9" * 18,
    b"9" * 19,
    b"9" * 20,
    b"9" * 5000,
    b"18446744073709551616",
    b"9223372036854775807",
    b"-9223372036854775809",
    b"\xd9\xa1\xd9\xa2",
    b"\xc2\xb2",
    b"{}",
    b"[]",
    b'""',
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"'",
    b"<",
    b">",
    b"&",
    b";",
    b"=",
    b"#",
    b"\t",
    b'<!DOCTYPE d [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]>',
    b"&b;",
    b"&#0;",
    b"&#xd800;",
    b"<![CDATA[",
    b"]]>",
    b"<?xml?>",
    b'<d:response xmlns:d="DAV:">',
    b"</d:response>",
    b"http://elsewhere.example/dav/dir/",
    b"file:///etc/passwd",
    b"http://[::1",
    b"Sun, 06 Nov 9999 08:49:37 GMT",
    b"Sun, 06 Nov 0000 08:49:37 GMT",
    b"Sun, 31 Feb 2026 25:61:61 GMT",
    b"[" * LONG,
    b'{"a":' * 20_000,
    b"<d>" * 20_000,
    b"a" * LONG,
    b"%61" * 2000,
    b"\xf0\x9f\x98\x80" * 400,
    b"e\xcc\x81" * 1000,
)

PLAIN = tuple(word for word in WORDS if not set(word) & set(b'<>&"{}[]\\\n') and len(word) < 10_000)
"""Words that can stand for a value in XML and JSON without changing the form."""


def mutate(seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """One of `seeds`, changed one to eight times; at times two of them, cut and joined."""
    data = bytearray(rng.choice(seeds))
    if rng.random() < 0.3:  # the form as it was: what is looked into is the values
        for _ in range(rng.randint(1, 3)):
            _replace_value(data, rng, PLAIN)
        return bytes(data)
    if rng.random() < 0.1:
        other = rng.choice(seeds)
        data = data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]
    for _ in range(1 + int(rng.random() ** 2 * 8)):
        _change(data, rng)
    return bytes(data)


def _change(data: bytearray, rng: random.Random) -> None:
    start = rng.randint(0, len(data))
    stop = min(len(data), start + int(rng.expovariate(0.1)))
    kind = rng.randrange(10)
    if kind == 0 and data:
        data[start % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[start:stop]
    elif kind == 2:
        data[start:start] = data[start:stop]
    elif kind == 3:
        data[start:stop] = rng.randbytes(rng.randint(1, 8))
    elif kind == 4:
        del data[start:]
    elif kind in (5, 8, 9):
        _replace_value(data, rng)
    else:
        data[start:stop] = _word(rng)


def _replace_value(data: bytearray, rng: random.Random, words: Sequence[bytes] = ()) -> None:
    """A whole value, so that the structure around it stays as it was."""
    marks = [place for place, byte in enumerate(data) if byte in b'":,<>{}[] \n']
    between = [(at + 1, to) for at, to in pairwise(marks) if to > at + 1]
    if words:  # not the names of tags
        between = [(at, to) for at, to in between if data[at - 1] not in b"<{" and data[to] != 62]  # ">"
    if between:
        at, to = rng.choice(between)
        data[at:to] = rng.choice(words) if words else _word(rng)


def _word(rng: random.Random) -> bytes:
    word = rng.choice(WORDS)
    return rng.choice(WORDS) if len(word) > 1000 and rng.random() < 0.9 else word  # the long ones cost the most time
