"""Reading the configuration again, and having the fleet follow it while it serves.

A configuration that cannot be read, or says what it may not, changes nothing: the one before stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mcp_broker import logs
from mcp_broker.errors import ConfigError, InvalidArgument, Unavailable
from mcp_broker.supervisor import events
from mcp_broker.supervisor.changes import Changes, compare
from mcp_broker.supervisor.operations import described, progress
from mcp_broker.wire import node

if TYPE_CHECKING:
    from mcp_broker.config import Config
    from mcp_broker.supervisor.commands import Commands, Look, Progress
    from mcp_broker.supervisor.fleet import Fleet
    from mcp_broker.supervisor.pool import Pool

_log = logging.getLogger("mcp_broker.supervisor")


class Reloading:
    """The configuration in force, and how it becomes another one.

    Args:
        config: the one at the start.
        reread: reads it again, or raises ConfigError.
        tell: sends the broker a message.
        on_event: told of what a signal asked for, whose sender gets no answer.
    """

    def __init__(
        self,
        fleet: Fleet,
        config: Config,
        reread: Callable[[], Config],
        tell: Callable[[node.FromSupervisor], None],
        on_event: Callable[[events.Event], None],
    ) -> None:
        self._fleet = fleet
        self.config = config
        self._reread = reread
        self._tell = tell
        self._on_event = on_event

    def join(self, commands: Commands) -> None:
        """Take over the command."""
        commands.handle("system.reload", self.reload)

    def by_signal(self) -> None:
        """Reload since a signal came; say what came of it to whoever watches."""
        try:
            self._on_event(events.Reloaded(str(self._apply(frozenset()))))
        except ConfigError as error:
            _log.warning("the configuration was not taken: %s", error.message)
            self._on_event(events.ReloadFailed(error.message))

    def reload(self, arguments: dict[str, Any]) -> Look:
        """Read the configuration again and follow it; ``pools`` are replaced even if nothing of theirs is different."""
        also = frozenset(arguments.get("pools", ()))
        for name in also:
            self._fleet.find_pool(name)
        try:
            changes = self._apply(also)
        except ConfigError as error:
            raise InvalidArgument(
                f"the configuration was not taken, and the one before stays in force: {error.message}",
                {**error.details, "hint": "mend it, then give the command again"},
            ) from error
        self._on_event(events.Reloaded(str(changes)))
        touched = {*changes.added, *changes.changed, *changes.resized}

        def look() -> Progress | dict[str, Any]:
            pools = [pool for pool in self._fleet.pools.values() if pool.name in touched]
            gone = [self._fleet.pools[name] for name in changes.removed if name in self._fleet.pools]
            if gone or not all(pool.is_settled for pool in pools):
                return progress([*pools, *gone])
            _complain([pool for pool in pools if pool.setback or pool.state == "failed"])
            return {**changes.plain(), "pools": [described(pool) for pool in pools]}

        return look

    def _apply(self, also: frozenset[str]) -> Changes:
        """Read it again and have everything follow.

        Raises:
            ConfigError: it cannot be taken.
        """
        config = self._reread()
        changes = compare(self.config, config, also)
        self.config = config
        _log.info("the configuration was read again: %s", changes)
        if changes.limits:
            logs.follow(config.observe.log_level, config.observe.log_format)
            self._tell(node.Observe(logs.level()))
            self._tell(node.Limits({name: value for name, value in config.limits if value is not None}))
        self._fleet.follow(config, changes)
        return changes


def _complain(pools: list[Pool]) -> None:
    if not pools:
        return
    reasons = "; ".join(f"pool {pool.name!r} did not come up: {pool.reason}" for pool in pools)
    raise Unavailable(reasons, {"pools": [described(pool) for pool in pools], "hint": "mcp-broker status"})
