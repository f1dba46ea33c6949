"""One run of chaos, from a seed to its ledger."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from mcp_broker.errors import BrokerError
from tests.chaos.ledger import Ledger
from tests.chaos.load import ONCE, TOOLS, Load, runs_of
from tests.chaos.plan import QUIET_S, Plan
from tests.chaos.storm import Storm
from tests.support.running import Running

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WORKERS: Final = 3
RATE: Final = 500.0
#: of a broker's log that an account shows when it ended before its time
LOG_CHARS: Final = 3000
CONFIG: Final = """
[limits]
restarts = 1000

[pools.c]
module = "fault_tools"
path = ["{folder}"]
min = {workers}

[pools.c.limits]
scratch_mb = 64
"""


def run(folder: Path, seed: int, seconds: float, tell: Callable[[str], None], config: str = CONFIG) -> Ledger:
    """Let things go wrong for ``seconds`` under load; return the account, with what must not be in ``violations``."""
    ledger, plan = Ledger(seed), Plan(seed)
    path = folder / "ran"
    with Running(folder, workers=WORKERS, tools=TOOLS, config=config) as running:
        with running.client() as one, running.client() as two, running.client() as probe:
            load = Load((one, two), path, RATE)
            load.start()
            try:
                _let_go_wrong(Storm(running, probe, path, WORKERS, ledger), plan, seconds, tell)
            except BrokerError as error:
                last = (folder / "start.log").read_text()[-LOG_CHARS:]
                ledger.violations.append(f"nobody answers: {error!r}; the end of its log: {last}")
            finally:
                ledger.codes = load.end()
            ledger.runs = runs_of(path)
        if len(ledger.codes) != load.submitted:
            ledger.violations.append(f"{load.submitted - len(ledger.codes)} calls have no outcome")
    _check_runs(ledger)
    run_dir = running.state_dir / "run"
    left = sorted(entry.name for entry in run_dir.iterdir()) if run_dir.exists() else []
    if left:
        ledger.violations.append(f"left over in the run directory: {left}")
    return ledger


def _let_go_wrong(storm: Storm, plan: Plan, seconds: float, tell: Callable[[str], None]) -> None:
    until = time.monotonic() + seconds
    time.sleep(QUIET_S)
    while time.monotonic() < until:
        fault = plan.next()
        tell(f"{fault.number:>4}  {fault.kind.value}")
        storm.strike(fault)
        time.sleep(fault.pause_s)


def _check_runs(ledger: Ledger) -> None:
    for number, code in ledger.codes.items():
        runs = ledger.runs.get(number, 0)
        if number % 2 and runs > 1:
            ledger.violations.append(f"{ONCE} {number} ran {runs} times ({code})")
        if code == "OK" and runs == 0:
            ledger.violations.append(f"call {number} is OK and never ran")
