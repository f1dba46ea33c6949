"""Operating a broker under load, for long: scale and reload cost no call."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.operating.conftest import POOL, TOOLS, Operated
from tests.operating.test_pools import CALLS_PER_S, Load, operate

if TYPE_CHECKING:
    from tests.soak.conftest import Start
    from tests.support.load import Soak

pytestmark = [pytest.mark.soak, pytest.mark.process, pytest.mark.slow]


def test_scale_and_reload_for_minutes_cost_no_call(soak: Soak, start: Start) -> None:
    seconds = soak.count(sample=1, full=180)
    config = POOL.format(name="t", module="fault_tools", folder="{folder}") + "#more\n"
    with start(tools=TOOLS, config=config) as running:
        operated = Operated(running, config.format(folder=running.folder))
        rounds, until = 0, time.monotonic() + seconds
        with operated.client, Load(operated) as load:
            while time.monotonic() < until:
                rounds += 1
                operate(operated, rounds)
                soak.progress(f"{rounds} rounds, {len(load.futures):,} calls")
    soak.report("rounds of scale and reload", rounds)
    soak.report("calls, none of them failed", f"{len(load.futures):,} at {CALLS_PER_S} a second")
