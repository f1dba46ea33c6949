"""One seed, as long as wanted, with progress: ``make sim SEED=n STEPS=n``."""

from __future__ import annotations

import argparse
import random
import sys
import time

from tests.sim.invariants import Violation
from tests.sim.world import World


def main() -> int:
    """Run one seed; 1 if an invariant broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="decides everything; drawn if not given")
    parser.add_argument("--steps", type=int, default=100_000, help="things that happen before all goes quiet")
    parser.add_argument(
        "--digest", action="store_true", help="print one number that stands for all that happened"
    )
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    world = World(seed)
    _say(f"seed {seed}, {options.steps:,} steps: {world.describe()}")
    began = time.monotonic()

    def tell(now: World) -> None:
        _say(f"  {now.steps:>12,} steps, {len(now.records):>9,} calls, {now.faults.count:>7,} faults")

    try:
        world.run(options.steps, tell)
    except Violation as violation:
        _say(str(violation))
        return 1
    _say(world.summary(time.monotonic() - began))
    if options.digest:
        _say(f"digest {world.chronicle.digest:08x}")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
