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
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.core import failures
from mcp_broker.core.calls import Call, fault
from mcp_broker.core.client_session import ClientState
from mcp_broker.core.shelf import Shelf
from mcp_broker.wire import messages
from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from mcp_broker.core.outbox import Body
    from mcp_broker.core.registry import Tool
    from mcp_broker.core.routing import Routing

#: outcomes that say nothing of what the tool did
_NOT_KEPT: Final = frozenset(
    {"CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "BROKER_LOST", "OVERLOADED", "RATE_LIMITED"}
)
#: those of them that would be any follower's too: there is no room for it, or nobody to run it
_ALIKE: Final = frozenset({"OVERLOADED", "UNAVAILABLE"})
#: outcomes after which an idempotent tool may run again
_LOST: Final = frozenset({"WORKER_LOST", "POISONED"})


class Record(Slim):
    """One key: whose call answers for it, who follows, or the outcome."""

    key: tuple[str, str, str]
    #: of the arguments' bytes
    digest: bytes
    #: the call that runs for this key; None when it has ended
    call: Call | None
    #: by id, in their order
    followers: OrderedDict[bytes, Call]
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
            call.record = self.records[whole] = Record(whole, digest, call, OrderedDict())
            self._trim()
            return False
        if self._routing.reconciliation.is_known(call):
            # it runs, since before this broker knew of its key
            self._take_over(record, call, digest)
            return False
        if record.digest != digest:
            text = f"the idempotency_key {key!r} was used for a call of {tool.name} with other arguments"
            self._ledger.finish(call, fault(call.call_id, "INVALID_ARGUMENT", text, {"idempotency_key": key}))
        elif record.outcome is not None:
            self._ledger.finish(call, _again(record.outcome, call), record.body)
        else:
            self._follow(record, call)
        return True

    def _take_over(self, record: Record, call: Call, digest: bytes) -> None:
        """Let a call that runs already stand for its key, if the one that stands for it has yet to begin."""
        first = record.call
        if first is None or record.digest != digest or not self._routing.reconciliation.undoubt(first):
            return
        first.record = None
        call.record, record.call = record, call
        self._follow(record, first)

    def _follow(self, record: Record, call: Call) -> None:
        """Let a call wait for the outcome of another one, if there is room to wait; its arguments are the other one's."""
        call.arguments = call.body = None
        pool = call.tool.pool
        if pool is not None and self._dispatcher.may_wait(call, pool):
            call.record = record
            record.followers[call.call_id] = call
            pool.count_in(call)

    def finished(self, call: Call, outcome: messages.Outcome, body: Body | None) -> None:
        """A call with a record has ended; called by the ledger."""
        record: Record = call.record
        call.record = None
        if record.call is not call:
            # a follower that waited no longer
            del record.followers[call.call_id]
            _waits_no_more(call)
            return
        record.call = None
        keeps = outcome.code not in _NOT_KEPT
        if outcome.code in _LOST and call.tool.definition.idempotent:
            keeps = False
        if keeps:
            self._keep(record, outcome, body)
        else:
            del self.records[record.key]
        if not keeps and outcome.code not in _ALIKE:
            self._hand_on(record, call)
            return
        while record.followers:
            follower = _first(record)
            if outcome.code == "OVERLOADED":
                self._ledger.refuse(follower, _again(outcome, follower))
            else:
                follower.killers = call.killers
                self._ledger.finish(follower, _again(outcome, follower), body)

    def _hand_on(self, record: Record, call: Call) -> None:
        """Let the first follower that somebody waits for run in the place of a call that has ended."""
        routing = self._routing
        while record.followers:
            successor = _first(record)
            if routing.drained or successor.session.state is ClientState.CLOSED:
                # it ends with all others, now: nobody waits for what it would begin
                continue
            if successor.deadline <= routing.now:
                routing.end_late(successor, routing.now)
                continue
            pool = successor.tool.pool
            if pool is None or routing.health.ends(successor):
                continue
            if pool.failure and not pool.closed:
                self._ledger.finish(successor, failures.unavailable(successor.call_id, pool, pool.failure))
                continue
            successor.arguments, successor.body = call.arguments, call.body
            successor.record, record.call = record, successor
            self.records[record.key] = record
            self._dispatcher.submit([successor], pool, routing.now)
            return

    def followers(self, tool: Tool) -> list[Call]:
        """Return the calls of a tool that wait for others with their keys."""
        every = (call for record in self.records.values() for call in record.followers.values())
        return [call for call in every if call.tool is tool]

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


def _first(record: Record) -> Call:
    """Take out the first of those who follow."""
    _, call = record.followers.popitem(last=False)
    call.record = None
    _waits_no_more(call)
    return call


def _waits_no_more(call: Call) -> None:
    if call.tool.pool is not None:
        call.tool.pool.count_out(call)


def _again(outcome: messages.Outcome, call: Call) -> messages.Outcome:
    """Return the same outcome for another call."""
    fields: list[Any] = [outcome.code, outcome.body, outcome.usage, outcome.fault, outcome.parts]
    return messages.Outcome(call.call_id, *fields)
