"""Which death certificates are kept."""

from __future__ import annotations

from collections import deque

from mcp_broker.core.death_log import keep
from mcp_broker.wire import node


def death(number: int, kind: node.DeathKind) -> node.Certificate:
    return node.Certificate(worker_id=f"t-{number}", pool="t", pid=number, cause="", kind=kind)


def test_many_workers_that_were_to_go_do_not_push_out_a_death() -> None:
    deaths: deque[node.Certificate] = deque(maxlen=8)
    keep(deaths, death(0, "signal"))
    for number in range(1, 100):
        keep(deaths, death(number, "operator"))
    assert [one.pid for one in deaths] == [99, 98, 97, 96, 95, 94, 93, 0]


def test_of_deaths_the_newest_are_kept_and_some_of_the_others() -> None:
    deaths: deque[node.Certificate] = deque(maxlen=8)
    for number in range(100):
        keep(deaths, death(number, "operator" if number < 4 else "signal"))
    assert [one.pid for one in deaths] == list(range(99, 91, -1))
