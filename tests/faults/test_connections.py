"""What a client and its calls live through when connections and processes do not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker import AsyncClient
from mcp_broker.errors import Cancelled, DeadlineExceeded, InvalidArgument, NotFound, Unavailable, WorkerLost
from tests.support.proxy import TcpProxy
from tests.support.running import Running
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.process, pytest.mark.slow]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path) as broker:
        yield broker


def through(running: Running) -> TcpProxy:
    endpoint: str = running.status()["endpoints"]["clients"]
    return TcpProxy(endpoint)


def test_call_outlives_a_cut_connection_and_runs_once(running: Running, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    with through(running) as proxy, running.client(running.profile_through(proxy.endpoint)) as client:
        future = client.submit("t.mark", {"path": str(marks), "seconds": 0.5})
        wait_for(lambda: marks.exists() and marks.read_text(), what="the tool having started")
        proxy.cut()
        assert isinstance(future.result(10), int)
        assert client.call("t.echo", {"value": 1}) == 1
        assert proxy.accepted >= 2
    assert marks.read_text() == "ran\n"


def test_progress_is_told_and_puts_the_idle_timeout_off(running: Running) -> None:
    heard: list[tuple[float | None, str]] = []
    with running.client() as client:
        with pytest.raises(DeadlineExceeded) as exceeded:
            client.call(
                "t.steps",
                {"n": 6, "pause_s": 0.1},
                idle_timeout_s=0.4,
                on_progress=lambda *new: heard.append(new),
            )
        assert exceeded.value.details["which"] == "idle"
        assert heard[-1] == (1.0, "step 6")
        assert len(heard) >= 4
        assert client.call("t.echo", {"value": 1}, timeout_s=10) == 1


def test_large_text_comes_back_whole_and_travels_small(running: Running) -> None:
    text = "".join(f"line {number}\n" for number in range(60_000))
    noise = os.urandom(900_000)
    with running.client() as client:
        assert client.call("t.echo", {"value": text}) == text
        assert client.call("t.echo", {"value": noise}) == noise
        assert list(client.stream("t.chunks", {"text": text, "n": 3})) == [text] * 3


def test_stream_goes_on_over_cut_connections_without_a_gap(running: Running) -> None:
    with through(running) as proxy, running.client(running.profile_through(proxy.endpoint)) as client:
        got = []
        for number in client.stream("t.count", {"n": 600}, timeout_s=60):
            got.append(number)
            if number % 100 == 50:
                proxy.cut()
        assert got == list(range(600))
        assert proxy.accepted >= 6


def test_client_notices_a_half_open_connection_and_goes_on(running: Running) -> None:
    with through(running) as proxy, running.client(running.profile_through(proxy.endpoint)) as client:
        assert client.call("t.echo", {"value": 1}) == 1
        proxy.stall(only_existing=True)
        began = time.monotonic()
        assert client.call("t.echo", {"value": 2}, timeout_s=10) == 2
        assert time.monotonic() - began < 5
        assert proxy.accepted >= 2


def test_idle_connection_that_was_cut_is_opened_again_for_the_next_call(running: Running) -> None:
    with through(running) as proxy, running.client(running.profile_through(proxy.endpoint)) as client:
        assert client.call("t.echo", {"value": 1}) == 1
        proxy.cut()
        assert client.call("t.echo", {"value": 2}, timeout_s=10) == 2


def test_broker_killed_with_64_calls_in_flight_loses_none_and_runs_none_twice(
    running: Running, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    with running.client() as client:
        endpoint = running.status()["endpoints"]["clients"]
        arguments = {"path": str(marks), "seconds": 0.01}
        futures = [client.submit("t.mark", arguments, timeout_s=30) for _ in range(64)]
        assert isinstance(futures[0].result(10), int)
        os.kill(running.status()["broker"]["pid"], signal.SIGKILL)
        began = time.monotonic()
        assert client.call("t.echo", {"value": "again"}, timeout_s=10) == "again"
        assert time.monotonic() - began < 2.0 * 2, "calls go on within 2 s (doubled: the machine is shared)"
        assert all(isinstance(future.result(10), int) for future in futures)
        assert running.status()["endpoints"]["clients"] == endpoint
    assert marks.read_text() == "ran\n" * 64


def test_long_call_goes_on_while_its_broker_is_replaced(running: Running, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    with running.client() as client:
        future = client.submit("t.mark", {"path": str(marks), "seconds": 1.5}, timeout_s=30)
        wait_for(lambda: marks.exists() and marks.read_text(), what="the tool having started")
        os.kill(running.status()["broker"]["pid"], signal.SIGKILL)
        assert isinstance(future.result(15), int)
    assert marks.read_text() == "ran\n"


def test_detached_call_outlives_its_client_and_is_taken_up_by_another(
    running: Running, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    with running.client() as client:
        arguments = {"path": str(marks), "seconds": 0.5}
        call_id = client.submit("t.mark", arguments, timeout_s=30, detach=True).call_id
        wait_for(lambda: marks.exists() and marks.read_text(), what="the tool having started")
    with running.client() as client:
        assert isinstance(client.attach(call_id).result(10), int)
        with pytest.raises(NotFound):
            client.attach(call_id).result(10)
    assert marks.read_text() == "ran\n"


@pytest.mark.parametrize("seconds", [0.2, 3.0])
def test_detached_call_outlives_its_client_and_its_broker(
    running: Running, tmp_path: Path, seconds: float
) -> None:
    marks = tmp_path / "marks"
    with running.client() as client:
        arguments = {"path": str(marks), "seconds": seconds}
        call_id = client.submit("t.mark", arguments, timeout_s=60, detach=True).call_id
        wait_for(lambda: marks.exists() and marks.read_text(), what="the tool having started")
        os.kill(running.status()["broker"]["pid"], signal.SIGKILL)

    def take() -> int | None:
        with running.client() as client:
            try:
                return int(client.attach(call_id).result(10))
            except Unavailable:
                # its worker has yet to find the new broker
                return None

    assert isinstance(wait_for(take, what="the call's outcome"), int)
    assert marks.read_text() == "ran\n"


async def _attach(running: Running, call_id: bytes) -> Any:
    async with AsyncClient.connect(str(running.profile)) as client:
        return await (await client.attach(call_id))


def test_calls_with_one_idempotency_key_are_run_once_whoever_makes_them(
    running: Running, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    arguments = {"path": str(marks), "seconds": 0.2}
    with running.client() as one, running.client() as other:
        futures = [
            client.submit("t.mark", arguments, timeout_s=30, idempotency_key="order 7", detach=client is one)
            for client in (one, other, one)
        ]
        results = {future.result(10) for future in futures}
        results.add(other.call("t.mark", arguments, idempotency_key="order 7"))
        assert len(results) == 1
        with pytest.raises(InvalidArgument, match="other arguments"):
            other.call("t.mark", {"path": str(marks)}, idempotency_key="order 7")
        with pytest.raises(NotFound):
            asyncio.run(_attach(running, futures[0].call_id))
    assert marks.read_text() == "ran\n"


def test_calls_of_a_killed_client_process_are_cancelled_within_a_second(
    running: Running, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    code = f"""
from mcp_broker import Client
with Client.connect({str(running.profile)!r}) as client:
    client.call("t.mark", {{"path": {str(marks)!r}, "seconds": 60}}, timeout_s=120)
"""
    victim = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: marks.exists() and marks.read_text(), what="the tool having started")
    victim.kill()
    began = time.monotonic()
    victim.wait()
    with running.client() as client:
        assert client.call("t.echo", {"value": 1}, timeout_s=5) == 1, "the slot is free again"
        assert time.monotonic() - began < 2.5
    assert running.status()["calls"]["failed"].get("CANCELLED") == 1


def test_killed_worker_is_explained_to_its_caller_and_replaced(running: Running, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    with running.client() as client:
        pid = client.call("t.pid")
        future = client.submit("t.mark", {"path": str(marks), "seconds": 30})
        behind = client.submit("t.echo", {"value": "not mine"})
        wait_for(lambda: marks.exists() and marks.read_text(), what="the tool having started")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerLost) as lost:
            future.result(10)
        certificate = lost.value.details["certificate"]
        assert (certificate["signal"], certificate["pid"]) == ("SIGKILL", pid)
        assert behind.result(10) == "not mine", "a call that had not started is not hurt"
        assert client.call("t.pid") != pid
        why = running.command("why", str(pid))
        assert why.returncode == 0
        assert "SIGKILL" in why.stdout
    assert marks.read_text() == "ran\n", "not run twice"


def test_deadline_frees_the_slot_of_a_tool_that_sleeps(running: Running) -> None:
    with running.client() as client:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.call("t.nap", {"seconds": 60}, timeout_s=0.3)
        assert time.monotonic() - began < 1.3
        assert client.call("t.echo", {"value": 1}, timeout_s=5) == 1


def test_cancelled_future_ends_as_cancelled_and_frees_the_slot(running: Running) -> None:
    with running.client() as client:
        future = client.submit("t.nap", {"seconds": 60})
        assert future.cancel()
        with pytest.raises(Cancelled):
            future.result(5)
        assert client.call("t.echo", {"value": 1}, timeout_s=5) == 1


def test_stream_of_more_parts_than_its_window_arrives_whole(running: Running) -> None:
    with running.client() as client:
        assert list(client.stream("t.count", {"n": 500})) == list(range(500))
        assert client.call("t.count", {"n": 40}) == list(range(40))


async def _async_story(running: Running) -> None:
    async with AsyncClient.connect(str(running.profile)) as client:
        assert await client.call("t.echo", {"value": 5}) == 5
        assert [value async for value in client.map("t.echo", [{"value": n} for n in range(200)])] == list(
            range(200)
        )
        assert [part async for part in client.stream("t.count", {"n": 100})] == list(range(100))


def test_asyncio_client_does_the_same(running: Running) -> None:

    asyncio.run(_async_story(running))


def test_supervisor_that_is_killed_takes_everything_with_it(tmp_path: Path) -> None:
    import psutil

    running = Running(tmp_path)
    try:
        family = psutil.Process(running.process.pid).children(recursive=True)
        assert len(family) >= 2
        running.process.kill()
        running.process.wait()
        _, alive = psutil.wait_procs(family, timeout=3)
        assert alive == []
        running.start()
        with running.client() as client:
            assert client.call("t.echo", {"value": 1}) == 1
    finally:
        running.stop()


BESIDE_TOOLS = '''
import asyncio, os
from mcp_broker.worker import tool

@tool(name="t.long")
async def long(path: str) -> None:
    """Write a line, and take long."""
    with open(path, "a") as file:
        file.write("ran\\n")
    await asyncio.sleep(60)

@tool(name="t.short")
async def short() -> int:
    """Return the pid."""
    return os.getpid()
'''

BESIDE_CONFIG = """
[pools.t]
module = "fault_tools"
path = ["{folder}"]
min = {workers}
concurrency = 4
"""


def test_a_call_does_not_run_twice_though_many_began_beside_it_when_worker_and_broker_die(
    tmp_path: Path,
) -> None:
    marks = tmp_path / "marks"
    with Running(tmp_path, tools=BESIDE_TOOLS, config=BESIDE_CONFIG) as running, running.client() as client:
        future = client.submit("t.long", {"path": str(marks)}, timeout_s=60)
        wait_for(marks.exists, what="the tool having started")
        for _ in range(300):
            worker = client.call("t.short")
        broker = client.call("system.status")["broker"]["pid"]
        os.kill(worker, signal.SIGKILL)
        os.kill(broker, signal.SIGKILL)
        with pytest.raises(WorkerLost):
            future.result(30)
        assert client.call("t.short") != worker
    assert marks.read_text() == "ran\n"
