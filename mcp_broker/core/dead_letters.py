"""Calls that killed worker after worker: kept for somebody to look at, instead of being run for ever.

In memory, bounded by bytes, count and time: a broker that is restarted has forgotten them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcp_broker import limits
from mcp_broker.core.shelf import Shelf
from mcp_broker.wire import codec
from mcp_broker.wire.structs import Slim

if TYPE_CHECKING:
    from mcp_broker.core.calls import Call
    from mcp_broker.core.timers import Timers
    from mcp_broker.wire.node import Certificate


class DeadLetter(Slim):
    """One poisoned call."""

    call_id: bytes
    tool: str
    principal: str
    arguments: bytes
    certificates: tuple[Certificate, ...]
    #: instant of the machine's clock
    at: float


class DeadLetters:
    """Poisoned calls by id, the oldest first."""

    def __init__(self, timers: Timers) -> None:
        self._letters: Shelf[bytes, DeadLetter] = Shelf(timers, limits.DEAD_LETTER_TTL_S)

    def __len__(self) -> int:
        return len(self._letters)

    def add(self, call: Call, now: float) -> None:
        """Keep a call that is about to end as POISONED."""
        letter = DeadLetter(
            call.call_id,
            call.tool.name,
            call.session.grant.caller.principal,
            call.packed_arguments(),
            call.killers,
            now,
        )
        self._letters.put(letter.call_id, letter, letter.principal, _size(letter), now)
        self._letters.trim(limits.DEAD_LETTERS_MAX, limits.DEAD_LETTERS_BYTES_MAX)

    def find(self, prefix: str) -> list[DeadLetter]:
        """Return those whose id, in hexadecimal, begins so."""
        return [letter for letter in self._letters.values() if letter.call_id.hex().startswith(prefix)]

    def drop(self, letter: DeadLetter) -> None:
        """Forget one."""
        if self._letters.get(letter.call_id) is letter:
            self._letters.take(letter.call_id)


def described(letter: DeadLetter, now: float, *, whole: bool) -> dict[str, Any]:
    """Return a letter as a payload; its arguments and certificates only when it is asked for by itself."""
    plain: dict[str, Any] = {
        "call_id": letter.call_id.hex(),
        "tool": letter.tool,
        "principal": letter.principal,
        "age_s": round(now - letter.at, 1),
        "cause": letter.certificates[-1].cause if letter.certificates else "",
        "workers": [certificate.worker_id for certificate in letter.certificates],
    }
    if whole:
        plain["arguments"] = letter.arguments
        plain["certificates"] = [codec.as_plain(certificate) for certificate in letter.certificates]
    return plain


def _size(letter: DeadLetter) -> int:
    texts = sum(len(certificate.stderr) + len(certificate.cause) for certificate in letter.certificates)
    return limits.RECORD_BYTES + len(letter.arguments) + texts
