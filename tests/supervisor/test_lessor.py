"""Leased ports with real sockets: who gets in, what ends, and what is counted."""

from __future__ import annotations

import gc
import ipaddress
import os
import socket
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from mcp_broker.config import parse
from mcp_broker.errors import ConfigError
from mcp_broker.supervisor import gauge, socket_filter
from mcp_broker.supervisor.lessor import Lessor
from mcp_broker.wire.confinement import Confinement
from mcp_broker.wire.tether import Leased, LeasePort, LeaseRefused, ReturnPort, TetherMessage
from tests.support.ports import connect, free_span
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from mcp_broker.wire.ports import PortReport


class Worker:
    """A life, as far as a lessor sees it; keeps what it is answered, with its own copy of each socket."""

    def __init__(self, lessor: Lessor, worker_id: str = "t-1", network: str = "full") -> None:
        self.worker_id = worker_id
        self.tether = self
        self.cell = self
        self.confinement = Confinement(network=network)
        self.answers: list[TetherMessage] = []
        self.sockets: list[socket.socket] = []
        #: this process, which holds the copies
        self.process = self
        self.main_pid = os.getpid()
        self.metered = None
        self.violations: list[str] = []
        self._handlers = lessor.handlers(self)  # type: ignore[arg-type]

    def send(self, message: TetherMessage, fd: int | None = None) -> None:
        self.answers.append(message)
        if fd is not None:
            self.sockets.append(socket.socket(fileno=socket.dup(fd)))

    def says(self, message: TetherMessage) -> TetherMessage | None:
        before = len(self.answers)
        self._handlers[type(message)](message)
        return self.answers[-1] if len(self.answers) > before else None

    def violate(self, what: str) -> None:
        self.violations.append(what)

    def close(self) -> None:
        for one in self.sockets:
            one.close()


@pytest.fixture
def first() -> int:
    return free_span(3)


@pytest.fixture
def make(first: int) -> Iterator[object]:
    made: list[Lessor] = []

    def begin(more: str = "") -> Lessor:
        made.append(Lessor(parse(f"[ports]\nmin = {first}\nmax = {first + 2}\n{more}").ports))
        return made[-1]

    yield begin
    for lessor in made:
        lessor.close()


@pytest.fixture
def lessor(make: object) -> Lessor:
    return make()  # type: ignore[no-any-return, operator]


def report(lessor: Lessor, port: int) -> PortReport:
    """Look at the connections, and return what is told of a port."""
    lessor.sample()
    return next(one for one in lessor.report() if one.port == port)


def test_a_leased_socket_listens_already_and_what_goes_through_is_counted(lessor: Lessor, first: int) -> None:
    worker = Worker(lessor)
    assert worker.says(LeasePort(1)) == Leased(1, "127.0.0.1", first)
    with connect(first) as client, worker.sockets[0].accept()[0] as served:
        client.sendall(b"x" * 1000)
        served.sendall(b"y" * 300)
        assert client.recv(300) == b"y" * 300
        served.recv(1000)
        seen = report(lessor, first)
        assert (seen.state, seen.owner, seen.listening) == ("active", "t-1", True)
        if seen.connections:  # a kernel that tells
            assert (seen.bytes_in, seen.connections_total) == (1000, 1)
            assert seen.last_wall > 0
            wait_for(lambda: report(lessor, first).bytes_out == 300, what="the bytes acknowledged")
    worker.close()


def test_a_port_that_is_given_back_stops_listening_also_in_a_worker_that_kept_its_copy(
    lessor: Lessor, first: int
) -> None:
    worker = Worker(lessor)
    worker.says(LeasePort(1))
    assert worker.says(ReturnPort(first)) is None
    with pytest.raises(ConnectionRefusedError):
        connect(first)
    assert lessor.report() == ()
    next_one = Worker(lessor, "t-2")
    assert next_one.says(LeasePort(1, first)) == Leased(1, "127.0.0.1", first)
    worker.close()
    next_one.close()


def test_a_worker_that_listens_without_a_lease_is_stopped_and_killed(lessor: Lessor, first: int) -> None:
    worker = Worker(lessor)
    worker.says(LeasePort(1))
    worker.says(ReturnPort(first))
    lessor.sample()
    assert worker.violations == []
    worker.sockets[0].listen()
    connect(first).close()
    lessor.sample()
    assert worker.violations == [f"it listened on port {first}, whose lease had ended"]
    with pytest.raises(ConnectionRefusedError):
        connect(first)
    # what it keeps is in nobody's way
    next_one = Worker(lessor, "t-2")
    assert next_one.says(LeasePort(1, first)) == Leased(1, "127.0.0.1", first)
    lessor.sample()
    assert next_one.violations == []
    worker.close()
    next_one.close()


def test_a_lease_that_drains_does_not_listen_again(lessor: Lessor, first: int) -> None:
    worker = Worker(lessor)
    worker.says(LeasePort(1))
    lessor.drain()
    worker.sockets[0].listen()
    lessor.sample()
    with pytest.raises(ConnectionRefusedError):
        connect(first)
    assert worker.violations == []
    worker.close()


def test_of_leases_that_have_ended_nothing_is_held_that_the_worker_does_not_hold(
    lessor: Lessor, first: int
) -> None:
    def held() -> int:
        # what earlier tests forgot goes at any moment
        gc.collect()
        return sum(one.startswith("socket:") for _, one in gauge.descriptors(os.getpid()))

    worker = Worker(lessor)
    other = subprocess.Popen(["sleep", "60"])
    worker.main_pid = other.pid
    before = held()
    most = 0
    for number in range(1000):
        worker.says(LeasePort(number, first))
        worker.says(ReturnPort(first))
        worker.sockets.pop().close()
        most = max(most, held() - before) if number % 50 == 0 else most
    assert 1 < most < 300
    lessor.sample()
    assert held() == before
    with socket.socket() as anybody:
        anybody.bind(("127.0.0.1", first))
    other.kill()
    other.wait()


def test_the_ports_of_a_dead_worker_are_free_at_once(lessor: Lessor, first: int) -> None:
    worker = Worker(lessor)
    worker.says(LeasePort(1))
    worker.says(LeasePort(2))
    assert lessor.owner_died("t-1") == [first, first + 1]
    worker.close()
    for number in (first, first + 1):
        with socket.socket() as anybody:
            anybody.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            anybody.bind(("127.0.0.1", number))


def test_a_port_that_somebody_else_has_is_passed_over_and_shown_with_the_reason(
    lessor: Lessor, first: int
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", first))
        other.listen()
        worker = Worker(lessor)
        assert worker.says(LeasePort(1)) == Leased(1, "127.0.0.1", first + 1)
        refused = worker.says(LeasePort(2, first))
    assert isinstance(refused, LeaseRefused)
    assert refused.code == "PORT_UNAVAILABLE"
    assert report(lessor, first).reason == "it cannot be bound: Address already in use"
    worker.close()


def test_nobody_gets_more_than_there_are_and_the_answer_says_why(make: object, first: int) -> None:
    lessor: Lessor = make("per_worker = 5\n")  # type: ignore[operator]
    worker = Worker(lessor)
    answers = [worker.says(LeasePort(number)) for number in range(4)]
    assert [type(answer) for answer in answers] == [Leased, Leased, Leased, LeaseRefused]
    assert answers[3] == LeaseRefused(
        3, "PORTS_EXHAUSTED",
        "no port is left: all 3 of the range are in use; widen [ports] min and max, or try again later",
    )  # fmt: skip
    outside = worker.says(LeasePort(9, first - 1))
    assert isinstance(outside, LeaseRefused)
    assert outside.code == "PORT_INVALID"
    worker.close()


@pytest.mark.parametrize(
    ("network", "more", "is_allowed"),
    [
        ("none", "", False),
        ("loopback", "", True),
        ("loopback", 'host = "0.0.0.0"\n', False),
        ("full", "", True),
    ],
)
def test_a_pool_without_network_leases_none(make: object, network: str, more: str, is_allowed: bool) -> None:
    worker = Worker(make(more), network=network)  # type: ignore[operator]
    answer = worker.says(LeasePort(1))
    assert isinstance(answer, Leased if is_allowed else LeaseRefused)
    if isinstance(answer, LeaseRefused):
        assert answer.code == "PORT_DENIED"
        assert "network" in answer.message
    worker.close()


def test_only_listed_networks_reach_a_leased_port_and_its_worker_cannot_change_that(
    make: object, first: int
) -> None:
    lessor: Lessor = make('allow = ["127.0.0.2/32", "10.0.0.0/8"]\n')  # type: ignore[operator]
    worker = Worker(lessor)
    answer = worker.says(LeasePort(1))
    if isinstance(answer, LeaseRefused):
        assert answer.code == "PORT_DENIED", "rather no port than one for everybody"
        pytest.skip(f"this machine or this user has no socket filters: {answer.message}")
    with pytest.raises(TimeoutError):
        connect(first, timeout_s=0.2)
    connect(first, "127.0.0.2").close()
    detach_filter = 27
    with pytest.raises(PermissionError):
        worker.sockets[0].setsockopt(socket.SOL_SOCKET, detach_filter, 0)
    worker.close()


def test_a_filter_of_the_other_family_lets_nobody_in() -> None:
    networks = [ipaddress.ip_network("::1/128"), ipaddress.ip_network("fe80::/10")]
    assert socket_filter.program(networks, socket.AF_INET) == [(0x06, 0, 0, 0)]
    assert len(socket_filter.program(networks, socket.AF_INET6)) == 4 * 3 + 1 + 3 + 1 + 1
    assert socket_filter.program([ipaddress.ip_network("0.0.0.0/0")], socket.AF_INET)[0] == (
        0x06,
        0,
        0,
        0xFFFFFFFF,
    )


def test_the_end_stops_new_connections_and_leaves_those_that_there_are(lessor: Lessor, first: int) -> None:
    worker = Worker(lessor)
    worker.says(LeasePort(1))
    with connect(first) as client, worker.sockets[0].accept()[0] as served:
        lessor.drain()
        with pytest.raises(ConnectionRefusedError):
            connect(first)
        served.sendall(b"still")
        assert client.recv(5) == b"still"
        assert report(lessor, first).state == "draining"
        late = Worker(lessor, "t-2").says(LeasePort(1))
        assert isinstance(late, LeaseRefused)
        assert "stopping" in late.message
    worker.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("min = 5000\nmax = 4000", "max = 4000 is below min = 5000"),
        ("reserved = [80]", "reserved lists 80, which is not within"),
        ("min = 5000\nmax = 5000\nreserved = [5000]", "reserved lists every port"),
        ('host = "localhost"', "'localhost' does not appear to be an IPv4 or IPv6 address"),
        ('allow = ["127.0.0.1/8"]', "127.0.0.1/8 has host bits set"),
        ("min = 80", "ports.min"),
    ],
)
def test_a_range_that_cannot_be_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(f"[ports]\n{text}\n")


def test_without_a_filter_no_port_is_lent_that_needs_one(
    make: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(_listener: socket.socket, _networks: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket_filter, "attach", unable)
    lessor: Lessor = make('allow = ["127.0.0.0/8"]\n')  # type: ignore[operator]
    answer = Worker(lessor).says(LeasePort(1))
    assert isinstance(answer, LeaseRefused)
    assert (answer.code, answer.message[:48]) == (
        "PORT_DENIED",
        "[ports] allow cannot be enforced here, so no por",
    )
