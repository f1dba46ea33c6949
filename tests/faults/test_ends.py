"""A worker that is to go goes, whatever its tools left behind, and takes nobody along who may run elsewhere."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from mcp_broker import DeadlineExceeded, WorkerLost
from tests.support.running import CONFIG, Running
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from mcp_broker import Client

pytestmark = [pytest.mark.process, pytest.mark.slow]

TOOLS = '''
"""Tools that hold up the end of their worker."""
import asyncio, atexit, multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from mcp_broker import limits
from mcp_broker.worker import tool

limits.HOOK_S = 1.0

@tool(name="e.hold")
def hold() -> list[int]:
    """Leave processes behind, and what waits for ever at the end; return who is there."""
    global kept
    fork = multiprocessing.get_context("fork")
    kept = [ProcessPoolExecutor(2, mp_context=fork), fork.Process(target=time.sleep, args=(1000,))]
    kept[0].submit(abs, 1).result()
    kept[1].start()
    atexit.register(time.sleep, 1000)
    return [os.getpid(), kept[1].pid, *kept[0]._processes]
'''
ASYNC_TOOLS = (
    TOOLS
    + '''
@tool(name="e.nap")
async def nap() -> None:
    """Wait in a thread for longer than anybody else."""
    await asyncio.to_thread(time.sleep, 1000)
'''
)

NEIGHBOURS = '''
"""Tools that run beside each other."""
import asyncio, os
from pathlib import Path
from mcp_broker.worker import tool

@tool(name="n.stay")
async def stay() -> None:
    """Go on, whoever says what."""
    while True:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            pass

async def wait(path: str) -> int:
    """Wait for a file, and say so in another one."""
    Path(f"{path}-{os.getpid()}").touch()
    while not Path(path).exists():
        await asyncio.sleep(0.01)
    return os.getpid()

again = tool(name="n.again", idempotent=True)(wait)
once = tool(name="n.once")(wait)
'''


def _status(client: Client) -> Any:
    return client.call("system.status", {})


@pytest.mark.parametrize("tools", [TOOLS, ASYNC_TOOLS], ids=["one thread", "a loop"])
def test_a_worker_that_is_held_up_at_its_end_is_replaced_and_counts_as_gone_by_wish(
    tmp_path: Path, tools: str
) -> None:
    with Running(tmp_path, tools=tools) as running, running.client() as client:
        if tools is ASYNC_TOOLS:
            with pytest.raises(DeadlineExceeded):
                client.call("e.nap", timeout_s=0.2)
        pids = client.call("e.hold", timeout_s=20)
        assert running.command("reload", "t").returncode == 0
        for pid in pids:
            wait_for(functools.partial(_is_gone, pid), within_s=10, what=f"the end of {pid}")
        wait_for(
            lambda: len(_status(client)["pools"][0]["workers"]) == 1, what="its place being one worker's"
        )
        assert _status(client)["deaths"] == []
        assert client.call("e.hold", timeout_s=20)[0] != pids[0]


def _is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid)


def test_what_runs_beside_a_call_that_does_not_stop_is_lost_or_runs_again_and_was_not_cancelled(
    tmp_path: Path,
) -> None:
    config = CONFIG + "concurrency = 8\n"
    with Running(tmp_path, tools=NEIGHBOURS, config=config) as running, running.client() as client:
        paths = {name: tmp_path / name for name in ("again", "once")}
        calls = {
            name: client.submit(f"n.{name}", {"path": str(path)}, timeout_s=30)
            for name, path in paths.items()
        }
        wait_for(lambda: len(list(tmp_path.glob("*-*"))) == len(calls), what="both running")
        with pytest.raises(DeadlineExceeded):
            client.call("n.stay", timeout_s=0.2)
        with pytest.raises(WorkerLost):
            calls["once"].result()
        wait_for(lambda: len(list(tmp_path.glob("again-*"))) == 2, what="the second run")
        paths["again"].touch()
        assert paths["again"].with_name(f"again-{calls['again'].result()}").exists()
