"""The supervisor: the smallest and longest-lived process. Spawns, watches, reaps; parses no network bytes.

Rules:

1. One thread. Whoever waits registers with the poller; nothing here blocks for longer than a look at /proc.
2. What is decided about a process is decided by its Child machine; this module only carries events to it.
3. A key is admitted before its process exists; a death is told before anything is done about it.
4. The broker is told everything again when it is started anew; workers are left alone then, they reconnect.
5. The end, in order: the broker drains, workers stop, the broker stops, strays are swept, files go.

Deliberately absent: ZeroMQ (not even imported), threads, user code, network input.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
import secrets
import signal
import time
from typing import TYPE_CHECKING, Final

from mcp_broker import logs
from mcp_broker.auth.credentials import Authority
from mcp_broker.core import children
from mcp_broker.errors import SupervisionError
from mcp_broker.supervisor import containment, events, reclaim
from mcp_broker.supervisor.aftermath import Aftermath
from mcp_broker.supervisor.boot import boot, serving
from mcp_broker.supervisor.broker import BrokerChild
from mcp_broker.supervisor.commands import Commands
from mcp_broker.supervisor.containment import contained
from mcp_broker.supervisor.fleet import Fleet, Word
from mcp_broker.supervisor.isolation.warden import Warden
from mcp_broker.supervisor.launch.forks import ForkingLauncher
from mcp_broker.supervisor.launch.sandbox import SandboxLauncher
from mcp_broker.supervisor.lessor import Lessor
from mcp_broker.supervisor.lock import Lock
from mcp_broker.supervisor.operations import Operations
from mcp_broker.supervisor.poller import Poller
from mcp_broker.supervisor.ports import Ports
from mcp_broker.supervisor.records import Abandoned, Counters, Deaths, Definitions
from mcp_broker.supervisor.recovery import Recovery, Wish
from mcp_broker.supervisor.reloading import Reloading
from mcp_broker.supervisor.runtime import Runtime
from mcp_broker.supervisor.signals import Signals, ends_with_terminal, has_terminal
from mcp_broker.wire import node

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mcp_broker.config import Config
    from mcp_broker.supervisor.launch import Launcher
    from mcp_broker.supervisor.life import Life

_log = logging.getLogger("mcp_broker.supervisor")

_SAMPLE_S: Final = 1.0
#: a broker says DRAINED by the end of the time that it was given, or it never will
_DRAIN_SLACK_S: Final = 0.5
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Phase(enum.IntEnum):
    """Where in its life a supervisor is."""

    SERVING = 0
    DRAINING = 1
    STOPPING_WORKERS = 2
    STOPPING_BROKER = 3
    STOPPED = 4


class Supervisor:
    """Everything of one state directory, from the lock to the last reaped process.

    Args:
        config: what to serve.
        state_dir: made if it is missing (0700).
        on_event: told what happens, in the main thread; it must not block.
        launcher: how processes are started.
        reread: reads the configuration again; without it the one given stays.
    """

    def __init__(
        self,
        config: Config,
        state_dir: Path,
        *,
        on_event: Callable[[events.Event], None] = lambda _event: None,
        launcher: Launcher | None = None,
        reread: Callable[[], Config] | None = None,
    ) -> None:
        self._config = config
        self._reread = reread or (lambda: config)
        self._state_dir = state_dir.absolute()
        self._on_event = contained("telling whoever started us")(on_event)
        self.launcher: Launcher = launcher or SandboxLauncher(ForkingLauncher())
        self._phase = Phase.SERVING
        self._failure: str | None = None
        self._is_dirty = False
        self._is_table_complete = False
        self._drain_deadline = 0.0

    # -- life ----------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until told to stop; return 0. Call it in the main thread.

        Raises:
            SupervisionError: the state directory is served already, or the broker cannot start.
            ConfigError: an address cannot be bound, or a folder not made.
            CredentialError: a key file may be read by others, or is broken.
        """
        self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = Lock(self._state_dir)
        try:
            self._serve()
        finally:
            lock.release()
        if self._failure is not None:
            raise SupervisionError(f"the broker could not start: {self._failure}")
        return 0

    def _serve(self) -> None:
        logs.follow(self._config.observe.log_level, self._config.observe.log_format)
        self._authority = Authority.open(self._state_dir)
        self._counters = Counters(self._state_dir)
        self._deaths = Deaths(self._state_dir)
        self._abandoned = Abandoned()
        self.instance = self._counters.instance
        self._lineage = secrets.token_hex(8)
        self._runtime = Runtime(self._state_dir, self.instance)
        self.run_dir = self._runtime.folder
        self.warden = Warden(self._state_dir, self.run_dir)
        left_over = self._runtime.clear(lambda folder: reclaim.remove_leftovers(folder, self.instance))
        if left_over:
            _log.warning("killed %d processes that an earlier supervisor left over", left_over)
        with contextlib.closing(Ports(self._config.broker, self._state_dir)) as self._ports:
            self._serve_on(self._ports)

    def _serve_on(self, ports: Ports) -> None:
        folders, lessor = (self._state_dir, self.run_dir), Lessor(self._config.ports, self.changed)
        self._broker = BrokerChild(self)
        self.aftermath = Aftermath(folders, self.instance, lessor, self._alive, self._broker.send)
        self.known = self.aftermath.known
        self._authority.ensure_default([ports.client_endpoint])
        self.worker_endpoint = ports.worker_endpoint
        self.worker_server_public = self._authority.workers.public
        self.poller = Poller(containment.ours.note)
        self.launcher.open(self)
        self._started_wall = time.time()
        self._fleet = Fleet(self, self._config, Definitions(self._state_dir), self._on_event)
        self._recovery = Recovery(self._fleet)
        tell = self._broker.send
        self._commands = Commands(tell, lambda: self.is_leaving)
        Operations(self._fleet, self._deaths).join(self._commands)
        self._reloading = Reloading(self._fleet, self._config, self._reread, tell, self._on_event)
        self._reloading.join(self._commands)
        self._ends_with_terminal = ends_with_terminal()
        signals = Signals(_SIGNALS, self.poller, self._signalled)
        try:
            self._loop()
        finally:
            # also when a bug of ours ends the loop: nothing may stay behind
            self._end(signals)

    def _loop(self) -> None:
        self._broker.tell(children.Wanted())
        self._fleet.start()
        # the broker's first table must be complete: until it comes, an unknown key is told to try again
        self._is_table_complete = True
        self._broker.send(self._fleet.admissions())
        for listen, descriptor in self._fleet.endpoints():
            self._broker.send(listen, descriptor)
        self._sample_at = time.monotonic() + _SAMPLE_S
        self._tidy()
        while self._phase is not Phase.STOPPED:
            timeout_s = 0.0
            with contained("looking for what is due"):
                timeout_s = max(0.0, self._deadline() - time.monotonic())
            self.poller.turn(timeout_s)
            self._expire(time.monotonic())
            self._tidy()
            containment.ours.rest()

    def _deadline(self) -> float:
        deadlines = [self._sample_at]
        if self._phase is Phase.DRAINING:
            deadlines.append(self._drain_deadline)
        others = (self.aftermath, self._broker.child, self._commands, self.launcher)
        deadlines += [at for at in (other.deadline() for other in others) if at is not None]
        deadlines.extend(self._fleet.deadlines())
        return min(deadlines)

    def _expire(self, now: float) -> None:
        for expire in (self._broker.expire, self._fleet.expire, self.launcher.expire):
            with contained("what was due"):
                expire(now)
        if self._phase is Phase.DRAINING and now >= self._drain_deadline:
            self._stop_workers()
        if now >= self._sample_at:
            self._sample_at = now + _SAMPLE_S
            self._is_dirty = True
            self._fleet.sample()
            with contained("looking around"):
                self.aftermath.look()

    def _tidy(self) -> None:
        """Do at the end of a turn what many events of it may have asked for."""
        fleet = self._fleet
        for do in (self.aftermath.turn, fleet.settle, fleet.announce, self._say, self._go_on_stopping):
            with contained("the end of a turn"):
                do()

    def _go_on_stopping(self) -> None:
        if self._phase is Phase.STOPPING_WORKERS and self._fleet.is_stopped:
            self._phase = Phase.STOPPING_BROKER
            self._broker.tell(children.Unwanted())
        if self._phase is Phase.STOPPING_BROKER and not self._broker.child.is_alive:
            self.launcher.stop()
            if not self.launcher.alive():
                self._phase = Phase.STOPPED

    def _end(self, signals: Signals) -> None:
        # after an orderly stop there is nothing left to do here
        self._phase = Phase.STOPPED
        self._broker.tell(children.Unwanted())
        end = functools.partial(self.aftermath.end, self.poller)
        files = (self._fleet.close, self._runtime.remove, self._counters.close)
        for do in (self._fleet.stop, self._kill_all, self.launcher.stop, end, *files, signals.close):
            with contained("a step of the end"):
                do()
        self.poller.close()
        if self._failure is None:
            self._on_event(events.Stopped())

    # -- the end -----------------------------------------------------------------------------------------

    def _signalled(self, number: int) -> None:
        """SIGHUP is an operator's wish to reload, unless it says that the terminal is gone that we were started in."""
        if number != signal.SIGHUP or (self._ends_with_terminal and not has_terminal()):
            self._stop()
        elif not self.is_leaving:
            self._reloading.by_signal()

    def _stop(self) -> None:
        """Drain first; told again, end at once."""
        if self._phase is not Phase.SERVING:
            self._stop_workers()
            # whatever may be wanted again since: nothing is
            self._fleet.stop()
            self._kill_all()
            return
        drain_s = self._reloading.config.limits.drain_s
        self.aftermath.lessor.drain()
        self._on_event(events.Draining(drain_s))
        if self._broker.child.state is not children.State.RUNNING:
            self._stop_workers()
            return
        self._phase = Phase.DRAINING
        self._drain_deadline = time.monotonic() + drain_s + _DRAIN_SLACK_S
        self._broker.send(node.Shutdown(drain_s))

    def _stop_workers(self) -> None:
        if self._phase < Phase.STOPPING_WORKERS:
            self._phase = Phase.STOPPING_WORKERS
            self._fleet.stop()

    def _kill_all(self) -> None:
        self._fleet.kill()
        self._broker.kill()

    @property
    def is_leaving(self) -> bool:
        """Told to stop: what ends by itself now stays away."""
        return self._phase is not Phase.SERVING

    @property
    def is_stopping(self) -> bool:
        """Its workers are being stopped: none starts any more."""
        return self._phase >= Phase.STOPPING_WORKERS

    # -- what slots need ------------------------------------------------------------------------------------

    def next_worker_id(self, pool: str) -> str:
        """Return an id that no worker had before."""
        return f"{pool}-{self._counters.next_life()}"

    def admitted(self, life: Life) -> None:
        """Let the broker admit this worker's key, and serve its own address if it has one."""
        if self._is_table_complete:
            self._broker.send(node.Admit((life.admitted,)))
            if life.endpoint is not None:
                self._broker.send(life.listen(life.endpoint), life.endpoint.fileno())

    def dismiss(self, worker_id: str) -> None:
        """Have the broker send this worker away once it holds no call."""
        self._broker.send(node.Retire((worker_id,)))

    @contained("telling of a death")
    def died(self, certificate: node.Certificate, started_calls: tuple[bytes, ...], *, is_news: bool) -> None:
        """Tell the broker first: a caller waits for it."""
        self._broker.send(node.Died(certificate, started_calls))
        self._deaths.add(certificate, started_calls)
        if is_news:
            cause, told = certificate.cause, {logs.ANNOUNCED: True}
            _log.warning("worker %s (pid %d): %s", certificate.worker_id, certificate.pid, cause, extra=told)
            self._on_event(events.WorkerDied(certificate))

    def strayed(self) -> None:
        """Look for processes that lost their parent, at the end of this turn."""
        self.aftermath.strayed()

    def changed(self) -> None:
        """Report at the end of this turn."""
        self._is_dirty = True

    # -- what the broker's process needs ---------------------------------------------------------------------

    def next_epoch(self) -> int:
        """Return an epoch above all before."""
        return self._counters.next_epoch()

    def boot(self, epoch: int) -> node.Boot:
        """Return all that a broker needs to serve."""
        limits = self._reloading.config.limits
        return boot(epoch, self._authority, self._ports, limits, (self._started_wall, self._lineage))

    def briefing(self) -> list[node.FromSupervisor]:
        """Return what follows BOOT. The first broker gets its table of keys when all are made."""
        table = [self._fleet.admissions()] if self._is_table_complete else []
        deaths = self._deaths.told(self.aftermath.records)
        past: list[node.FromSupervisor] = [*table, deaths, *self._abandoned.told(), *self._fleet.tools()]
        return [*past, *self._recovery.briefing(), *self._fleet.retirement(), self._report()]

    def endpoints(self) -> list[tuple[node.Listen, int]]:
        """Return the addresses of single workers; they are told of after the keys that they let in."""
        return self._fleet.endpoints() if self._is_table_complete else []

    def heard(self, message: node.ToSupervisor) -> None:
        """Take a message of the broker."""
        if isinstance(message, node.Serving) and self.is_leaving:
            self._broker.send(node.Shutdown(self._reloading.config.limits.drain_s))
        elif isinstance(message, node.Serving):
            self._on_event(serving(self._ports, self._broker, self._fleet.names, self._state_dir))
        elif isinstance(message, Word):
            self._fleet.heard(message)
        elif isinstance(message, Wish):
            self._recovery.take(message)
        elif isinstance(message, node.Command):
            self._commands.take(message, time.monotonic())
        elif isinstance(message, node.Abandoned):
            self._abandoned.add(message.call_ids)
        elif self._phase is Phase.DRAINING:
            self._stop_workers()

    def broker_died(self, pid: int, reason: str) -> None:
        """Take note; whoever is leaving wanted it."""
        self._commands.forget()
        if self.is_leaving:
            if self._phase is Phase.DRAINING:
                self._stop_workers()
            if self._broker.child.is_wanted:
                self._broker.tell(children.Unwanted())
            return
        _log.warning("the broker (pid %d): %s", pid, reason, extra={logs.ANNOUNCED: True})
        self._on_event(events.BrokerDied(pid, reason))

    def broker_failed(self, reason: str) -> None:
        """Nothing can be served: end, and say why."""
        self._failure = reason
        self._stop_workers()

    # -- what is told ---------------------------------------------------------------------------------------

    def _say(self) -> None:
        if self._is_dirty:
            self._is_dirty = False
            self._broker.send(self._report())
        # after the report: who hears that a command was carried out finds it so
        self._commands.settle(time.monotonic())

    def _report(self) -> node.Report:
        return node.Report(self._fleet.report().pools, self.aftermath.lessor.report())

    def _alive(self) -> dict[int, str]:
        """Return our own live children: pid -> name."""
        alive = {**self.launcher.alive(), **self._fleet.alive()}
        if self._broker.process is not None:
            alive[self._broker.pid] = self._broker.process.name
        return alive
