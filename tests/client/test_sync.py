"""The blocking client against a scripted broker."""

from __future__ import annotations

import concurrent.futures as standard
import gc
import os
import re
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zmq
import zstandard

from mcp_broker import Client, errors
from mcp_broker.auth.keys import CurvePair
from mcp_broker.auth.profile import save_profile
from mcp_broker.client.future import CallFuture
from mcp_broker.client.options import CallOptions
from mcp_broker.client.session import Wishes
from mcp_broker.wire import messages, payload
from tests.client.support.broker import USAGE, ScriptedBroker, ok
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def client(broker: ScriptedBroker) -> Iterator[Client]:
    with Client.connect(broker.profile()) as connected:
        yield connected


def test_call_gives_the_result(client: Client) -> None:
    assert client.call("echo", {"a": [1, b"x", None]}) == {"a": [1, b"x", None]}
    assert client.call("echo") == {}
    assert client.principal == "tester"


def test_call_raises_the_typed_error_with_call_and_tool(client: Client) -> None:
    with pytest.raises(errors.ToolFailed, match="did not work") as failed:
        client.call("fail")
    assert failed.value.tool == "fail"
    assert len(failed.value.call_id or b"") == 16
    assert failed.value.details == {"tool": "fail"}
    assert not failed.value.retryable


@pytest.mark.parametrize("capabilities", [(), ("zstd",)])
def test_large_arguments_are_compressed_for_a_broker_whose_workers_take_it(
    broker: ScriptedBroker, capabilities: tuple[str, ...]
) -> None:
    def back(broker: ScriptedBroker, session_id: bytes, call: messages.Call, packed: bytes) -> None:
        encoded = call.extra.encoding if call.extra is not None else None
        broker.outcome(session_id, messages.Outcome(call.call_id, "OK", packed, USAGE, encoding=encoded))

    broker.script["back"] = back
    broker.capabilities = capabilities
    with Client.connect(broker.profile()) as client:
        large = {"text": "ab" * 20_000}
        assert client.call("back", large, idle_timeout_s=3) == large
        assert client.call("back", {"text": "ab"}) == {"text": "ab"}
    large_call, small_call = (call for sent in broker.of_kind(messages.Calls) for call in sent.calls)
    wanted = messages.CallExtra(idle_timeout_ms=3000, encoding="zstd" if capabilities else None)
    assert (large_call.extra, small_call.extra) == (wanted, None)
    assert (len(large_call.arguments) < 1000) is bool(capabilities)


def test_result_that_is_a_bomb_is_an_error_of_this_call_only(client: Client, broker: ScriptedBroker) -> None:
    def explode(broker: ScriptedBroker, session_id: bytes, call: messages.Call, _packed: bytes) -> None:
        packed = zstandard.compress(bytes(50_000_000))
        broker.outcome(session_id, messages.Outcome(call.call_id, "OK", packed, USAGE, encoding="zstd"))

    broker.script["explode"] = explode
    with pytest.raises(errors.PayloadTooLarge, match="50,000,000 bytes once decompressed"):
        client.call("explode")
    assert client.call("echo", {"a": 1}) == {"a": 1}


def telling(broker: ScriptedBroker, session_id: bytes, call: messages.Call, _packed: bytes) -> None:
    """Report progress, then succeed."""
    for item in (messages.Progress(call.call_id, 0.5, "half"), messages.Progress(call.call_id, None)):
        broker.send(broker.sessions[session_id].routing_id, messages.Progresses(broker.epoch, (item,)))
    broker.outcome(session_id, ok(call.call_id, "done"))


def test_progress_is_told_before_the_result(client: Client, broker: ScriptedBroker) -> None:
    broker.script["telling"] = telling
    heard: list[tuple[float | None, str]] = []
    assert client.call("telling", on_progress=lambda *news: heard.append(news)) == "done"
    assert heard[-1] == (None, "")
    assert len(heard) <= 2


def test_callback_that_raises_costs_nobody_a_result(
    client: Client, broker: ScriptedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_fraction: float | None, _message: str) -> None:
        raise ValueError("mine")

    broker.script["telling"] = telling
    assert client.submit("telling", on_progress=broken).result(5) == "done"
    wait_for(lambda: "an on_progress callback raised" in caplog.text)
    assert client.call("echo", {"a": 1}) == {"a": 1}


def test_callback_may_call_a_tool(client: Client, broker: ScriptedBroker) -> None:
    broker.script["telling"] = telling
    heard: list[Any] = []

    def ask(_fraction: float | None, _message: str) -> None:
        heard.append(client.call("echo", {"a": 1}))

    assert client.call("telling", on_progress=ask) == "done"
    assert heard[0] == {"a": 1}


def test_future_is_a_standard_future_with_usage(client: Client) -> None:
    future = client.submit("echo", {"a": 1})
    assert isinstance(future, standard.Future)
    assert future.result(5) == {"a": 1}
    assert future.exception() is None
    assert (future.done(), future.running(), future.cancelled()) == (True, False, False)
    assert future.usage == USAGE


def test_standard_wait_and_as_completed_work_without_a_waiting_thread(client: Client) -> None:
    futures = [client.submit("echo", {"i": at}) for at in range(100)]
    done, left = standard.wait(futures, timeout=5)
    assert (len(done), left) == (100, set())
    futures = [client.submit("echo" if at % 2 else "fail", {"i": at}) for at in range(10)]
    finished = list(standard.as_completed(futures, timeout=5))
    assert sum(future.exception() is None for future in finished) == 5


def test_done_callback_runs_though_nobody_waits(client: Client) -> None:
    called = threading.Event()
    client.submit("echo").add_done_callback(lambda _: called.set())
    assert called.wait(5)


def test_done_callback_that_waits_holds_up_no_thread_that_waits_for_its_own_call(
    client: Client, broker: ScriptedBroker
) -> None:
    went_on = threading.Event()
    seen: standard.Future[bool] = standard.Future()
    client.submit("hold").add_done_callback(lambda _: seen.set_result(went_on.wait(5)))

    def call() -> None:
        client.call("hold")
        went_on.set()

    with standard.ThreadPoolExecutor() as threads:
        called = threads.submit(call)
        wait_for(lambda: len(broker.held) == 2)
        # the thread leads, and finds both outcomes
        broker.release()
        called.result(10)
        assert seen.result(10)


def test_done_callbacks_run_when_the_client_is_closed(client: Client, broker: ScriptedBroker) -> None:
    codes: list[str] = []
    for _ in range(3):
        client.submit("hold").add_done_callback(lambda future: codes.append(str(future.cancelled())))
    wait_for(lambda: len(broker.held) == 3)
    client.close()
    wait_for(lambda: codes == ["True"] * 3)


def test_done_callback_may_use_the_client(client: Client, broker: ScriptedBroker) -> None:
    seen: standard.Future[Any] = standard.Future()
    first, behind = client.submit("hold"), client.submit("hold")

    def again(_: standard.Future[Any]) -> None:
        # both end in the same turn: the second is not told yet
        seen.set_result((client.call("echo", {"again": True}), behind.result(5)))

    first.add_done_callback(again)
    behind.add_done_callback(lambda _: None)
    wait_for(lambda: len(broker.held) == 2)
    broker.release()
    assert seen.result(5) == ({"again": True}, "released")


def test_submitted_calls_are_sent_though_nobody_waits(client: Client, broker: ScriptedBroker) -> None:
    for _ in range(5):
        client.submit("hold")
    wait_for(lambda: len(broker.held) == 5)


def test_result_with_a_timeout_lets_the_call_go_on(client: Client, broker: ScriptedBroker) -> None:
    future = client.submit("hold")
    with pytest.raises(TimeoutError):
        future.result(0.05)
    broker.release()
    assert future.result(5) == "released"


def test_calls_in_flight_are_batched(client: Client, broker: ScriptedBroker) -> None:
    first = client.submit("hold")
    futures = [client.submit("echo", {"i": at}) for at in range(64)]
    assert [future.result(5)["i"] for future in futures] == list(range(64))
    assert len(broker.of_kind(messages.Calls)) < 40
    first.cancel()


def test_cancel_tells_the_broker_and_result_raises_cancelled(client: Client, broker: ScriptedBroker) -> None:
    future = client.submit("hold")
    wait_for(lambda: broker.held)
    assert future.cancel()
    assert future.cancel()
    assert future.cancelled()
    with pytest.raises(errors.Cancelled) as cancelled:
        future.result(5)
    assert isinstance(cancelled.value, standard.CancelledError)
    [message] = wait_for(lambda: broker.of_kind(messages.Cancel))
    assert message.call_ids == (future.call_id,)
    assert standard.wait([future], timeout=5).done == {future}


def test_cancel_of_an_ended_call_is_false(client: Client) -> None:
    future = client.submit("echo")
    future.result(5)
    assert not future.cancel()
    assert not client.cancel(future)
    assert not client.cancel(future.call_id)


def test_cancel_by_id_from_another_thread_ends_a_waiting_call(client: Client, broker: ScriptedBroker) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            client.call("hold")
        except errors.Cancelled as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    [call_id] = wait_for(lambda: list(broker.held))
    assert client.cancel(call_id)
    thread.join(5)
    assert len(caught) == 1


def test_map_keeps_the_order_and_raises_at_the_place_of_the_failure(client: Client) -> None:
    assert [one["i"] for one in client.map("echo", ({"i": at} for at in range(500)))] == list(range(500))
    with pytest.raises(errors.ToolFailed):
        list(client.map("fail", [{}, {}]))


def test_stream_gives_parts_under_credit(client: Client, broker: ScriptedBroker) -> None:
    stream = client.stream("count", {"n": 100})
    assert next(stream) == 0
    wait_for(lambda: broker.streams[stream.call_id][0] >= 16)
    assert broker.streams[stream.call_id][0] <= 16 + 8
    assert list(stream) == list(range(1, 100))
    assert stream.usage == USAGE
    assert client.call("count", {"n": 40}) == list(range(40))
    assert list(client.stream("echo", {"a": 1})) == [{"a": 1}]


def test_stream_left_early_is_cancelled(client: Client, broker: ScriptedBroker) -> None:
    with client.stream("count", {"n": 1000}) as stream:
        assert next(stream) == 0
    wait_for(lambda: not broker.streams)
    for part in client.stream("count", {"n": 1000}):
        if part == 3:
            break
    del part
    gc.collect()
    wait_for(lambda: not broker.streams)


def test_stream_raises_the_error_after_the_parts_before_it(client: Client, broker: ScriptedBroker) -> None:
    def broken(serving: ScriptedBroker, session_id: bytes, call: messages.Call, packed: bytes) -> None:
        route = serving.sessions[session_id].routing_id
        serving.send(route, messages.Partial(serving.epoch, (messages.Part(call.call_id, 0, b"\x01"),)))
        fault = messages.Fault("broke", False, b"\x80")
        serving.outcome(session_id, messages.Outcome(call.call_id, "TOOL_FAILED", None, None, fault))

    broker.script["broken"] = broken
    stream = client.stream("broken")
    assert next(stream) == 1
    with pytest.raises(errors.ToolFailed, match="broke"):
        next(stream)
    assert list(stream) == []


def test_tools_are_found_by_filter(client: Client) -> None:
    assert client.tools(name="echo", tag="x")[0]["asked"] == {"name": "echo", "tag": "x"}
    assert client.tools()[0]["asked"] == {}


def test_large_payloads_go_both_ways(client: Client) -> None:
    data = os.urandom(1_000_000)
    assert client.call("echo", {"data": data}) == {"data": data}
    with pytest.raises(errors.PayloadTooLarge):
        client.call("echo", {"data": bytes(1_100_000)})


@pytest.mark.parametrize("arguments", [{"a": object()}, [1, 2], {"a": 2**70}])
def test_arguments_that_cannot_be_sent_are_the_callers_fault(client: Client, arguments: Any) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        client.call("echo", arguments)
    assert client.call("echo", {"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("idle_timeout", "did you mean 'idle_timeout_s'?"),
        ("timeout", "did you mean 'timeout_s'?"),
        ("x", "there are detach, idempotency_key, idle_timeout_s, on_progress, priority, timeout_s"),
    ],
)
@pytest.mark.parametrize("method", ["call", "submit", "stream"])
def test_an_option_that_there_is_not_is_named_with_the_method_and_the_nearest_one(
    client: Client, broker: ScriptedBroker, method: str, option: str, instead: str
) -> None:
    with pytest.raises(TypeError, match=rf"^{method}\(\) has no option '{option}'; {re.escape(instead)}$"):
        getattr(client, method)("echo", {}, **{option: 1})
    assert broker.of_kind(messages.Calls) == []


@pytest.mark.parametrize("inner", ["attach_to", "encoding", "upload", "upload_name"])
def test_what_the_client_says_itself_of_a_call_is_no_option(client: Client, inner: str) -> None:
    with pytest.raises(TypeError, match=rf"call\(\) has no option '{inner}'"):
        client.call("echo", {}, **{inner: "zstd"})  # type: ignore[arg-type]
    assert {*CallOptions.__annotations__, inner} < set(Wishes.__annotations__)


def test_many_threads_share_one_client(client: Client) -> None:
    wrong: list[object] = []

    def run(name: int) -> None:
        for at in range(100):
            expected = {"who": name, "at": at}
            got = client.call("echo", expected) if at % 3 else client.submit("echo", expected).result(5)
            if got != expected:
                wrong.append(got)

    threads = [threading.Thread(target=run, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert wrong == []


def test_thread_whose_call_is_slow_does_not_hold_up_the_others(
    client: Client, broker: ScriptedBroker
) -> None:
    slow = threading.Thread(target=lambda: client.call("hold"))
    slow.start()
    wait_for(lambda: broker.held)
    assert client.call("echo", {"a": 1}, timeout_s=5) == {"a": 1}
    broker.release()
    slow.join(5)
    assert not slow.is_alive()


def test_submit_waits_for_room_in_the_window() -> None:
    with ScriptedBroker(window=4) as broker, Client.connect(broker.profile()) as client:
        held = [client.submit("hold") for _ in range(4)]
        with pytest.raises(errors.Overloaded):
            client.submit("echo", timeout_s=0.05)
        got: standard.Future[Any] = standard.Future()
        thread = threading.Thread(target=lambda: got.set_result(client.submit("echo", {"a": 1}).result(5)))
        thread.start()
        assert not got.done()
        broker.release()
        assert got.result(5) == {"a": 1}
        thread.join(5)
        assert [future.result(5) for future in held] == ["released"] * 4
        assert len(list(client.map("echo", [{}] * 50))) == 50


def test_broker_that_is_away_is_waited_for() -> None:
    first = ScriptedBroker()
    port, keys, profile = first.port, first.keys, first.profile()
    first.stop()
    started: list[ScriptedBroker] = []

    def late() -> None:
        started.append(ScriptedBroker(port, keys=keys).start())

    timer = threading.Timer(0.3, late)
    timer.start()
    try:
        with Client.connect(profile, timeout_s=5) as client:
            assert client.call("echo", {"a": 1}) == {"a": 1}
    finally:
        timer.join()
        for broker in started:
            broker.stop()


def test_no_broker_is_not_reachable_and_the_address_is_named() -> None:
    broker = ScriptedBroker()
    profile = broker.profile()
    broker.stop()
    began = time.monotonic()
    with pytest.raises(errors.NotReachable) as away:
        Client.connect(profile, timeout_s=0.3)
    assert time.monotonic() - began < 2
    assert profile.endpoints[0] in str(away.value)
    assert "connection refused" in str(away.value)
    assert "mcp-broker start" in (away.value.hint or "")


def test_broker_with_another_key_is_not_reachable(broker: ScriptedBroker) -> None:
    profile = ScriptedBroker.profile(broker)
    wrong = type(profile)(
        **{name: getattr(profile, name) for name in profile.__slots__}
        | {"server_key": CurvePair.generate().public}
    )
    with pytest.raises(errors.NotReachable, match="handshake"):
        Client.connect(wrong, timeout_s=0.5)


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "UNSUPPORTED_VERSION", "FORBIDDEN"])
def test_refused_hello_raises_at_once(broker: ScriptedBroker, code: str) -> None:
    broker.refuse = messages.Error(
        broker.epoch, code, "not you", payload.pack({"supported": [2]}), fatal=True
    )
    began = time.monotonic()
    with pytest.raises(errors.CALL_ERRORS[code], match="not you") as refused:
        Client.connect(broker.profile())
    assert refused.value.details == {"supported": [2]}
    assert time.monotonic() - began < 3


def test_missing_profile_is_not_reachable(tmp_path: Path) -> None:
    with pytest.raises(errors.NotReachable, match="profile"):
        Client.connect(tmp_path / "none.toml")


def test_profile_is_read_from_its_file_and_again_before_each_reconnection(tmp_path: Path) -> None:
    path = tmp_path / "me.toml"
    with ScriptedBroker() as first, ScriptedBroker(keys=first.keys) as second:
        save_profile(path, first.profile())
        with Client.connect(path) as client:
            save_profile(path, first.profile(second.endpoint))
            first.say(messages.Goodbye(first.epoch, "moving"))
            arrived = client._link.connection
            assert arrived is not None
            wait_for(lambda: arrived.events() & zmq.POLLIN)
            assert client.call("echo", {"a": 1}) == {"a": 1}
            assert len(second.of_kind(messages.Hello)) == 1


def test_closed_client_says_goodbye_and_takes_no_calls(broker: ScriptedBroker) -> None:
    client = Client.connect(broker.profile())
    future = client.submit("hold")
    client.close()
    client.close()
    with pytest.raises(errors.Cancelled):
        future.result(5)
    with pytest.raises(errors.ClientClosed, match="closed"):
        client.call("echo")
    wait_for(lambda: broker.of_kind(messages.Goodbye))


def test_close_wakes_threads_that_wait(broker: ScriptedBroker) -> None:
    client = Client.connect(broker.profile())
    ended: list[str] = []

    def run() -> None:
        try:
            client.call("hold")
        except errors.CallError as error:
            ended.append(error.code)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(broker.held) == 3)
    client.close()
    for thread in threads:
        thread.join(5)
    assert ended == ["CANCELLED"] * 3


def test_dropped_client_warns_and_lets_go(broker: ScriptedBroker) -> None:
    held = [Client.connect(broker.profile())]
    assert held[0].call("echo") == {}
    with pytest.warns(ResourceWarning, match="not closed"):
        held.clear()
    wait_for(lambda: broker.of_kind(messages.Goodbye))


@pytest.mark.process
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_client_in_a_forked_child_is_a_clear_error_and_harmless_to_the_parent(broker: ScriptedBroker) -> None:
    client = Client.connect(broker.profile())
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            client.call("echo")
        except errors.BrokerError as error:
            os.write(write, f"{error.code}: {error}".encode())
        client.close()
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as said:
        assert said.read().startswith(b"WRONG_PROCESS: this client belongs to the process that connected it")
    assert os.waitpid(pid, 0)[1] == 0
    assert client.call("echo", {"a": 1}) == {"a": 1}
    client.close()


def test_helper_thread_is_not_needed_for_plain_calls_and_ends_when_idle(client: Client) -> None:
    def helpers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "mcp-broker-helper"]

    wait_for(lambda: not helpers())
    client.call("echo")
    assert helpers() == []
    client.submit("echo").result(5)
    assert len(helpers()) == 1
    wait_for(lambda: not helpers())


def test_future_makes_no_condition_unless_somebody_asks(client: Client) -> None:
    future = client.submit("echo")
    future.result(5)
    assert CallFuture.__dict__["_real_condition"] is None
    assert "_real_condition" not in vars(future)
    assert standard.wait([future], timeout=1).done == {future}


def test_one_context_serves_all_clients(broker: ScriptedBroker) -> None:
    with Client.connect(broker.profile()) as one, Client.connect(broker.profile()) as other:
        contexts = {each._link.connection._socket.context for each in (one, other) if each._link.connection}
        assert len(contexts) == 1
        assert isinstance(contexts.pop(), zmq.Context)


def test_ended_call_leaves_nothing_to_the_garbage_collector(client: Client) -> None:
    client.submit("echo").result(5)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(client.submit("echo"))
        assert client.call("echo", {"a": 1}) == {"a": 1}
        wait_for(lambda: gone() is None)
    finally:
        gc.enable()


def test_a_client_that_goes_with_its_process_says_nothing(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client.connect(broker.profile())
    link = client._link
    with monkeypatch.context() as patch:
        patch.setattr(sys, "is_finalizing", lambda: True)
        # a warning would be an error here
        del client
        gc.collect()
    assert broker.of_kind(messages.Goodbye) == []
    link.close()
