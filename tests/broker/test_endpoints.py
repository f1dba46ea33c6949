"""Addresses of single workers: a real broker, whose supervisor the test plays, serves the sockets that it is handed."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mcp_broker.errors import SupervisionError
from mcp_broker.supervisor.endpoint import PATH_BYTES_MAX, Endpoint
from mcp_broker.wire import messages, node
from tests.support.broker import BrokerProcess, Curve, Peer, answer, definition
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.process

#: how long a handshake that must not succeed is given
_REFUSED_S = 0.4


@pytest.fixture
def broker() -> Iterator[BrokerProcess]:
    with BrokerProcess() as process:
        yield process


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose path is too long for a socket's name."""
    deep = tmp_path / ("x" * PATH_BYTES_MAX)
    deep.mkdir()
    return deep / "echo-1.ipc"


def as_its_worker_sees_it(endpoint: Endpoint) -> str:
    """Return the address inside a namespace where the folder has a short path; here a descriptor stands for it."""
    descriptor = os.open(endpoint.folder, os.O_PATH)
    return f"ipc:///proc/self/fd/{descriptor}/{endpoint.name}"


def serve(broker: BrokerProcess, endpoint: Endpoint, worker_id: str = "echo-1") -> Curve:
    key = broker.admit(worker_id)
    broker.tell(node.Listen(worker_id, key.thumbprint, endpoint.address), endpoint.fileno())
    return key


def register(broker: BrokerProcess, key: Curve, address: str) -> Peer:
    peer = broker.worker(key, address)
    peer.send(messages.Register(0, "MCPB", (1,), (definition("echo.echo"),)))
    return peer


def is_welcome(broker: BrokerProcess, key: Curve, address: str | None = None) -> bool:
    peer = register(broker, key, address or broker.worker_endpoint)
    try:
        peer.receive(messages.Welcome, _REFUSED_S)
    except AssertionError:
        return False
    finally:
        peer.close()
    return True


def test_worker_serves_calls_through_its_own_address_however_long_the_path(
    broker: BrokerProcess, folder: Path
) -> None:
    endpoint = Endpoint(folder, "echo-1")
    worker = register(broker, serve(broker, endpoint), as_its_worker_sees_it(endpoint))
    worker.welcome = worker.receive(messages.Welcome)
    worker.send(messages.Ready(worker.epoch, 4))
    broker.expect(node.WorkerUp)
    client = broker.open_client()
    call_id = client.call(arguments={"value": 7})
    answer(worker, worker.receive(messages.Dispatches).calls[0], 7)
    assert client.outcome(call_id).code == "OK"
    endpoint.close()


def test_own_address_lets_in_its_worker_alone_and_that_worker_nowhere_else(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    first, second = (Endpoint(tmp_path / name, name) for name in ("echo-1", "echo-2"))
    key, other = serve(broker, first, "echo-1"), serve(broker, second, "echo-2")
    assert not is_welcome(broker, other, first.path), "a neighbour's key opens this door"
    assert not is_welcome(broker, Curve(), first.path)
    assert not is_welcome(broker, key), "its key opens the common door"
    assert is_welcome(broker, key, first.path)
    assert is_welcome(broker, other, second.path)
    for endpoint in (first, second):
        endpoint.close()


def test_address_of_a_dead_worker_is_served_no_longer(broker: BrokerProcess, tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "echo-1", "echo-1")
    serve(broker, endpoint)

    def listeners() -> int:
        held = Path(f"/proc/{broker.process.pid}/fd")
        links = [str(path.readlink()) for path in held.iterdir() if path.is_symlink()]
        return sum(link == f"socket:[{os.fstat(endpoint.fileno()).st_ino}]" for link in links)

    wait_for(lambda: listeners() == 1, what="the broker holds the listening socket")
    certificate = node.Certificate(worker_id="echo-1", pool="echo", pid=1, cause="exited", kind="exit")
    broker.tell(node.Died(certificate))

    def is_closed() -> bool:
        # what its supervisor says every second
        broker.tell(node.Report(()))
        return listeners() == 0

    wait_for(is_closed, what="the broker closes it")
    endpoint.close()


def test_broker_that_is_started_anew_serves_the_same_address(broker: BrokerProcess, tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "echo-1", "echo-1")
    key = serve(broker, endpoint)
    assert is_welcome(broker, key, endpoint.path)
    broker.kill()
    # while there is no broker a connection waits
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(endpoint.path.removeprefix("ipc://"))
        broker.start(epoch=2)
        admitted = node.Admitted(thumbprint=key.thumbprint, worker_id="echo-1", pool="echo")
        broker.tell(node.Admit((admitted,)))
        broker.tell(node.Listen("echo-1", key.thumbprint, endpoint.address), endpoint.fileno())
        waiting.settimeout(5.0)
        assert waiting.recv(10).startswith(b"\xff"), "the broker's greeting"
    assert is_welcome(broker, key, endpoint.path)
    endpoint.close()


def test_path_too_long_for_its_worker_says_so_and_what_to_do(folder: Path) -> None:
    endpoint = Endpoint(folder, "echo-1")
    with pytest.raises(SupervisionError, match="choose a shorter --state-dir"):
        _ = endpoint.path
    endpoint.close()


def test_socket_is_for_its_owner_only_and_takes_nobody_when_the_endpoint_is_closed(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "e", "echo-1")
    assert (tmp_path / "e").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "e" / "echo-1").stat().st_mode & 0o777 == 0o600
    endpoint.close()
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(str(tmp_path / "e" / "echo-1"))
