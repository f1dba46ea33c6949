"""A profile with several endpoints: dead ones cost little, and a session moves with its broker."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import time
from typing import TYPE_CHECKING

import pytest

from mcp_broker import AsyncClient, Client, NotReachable
from mcp_broker.auth.profile import save_profile
from mcp_broker.wire import messages
from tests.client.support.broker import ScriptedBroker
from tests.support.proxy import TcpProxy
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from mcp_broker.auth.profile import Profile


def dead_endpoint() -> str:
    """Return an address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def profile_of(broker: ScriptedBroker, *endpoints: str) -> Profile:
    return dataclasses.replace(broker.profile(), endpoints=endpoints)


@pytest.mark.parametrize("before", [0, 1, 5])
def test_dead_endpoints_before_the_live_one_are_passed_without_a_pause(
    broker: ScriptedBroker, before: int
) -> None:
    endpoints = (*(dead_endpoint() for _ in range(before)), broker.endpoint, dead_endpoint())
    began = time.monotonic()
    with Client.connect(profile_of(broker, *endpoints)) as client:
        assert client.call("echo", {"a": 1}) == {"a": 1}
        # each is refused within one look; with pauses that double it would be 1.5 s
        assert time.monotonic() - began < 1.0
    assert len(broker.of_kind(messages.Hello)) == 1


def test_asyncio_client_passes_dead_endpoints_too(broker: ScriptedBroker) -> None:
    async def story() -> None:
        async with AsyncClient.connect(profile_of(broker, dead_endpoint(), broker.endpoint)) as client:
            assert await client.call("echo", {"a": 1}) == {"a": 1}

    asyncio.run(story())


def test_connection_that_was_cut_is_opened_again_where_it_was(broker: ScriptedBroker) -> None:
    with TcpProxy(broker.endpoint) as proxy, TcpProxy(broker.endpoint) as other:
        endpoints = (dead_endpoint(), proxy.endpoint, other.endpoint)
        with Client.connect(profile_of(broker, *endpoints)) as client:
            for number in range(3):
                assert client.call("echo", {"a": number}) == {"a": number}
                proxy.cut()
            assert client.call("echo", {"a": 3}, timeout_s=10) == {"a": 3}
        assert proxy.accepted >= 4
        assert other.accepted == 0


def test_call_goes_on_over_another_endpoint_with_the_same_session_and_id(broker: ScriptedBroker) -> None:
    with TcpProxy(broker.endpoint) as proxy:
        path_that_ends = TcpProxy(broker.endpoint).start()
        with Client.connect(profile_of(broker, path_that_ends.endpoint, proxy.endpoint)) as client:
            future = client.submit("hold", timeout_s=20)
            call_id = future.call_id
            wait_for(lambda: broker.held)
            path_that_ends.stop()
            wait_for(lambda: proxy.accepted)
            wait_for(lambda: len(broker.of_kind(messages.Hello)) == 2)
            broker.release()
            assert future.result(10) == "released"
            assert client.call("echo", {"a": 1}) == {"a": 1}
    first, second = broker.of_kind(messages.Hello)
    assert first.session_id is None
    assert second.session_id is not None
    assert broker.runs[call_id] == 1, "it was sent again under its id, and not run again"


def test_client_follows_a_broker_that_moves_to_another_of_its_endpoints() -> None:
    with ScriptedBroker() as new:
        old = ScriptedBroker(keys=new.keys).start()
        with Client.connect(profile_of(new, old.endpoint, new.endpoint)) as client:
            assert client.call("echo", {"a": 1}) == {"a": 1}
            assert new.of_kind(messages.Hello) == []
            old.stop()
            assert client.call("echo", {"a": 2}, timeout_s=10) == {"a": 2}
        assert len(new.of_kind(messages.Hello)) == 1


def test_endpoints_that_the_file_names_anew_are_tried(tmp_path: Path) -> None:
    path = tmp_path / "me.toml"
    with ScriptedBroker() as new:
        old = ScriptedBroker(keys=new.keys).start()
        profile = profile_of(new, old.endpoint, dead_endpoint())
        save_profile(path, profile)
        with Client.connect(path) as client:
            assert client.call("echo", {"a": 1}) == {"a": 1}
            save_profile(path, dataclasses.replace(profile, endpoints=(dead_endpoint(), new.endpoint)))
            old.stop()
            assert client.call("echo", {"a": 2}, timeout_s=10) == {"a": 2}


def test_all_endpoints_that_were_tried_are_named(broker: ScriptedBroker) -> None:
    endpoints = (dead_endpoint(), dead_endpoint())
    with pytest.raises(NotReachable) as away:
        Client.connect(profile_of(broker, *endpoints), timeout_s=0.3)
    assert all(endpoint in str(away.value) for endpoint in endpoints)
