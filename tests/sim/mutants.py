"""Planted bugs: each is what a careless change could do to the machines, and must not go unseen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from mcp_broker.core import client_session, dispatcher, registry

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from mcp_broker.core.worker import Worker
    from mcp_broker.wire.messages import Outcome

#: the bug spares so many calls for each that it hits
_RARE = 40


def run_again_whatever_the_tool(patch: pytest.MonkeyPatch) -> None:
    """Dispatch a dead worker's calls again without asking whether the tool is idempotent."""
    original = dispatcher.Dispatcher.forget

    def forget(self: dispatcher.Dispatcher, worker: Worker, *others: Any, **named: Any) -> None:
        kept = [(call.tool, call.tool.definition) for call in worker.held.values()]
        for tool, definition in kept:
            tool.definition = msgspec.structs.replace(definition, idempotent=True)
        try:
            original(self, worker, *others, **named)
        finally:
            for tool, definition in reversed(kept):
                tool.definition = definition

    patch.setattr(dispatcher.Dispatcher, "forget", forget)


def drop_an_outcome(patch: pytest.MonkeyPatch) -> None:
    """Forget to tell a client now and then."""
    original = client_session.ClientSession.deliver
    count = 0

    def deliver(self: client_session.ClientSession, outcome: Outcome, *others: Any, **named: Any) -> None:
        nonlocal count
        count += 1
        if count % _RARE:
            original(self, outcome, *others, **named)
        else:
            self.live.pop(outcome.call_id, None)

    patch.setattr(client_session.ClientSession, "deliver", deliver)


def leak_credit(patch: pytest.MonkeyPatch) -> None:
    """Go on counting a call that its worker has finished, now and then."""
    original = dispatcher.Dispatcher.outcomes
    count = 0

    def outcomes(
        self: dispatcher.Dispatcher, worker: Worker, outcomes: tuple[Outcome, ...], *others: Any, **named: Any
    ) -> None:
        nonlocal count
        held = dict(worker.held)
        original(self, worker, outcomes, *others, **named)
        for outcome in outcomes:
            count += 1
            if not count % _RARE and outcome.call_id in held:
                worker.held[outcome.call_id] = held[outcome.call_id]

    patch.setattr(dispatcher.Dispatcher, "outcomes", outcomes)


def let_waiting_calls_go(patch: pytest.MonkeyPatch) -> None:
    """Let calls of a tool start a little while it is paused."""
    original = registry.Tool.fence

    def fence(self: registry.Tool) -> None:
        is_held, self.is_held = self.is_held, False
        original(self)
        self.is_held = is_held

    patch.setattr(registry.Tool, "fence", fence)


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a re-dispatch without the idempotent check": run_again_whatever_the_tool,
    "a dropped outcome": drop_an_outcome,
    "a credit leak": leak_credit,
    "calls of a paused tool that go on": let_waiting_calls_go,
}
