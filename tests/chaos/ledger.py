"""What went wrong, what became of it, and how long that took."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.chaos.plan import Kind


@dataclass(slots=True)
class Recovery:
    """One fault's end: ``took_s`` is None when it was not recovered from."""

    kind: Kind
    took_s: float | None
    note: str = ""


@dataclass(slots=True)
class Ledger:
    """The account of one run."""

    seed: int
    recoveries: list[Recovery] = field(default_factory=list)
    codes: Mapping[int, str] = field(default_factory=dict)
    runs: Mapping[int, int] = field(default_factory=dict)
    #: what must not be, as sentences
    violations: list[str] = field(default_factory=list)

    def share(self) -> float:
        """Return the share of faults that were recovered from."""
        done = sum(one.took_s is not None for one in self.recoveries)
        return done / len(self.recoveries) if self.recoveries else 1.0

    def mean_s(self, kind: Kind) -> float | None:
        """Return how long a recovery of this kind took on average."""
        times = [one.took_s for one in self.recoveries if one.kind is kind and one.took_s is not None]
        return statistics.fmean(times) if times else None

    def table(self) -> Table:
        """Draw the recoveries by kind."""
        table = Table(title=f"chaos, seed {self.seed}", title_justify="left")
        for name, justify in (("fault", "left"), ("count", "right"), ("recovered", "right")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for name in ("mean ms", "median ms", "max ms"):
            table.add_column(name, justify="right")
        kinds = dict.fromkeys(one.kind for one in self.recoveries)
        for kind in sorted(kinds, key=lambda kind: kind.value):
            mine = [one for one in self.recoveries if one.kind is kind]
            times = sorted(one.took_s * 1000 for one in mine if one.took_s is not None)
            figures = (
                [
                    f"{figure:,.0f}"
                    for figure in (statistics.fmean(times), statistics.median(times), times[-1])
                ]
                if times
                else ["-"] * 3
            )
            table.add_row(kind.value, str(len(mine)), str(len(times)), *figures)
        return table

    def outcomes(self) -> str:
        """Say how often each outcome came."""
        counts = Counter(self.codes.values())
        listed = ", ".join(f"{code} {count:,}" for code, count in sorted(counts.items()))
        again = sum(count - 1 for count in self.runs.values() if count > 1)
        return f"{len(self.codes):,} calls: {listed}; {again:,} idempotent ones ran again"
