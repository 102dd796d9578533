"""Names that the administrator of a Nextcloud forbids, as its capabilities tell them (Nextcloud 30 and later).

Pure. Such names are refused when they are made, and not escaped as those are that no Nextcloud takes (escapes.py): files
that have been called so since before the rule are still there under that name, and the rule may have a reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

MOST = 500
"""Names of a kind that are heeded, and their characters: a Nextcloud tells what its administrator typed."""


def refused_names(told: bytes) -> str:
    """A regular expression for names that are refused, by an answer to `ocs/v2.php/cloud/capabilities`; "" if it tells none.

    Nothing in it repeats, so that no answer makes it slow.
    """
    try:
        files = json.loads(told)["ocs"]["data"]["capabilities"]["files"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""
    if not isinstance(files, dict):
        return ""
    characters = [each for each in _texts(files, "forbidden_filename_characters") if len(each) == 1 and each != "/"]
    kinds = (
        rf"[{''.join(map(re.escape, characters))}]" if characters else "",
        _one_of(r"\A(?:%s)\Z", (*_texts(files, "forbidden_filenames"), *_texts(files, "blacklisted_files"))),
        _one_of(r"\A(?:%s)(?:\.|\Z)", _texts(files, "forbidden_filename_basenames")),
        _one_of(r"(?:%s)\Z", _texts(files, "forbidden_filename_extensions")),
    )
    return "|".join(filter(None, kinds))


def _texts(files: dict[str, object], key: str) -> list[str]:
    told = files.get(key)
    if not isinstance(told, list):
        return []
    return [each for each in told[:MOST] if isinstance(each, str) and 0 < len(each) <= MOST]


def _one_of(around: str, names: Iterable[str]) -> str:
    alternatives = "|".join(map(re.escape, names))
    return around % alternatives if alternatives else ""
