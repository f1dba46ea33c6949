"""A scripted broker: the worker's side of the wire, driven message by message."""

from __future__ import annotations

import itertools
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq
from zmq.utils import z85

from mcp_broker.supervisor.page import Page
from mcp_broker.wire import codec, messages, payload
from mcp_broker.wire.node import WorkerBoot

PATIENCE_S = 10.0
EPOCH = 7
M = TypeVar("M")


class ScriptedBroker:
    """One ROUTER with CURVE that says only what the test tells it to."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        public, self._secret = zmq.curve_keypair()
        self.public = z85.decode(public)
        self.endpoint = "tcp://127.0.0.1:*"
        self._open()
        self.peer = b""
        self.bodies: list[bytes] = []
        self.late_body: bytes | None = None
        self._seq = itertools.count(1)

    def _open(self) -> None:
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, self._secret)
        self.socket.setsockopt(zmq.LINGER, 0)
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.socket.bind(self.endpoint)
                break
            except zmq.ZMQError:  # the old socket is still on its way out
                assert time.monotonic() < end
                select.select([], [], [], 0.002)
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def restart(self) -> None:
        """Close every connection, and listen again at the same address."""
        self.socket.close(0)
        self._open()

    def say(self, message: messages.Message, *bodies: bytes) -> None:
        self.socket.send_multipart([self.peer, codec.encode(message), *bodies])

    def hear(self, kind: type[M], patience_s: float = PATIENCE_S) -> M:
        """Return the next message, which must be of this kind; heartbeats and READY in between are skipped."""
        end = time.monotonic() + patience_s
        while True:
            assert self.socket.poll(max(0, int((end - time.monotonic()) * 1000))), f"no {kind.__name__} came"
            self.peer, packed, *self.bodies = self.socket.recv_multipart()
            message = codec.from_worker.decode(packed)
            if isinstance(message, kind):
                return message
            assert isinstance(message, messages.Heartbeat | messages.Ready), message

    def welcome(self, epoch: int = EPOCH, stream_window: int = 16) -> messages.Register:
        register = self.hear(messages.Register)
        granted = messages.GrantedLimits(window=256, heartbeat_ms=250, stream_window=stream_window)
        self.say(
            messages.Welcome(epoch, (1, 0), os.urandom(16), resumed=False, name="test-1", granted=granted)
        )
        assert self.hear(messages.Ready).depth >= 1
        self._seq = itertools.count(register.seq + 1)
        return register

    def dispatch(self, tool: str, arguments: Any = None, *, timeout_ms: int = 10_000) -> messages.Dispatch:
        packed = payload.pack({} if arguments is None else arguments)
        seq = next(self._seq)
        caller = codec.raw(messages.Caller("ada", 3, ("text.*",), admin=False))
        call_id = seq.to_bytes(16, "big")
        inline = packed if len(packed) <= 65536 else None
        self.late_body = None if inline is not None else packed
        return messages.Dispatch(seq, call_id, tool, timeout_ms, inline, caller)

    def give(self, *dispatches: messages.Dispatch, epoch: int = EPOCH) -> None:
        self.say(messages.Dispatches(epoch, 0, dispatches))

    def outcomes(self, count: int) -> list[messages.Outcome]:
        found: list[messages.Outcome] = []
        while len(found) < count:
            found += self.hear(messages.Outcomes).outcomes
        return found

    def call(self, tool: str, arguments: Any = None, **settings: Any) -> messages.Outcome:
        """Have one call run and return its outcome."""
        dispatch = self.dispatch(tool, arguments, **settings)
        if self.late_body is None:
            self.give(dispatch)
        else:
            self.say(messages.Dispatches(EPOCH, 0, (dispatch,)), self.late_body)
        (outcome,) = self.outcomes(1)
        assert outcome.call_id == dispatch.call_id
        return outcome

    def close(self) -> None:
        self.socket.close(0)
        self.context.term()


class WorkerProcess:
    """A real worker process, started as the supervisor starts it."""

    def __init__(self, broker: ScriptedBroker, scratch: Path, module: str, **settings: Any) -> None:
        self.scratch = scratch
        public, secret = zmq.curve_keypair()
        self.page = Page()
        self.marks = self.page.marks
        marks_fd = self.page.fd
        boot = WorkerBoot(
            worker_id="test-1",
            pool="test",
            endpoint=broker.endpoint,
            server_public=broker.public,
            public=z85.decode(public),
            secret=z85.decode(secret),
            module=module,
            marks_fd=marks_fd,
            scratch=str(scratch),
            **settings,
        )
        boot_read, boot_write = os.pipe()
        self.tether, their_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.tether.settimeout(PATIENCE_S)
        os.write(boot_write, codec.encode(boot))
        os.close(boot_write)
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mcp_broker.worker",
                "--boot-fd",
                str(boot_read),
                "--tether-fd",
                str(their_end.fileno()),
            ],
            pass_fds=(boot_read, their_end.fileno(), marks_fd),
            stderr=subprocess.PIPE,
            text=True,
        )
        their_end.close()
        os.close(boot_read)

    @property
    def pid(self) -> int:
        return self.process.pid

    def ended(self) -> int:
        """Wait for its end; return the exit code."""
        return self.process.wait(PATIENCE_S)

    def stderr(self) -> str:
        self.ended()
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)
        if self.process.stderr is not None:
            self.process.stderr.close()
        self.tether.close()
        self.page.close()


Start = Callable[..., WorkerProcess]


@pytest.fixture
def broker() -> Iterator[ScriptedBroker]:
    made = ScriptedBroker()
    yield made
    made.close()


@pytest.fixture
def start(broker: ScriptedBroker, tmp_path: Path) -> Iterator[Start]:
    """Start a worker for the source of a module of tools."""
    started: list[WorkerProcess] = []

    def begin(source: str, **settings: Any) -> WorkerProcess:
        (tmp_path / "tried_tools.py").write_text(
            f"from __future__ import annotations\nfrom mcp_broker.worker import tool, ToolContext\n{source}"
        )
        started.append(WorkerProcess(broker, tmp_path, "tried_tools", path=(str(tmp_path),), **settings))
        return started[-1]

    yield begin
    for worker in started:
        worker.close()
