"""The asyncio client against a scripted broker."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from mcp_broker import AsyncClient, errors
from mcp_broker.wire import messages
from tests.client.support.broker import USAGE, ScriptedBroker, ok
from tests.support.proxy import TcpProxy
from tests.support.waiting import wait_for_async

if TYPE_CHECKING:
    from mcp_broker.client.awaitables import AsyncPartStream


def telling(broker: ScriptedBroker, session_id: bytes, call: messages.Call, _packed: bytes) -> None:
    """Report progress, then succeed."""
    for item in (messages.Progress(call.call_id, 0.5, "half"), messages.Progress(call.call_id, None)):
        broker.send(broker.sessions[session_id].routing_id, messages.Progresses(broker.epoch, (item,)))
    broker.outcome(session_id, ok(call.call_id, "done"))


Body = Callable[[AsyncClient], Awaitable[None]]


@asynccontextmanager
async def connected(broker: ScriptedBroker) -> AsyncIterator[AsyncClient]:
    async with asyncio.timeout(30), AsyncClient.connect(broker.profile()) as client:
        yield client


def run(broker: ScriptedBroker, body: Body) -> None:
    async def main() -> None:
        async with connected(broker) as client:
            await body(client)

    asyncio.run(main(), debug=False)


def test_progress_is_told_in_the_loop_before_the_result(broker: ScriptedBroker) -> None:
    broker.script["telling"] = telling

    async def body(client: AsyncClient) -> None:
        heard: list[float | None] = []
        assert await client.call("telling", on_progress=lambda fraction, _: heard.append(fraction)) == "done"
        assert heard[-1] is None

    run(broker, body)


def test_call_submit_map_stream_and_tools_work_as_in_the_blocking_client(broker: ScriptedBroker) -> None:
    async def body(client: AsyncClient) -> None:
        assert client.principal == "tester"
        assert await client.call("echo", {"a": 1}) == {"a": 1}
        future = await client.submit("echo", {"a": 2})
        assert await future == {"a": 2}
        assert future.usage == USAGE
        assert len(future.call_id) == 16
        assert [one["i"] async for one in client.map("echo", ({"i": at} for at in range(500)))] == list(
            range(500)
        )
        assert [part async for part in client.stream("count", {"n": 100})] == list(range(100))
        assert await client.call("count", {"n": 40}) == list(range(40))
        assert (await client.tools(name="echo"))[0]["asked"] == {"name": "echo"}
        data = bytes(1_000_000)
        assert await client.call("echo", {"data": data}) == {"data": data}

    run(broker, body)


def test_failed_call_raises_its_typed_error(broker: ScriptedBroker) -> None:
    async def body(client: AsyncClient) -> None:
        with pytest.raises(errors.ToolFailed) as failed:
            await client.call("fail")
        assert failed.value.tool == "fail"
        with pytest.raises(errors.ToolFailed):
            [one async for one in client.map("fail", [{}, {}, {}])]
        with pytest.raises(TypeError):
            await client.call("echo", {"a": object()})

    run(broker, body)


def test_an_option_that_there_is_not_is_named_with_its_method(broker: ScriptedBroker) -> None:
    async def body(client: AsyncClient) -> None:
        wrong = {"detached": True}
        with pytest.raises(TypeError, match=r"call\(\) has no option 'detached'; did you mean 'detach'\?"):
            await client.call("echo", **wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"submit\(\) has no option 'detached'"):
            await client.submit("echo", **wrong)  # type: ignore[arg-type]
        assert broker.of_kind(messages.Calls) == []

    run(broker, body)


def test_calls_of_one_turn_go_out_in_one_batch(broker: ScriptedBroker) -> None:
    async def body(client: AsyncClient) -> None:
        results = await asyncio.gather(*(client.call("echo", {"i": at}) for at in range(200)))
        assert [one["i"] for one in results] == list(range(200))
        assert len(broker.of_kind(messages.Calls)) < 10

    run(broker, body)


def test_cancelled_task_cancels_its_call(broker: ScriptedBroker) -> None:
    async def body(client: AsyncClient) -> None:
        task = asyncio.create_task(client.call("hold"))
        await wait_for_async(lambda: broker.held)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await wait_for_async(lambda: not broker.held)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await client.call("hold")
        await wait_for_async(lambda: len(broker.of_kind(messages.Cancel)) == 2)
        held = await client.submit("hold")
        await wait_for_async(lambda: broker.held)
        assert client.cancel(held.call_id)
        with pytest.raises(errors.Cancelled):
            await held

    run(broker, body)


def test_stream_left_early_is_cancelled(broker: ScriptedBroker) -> None:
    async def body(client: AsyncClient) -> None:
        stream = client.stream("count", {"n": 1000})
        async for part in stream:
            if part == 3:
                break
        await stream.aclose()
        await wait_for_async(lambda: not broker.streams)

    run(broker, body)


def test_loop_over_a_stream_that_is_left_early_cancels_the_call_without_more_ado(
    broker: ScriptedBroker,
) -> None:
    async def body(client: AsyncClient) -> None:
        async for part in client.stream("count", {"n": 1000}):
            if part == 3:
                break
        await wait_for_async(lambda: not broker.streams)
        assert len(broker.of_kind(messages.Cancel)) == 1

    run(broker, body)


def test_stream_that_was_entered_has_an_id_and_usage_and_can_be_cancelled(broker: ScriptedBroker) -> None:
    async def body(client: AsyncClient) -> None:
        async with client.stream("count", {"n": 3}) as parts:
            await wait_for_async(lambda: parts.call_id in broker.runs)
            assert [part async for part in parts] == [0, 1, 2]
            assert parts.usage == USAGE
            assert not client.cancel(parts)
        async with client.stream("count", {"n": 1000}) as parts:
            assert await anext(parts) == 0
            assert client.cancel(parts)
            with pytest.raises(errors.Cancelled):
                [part async for part in parts]
        async with client.stream("count", {"n": 1000}) as parts:
            assert await anext(parts) == 0
        await wait_for_async(lambda: not broker.streams)
        assert len(broker.of_kind(messages.Cancel)) == 2
        assert [part async for part in parts] == [], "what came is dropped with the block"

    run(broker, body)


def test_stream_makes_its_call_when_it_is_entered_or_read_and_not_before(broker: ScriptedBroker) -> None:
    async def body(client: AsyncClient) -> None:
        with pytest.raises(
            TypeError, match=r"stream\(\) has no option 'prioriti'; did you mean 'priority'\?"
        ):
            client.stream("count", prioriti=1)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="a map of names to values"):
            client.stream("count", [1])  # type: ignore[arg-type]
        untouched = client.stream("count", {"n": 3})
        with pytest.raises(RuntimeError, match="before it is made"):
            _ = untouched.call_id
        cancelled = client.stream("count", {"n": 3})
        assert cancelled.cancel()
        assert not cancelled.cancel()
        with pytest.raises(errors.Cancelled):
            await anext(cancelled)
        del untouched
        assert await client.call("echo") == {}
        assert [call.tool for sent in broker.of_kind(messages.Calls) for call in sent.calls] == ["echo"]

    run(broker, body)


def test_stream_waits_for_room_in_the_window_unless_it_is_cancelled_meanwhile() -> None:
    async def body(client: AsyncClient) -> None:
        held = [await client.submit("hold") for _ in range(4)]
        late = client.stream("count", {"n": 3}, timeout_s=0.05)
        with pytest.raises(errors.Overloaded):
            await anext(late)
        assert [part async for part in late] == []
        parts, unwanted = (client.stream("count", {"n": 3}) for _ in range(2))
        reading = [asyncio.create_task(anext(stream)) for stream in (parts, unwanted)]
        await wait_for_async(lambda: sum(not one.done() for one in client._waiting) == 2)
        assert unwanted.cancel()
        await asyncio.to_thread(broker.release)
        assert await reading[0] == 0
        with pytest.raises(errors.Cancelled):
            await reading[1]
        assert [part async for part in parts] == [1, 2]
        tools = [call.tool for sent in broker.of_kind(messages.Calls) for call in sent.calls]
        assert tools == ["hold"] * 4 + ["count"], "what was cancelled is never sent"
        assert await asyncio.gather(*held) == ["released"] * 4

    with ScriptedBroker(window=4) as broker:
        run(broker, body)


def test_stream_dropped_after_its_loop_is_of_no_consequence(broker: ScriptedBroker) -> None:
    async def main() -> tuple[AsyncClient, AsyncPartStream]:
        client = await AsyncClient.connect(broker.profile())
        stream = client.stream("count", {"n": 1000})
        assert await anext(stream) == 0
        return client, stream

    client, stream = asyncio.run(main())
    assert broker.streams
    del stream
    gc.collect()
    client._link.close()


def test_submit_waits_for_room_in_the_window() -> None:
    async def body(client: AsyncClient) -> None:
        held = [await client.submit("hold") for _ in range(4)]
        with pytest.raises(errors.Overloaded):
            await client.submit("echo", timeout_s=0.05)
        waiting = asyncio.create_task(client.call("echo", {"a": 1}))
        await wait_for_async(lambda: len(broker.held) == 4)
        assert not waiting.done()
        await asyncio.to_thread(broker.release)
        assert await waiting == {"a": 1}
        assert await asyncio.gather(*held) == ["released"] * 4

    with ScriptedBroker(window=4) as broker:
        run(broker, body)


def test_no_broker_is_not_reachable() -> None:
    broker = ScriptedBroker()
    profile = broker.profile()
    broker.stop()

    async def main() -> None:
        with pytest.raises(errors.NotReachable, match="mcp-broker start"):
            await AsyncClient.connect(profile, timeout_s=0.3)

    asyncio.run(main())


def test_refused_hello_raises_at_once(broker: ScriptedBroker) -> None:
    broker.refuse = messages.Error(broker.epoch, "UNAUTHENTICATED", "not you", b"\x80", fatal=True)

    async def main() -> None:
        with pytest.raises(errors.Unauthenticated, match="not you"):
            async with AsyncClient.connect(broker.profile()):
                pass

    asyncio.run(main())


def test_call_outlives_a_cut_connection(broker: ScriptedBroker) -> None:
    with TcpProxy(broker.endpoint) as proxy:

        async def main() -> None:
            async with AsyncClient.connect(broker.profile(proxy.endpoint)) as client:
                task = asyncio.create_task(client.call("hold"))
                await wait_for_async(lambda: broker.held)
                proxy.cut()
                await wait_for_async(lambda: len(broker.of_kind(messages.Hello)) == 2)
                await asyncio.to_thread(broker.release)
                assert await task == "released"
                assert set(broker.runs.values()) == {1}

        asyncio.run(main())


@pytest.mark.slow
def test_half_open_connection_is_noticed_by_silence(broker: ScriptedBroker) -> None:
    with TcpProxy(broker.endpoint) as proxy:

        async def main() -> None:
            async with AsyncClient.connect(broker.profile(proxy.endpoint)) as client:
                assert await client.call("echo", {"a": 1}) == {"a": 1}
                proxy.stall(only_existing=True)
                began = time.monotonic()
                assert await client.call("echo", {"a": 2}, timeout_s=10) == {"a": 2}
                assert time.monotonic() - began < 3

        asyncio.run(main())


@pytest.mark.process
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_client_in_a_forked_child_takes_no_calls(broker: ScriptedBroker) -> None:
    async def body(client: AsyncClient) -> None:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            # the loop is the parent's: what the call does here, it does before it would wait
            try:
                client.call("echo").send(None)
            except errors.BrokerError as error:
                os.write(write, error.code.encode())
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as said:
            assert said.read() == b"WRONG_PROCESS"
        status = await asyncio.to_thread(os.waitpid, pid, 0)
        assert status[1] == 0
        assert await client.call("echo", {"a": 1}) == {"a": 1}

    run(broker, body)


def test_closed_client_cancels_and_takes_no_calls(broker: ScriptedBroker) -> None:
    async def main() -> None:
        client = await AsyncClient.connect(broker.profile())
        future = await client.submit("hold")
        await client.close()
        with pytest.raises(errors.Cancelled):
            await future
        with pytest.raises(errors.ClientClosed, match="closed"):
            await client.call("echo")
        with pytest.raises(errors.ClientClosed):
            await anext(client.stream("count"))

    asyncio.run(main())
