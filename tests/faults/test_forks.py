"""A process that a tool forks off ends where it comes back from the tool's code, as a program of its own would."""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.support.running import Running
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from mcp_broker import Client

pytestmark = [pytest.mark.process, pytest.mark.slow]

TOOLS = '''
"""Tools that fork."""
import asyncio, os, signal, sys, time
from collections.abc import Iterator
from mcp_broker.worker import PortError, ToolContext, on, tool

if os.fork() == 0:
    print("forked at import", file=sys.stderr)
else:
    os.wait()

@on("start")
def started() -> None:
    if os.fork() != 0:
        os.wait()

def end(how: str, context: ToolContext | None = None) -> object:
    """End a process that was forked off, in a way."""
    if how == "raise":
        raise LookupError("in the fork")
    if how == "exit":
        sys.exit(3)
    if how == "say":
        sys.exit("said at the end")
    if how == "wait":
        time.sleep(60)
    if how == "report":
        for number in range(5000):
            context.progress(number / 5000)
    if how == "port":
        try:
            context.lease_port()
        except PortError:
            sys.exit(4)
    return "from the fork"

@tool(name="f.fork")
def fork(how: str, context: ToolContext, kill: bool = False) -> list[int]:
    """Fork; return the pid of this process and the exit code of the other."""
    pid = os.fork()
    if pid == 0:
        return end(how, context)
    if kill:
        os.kill(pid, signal.SIGTERM)
    return [os.getpid(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]

@tool(name="f.stream")
def stream(how: str) -> Iterator[list[int]]:
    """Fork between two parts."""
    yield [os.getpid(), 0]
    pid = os.fork()
    if pid == 0:
        yield end(how)
    yield [os.getpid(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
'''

ASYNC_TOOLS = (
    TOOLS
    + '''
@tool(name="f.coroutine")
async def coroutine(how: str) -> list[int]:
    """Fork in a coroutine."""
    future = asyncio.get_running_loop().create_future()
    pid = os.fork()
    if pid == 0:
        if how == "await":
            await future
        return end(how)
    return [os.getpid(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
'''
)


def _has(log: Path, text: str) -> bool:
    return text in log.read_text()


ENDS = [("return", 0), ("raise", 1), ("exit", 3), ("say", 1)]


@pytest.fixture(scope="module", params=["one thread", "a loop"])
def running(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Running]:
    tools = TOOLS if request.param == "one thread" else ASYNC_TOOLS
    with Running(tmp_path_factory.mktemp("forks"), tools=tools) as running:
        yield running


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with running.client() as client:
        yield client
        worker = client.call("f.fork", {"how": "return"}, timeout_s=10)[0]
        # whatever ended, the worker is the same and alone
        wait_for(lambda: not psutil.Process(worker).children(), what="the end of what was forked off")
        assert client.call("system.status", {})["deaths"] == []


@pytest.mark.parametrize(("how", "code"), [*ENDS, ("report", 0), ("port", 4)])
def test_a_fork_of_a_tool_ends_with_its_code(client: Client, how: str, code: int) -> None:
    worker, status = client.call("f.fork", {"how": how}, timeout_s=20)
    assert status == code
    assert client.call("f.fork", {"how": "return"}, timeout_s=10) == [worker, 0]


def test_a_fork_of_a_tool_ends_at_a_sigterm(client: Client) -> None:
    assert client.call("f.fork", {"how": "wait", "kill": True}, timeout_s=20)[1] == -signal.SIGTERM


@pytest.mark.parametrize(("how", "code"), ENDS)
def test_a_fork_of_a_stream_sends_no_part_and_ends(client: Client, how: str, code: int) -> None:
    parts = list(client.stream("f.stream", {"how": how}, timeout_s=20))
    assert [status for _, status in parts] == [0, code]
    assert len({pid for pid, _ in parts}) == 1


@pytest.mark.parametrize(("how", "code"), [*ENDS, ("await", 0)])
def test_a_fork_of_a_coroutine_ends_with_it_or_when_it_waits(tmp_path: Path, how: str, code: int) -> None:
    with Running(tmp_path, tools=ASYNC_TOOLS) as running, running.client() as client:
        assert client.call("f.coroutine", {"how": how}, timeout_s=20)[1] == code


def test_what_a_fork_raised_and_said_is_in_the_log(running: Running, client: Client) -> None:
    client.call("f.fork", {"how": "raise"}, timeout_s=20)
    client.call("f.fork", {"how": "say"}, timeout_s=20)
    log = running.folder / "start.log"
    for text in ("LookupError: in the fork", "said at the end", "forked at import"):
        wait_for(functools.partial(_has, log, text), what=text)
