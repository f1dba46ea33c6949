"""Who hears how calls of tools end, as those who move calls see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mcp_broker.core.calls import Call
    from mcp_broker.core.registry import Tool
    from mcp_broker.wire.messages import Outcome
    from mcp_broker.wire.node import Certificate


class HealthObserver(Protocol):
    """Follows how tools fare: :class:`mcp_broker.core.tool_health.ToolHealth`."""

    @property
    def watched(self) -> dict[Tool, None]:
        """Tools whose results count; mostly empty."""
        ...

    def succeeded(self, call: Call) -> None:
        """A call of a watched tool has a result."""

    def runs_again(self, call: Call, outcome: Outcome) -> bool:
        """Tell whether a call whose outcome is an error runs again."""
        ...

    def ends(self, call: Call) -> bool:
        """End a call that would wait for a tool that takes none any more; tell whether it did."""
        ...

    def worker_died(self, certificate: Certificate, started: list[Call]) -> None:
        """A worker died and took these calls along."""
