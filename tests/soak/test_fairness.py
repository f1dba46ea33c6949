"""One principal floods a pool, and another one hardly notices."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Self

import pytest

from mcp_broker.errors import CallError, Overloaded
from tests.support.load import percentile

if TYPE_CHECKING:
    from mcp_broker import Client
    from tests.soak.conftest import Start
    from tests.support.load import Soak

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.soak]

TOOLS = '''
"""A tool of five milliseconds."""
import time
from mcp_broker.worker import tool

@tool(name="t.five", idempotent=True)
def five() -> None:
    """Take five milliseconds."""
    time.sleep(0.005)
'''
TIMEOUT_S = 600.0


class Flood:
    """Submits calls as fast as the client's window lets it, until all have ended."""

    def __init__(self, client: Client, calls: int) -> None:
        self._client = client
        self._calls = calls
        self.ended = 0
        self.stop = False
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        ahead = []
        for _ in range(self._calls):
            if self.stop:
                break
            try:
                ahead.append(self._client.submit("t.five", timeout_s=TIMEOUT_S))
            except Overloaded:
                continue
            while ahead and ahead[0].done():
                ahead.pop(0)
                self.ended += 1
        for future in ahead:
            if self.stop:
                future.cancel()
            try:
                future.result(TIMEOUT_S)
            except CallError:
                continue
            self.ended += 1

    @property
    def is_over(self) -> bool:
        """Tell whether all calls have been submitted and have ended."""
        return not self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop = True
        self._thread.join()


def times(client: Client, calls: int) -> list[float]:
    """Call one after the other, and return how long each took, seconds."""
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        client.call("t.five", timeout_s=TIMEOUT_S)
        taken.append(time.perf_counter() - began)
    return taken


def test_flood_of_one_principal_leaves_another_its_share(start: Start, soak: Soak) -> None:
    flood_calls = soak.count(sample=2000, full=100_000)
    samples = soak.count(sample=100, full=1000)
    with start(tools=TOOLS, workers=2) as running:
        a, b = running.issue("a", "t.*"), running.issue("b", "t.*")
        with running.client(a) as one, running.client(b) as two:
            times(two, 20)
            alone = percentile(times(two, samples), 0.95)
            with Flood(one, flood_calls) as flood:
                # the flood is there when the first call of the other comes
                times(two, 1)
                flooded = percentile(times(two, samples), 0.95)
                assert not flood.is_over, "the flood ended before it was measured"
                # the rest of a full flood
                while soak.is_full and not flood.is_over:
                    flooded = max(flooded, percentile(times(two, samples), 0.95))
                    soak.progress(f"{flood.ended:,} of {flood_calls:,} calls")
    soak.report(
        "p95 of the other principal", f"{alone * 1000:.1f} ms alone, {flooded * 1000:.1f} ms in the flood"
    )
    assert flooded < 3 * alone
