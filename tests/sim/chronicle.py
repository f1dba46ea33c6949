"""What has happened in a run: kept as values, told in words only when somebody reads it."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from mcp_broker.wire import messages, node

#: events that a failure shows
KEPT = 80


class Chronicle:
    """The last events of a run, and a digest of all of them: two runs of one seed have the same."""

    def __init__(self, kept: int = KEPT) -> None:
        self._events: deque[tuple[float, str, str, tuple[Any, ...]]] = deque(maxlen=kept)
        self.digest = 0
        self.total = 0

    def note(self, now: float, who: str, what: str, *facts: Any) -> None:
        """Write an event down; facts are kept as they are."""
        self.total += 1
        self.digest = zlib.crc32(f"{now:.9f} {who} {what}".encode(), self.digest)
        self._events.append((now, who, what, facts))

    def sent(self, envelope: bytes) -> None:
        """Let the digest cover what peers say to each other."""
        self.digest = zlib.crc32(envelope, self.digest)

    def lines(self) -> list[str]:
        """Tell the last events, oldest first."""
        return [
            f"{now:12.6f}  {who:<12} {what} {' '.join(map(brief, facts))}".rstrip()
            for now, who, what, facts in self._events
        ]


def brief(fact: Any) -> str:
    """Say a fact in as few words as may be."""
    if isinstance(fact, bytes):
        return fact[-3:].hex()
    if isinstance(fact, float):
        return f"{fact:.6f}"
    told = _TOLD.get(type(fact))
    if told is not None:
        return told(fact)
    if isinstance(fact, messages.Message):
        fields = (f"{name}={getattr(fact, name)!r}" for name in fact.__struct_fields__ if name != "epoch")
        return " ".join((messages.kind_of(fact), *fields))
    return str(fact)[:160]


def _list(items: Iterable[str]) -> str:
    return "[" + " ".join(items) + "]"


_TOLD: Final[dict[type, Callable[[Any], str]]] = {
    messages.Calls: lambda m: f"CALLS ack={m.ack} {_list(f'{brief(c.call_id)}:{c.tool}' for c in m.calls)}",
    messages.Dispatches: lambda m: (
        f"DISPATCH {_list(f'{c.seq}={brief(c.call_id)}:{c.tool}' for c in m.calls)}"
    ),
    messages.Outcomes: lambda m: (
        f"OUTCOMES first={m.first} {_list(f'{brief(o.call_id)}:{o.code}' for o in m.outcomes)}"
    ),
    messages.Partial: lambda m: f"PARTIAL {_list(f'{brief(p.call_id)}#{p.index}' for p in m.parts)}",
    messages.Credit: lambda m: f"CREDIT {_list(f'{brief(c.call_id)}<{c.limit}' for c in m.credits)}",
    messages.Cancel: lambda m: f"CANCEL {_list(map(brief, m.call_ids))}",
    messages.Hello: lambda m: f"HELLO session={brief(m.session_id) if m.session_id else '-'} ack={m.ack}",
    messages.Register: lambda _: "REGISTER",
    messages.Welcome: lambda m: f"WELCOME epoch={m.epoch} session={brief(m.session_id)} resumed={m.resumed}",
    messages.Error: lambda m: f"ERROR {m.code} fatal={m.fatal}: {m.message}",
    node.Died: lambda m: f"DIED {m.certificate.worker_id} started_seq={m.certificate.started_seq}",
    node.Report: lambda m: f"REPORT {_list(f'{pool.name}:{pool.state}' for pool in m.pools)}",
    node.Admit: lambda m: f"ADMIT {_list(worker.worker_id for worker in m.workers)}",
}
