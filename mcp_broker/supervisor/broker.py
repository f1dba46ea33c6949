"""The broker's process: started with BOOT, told everything again when it is started anew."""

from __future__ import annotations

import logging
import random
import signal
import socket
import time
from typing import TYPE_CHECKING, Final, Protocol

from mcp_broker import limits
from mcp_broker.core import children
from mcp_broker.core.restart import Policy, Restarts
from mcp_broker.errors import SupervisionError
from mcp_broker.supervisor import reclaim
from mcp_broker.supervisor.certificates import boot_reason
from mcp_broker.supervisor.launch import BrokerOrder
from mcp_broker.supervisor.link import Link
from mcp_broker.supervisor.process import SHORTAGES
from mcp_broker.wire import node

if TYPE_CHECKING:
    from pathlib import Path

    from mcp_broker.supervisor.launch import Launcher
    from mcp_broker.supervisor.poller import Poller
    from mcp_broker.supervisor.process import Exit, Process

_log = logging.getLogger("mcp_broker.supervisor")

#: Without a broker nothing works, so it is tried again for ever and never waited for long: a start costs some tenths of a
#: second of CPU, and a broker that dies again and again gives each call that waits little time as it is.
RESTART_POLICY: Final = Policy(intensity=None, base_s=0.1, delay_s_max=1.0)
_START_S: Final = 15.0
#: The supervisor's loop turns this often at least. Where more time has passed it was not there to hear anything.
_TURN_S: Final = 1.0


class Owner(Protocol):
    """What the broker's process needs of the supervisor."""

    poller: Poller
    launcher: Launcher
    run_dir: Path
    instance: str

    def next_epoch(self) -> int:
        """Return an epoch above all before."""

    def boot(self, epoch: int) -> node.Boot:
        """Return all that a broker needs to serve."""

    def briefing(self) -> list[node.FromSupervisor]:
        """Return what follows BOOT: admitted keys, deaths, a report."""

    def endpoints(self) -> list[tuple[node.Listen, int]]:
        """Return the addresses that belong to one worker each, with their listening sockets."""

    def heard(self, message: node.ToSupervisor) -> None:
        """Take a message of the broker."""

    def broker_died(self, pid: int, reason: str) -> None:
        """Take note; it is restarted already, or about to be."""

    def broker_failed(self, reason: str) -> None:
        """Take note that it could not start even once, and will not be tried again."""

    def strayed(self) -> None:
        """Processes may have lost their parent."""


class BrokerChild:
    """Keeps the broker up."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.child = children.Child(Restarts(RESTART_POLICY), start_s=_START_S)
        self.process: Process | None = None
        self.epoch = 0
        #: it served at least once: from then on a failed start may be bad luck
        self._has_served = False
        self._link: Link | None = None
        #: for how long it has said nothing, as far as we listened
        self._silent_s = 0.0
        self._listened_at = 0.0
        #: it was killed for that
        self._is_hung = False

    @property
    def pid(self) -> int:
        """Its pid, 0 while there is none."""
        return 0 if self.process is None else self.process.pid

    def send(self, message: node.FromSupervisor, descriptor: int | None = None) -> None:
        """Tell the broker, if there is one; the next one is briefed anew."""
        if self._link is not None:
            self._link.send(message, descriptor)

    def tell(self, event: children.Event) -> None:
        """Feed the machine, and do what it says."""
        self._perform(self.child.handle(event, time.monotonic()))

    def expire(self, now: float) -> None:
        """Do what is due."""
        self._perform(self.child.expire(now))
        passed_s, self._listened_at = now - self._listened_at, now
        if self.child.state is children.State.RUNNING:
            self._silent_s += min(passed_s, _TURN_S)
            if self._silent_s >= limits.BROKER_SILENCE_S:
                # it answers no reports: it is stopped, or its loop does not turn
                self._is_hung = True
                self.kill()

    def kill(self) -> None:
        """SIGKILL it, now."""
        if self.process is not None:
            self.process.kill()

    def _perform(self, effects: list[children.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, children.Spawn):
                self._spawn()
            elif isinstance(effect, children.Signal):
                if self.process is not None:
                    self.process.signal(signal.SIGTERM)
            elif isinstance(effect, children.Kill):
                self.kill()
            elif isinstance(effect, children.Dismiss):
                # nobody retires the broker: it is the one that sends others away
                continue
            elif effect.state is children.State.FATAL:
                self._owner.broker_failed(effect.reason)
            else:
                _log.debug("the broker: %s %s", effect.state.value, effect.reason)

    def _spawn(self) -> None:
        owner = self._owner
        self.epoch = owner.next_epoch()
        name = f"broker-{self.epoch}"
        scratch = owner.run_dir / name
        boot = owner.boot(self.epoch)
        try:
            scratch.mkdir(mode=0o700)
            ours, theirs = socket.socketpair()
        except OSError as error:
            self._spawn_failed(f"cannot start a process: {error.strerror}", error.errno)
            return
        order = BrokerOrder(name, owner.instance, theirs.fileno(), (boot.client_fd, boot.worker_fd), scratch)
        try:
            self.process = owner.launcher.launch_broker(order, owner.poller, self._exited)
        except SupervisionError as error:
            ours.close()
            self._spawn_failed(str(error), error.details.get("errno"))
            return
        finally:
            theirs.close()
        reclaim.record(owner.run_dir, self.process)
        # it may be lost at any of these, when the process is gone already: then it drops the rest
        link = self._link = Link(ours, owner.poller, self._heard, self._lost)
        # all at once: it reads them in order when it comes up, and workers are started meanwhile
        for message in (boot, *owner.briefing()):
            link.send(message)
        for listen, descriptor in owner.endpoints():
            link.send(listen, descriptor)
        self.tell(children.Spawned())

    def _spawn_failed(self, reason: str, errno: object) -> None:
        reclaim.remove_tree(self._owner.run_dir / f"broker-{self.epoch}")
        self.tell(
            children.SpawnFailed(
                reason,
                jitter=random.random(),  # noqa: S311 (spreads restarts)
                shortage=errno in SHORTAGES,
            )
        )

    def _heard(self, message: node.ToSupervisor) -> None:
        self._silent_s = 0.0
        if isinstance(message, node.Serving):
            self._has_served = True
            self.tell(children.BecameReady())
        self._owner.heard(message)

    def _lost(self, reason: str) -> None:
        """A broker without its link is of no use: it cannot hear of deaths. What it had said is heard until its end."""
        _log.debug("the broker: %s", reason)
        self.kill()

    def _exited(self, end: Exit) -> None:
        process = self.process
        if process is None:
            return
        if self._link is not None:
            self._link.drain()
            self._link.close()
            self._link = None
        self.process = None
        how = f"killed by {end.signal_name}" if end.signal is not None else f"exited with code {end.code}"
        was_ready = self.child.state is children.State.RUNNING
        if was_ready and self._is_hung:
            how = f"hung: it said nothing for {limits.BROKER_SILENCE_S:g} s ({how})"
        self._silent_s, self._is_hung = 0.0, False
        reason = how if was_ready else f"{boot_reason(process.stderr_tail, '')} ({how})".strip()
        reclaim.forget(self._owner.run_dir, process.name)
        reclaim.remove_tree(self._owner.run_dir / process.name)
        self._owner.broker_died(process.pid, reason)
        self._owner.strayed()
        self.tell(
            children.Died(
                reason,
                hopeless=not self._has_served,
                jitter=random.random(),  # noqa: S311 (spreads restarts)
            )
        )
