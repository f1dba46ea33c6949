"""A zygote's process, and the workers that it is asked for.

Whatever becomes of the zygote, each order ends once: its worker is born, or is started in the ordinary way. A worker that was
forked and is not known yet waits at a gate that we hold: we open it for one that we adopt, and close it for all others,
which end by that.

Source: docs/protocol.md, "Zygote".
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.core import children
from mcp_broker.core.restart import Policy, Restarts
from mcp_broker.errors import SupervisionError, WireError
from mcp_broker.supervisor import reclaim
from mcp_broker.supervisor.certificates import boot_reason
from mcp_broker.supervisor.launch.local import sealed, worker_environment
from mcp_broker.supervisor.process import SHORTAGES, Process, no_start
from mcp_broker.wire import codec, zygote

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mcp_broker.supervisor.launch import Ground, WorkerOrder
    from mcp_broker.supervisor.process import Exit

_log = logging.getLogger("mcp_broker.supervisor")

#: workers start without it meanwhile, so it may be tried again for ever, ever more rarely
_POLICY: Final = Policy(intensity=None, delay_s_max=60.0)


@dataclass(eq=False)
class Delivery:
    """An unborn worker, and the order for it.

    Attributes:
        gate: the write end of the pipe that it waits at; None while it is not ordered.
    """

    process: Process
    order: WorkerOrder
    gate: int | None = field(default=None, init=False)

    def open_gate(self) -> None:
        """Let the worker run."""
        assert self.gate is not None  # noqa: S101 (it was ordered)
        os.write(self.gate, b"\1")
        self.close_gate()

    def close_gate(self) -> None:
        """End the worker, if it was forked and waits."""
        if self.gate is not None:
            os.close(self.gate)
            self.gate = None


class Zygote:
    """Keeps one zygote up.

    Args:
        name: of it; each of its processes has a number behind it.
        argv: the program and its arguments, up to the one for the orders.
        env: its environment.
        execute: starts a worker in the ordinary way; raises SupervisionError when it cannot.
    """

    def __init__(
        self,
        ground: Ground,
        name: str,
        argv: Sequence[str],
        env: Callable[[str], Mapping[str, str]],
        execute: Callable[[Process, WorkerOrder], None],
    ) -> None:
        self._ground = ground
        self._name = name
        self._argv = tuple(argv)
        self._env = env
        self._execute = execute
        self.child = children.Child(Restarts(_POLICY), start_s=limits.ZYGOTE_START_S)
        self.process: Process | None = None
        self.used_at = 0.0
        self._lives = 0
        self._socket: socket.socket | None = None
        self._waiting: list[Delivery] = []
        self._number = 0
        #: order's number -> what was ordered
        self._ordered: dict[int, Delivery] = {}
        #: the last time that it did what it is for
        self._moved_at = 0.0

    # -- orders --------------------------------------------------------------------------------------

    def deliver(self, delivery: Delivery) -> bool:
        """Take an order; False when there is no zygote to carry it out."""
        self.used_at = time.monotonic()
        if self.child.state is children.State.STOPPED:
            self._tell(children.Wanted())
        if self.child.state is children.State.STARTING:
            self._waiting.append(delivery)
            return True
        return self.child.state is children.State.RUNNING and self._send(delivery)

    def stop(self) -> None:
        """End it; whoever is unborn is abandoned."""
        for delivery in self._take_unborn():
            delivery.process.kill()
            delivery.process.abandon(None)
        self._tell(children.Unwanted())
        if self.process is not None:
            self.process.kill()

    @property
    def ordered(self) -> list[str]:
        """The names of workers that may have been forked and are not known yet."""
        return [delivery.process.name for delivery in self._ordered.values()]

    @property
    def is_idle(self) -> bool:
        """Nobody waits for it."""
        return not (self._ordered or self._waiting)

    # -- time ----------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """Return the instant at which :meth:`expire` has something to do."""
        due = [] if not self._ordered else [self._moved_at + limits.ZYGOTE_ANSWER_S]
        started = self.child.deadline()
        if started is not None:
            due.append(started)
        return min(due, default=None)

    def expire(self, now: float) -> None:
        """Do what is due."""
        for delivery in [one for one in self._waiting if one.process.is_doomed]:
            self._waiting.remove(delivery)
            delivery.process.abandon(None)
        for number in [number for number, one in self._ordered.items() if one.process.is_doomed]:
            delivery = self._ordered.pop(number)
            delivery.close_gate()
            delivery.process.abandon(None)
            self._ground.strayed()
        if self._ordered and now >= self._moved_at + limits.ZYGOTE_ANSWER_S:
            _log.warning("%s does not answer, and is replaced", self._name)
            self._hang_up()
            self._fail_all()
            if self.process is not None:
                self.process.kill()
        self._perform(self.child.expire(now))

    # -- its process ---------------------------------------------------------------------------------

    def _tell(self, event: children.Event) -> None:
        self._perform(self.child.handle(event, time.monotonic()))

    def _perform(self, effects: list[children.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, children.Spawn):
                self._spawn()
            elif isinstance(effect, children.Signal | children.Kill):
                # it has nothing to finish
                if self.process is not None:
                    self.process.kill()
            elif isinstance(effect, children.Announce) and effect.state is not children.State.STARTING:
                self._flush(effect.state)

    def _flush(self, state: children.State) -> None:
        """Order what waited for it to come up, or start it in the ordinary way if it does not."""
        waiting, self._waiting = self._waiting, []
        for delivery in waiting:
            if not (state is children.State.RUNNING and self._send(delivery)):
                self._start(delivery)

    def _spawn(self) -> None:
        self._lives += 1
        name = f"{self._name}-{self._lives}"
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            self._spawn_failed(no_start(name, error))
            return
        ours.setblocking(False)
        try:
            self.process = Process(
                name,
                [*self._argv, "--orders-fd", str(theirs.fileno())],
                env=self._env(name),
                cwd=self._ground.run_dir,
                pass_fds=(theirs.fileno(),),
                poller=self._ground.poller,
                on_exit=self._exited,
            )
        except SupervisionError as error:
            ours.close()
            self._spawn_failed(error)
            return
        finally:
            theirs.close()
        reclaim.record(self._ground.run_dir, self.process)
        self._socket = ours
        self._ground.poller.add(ours.fileno(), self._hear)
        self._tell(children.Spawned())

    def _spawn_failed(self, error: SupervisionError) -> None:
        shortage = error.details.get("errno") in SHORTAGES
        jitter = random.random()  # noqa: S311 (spreads restarts)
        self._tell(children.SpawnFailed(str(error), jitter=jitter, shortage=shortage))

    def _exited(self, end: Exit) -> None:
        process = self.process
        assert process is not None  # noqa: S101 (it ends once, and is followed after that)
        self.process = None
        self._hang_up()
        reclaim.forget(self._ground.run_dir, process.name)
        self._fail_all()
        how = f"killed by {end.signal_name}" if end.signal is not None else f"exited with code {end.code}"
        said = boot_reason(process.stderr_tail, "")
        if self.child.is_wanted:
            _log.warning("%s (pid %d): %s", process.name, process.pid, f"{said} ({how})" if said else how)
        self._ground.strayed()
        self._tell(children.Died(said or how, jitter=random.random()))  # noqa: S311 (spreads restarts)

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._ground.poller.remove(self._socket.fileno())
            self._socket.close()
            self._socket = None

    # -- what is said --------------------------------------------------------------------------------

    def _send(self, delivery: Delivery) -> bool:
        """Order a worker; False if the zygote takes nothing."""
        if self._socket is None:
            return False
        order, (stdout, stderr) = delivery.order, delivery.process.output_fds
        try:
            boot = sealed(order.boot)
        except OSError:
            return False
        try:
            theirs, ours = os.pipe2(os.O_CLOEXEC)
        except OSError:
            os.close(boot)
            return False
        message = zygote.Order(
            number=self._number + 1,
            worker_id=order.worker_id,
            env=worker_environment(order),
            cwd=str(order.scratch),
            fds=(1, 2, boot, order.tether_fd, *order.pass_fds),
            boot_fd=boot,
            tether_fd=order.tether_fd,
            parent=os.getpid(),
        )
        fds = [theirs, stdout, stderr, boot, order.tether_fd, *order.pass_fds]
        try:
            socket.send_fds(self._socket, [codec.encode(message)], fds)
        except (OSError, UnicodeEncodeError):
            # it takes nothing just now, is gone, the packet is too long, or an environment holds what is not UTF-8
            os.close(ours)
            return False
        finally:
            os.close(theirs)
            os.close(boot)
        if not self._ordered:
            self._moved_at = time.monotonic()
        self._number += 1
        delivery.gate = ours
        self._ordered[self._number] = delivery
        return True

    def _hear(self, _events: int) -> None:
        assert self._socket is not None  # noqa: S101 (it is waited on)
        try:
            packet = self._socket.recv(limits.ZYGOTE_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        try:
            message = zygote.from_zygote.decode(packet) if packet else None
        except WireError as error:
            _log.warning("%s said what is no message: %s", self._name, error)
            message = None
        self._moved_at = time.monotonic()
        if message is None:
            self._hang_up()
            if self.process is not None:
                self.process.kill()
        elif isinstance(message, zygote.Ready):
            self._tell(children.BecameReady())
        elif (delivery := self._ordered.pop(message.number, None)) is None:
            # given up meanwhile; what was forked ended at its gate
            self._ground.strayed()
        elif isinstance(message, zygote.Born):
            self._adopt(delivery, message.pid)
        else:
            _log.warning("%s could not fork %s: %s", self._name, delivery.process.name, message.reason)
            self._start(delivery)

    def _adopt(self, delivery: Delivery, pid: int) -> None:
        try:
            delivery.process.adopt(pid)
            # killed before it could run: then it never does
            with contextlib.suppress(BrokenPipeError):
                delivery.open_gate()
        except SupervisionError as error:
            _log.warning("%s: %s", self._name, error)
            self._start(delivery)
        finally:
            delivery.close_gate()

    # -- without it ----------------------------------------------------------------------------------

    def _take_unborn(self) -> list[Delivery]:
        unborn = [*self._ordered.values(), *self._waiting]
        self._ordered, self._waiting = {}, []
        for delivery in unborn:
            delivery.close_gate()
        return unborn

    def _fail_all(self) -> None:
        unborn = self._take_unborn()
        if unborn:
            self._ground.strayed()
        for delivery in unborn:
            self._start(delivery)

    def _start(self, delivery: Delivery) -> None:
        """Start a worker in the ordinary way."""
        delivery.close_gate()
        process = delivery.process
        if process.is_doomed:
            process.abandon(None)
            return
        try:
            self._execute(process, delivery.order)
        except SupervisionError as error:
            process.abandon(error)
        except OSError as error:
            process.abandon(no_start(process.name, error))
