"""A broker by script: a ROUTER with CURVE in a thread, which answers as it is told and keeps what it was sent."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Self

import zmq

from mcp_broker.auth.keys import CurvePair
from mcp_broker.auth.profile import Profile
from mcp_broker.wire import codec, messages, payload

if TYPE_CHECKING:
    from types import TracebackType

USAGE = messages.Usage(1_700_000_000_000, 120, 90, 20_480)
Answer = Callable[["ScriptedBroker", bytes, messages.Call, bytes], None]


class Session:
    """What this broker knows of one session."""

    def __init__(self, session_id: bytes, routing_id: bytes) -> None:
        self.session_id = session_id
        self.routing_id = routing_id
        self.sent = 0
        self.acked = 0
        self.unacked: deque[tuple[messages.Outcome, bytes | None]] = deque()
        #: ids of calls without outcome, or whose outcome is not acknowledged: another CALLS of one is a resend
        self.known: dict[bytes, bool] = {}


class ScriptedBroker:
    """Serves a few tools; ``script`` maps further names to what answers them.

    ``echo``, ``fail``, ``hold`` (no outcome until :meth:`release`), ``count`` (a stream of n parts), ``system.tools``.
    """

    def __init__(
        self, port: int = 0, *, epoch: int = 7, keys: CurvePair | None = None, window: int = 1024
    ) -> None:
        self.keys = keys or CurvePair.generate()
        self.epoch = epoch
        self.window = window
        self.stream_window = 16
        self.capabilities: tuple[str, ...] = ()
        self.script: dict[str, Answer] = {}
        #: every message that came, HEARTBEAT and ACK included
        self.got: list[messages.FromClient] = []
        self.sessions: dict[bytes, Session] = {}
        self.routes: dict[bytes, Session] = {}
        self.held: dict[bytes, tuple[bytes, messages.Call]] = {}
        #: executions by call id
        self.runs: dict[bytes, int] = {}
        self.limits: dict[bytes, int] = {}
        self.streams: dict[bytes, tuple[int, int]] = {}
        self.silent = False
        self.beats = True
        self.refuse: messages.Error | None = None
        self.errors: list[BaseException] = []
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, self.keys.secret)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self.port = int(self.endpoint.rpartition(":")[2])
        self._todo: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scripted-broker", daemon=True)

    def profile(self, endpoint: str | None = None) -> Profile:
        """Make a client's profile; the token is a stand-in."""
        now = datetime.now(UTC)
        return Profile(
            endpoints=(endpoint or self.endpoint,),
            server_key=self.keys.public,
            keys=CurvePair.generate(),
            token="a.b.c",
            principal="tester",
            created=now,
            expires=now + timedelta(days=1),
        )

    def start(self) -> ScriptedBroker:
        """Serve."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop at once; whatever was under way is lost."""
        self._stopping = True
        if self._thread.is_alive():
            self._thread.join(5)
        self._socket.close(0)
        self._context.term()
        assert self.errors == []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- for tests, from their thread ---------------------------------------------------------------------------

    def do(self, action: Callable[[], None]) -> None:
        """Run something in the broker's thread, and wait for it."""
        done = threading.Event()

        def run() -> None:
            action()
            done.set()

        self._todo.append(run)
        assert done.wait(5)

    def release(self) -> None:
        """Let all held calls succeed with "released"."""

        def run() -> None:
            held, self.held = self.held, {}
            for call_id, (session_id, _) in held.items():
                self.outcome(session_id, ok(call_id, "released"))

        self.do(run)

    def say(self, message: messages.ToClient) -> None:
        """Send a message to every session."""

        def run() -> None:
            for route in list(self.routes):
                self.send(route, message)

        self.do(run)

    def forget(self) -> None:
        """Lose all sessions and start another epoch, as a restarted broker on the same port would."""

        def run() -> None:
            self.sessions.clear()
            self.routes.clear()
            self.held.clear()
            self.epoch += 1

        self.do(run)

    def of_kind(self, kind: type) -> list[Any]:
        """Return the messages of a kind that came so far."""
        return [message for message in list(self.got) if type(message) is kind]

    # -- in the broker's thread -----------------------------------------------------------------------------------

    def send(self, route: bytes, message: messages.ToClient, body: bytes | None = None) -> None:
        if self.silent:
            return
        try:
            self._socket.send_multipart(
                [route, codec.encode(message), *([body] if body is not None else [])], zmq.DONTWAIT
            )
        except zmq.ZMQError:
            self.routes.pop(route, None)

    def outcome(self, session_id: bytes, outcome: messages.Outcome, body: bytes | None = None) -> None:
        session = self.sessions.get(session_id)
        if session is None:
            return
        session.sent += 1
        session.unacked.append((outcome, body))
        self.send(session.routing_id, messages.Outcomes(self.epoch, session.sent, (outcome,)), body)

    def _run(self) -> None:
        beat_at = 0.0
        try:
            while not self._stopping:
                while self._todo:
                    self._todo.popleft()()
                now = time.monotonic()
                if self.beats and now >= beat_at:
                    beat_at = now + 0.25
                    for route in list(self.routes):
                        self.send(route, messages.Heartbeat(self.epoch))
                if self._socket.poll(2):
                    self._take()
        except BaseException as error:
            self.errors.append(error)
            raise

    def _take(self) -> None:
        batches: dict[bytes, list[messages.Outcome]] = {}
        for _ in range(256):
            try:
                route, envelope, *rest = self._socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            message = codec.from_client.decode(envelope)
            self.got.append(message)
            if self.silent:
                continue
            self._message(route, message, rest[0] if rest else None, batches)
        for session_id, outcomes in batches.items():
            session = self.sessions.get(session_id)
            if session is None:
                continue
            for at in range(0, len(outcomes), 256):
                run = outcomes[at : at + 256]
                session.unacked.extend((outcome, None) for outcome in run)
                self.send(session.routing_id, messages.Outcomes(self.epoch, session.sent + 1, tuple(run)))
                session.sent += len(run)

    def _message(
        self, route: bytes, message: Any, body: bytes | None, batches: dict[bytes, list[Any]]
    ) -> None:
        if isinstance(message, messages.Hello):
            self._hello(route, message)
            return
        session = self.routes.get(route)
        if session is None:
            self.send(
                route, messages.Error(self.epoch, "UNAUTHENTICATED", "HELLO first", b"\x80", fatal=True)
            )
            return
        if message.epoch != self.epoch:
            return
        if isinstance(message, messages.Calls | messages.Ack):
            self._acked(session, message.ack if isinstance(message, messages.Calls) else message.count)
        if isinstance(message, messages.Calls):
            for call in message.calls:
                if call.call_id not in session.known:
                    session.known[call.call_id] = True
                    self.runs[call.call_id] = self.runs.get(call.call_id, 0) + 1
                    self._call(session, call, body, batches)
        elif isinstance(message, messages.Cancel):
            for call_id in message.call_ids:
                if self.held.pop(call_id, None) or self.streams.pop(call_id, None):
                    self.outcome(session.session_id, fault(call_id, "CANCELLED", "cancelled"))
        elif isinstance(message, messages.Credit):
            for credit in message.credits:
                self.limits[credit.call_id] = credit.limit
                self._go_on(session, credit.call_id)
        elif isinstance(message, messages.Goodbye):
            del self.routes[route]
            del self.sessions[session.session_id]

    def _acked(self, session: Session, count: int) -> None:
        while session.unacked and session.sent - len(session.unacked) < count:
            outcome, _ = session.unacked.popleft()
            session.known.pop(outcome.call_id, None)
        session.acked = max(session.acked, count)

    def _hello(self, route: bytes, hello: messages.Hello) -> None:
        if self.refuse is not None:
            self.send(route, self.refuse)
            return
        session = self.sessions.get(hello.session_id or b"")
        resumed = session is not None
        if session is None:
            session = Session((len(self.sessions) + 1 + self.epoch * 1000).to_bytes(16, "big"), route)
            self.sessions[session.session_id] = session
        self.routes.pop(session.routing_id, None)
        session.routing_id = route
        self.routes[route] = session
        granted = messages.GrantedLimits(
            window=self.window, heartbeat_ms=250, stream_window=self.stream_window
        )
        self.send(
            route,
            messages.Welcome(
                self.epoch, (1, 0), session.session_id, resumed, "tester", granted, self.capabilities
            ),
        )
        self._acked(session, hello.ack)
        first = session.sent - len(session.unacked) + 1
        for at, (outcome, body) in enumerate(session.unacked):
            self.send(route, messages.Outcomes(self.epoch, first + at, (outcome,)), body)

    def _call(
        self, session: Session, call: messages.Call, body: bytes | None, batches: dict[bytes, list[Any]]
    ) -> None:
        packed = call.arguments if call.arguments is not None else body or b""
        if call.tool in self.script:
            self.script[call.tool](self, session.session_id, call, packed)
        elif call.tool == "echo":
            if body is not None:
                self.outcome(session.session_id, messages.Outcome(call.call_id, "OK", None, USAGE), packed)
            else:
                batches.setdefault(session.session_id, []).append(
                    messages.Outcome(call.call_id, "OK", packed, USAGE)
                )
        elif call.tool == "hold":
            self.held[call.call_id] = (session.session_id, call)
        elif call.tool == "count":
            self.limits[call.call_id] = self.stream_window
            self.streams[call.call_id] = (0, payload.unpack(packed)["n"])
            self._go_on(session, call.call_id)
        elif call.tool == "system.tools":
            answer = {"tools": [{"name": "echo", "asked": payload.unpack(packed)}], "broker": {}}
            self.outcome(session.session_id, ok(call.call_id, answer))
        else:
            code = "TOOL_FAILED" if call.tool == "fail" else "NOT_FOUND"
            self.outcome(
                session.session_id,
                fault(call.call_id, code, f"{call.tool} did not work", {"tool": call.tool}),
            )

    def _go_on(self, session: Session, call_id: bytes) -> None:
        if call_id not in self.streams:
            return
        at, n = self.streams[call_id]
        while at < n and at < self.limits[call_id]:
            part = messages.Part(call_id, at, payload.pack(at))
            self.send(session.routing_id, messages.Partial(self.epoch, (part,)))
            at += 1
        self.streams[call_id] = (at, n)
        if at == n:
            del self.streams[call_id]
            self.outcome(session.session_id, ok(call_id, None))


def ok(call_id: bytes, value: Any) -> messages.Outcome:
    """Make the outcome of a call that succeeded."""
    return messages.Outcome(call_id, "OK", payload.pack(value), USAGE)


def fault(call_id: bytes, code: str, text: str, details: dict[str, Any] | None = None) -> messages.Outcome:
    """Make the outcome of a call that failed."""
    return messages.Outcome(
        call_id, code, None, None, messages.Fault(text, False, payload.pack(details or {}))
    )
