"""What is different in a configuration that was read again."""

from __future__ import annotations

import pytest

from mcp_broker import config
from mcp_broker.supervisor.changes import Changes, compare

BASE = """
[pools.text]
module = "text"
[pools.sql]
module = "sql"
"""


def changes(text: str, also: frozenset[str] = frozenset()) -> Changes:
    return compare(config.parse(BASE), config.parse(text), also)


def test_pools_come_go_and_stay() -> None:
    found = changes('[pools.sql]\nmodule = "sql"\n[pools.new]\nmodule = "new"\n')
    assert (found.added, found.removed, found.unchanged) == (("new",), ("text",), ("sql",))
    assert str(found) == "new new; leaving text"


@pytest.mark.parametrize("row", ["options = {a = 1}", "concurrency = 2", 'env = {A = "b"}', 'path = ["/x"]'])
def test_what_a_worker_is_made_by_replaces_the_workers(row: str) -> None:
    found = changes(BASE + row)
    assert (found.changed, found.resized, found.unchanged) == (("sql",), (), ("text",))


@pytest.mark.parametrize("row", ["min = 3", "max = 4", "spare = 1", "rate_per_s = 5", "shrink_after_s = 9"])
def test_sizes_and_rates_replace_nobody(row: str) -> None:
    found = changes(BASE + row)
    assert (found.changed, found.resized, found.unchanged) == ((), ("sql",), ("text",))


def test_a_pool_may_be_replaced_though_nothing_is_different() -> None:
    assert changes(BASE, also=frozenset({"text"})).changed == ("text",)


def test_limits_count_at_once_and_addresses_at_the_next_start() -> None:
    found = changes(
        BASE + "[limits]\ndrain_s = 3\n[observe]\nlog_level = 'debug'\n[broker]\nclient_port = 1234\n"
        "[ports]\nmax = 18050\n"
    )
    assert found.limits == ("limits.drain_s", "observe.log_level")
    assert found.at_start == ("broker.client_port", "ports.max")
    assert (
        str(found)
        == "changed limits.drain_s, observe.log_level; only after a restart broker.client_port, ports.max"
    )


def test_the_same_configuration_asks_for_nothing() -> None:
    assert str(changes(BASE)) == "nothing is different"
