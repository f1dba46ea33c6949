"""Idempotency keys: one execution for all calls with the same key, and its outcome for those that come later.

A key belongs to a principal and a tool. Calls with the key of one that is under way *follow* it: its outcome is theirs.
When it has ended, its outcome is kept and answers later calls, for a time and within bounds. An outcome that tells
nothing of the tool is not kept: where its caller cancelled or its time was over, the first follower that somebody waits
for runs in its place; where nobody can run it, that goes for its followers too. The outcome of a worker's death is kept,
unless the tool is idempotent: whether the tool did its work is unknown, and the key promises that it is not done twice.

All in memory: a broker that is restarted has forgotten the keys. Source: docs/protocol.md, "Idempotency keys".
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.core.calls import Call, CallState, fault
from mcp_broker.core.shelf import Shelf
from mcp_broker.wire import messages
from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from mcp_broker.core.outbox import Body
    from mcp_broker.core.routing import Routing

_ENDED = CallState.ENDED

#: outcomes that say nothing of what the tool did
_NOT_KEPT: Final = frozenset(
    {"CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "BROKER_LOST", "OVERLOADED", "RATE_LIMITED"}
)
#: outcomes after which an idempotent tool may run again
_LOST: Final = frozenset({"WORKER_LOST", "POISONED"})


class Record(Slim):
    """One key: whose call answers for it, who follows, or the outcome."""

    key: tuple[str, str, str]
    #: of the arguments' bytes
    digest: bytes
    #: the call that runs for this key; None when it has ended
    call: Call | None
    followers: list[Call]
    outcome: messages.Outcome | None = None
    body: Body | None = None


class Idempotency:
    """All keys that are under way or remembered."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._ledger = routing.ledger
        self._dispatcher = routing.dispatcher
        #: (principal, tool, key) -> record
        self.records: dict[tuple[str, str, str], Record] = {}
        #: those with an outcome
        self._kept: Shelf[tuple[str, str, str], Record] = Shelf(
            routing.timers, limits.IDEMPOTENCY_TTL_S, self._forget
        )

    def claims(self, call: Call, key: str, now: float) -> bool:
        """Take an accepted call with a key; False: it is the first one, and runs."""
        self._routing.now = now
        tool = call.tool
        if tool.is_streaming:
            text = "a streaming tool takes no idempotency_key: its parts are not kept"
            self._ledger.finish(call, fault(call.call_id, "INVALID_ARGUMENT", text, {"tool": tool.name}))
            return True
        whole = (call.session.grant.caller.principal, tool.name, key)
        digest = hashlib.sha256(call.packed_arguments()).digest()
        record = self.records.get(whole)
        if record is None:
            if len(self.records) >= limits.IDEMPOTENCY_KEYS_MAX and not self._kept:
                text = f"calls with {limits.IDEMPOTENCY_KEYS_MAX} idempotency keys are under way already"
                details = {
                    "limit": "idempotency_keys",
                    "maximum": limits.IDEMPOTENCY_KEYS_MAX,
                    "retry_after_s": limits.RETRY_AFTER_S,
                }
                self._ledger.finish(call, fault(call.call_id, "OVERLOADED", text, details))
                return True
            call.record = self.records[whole] = Record(whole, digest, call, [])
            self._trim()
            return False
        if record.digest != digest:
            text = f"the idempotency_key {key!r} was used for a call of {tool.name} with other arguments"
            self._ledger.finish(call, fault(call.call_id, "INVALID_ARGUMENT", text, {"idempotency_key": key}))
        elif record.outcome is not None:
            self._ledger.finish(call, _again(record.outcome, call), record.body)
        else:
            call.record = record
            record.followers.append(call)
        return True

    def finished(self, call: Call, outcome: messages.Outcome, body: Body | None) -> None:
        """A call with a record has ended; called by the ledger."""
        record: Record = call.record
        call.record = None
        if record.call is not call:
            # a follower that waited no longer
            record.followers.remove(call)
            return
        record.call = None
        keeps = outcome.code not in _NOT_KEPT
        if outcome.code in _LOST and call.tool.definition.idempotent:
            keeps = False
        if keeps:
            self._keep(record, outcome, body)
            followers, record.followers = record.followers, []
            for follower in followers:
                follower.record = None
                self._ledger.finish(follower, _again(outcome, follower), body)
        elif outcome.code == "OVERLOADED":
            # there is no room for it to wait, and none for those who follow it
            del self.records[record.key]
            for follower in record.followers:
                follower.record = None
                self._ledger.refuse(follower, _again(outcome, follower))
        elif record.followers:
            successor = record.call = record.followers.pop(0)
            pool = successor.tool.pool
            if pool is not None:
                self._dispatcher.submit([successor], pool, self._routing.now)
        else:
            del self.records[record.key]

    def _keep(self, record: Record, outcome: messages.Outcome, body: Body | None) -> None:
        record.outcome, record.body = outcome, body
        size = limits.RECORD_BYTES + sum(
            len(part) for part in (outcome.body, body, outcome.fault and outcome.fault.details) if part
        )
        self._kept.put(record.key, record, record.key[0], size, self._routing.now)
        self._trim()

    def _trim(self) -> None:
        """Let go of outcomes until there is room; calls that are under way are never forgotten."""
        under_way = len(self.records) - len(self._kept)
        self._kept.trim(max(0, limits.IDEMPOTENCY_KEYS_MAX - under_way), limits.IDEMPOTENCY_BYTES_MAX)

    def _forget(self, record: Record) -> None:
        del self.records[record.key]


def _again(outcome: messages.Outcome, call: Call) -> messages.Outcome:
    """Return the same outcome for another call."""
    fields: list[Any] = [outcome.code, outcome.body, outcome.usage, outcome.fault, outcome.parts]
    return messages.Outcome(call.call_id, *fields)
