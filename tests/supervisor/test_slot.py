"""What a slot remembers of the orders that it was given, without a process."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker import config
from mcp_broker.core import children
from mcp_broker.core.restart import Policy, Restarts
from mcp_broker.supervisor.certificates import Interrupted
from mcp_broker.supervisor.slot import Slot, Times
from mcp_broker.wire import node

if TYPE_CHECKING:
    from mcp_broker.wire.node import Stage


@pytest.mark.parametrize(
    ("stages", "counts"),
    [(["raise", "raise"], 1), (["raise", "term", "raise"], 1), (["term", "term"], 1), (["kill", "raise"], 0)],
)
def test_a_worker_ends_for_the_last_order_but_only_for_what_can_end_it(
    stages: list[Stage], counts: int
) -> None:
    ground: Any = SimpleNamespace(strayed=lambda: None)
    table = config.PoolTable(module="any", concurrency=8)
    slot = Slot(
        ground,
        "mine",
        table,
        Restarts(Policy(intensity=0)),
        Times(start_s=1.0, retire_s=1.0),
        edition=1,
        is_spare=False,
        on_death=lambda _: None,
    )
    slot.child.state = children.State.RUNNING
    sent: list[int] = []
    slot.life = SimpleNamespace(  # type: ignore[assignment]
        marks=SimpleNamespace(started_seq=len(stages), interrupt_seq=0),
        process=SimpleNamespace(signal=sent.append, kill=lambda: sent.append(signal.SIGKILL)),
        interrupted=None,
        ask_stack=lambda: None,
    )
    for seq, stage in enumerate(stages, 1):
        slot.interrupt(node.Interrupt("mine-1", seq, stage, "cancel"))
    assert slot.life is not None
    assert slot.life.interrupted == Interrupted(counts + 1, stages[counts], "cancel")
    assert len(sent) == len(stages), "each is sent all the same"
