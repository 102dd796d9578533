"""Log lines for the person who operates this at night: what was attempted, on what, what came back, what happens next.

A line is a short message and named fields, as text or as JSON. It does not know what the fields mean, except `mount`.
No secret leaves by this door: registered values, Authorization values and passwords in URLs are masked in every line.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TextIO
from urllib.parse import quote

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["text", "json"]

ROOT = "nbmountd"
MASK = "***"

_LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR
}

# --- secrets -----------------------------------------------------------------------------------------------------------

MOST_SECRETS = 64
"""Values remembered: hourly tokens would pile up, and each line is searched for all of them. The oldest are forgotten."""
_WORDLIKE_BELOW = 6  # a shorter secret is masked only as a whole word, or it would shred ordinary text

_secrets_lock = threading.Lock()
_secrets: dict[str, None] = {}
"""Values, the latest registered last."""
_secret_pattern: re.Pattern[str] | None = None

_SHAPES = (
    # a header with its value, however it was printed: "Authorization: Basic abc", {'X-Auth-Token': 'abc'}
    (re.compile(r"(?i)((?:authorization|x-auth-token|cookie)['\"]?\s*[:=]\s*b?['\"]?)(?:[a-z]+\s+)?[^\s'\",}\]]+"), r"\1"),
    (re.compile(r"\b((?:[Bb]asic|[Bb]earer)\s+)[A-Za-z0-9+/=._~-]{8,}"), r"\1"),
    (re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://[^\s/@:]*:)[^\s/]*(?=@)"), r"\1"),
    (re.compile(r"(?i)([?&][a-z_-]*(?:token|passw(?:or)?d|pwd|secret|signature)=)[^&\s'\"]+"), r"\1"),
)


def register_secret(value: str) -> None:
    """Masks `value`, also percent-encoded or inside JSON or a repr, in all later lines of this process. Any thread."""
    global _secret_pattern
    if not value:
        return
    with _secrets_lock:
        known = value in _secrets
        _secrets.pop(value, None)
        _secrets[value] = None
        if not known:
            while len(_secrets) > MOST_SECRETS:
                del _secrets[next(iter(_secrets))]
            _secret_pattern = _pattern_of(_secrets)


def _pattern_of(values: Iterable[str]) -> re.Pattern[str] | None:
    """What matches any of them, however it is written, the longest first."""
    secrets: set[str] = set()
    for value in values:
        secrets.update((value, quote(value, safe=""), quote(value), json.dumps(value)[1:-1], repr(value)[1:-1]))
    if not secrets:
        return None
    return re.compile(
        "|".join(
            rf"(?<!\w){re.escape(secret)}(?!\w)" if len(secret) < _WORDLIKE_BELOW else re.escape(secret)
            for secret in sorted(secrets, key=len, reverse=True)
        )
    )


def mask(text: str) -> str:
    """`text` with everything that is or looks like a secret replaced by `***`."""
    if _secret_pattern is not None:
        text = _secret_pattern.sub(MASK, text)
    for pattern, kept in _SHAPES:
        text = pattern.sub(kept + MASK, text)
    return text


# --- writing -----------------------------------------------------------------------------------------------------------


class Log:
    """A logger whose lines carry named fields. `fields` given here stand in each of its lines."""

    def __init__(self, name: str, /, **fields: object) -> None:
        self._logger = logging.getLogger(name)
        self._fields = fields

    def bind(self, **fields: object) -> Log:
        """One more logger of the same name, with `fields` in each of its lines."""
        return Log(self._logger.name, **{**self._fields, **fields})

    def debug(self, message: str, /, **fields: object) -> None:
        self._write(logging.DEBUG, message, fields)

    def info(self, message: str, /, **fields: object) -> None:
        self._write(logging.INFO, message, fields)

    def warning(self, message: str, /, **fields: object) -> None:
        """Somebody should look."""
        self._write(logging.WARNING, message, fields)

    def error(self, message: str, /, **fields: object) -> None:
        """Something was not done and will not be."""
        self._write(logging.ERROR, message, fields)

    def exception(self, message: str, /, **fields: object) -> None:
        """`error` with the traceback of the exception being handled."""
        self._write(logging.ERROR, message, fields, traceback=True)

    def _write(self, level: int, message: str, fields: Mapping[str, object], *, traceback: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            together = {**self._fields, **fields} if self._fields else fields
            self._logger.log(level, "%s", message, exc_info=traceback, extra={"fields": together})


def get_logger(name: str, /, **fields: object) -> Log:
    """The logger of a module; `name` is its `__name__`."""
    return Log(name, **fields)


# --- formats -----------------------------------------------------------------------------------------------------------


def _fields_of(record: logging.LogRecord, mount: str | None) -> dict[str, Any]:
    fields = {name: value for name, value in getattr(record, "fields", {}).items() if value is not None}
    if mount is not None:
        fields.setdefault("mount", mount)
    return fields


def _traceback_of(record: logging.LogRecord) -> str:
    if not record.exc_info:
        return ""
    return mask("".join(traceback.format_exception(*record.exc_info)).rstrip())


def _in_one_line(text: str) -> str:
    """`text` without line ends and control characters: a file name must not be able to forge a log line."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _value(value: object) -> str:
    text = mask(str(value))
    if text and not any(character.isspace() or character in '"=' or not character.isprintable() for character in text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


class TextFormatter(logging.Formatter):
    """`12:03:04 warning b2drop upload failed path=/a/b.txt cause="507 quota" retry_in=30`, in local time."""

    def __init__(self, mount: str | None) -> None:
        super().__init__()
        self._mount = mount

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields_of(record, self._mount)
        mount = fields.pop("mount", None)
        words = [time.strftime("%H:%M:%S", time.localtime(record.created)), record.levelname.lower()]
        if mount is not None:
            words.append(_value(mount))
        words.append(_in_one_line(mask(record.getMessage())))
        words += [f"{name}={_value(value)}" for name, value in fields.items()]
        line = " ".join(words)
        trace = _traceback_of(record)
        return f"{line}\n{trace}" if trace else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, mount, message, the fields, traceback."""

    def __init__(self, mount: str | None) -> None:
        super().__init__()
        self._mount = mount

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": mask(record.getMessage()),
        }
        for name, value in _fields_of(record, self._mount).items():
            plain = isinstance(value, (bool, int, float))
            line.setdefault(name, value if plain else mask(str(value)))
        if trace := _traceback_of(record):
            line["traceback"] = trace
        return json.dumps(line)


# --- set-up ------------------------------------------------------------------------------------------------------------


class _OurHandler(logging.StreamHandler[TextIO]):
    """Marks the handler that `configure` replaces."""


def configure(
    level: Level = "info", format: Format = "text", mount: str | None = None, *, stream: TextIO | None = None
) -> None:
    """Sends the log of this process to `stream` (default: standard error). May be called again; the last call holds.

    `mount` is named in each line (for a worker, which serves one). Other packages' lines appear from warning up.
    """
    handler = _OurHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter(mount) if format == "json" else TextFormatter(mount))
    root = logging.getLogger()
    for old in [known for known in root.handlers if isinstance(known, _OurHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    set_level(level)


def set_level(level: Level) -> None:
    """Changes from which level on our lines are written. Any thread."""
    logging.getLogger(ROOT).setLevel(_LEVELS[level])
