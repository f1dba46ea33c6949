"""Rounds in adjacent pairs, and what they add up to.

The machine is shared and noisy: only what ran next to each other is compared, a pair's ratio is one observation,
and the median with its quartiles is the answer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from bench import kernel

MIB: Final = 1024 * 1024
#: share of stolen CPU beyond which a round says more about the neighbours than about us
STOLEN_MAX: Final = 0.05
#: part of a round that is spent before the clocks start, so that both sides are warm
WARM_UP: Final = 0.2


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: calls in flight and the bytes of each way's payload."""

    name: str
    in_flight: int
    size: int


CASES: Final = (
    Case("64 in flight, 128 B", 64, 128),
    Case("1 in flight, 128 B", 1, 128),
    Case("8 in flight, 1 MiB", 8, MIB),
)


@dataclass(frozen=True, slots=True)
class Side:
    """One of the things compared: how to run a case, and the pids of its three processes."""

    name: str
    run: Callable[..., dict[str, Any]]
    broker_pid: int
    client_pid: int
    worker_pid: int


@dataclass(frozen=True, slots=True)
class Round:
    """One side, one case, once."""

    pair: int
    case: str
    side: str
    calls: int
    seconds: float
    calls_per_s: float
    mib_per_s: float
    p50_us: float | None
    p99_us: float | None
    broker_cpu_us_per_call: float
    client_cpu_us_per_call: float
    worker_cpu_us_per_call: float
    broker_rss_mib: float
    stolen: float


def measure(side: Side, case: Case, pair: int, seconds: float) -> Round:
    """Run one round."""
    side.run(seconds=seconds * WARM_UP, in_flight=case.in_flight, size=case.size)
    pids = (side.broker_pid, side.client_pid, side.worker_pid)
    machine, before = kernel.machine(), [kernel.sample(pid) for pid in pids]
    result = side.run(seconds=seconds, in_flight=case.in_flight, size=case.size)
    after, stolen = [kernel.sample(pid) for pid in pids], kernel.machine().stolen_since(machine)
    calls, elapsed = int(result["calls"]), float(result["seconds"])
    assert calls > 0, f"{side.name} made no call in {elapsed} s"
    broker, client, worker = ((b.cpu_s - a.cpu_s) / calls * 1e6 for a, b in zip(before, after, strict=True))
    # a latency under pipelining is the window's, not the path's
    alone = case.in_flight == 1
    return Round(
        pair=pair,
        case=case.name,
        side=side.name,
        calls=calls,
        seconds=elapsed,
        calls_per_s=calls / elapsed,
        mib_per_s=calls * case.size / MIB / elapsed,
        p50_us=result.get("p50_us") if alone else None,
        p99_us=result.get("p99_us") if alone else None,
        broker_cpu_us_per_call=broker,
        client_cpu_us_per_call=client,
        worker_cpu_us_per_call=worker,
        broker_rss_mib=after[0].rss_bytes / MIB,
        stolen=stolen,
    )


def run(sides: Sequence[Side], pairs: int, seconds: float) -> Iterator[Round]:
    """Run every case on every side, side by side, ``pairs`` times; who goes first alternates."""
    for pair in range(pairs):
        for case in CASES:
            for side in sides if pair % 2 == 0 else tuple(reversed(sides)):
                yield measure(side, case, pair, seconds)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Return the spread of some values, or None of none."""
        ordered = sorted(values)
        if not ordered:
            return None
        if len(ordered) == 1:
            return cls(ordered[0], ordered[0], ordered[0])
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(median, low, high)


#: what is compared: a column's title and the field of a Round
FIGURES: Final = (
    ("calls/s", "calls_per_s"),
    ("MiB/s", "mib_per_s"),
    ("p50 µs", "p50_us"),
    ("p99 µs", "p99_us"),
    ("CPU µs/call", "broker_cpu_us_per_call"),
    ("… client's", "client_cpu_us_per_call"),
    ("… worker's", "worker_cpu_us_per_call"),
    ("RSS MiB", "broker_rss_mib"),
)


@dataclass(frozen=True, slots=True)
class Summary:
    """One figure of one side in one case: its own spread, and those of its ratios to the references'."""

    case: str
    side: str
    figure: str
    value: Spread
    #: name of a reference -> the spread of the ratio, pair by pair
    ratios: dict[str, Spread]
    pairs: int


def summarise(rounds: Sequence[Round], references: Sequence[str]) -> list[Summary]:
    """Add rounds up; those with stolen CPU are left out, and so is a pair whose reference was."""
    kept = {(one.case, one.side, one.pair): one for one in rounds if one.stolen <= STOLEN_MAX}
    result = []
    ran = dict.fromkeys(one.side for one in rounds)
    sides = [*references, *(side for side in ran if side not in references)]
    for case in CASES:
        for side in sides:
            mine = [one for (name, which, _), one in kept.items() if (name, which) == (case.name, side)]
            for title, field in FIGURES:
                value = Spread.of(
                    float(getattr(one, field)) for one in mine if getattr(one, field) is not None
                )
                if value is None:
                    continue
                ratios = {}
                for reference in references if side not in references else ():
                    bases = ((one, kept.get((case.name, reference, one.pair))) for one in mine)
                    spread = Spread.of(
                        getattr(one, field) / getattr(base, field)
                        for one, base in bases
                        if base is not None and getattr(base, field)
                    )
                    if spread is not None:
                        ratios[reference] = spread
                result.append(Summary(case.name, side, title, value, ratios, len(mine)))
    return result


def as_plain(items: Iterable[Round | Summary]) -> list[dict[str, Any]]:
    """Return rounds or summaries as dicts, for JSON."""
    return [asdict(item) for item in items]
