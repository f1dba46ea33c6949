"""What operators want of the supervisor, by the broker: each command is taken, carried out over many turns, answered once.

To add one: a row of ``core/own_tools.TOOLS``, and here ``commands.handle(name, handler)``. A handler begins the work and
returns how to look at it; it refuses by raising a :class:`~mcp_broker.errors.CallError`. Nothing here waits: what is under
way is looked at once a turn.

Every command leaves two lines in the log, with the principal's name: that it was taken, and how it ended.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mcp_broker import limits
from mcp_broker.errors import CallError, Unavailable
from mcp_broker.wire import node

_log = logging.getLogger("mcp_broker.supervisor")


@dataclass(frozen=True, slots=True)
class Progress:
    """A command is under way.

    Args:
        fraction: how far, 0.0 to 1.0; None: nobody can tell.
        text: what it waits for, for people.
    """

    fraction: float | None
    text: str


#: what a look at a command shows: how far it is, or what came of it
Look = Callable[[], Progress | dict[str, Any]]
#: takes arguments that fit the tool's schema, and begins
Handler = Callable[[dict[str, Any]], Look]


@dataclass(slots=True)
class _Task:
    command: node.Command
    look: Look
    until: float
    told: Progress | None = None
    told_at: float = 0.0


class Commands:
    """The commands of one supervisor.

    Args:
        send: tells the broker.
        is_leaving: tells whether the supervisor was told to stop.
    """

    def __init__(
        self, send: Callable[[node.FromSupervisor], None], is_leaving: Callable[[], bool] = lambda: False
    ) -> None:
        self._send = send
        self._is_leaving = is_leaving
        self._handlers: dict[str, Handler] = {}
        self._tasks: list[_Task] = []

    def handle(self, name: str, handler: Handler) -> None:
        """Have a tool's calls carried out by this handler."""
        self._handlers[name] = handler

    def take(self, command: node.Command, now: float) -> None:
        """Begin what is wanted, or refuse it; the end of the turn looks at it first."""
        arguments = json.dumps(command.arguments, ensure_ascii=True, default=str)
        _log.info("command %s %s by %s", command.name, arguments, json.dumps(command.principal))
        try:
            handler = self._handlers.get(command.name)
            if handler is None:
                raise Unavailable(f"this supervisor knows no command {command.name}")
            if self._is_leaving():
                raise Unavailable(
                    "the supervisor was told to stop, and carries out no commands; start it again first"
                )
            look = handler(command.arguments)
        except CallError as error:
            self._answer(command, error)
            return
        self._tasks.append(_Task(command, look, now + command.timeout_ms * 0.001))

    def forget(self) -> None:
        """The broker is gone, and with it those who wait for answers; what is under way goes on."""
        self._tasks.clear()

    def deadline(self) -> float | None:
        """Return when :meth:`settle` has something to say at the latest."""
        return min((task.told_at + limits.COMMAND_WORD_S for task in self._tasks), default=None)

    def settle(self, now: float) -> None:
        """Look at what is under way: answer what has ended, and say of the rest how far it is."""
        for task in list(self._tasks):
            try:
                seen = task.look()
            except CallError as error:
                self._tasks.remove(task)
                self._answer(task.command, error)
                continue
            if isinstance(seen, dict):
                self._tasks.remove(task)
                self._answer(task.command, seen)
            elif now >= task.until:
                # its caller has heard that by now
                self._tasks.remove(task)
                _log.info("command %s goes on, and nobody waits for it any more", task.command.name)
            elif seen != task.told or now >= task.told_at + limits.COMMAND_WORD_S:
                task.told, task.told_at = seen, now
                self._send(node.Progressed(task.command.id, seen.fraction, seen.text))

    def _answer(self, command: node.Command, end: dict[str, Any] | CallError) -> None:
        if isinstance(end, CallError):
            _log.info("command %s was not carried out: %s: %s", command.name, end.code, end.message)
            self._send(node.Commanded(command.id, end.code, {}, end.message, dict(end.details)))
        else:
            _log.info("command %s was carried out", command.name)
            self._send(node.Commanded(command.id, "OK", end))
