"""Lines of the control socket: schema.py's structs to bytes and back, for names that are not UTF-8 too.

It knows nothing of sockets. File names reach us as `str` with surrogates for bytes that are not UTF-8 (model.py), which
JSON in UTF-8 cannot carry. Such a byte travels as NUL and two hexadecimal digits: no file name holds a NUL.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from nbmountd.control import schema
from nbmountd.control.schema import AnyReply, AnyRequest

_SURROGATE = re.compile("[\udc80-\udcff]")
_ESCAPED = re.compile("\0([89a-f][0-9a-f])")
_MARK = b"\\u0000"


def encode_line(message: AnyRequest | AnyReply) -> bytes:
    """The message as one line, with its end."""
    try:
        return schema.encode(message) + b"\n"
    except UnicodeEncodeError:
        return schema.encode(_map_strings(msgspec.to_builtins(message), _escape)) + b"\n"


def decode_request(line: bytes) -> AnyRequest:
    """Raises msgspec.MsgspecError, UnicodeDecodeError or RecursionError when the line is not a request."""
    request: AnyRequest
    if _MARK not in line:
        request = schema.decode_request(line)
    else:
        request = msgspec.convert(_map_strings(msgspec.json.decode(line), _unescape), AnyRequest)
    return request


def decode_reply(line: bytes) -> AnyReply:
    """Raises msgspec.MsgspecError, UnicodeDecodeError or RecursionError when the line is not a reply."""
    reply: AnyReply
    if _MARK not in line:
        reply = schema.decode_reply(line)
    else:
        reply = msgspec.convert(_map_strings(msgspec.json.decode(line), _unescape), AnyReply)
    return reply


def _escape(text: str) -> str:
    # Other lone surrogates cannot come from a file name; a question mark is better than no answer at all.
    escaped = _SURROGATE.sub(lambda match: f"\0{ord(match[0]) - 0xDC00:02x}", text)
    return escaped.encode("utf-8", "replace").decode()


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(0xDC00 + int(match[1], 16)), text)


def _map_strings(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value
