"""What the workers of one pool may use, when that follows what they use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from mcp_broker import limits
from mcp_broker.config import PoolLimits, PoolTable
from mcp_broker.core.metering import LIMITS, Bounds, Meter, Sample
from mcp_broker.supervisor.metering import Allowance

if TYPE_CHECKING:
    from mcp_broker.supervisor.pool import Pool


class Quota:
    """Takes what the kernel is told."""

    def __init__(self) -> None:
        self.told: list[Bounds] = []

    def hold_to(self, bounds: Bounds) -> None:
        self.told.append(bounds)


def pool_of_one() -> tuple[Pool, Meter, Quota]:
    meter, quota = Meter(Bounds(), Sample(memory_mb=30, cpu_s=0)), Quota()
    metered = SimpleNamespace(meter=meter, gauge=SimpleNamespace(quota=quota))
    slots = [SimpleNamespace(life=SimpleNamespace(metered=metered)), SimpleNamespace(life=None)]
    return cast("Pool", SimpleNamespace(name="p", slots=slots)), meter, quota


def learned(allowance: Allowance, memory_mb: float) -> tuple[Meter, Quota]:
    pool, meter, quota = pool_of_one()
    used = {**dict.fromkeys(LIMITS, 0.0), "memory_mb": memory_mb}
    for number in range(100):
        allowance.learn(pool, used, number * limits.ADAPT_STEP_S)
    return meter, quota


def test_limits_stay_as_configured_unless_they_are_to_follow() -> None:
    allowance = Allowance(PoolTable(module="m"), {})
    meter, quota = learned(allowance, 99.0)
    assert allowance.bounds == meter.bounds == Bounds()
    assert quota.told == []


def test_limits_that_follow_count_for_every_worker_and_for_the_kernel() -> None:
    allowance = Allowance(PoolTable(module="m", limits=PoolLimits(adaptive=True)), {})
    meter, quota = learned(allowance, 99.0)
    assert allowance.bounds.memory_mb == 118.8
    assert (allowance.bounds.cpu_s, allowance.bounds.processes) == (limits.CPU_S, limits.PROCESSES)
    assert meter.bounds == allowance.bounds
    assert quota.told == [allowance.bounds]


def test_no_limit_follows_beyond_the_most_that_may_be_configured() -> None:
    allowance = Allowance(PoolTable(module="m", limits=PoolLimits(adaptive=True)), {})
    learned(allowance, 4000.0)
    assert allowance.bounds.memory_mb == limits.MEMORY_MB_MAX


def test_tools_may_ask_for_more_and_the_operator_has_the_last_word() -> None:
    asks = {"memory_mb": 300.0, "cpu_s": 90.0, "open_files": 70.0, "connections": 5.0}
    bounds = Allowance(PoolTable(module="m"), asks).bounds
    assert (bounds.memory_mb, bounds.cpu_s, bounds.open_files, bounds.connections) == (300, 90, 70, 10)
    table = PoolTable.model_validate({"module": "m", "limits": {"memory_mb": 50}})
    assert Allowance(table, asks).bounds.memory_mb == 50
    assert Allowance(table, asks).bounds.cpu_s == 90
