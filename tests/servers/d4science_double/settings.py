"""What a double of StorageHub may be told to be: the profile, and a switch for every point that public material leaves open.

Section numbers are those of the notes on the service. It knows nothing of HTTP or of items.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass
class Settings:
    """All switches. `profile` alone decides what the two generations do differently for certain."""

    profile: Literal["1.x", "2.x"] = "2.x"
    ranges: bool = False
    """Downloads honour `Range` (4.2)."""
    missing_class: str = "BackendGenericError"
    """`exceptionClass` of a 406 for an id that does not exist (5)."""
    bad_token_status: int = 401
    denied_status: int = 403
    denied_class: str = "UserNotAuthorizedException"
    collisions: Literal["number", "refuse"] = "number"
    """A taken name: silently `name(1)`, or 400 ItemAlreadyExistsException (4.3)."""
    file_collision: Literal["version", "number"] = "version"
    """An upload under a taken name: a new version of that file; or a new item `name(1)`."""
    delete_status: int = 200
    swallows_locks: bool = False
    """DELETE of something locked answers as if it were done (4.3)."""
    takes_empty_files: bool = True
    max_body: int | None = None
    escaped_again: Literal["error", "duplicate", "correct"] = "correct"
    """A second upload under a name that the repository had to escape (4.4)."""
    escapes_quotes: bool = False
    composes: bool = False
    """Names are put into NFC (4.4 leaves the Unicode form open)."""
    storage_ids: bool = True
    absent: Literal["null", "missing"] = "null"
    """How optional fields without a value are written."""
    takes_metadata: bool = True
    metadata_touches: bool = False
    """Setting metadata bumps lastModificationTime."""
    thumbnails: int = 0
    """Bytes of thumbnailData that an image item carries (3.1)."""
    shared_parent: Literal["own", "share"] = "own"
    """What listings give as parentId of a shared folder: the caller's folder, or the place below /Share (3)."""
    has_size: bool = True
    """GET /size exists."""
    public_prefix: str = ""
    """Beginning of public links; empty: this server's own address."""
    lag: float = 0.0
    """Seconds by which listings and looks for a name are behind, as on another node of a cluster (6)."""
    knows_exclude: bool = True
    """`exclude=hl:...` leaves anything out; the API pages of 2.x show other names (4)."""
    expires_in: float = 3600.0
    """Seconds that tokens of the token endpoint live."""

    def update(self, values: dict[str, Any]) -> None:
        """Raises KeyError for a switch that does not exist."""
        known = {field.name for field in fields(self)}
        for name, value in values.items():
            if name not in known:
                raise KeyError(name)
            setattr(self, name, value)
