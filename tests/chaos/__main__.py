"""``make chaos``: kills, stops and shortages under load, by a seed; prints its ledger."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from tests.chaos.run import run


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
    for violation in ledger.violations:
        console.print(violation, style="red", markup=False)
    return 1 if ledger.violations else 0


if __name__ == "__main__":
    sys.exit(main())
