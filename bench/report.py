"""Turns measured values into medians, ratios, a table and JSON. It knows no system and no row."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass
class Report:
    """All values: label -> system -> one value for each repetition."""

    systems: Sequence[str]
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, label: str, system: str, value: float | None) -> None:
        """Takes one value; None says that the system has no such thing."""
        found = self.values.setdefault(label, {}).setdefault(system, [])
        if value is not None:
            found.append(value)

    def median(self, label: str, system: str) -> float | None:
        found = self.values[label].get(system)
        return statistics.median(found) if found else None

    def ratio(self, label: str, of: str, to: str) -> float | None:
        """How many times as much `of` takes as `to`; None where there is nothing to compare."""
        above, below = self.median(label, of), self.median(label, to)
        return above / below if above is not None and below else None

    def behind(self) -> list[str]:
        """Labels of time or wire bytes on which nbmountd takes more than rclone."""
        return [
            label
            for label in self.values
            if not label.startswith("  ") and (ratio := self.ratio(label, "rclone", "nbmountd")) is not None and ratio < 1
        ]

    def show(self, console: Console) -> None:
        table = Table(title="medians; less is better", title_justify="left")
        table.add_column("", no_wrap=True)
        for system in self.systems:
            table.add_column(system, justify="right")
        table.add_column("rclone / nbmountd", justify="right")
        table.add_column("nbmountd / local", justify="right")
        for label in self.values:
            rival = self.ratio(label, "rclone", "nbmountd")
            table.add_row(
                label,
                *(quantity(label, self.median(label, system)) for system in self.systems),
                "" if rival is None else f"[{'green' if rival >= 1 else 'red'}]{rival:.2f}",
                "" if (local := self.ratio(label, "nbmountd", "local")) is None else f"{local:.2f}",
                style="dim" if label.startswith("  ") else "",
            )
        console.print(table)
        if behind := self.behind():
            console.print("behind rclone: " + "; ".join(behind))

    def as_json(self) -> dict[str, Any]:
        return {
            label.strip(): {
                "values": values,
                "medians": {system: self.median(label, system) for system in self.systems},
                "rclone_over_nbmountd": self.ratio(label, "rclone", "nbmountd"),
                "nbmountd_over_local": self.ratio(label, "nbmountd", "local"),
            }
            for label, values in self.values.items()
        }


def quantity(label: str, value: float | None) -> str:
    """`value` for a person: megabytes where the label says bytes or memory, else seconds or milliseconds."""
    if value is None:
        return "-"
    if "bytes" in label or "memory" in label:
        return f"{value / 1e6:.1f} MB"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"
