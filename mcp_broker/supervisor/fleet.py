"""All pools of a supervisor: who of them is meant, and what they amount to."""

from __future__ import annotations

import difflib
import time
from typing import TYPE_CHECKING

from mcp_broker.core.children import State
from mcp_broker.core.restart import Policy
from mcp_broker.errors import NotFound
from mcp_broker.supervisor import events, standing
from mcp_broker.supervisor.containment import contained
from mcp_broker.supervisor.metering import Metering
from mcp_broker.supervisor.pool import Pool
from mcp_broker.supervisor.recovery import APART, alone
from mcp_broker.supervisor.slot import Times
from mcp_broker.wire import node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mcp_broker.config import Config, PoolTable
    from mcp_broker.supervisor.changes import Changes
    from mcp_broker.supervisor.ground import Ground
    from mcp_broker.supervisor.records import Definitions
    from mcp_broker.supervisor.slot import Slot
    from mcp_broker.wire.messages import ToolDefinition


#: what the broker says about pools and workers
Word = node.WorkerUp | node.WorkerRefused | node.Interrupt | node.Demand | node.Vacant | node.Superseded


class Fleet:
    """The pools of one node.

    Args:
        ground: what their slots stand on.
        definitions: what the pools served last, in an earlier life.
        on_event: told when a pool is ready or given up.
    """

    def __init__(
        self,
        ground: Ground,
        config: Config,
        definitions: Definitions,
        on_event: Callable[[events.Event], None],
    ) -> None:
        self._ground = ground
        self.pools: dict[str, Pool] = {}
        for name, table in config.pools.items():
            self.pools[name] = Pool(ground, name, table, *_ways(config))
        self._policy, self._times = _ways(config)
        self._metering = Metering(ground, self)
        self._definitions = definitions
        for name, tools in definitions.load().items():
            if name in self.pools:
                self.pools[name].tools = tools
        self._on_event = on_event
        #: pools that go when their processes have ended
        self._dissolving: set[str] = set()
        #: as it was announced last
        self._states: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The pools' names, in the order of the configuration."""
        return tuple(self.pools)

    @property
    def slots(self) -> list[Slot]:
        """Every slot of every pool."""
        return [slot for pool in self.pools.values() for slot in pool.slots]

    def find(self, worker_id: str) -> Slot | None:
        """Return the slot whose present life has this id."""
        found = (pool.find(worker_id) for pool in self.pools.values())
        return next((slot for slot in found if slot is not None), None)

    def find_pool(self, name: str) -> Pool:
        """Return the pool of this name.

        Raises:
            NotFound: there is none.
        """
        pool = self.pools.get(name)
        if pool is None:
            near = difflib.get_close_matches(name, self.pools, n=2)
            meant = f"did you mean {' or '.join(near)}" if near else f"there are {', '.join(self.pools)}"
            details = {"name": name, "did_you_mean": near, "hint": "mcp-broker status"}
            raise NotFound(f"there is no pool {name!r}; {meant}", details)
        return pool

    def pool_of(self, worker_id: str) -> Pool:
        """Return the pool that this worker is of.

        Raises:
            NotFound: there is no such worker.
        """
        for pool in self.pools.values():
            if pool.find(worker_id) is not None:
                return pool
        raise NotFound(f"there is no worker {worker_id!r}", {"name": worker_id, "hint": "mcp-broker ps"})

    # -- orders --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Want every pool up."""
        for pool in self.pools.values():
            pool.start()

    def stop(self) -> None:
        """Want every pool down."""
        for pool in self.pools.values():
            with contained(f"stopping pool {pool.name}"):
                pool.stop()

    def settle(self) -> None:
        """Go on with what has changed in this turn."""
        for pool in self.pools.values():
            with contained(f"settling pool {pool.name}"):
                pool.settle()
        for name in [name for name in self._dissolving if self.pools[name].is_stopped]:
            self._dissolving.discard(name)
            del self.pools[name]
            self._states.pop(name, None)
            self._definitions.save(self.tools())
            self._ground.changed()

    def replace(self, worker_id: str, why: str) -> bool:
        """Have another process take a worker's place; False: there is none of this id, or that is under way."""
        for pool in self.pools.values():
            slot = pool.find(worker_id)
            if slot is not None:
                return pool.replace(slot, why)
        return False

    def found(self, name: str, table: PoolTable) -> None:
        """Have a pool that no configuration names; one that is there starts afresh."""
        if name in self.pools:
            self._dissolving.discard(name)
            self.pools[name].scale(None)
        else:
            self.pools[name] = Pool(self._ground, name, table, self._policy, self._times)
            self.pools[name].start()
        self._ground.changed()

    def dissolve(self, name: str) -> None:
        """Have such a pool no more, once its processes have ended."""
        if name in self.pools:
            self._dissolving.add(name)
            pool = self.pools[name]
            pool.close("its tool is not served apart")
            # without members, there is none that could be replaced
            pool.vacate()
            pool.stop()

    def follow(self, config: Config, changes: Changes) -> None:
        """Have the pools follow another configuration: ``changes`` says what is different."""
        ways = self._policy, self._times = _ways(config)
        for name in changes.removed:
            for one in [name, *self._apart(name)]:
                self._dissolving.add(one)
                self.pools[one].close("it was taken out of the configuration")
        for name in changes.added:
            if name in self.pools:
                # it was on its way out
                self._dissolving.discard(name)
                self.pools[name].change(config.pools[name], *ways)
                continue
            pool = self.pools[name] = Pool(self._ground, name, config.pools[name], *ways)
            pool.start()
        for name in changes.changed:
            self.pools[name].change(config.pools[name], *ways)
            for one in self._apart(name):
                self.pools[one].change(alone(config.pools[name]), *ways)
        for name in (*changes.resized, *changes.unchanged):
            pool = self.pools[name]
            pool.adjust(*ways)
            if name in changes.resized:
                pool.resize(config.pools[name])
                pool.start()
            elif pool.state == "failed":
                # what made it fail may be mended
                pool.start()
            pool.setback = ""

    def _apart(self, name: str) -> list[str]:
        """Return the pools of single tools of a pool."""
        return [other for other in self.pools if other.startswith(f"{name}{APART}")]

    def kill(self) -> None:
        """SIGKILL every worker, now."""
        for slot in self.slots:
            with contained("killing a worker"):
                slot.kill()

    def close(self) -> None:
        """Leave nothing behind; every worker is gone."""
        self._metering.close()

    # -- what happens --------------------------------------------------------------------------------

    def worker_up(self, worker_id: str, tools: tuple[ToolDefinition, ...]) -> None:
        """Take the broker's word that a worker is ready."""
        before = self.tools()
        for pool in self.pools.values():
            pool.worker_up(worker_id, tools)
        slot = self.find(worker_id)
        if slot is not None:
            with contained("hearing a worker out"):
                slot.hear_out()
            self._metering.began(slot, time.monotonic())
        now = self.tools()
        if now != before:
            self._definitions.save(now)

    def worker_refused(self, worker_id: str, reason: str) -> None:
        """Take the broker's word that a worker will not become ready."""
        for pool in self.pools.values():
            pool.worker_refused(worker_id, reason)

    def heard(self, word: Word) -> None:
        """Take the broker's word about pools and their workers."""
        if isinstance(word, node.WorkerUp):
            self.worker_up(word.worker_id, word.tools)
        elif isinstance(word, node.WorkerRefused):
            self.worker_refused(word.worker_id, word.reason)
        elif isinstance(word, node.Interrupt):
            self.interrupt(word)
        elif isinstance(word, node.Demand):
            self.asked(word)
        elif isinstance(word, node.Vacant):
            self.vacant(word.pool)
        else:
            self.superseded(word.pool, word.edition)

    def asked(self, demand: node.Demand) -> None:
        """Take the broker's word on what is asked of pools; about one that is no more it means nothing."""
        now = time.monotonic()
        for one in demand.pools:
            pool = self.pools.get(one.name)
            if pool is not None:
                pool.observe(one)
                pool.adapt(now)

    def vacant(self, name: str) -> None:
        """Take the broker's word that no call waits for a pool that closes."""
        if name in self.pools:
            self.pools[name].vacate()

    def superseded(self, name: str, edition: int) -> None:
        """Take the broker's word that workers of earlier editions of a pool get no more calls."""
        if name in self.pools:
            self.pools[name].supersede(edition)

    def interrupt(self, order: node.Interrupt) -> None:
        """End one call of a worker; about one that is gone it means nothing."""
        slot = self.find(order.worker_id)
        if slot is not None:
            slot.interrupt(order)

    def deadlines(self) -> Iterator[float]:
        """Return the instants at which pools have something to do."""
        yield self._metering.deadline()
        for pool in self.pools.values():
            yield from pool.deadlines()

    def expire(self, now: float) -> None:
        """Do what is due."""
        with contained("measuring workers"):
            self._metering.expire(now)
        for slot in self.slots:
            with contained("what a worker's time had come for"):
                slot.expire(now)

    def sample(self) -> None:
        """Read what the workers cost now that are not measured, and let pools adapt to what is asked of them."""
        now = time.monotonic()
        for pool in self.pools.values():
            with contained(f"adapting pool {pool.name}"):
                pool.adapt(now)
        for slot in self.slots:
            if slot.life is not None and slot.life.metered is None:
                with contained("looking at a worker"):
                    slot.life.sample()

    # -- what they amount to ---------------------------------------------------------------------------

    @property
    def is_stopped(self) -> bool:
        """No process is left, and none will come."""
        return all(pool.is_stopped for pool in self.pools.values())

    def alive(self) -> dict[int, str]:
        """Return the worker processes: pid -> worker id."""
        lives = (slot.life for slot in self.slots if slot.life is not None)
        return {
            life.process.pid: life.worker_id
            for life in lives
            if life.process is not None and life.process.pid
        }

    def admissions(self) -> node.Admit:
        """Return every key that may come in."""
        return node.Admit(tuple(slot.life.admitted for slot in self.slots if slot.life is not None))

    def endpoints(self) -> list[tuple[node.Listen, int]]:
        """Return the addresses that belong to one worker each, with their listening sockets."""
        lives = (slot.life for slot in self.slots if slot.life is not None)
        return [
            (life.listen(life.endpoint), life.endpoint.fileno())
            for life in lives
            if life.endpoint is not None
        ]

    def retirement(self) -> list[node.Retire]:
        """Return the workers that are to be sent away, if there are any."""
        workers = tuple(id_ for pool in self.pools.values() for id_ in pool.retiring())
        return [node.Retire(workers)] if workers else []

    def tools(self) -> list[node.Tools]:
        """Return what each pool served so far."""
        return [node.Tools(pool.name, pool.tools) for pool in self.pools.values() if pool.tools]

    def report(self) -> node.Report:
        """Return what the broker tells those who ask."""
        return node.Report(tuple(standing.report(pool) for pool in self.pools.values()))

    def announce(self) -> None:
        """Say which pools became ready, or are given up, since the last time."""
        for pool in self.pools.values():
            before, now = self._states.get(pool.name), pool.state
            if now == before:
                continue
            self._states[pool.name] = now
            if now == "ready":
                self._on_event(events.PoolReady(pool.name, pool.ready, pool.tool_names))
            elif any(slot.child.state is State.FATAL for slot in pool.members):
                self._on_event(events.PoolFailed(pool.name, pool.reason))


def _ways(config: Config) -> tuple[Policy, Times]:
    """Return what a configuration says of all pools' processes."""
    wanted = config.limits
    policy = Policy(intensity=wanted.restarts, period_s=wanted.restart_period_s)
    return policy, Times(start_s=wanted.start_s, retire_s=wanted.retire_s)
