"""Asking the supervisor for ports: never so fast that it takes the worker for a hostile one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker import limits
from mcp_broker.core.bucket import Bucket, Rate
from mcp_broker.errors import PortError, PortsExhausted
from mcp_broker.wire.tether import Leased, LeaseRefused, ReturnPort
from mcp_broker.worker.leases import Lender
from mcp_broker.worker.tether import Received

if TYPE_CHECKING:
    from collections.abc import Callable


class Supervisor:
    """Has no port left, and counts as the real one does."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked = 0
        self._bucket = Bucket(Rate(limits.TETHER_MESSAGES_PER_S, limits.TETHER_MESSAGES_BURST))

    def ask(self, request: Callable[[int], Any], _timeout_s: float) -> Received:
        for _message in ("LEASE", "RETURN"):
            assert not self._bucket.wait_s(self.now), "it would be killed"
            self._bucket.take(self.now)
        self.asked += 1
        return Received(LeaseRefused(request(1).number, PortsExhausted.code, "every port is lent"), None)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_tool_that_asks_for_a_port_again_and_again_waits_and_is_not_killed() -> None:
    supervisor: Any = Supervisor()
    lender = Lender(supervisor, lambda: supervisor.now, supervisor.sleep)
    for _ in range(2000):
        with pytest.raises(PortError, match="every port is lent"):
            lender.lease(0, None)
    assert supervisor.asked == 2000
    assert supervisor.now > 0


def test_a_tool_that_asks_now_and_then_never_waits() -> None:
    supervisor: Any = Supervisor()
    lender = Lender(supervisor, lambda: supervisor.now, supervisor.sleep)
    for _ in range(20):
        with pytest.raises(PortError):
            lender.lease(0, None)
    assert supervisor.now == 0


def test_a_port_whose_socket_could_not_be_taken_is_given_back() -> None:
    said: list[Any] = []

    class Full(Supervisor):
        """Lends a port to a worker that has no room for another descriptor."""

        def ask(self, request: Callable[[int], Any], _timeout_s: float) -> Received:
            return Received(Leased(request(1).number, "127.0.0.1", 9999), None)

        def say(self, message: Any) -> None:
            said.append(message)

    supervisor: Any = Full()
    lender = Lender(supervisor, lambda: supervisor.now, supervisor.sleep)
    with pytest.raises(PortError, match="too many files are open"):
        lender.lease(0, None)
    assert said == [ReturnPort(9999)]
