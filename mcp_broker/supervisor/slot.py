"""One worker slot: a Child machine, and the process that it has just now."""

from __future__ import annotations

import functools
import logging
import random
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mcp_broker import limits, logs
from mcp_broker.core import children
from mcp_broker.errors import SupervisionError
from mcp_broker.supervisor import containment, quota, reclaim
from mcp_broker.supervisor.certificates import IMPORT_FAILED, Circumstances, Exceeded, Interrupted, certify
from mcp_broker.supervisor.isolation import attestation
from mcp_broker.supervisor.isolation.plan import Unattainable
from mcp_broker.supervisor.launch import WorkerOrder
from mcp_broker.supervisor.life import Life
from mcp_broker.supervisor.process import SHORTAGES, no_start
from mcp_broker.supervisor.tether import Tether
from mcp_broker.wire import codec, node
from mcp_broker.wire.tether import Asks, Go, Warm

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_broker.config import PoolTable
    from mcp_broker.core.restart import Restarts
    from mcp_broker.supervisor.ground import Ground
    from mcp_broker.supervisor.process import Exit
    from mcp_broker.supervisor.tether import Handlers
_log = logging.getLogger("mcp_broker.supervisor")

#: a worker in these may run calls
_AT_WORK: Final = frozenset((children.State.RUNNING, children.State.RETIRING))
#: A dead worker's process becomes a spare only then: its start would take the cores from the spare that takes its place,
#: which serves after 30 to 42 ms then; at sandboxed it took 48 to 62.
_SPARE_REST_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Times:
    """How long the processes of a pool may take, at most, seconds.

    Args:
        start_s: from spawned to ready.
        retire_s: from being retired to being told to end.
    """

    start_s: float
    retire_s: float


class Slot:
    """Keeps one worker of a pool as wanted.

    Args:
        pool: the pool's name.
        restarts: the record of deaths that the pool's slots share.
        edition: which form of the pool's table it has.
        is_spare: its processes import their tools, and wait to be called up.
        on_death: told that its process has died, before it is decided what comes next.
    """

    def __init__(
        self,
        ground: Ground,
        pool: str,
        table: PoolTable,
        restarts: Restarts,
        times: Times,
        *,
        edition: int,
        is_spare: bool,
        on_death: Callable[[Slot], None],
    ) -> None:
        self._ground = ground
        self._pool = pool
        self.table = table
        self.edition = edition
        self.is_spare = is_spare
        self._on_death = on_death
        self.child = children.Child(restarts, start_s=times.start_s, retire_s=times.retire_s)
        self.life: Life | None = None
        #: registered at least once in this life
        self._was_ready = False
        #: why it was retired, if it was
        self._retired_why = ""

    # -- what happens --------------------------------------------------------------------------------

    def registered(self) -> None:
        """Take the broker's word that the worker serves; one that lacks its walls is killed, and its pool given up."""
        life = self.life
        if life is None or life.process is None or life.cell is None:
            return
        lacks = attestation.fault(life.process.main_pid, life.cell.confinement)
        if lacks:
            self.tell(children.Refused(f"worker {life.worker_id} is not confined: {lacks}"))
            self.kill()
        else:
            self.tell(children.BecameReady())

    def hear_out(self) -> None:
        """Take what the worker has said so far: its tools' limits it told before it came to the broker."""
        if self.life is not None and self.life.tether is not None:
            self.life.tether.drain()

    def tell(self, event: children.Event) -> None:
        """Feed the machine, and do what it says."""
        if isinstance(event, children.Wanted) and self._ground.is_stopping:
            # whoever wants it was told before, or waits for what will not come
            return
        if isinstance(event, children.BecameReady):
            self._was_ready = True
        self._perform(self.child.handle(event, time.monotonic()))

    def expire(self, now: float) -> None:
        """Do what is due."""
        self._perform(self.child.expire(now))

    @property
    def is_born(self) -> bool:
        """It has a process just now."""
        life = self.life
        return life is not None and life.process is not None and bool(life.process.pid)

    @property
    def is_warm(self) -> bool:
        """A spare that can be called up."""
        return self.is_spare and self.child.state is children.State.RUNNING

    def retire(self, why: str) -> None:
        """Let the worker finish its calls and go; ``why`` goes into its certificate."""
        self._retired_why = why
        self.tell(children.Retire())

    def call_up(self) -> None:
        """Have a warm spare connect to the broker and serve."""
        life = self.life
        assert life is not None  # noqa: S101 (it is warm)
        assert life.tether is not None  # noqa: S101
        life.tether.send(Go())
        self.is_spare = life.is_spare = self._was_ready = False
        self.tell(children.CalledUp())

    def interrupt(self, order: node.Interrupt) -> None:
        """End one call of this worker, as far as that is still the call that runs."""
        life = self.life
        # before it is ready it has no handler, so the signal would kill what runs no call
        if life is None or life.process is None or self.child.state not in _AT_WORK:
            return
        if order.stage == "raise":
            life.marks.interrupt_seq = order.seq
            # whom SIGTERM was sent ends for that, whatever else is asked of it meanwhile
            if life.interrupted is None or life.interrupted.stage == "raise":
                life.interrupted = Interrupted(order.seq, order.stage, order.why)
            life.process.signal(signal.SIGUSR1)
            # the worker ends what its call started, as far as it can be seen to be the call's; the rest is a stray
            self._ground.strayed()
            return
        if (
            order.why == "silence"
            and 0 < life.marks.spared_until - time.monotonic() < limits.CALL_TIMEOUT_S_MAX
        ):
            # it runs a detached call, of which the broker can know only when it has ended
            return
        started = life.marks.started_seq
        seq = started if order.seq == node.WHATEVER else order.seq
        # not started: CANCEL reaches it in time; and one call at a time means that an earlier one has ended.
        # Either way the process now runs somebody else's call, or none.
        if seq > started or (self.table.concurrency == 1 and seq < started):
            return
        life.interrupted = Interrupted(seq, order.stage, order.why)
        if order.stage == "term":
            life.ask_stack()
            life.process.signal(signal.SIGTERM)
        else:
            life.process.kill()

    def exceed(self, exceeded: Exceeded) -> None:
        """Take note that this worker is over a limit, and ask for its stacks; whoever tells so kills it soon after."""
        life = self.life
        if life is None or life.exceeded is not None or self.child.state not in _AT_WORK:
            return
        life.exceeded = exceeded
        life.ask_stack()

    def kill(self) -> None:
        """SIGKILL whatever there is, now."""
        if self.life is not None and self.life.process is not None:
            self.life.process.kill()

    # -- what the machine wants ------------------------------------------------------------------------

    def _perform(self, effects: list[children.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, children.Spawn):
                self._try_to_spawn()
            elif isinstance(effect, children.Dismiss):
                if self.life is not None:
                    self._ground.dismiss(self.life.worker_id)
            elif isinstance(effect, children.Signal):
                if self.life is not None and self.life.process is not None:
                    self.life.process.signal(signal.SIGTERM)
            elif isinstance(effect, children.Kill):
                self.kill()
            else:
                _log.debug("a worker of %s: %s %s", self._pool, effect.state.value, effect.reason)
                self._ground.changed()

    def _try_to_spawn(self) -> None:
        try:
            self._spawn()
        except Exception as error:  # noqa: BLE001 (whatever it is: the machine waits for a process, or for word of none)
            containment.ours.note(f"starting a worker of {self._pool}", error)
            life = self.life
            if life is not None and life.process is not None:
                life.process.kill()
            elif life is not None:
                self._never_lived(life, SupervisionError(f"cannot start a process: {error!r}"))

    def _spawn(self) -> None:
        ground = self._ground
        worker_id = ground.next_worker_id(self._pool)
        self._was_ready = False
        try:
            life = self.life = Life(worker_id, self._pool, self.edition, ground.run_dir)
        except OSError as error:
            self._spawn_failed(f"cannot start a process: {error.strerror}", error.errno)
            return
        try:
            cell = life.cell = ground.warden.prepare(self.table, worker_id, life.scratch)
        except SupervisionError as error:
            self._never_lived(life, error)
            return
        life.level = cell.confinement.level
        life.is_spare = self.is_spare
        # a spare's key too: one that is called up connects sooner than a busy broker would hear of its key
        ground.admitted(life)
        boot = node.WorkerBoot(
            worker_id=worker_id,
            pool=self._pool,
            endpoint=cell.address or ground.worker_endpoint,
            server_public=ground.worker_server_public,
            public=life.keys.public,
            secret=life.keys.secret,
            module=self.table.module,
            path=self.table.path,
            concurrency=self.table.concurrency,
            options=self.table.options,
            marks_fd=life.page.fd,
            scratch=str(life.scratch),
            is_spare=life.is_spare,
            shared_prefix=reclaim.prefix(ground.instance, worker_id),
            limits=quota.told(self.table),
            fixed_limits=tuple(sorted(self.table.limits.model_fields_set)),
            confinement=cell.confinement,
            secrets=cell.secrets,
            log_level=logs.level(),
        )
        order = WorkerOrder(
            worker_id=worker_id,
            instance=ground.instance,
            pool=self.table,
            boot=codec.encode(boot),
            pass_fds=(life.page.fd,),
            tether_fd=life.their_end.fileno(),
            scratch=life.scratch,
            confinement=cell.confinement,
        )
        try:
            life.process = ground.launcher.launch_worker(order, ground.poller, self._exited)
        except (SupervisionError, OSError) as error:
            self._never_lived(life, error if isinstance(error, SupervisionError) else no_start("it", error))
            return
        life.process.when_born(self._born)

    def _born(self) -> None:
        life, ground = self.life, self._ground
        assert life is not None  # noqa: S101 (it ends after its process)
        assert life.process is not None  # noqa: S101 (which was born)
        handlers: Handlers = {Warm: self._warmed, Asks: life.asked, **ground.aftermath.lessor.handlers(life)}
        life.begun(Tether(life.our_end, ground.poller, handlers, self._violated))
        reclaim.record(ground.run_dir, life.process)
        ground.aftermath.spawned(life.worker_id, life.process.pid)
        life.process.on_descendant = functools.partial(ground.aftermath.spawned, life.worker_id)
        self.tell(children.Spawned())

    def _warmed(self, _message: Warm) -> None:
        if not self.is_spare:
            # only the broker's word makes another one ready
            self._violated("it said WARM on its tether, and is no spare")
        elif self.life is not None:
            # before that it would not hear that it is called up
            self.tell(children.BecameReady())

    def _violated(self, what: str) -> None:
        """A tool took its worker over: what it might say next is not waited for."""
        if self.life is not None:
            self.life.violation = what
            self.kill()

    def _never_lived(self, life: Life, error: SupervisionError) -> None:
        self.life = None
        life.end()
        reason = str(error)
        self._ground.died(
            node.Certificate(
                worker_id=life.worker_id,
                pool=self._pool,
                pid=0,
                cause=reason,
                kind="boot_failure",
                wall_at=time.time(),
            ),
            (),
            is_news=True,
        )
        self._ground.aftermath.take_back(life.remains(self._ground.instance))
        hopeless = isinstance(error, Unattainable)
        self._spawn_failed(reason, error.details.get("errno"), hopeless=hopeless)

    def _spawn_failed(self, reason: str, errno: object, *, hopeless: bool = False) -> None:
        self.tell(
            children.SpawnFailed(
                reason,
                jitter=random.random(),  # noqa: S311 (spreads restarts)
                shortage=errno in SHORTAGES and not hopeless,
                hopeless=hopeless,
            )
        )

    def _exited(self, end: Exit) -> None:
        life, child = self.life, self.child
        if life is None or life.process is None:
            return
        if life.process.failure is not None:
            self._never_lived(life, life.process.failure)
            return
        is_operators = child.state is children.State.STOPPING and not child.is_wanted
        # whom the broker dismisses, since it drains or they retire, ends by itself, as it should
        is_retired = child.state is children.State.RETIRING
        # 1, with nothing that ran: something of its tools held its end up, and it was cut short
        has_finished = end.code == 0 or (end.code == 1 and life.marks.is_resting)
        is_dismissed = (self._ground.is_leaving or is_retired) and has_finished
        # what the kernel kills in a group for its memory, it kills without a word to us
        overrun = None if life.metered is None else life.metered.overrun
        known = Circumstances(
            started_seq=life.marks.started_seq,
            was_ready=self._was_ready,
            is_operators=is_operators or is_dismissed,
            retired=self._retired_why,
            fault=child.reason if child.state is children.State.STOPPING else "",
            interrupted=self._meant_interrupt(life),
            violation=life.violation,
            exceeded=life.exceeded or (overrun if end.signal == signal.SIGKILL else None),
            is_oom=overrun is not None,
            stack=life.stack,
        )
        certificate = certify(life.process, self._pool, self.table.module, end, known)
        # the caller of the call that died waits for this: the rest comes after it
        is_news = certificate.kind != "operator"
        self._ground.died(certificate, life.marks.started_calls(), is_news=is_news)
        self._on_death(self)
        self.life = None
        life.end()
        self._ground.aftermath.take_back(life.remains(self._ground.instance))
        if is_dismissed and not (is_operators or is_retired):
            self.tell(children.Unwanted())
        self.tell(
            children.Died(
                certificate.cause.removeprefix("could not start: "),
                hopeless=not self._was_ready and end.code == IMPORT_FAILED,
                # without a mark for finished calls, a worker that served is given the benefit of the doubt
                charged=self._was_ready and known.started_seq > 0,
                jitter=random.random(),  # noqa: S311 (spreads restarts)
                rest_s=_SPARE_REST_S if self.is_spare else 0.0,
            )
        )

    def _meant_interrupt(self, life: Life) -> Interrupted | None:
        """Return the last interrupt, unless the worker went on to another call after it."""
        stopped = life.interrupted
        if stopped is None or (self.table.concurrency == 1 and stopped.seq != life.marks.started_seq):
            return None
        return stopped
