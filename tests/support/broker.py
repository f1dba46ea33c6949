"""A real broker process with a supervisor that the test plays, and raw peers that speak only the wire."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Self

import zmq
from nacl.public import PrivateKey
from nacl.signing import SigningKey
from zmq.utils import z85

from mcp_broker.auth import claims, zap
from mcp_broker.wire import codec, messages, node, payload
from mcp_broker.wire.framing import FrameReader, frame
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from types import TracebackType

ISSUER = "mcp-broker"
AUDIENCE = "mcp-broker:test"
WITHIN_S = 10.0


class Curve:
    """A CURVE key pair."""

    def __init__(self) -> None:
        key = PrivateKey.generate()
        self.secret = bytes(key)
        self.public = bytes(key.public_key)

    @property
    def thumbprint(self) -> str:
        return zap.thumbprint(self.public)


@dataclass(frozen=True)
class Issuer:
    """A token issuer's key."""

    key: SigningKey = field(default_factory=SigningKey.generate)
    kid: str = "test"

    @property
    def seed(self) -> bytes:
        return bytes(self.key)

    @property
    def public(self) -> bytes:
        return bytes(self.key.verify_key)

    def token(self, thumbprint: str, **changes: Any) -> str:
        """Issue a token; ``changes`` override the claims of a caller who may do everything."""
        wanted: dict[str, Any] = {
            "principal": "tester",
            "scopes": ("*",),
            "thumbprint": thumbprint,
            "audience": AUDIENCE,
            "issuer": ISSUER,
            "ttl_s": 3600,
            "wall_now": time.time(),
            "jti": os.urandom(8).hex(),
            "admin": True,
        }
        return claims.issue(self.seed, kid=self.kid, **{**wanted, **changes})


def listening() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    sock.listen(128)
    return sock


class BrokerProcess:
    """``python -m mcp_broker.broker`` on ports of its own; the test is its supervisor."""

    def __init__(
        self,
        epoch: int = 1,
        *,
        allow: tuple[str, ...] = (),
        only: tuple[str, ...] = (),
        log: IO[bytes] | None = None,
        log_level: str = "info",
    ) -> None:
        self._allow, self._only = allow, only
        self._log, self._log_level = log, log_level
        self.client_key, self.worker_key = Curve(), Curve()
        self.issuer = Issuer()
        self.client_socket, self.worker_socket = listening(), listening()
        self.client_endpoint = f"tcp://127.0.0.1:{self.client_socket.getsockname()[1]}"
        self.worker_endpoint = f"tcp://127.0.0.1:{self.worker_socket.getsockname()[1]}"
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.peers: list[Peer] = []
        self.received: list[node.ToSupervisor] = []
        self.start(epoch)

    def start(self, epoch: int) -> None:
        self._reader = FrameReader()
        self.link, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mcp_broker.broker", "--link-fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno(), self.client_socket.fileno(), self.worker_socket.fileno()],
                stderr=self._log,
            )
        self.tell(
            node.Boot(
                epoch, self.client_socket.fileno(), self.worker_socket.fileno(), self.client_endpoint,
                self.worker_endpoint, self.client_key.secret, self.worker_key.secret,
                {self.issuer.kid: self.issuer.public}, ISSUER, AUDIENCE, {}, os.getpid(), time.time(), "",
                self._allow, self._only, self._log_level,
            )
        )  # fmt: skip
        self.tell(node.Report(()))
        self.expect(node.Serving)

    def tell(self, message: node.NodeMessage, descriptor: int | None = None) -> None:
        data = frame(codec.encode(message))
        if descriptor is not None:
            socket.send_fds(self.link, [data[:1]], [descriptor])
            data = data[1:]
        self.link.sendall(data)

    def expect(self, kind: type[Any], within_s: float = WITHIN_S) -> Any:
        """Return the first message of a kind that the broker sent, and forget it."""
        until = time.monotonic() + within_s
        while True:
            for message in self.received:
                if isinstance(message, kind):
                    self.received.remove(message)
                    return message
            self.link.settimeout(max(0.01, until - time.monotonic()))
            data = self.link.recv(1 << 16)
            assert data, "the broker closed its link"
            self.received += [codec.to_supervisor.decode(body) for body in self._reader.feed(data)]

    def admit(self, worker_id: str = "echo-1", pool: str = "echo") -> Curve:
        key = Curve()
        self.tell(node.Admit((node.Admitted(thumbprint=key.thumbprint, worker_id=worker_id, pool=pool),)))
        return key

    def client(
        self, key: Curve | None = None, *, routing_id: bytes | None = None, endpoint: str | None = None
    ) -> Peer:
        return self._peer(
            endpoint or self.client_endpoint, self.client_key, key or Curve(), routing_id, codec.to_client
        )

    def open_client(self, **changes: Any) -> Peer:
        """Connect a client, say HELLO, wait for WELCOME."""
        peer = self.client()
        peer.send(messages.Hello(0, "MCPB", (1,), self.issuer.token(peer.key.thumbprint, **changes)))
        peer.welcome = peer.receive(messages.Welcome)
        return peer

    def worker(self, key: Curve, endpoint: str | None = None) -> Peer:
        return self._peer(endpoint or self.worker_endpoint, self.worker_key, key, None, codec.to_worker)

    def ready_worker(
        self, *tools: messages.ToolDefinition, worker_id: str = "echo-1", pool: str = "echo", depth: int = 16
    ) -> Peer:
        """Admit a worker, register its tools, and wait until the broker counts on it."""
        key = self.admit(worker_id, pool)

        def welcomed() -> Peer | None:
            # the handshake may come before the table: like a real worker, try again with a new socket
            peer = self.worker(key)
            peer.send(messages.Register(0, "MCPB", (1,), tools or (definition("echo.echo"),)))
            try:
                peer.welcome = peer.receive(messages.Welcome, 1.0)
            except AssertionError:
                return None
            return peer

        peer = wait_for(welcomed, what="the worker's welcome")
        assert peer is not None
        peer.send(messages.Ready(peer.epoch, depth))
        self.expect(node.WorkerUp)
        return peer

    def _peer(self, endpoint: str, server: Curve, key: Curve, routing_id: bytes | None, decoder: Any) -> Peer:
        peer = Peer(self.context, endpoint, server, key, routing_id or os.urandom(16), decoder)
        self.peers.append(peer)
        return peer

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(WITHIN_S)
        self.link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for peer in self.peers:
            peer.close()
        self.kill()
        self.context.term()
        self.client_socket.close()
        self.worker_socket.close()


class Peer:
    """A DEALER that speaks the wire by hand."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        server: Curve,
        key: Curve,
        routing_id: bytes,
        decoder: Any,
    ) -> None:
        self.key = key
        self.routing_id = routing_id
        self.welcome: messages.Welcome | None = None
        self._decoder = decoder
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 86_400_000)
        self.socket.setsockopt(zmq.ROUTING_ID, routing_id)
        self.socket.curve_serverkey = z85.encode(server.public)
        self.socket.curve_publickey = z85.encode(key.public)
        self.socket.curve_secretkey = z85.encode(key.secret)
        self.socket.connect(endpoint)

    @property
    def epoch(self) -> int:
        return self.welcome.epoch if self.welcome is not None else 0

    def send(self, message: messages.AnyMessage | bytes, body: bytes | None = None) -> None:
        envelope = message if isinstance(message, bytes) else codec.encode(message)
        self.socket.send_multipart([envelope] if body is None else [envelope, body])

    def receive(self, kind: Any, within_s: float = WITHIN_S) -> Any:
        """Return the next message of a kind; others (heartbeats among them) are passed over."""
        until = time.monotonic() + within_s
        while True:
            left_ms = int((until - time.monotonic()) * 1000)
            if left_ms <= 0 or not self.socket.poll(left_ms):
                raise AssertionError(f"no {kind} within {within_s} s")
            frames = self.socket.recv_multipart()
            message = self._decoder.decode(frames[0])
            if isinstance(message, kind):
                self.body = frames[1] if len(frames) > 1 else None
                return message

    def hears_nothing_but(self, kinds: tuple[type, ...], for_s: float) -> bool:
        """Tell whether only messages of these kinds come for a while."""
        until = time.monotonic() + for_s
        while (left_ms := int((until - time.monotonic()) * 1000)) > 0:
            if self.socket.poll(left_ms) and not isinstance(
                self._decoder.decode(self.socket.recv_multipart()[0]), kinds
            ):
                return False
        return True

    def call(
        self, tool: str = "echo.echo", arguments: dict[str, Any] | None = None, *, timeout_s: float = 5.0
    ) -> bytes:
        """Send one call; returns its id."""
        call_id = os.urandom(16)
        packed = payload.pack(arguments or {})
        self.send(
            messages.Calls(self.epoch, 0, (messages.Call(call_id, tool, int(timeout_s * 1000), packed),))
        )
        return call_id

    def outcome(self, call_id: bytes, within_s: float = WITHIN_S) -> messages.Outcome:
        """Return the outcome of a call."""
        while True:
            received: messages.Outcomes = self.receive(messages.Outcomes, within_s)
            for outcome in received.outcomes:
                if outcome.call_id == call_id:
                    return outcome

    def close(self) -> None:
        self.socket.close()


def definition(name: str, **changes: Any) -> messages.ToolDefinition:
    return messages.ToolDefinition(**{"name": name, "version": "1.0.0", "capabilities": ("test",), **changes})


def answer(worker: Peer, dispatch: messages.Dispatch, result: object = None, *, first: int = 1) -> None:
    """Have a worker answer a dispatch with a result."""
    outcome = messages.Outcome(
        dispatch.call_id, messages.OK, payload.pack(result), messages.Usage(1, 1, 1, 1)
    )
    worker.send(messages.Outcomes(worker.epoch, first, (outcome,)))
