"""The broker's loop: poll, decode, hand to the machine, send what it queued. It decides nothing."""

from __future__ import annotations

import logging
import select
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import zmq

from mcp_broker import limits
from mcp_broker.broker.link import NodeLink, SupervisorGone
from mcp_broker.core.client_sessions import error as error_message
from mcp_broker.core.refusals import Refusals
from mcp_broker.errors import Unauthenticated, WireError
from mcp_broker.transport import DONTWAIT, MORE, has_input
from mcp_broker.wire import codec, messages, node

if TYPE_CHECKING:
    from mcp_broker.broker.tokens import TokenVerifier
    from mcp_broker.core.outbox import Body
    from mcp_broker.core.routing import Routing

_log = logging.getLogger(__name__)

#: how soon a peer whose socket was full is tried again
_RETRY_S: Final = 0.005
#: a received body below this is copied out of libzmq's buffer; above, the buffer itself is forwarded
_COPY_BYTES: Final = limits.INLINE_BYTES_MAX

_BODY_RULE: Final = "a second frame belongs to a message of exactly one call, chunk, outcome or part"

Door = Callable[[bytes, str, zmq.Frame, Any, float], None]


class Waiting:
    """What a peer whose socket was full has yet to get."""

    __slots__ = ("bytes_held", "queue")

    def __init__(self) -> None:
        self.queue: deque[tuple[bytes, Any]] = deque()
        self.bytes_held = 0

    def add(self, envelope: bytes, body: Body | None) -> None:
        self.queue.append((envelope, body))
        self.bytes_held += len(envelope) + (len(body) if body is not None else 0)

    def take(self) -> tuple[bytes, Any]:
        envelope, body = self.queue.popleft()
        self.bytes_held -= len(envelope) + (len(body) if body is not None else 0)
        return envelope, body

    @property
    def is_full(self) -> bool:
        return len(self.queue) > limits.PEER_BACKLOG_MAX or self.bytes_held > limits.PEER_BACKLOG_BYTES_MAX


class Loop:
    """One broker's loop.

    Args:
        clients, workers: the two ROUTERs.
        on_node: told of every message of the supervisor too, for the ZAP handler's table.
    """

    def __init__(
        self,
        machine: Routing,
        clients: zmq.Socket[bytes],
        workers: zmq.Socket[bytes],
        link: NodeLink,
        tokens: TokenVerifier,
        on_node: Callable[[node.FromSupervisor], None],
    ) -> None:
        self._machine = machine
        self._clients = clients
        self._workers = workers
        self._link = link
        self._tokens = tokens
        self._on_node = on_node
        self._clock = time.monotonic
        machine.bug = _log_bug
        self._waiting: dict[zmq.Socket[bytes], dict[bytes, Waiting]] = {clients: {}, workers: {}}
        self._refusals = Refusals()

    def run(self) -> None:
        """Serve until drained.

        Raises:
            SupervisorGone: the supervisor is.
        """
        machine = self._machine
        clients, workers, link = self._clients, self._workers, self._link
        clients_fd, workers_fd, link_fd = clients.fileno(), workers.fileno(), link.fileno()
        # the raw fds: zmq's own poller asks each socket four times what the turn has just asked
        poller = select.poll()
        for fd in (clients_fd, workers_fd, link_fd):
            poller.register(fd, select.POLLIN)
        while not machine.drained:
            # the fds tell of news, EVENTS of what is; sending may have read the news
            from_workers, from_clients = has_input(workers), has_input(clients)
            wait_ms = 0 if from_workers or from_clients else self._wait_ms()
            ready = [fd for fd, _ in poller.poll(wait_ms)]
            now = self._clock()
            # workers first: what they finish makes room for what clients bring
            from_clients = from_clients or clients_fd in ready
            if from_workers or workers_fd in ready:
                self._drain(workers, self._worker_message, now)
                if from_clients:
                    # outcomes do not wait for what others ask
                    self.flush(now)
            if from_clients:
                self._drain(clients, self._client_message, now)
            if link_fd in ready:
                self.node_messages(link.receive(), now)
            machine.expire(now)
            self._tell_refused(now)
            self.flush(now)
        self.flush(self._clock())

    def _wait_ms(self) -> int:
        now, until = self._clock(), self._machine.deadline()
        if self._waiting[self._clients] or self._waiting[self._workers]:
            until = min(until, now + _RETRY_S)
        until = min(until, self._refusals.due)
        return max(0, int((until - now) * 1000 + 0.999))

    def node_messages(self, received: list[node.FromSupervisor], now: float) -> None:
        """Hand the supervisor's messages to the machine and to the admission table."""
        for message in received:
            self._on_node(message)
            self._machine.from_node(message, now)

    # -- in ---------------------------------------------------------------------------------------

    def _drain(self, socket: zmq.Socket[bytes], door: Door, now: float) -> None:
        """Take up to a turn's bound of messages. Looks at EVENTS rather than at an exception to end."""
        receive = socket.recv
        for _ in range(limits.TURN_MESSAGES_MAX):
            try:
                routing_id = receive(DONTWAIT)
            except zmq.Again:
                # the news were others than a message
                return
            frame: zmq.Frame = receive(DONTWAIT, copy=False)
            body: Any = None
            extra = False
            if frame.more:
                second: zmq.Frame = receive(DONTWAIT, copy=False)
                body = second if len(second) > _COPY_BYTES else second.bytes
                more = second.more
                while more:
                    extra = True
                    more = receive(DONTWAIT, copy=False).more
            user_id: str = frame.get("User-Id")  # type: ignore[assignment]
            if extra or (body is not None and len(body) > limits.BODY_BYTES_MAX):
                self._misbehaved(
                    socket, routing_id, "a message has at most two frames, the second within its bound", now
                )
            else:
                door(routing_id, user_id, frame, body, now)
            if not has_input(socket):
                return

    def _client_message(
        self, routing_id: bytes, user_id: str, frame: zmq.Frame, body: Body | None, now: float
    ) -> None:
        try:
            message = codec.from_client.decode(frame.buffer)
        except WireError as error:
            self._refused_bytes(self._clients, routing_id, user_id, frame, error, now)
            return
        if body is not None and not _may_have_body(message):
            self._misbehaved(self._clients, routing_id, _BODY_RULE, now)
        elif type(message) is messages.Hello:
            self._hello(routing_id, user_id, message, now)
        elif type(message) is messages.Renew:
            self._renew(routing_id, user_id, message, now)
        elif not self._machine.clients.message(routing_id, user_id, message, body, now):
            text = "this connection has no session: say HELLO first, and nothing else before WELCOME"
            self._error(self._clients, routing_id, "UNAUTHENTICATED", text, {"reason": "no_session"})

    def _hello(self, routing_id: bytes, user_id: str, message: messages.Hello, now: float) -> None:
        if message.protocol != messages.PROTOCOL or messages.MAJOR not in message.majors:
            self._other_version(self._clients, routing_id, message.majors)
            return
        try:
            grant = self._tokens.verify(message.token, user_id, now)
        except Unauthenticated as error:
            self._error(self._clients, routing_id, error.code, error.message, error.details)
            return
        if self._machine.clients.hello(routing_id, user_id, message, grant, now) is None:
            text = (
                f"a broker holds {limits.SESSIONS_MAX} sessions, {limits.PRINCIPAL_SESSIONS_MAX} of one principal, "
                "and has as many; close clients that are done"
            )
            self._error(self._clients, routing_id, "OVERLOADED", text, {"retry_after_s": 5.0})

    def _renew(self, routing_id: bytes, user_id: str, message: messages.Renew, now: float) -> None:
        try:
            grant = self._tokens.verify(message.token, user_id, now)
        except Unauthenticated as error:
            self._error(self._clients, routing_id, error.code, error.message, error.details, fatal=False)
            return
        if not self._machine.clients.renew(routing_id, user_id, grant, now):
            self._error(
                self._clients, routing_id, "UNAUTHENTICATED", "say HELLO first", {"reason": "no_session"}
            )

    def _worker_message(
        self, routing_id: bytes, user_id: str, frame: zmq.Frame, body: Body | None, now: float
    ) -> None:
        try:
            message = codec.from_worker.decode(frame.buffer)
        except WireError as error:
            self._refused_bytes(self._workers, routing_id, user_id, frame, error, now)
            return
        if not _has_room_for(message, body):
            self._misbehaved(self._workers, routing_id, _BODY_RULE, now)
            return
        if not self._machine.workers.message(routing_id, user_id, message, body, now):
            text = "this worker is not expected here: REGISTER first, with a key that the supervisor admitted"
            self._error(self._workers, routing_id, "UNAUTHENTICATED", text, {"reason": "no_session"})

    def _refused_bytes(
        self,
        socket: zmq.Socket[bytes],
        routing_id: bytes,
        user_id: str,
        frame: zmq.Frame,
        error: WireError,
        now: float,
    ) -> None:
        """Answer bytes that are no message of this door; it costs their sender only."""
        majors = codec.foreign_majors(frame.buffer)
        if majors is not None:
            self._other_version(socket, routing_id, majors)
            return
        fatal = error.code != "UNKNOWN_KIND"
        self._count(error.code, error.message, now, user_id=user_id)
        self._error(socket, routing_id, error.code, error.message, error.details, fatal=fatal)
        if fatal and socket is self._clients:
            self._machine.clients.unreachable(routing_id, now)

    def _other_version(self, socket: zmq.Socket[bytes], routing_id: bytes, majors: tuple[int, ...]) -> None:
        text = f"this broker speaks protocol version {messages.MAJOR}; the peer offers {list(majors[:16])}"
        self._error(socket, routing_id, "UNSUPPORTED_VERSION", text, {"supported": [messages.MAJOR]})

    def _misbehaved(self, socket: zmq.Socket[bytes], routing_id: bytes, text: str, now: float) -> None:
        self._count("MALFORMED_FRAME", text, now)
        self._error(socket, routing_id, "MALFORMED_FRAME", text, {})
        if socket is self._clients:
            self._machine.clients.unreachable(routing_id, now)

    def _count(self, code: str, reason: str, now: float, **about: str) -> None:
        self._machine.refused["frames"] += 1
        if self._refusals.note(code, now):
            _log.warning("wire.refused", extra={"code": code, "reason": reason, **about})

    def _tell_refused(self, now: float) -> None:
        if more := self._refusals.expire(now):
            _log.warning("wire.refused_more", extra={"within_s": limits.REFUSALS_TOLD_S, "more": more})

    def _error(
        self,
        socket: zmq.Socket[bytes],
        routing_id: bytes,
        code: str,
        text: str,
        details: dict[str, Any],
        *,
        fatal: bool = True,
    ) -> None:
        message = error_message(code, text, fatal=fatal, epoch=self._machine.epoch, details=details)
        try:
            socket.send(routing_id, MORE)
            socket.send(codec.encode(message), DONTWAIT)
        except zmq.ZMQError:
            # a peer that does not read its refusal is not owed a second one
            return

    # -- out --------------------------------------------------------------------------------------

    def flush(self, now: float) -> None:
        """Send every outbox; what cannot be sent now waits, within bounds."""
        machine = self._machine
        # first: what a caller is told was done, the supervisor has to know when this process dies
        self._tell_supervisor()
        for socket, waiting in self._waiting.items():
            # some of them a turn, in rotation: many that never read cost those who do no time
            for routing_id in list(islice(waiting, limits.TURN_MESSAGES_MAX)):
                self._retry(socket, routing_id, now)
        while machine.clients.dirty or machine.workers.dirty:
            workers, machine.workers.dirty[:] = machine.workers.dirty[:], []
            for worker in workers:
                for envelope, body in worker.take_outbox(machine.epoch):
                    if worker.routing_id:
                        self._send(self._workers, worker.routing_id, envelope, body, now)
            clients, machine.clients.dirty[:] = machine.clients.dirty[:], []
            for session in clients:
                if machine.clients.open.get(session.routing_id) is not session:
                    # lost: its outbox waits for a client that resumes
                    session.dirty = False
                    continue
                for envelope, body in session.take_outbox(machine.epoch):
                    self._send(self._clients, session.routing_id, envelope, body, now)
        if machine.to_node:
            self._tell_supervisor()

    def _tell_supervisor(self) -> None:
        machine = self._machine
        if not machine.to_node:
            self._link.flush()
            return
        to_node, machine.to_node[:] = machine.to_node[:], []
        for node_message in to_node:
            self._link.send(node_message)

    def _send(
        self, socket: zmq.Socket[bytes], routing_id: bytes, envelope: bytes, body: Body | None, now: float
    ) -> None:
        waiting = self._waiting[socket].get(routing_id)
        if waiting is not None:
            waiting.add(envelope, body)
            return
        try:
            socket.send(routing_id, MORE)
            if body is None:
                socket.send(envelope, DONTWAIT)
            else:
                socket.send(envelope, MORE)
                socket.send(body, DONTWAIT, copy=False)  # type: ignore[call-overload]
        except zmq.Again:
            waiting = self._waiting[socket][routing_id] = Waiting()
            waiting.add(envelope, body)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._unreachable(socket, routing_id, now)

    def _retry(self, socket: zmq.Socket[bytes], routing_id: bytes, now: float) -> None:
        waiting = self._waiting[socket].pop(routing_id)
        if waiting.is_full:
            _log.warning("peer.too_slow", extra={"messages": len(waiting.queue), "bytes": waiting.bytes_held})
            self._unreachable(socket, routing_id, now)
            return
        while waiting.queue:
            envelope, body = waiting.take()
            self._send(socket, routing_id, envelope, body, now)
            again = self._waiting[socket].get(routing_id)
            if again is not None:
                again.queue.extend(waiting.queue)
                again.bytes_held += waiting.bytes_held
                return

    def _unreachable(self, socket: zmq.Socket[bytes], routing_id: bytes, now: float) -> None:
        self._waiting[socket].pop(routing_id, None)
        if socket is self._clients:
            self._machine.clients.unreachable(routing_id, now)
        else:
            self._machine.workers.unreachable(routing_id)


def _log_bug(where: str, error: Exception) -> None:
    _log.error("broker.bug", extra={"where": where}, exc_info=error)


def _may_have_body(message: messages.FromClient) -> bool:
    """Tell whether a second frame may belong to a client's message; of CALLS the machine knows more."""
    return type(message) is messages.Calls or (type(message) is messages.Chunks and len(message.chunks) == 1)


def _has_room_for(message: messages.FromWorker, body: Body | None) -> bool:
    """Tell whether a worker's second frame fits its message."""
    if body is None:
        return True
    if isinstance(message, messages.Outcomes):
        return len(message.outcomes) == 1
    return isinstance(message, messages.Partial) and len(message.parts) == 1


__all__ = ["Loop", "SupervisorGone"]
