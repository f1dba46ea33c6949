"""Which worker keys may finish a handshake: the table that the supervisor sends and the ZAP thread reads."""

from __future__ import annotations

from mcp_broker.auth import zap
from mcp_broker.ids import UserId
from mcp_broker.wire import node


class Admission:
    """Written by the loop, read by the ZAP thread; a set's single operations are atomic under the GIL."""

    def __init__(self) -> None:
        self._keys: set[UserId] = set()
        self._by_worker: dict[str, UserId] = {}
        self._complete = False
        self.rule: zap.Rule = zap.workers_rule(self._keys, lambda: self._complete)

    def take(self, message: node.FromSupervisor) -> None:
        """Keep the table as the supervisor says; other messages change nothing here."""
        if isinstance(message, node.Admit):
            for admitted in message.workers:
                key = UserId(admitted.thumbprint)
                self._by_worker[admitted.worker_id] = key
                self._keys.add(key)
            self._complete = True
        elif isinstance(message, node.Died):
            key_of_dead = self._by_worker.pop(message.certificate.worker_id, None)
            if key_of_dead is not None:
                self._keys.discard(key_of_dead)
