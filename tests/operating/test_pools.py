"""Pools that grow, shrink, are replaced and closed, by real processes; and what their callers see of it: nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Self

import pytest

from mcp_broker.errors import CallError, InvalidArgument, NotFound, Unavailable
from tests.operating.conftest import BROKEN, CHANGED, POOL, TOOLS, Operated
from tests.support.load import tally

if TYPE_CHECKING:
    from concurrent.futures import Future
    from typing import Any

pytestmark = [pytest.mark.process, pytest.mark.slow]

CALLS_PER_S = 500


@pytest.fixture(autouse=True)
def _fresh(operated: Operated) -> None:
    """Begin each test with one worker of the first version."""
    operated.code(TOOLS)
    operated.configure()
    operated.reload()
    operated.scale(None)
    operated.until("one worker", lambda: operated.states() == ["ready"])


class Load:
    """Calls at a steady rate from a thread of its own, until it is left."""

    def __init__(self, operated: Operated, tool: str = "t.echo", calls_per_s: int = CALLS_PER_S) -> None:
        self._client = operated.running.client()
        self._tool = tool
        self._pause_s = 1 / calls_per_s
        self.futures: list[Future[Any]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        at = time.monotonic()
        while not self._is_over.is_set():
            self.futures.append(self._client.submit(self._tool, {"value": len(self.futures)}, timeout_s=30))
            at += self._pause_s
            self._is_over.wait(max(0.0, at - time.monotonic()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        codes = []
        for number, future in enumerate(self.futures):
            error = future.exception(40)
            codes.append("OK" if error is None else getattr(error, "code", repr(error)))
            assert error is not None or future.result() == number
        self._client.close()
        assert set(codes) == {"OK"}, tally(codes)


def test_scaling_and_replacing_under_load_cost_no_call(operated: Operated) -> None:
    rounds = 0
    with Load(operated) as load:
        while rounds < 2 or len(load.futures) < 2 * CALLS_PER_S:
            rounds += 1
            operate(operated, rounds)
    assert rounds >= 2


def operate(operated: Operated, number: int) -> None:
    """Do with a pool under load what an operator can do with it, once."""
    assert operated.scale(3)["ready"] == 3
    assert operated.scale(1)["workers"] == 1
    operated.code(TOOLS)
    operated.configure(f"options = {{a = {number}}}")
    assert operated.reload()["changed"] == ["t"]
    operated.code(CHANGED)
    assert operated.reload("t")["changed"] == ["t"]
    assert operated.client.call("t.new", {}) == "new"
    assert operated.scale(2)["ready"] == 2


def test_a_worker_that_retires_finishes_its_call_and_is_no_death(operated: Operated) -> None:
    before = operated.pool()["restarts"]
    operated.scale(2)
    naps = [operated.client.submit("t.nap", {"seconds": 1.0}) for _ in range(2)]
    operated.until("two naps", lambda: operated.states() == ["busy", "busy"])
    assert operated.scale(1)["workers"] == 1
    pids = {nap.result(10) for nap in naps}
    assert len(pids) == 2
    (left,) = operated.pool()["workers"]
    (gone,) = pids - {left["pid"]}
    assert not os.path.exists(f"/proc/{gone}")  # noqa: PTH110 (no path of ours)
    told = operated.client.call("system.why", {"id": str(gone)})
    assert told["certificate"]["cause"] == "retired: its pool needs fewer workers (exited with code 0)"
    assert str(gone) not in [str(one["pid"]) for one in operated.client.call("system.status", {})["deaths"]]
    assert operated.pool()["restarts"] == before


def test_a_spare_takes_over_at_once_and_is_replaced_behind(operated: Operated) -> None:
    operated.configure("spare = 1\nmin = 1")
    assert operated.reload()["resized"] == ["t"]
    operated.until("a spare", lambda: operated.states() == ["ready", "spare"])
    delays = []
    for _ in range(3):
        pool = operated.pool()
        spare, worker = sorted(pool["workers"], key=lambda one: one["state"] != "spare")
        delays.append(_seconds_until_it_serves(operated, worker["pid"], spare["pid"]))
        operated.until("a new spare", lambda: operated.states() == ["ready", "spare"])
        assert spare["pid"] in [one["pid"] for one in operated.pool()["workers"]]
    # 50 ms on an idle machine, the answer of a call included; the bound only tells it from a start of a process
    assert min(delays) < 0.15, delays
    operated.configure()
    operated.reload()
    operated.until("no spare", lambda: operated.states() == ["ready"])


def _seconds_until_it_serves(operated: Operated, killed: int, spare: int) -> float:
    """Kill a worker; return how long after that its spare has answered a call."""
    began = time.monotonic()
    os.kill(killed, signal.SIGKILL)
    operated.until("the spare's answer", lambda: _answers(operated, spare))
    return time.monotonic() - began


def _answers(operated: Operated, pid: int) -> bool:
    try:
        return bool(operated.client.call("t.nap", {"seconds": 0.0}) == pid)
    except CallError:
        # it was given to the one that is dead
        return False


def test_a_burst_makes_a_pool_grow_and_the_quiet_after_it_shrink(operated: Operated) -> None:
    before = operated.pool()["restarts"]
    operated.configure("max = 3\ngrow_wait_s = 0.1\nshrink_after_s = 1")
    operated.reload()
    burst = [operated.client.submit("t.nap", {"seconds": 0.1}) for _ in range(60)]
    operated.until("three workers", lambda: operated.pool()["ready"] == 3)
    assert len({nap.result(20) for nap in burst}) == 3
    operated.until("one worker", lambda: operated.states() == ["ready"])
    assert operated.pool()["restarts"] == before
    operated.scale(2)
    assert operated.pool()["wanted"] == 2, "what an operator says counts"


def test_a_drained_pool_finishes_what_waits_refuses_the_rest_and_comes_back(operated: Operated) -> None:
    naps = [operated.client.submit("t.nap", {"seconds": 0.2}) for _ in range(4)]
    operated.until("a nap", lambda: operated.states() == ["busy"])
    drained = operated.client.submit("system.drain", {"target": "t"}, timeout_s=30)
    operated.until("the pool to close", lambda: operated.pool()["state"] == "closing")
    with pytest.raises(Unavailable, match="an operator has drained it"):
        operated.client.call("t.echo", {})
    assert drained.result(20)["pools"][0]["state"] == "closed"
    assert all(nap.exception(5) is None for nap in naps)
    with pytest.raises(Unavailable, match="an operator has drained it"):
        operated.client.call("t.echo", {})
    assert operated.scale(None)["ready"] == 1
    assert operated.client.call("t.echo", {"value": 1}) == 1


def test_a_client_that_sits_idle_with_its_last_outcome_holds_up_no_drain(operated: Operated) -> None:
    with operated.running.client() as idle:
        assert idle.call("t.echo", {"value": 1}) == 1
        # it serves its connection only while it waits for a call
        drained = operated.client.call("system.drain", {"target": "t"}, timeout_s=15)
        assert drained["pools"][0]["state"] == "closed"
        operated.scale(None)
        assert idle.call("t.echo", {"value": 2}) == 2


def test_a_drained_worker_is_replaced_before_it_leaves(operated: Operated) -> None:
    (worker,) = operated.pool()["workers"]
    with Load(operated):
        done = operated.command("drain", worker["id"])
    assert done["worker"] == worker["id"]
    (other,) = operated.pool()["workers"]
    assert other["id"] != worker["id"]


# -- reload -------------------------------------------------------------------------------------------------


def test_pools_come_and_go_by_the_configuration(operated: Operated) -> None:
    operated.code("from mcp_broker.worker import tool\n@tool(name='u.one')\ndef one() -> int:\n    'One.'\n    return 1\n", "other_tools")  # fmt: skip
    table = POOL.format(name="u", module="other_tools", folder=operated.folder)
    operated.configure(more=table)
    assert operated.reload()["added"] == ["u"]
    assert operated.client.call("u.one", {}) == 1
    operated.configure()
    operated.hang_up()
    operated.until("the pool to be gone", lambda: not operated.pool("u"))
    with pytest.raises(NotFound):
        operated.client.call("u.one", {})


def test_a_configuration_with_a_fault_changes_nothing_and_says_where_it_is(operated: Operated) -> None:
    (worker,) = operated.pool()["workers"]
    operated.configure("mni = 3")
    with pytest.raises(InvalidArgument, match=r"config.toml, line 5: unknown key 'mni'.*did you mean 'min'"):
        operated.reload()
    operated.hang_up()
    log = operated.folder / "start.log"
    operated.until("the log", lambda: "not reloaded, the configuration before stays" in log.read_text())
    assert [one["id"] for one in operated.pool()["workers"]] == [worker["id"]]


def test_code_that_cannot_start_leaves_the_workers_before_it_in_place(operated: Operated) -> None:
    (worker,) = operated.pool()["workers"]
    operated.code(BROKEN)
    with pytest.raises(Unavailable, match="No module named 'nowhere'"):
        operated.reload("t")
    pool = operated.pool()
    assert (pool["state"], [one["id"] for one in pool["workers"]]) == ("ready", [worker["id"]])
    assert "its successors could not start" in pool["reason"]
    assert operated.client.call("t.echo", {"value": 1}) == 1
    operated.code(TOOLS)
    operated.reload()
    operated.until("another worker", lambda: operated.pool()["workers"][0]["id"] != worker["id"])
    assert operated.pool()["reason"] == ""


def test_a_worker_that_dies_while_code_that_cannot_start_is_tried_comes_back_as_it_was(
    operated: Operated,
) -> None:
    (worker,) = operated.pool()["workers"]
    told = operated.folder / "told"
    waits = (
        f"import time\nfrom pathlib import Path\nwhile not Path({str(told)!r}).exists(): time.sleep(0.01)\n"
    )
    operated.code(waits + BROKEN, "broken_tools")
    operated.configure(module="broken_tools")
    reload = operated.client.submit("system.reload", {}, timeout_s=60)
    operated.until("its successor", lambda: operated.states() == ["ready", "starting"])
    os.kill(worker["pid"], signal.SIGKILL)
    operated.until(
        "it to be back",
        lambda: (
            operated.states() == ["ready", "starting"]
            and worker["pid"] not in [one["pid"] for one in operated.pool()["workers"]]
        ),
    )
    told.touch()
    with pytest.raises(Unavailable, match="No module named 'nowhere'"):
        reload.result(60)
    assert operated.states() == ["ready"]
    assert operated.client.call("t.echo", {"value": 1}) == 1


@pytest.mark.parametrize(
    ("does", "limits", "reason"),
    [
        ("raise SystemExit('the model is missing')", "restarts = 1", "the model is missing"),
        ("import time; time.sleep(600)", "restarts = 0\nstart_s = 1", "was not ready after 1 s"),
    ],
    ids=["crashes at boot", "hangs in its start"],
)
def test_a_pool_that_never_starts_fails_with_its_reason_and_no_other(
    operated: Operated, does: str, limits: str, reason: str
) -> None:
    operated.code(does + "\n" + TOOLS.replace("t.", "bad."), "bad_tools")
    table = POOL.format(name="bad", module="bad_tools", folder=operated.folder)
    operated.configure(more=f"{table}[limits]\n{limits}\n")
    with Load(operated, calls_per_s=50), pytest.raises(Unavailable, match=reason):
        operated.reload()
    assert operated.pool("bad")["state"] == "failed"
    with pytest.raises(Unavailable, match=reason):
        operated.client.call("bad.echo", {})
    operated.code(TOOLS.replace("t.", "bad."), "bad_tools")
    assert operated.scale(None, "bad")["ready"] == 1
    assert operated.client.call("bad.echo", {"value": 1}) == 1


def test_a_pool_whose_third_call_kills_it_stays_and_its_callers_are_told(operated: Operated) -> None:
    third = (
        "_calls = 0\n@tool(name='bad.third')\ndef third() -> int:\n    'Die at the third call.'\n"
        "    global _calls\n    _calls += 1\n    if _calls == 3: os._exit(9)\n    return _calls\n"
    )
    operated.code(TOOLS.replace("t.", "bad.") + third, "bad_tools")
    table = POOL.format(name="bad", module="bad_tools", folder=operated.folder)
    operated.configure(more=f"{table}[limits]\nrestarts = 0\n")
    operated.reload()
    codes = []
    with Load(operated, calls_per_s=50):
        for _ in range(9):
            try:
                operated.client.call("bad.third", {})
                codes.append("OK")
            except CallError as error:
                codes.append(error.code)
    assert codes == ["OK", "OK", "WORKER_LOST"] * 3
    operated.until("the pool", lambda: operated.pool("bad")["state"] == "ready")
