"""What an operator may do with the pools: the handlers of the commands, and how each is looked at.

Each says what is wanted, not what to do: given again, it changes nothing and waits for the same.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from mcp_broker.core.children import State
from mcp_broker.errors import NotFound, Unavailable
from mcp_broker.supervisor.commands import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcp_broker.supervisor.commands import Commands, Look
    from mcp_broker.supervisor.fleet import Fleet
    from mcp_broker.supervisor.pool import Pool


class Operations:
    """The commands that concern pools and their workers."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def join(self, commands: Commands) -> None:
        """Take over the commands."""
        commands.handle("system.pools.scale", self.scale)

    def scale(self, arguments: dict[str, Any]) -> Look:
        """Keep so many workers of a pool, until told otherwise or the configuration says so anew."""
        pool, size = self._pool(arguments["pool"]), arguments.get("workers")
        if size == 0:
            pool.close(f"an operator has scaled it to 0; `mcp-broker scale {pool.name} auto` brings it back")
        else:
            pool.scale(size)

        def look() -> Progress | dict[str, Any]:
            if not pool.is_settled:
                return _progress([pool])
            if pool.state == "failed":
                raise Unavailable(
                    f"pool {pool.name!r} did not come up: {pool.reason}",
                    {"pool": pool.name, "reason": pool.reason},
                )
            return _described(pool)

        return look

    def _pool(self, name: str) -> Pool:
        pool = self._fleet.pools.get(name)
        if pool is None:
            near = difflib.get_close_matches(name, self._fleet.pools, n=2)
            meant = (
                f"did you mean {' or '.join(near)}" if near else f"there are {', '.join(self._fleet.pools)}"
            )
            raise NotFound(f"there is no pool {name!r}; {meant}", {"pool": name, "did_you_mean": near})
        return pool


def _described(pool: Pool) -> dict[str, Any]:
    return {
        "pool": pool.name,
        "state": pool.state,
        "workers": pool.size,
        "ready": pool.ready,
        "reason": pool.reason,
    }


def _progress(pools: Sequence[Pool]) -> Progress:
    """Say how far some pools are from what is wanted of them."""
    wanted = sum(pool.size for pool in pools)
    current = sum(
        slot.child.state is State.RUNNING and slot.edition == pool.edition
        for pool in pools
        for slot in pool.members
    )
    leaving = sum(len(pool.leaving) for pool in pools)
    parts = [f"{current} of {wanted} workers ready"] if current < wanted else []
    if leaving:
        parts.append(f"{leaving} finishing {'its' if leaving == 1 else 'their'} calls")
    total = wanted + leaving
    return Progress(current / total if total else None, ", ".join(parts) or "almost done")
