"""What fails costs itself: the supervisor, and all that it holds up, goes on."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from mcp_broker import limits
from mcp_broker.core.children import State, Wanted
from mcp_broker.core.restart import Policy, Restarts
from mcp_broker.supervisor.broker import BrokerChild
from mcp_broker.supervisor.containment import TOLD_S, Containment, contained
from mcp_broker.supervisor.endpoint import Endpoint
from mcp_broker.supervisor.life import Life
from mcp_broker.supervisor.poller import Poller
from mcp_broker.supervisor.process import Exit
from mcp_broker.supervisor.slot import Slot, Times
from mcp_broker.wire import codec, node
from mcp_broker.wire.framing import frame
from tests.supervisor.conftest import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_broker.supervisor.isolation.warden import Cell
    from mcp_broker.supervisor.launch import BrokerOrder
    from tests.supervisor.conftest import Start


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fail(text: str) -> None:
    raise ValueError(text)


def note(containment: Containment, what: str, failing: Callable[[], object]) -> None:
    try:
        failing()
    except Exception as error:  # noqa: BLE001 (as the block that contains it)
        containment.note(what, error)


# -- what is told -----------------------------------------------------------------------------------------


def test_the_first_failure_of_a_kind_is_told_with_its_traceback_and_the_next_ones_rarely(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    containment = Containment(clock)
    for number in range(100):
        note(containment, "counting", lambda number=number: fail(str(number)))  # type: ignore[misc]
    (first,) = caplog.records
    assert "counting failed" in first.getMessage()
    assert first.exc_info is not None
    assert str(first.exc_info[1]) == "0"
    assert "in fail" in caplog.text
    clock.now += TOLD_S
    note(containment, "counting", lambda: fail("again"))
    assert "101 times by now" in caplog.records[1].getMessage()
    note(containment, "counting", lambda: int("no number"))
    assert len(caplog.records) == 3, "another kind is told at once"


def test_kinds_are_bounded_and_what_is_beyond_them_is_one_kind(caplog: pytest.LogCaptureFixture) -> None:
    containment = Containment(Clock())
    for number in range(limits.FAILURE_KINDS_MAX + 50):
        kind = type(f"Failure{number}", (Exception,), {})
        containment.note("failing", kind())
    assert len(caplog.records) == limits.FAILURE_KINDS_MAX + 1


def test_a_machine_that_has_nothing_left_is_no_bug(caplog: pytest.LogCaptureFixture) -> None:
    Containment(Clock()).note("opening", OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
    (one,) = caplog.records
    assert one.levelno == logging.WARNING
    assert one.exc_info is None
    assert "nothing left" in one.getMessage()


def test_a_contained_failure_ends_its_block_only_and_an_interrupt_is_none() -> None:
    done = []
    with contained("a test"):
        fail("of the block")
    done.append("after")
    assert done == ["after"]
    with pytest.raises(KeyboardInterrupt), contained("a test"):
        raise KeyboardInterrupt


# -- the poller -------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


def test_a_callback_that_fails_keeps_no_other_from_its_event(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    failures: list[tuple[str, Exception]] = []
    poller = Poller(lambda what, error: failures.append((what, error)))
    heard: list[str] = []

    def fails(_events: int) -> None:
        heard.append("failing")
        fail("a callback")

    left, right = pair
    both = {left: fails, right: lambda _events: heard.append("well")}
    for end, callback in both.items():
        poller.add(end.fileno(), callback)
        end.send(b"x")
    poller.turn(PATIENCE_S)
    assert sorted(heard) == ["failing", "well"]
    assert [str(error) for _, error in failures] == ["a callback"]
    poller.close()


def test_an_event_of_a_closed_descriptor_does_not_reach_who_has_its_number_now(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    poller = Poller()
    others: dict[int, socket.socket] = {}
    heard: list[str] = []
    newborn, its_other = socket.socketpair()

    def first(end: socket.socket, other: socket.socket) -> Callable[[int], None]:
        def callback(_events: int) -> None:
            # the other end has its event in the same turn; what gets its number has none
            number = other.fileno()
            poller.remove(end.fileno())
            poller.remove(number)
            os.dup2(newborn.fileno(), number)
            poller.add(number, lambda _events: heard.append("newborn"))
            others[number] = other

        return callback

    left, right = pair
    poller.add(left.fileno(), first(left, right))
    poller.add(right.fileno(), first(right, left))
    left.send(b"x")
    right.send(b"x")
    poller.turn(PATIENCE_S)
    assert others, "one of both came first"
    assert heard == []
    poller.turn(0)
    assert heard == []
    its_other.send(b"x")
    poller.turn(PATIENCE_S)
    assert heard == ["newborn"], "its own event does"
    poller.close()
    newborn.close()
    its_other.close()


# -- what a worker may have made of its own address -----------------------------------------------------------


@pytest.mark.parametrize("how", ["folder", "file", "loop", "link"])
def test_an_address_is_closed_whatever_its_worker_put_in_its_place_and_nothing_elsewhere_is_touched(
    tmp_path: Path, how: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "t-1").write_text("kept")
    folder = tmp_path / ".broker"
    endpoint = Endpoint(folder, "t-1")
    (folder / "t-1").unlink()
    if how == "folder":
        (folder / "t-1").mkdir()
    else:
        folder.rmdir()
        if how == "file":
            folder.touch()
        else:
            folder.symlink_to(folder if how == "loop" else elsewhere)
    endpoint.close()
    assert (elsewhere / "t-1").read_text() == "kept"


def test_what_fails_at_the_end_of_a_life_keeps_the_rest_from_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    life = Life("t-1", "t", 1, tmp_path)
    released: list[str] = []

    def release() -> None:
        released.append("cell")
        raise RuntimeError("a cell")

    life.cell = cast("Cell", SimpleNamespace(lease=None, release=release))
    life.metered = cast("Any", SimpleNamespace(close=lambda: released.append("metered")))
    life.end()
    assert released == ["cell", "metered"]
    assert "RuntimeError: a cell" in caplog.text
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_worker_that_cannot_be_started_for_a_bug_of_ours_is_told_dead_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[node.Certificate] = []
    left: list[str] = []
    numbers = itertools.count(1)

    def prepare(*_args: object) -> None:
        raise LookupError("a bug")

    ground = SimpleNamespace(
        run_dir=tmp_path,
        instance="ab",
        is_stopping=False,
        next_worker_id=lambda pool: f"{pool}-{next(numbers)}",
        warden=SimpleNamespace(prepare=prepare),
        aftermath=SimpleNamespace(take_back=lambda remains: left.append(remains.worker_id)),
        died=lambda certificate, _calls, **_named: told.append(certificate),
        changed=lambda: None,
    )
    restarts = Restarts(Policy(intensity=1))
    times, table = Times(start_s=1.0, retire_s=1.0), cast("Any", None)
    slot = Slot(cast("Any", ground), "t", table, restarts, times, edition=1, is_spare=False, on_death=print)
    slot.tell(Wanted())
    while slot.child.state is State.BACKOFF:
        slot.expire(slot.child.deadline() or 0.0)
    assert slot.child.state is State.FATAL
    assert "LookupError('a bug')" in slot.child.reason
    assert [one.worker_id for one in told] == left == ["t-1", "t-2"]
    assert caplog.text.count("LookupError: a bug") == 1


# -- a broker that is gone before it is told anything -------------------------------------------------------------


class BrokerOwner:
    """What a BrokerChild needs; its processes are doubles, whose ends of their links we have if we keep them."""

    instance = "ab"

    def __init__(self, run_dir: Path, *, keep_ends: bool) -> None:
        self.run_dir = run_dir
        self.poller = Poller()
        self.launcher = SimpleNamespace(launch_broker=self._launch)
        self._keep_ends = keep_ends
        self._epochs = itertools.count(1)
        self.ends: list[socket.socket] = []
        self.launched = 0
        self.killed: list[str] = []
        self.heard_of: list[object] = []
        self.died: list[str] = []

    def _launch(self, order: BrokerOrder, _poller: Poller, _on_exit: object) -> object:
        self.launched += 1
        if self._keep_ends:
            self.ends.append(socket.socket(fileno=os.dup(order.link_fd)))
        return SimpleNamespace(
            name=order.name, pid=4711, starttime=0, stderr_tail="", kill=lambda: self.killed.append("it")
        )

    def next_epoch(self) -> int:
        return next(self._epochs)

    def boot(self, epoch: int) -> node.Boot:
        return node.Boot(epoch, 0, 0, "", "", bytes(32), bytes(32), {}, "", "", {}, 1, 0.0)

    def briefing(self) -> list[node.Admit]:
        return [node.Admit(()), node.Admit(())]

    def endpoints(self) -> list[tuple[node.Listen, int]]:
        return [(node.Listen("t-1", "", "ipc://x"), 0)]

    def heard(self, message: object) -> None:
        if message == node.Vacant("broken"):
            raise LookupError("a bug")
        self.heard_of.append(message)

    def broker_died(self, _pid: int, reason: str) -> None:
        self.died.append(reason)

    def strayed(self) -> None:
        """Nobody looks."""


def test_a_broker_that_dies_while_it_is_briefed_is_killed_and_drops_the_rest(tmp_path: Path) -> None:
    owner = BrokerOwner(tmp_path, keep_ends=False)
    broker = BrokerChild(cast("Any", owner))
    broker.tell(Wanted())
    assert broker.pid == 4711
    broker.send(node.Admit(()))
    owner.poller.turn(PATIENCE_S)
    assert owner.killed == ["it"]
    broker.send(node.Admit(()))
    owner.poller.close()


def test_a_broker_that_takes_nothing_is_killed_heard_to_the_end_and_followed_by_another(
    tmp_path: Path,
) -> None:
    owner = BrokerOwner(tmp_path, keep_ends=True)
    broker = BrokerChild(cast("Any", owner))
    broker.tell(Wanted())
    (end,) = owner.ends
    standings = node.Standings((node.Standing(tool="t.x", state="inactive"),))
    for message in (node.Serving(4711), node.Vacant("broken"), standings):
        end.sendall(frame(codec.encode(message)))
    large = node.Abandoned((bytes(16),) * 500_000)
    while not owner.killed:
        broker.send(large)
    end.close()
    broker._exited(Exit(None, signal.SIGKILL, 0.0, 0))
    assert owner.heard_of == [node.Serving(4711), standings], "but for what cannot be taken"
    assert owner.died == ["killed by SIGKILL"]
    broker.expire(broker.child.deadline() or 0.0)
    assert owner.launched == 2
    owner.ends[1].close()
    owner.poller.turn(PATIENCE_S)
    owner.poller.close()


# -- a whole supervisor ---------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_supervisor_goes_on_when_whoever_started_it_fails_to_take_its_news(start: Start) -> None:
    node = start(env={"FAKE_LISTENER_FAILS": "WorkerDied"})
    node.event("PoolReady")
    for _ in range(3):
        worker = node.worker()
        os.kill(worker["pid"], signal.SIGKILL)
        node.event("WorkerDied")
        node.event("PoolReady")
    assert node.stop() == 0
    log = (node.state_dir.parent / "state.log").read_text()
    assert log.count("ValueError: the listener fails") == 1
    assert log.count("please report these lines") == 1


@pytest.mark.process
def test_a_name_on_the_path_that_is_not_utf_8_costs_a_fork_and_no_more(start: Start) -> None:
    node = start(how="zygote", env={"PATH": os.environ["PATH"] + ":/nowhere/\udcff"})
    node.event("PoolReady")
    assert node.worker()["start"] == "exec"
    assert node.stop() == 0
