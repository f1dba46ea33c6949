"""One simulated world: a broker, its supervisor, workers and clients, from one seed.

``random.Random(seed)`` decides everything, so that a seed and a number of steps replay exactly.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, suppress
from random import Random
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

from mcp_broker import limits
from mcp_broker.core.lifecycle import Treatment
from mcp_broker.core.restart import Policy
from mcp_broker.core.steering import WISHES, Steering
from mcp_broker.errors import InvalidTransition
from tests.sim.agenda import Agenda
from tests.sim.chronicle import Chronicle
from tests.sim.client import Client
from tests.sim.faults import Faults
from tests.sim.invariants import Invariants, Violation
from tests.sim.network import Network
from tests.sim.supervisor import Supervisor
from tests.sim.work import GET, OWN, PUT, ROWS, TAIL, Plan, Record, Wishes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mcp_broker.core.condition import Condition
    from mcp_broker.core.registry import Tool
    from tests.sim.worker import Worker

#: where the clock begins, and how long all may take to settle once nothing goes wrong any more (virtual seconds)
_BEGIN_S: Final = 1000.0
_SETTLE_S: Final = 60.0
#: the longest that one fault's consequences may last by themselves (a stall, a frozen connection, a silent cut)
_CALM_S: Final = 3.5
#: the broker speaks to idle clients every 5 s: by then it knows who has gone
_IDLE_S: Final = 6.5

#: what lasts too long for a run to see its end
_SHORT: Final = {
    "ORPHAN_S": 1.5,
    "BREAKER_OPEN_S": 0.3,
    "BREAKER_OPEN_S_MAX": 2.0,
    "HOOK_S": 1.0,
    "RECOVER_S": 3.0,
    "PENALTY_S_MAX": 1.0,
    "LADDER_QUIET_S": 5.0,
}
#: bounds so tight that a small world meets them
_TIGHT: Final = {
    "BATCH_MAX": 8,
    "CLIENT_WINDOW_MAX": 40,
    "PEER_BACKLOG_BYTES_MAX": 300_000,
    "QUEUE_BYTES_MAX": 300_000,
    "PRINCIPAL_QUEUE_CALLS_MAX": 40,
    "QUEUE_CALLS_MAX": 60,
    "BROKER_QUEUE_CALLS_MAX": 100,
    "TURN_MESSAGES_MAX": 4,
}


class World:
    """Everything, and the seed that decides it.

    Attributes:
        records: all calls that were ever made, by id.
        hanging_starts: so many of the next workers never come up.
        steps: things that have happened.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = self.rng = Random(seed)
        self.chronicle = Chronicle()
        self.agenda = Agenda(_BEGIN_S)
        self.invariants = Invariants(self)
        self.network = Network(self.agenda, rng, self.chronicle, rng.choice((0.0002, 0.001, 0.01, 0.05)))
        # one seed in four has a supervisor that gives up soon
        intensity = rng.choice((3, 1000, 1000, 1000))
        self.supervisor = Supervisor(self, Policy(intensity=intensity, healthy_s=1.0))
        self.pools = ["a", "b", "c"][: rng.randrange(1, 4)]
        for name in self.pools:
            self.supervisor.add_pool(name, rng.randrange(1, 4), rng.choice((1, 1, 1, 3)))
        self.records: dict[bytes, Record] = {}
        self.hanging_starts = 0
        self.steps = 0
        self.clients: list[Client] = []
        self._named = 0
        self.wishes = Wishes(rng, self.pools, rng.choice((0.0, 0.02, 0.2)))
        self.faults = Faults(self, rng.choice((0.0, 0.5, 2.0, 5.0)))
        self._burst_most = rng.choice((1, 4, 30))
        self._bursts_a_second = rng.choice((5.0, 30.0, 100.0)) * 2 / (1 + self._burst_most)
        self._is_quiet = False
        self._is_tight = rng.random() < 0.25
        for _ in range(rng.randrange(1, 5)):
            self._join()

    def note(self, who: str, what: str, *facts: Any) -> None:
        """Write an event down."""
        self.chronicle.note(self.agenda.now, who, what, *facts)

    def trouble(self, seconds: float) -> None:
        """Remember that no client can count on the broker for so long."""
        for client in self.clients:
            client.trouble(seconds)

    def peers(self) -> Iterator[Client | Worker]:
        """Return everybody who may have a connection."""
        yield from self.clients
        yield from self.supervisor.workers()

    def replace(self, client: Client) -> Client:
        """Let another client take this one's place; return it."""
        self.clients.remove(client)
        self._join()
        return client

    def _join(self) -> None:
        self._named += 1
        client = Client(self, f"client-{self._named}")
        self.clients.append(client)

    def describe(self) -> str:
        """Say what there is."""
        return (
            f"{len(self.clients)} clients, {len(self.supervisor.slots())} workers in {len(self.pools)} pools, "
            f"messages take about {self.network.latency_s * 1000:g} ms, {self.faults.a_second:g} faults a second"
            + (", tight bounds" if self._is_tight else "")
        )

    def summary(self, seconds: float) -> str:
        """Say what has happened.

        Args:
            seconds: of real time that it took.
        """
        codes = sorted(self.invariants.codes.items(), key=lambda item: -item[1])
        return "\n".join(
            (
                f"all held: {self.steps:,} steps, {self.agenda.now - _BEGIN_S:,.1f} virtual seconds in {seconds:.1f} s",
                f"{self.faults.count:,} faults, {self.supervisor.epoch} brokers, {self.supervisor.lifecycles} workers",
                f"{len(self.records):,} calls, {self.invariants.repeats:,} executions again",
                *(f"  {count:>9,} {code}" for code, count in codes),
            )
        )

    # -- running -----------------------------------------------------------------------------------------

    def run(self, steps: int, tell: Callable[[World], None] | None = None) -> None:
        """Let so many things happen while all may go wrong, then let all settle, and look whether it did.

        Args:
            tell: called now and then, for people.

        Raises:
            Violation: an invariant broke; the text says how to see it again.
        """
        try:
            with _bounds(_SHORT | (_TIGHT if self._is_tight else {})):
                self._go(steps, tell)
                self._settle()
        except Exception as error:
            raise Violation(self._story(error, steps)) from error

    def _go(self, steps: int, tell: Callable[[World], None] | None) -> None:
        self.supervisor.start()
        self._schedule(self._bursts_a_second, self._call)
        if self.faults.a_second:
            self._schedule(self.faults.a_second, self.faults.strike)
        for _ in range(steps):
            self._step()
            if tell is not None and self.steps % 10_000 == 0:
                tell(self)

    def _step(self) -> None:
        self.agenda.step()
        self.steps += 1

    def _story(self, error: Exception, steps: int) -> str:
        kind = "" if isinstance(error, Violation) else f"{type(error).__name__}: "
        return "\n".join(
            (
                f"{kind}{error}",
                f"seed {self.seed}, step {self.steps} of {steps}, at {self.agenda.now:.6f}; the last events:",
                *self.chronicle.lines(),
                f"{kind}{error}",
                f"again: make sim SEED={self.seed} STEPS={steps}",
            )
        )

    def _schedule(self, a_second: float, what: Callable[[], None]) -> None:
        """Let something happen again and again, at random."""

        def happen() -> None:
            if not self._is_quiet:
                what()
                self.agenda.after(self.rng.expovariate(a_second), happen)

        self.agenda.after(self.rng.expovariate(a_second), happen)

    def _call(self) -> None:
        """Let a client want something: some calls, or the end of one."""
        rng = self.rng
        client = rng.choice(self.clients)
        if client.open and rng.random() < 0.08:
            client.cancel(rng.choice(list(client.open.values())))
            return
        for _ in range(rng.randrange(1, self._burst_most + 1)):
            tool, timeout_s, plan = self.wishes.draw()
            client.submit(
                tool, timeout_s, plan, is_streamed=tool.endswith((ROWS, TAIL)) and rng.random() < 0.5
            )

    # -- the quiet period ----------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Let nothing more go wrong; then everything works, and in the end nothing is left."""
        self._is_quiet = True
        self.hanging_starts = 0
        self.note("world", "is quiet from now on")
        quiet_at = self.agenda.now
        self._run_until(lambda: self.agenda.now >= quiet_at + _CALM_S)
        self.supervisor.want_all()
        self._run_until(lambda: self._is_up and not self._is_owed)
        self._try_what_is_refused()
        self.note("world", "asks each tool once more")
        for client in self.clients:
            for tool in self._tools():
                plan = Plan(self.wishes.next_token(), parts=3 if tool.endswith((ROWS, TAIL)) else 0)
                record = client.submit(tool, 5.0, plan, is_streamed=False)
                assert record is not None
                record.is_proof = True
        self._run_until(lambda: not self._is_owed)
        idle_at = self.agenda.now
        self._run_until(lambda: self.agenda.now >= idle_at + _IDLE_S)
        self.invariants.settled()

    def _try_what_is_refused(self) -> None:
        """Call tools whose breakers are open, until a call of each that succeeds has closed it."""
        until = self.agenda.now + _SETTLE_S
        while refused := self._refused():
            self.note("world", "tries", refused)
            for condition in self._conditions():
                if condition.life.treatment is not Treatment.ACCEPT:
                    self.steer(condition.tool, "enable")
            for client in self.clients:
                for tool in refused:
                    parts = 3 if tool.endswith((ROWS, TAIL)) else 0
                    client.submit(tool, 5.0, Plan(self.wishes.next_token(), parts=parts), is_streamed=False)
            tried_at = self.agenda.now
            self._run_until(lambda at=tried_at: self.agenda.now >= at + 0.2 and not self._is_owed)  # type: ignore[misc]
            if self.agenda.now > until:
                raise Violation(f"{refused} are refused for {_SETTLE_S:g} s, and nothing is wrong with them")

    def steer(self, tool: Tool, name: str) -> None:
        """Do what an operator wants, where that can be done."""
        broker = self.supervisor.broker
        assert broker is not None
        machine = broker.machine
        self.note("operator", f"wants {name} of {tool.name}")
        condition = machine.health.lifecycles.of(tool)
        with suppress(InvalidTransition):
            WISHES[name][0](Steering(machine, condition, "by the operator", self.agenda.now))
        broker.stir()

    def _refused(self) -> list[str]:
        """Return the tools whose calls are not simply taken and given to workers."""
        return [
            condition.tool.name
            for condition in self._conditions()
            if not condition.is_plain or condition.life.treatment is not Treatment.ACCEPT
        ]

    def _conditions(self) -> list[Condition]:
        broker = self.supervisor.broker
        assert broker is not None
        tools = broker.machine.registry.tools.values()
        return [tool.condition for tool in tools if tool.condition is not None]

    def _tools(self) -> list[str]:
        return [OWN, *(f"{pool}.{name}" for pool in self.pools for name in (GET, PUT, ROWS, TAIL))]

    @property
    def _is_up(self) -> bool:
        """Tell whether every process runs, is known to the others, and has nothing left to stop."""
        broker, workers = self.supervisor.broker, self.supervisor.workers()
        if broker is None or not self.supervisor.is_up or len(workers) != len(self.supervisor.slots()):
            return False
        machine = broker.machine
        # a call that has ended may yet take its worker along
        is_free = not machine.dispatcher.ghosts and not machine.reconciliation.orphans
        return is_free and all(known.is_registered for known in machine.workers.by_id.values())

    @property
    def _is_owed(self) -> bool:
        return any(client.open for client in self.clients)

    def _run_until(self, is_so: Callable[[], bool]) -> None:
        until = self.agenda.now + _SETTLE_S
        while not is_so():
            self._step()
            if self.agenda.now > until:
                raise Violation(f"all did not settle within {_SETTLE_S:g} s")


@contextmanager
def _bounds(values: Mapping[str, float]) -> Iterator[None]:
    """Let the machines have other bounds for a while."""
    with ExitStack() as changes:
        for name, value in values.items():
            changes.enter_context(mock.patch.object(limits, name, value))
        yield
