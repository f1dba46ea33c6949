"""What an operator may do with the pools: the handlers of the commands, and how each is looked at.

Each says what is wanted, not what to do: given again, it changes nothing and waits for the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcp_broker.core.children import State
from mcp_broker.errors import Unavailable
from mcp_broker.supervisor.commands import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcp_broker.supervisor.commands import Commands, Look
    from mcp_broker.supervisor.fleet import Fleet
    from mcp_broker.supervisor.pool import Pool
    from mcp_broker.supervisor.records import Deaths


class Operations:
    """The commands that concern pools and their workers.

    Args:
        deaths: by which a worker that is gone is told from one that there never was.
    """

    def __init__(self, fleet: Fleet, deaths: Deaths) -> None:
        self._fleet = fleet
        self._deaths = deaths

    def join(self, commands: Commands) -> None:
        """Take over the commands."""
        commands.handle("system.pools.scale", self.scale)
        commands.handle("system.drain", self.drain)

    def scale(self, arguments: dict[str, Any]) -> Look:
        """Keep so many workers of a pool, until told otherwise or the configuration says so anew."""
        pool, size = self._fleet.find_pool(arguments["pool"]), arguments.get("workers")
        if size == 0:
            _close(pool, "an operator has scaled it to 0")
        else:
            pool.scale(size)

        def look() -> Progress | dict[str, Any]:
            if not pool.is_settled:
                return progress([pool])
            if pool.state == "failed":
                raise Unavailable(
                    f"pool {pool.name!r} did not come up: {pool.reason}",
                    {"pool": pool.name, "reason": pool.reason},
                )
            return described(pool)

        return look

    def drain(self, arguments: dict[str, Any]) -> Look:
        """Let a pool, or all, finish what they have and take no more; or have a worker finish and be replaced."""
        target = arguments.get("target")
        slot = self._fleet.find(target) if target is not None else None
        if slot is not None:
            return self._drain_worker(str(target))
        gone = next((death for death in self._deaths.recent if death.worker_id == target), None)
        if gone is not None and target not in self._fleet.pools:
            # a broker that died may have sent it before, when the worker was still there
            return lambda: self._drained(gone.worker_id, gone.pool)
        pools = list(self._fleet.pools.values()) if target is None else [self._fleet.find_pool(target)]
        for pool in pools:
            _close(pool, "an operator has drained it")

        def look() -> Progress | dict[str, Any]:
            if not all(pool.is_settled for pool in pools):
                return progress(pools)
            return {"pools": [described(pool) for pool in pools], "worker": None}

        return look

    def _drain_worker(self, worker_id: str) -> Look:
        pool = self._fleet.pool_of(worker_id)
        slot = pool.find(worker_id)
        if slot is not None and slot in pool.members:
            pool.replace(slot, "an operator has drained it")

        def look() -> Progress | dict[str, Any]:
            if pool.find(worker_id) is None:
                return self._drained(worker_id, pool.name)
            if pool.setback:
                raise Unavailable(
                    f"worker {worker_id} stays, since no other one could start: {pool.setback}",
                    {"pool": pool.name, "reason": pool.setback},
                )
            return Progress(None, f"{worker_id} is replaced, and finishes its calls")

        return look

    def _drained(self, worker_id: str, pool: str) -> dict[str, Any]:
        """Return what is answered when a worker has gone; its pool may have gone with it."""
        pools = [self._fleet.pools[pool]] if pool in self._fleet.pools else []
        return {"pools": [described(pool) for pool in pools], "worker": worker_id}


def _close(pool: Pool, why: str) -> None:
    if not pool.closed:
        pool.close(f"{why}; `mcp-broker scale {pool.name} auto` brings it back")


def described(pool: Pool) -> dict[str, Any]:
    """Return how a pool is, for an answer."""
    return {
        "pool": pool.name,
        "state": pool.state,
        "workers": pool.size,
        "ready": pool.ready,
        "reason": pool.reason,
    }


def progress(pools: Sequence[Pool]) -> Progress:
    """Say how far some pools are from what is wanted of them."""
    open_ = [pool for pool in pools if not pool.closed]
    wanted = sum(pool.size for pool in open_)
    current = sum(
        slot.child.state is State.RUNNING and slot.edition == pool.edition
        for pool in open_
        for slot in pool.members
    )
    leaving = sum(len(pool.leaving) + (len(pool.members) if pool.closed else 0) for pool in pools)
    parts = [f"{current} of {wanted} workers ready"] if current < wanted else []
    if leaving:
        parts.append(f"{leaving} finishing {'its' if leaving == 1 else 'their'} calls")
    total = wanted + leaving
    return Progress(current / total if total else None, ", ".join(parts) or "almost done")
