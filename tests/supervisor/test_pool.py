"""Which slots a pool has, and what they are told: with doubles of its slots, whose processes do as the test says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from mcp_broker import config, limits
from mcp_broker.core import children
from mcp_broker.core.children import State
from mcp_broker.core.restart import Policy, Restarts
from mcp_broker.supervisor import pool as pools
from mcp_broker.supervisor.fleet import Fleet
from mcp_broker.supervisor.metering import Metering
from mcp_broker.supervisor.pool import Pool
from mcp_broker.supervisor.slot import Slot, Times
from mcp_broker.wire import node
from mcp_broker.wire.messages import ToolDefinition

if TYPE_CHECKING:
    from collections.abc import Callable

TIMES = Times(start_s=1.0, retire_s=1.0)
POLICY = Policy(intensity=0)


class FakeSlot:
    """A slot without a process: its Child machine is the real one."""

    def __init__(
        self,
        _ground: Any,
        name: str,
        table: Any,
        restarts: Any,
        _times: Times,
        *,
        edition: int,
        is_spare: bool,
        on_death: Callable[[Any], None],
    ) -> None:
        self.name, self.table = name, table
        self.edition = edition
        self.is_spare = is_spare
        self.on_death = on_death
        self.child = children.Child(restarts)
        self.life: Any = None
        self.retired_why = ""
        self.is_called = self.is_heard = False

    @property
    def is_warm(self) -> bool:
        return self.is_spare and self.child.state is State.RUNNING

    def tell(self, event: children.Event) -> None:
        self.child.handle(event, 0.0)

    def retire(self, why: str) -> None:
        self.retired_why = why
        self.tell(children.Retire())

    def call_up(self) -> None:
        self.is_spare, self.is_called = False, True
        self.tell(children.CalledUp())

    def registered(self) -> None:
        self.ready()

    def hear_out(self) -> None:
        self.is_heard = True

    def ready(self) -> None:
        self.tell(children.BecameReady())

    def die(self, *, hopeless: bool = False) -> None:
        self.on_death(self)
        self.tell(children.Died("it died", hopeless=hopeless, charged=not hopeless))


class FakeGround:
    is_leaving = False
    instance = "i"

    def changed(self) -> None:
        """Nobody looks."""


@pytest.fixture(autouse=True)
def _doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "Slot", FakeSlot)


def table(keys: str = "") -> config.PoolTable:
    return config.parse(f'[pools.t]\nmodule = "m"\n{keys}').pools["t"]


def made(keys: str = "") -> Any:
    """Return a pool whose workers are ready."""
    pool: Any = Pool(FakeGround(), "t", table(keys), POLICY, TIMES)  # type: ignore[arg-type]
    pool.start()
    settle(pool)
    pool.tools = (ToolDefinition(name="t.x", version="1.0.0", capabilities=("x",)),)
    return pool


def settle(pool: Any, *, become_ready: bool = True) -> None:
    """Let everything come to rest; whatever retires, leaves."""
    for _ in range(50):
        for slot in pool.slots:
            if slot.child.state is State.STARTING and become_ready:
                slot.ready()
            elif slot.child.state in {State.RETIRING, State.STOPPING}:
                slot.die()
        pool.settle()


def demand(**changes: Any) -> node.PoolDemand:
    return node.PoolDemand(**{"name": "t", "waiting": 0, "wait_s": 0.0, "ready": 1, "busy": 0, **changes})


def test_no_slot_is_wanted_any_more_once_the_workers_are_being_stopped() -> None:
    class Stopping(FakeGround):
        is_stopping = True

        def next_worker_id(self, _pool: str) -> str:
            raise AssertionError("it is started")

    ground: Any = Stopping()
    slot = Slot(
        ground, "t", table(), Restarts(POLICY), TIMES, edition=1, is_spare=False, on_death=lambda _slot: None
    )
    slot.tell(children.Wanted())
    assert slot.child.state is State.STOPPED
    assert not slot.child.is_wanted


class Definitions:
    def load(self) -> dict[str, Any]:
        return {}

    def save(self, _tools: Any) -> None:
        """Nobody reads."""


def made_fleet() -> Fleet:
    doubles: Any = (FakeGround(), Definitions())
    return Fleet(doubles[0], config.parse('[pools.t]\nmodule = "m"'), doubles[1], lambda _event: None)


def test_the_limits_that_a_workers_tools_ask_for_are_heard_before_it_is_measured() -> None:
    fleet, measured = made_fleet(), []
    double: Any = SimpleNamespace(began=lambda slot, _now: measured.append(slot.is_heard))
    fleet._metering = double
    fleet.start()
    (slot,) = fleet.slots
    slot.life = cast("Any", SimpleNamespace(worker_id="t-1"))
    fleet.worker_up("t-1", ())
    assert measured == [True]


def test_nothing_revives_a_pool_that_is_dissolved_but_to_want_it_again() -> None:
    fleet = made_fleet()
    fleet.found("t~t.x", table())
    pool: Any = fleet.pools["t~t.x"]
    settle(pool)
    (member,) = pool.members
    fleet.dissolve("t~t.x")
    assert not pool.replace(member, "a step of recovery")
    pool.supersede(9)
    fleet.settle()
    assert [slot for slot in pool.slots if slot.child.is_wanted] == []
    fleet.found("t~t.x", table())
    assert sum(slot.child.is_wanted for slot in pool.slots) == 1
    fleet.dissolve("t~t.x")
    settle(pool)
    fleet.settle()
    assert "t~t.x" not in fleet.pools


def test_a_worker_whose_successor_cannot_start_is_not_recycled_again_at_once() -> None:
    ground: Any = FakeGround()
    metering, pool = Metering(ground, ground), made()
    (member,) = pool.members

    def fail() -> None:
        (successor,) = [slot for slot in pool.slots if slot is not member]
        successor.die(hopeless=True)
        pool.settle()
        pool.settle()

    assert metering.recycle(pool, member, "it is 9 s old", 100.0)
    fail()
    assert (pool.members, pool.setback) == ([member], "it died")
    assert not metering.recycle(pool, member, "it is 10 s old", 101.0)
    assert pool.slots == [member], "nothing was started"
    later = 100.0 + limits.RECYCLE_RETRY_S
    assert metering.recycle(pool, member, "it is 69 s old", later)
    settle(pool)
    assert member not in pool.slots
    assert pool.setback == "", "one could start"
    (second,) = pool.members
    assert metering.recycle(pool, second, "it is 1 s old", later + 1.0)


def test_a_smaller_pool_does_without_those_that_do_not_work_then_the_youngest() -> None:
    pool = made("min = 3")
    first, second, third = pool.members
    second.die(hopeless=True)
    pool.scale(2)
    assert pool.members == [first, third]
    pool.scale(1)
    assert pool.members == [first]


def test_a_member_that_is_replaced_stays_until_its_successor_is_ready() -> None:
    pool = made()
    (member,) = pool.members
    assert pool.replace(member, "it is old")
    assert not pool.replace(member, "it is old"), "that is under way"
    pool.settle()
    assert pool.members == [member]
    (successor,) = [slot for slot in pool.slots if slot is not member]
    successor.ready()
    pool.settle()
    assert pool.members == [successor]
    assert (member.child.state, member.retired_why) == (State.RETIRING, "it is old")


def test_a_successor_that_cannot_start_leaves_the_member_and_its_death_is_not_the_members() -> None:
    pool = made()
    (member,) = pool.members
    pool.change(table("options = {a = 1}"), POLICY, TIMES)
    pool.settle()
    (successor,) = [slot for slot in pool.slots if slot is not member]
    successor.die(hopeless=True)
    settle(pool)
    assert pool.members == [member]
    assert pool.slots == [member]
    assert (pool.state, pool.setback) == ("degraded", "it died")
    assert pool.is_settled
    member.tell(children.Died("idle"))
    assert member.child.state is State.FATAL, "its own record counts from none"
    pool.setback = ""
    settle(pool)
    assert [slot.edition for slot in pool.members] == [2]


def test_a_successor_is_a_member_as_soon_as_the_broker_says_that_it_is_ready() -> None:
    pool = made()
    (member,) = pool.members
    pool.replace(member, "it is old")
    (successor,) = [slot for slot in pool.slots if slot is not member]
    successor.life = SimpleNamespace(worker_id="t-2")
    pool.worker_up("t-2", pool.tools)
    assert pool.members == [successor]
    assert pool.replace(successor, "its tool failed"), "what the broker wants next is done, in the same turn"
    settle(pool)
    assert successor not in pool.slots


@pytest.mark.parametrize("keys", ["", "spare = 1"])
def test_a_member_that_dies_while_its_successor_starts_comes_back_itself(keys: str) -> None:
    pool = made(keys)
    (member,) = pool.members
    pool.change(table(f"{keys}\noptions = {{a = 1}}"), POLICY, TIMES)
    pool.settle()
    (successor,) = [one.successor for one in pool._successions]
    member.die()
    pool.settle()
    assert (pool.members, member.child.state) == ([member], State.STARTING)
    assert not pool.is_settled
    successor.die(hopeless=True)
    settle(pool)
    assert (pool.members, member.child.state) == ([member], State.RUNNING), "the old ones stay"
    assert (pool.state, pool.setback, pool.is_settled) == ("degraded", "it died", True)


def test_a_member_that_is_starting_again_is_replaced_when_its_successor_is_ready() -> None:
    pool = made()
    (member,) = pool.members
    member.die()
    pool.change(table("options = {a = 1}"), POLICY, TIMES)
    pool.settle()
    assert pool.members == [member]
    (successor,) = [slot for slot in pool.slots if slot is not member]
    successor.ready()
    pool.settle()
    assert pool.members == [successor]
    assert not member.child.is_wanted
    settle(pool)
    assert pool.is_settled


@pytest.mark.parametrize("before", [True, False], ids=["it was given up before", "it is given up meanwhile"])
def test_a_member_that_cannot_come_back_is_no_reason_to_wait(before: bool) -> None:
    pool = made()
    (member,) = pool.members
    if before:
        member.die(hopeless=True)
    pool.change(table("options = {a = 1}"), POLICY, TIMES)
    pool.settle()
    if not before:
        member.die(hopeless=True)
        pool.settle()
    assert member not in pool.members
    assert pool.state == "starting", "calls wait for its successor"
    settle(pool)
    assert (pool.state, pool.slots, pool.is_settled) == ("ready", pool.members, True)


def test_a_member_and_its_successor_that_both_cannot_come_up_end_the_roll() -> None:
    pool = made()
    (member,) = pool.members
    pool.change(table("options = {a = 1}"), POLICY, TIMES)
    pool.settle()
    (successor,) = [slot for slot in pool.slots if slot is not member]
    successor.die(hopeless=True)
    member.die(hopeless=True)
    settle(pool)
    assert (pool.state, pool.setback, pool.is_settled) == ("failed", "it died", True)


def test_a_spare_of_another_edition_takes_no_members_place() -> None:
    pool = made("spare = 1")
    (member,) = pool.members
    pool.change(table("spare = 1\noptions = {a = 1}"), POLICY, TIMES)
    pool.settle()
    (spare,) = pool.spares
    spare.ready()
    member.die()
    assert (pool.members, pool.spares) == ([member], [spare]), "it may be warm, and refused by the broker"


def test_a_changed_pool_replaces_a_quarter_at_a_time() -> None:
    pool = made("min = 8")
    pool.change(table("min = 8\nconcurrency = 2"), POLICY, TIMES)
    pool.settle()
    assert len(pool.slots) == 10
    settle(pool)
    assert [slot.edition for slot in pool.members] == [2] * 8
    assert len(pool.slots) == 8
    assert pool.is_settled


def test_workers_that_the_broker_gives_no_more_calls_go_at_once_with_all_their_successors_starting() -> None:
    pool = made("min = 4")
    before = list(pool.members)
    pool.change(table("min = 4\nconcurrency = 2"), POLICY, TIMES)
    pool.settle()
    pool.supersede(2)
    assert [slot.child.state for slot in before] == [State.RETIRING] * 4
    assert [slot.edition for slot in pool.members] == [2] * 4


def test_a_spare_takes_the_place_of_a_member_that_dies_which_becomes_the_spare() -> None:
    pool = made("spare = 1")
    (member,), (spare,) = pool.members, pool.spares
    member.die()
    assert (pool.members, pool.spares) == ([spare], [member])
    assert (spare.is_called, member.is_spare) == (True, True)
    spare.ready()
    pool.settle()
    assert pool.state == "ready"
    assert not member.is_warm
    spare.die()
    assert pool.members == [spare], "no spare is warm yet: it starts again itself"


def test_spares_are_recruited_first_when_a_pool_grows_and_are_of_the_present_edition() -> None:
    pool = made("spare = 1")
    (spare,) = pool.spares
    pool.scale(2)
    assert pool.members[1] is spare
    settle(pool)
    (other,) = pool.spares
    pool.change(table("spare = 1\nconcurrency = 2"), POLICY, TIMES)
    settle(pool)
    assert other not in pool.slots
    assert [slot.edition for slot in pool.slots] == [2, 2]


def test_a_pool_that_closes_keeps_its_workers_until_nothing_waits_and_its_spares_no_longer() -> None:
    pool = made("min = 2\nspare = 1")
    pool.close("drained")
    settle(pool)
    assert (pool.state, len(pool.members), pool.spares) == ("closing", 2, [])
    pool.vacate()
    settle(pool)
    assert (pool.state, pool.slots, pool.reason) == ("closed", [], "drained")
    pool.scale(None)
    settle(pool)
    assert (pool.state, len(pool.members), len(pool.spares)) == ("ready", 2, 1)


def test_a_pool_that_failed_closes_at_once() -> None:
    pool = made()
    pool.members[0].die(hopeless=True)
    assert pool.state == "failed"
    pool.close("drained")
    settle(pool)
    assert (pool.state, pool.slots) == ("closed", [])


def test_a_pool_grows_by_demand_but_not_against_an_operators_word() -> None:
    pool = made("max = 4")
    busy = demand(waiting=50, wait_s=9.0, busy=1)
    pool.observe(busy)
    pool.adapt(1e9)
    assert pool.size == 2
    pool.scale(1)
    pool.observe(busy)
    pool.adapt(2e9)
    assert pool.size == 1
    pool.scale(None)
    pool.observe(busy)
    pool.adapt(3e9)
    assert pool.size == 2


def test_reading_the_configuration_again_does_not_end_a_burst() -> None:
    pool = made("max = 4")
    pool.observe(demand(waiting=50, wait_s=9.0, busy=1))
    pool.adapt(1e9)
    pool.resize(table("max = 4\nrate_per_s = 100"))
    assert pool.size == 2
    pool.resize(table())
    assert pool.size == 1


def test_a_pool_that_may_be_empty_has_a_worker_until_its_tools_are_known() -> None:
    pool: Any = Pool(FakeGround(), "t", table("min = 0\nmax = 2"), POLICY, TIMES)  # type: ignore[arg-type]
    pool.start()
    assert len(pool.members) == 1


def test_a_pool_without_workers_by_its_configuration_is_closed_and_says_so() -> None:
    pool = made("min = 0")
    assert (pool.state, pool.slots) == ("closed", [])
    assert "min = 0" in pool.reason
