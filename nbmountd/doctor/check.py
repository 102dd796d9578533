"""What the doctor says: one finding."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One finding. `advice` says what to do; empty when there is nothing to do."""

    level: Level
    subject: str
    finding: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)
