"""What an operator's commands answer, with doubles of pools."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from mcp_broker.errors import NotFound
from mcp_broker.supervisor.operations import Operations
from mcp_broker.supervisor.records import Deaths
from mcp_broker.wire import node

if TYPE_CHECKING:
    from pathlib import Path


class Fleet:
    """Pools by name, none of whose workers is alive."""

    def __init__(self, *names: str) -> None:
        shown = {"state": "ready", "size": 1, "ready": 1, "reason": "", "closed": "", "is_settled": True}
        self.pools = {name: SimpleNamespace(name=name, close=print, **shown) for name in names}

    def find(self, _worker_id: str) -> None:
        return None

    def find_pool(self, name: str) -> Any:
        if name not in self.pools:
            raise NotFound(f"there is no pool {name!r}")
        return self.pools[name]


@pytest.fixture
def deaths(tmp_path: Path) -> Deaths:
    deaths = Deaths(tmp_path)
    deaths.add(node.Certificate(worker_id="t-1", pool="t", pid=1, cause="retired", kind="operator"))
    return deaths


def drained(deaths: Deaths, target: str, *pools: str) -> Any:
    """Return what is answered to a drain, where there are these pools."""
    return Operations(cast("Any", Fleet(*pools)), deaths).drain({"target": target})()


def test_a_worker_that_was_drained_before_is_drained(deaths: Deaths) -> None:
    answer = drained(deaths, "t-1", "t")
    assert answer["worker"] == "t-1"
    assert [pool["pool"] for pool in answer["pools"]] == ["t"]
    assert drained(deaths, "t-1", "other") == {"pools": [], "worker": "t-1"}, "its pool is gone, too"


def test_a_worker_that_there_never_was_is_not_found(deaths: Deaths) -> None:
    with pytest.raises(NotFound):
        drained(deaths, "t-2", "t")


def test_a_pool_comes_before_a_dead_worker_of_its_name(deaths: Deaths) -> None:
    answer = drained(deaths, "t-1", "t-1")
    assert (answer["worker"], [pool["pool"] for pool in answer["pools"]]) == (None, ["t-1"])
