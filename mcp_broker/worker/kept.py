"""Outcomes that a worker keeps until the broker says that they arrived at their callers, or their room is needed.

Those that it has to let go are remembered by the time in which somebody may still ask for them: a broker that follows
could else take a call whose outcome is gone for one that never started.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterator
from itertools import compress

from mcp_broker import limits
from mcp_broker.wire import codec, messages
from mcp_broker.wire.structs import Slim


class Kept(Slim):
    """One message of outcomes that the broker has not acknowledged."""

    #: the number of its last outcome in this session
    last: int
    outcomes: tuple[messages.Outcome, ...]
    #: whose calls they were, packed; of detached ones, what a later broker is told
    callers: list[codec.Raw | messages.Held]
    body: bytes | None
    size: int
    #: the latest deadline of their calls, on the loop's clock: nobody asks for them after it
    deadline: float


def held(dispatch: messages.Dispatch, seq: int, left_s: float = 0.0) -> messages.Held:
    """Say that a call is held: it runs under this number, or has ended (0)."""
    principal = codec.decode_caller(dispatch.caller).principal
    if dispatch.extra is None or not dispatch.extra.detach:
        return messages.Held(dispatch.call_id, seq, principal)
    return messages.Held(dispatch.call_id, seq, principal, dispatch.tool, max(0, int(left_s * 1000)))


class KeptOutcomes:
    """All that one worker keeps, oldest first."""

    def __init__(self) -> None:
        self._messages: deque[Kept] = deque()
        self._count = self._bytes = 0
        #: until then somebody may ask for an outcome that was let go
        self._asked_until = 0.0

    def __len__(self) -> int:
        return len(self._messages)

    def __iter__(self) -> Iterator[Kept]:
        return iter(self._messages)

    def add(self, kept: Kept) -> None:
        """Keep a message; beyond the bounds the oldest are let go."""
        self._messages.append(kept)
        self._count += len(kept.outcomes)
        self._bytes += kept.size
        while self._count > limits.HELD_MAX or self._bytes > limits.HELD_BYTES_MAX:
            self._let_go()

    def acknowledge(self, count: int) -> None:
        """Forget what has arrived: all outcomes up to this number."""
        while self._messages and self._messages[0].last <= count:
            self._drop()

    def forget_repeated(self, running: Container[bytes]) -> None:
        """Keep the latest outcome of each call only, and none of a call that runs: a broker that has a call run again has the one before."""
        newer: set[bytes] = set()
        left: deque[Kept] = deque()
        for kept in reversed(self._messages):
            ids = [outcome.call_id for outcome in kept.outcomes]
            stays = [one not in running and one not in newer for one in ids]
            newer.update(ids)
            self._count -= stays.count(False)
            if not any(stays):
                self._bytes -= kept.size
                continue
            kept.outcomes = tuple(compress(kept.outcomes, stays))
            kept.callers = list(compress(kept.callers, stays))
            left.appendleft(kept)
        self._messages = left

    def halve(self) -> None:
        """Let go of the older half."""
        for _ in range((len(self._messages) + 1) // 2):
            self._let_go()

    def held(self) -> Iterator[messages.Held]:
        """Say what is kept."""
        for kept in self._messages:
            for outcome, caller in zip(kept.outcomes, kept.callers, strict=True):
                if isinstance(caller, messages.Held):
                    yield caller
                else:
                    yield messages.Held(outcome.call_id, 0, codec.decode_caller(caller).principal)

    def let_go_ms(self, now: float) -> int:
        """Return for how long yet somebody may ask for an outcome that was let go, in milliseconds."""
        return max(0, math.ceil((self._asked_until - now) * 1000))

    def _let_go(self) -> None:
        self._asked_until = max(self._asked_until, self._drop().deadline)

    def _drop(self) -> Kept:
        kept = self._messages.popleft()
        self._count -= len(kept.outcomes)
        self._bytes -= kept.size
        return kept
