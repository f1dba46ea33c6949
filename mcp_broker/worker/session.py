"""A worker's side of the worker protocol: messages in, calls to run; outcomes in, messages out.

::

    CLOSED --opened()--> REGISTERING --WELCOME--> SERVING --DRAIN--> DRAINING
       ^                      |  ERROR fatal         |                  |
       |                      v                      |                  |
       |                   REFUSED                   |                  |
       +---------------------- lost() ---------------+------------------+

No socket and no clock: :mod:`mcp_broker.worker.shell` moves the bytes. A connection that ends takes along only calls
that have not started: what runs goes on, and an outcome is kept until the broker says that it arrived at its caller.
REGISTER tells the next connection's broker, which may be another one, what is held; the outcomes are sent again.
Source: docs/protocol.md, "Worker sessions".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.errors import WireError
from mcp_broker.wire import codec, encoding, messages
from mcp_broker.wire.structs import Slim
from mcp_broker.worker.kept import Kept, KeptOutcomes, held
from mcp_broker.worker.outcomes import fault
from mcp_broker.worker.pace import Pace

if TYPE_CHECKING:
    from mcp_broker.worker.uploads import Received

#: an envelope and its second frame, if any
Frames = tuple[bytes, bytes | None]

#: broker to worker every second at least (every HEARTBEAT_S while it holds calls): three lost beats, or half again
#: as long as the idle beat takes
SILENCE_BUSY_S: Final = 1.5
SILENCE_IDLE_S: Final = 3.0


class State(Enum):
    """How far the session has come."""

    CLOSED = "closed"
    REGISTERING = "registering"
    SERVING = "serving"
    DRAINING = "draining"
    REFUSED = "refused"


class Pending(Slim):
    """A call that waits here or runs.

    Attributes:
        arguments: the payload.
        deadline: on the loop's clock, seconds.
        life: of which session it is.
    """

    dispatch: messages.Dispatch
    arguments: bytes | memoryview
    deadline: float
    life: int


class Session:
    """The worker's half of one conversation after another.

    Args:
        tools: what to register.
        concurrency: calls that run at a time.
        agent: name and version of this software.
        traits: of tools that have any: what else the broker is to know.

    Attributes:
        inbox: calls that wait, in the order of their seq.
        cancelled: ids of calls that the broker cancelled and that were not waiting any more.
        credits: call id -> parts that the caller takes, where a CREDIT came.
        uploads: call id -> what came of the argument that a running call reads in chunks.
        kept: outcomes that were not acknowledged, message by message, oldest first.
        running: calls that have started, by id.
        outgoing: messages to send, in order. ``orders``: hooks to run, between two calls.
        refusal: why the broker refused the registration.
    """

    def __init__(
        self,
        tools: Iterable[messages.ToolDefinition],
        concurrency: int,
        agent: str,
        traits: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self._tools = tuple(tools)
        self._traits = dict(traits or {})
        self._agent = agent
        self.state = State.CLOSED
        self.pace = Pace(concurrency)
        self.inbox: deque[Pending] = deque()
        self.running: dict[bytes, Pending] = {}
        self.kept = KeptOutcomes()
        #: number of the last call that came, in this worker's life
        self._seq = 0
        self.cancelled: set[bytes] = set()
        self.credits: dict[bytes, int] = {}
        self.uploads: dict[bytes, Received] = {}
        self._upload_window = limits.UPLOAD_WINDOW_MAX
        self.outgoing: list[Frames] = []
        self.orders: deque[messages.Hook] = deque()
        self.refusal = ""
        self.life = 0
        self.heard_at = 0.0
        self.window = limits.STREAM_WINDOW_MAX
        self.worker_id = ""
        #: the broker takes PROGRESS
        self._tells_progress = False
        self._epoch = 0
        self._numbered = 0
        self._outbox: list[messages.Outcome] = []
        self._callers: list[codec.Raw | messages.Held] = []
        self._outbox_bytes = 0
        #: the latest deadline of their calls
        self._outbox_deadline = 0.0

    # -- the connection -----------------------------------------------------------------------------

    def opened(self, now: float) -> None:
        """Begin a session on a new connection: REGISTER, and nothing else before WELCOME."""
        self.lost()
        self.kept.forget_repeated(self.running.keys())
        self.state = State.REGISTERING
        self.heard_at = now
        envelope = codec.encode(self._register(now))
        while len(envelope) > limits.REGISTER_BYTES_MAX and self.kept:
            # it would be refused, and the worker end with all that it runs
            self.kept.halve()
            envelope = codec.encode(self._register(now))
        self.outgoing.append((envelope, None))

    @property
    def register_bytes(self) -> int:
        """How long REGISTER is while no outcome is kept."""
        return len(codec.encode(self._register(0.0)))

    def _register(self, now: float) -> messages.Register:
        return messages.Register(
            0,
            messages.PROTOCOL,
            (messages.MAJOR,),
            self._tools,
            ("streaming", "zstd"),
            self._agent,
            self._seq,
            (*self.kept.held(), *self._running(now)),
            self._traits,
            self.kept.let_go_ms(now),
        )

    def _running(self, now: float) -> Iterator[messages.Held]:
        for pending in self.running.values():
            yield held(pending.dispatch, pending.dispatch.seq, pending.deadline - now)

    def lost(self) -> None:
        """The connection is gone, and with it all that was on its way."""
        self.life += 1
        self.state = State.CLOSED
        self.flush()
        self.inbox.clear()
        self.cancelled.clear()
        self.credits.clear()
        self.uploads.clear()
        self.outgoing.clear()
        self.orders.clear()
        self._numbered = 0
        self._epoch = 0

    def silent_at(self) -> float:
        """When a broker that says nothing until then counts as gone, on the loop's clock."""
        busy = self.state is State.REGISTERING or self.inbox or self.running
        return self.heard_at + (SILENCE_BUSY_S if busy else SILENCE_IDLE_S)

    # -- what the broker says -------------------------------------------------------------------------

    def receive(self, envelope: bytes, body: bytes | memoryview | None, now: float) -> None:
        """Take one message of the broker; one that is wrong is dropped, as the broker's are ours to survive."""
        try:
            message = codec.to_worker.decode(envelope)
        except WireError:
            return
        self.heard_at = now
        if isinstance(message, messages.Error):
            if message.fatal and self.state is State.REGISTERING:
                self.state = State.REFUSED
                self.refusal = f"{message.code}: {message.message}"
            elif message.fatal:
                # the broker does not know this session any more: begin another
                self.lost()
        elif self.state is State.REGISTERING:
            if isinstance(message, messages.Welcome):
                self._welcome(message)
        elif message.epoch == self._epoch and self.state in {State.SERVING, State.DRAINING}:
            self._serve(message, body, now)

    def _serve(self, message: messages.ToWorker, body: bytes | memoryview | None, now: float) -> None:
        if isinstance(message, messages.Dispatches):
            self.kept.acknowledge(message.ack)
            self._seq = message.calls[-1].seq
            life, wait = self.life, self.inbox.append
            for dispatch in message.calls:
                arguments: bytes | memoryview | None = dispatch.arguments
                if arguments is None:
                    arguments = body if body is not None else b""
                wait(Pending(dispatch, arguments, now + dispatch.timeout_ms * 0.001, life))
        elif isinstance(message, messages.Credit):
            for credit in message.credits:
                if credit.call_id in self.running or self._waits(credit.call_id):
                    self.credits[credit.call_id] = max(credit.limit, self.credits.get(credit.call_id, 0))
        elif isinstance(message, messages.Chunks):
            self._chunks(message, body)
        elif isinstance(message, messages.Cancel):
            self._cancel(message.call_ids)
        elif isinstance(message, messages.Ack):
            self.kept.acknowledge(message.count)
        elif isinstance(message, messages.Heartbeat):
            self.outgoing.append((codec.encode(messages.Heartbeat(self._epoch)), None))
        elif isinstance(message, messages.Hook):
            self.orders.append(message)
        elif isinstance(message, messages.Drain):
            self.state = State.DRAINING
        elif isinstance(message, messages.Goodbye):
            self.lost()

    def _chunks(self, message: messages.Chunks, body: bytes | memoryview | None) -> None:
        for chunk in message.chunks:
            received = self.uploads.get(chunk.call_id)
            if received is not None:
                received.add(chunk.data if chunk.data is not None else bytes(body or b""), last=chunk.last)

    def _waits(self, call_id: bytes) -> bool:
        return any(pending.dispatch.call_id == call_id for pending in self.inbox)

    def _welcome(self, message: messages.Welcome) -> None:
        self.state = State.SERVING
        self._epoch = message.epoch
        self.worker_id = message.name
        self.window = message.granted.stream_window
        self._upload_window = message.granted.upload_window
        self._tells_progress = "progress" in message.capabilities
        self.outgoing.append((codec.encode(messages.Ready(self._epoch, self.pace.announce())), None))
        for kept in self.kept:
            kept.last = self._send(kept.outcomes, kept.body)

    def _send(self, outcomes: tuple[messages.Outcome, ...], body: bytes | None) -> int:
        """Queue a message of outcomes; return the number of its last one."""
        first = self._numbered + 1
        self._numbered += len(outcomes)
        self.outgoing.append((codec.encode(messages.Outcomes(self._epoch, first, outcomes)), body))
        return self._numbered

    def _cancel(self, call_ids: tuple[bytes, ...]) -> None:
        wanted = set(call_ids)
        self.cancelled |= wanted & self.running.keys()
        kept: deque[Pending] = deque()
        for pending in self.inbox:
            if pending.dispatch.call_id in wanted:
                self.finish(
                    pending, fault(pending.dispatch.call_id, "CANCELLED", "cancelled before it started")
                )
            else:
                kept.append(pending)
        if len(kept) < len(self.inbox):
            # the worker may have nothing else to run, and nobody would flush them
            self.flush()
        self.inbox = kept

    # -- what the worker says -------------------------------------------------------------------------

    def start(self) -> Pending:
        """Take the next call to run."""
        pending = self.inbox.popleft()
        self.running[pending.dispatch.call_id] = pending
        return pending

    def finish(self, pending: Pending, outcome: messages.Outcome, body: bytes | None = None) -> None:
        """Take the one outcome of a call; ``body`` is its result where that goes in a frame of its own."""
        call_id = outcome.call_id
        if self.running.pop(call_id, None) is None and pending.life != self.life:
            return
        if self.cancelled:
            self.cancelled.discard(call_id)
        if self.credits:
            self.credits.pop(call_id, None)
        if self.uploads:
            self.uploads.pop(call_id, None)
        outbox = self._outbox
        size = len(outcome.body) if outcome.body is not None else 0
        if outcome.fault is not None:
            size += len(outcome.fault.details) + len(outcome.fault.message) * 4
        if outbox and (
            body is not None
            or self._outbox_bytes + size > limits.BATCH_BYTES_MAX
            or len(outbox) >= limits.BATCH_MAX
        ):
            self.flush()
        outbox.append(outcome)
        dispatch = pending.dispatch
        is_detached = dispatch.extra is not None and dispatch.extra.detach
        self._callers.append(held(dispatch, 0) if is_detached else dispatch.caller)
        self._outbox_bytes += size
        self._outbox_deadline = max(self._outbox_deadline, pending.deadline)
        if body is not None:
            self.flush(body)

    def part(self, pending: Pending, index: int, body: bytes) -> bool:
        """Send one part of a stream; False if nobody listens any more."""
        if pending.life != self.life:
            return False
        self.flush()
        encoded = None
        if len(body) >= limits.COMPRESS_BYTES_MIN:
            body, encoded = encoding.shrink_for(pending.dispatch, body)
        inline = len(body) <= limits.INLINE_BYTES_MAX
        part = messages.Part(pending.dispatch.call_id, index, body if inline else None, encoded)
        packed = codec.encode(messages.Partial(self._epoch, (part,)))
        self.outgoing.append((packed, None if inline else body))
        return True

    def progress(self, pending: Pending, fraction: float | None, message: str) -> None:
        """Say how far a call has come, if anybody listens."""
        is_open = self.state is State.SERVING or self.state is State.DRAINING
        if is_open and self._tells_progress and pending.dispatch.call_id in self.running:
            item = messages.Progress(pending.dispatch.call_id, fraction, message)
            self.outgoing.append((codec.encode(messages.Progresses(self._epoch, (item,))), None))

    def read(self, pending: Pending) -> bytes | None:
        """Return the next chunk of a running call's upload, and tell the caller when it may send more.

        No bytes at the end; None while the chunk is not there yet. Raises ConnectionError when it cannot come any more.
        """
        received = self.uploads.get(pending.dispatch.call_id)
        if received is None:
            raise ConnectionError(
                "the argument's bytes cannot be read any more: the connection or the call ended"
            )
        data = received.take()
        limit = received.raised(self._upload_window)
        if limit is not None:
            credit = messages.StreamCredit(pending.dispatch.call_id, limit)
            self.outgoing.append((codec.encode(messages.Credit(self._epoch, (credit,))), None))
        return data

    def may_send(self, pending: Pending, index: int) -> bool:
        """Tell whether the caller takes the part with this index."""
        return index < self.window or index < self.credits.get(pending.dispatch.call_id, 0)

    def flush(self, body: bytes | None = None) -> None:
        """Make one message of the finished outcomes, and announce a depth that changed.

        Without a session they are kept for the next one.
        """
        if self._outbox:
            outcomes, callers = tuple(self._outbox), self._callers
            size = self._outbox_bytes + (len(body) if body is not None else 0)
            self._outbox.clear()
            self._callers = []
            self._outbox_bytes = 0
            is_open = self.state is State.SERVING or self.state is State.DRAINING
            last = self._send(outcomes, body) if is_open else 0
            self.kept.add(Kept(last, outcomes, callers, body, size, self._outbox_deadline))
            self._outbox_deadline = 0.0
        if self.state is State.SERVING and self.pace.has_changed():
            self.outgoing.append((codec.encode(messages.Ready(self._epoch, self.pace.announce())), None))

    def hooked(self, order: messages.Hook, error: str) -> None:
        """Say that hooks have run, unless the connection that asked for them has ended meanwhile."""
        if order.epoch == self._epoch:
            done = messages.Hooked(self._epoch, order.order, error[: limits.TEXT_CHARS_MAX])
            self.outgoing.append((codec.encode(done), None))

    def goodbye(self, reason: str) -> None:
        """End the session."""
        if self.state in {State.SERVING, State.DRAINING}:
            self.flush()
            self.outgoing.append((codec.encode(messages.Goodbye(self._epoch, reason)), None))
