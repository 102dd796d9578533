"""File ids as Onedata builds them: hex of a framed "guid#<uuid>#<space>" with a CRC-16/ARC (ctool: src/utils/file_id.erl).

It knows nothing of files.
"""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=100_000)
def file_id(uuid: str, space: str) -> str:
    """The REST file id of an object."""
    text = f"guid#{uuid}#{space}".encode()
    frame = b"\0" + b"\0\0\0" + b"\0" + bytes([len(text)])
    crc = _crc16(frame + b"\0\0" + text)
    return (frame + crc.to_bytes(2, "big") + text).hex().upper()


@lru_cache(maxsize=100_000)
def parse_file_id(identifier: str) -> tuple[str, str] | None:
    """(uuid, space) of a well-formed id, else None."""
    try:
        raw = bytes.fromhex(identifier)
        frame, crc, text = raw[:6], raw[6:8], raw[8:]
        kind, uuid, space = text.decode().split("#")
    except ValueError:
        return None
    if kind != "guid" or _crc16(frame + b"\0\0" + text) != int.from_bytes(crc, "big"):
        return None
    return uuid, space


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ 0xA001 if byte & 1 else byte >> 1
    return byte


_CRC_OF_BYTE = [_crc_of_byte(byte) for byte in range(256)]


def _crc16(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc = crc >> 8 ^ _CRC_OF_BYTE[(crc ^ byte) & 0xFF]
    return crc
