"""Which worker keys may finish a handshake: the table that the supervisor sends and the ZAP thread reads."""

from __future__ import annotations

from typing import Final

from mcp_broker.auth import zap
from mcp_broker.ids import UserId
from mcp_broker.wire import node

#: ZAP domain of the workers' common address
WORKER_DOMAIN: Final = "workers"


class Admission:
    """Written by the loop, read by the ZAP thread; single operations on sets and dicts are atomic under the GIL."""

    def __init__(self) -> None:
        self._keys: set[UserId] = set()
        self._by_worker: dict[str, UserId] = {}
        self._complete = False
        #: ZAP domain -> its rule: the common address's, and one for each worker that has an address of its own
        self.domains: dict[str, zap.Rule] = {
            WORKER_DOMAIN: zap.workers_rule(self._keys, lambda: self._complete)
        }

    def take(self, message: node.FromSupervisor) -> None:
        """Keep the table as the supervisor says; other messages change nothing here."""
        if isinstance(message, node.Admit):
            for admitted in message.workers:
                key = UserId(admitted.thumbprint)
                self._by_worker[admitted.worker_id] = key
                self._keys.add(key)
            self._complete = True
        elif isinstance(message, node.Died):
            worker_id = message.certificate.worker_id
            self.domains.pop(own_domain(worker_id), None)
            key_of_dead = self._by_worker.pop(worker_id, None)
            if key_of_dead is not None:
                self._keys.discard(key_of_dead)

    def own_door(self, worker_id: str, thumbprint: str) -> str:
        """Let a worker in by an address of its own, and there alone; return that address's ZAP domain."""
        key = UserId(thumbprint)
        self._keys.discard(key)
        domain = own_domain(worker_id)
        self.domains[domain] = lambda user_id: zap.Verdict.ADMIT if user_id == key else zap.Verdict.REFUSE
        return domain


def own_domain(worker_id: str) -> str:
    """Return the ZAP domain of the address that belongs to one worker."""
    return f"{WORKER_DOMAIN}/{worker_id}"
