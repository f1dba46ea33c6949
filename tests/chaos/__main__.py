"""``make chaos``: kills, stops and shortages under load, by a seed; prints its ledger."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from tests.chaos.plan import Kind
from tests.chaos.run import run

#: of what goes wrong, this share is recovered from
RECOVERED = 0.99
WORKER_S = 0.25


def main() -> int:
    """Run once; 1 if something happened that must not."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="decides what goes wrong; drawn if not given")
    parser.add_argument("--seconds", type=float, default=600.0)
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    console = Console()
    console.print(f"seed {seed}, {options.seconds:g} s")
    with tempfile.TemporaryDirectory(prefix="mcpb-chaos-") as folder:
        ledger = run(Path(folder), seed, options.seconds, lambda text: console.print(text, style="dim"))
    console.print(ledger.table())
    console.print(ledger.outcomes())
    mean_s = ledger.mean_s(Kind.WORKER_KILL)
    console.print(f"recovered from: {ledger.share():.1%} (wanted: {RECOVERED:.0%})")
    if mean_s is not None:
        console.print(
            f"a killed worker is replaced in {mean_s * 1000:,.0f} ms on average (wanted: {WORKER_S * 1000:,.0f})"
        )
    for violation in ledger.violations:
        console.print(violation, style="red", markup=False)
    is_slow = mean_s is not None and mean_s > WORKER_S
    return 1 if ledger.violations or is_slow or ledger.share() < RECOVERED else 0


if __name__ == "__main__":
    sys.exit(main())
