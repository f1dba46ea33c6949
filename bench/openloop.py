"""``python -m bench.openloop``: calls at fixed instants, however long the ones before them take.

A closed loop asks for the next call when the last one is done, and so asks less of a broker that is slow just now. Here
call n is due at its instant n / rate, and its latency is counted from there: what the driver itself was late is in it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import json
import os
import sys
import time
from array import array
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from bench import kernel, ours, peer
from mcp_broker import AsyncClient
from mcp_broker.errors import CallError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mcp_broker.client.awaitables import AsyncCallFuture

#: calls before the first one that counts: every process has then seen its hot path
WARM_CALLS: Final = 500
_OK: Final = "OK"


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a run.

    Attributes:
        calls: that were due.
        outcomes: code -> how many calls ended with it; what is missing in the sum has no outcome.
        lost: calls that did not end with OK.
        whole_*: from the instant at which a call was due to its outcome, of those with OK, ms.
        added_*: the same less the time that the tool itself took, ms.
        late_*: from the instant at which a call was due to its submission: the driver's own share, ms.
    """

    calls: int
    seconds: float
    outcomes: dict[str, int]
    lost: int
    whole_p50_ms: float
    whole_p99_ms: float
    whole_max_ms: float
    added_p50_ms: float
    added_p99_ms: float
    late_p99_ms: float


class Run:
    """One open loop over a connected client.

    Args:
        tool: takes the arguments.
        rate: calls per second.
    """

    def __init__(self, client: AsyncClient, tool: str, arguments: Mapping[str, Any], rate: float) -> None:
        self._client = client
        self._tool = tool
        self._arguments = arguments
        self._interval_s = 1 / rate
        self._outcomes: collections.Counter[str] = collections.Counter()
        self._whole, self._added, self._late = array("d"), array("d"), array("d")
        self._left = 0
        self._over = asyncio.Event()

    async def drive(self, seconds: float, timeout_s: float) -> Report:
        """Make the calls, and wait until each has ended, which its timeout sees to."""
        calls = self._left = max(1, round(seconds / self._interval_s))
        clock = time.monotonic
        began = clock()
        for number in range(calls):
            due = began + number * self._interval_s
            # a timer may ring a little early; what it is late is counted
            if (left_s := due - clock()) > 0:
                await asyncio.sleep(left_s)
            self._late.append(clock() - due)
            try:
                future = await self._client.submit(self._tool, self._arguments, timeout_s=timeout_s)
            except CallError as error:
                self._count(error.code)
            else:
                future.add_done_callback(functools.partial(self._ended, due))
        await self._over.wait()
        ended = clock()
        return Report(
            calls=calls,
            seconds=ended - began,
            outcomes=dict(self._outcomes),
            lost=calls - self._outcomes[_OK],
            whole_p50_ms=_ms(self._whole, 0.5),
            whole_p99_ms=_ms(self._whole, 0.99),
            whole_max_ms=_ms(self._whole, 1.0),
            added_p50_ms=_ms(self._added, 0.5),
            added_p99_ms=_ms(self._added, 0.99),
            late_p99_ms=_ms(self._late, 0.99),
        )

    def _ended(self, due: float, done: asyncio.Future[Any]) -> None:
        now = time.monotonic()
        future: AsyncCallFuture = done  # type: ignore[assignment]
        error = future.exception()
        if error is None:
            self._whole.append(now - due)
            spent_us = future.usage.execution_us if future.usage is not None else 0
            self._added.append(now - due - spent_us * 1e-6)
            self._count(_OK)
        else:
            self._count(error.code if isinstance(error, CallError) else type(error).__name__)

    def _count(self, code: str) -> None:
        self._outcomes[code] += 1
        self._left -= 1
        if not self._left:
            self._over.set()


def _ms(seconds: array[float], share: float) -> float:
    return peer.percentile_us(list(seconds), share) / 1000


async def measure(profile: str, tool: str, *, rate: float, seconds: float, timeout_s: float) -> Report:
    """Connect, warm up and run once."""
    arguments = {"blob": os.urandom(128)}
    async with AsyncClient.connect(profile) as client:
        for _ in range(WARM_CALLS):
            await client.call(tool, arguments, timeout_s=timeout_s)
        return await Run(client, tool, arguments, rate).drive(seconds, timeout_s)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rate", type=click.FloatRange(1), default=5000.0, show_default=True, help="Calls a second.")
@click.option(
    "--seconds", type=click.FloatRange(0.05), default=60.0, show_default=True, help="Length of the run."
)
@click.option(
    "--timeout", type=click.FloatRange(0.1), default=30.0, show_default=True, help="Of each call, seconds."
)
@click.option("--profile", help="Whom to call; without it a broker is started for this run.")
@click.option("--tool", default=ours.TOOL, show_default=True, help="Takes bytes named blob.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    *, rate: float, seconds: float, timeout: float, profile: str | None, tool: str, as_json: bool
) -> None:
    """Make calls at fixed instants and report their latencies; exit 1 if any was lost."""
    with contextlib.ExitStack() as stack:
        broker = None
        if profile is None:
            broker = ours.Broker()
            stack.callback(broker.close)
            profile = str(broker.profile)
        report = asyncio.run(measure(profile, tool, rate=rate, seconds=seconds, timeout_s=timeout))
        figures: dict[str, Any] = asdict(report)
        if broker is not None:
            figures["broker_rss_mib"] = kernel.sample(broker.broker_pid).rss_bytes / 2**20
    if as_json:
        click.echo(json.dumps(figures))
    else:
        for name, value in figures.items():
            click.echo(f"{name:>16}  {value:,.3f}" if isinstance(value, float) else f"{name:>16}  {value}")
    sys.exit(1 if report.lost else 0)


if __name__ == "__main__":
    main()
