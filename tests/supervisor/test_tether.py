"""Both ends of a tether in one process: bounds towards a hostile worker, answers for an honest one."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mcp_broker import limits
from mcp_broker.supervisor.poller import Poller
from mcp_broker.supervisor.tether import Tether, new_ends
from mcp_broker.wire import codec, tether
from mcp_broker.wire.codec import Decoder
from mcp_broker.wire.tether import Answer, Leased, LeasePort, Request, ReturnPort, TetherMessage, Warm
from mcp_broker.worker.tether import Received
from mcp_broker.worker.tether import Tether as WorkerTether
from tests.supervisor.conftest import PATIENCE_S
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from mcp_broker.supervisor.tether import Handlers


class Ask(Request, tag="ASK", frozen=True):
    what: str = ""


class Told(Answer, tag="TOLD", frozen=True):
    what: str = ""


class Unwanted(TetherMessage, tag="UNWANTED", frozen=True):
    """Decodes, and nobody takes it."""


class Pair:
    """A supervisor's tether that is served, and the other end raw."""

    def __init__(self, poller: Poller) -> None:
        ours, self.theirs = new_ends()
        self.theirs.settimeout(PATIENCE_S)
        self.heard: list[TetherMessage] = []
        self.violations: list[str] = []
        self.poller = poller
        handlers: Handlers = dict.fromkeys((Warm, Ask), self.heard.append)
        self.tether = Tether(
            ours,
            poller,
            handlers,
            self.violations.append,
            Decoder(Warm | Ask | Unwanted),
        )

    def turn(self) -> None:
        self.poller.turn(0)


@pytest.fixture
def pair() -> Iterator[Pair]:
    poller = Poller()
    pair = Pair(poller)
    yield pair
    pair.tether.close()
    pair.theirs.close()
    poller.close()


def test_messages_reach_their_handlers_whole_and_in_order(pair: Pair) -> None:
    for message in (Warm(), Ask(1, "a"), Ask(2, "b")):
        pair.theirs.send(codec.encode(message))
        pair.turn()
    assert pair.heard == [Warm(), Ask(1, "a"), Ask(2, "b")]
    assert pair.violations == []


def test_all_that_was_said_before_can_be_heard_at_once(pair: Pair) -> None:
    for message in (Warm(), Ask(1, "a"), Ask(2, "b")):
        pair.theirs.send(codec.encode(message))
    pair.tether.drain()
    assert pair.heard == [Warm(), Ask(1, "a"), Ask(2, "b")]
    pair.theirs.send(codec.encode(Ask(3, "c")))
    pair.theirs.close()
    pair.tether.drain()
    assert pair.heard[3:] == [Ask(3, "c")]
    pair.tether.drain()
    assert pair.violations == []


def test_who_never_stops_talking_is_not_heard_for_ever(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        pair.tether, "_handlers", {Warm: lambda message: pair.theirs.send(codec.encode(message))}
    )
    pair.theirs.send(codec.encode(Warm()))
    pair.tether.drain()
    assert len(pair.violations) == 1


@pytest.mark.parametrize(
    ("packet", "said"),
    [
        (b"\xc1", "what it sent on its tether is no message: "),
        (codec.encode(tether.Go()), "what it sent on its tether is no message: "),
        (codec.encode(Ask(1, "x" * limits.TETHER_BYTES_MAX)), "what it sent on its tether is no message: "),
        (codec.encode(Unwanted()), "it said UNWANTED on its tether, which is not its to say"),
    ],
    ids=["no msgpack", "the other side's word", "too long", "nobody takes it"],
)
def test_what_may_not_be_said_is_a_violation_once_and_ends_the_hearing(
    pair: Pair, packet: bytes, said: str
) -> None:
    pair.theirs.send(packet)
    pair.theirs.send(packet)
    pair.turn()
    pair.turn()
    assert len(pair.violations) == 1
    assert pair.violations[0].startswith(said)
    assert pair.heard == []


def test_a_flood_is_a_violation_and_costs_one_packet_a_turn(pair: Pair) -> None:
    packet = codec.encode(Warm())
    turns = 0
    while not pair.violations:
        pair.theirs.send(packet)
        pair.turn()
        turns += 1
        assert turns < 100 * limits.TETHER_MESSAGES_BURST
    assert "messages, and" in pair.violations[0]
    assert limits.TETHER_MESSAGES_BURST <= len(pair.heard) < turns + 1


def test_a_worker_that_takes_nothing_is_a_violation_and_blocks_nobody(pair: Pair) -> None:
    for number in range(100_000):
        pair.tether.send(Told(number))
        if pair.violations:
            break
    assert pair.violations == ["it takes nothing from its tether"]


def test_descriptors_from_a_worker_are_never_taken(pair: Pair) -> None:
    read, write = os.pipe()
    before = len(list(Path("/proc/self/fd").iterdir()))
    socket.send_fds(pair.theirs, [codec.encode(Warm())], [write])
    pair.turn()
    assert pair.heard == [Warm()]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    os.close(write)
    assert os.read(read, 1) == b"", "no copy of the write end is left"
    os.close(read)


def test_the_end_of_the_worker_is_no_violation_and_sending_on_harms_nobody(pair: Pair) -> None:
    pair.theirs.close()
    pair.turn()
    pair.tether.send(Told(1))
    assert pair.violations == []


# -- with the worker's end -----------------------------------------------------------------------------


@pytest.fixture
def worker(pair: Pair) -> Iterator[WorkerTether]:
    """The worker's end. Its thread would end the process, so that is taken out by whoever lets it watch."""
    worker = WorkerTether(os.dup(pair.theirs.fileno()), Decoder(tether.Go | Told))
    yield worker
    worker._socket.close()


def test_each_thread_gets_the_answer_to_its_own_request_with_its_descriptor(
    pair: Pair, worker: WorkerTether, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda _code: ended.set())
    files = {f"w{number}": os.memfd_create(f"w{number}") for number in range(8)}
    for name, file in files.items():
        os.write(file, name.encode())
    requests: list[Ask] = []

    def take(message: TetherMessage) -> None:
        assert isinstance(message, Ask)
        requests.append(message)
        if len(requests) == len(files):
            # the last one first
            for request in reversed(requests):
                pair.tether.send(Told(request.number, request.what), files[request.what])

    pair.tether._handlers = {Ask: take}
    worker.watch()
    answers: dict[str, Received] = {}

    def ask(name: str) -> None:
        answers[name] = worker.ask(lambda number: Ask(number, name), PATIENCE_S)

    askers = [threading.Thread(target=ask, args=(name,)) for name in files]
    for asker in askers:
        asker.start()
    while len(answers) < len(files):
        pair.poller.turn(0.01)
    for name, (message, fd) in answers.items():
        assert isinstance(message, Told)
        assert message.what == name
        assert fd is not None
        assert not os.get_inheritable(fd)
        assert os.pread(fd, 10, 0) == name.encode()
        os.close(fd)
    for asker in askers:
        asker.join()
    for file in files.values():
        os.close(file)
    pair.tether.close()
    assert ended.wait(PATIENCE_S), "the end of the tether ends the process"


@pytest.fixture
def lending(pair: Pair, worker: WorkerTether) -> tuple[Pair, WorkerTether]:
    """Both ends, whose supervisor hears of ports."""
    pair.tether._decode, worker._decode = tether.from_worker.decode, tether.to_worker.decode
    pair.tether._handlers = {LeasePort: pair.heard.append, ReturnPort: pair.heard.append}
    return pair, worker


def test_a_port_that_is_leased_too_late_is_given_back(
    lending: tuple[Pair, WorkerTether], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, worker = lending
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda _code: ended.set())
    with pytest.raises(TimeoutError):
        worker.ask(LeasePort, 0.01)
    read, write = os.pipe()
    pair.tether.send(Leased(1, "127.0.0.1", 18_000), write)
    os.close(write)
    worker.watch()
    assert os.read(read, 1) == b"", "it listens no more"
    os.close(read)

    def is_returned() -> bool:
        pair.turn()
        return len(pair.heard) > 1

    wait_for(is_returned)
    assert pair.heard == [LeasePort(1), ReturnPort(18_000)]
    pair.tether.close()
    assert ended.wait(PATIENCE_S)


def test_a_port_that_was_leased_to_a_call_that_is_interrupted_is_given_back(
    lending: tuple[Pair, WorkerTether],
) -> None:
    pair, worker = lending
    read, write = os.pipe()

    def interrupted(number: int) -> LeasePort:
        worker._take(Leased(number, "127.0.0.1", 18_000), write)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.ask(interrupted, PATIENCE_S)
    assert os.read(read, 1) == b"", "it listens no more"
    os.close(read)
    pair.turn()
    assert pair.heard == [ReturnPort(18_000)]


def test_an_answer_that_comes_too_late_leaves_no_descriptor(
    pair: Pair, worker: WorkerTether, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda _code: ended.set())
    with pytest.raises(TimeoutError):
        worker.ask(Ask, 0.01)
    read, write = os.pipe()
    pair.tether.send(Told(1), write)
    os.close(write)
    worker.watch()
    assert os.read(read, 1) == b""
    os.close(read)
    pair.tether.close()
    assert ended.wait(PATIENCE_S)
