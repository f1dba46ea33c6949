"""The supervisor: the real machines of its children, and around them what its slots and its broker child do.

Mirrors ``mcp_broker/supervisor/slot.py``, ``pool.py``, ``broker.py`` and ``loop.py``, without processes.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from mcp_broker.core import children
from mcp_broker.core.restart import Policy, Restarts
from mcp_broker.supervisor.broker import RESTART_POLICY
from mcp_broker.supervisor.records import Abandoned, Started
from mcp_broker.wire import codec, node
from mcp_broker.wire.reclaims import Reclaim
from tests.sim.agenda import Alarm
from tests.sim.broker import Broker
from tests.sim.worker import Worker

if TYPE_CHECKING:
    from mcp_broker.wire.messages import ToolDefinition
    from tests.sim.shell import Shell
    from tests.sim.world import World

NAME: Final = "supervisor"

#: from spawned to ready, at most, seconds: less than the product's, for a run to see it
_START_S: Final = 2.0
#: from retired to being told to end, at most, seconds
_RETIRE_S: Final = 8.0
#: a worker in these may run calls
_AT_WORK: Final = frozenset((children.State.RUNNING, children.State.RETIRING))
#: a message of the socketpair takes up to this long
_LINK_S: Final = 0.001
#: a process is up after at most this long
_BOOT_S: Final = 0.1
#: what the dead left is taken back within this time
_RECLAIM_S: Final = 0.01
#: a death is seen after at most this long
_REAP_S: Final = 0.005


class Slot:
    """Keeps one worker of a pool as wanted."""

    def __init__(self, owner: Supervisor, pool: PoolSlots, restarts: Restarts) -> None:
        self._owner = owner
        self._pool = pool
        self.edition = pool.edition
        self.child = children.Child(restarts, start_s=_START_S, retire_s=_RETIRE_S)
        self.life: Worker | None = None
        self._was_ready = False
        self._alarm = Alarm(owner.world.agenda, self._expire)

    def tell(self, event: children.Event) -> None:
        """Feed the machine, and do what it says."""
        if isinstance(event, children.BecameReady):
            self._was_ready = True
        self._perform(self.child.handle(event, self._owner.world.agenda.now))

    def _expire(self) -> None:
        self._perform(self.child.expire(self._owner.world.agenda.now))

    def _perform(self, effects: list[children.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, children.Spawn):
                self._spawn()
            elif isinstance(effect, children.Dismiss):
                if self.life is not None:
                    self._owner.send(node.Retire((self.life.name,)))
            elif isinstance(effect, children.Signal):
                if self.life is not None:
                    self.life.terminate()
            elif isinstance(effect, children.Kill):
                if self.life is not None:
                    self.life.die("killed by its supervisor")
            else:
                self._owner.world.note(NAME, f"a worker of {self._pool.name}:", effect.state.value)
                self._owner.report()
        deadline = self.child.deadline()
        if deadline is not None:
            self._alarm.set(deadline)
        else:
            self._alarm.clear()

    def _spawn(self) -> None:
        owner, world = self._owner, self._owner.world
        worker_id = owner.next_worker_id(self._pool.name)
        self._was_ready = False
        life = self.life = Worker(world, worker_id, self._pool.name, self._pool.concurrency, self.edition)
        owner.send(node.Admit((self.admitted,)))
        if world.hanging_starts:
            world.hanging_starts -= 1
            world.note(worker_id, "hangs in its start")
        else:
            world.agenda.after(world.rng.random() * _BOOT_S, life.boot)
        self.tell(children.Spawned())

    @property
    def admitted(self) -> node.Admitted:
        """What the broker lets in for the present life."""
        assert self.life is not None
        return node.Admitted(
            thumbprint=self.life.key, worker_id=self.life.name, pool=self._pool.name, edition=self.edition
        )

    def interrupt(self, order: node.Interrupt) -> None:
        """End one call of this worker, as far as that is still the call that runs."""
        life = self.life
        if life is None or life.is_dead or self.child.state not in _AT_WORK:
            return
        if order.stage == "raise":
            life.marks.interrupt_seq = order.seq
            life.interrupt()
            return
        if order.why == "silence" and life.marks.spared_until > self._owner.world.agenda.now:
            return
        started = life.marks.started_seq
        seq = started if order.seq == node.WHATEVER else order.seq
        if seq > started or (self._pool.concurrency == 1 and seq < started):
            return
        if order.stage == "term":
            life.terminate()
        else:
            life.die("killed for its call")

    def ended(self, how: str) -> None:
        """The process is reaped."""
        owner, life = self._owner, self.life
        assert life is not None
        certificate = node.Certificate(
            worker_id=life.name, pool=self._pool.name, pid=1, cause=how, kind="signal", started_seq=life.marks.started_seq
        )  # fmt: skip
        owner.send(node.Died(certificate, life.marks.started_calls()))
        self.life = None
        pool = self._pool
        self.tell(
            children.Died(
                how, charged=self._was_ready and life.marks.started_seq > 0, jitter=owner.world.rng.random()
            )
        )
        pool.leaving = [slot for slot in pool.leaving if slot.child.state is not children.State.STOPPED]
        owner.tidy()
        # what it left is taken back behind all that: nobody waits for it
        taken = Reclaim(worker_id=life.name, pool=self._pool.name, pid=1, level="process")
        owner.world.agenda.after(_RECLAIM_S, lambda: owner.send(node.Reclaimed(taken)))


class PoolSlots:
    """Workers of one kind.

    Attributes:
        edition: of the tools that new workers bring.
        slots: those that are wanted.
        leaving: those that retire.
    """

    def __init__(self, owner: Supervisor, name: str, size: int, concurrency: int, policy: Policy) -> None:
        self.name = name
        self.concurrency = concurrency
        self.edition = 1
        self._owner = owner
        restarts = self._restarts = Restarts(policy)
        self.tools: tuple[ToolDefinition, ...] = ()
        self.slots = [Slot(owner, self, restarts) for _ in range(size)]
        self.leaving: list[Slot] = []
        #: it goes when its processes have ended
        self.is_dissolving = False

    def replace(self, slot: Slot) -> None:
        """Retire a slot and put a new one in its place; the pool is never without any."""
        successor = Slot(self._owner, self, self._restarts)
        self.slots[self.slots.index(slot)] = successor
        self.leaving.append(slot)
        successor.tell(children.Wanted())
        slot.tell(children.Retire())

    def supersede(self, edition: int) -> None:
        """Let all go that have earlier tools: the broker gives them no more calls."""
        for slot in [slot for slot in self.slots if slot.edition < edition]:
            self.replace(slot)

    def open(self) -> None:
        """Want a worker up; what was given up, or was to go, starts afresh."""
        self.is_dissolving = False
        if not self.slots:
            self.slots.append(Slot(self._owner, self, self._restarts))
        for slot in self.slots:
            slot.tell(children.Wanted())

    def dissolve(self) -> None:
        """Have no workers any more, and then no pool."""
        self.is_dissolving = True
        self.leaving += self.slots
        self.slots = []
        for slot in self.leaving:
            slot.tell(children.Unwanted())
        self._owner.tidy()

    def retiring(self) -> tuple[str, ...]:
        """Return the workers that the broker is to send away."""
        return tuple(
            slot.life.name
            for slot in self.leaving
            if slot.life is not None and slot.child.state is children.State.RETIRING
        )

    @property
    def state(self) -> node.PoolState:
        """One of ready, degraded, failed, starting, closed."""
        if self.is_dissolving:
            return "closed"
        states = [slot.child.state for slot in self.slots]
        if all(state is children.State.RUNNING for state in states):
            return "ready"
        if all(state is children.State.FATAL for state in states):
            return "failed"
        if children.State.FATAL in states or children.State.BACKOFF in states:
            return "degraded"
        return "starting"

    def report(self) -> node.PoolReport:
        """Return what the broker is told."""
        reason = next((slot.child.reason for slot in self.slots if slot.child.reason), "")
        if self.is_dissolving:
            reason = "its tool is not served apart"
        return node.PoolReport(name=self.name, state=self.state, wanted=len(self.slots), reason=reason)


class Supervisor:
    """Keeps the broker and all workers up.

    Attributes:
        epoch: of the last broker that was started.
        lives: workers that were ever started.
    """

    def __init__(self, world: World, policy: Policy) -> None:
        self.world = world
        self._policy = policy
        self.pools: list[PoolSlots] = []
        self.epoch = 0
        self.broker: Broker | None = None
        self.broker_child = children.Child(Restarts(RESTART_POLICY))
        self._broker_alarm = Alarm(world.agenda, self._expire_broker)
        self.lifecycles = 0
        self._deaths: deque[node.Certificate] = deque(maxlen=8)
        self._started = Started()
        self._abandoned = Abandoned()
        self._to_broker: deque[tuple[Broker, bytes]] = deque()
        self._from_broker: deque[tuple[Broker, bytes]] = deque()
        self._link_at = 0.0
        self._standings = node.Standings(())

    def add_pool(self, name: str, size: int, concurrency: int) -> None:
        """Keep so many workers of one kind."""
        self.pools.append(PoolSlots(self, name, size, concurrency, self._policy))

    def start(self) -> None:
        """Want everything up."""
        self._perform_broker(self.broker_child.handle(children.Wanted(), self.world.agenda.now))
        self.want_all()

    def tidy(self) -> None:
        """Have those pools no more that were to go, and whose processes have ended."""
        for pool in [one for one in self.pools if one.is_dissolving]:
            pool.leaving = [slot for slot in pool.leaving if slot.child.is_alive]
            if not pool.leaving:
                self.pools.remove(pool)

    def want_all(self) -> None:
        """Want every worker up; what was given up starts afresh."""
        for pool in self.pools:
            for slot in pool.slots:
                slot.tell(children.Wanted())

    def slots(self) -> list[Slot]:
        """Return every slot, the retiring ones too."""
        return [slot for pool in self.pools for slot in (*pool.slots, *pool.leaving)]

    def change(self, pool: PoolSlots) -> None:
        """Have workers bring a new version of their tools, one first."""
        pool.edition += 1
        self.retire(pool)

    def retire(self, pool: PoolSlots) -> None:
        """Replace one worker of a pool, if one runs."""
        running = [slot for slot in pool.slots if slot.child.state is children.State.RUNNING]
        if running:
            slot = self.world.rng.choice(running)
            assert slot.life is not None
            self.world.note(NAME, "retires", slot.life.name)
            pool.replace(slot)

    def workers(self) -> list[Worker]:
        """Return every worker that lives."""
        return [slot.life for slot in self.slots() if slot.life is not None and not slot.life.is_dead]

    def next_worker_id(self, pool: str) -> str:
        """Return an id that no worker had before."""
        self.lifecycles += 1
        return f"{pool}-{self.lifecycles}"

    def worker_ends(self, worker: Shell, how: str) -> None:
        """A worker's process is gone; it is seen a little later."""
        slot = next(slot for slot in self.slots() if slot.life is worker)
        self.world.agenda.after(self.world.rng.random() * _REAP_S, lambda: slot.ended(how))

    @property
    def is_up(self) -> bool:
        """Tell whether everything is as it is wanted."""
        return self.broker_child.state is children.State.RUNNING and all(
            slot.child.state is children.State.RUNNING for slot in self.slots()
        )

    # -- the link to the broker ------------------------------------------------------------------------

    def send(self, message: node.FromSupervisor) -> None:
        """Tell the broker, if there is one; the next one is briefed anew."""
        if isinstance(message, node.Died):
            self._deaths.appendleft(message.certificate)
            if message.started_calls:
                self._started.add(message.certificate, message.started_calls)
        broker, agenda = self.broker, self.world.agenda
        if broker is None:
            return
        packed = codec.encode(message)
        self.world.chronicle.sent(packed)
        self._to_broker.append((broker, packed))
        self._link_at = max(self._link_at, agenda.now + self.world.rng.random() * _LINK_S)
        agenda.at(self._link_at, self._to_broker_arrives)

    def _to_broker_arrives(self) -> None:
        broker, packed = self._to_broker.popleft()
        broker.hear_supervisor(packed)

    def hear_broker(self, broker: Broker, packed: bytes) -> None:
        """Have a message of the broker on its way."""
        self._from_broker.append((broker, packed))
        agenda = self.world.agenda
        self._link_at = max(self._link_at, agenda.now + self.world.rng.random() * _LINK_S)
        agenda.at(self._link_at, self._from_broker_arrives)

    def _from_broker_arrives(self) -> None:
        broker, packed = self._from_broker.popleft()
        message = codec.to_supervisor.decode(packed)
        if isinstance(message, node.Abandoned):
            self._abandoned.add(message.call_ids)
        if broker is not self.broker:
            return
        if isinstance(message, node.Serving):
            self._tell_broker(children.BecameReady())
        elif isinstance(message, node.WorkerUp):
            for pool in self.pools:
                if any(
                    slot.life is not None and slot.life.name == message.worker_id
                    for slot in (*pool.slots, *pool.leaving)
                ):
                    pool.tools = message.tools
            self._tell_worker(message.worker_id, children.BecameReady())
        elif isinstance(message, node.WorkerRefused):
            self._tell_worker(message.worker_id, children.Refused(message.reason))
        elif isinstance(message, node.Superseded):
            self._supersede(message)
        elif isinstance(message, node.Standings | node.Replace | node.Isolate):
            self._recover(message)
        elif isinstance(message, node.Interrupt):
            for slot in self.slots():
                if slot.life is not None and slot.life.name == message.worker_id:
                    slot.interrupt(message)

    def _supersede(self, message: node.Superseded) -> None:
        for pool in self.pools:
            if pool.name == message.pool:
                pool.supersede(message.edition)

    def _recover(self, wish: node.Standings | node.Replace | node.Isolate) -> None:
        """Do what the broker wants done about tools that fail."""
        if isinstance(wish, node.Standings):
            self._standings = wish
        elif isinstance(wish, node.Isolate):
            self._isolate(f"{wish.pool}~{wish.tool}", wanted=wish.wanted)
        else:
            for pool in self.pools:
                for slot in list(pool.slots):
                    if slot.life is not None and slot.life.name == wish.worker_id:
                        pool.replace(slot)

    def _isolate(self, name: str, *, wanted: bool) -> None:
        """Have a pool of one tool, or no more."""
        pool = next((pool for pool in self.pools if pool.name == name), None)
        if pool is None and wanted:
            self.add_pool(name, 1, 1)
            pool = self.pools[-1]
        if pool is None:
            return
        if wanted:
            pool.open()
        else:
            pool.dissolve()

    def _tell_worker(self, worker_id: str, event: children.Event) -> None:
        for slot in self.slots():
            if slot.life is not None and slot.life.name == worker_id:
                slot.tell(event)

    def report(self) -> None:
        """Tell the broker what it sees."""
        self.send(node.Report(tuple(pool.report() for pool in self.pools)))

    # -- the broker's process -----------------------------------------------------------------------------

    def _tell_broker(self, event: children.Event) -> None:
        self._perform_broker(self.broker_child.handle(event, self.world.agenda.now))

    def _expire_broker(self) -> None:
        self._perform_broker(self.broker_child.expire(self.world.agenda.now))

    def _perform_broker(self, effects: list[children.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, children.Spawn):
                self._spawn_broker()
            elif isinstance(effect, children.Signal | children.Kill):
                self.kill_broker()
        deadline = self.broker_child.deadline()
        if deadline is not None:
            self._broker_alarm.set(deadline)
        else:
            self._broker_alarm.clear()

    def _spawn_broker(self) -> None:
        world = self.world
        self.epoch += 1
        broker = self.broker = Broker(world, self.epoch)
        world.note(NAME, f"starts broker {self.epoch}")
        living = tuple(slot.admitted for slot in self.slots() if slot.life is not None)
        self.send(_boot(self.epoch))
        self.send(node.Admit(living))
        self.send(self._started.told(tuple(self._deaths)))
        for told in self._abandoned.told():
            self.send(told)
        for pool in self.pools:
            if pool.tools:
                self.send(node.Tools(pool.name, pool.tools))
            if retiring := pool.retiring():
                self.send(node.Retire(retiring))
        self.send(self._standings)
        self.report()
        self._tell_broker(children.Spawned())
        world.agenda.after(_LINK_S + world.rng.random() * _BOOT_S, lambda: self._broker_boots(broker))

    @staticmethod
    def _broker_boots(broker: Broker) -> None:
        if not broker.is_dead:
            broker.serve()

    def kill_broker(self) -> None:
        """SIGKILL it: what it had not sent is lost, and some of what it had."""
        broker = self.broker
        if broker is not None and not broker.is_dead:
            self.world.note(NAME, f"broker {broker.epoch} is killed")
            broker.end(kept=0)
            self._broker_is_gone("killed")

    def broker_exits(self, broker: Broker) -> None:
        """It was drained: what it sent arrives."""
        self.world.note(NAME, f"broker {broker.epoch} has drained and exits")
        broker.end(kept=None)
        self._broker_is_gone("exit 0")

    def _broker_is_gone(self, how: str) -> None:
        world = self.world
        # what it had written to the link is read before the next one is started
        for _, packed in self._from_broker:
            message = codec.to_supervisor.decode(packed)
            if isinstance(message, node.Abandoned):
                self._abandoned.add(message.call_ids)
        self.broker = None
        for client in world.clients:
            client.troubled_until = max(client.troubled_until, world.agenda.now)
        died = children.Died(how, jitter=world.rng.random())
        world.agenda.after(world.rng.random() * _REAP_S, lambda: self._tell_broker(died))


def _boot(epoch: int) -> node.Boot:
    """Make a broker's first message: of what it says, only the lineage matters here."""
    return node.Boot(
        epoch=epoch,
        client_fd=0,
        worker_fd=0,
        client_endpoint="",
        worker_endpoint="",
        client_secret=b"",
        worker_secret=b"",
        issuer_keys={},
        issuer="",
        audience="",
        limits={},
        supervisor_pid=1,
        started_wall=0.0,
        lineage="sim",
    )
