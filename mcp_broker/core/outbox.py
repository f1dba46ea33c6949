"""What a peer is to be sent at the end of this turn: items in order, packed into as few messages as may be.

In the hot path an effect is a batch a peer, not an object a call.
"""

from __future__ import annotations

from typing import Any, Protocol

from mcp_broker import limits
from mcp_broker.wire import messages


class Body(Protocol):
    """A second frame: bytes, or a socket's own frame, forwarded without a copy."""

    def __len__(self) -> int: ...

    def __bytes__(self) -> bytes: ...


#: a message and its second frame, if any
Packed = tuple[messages.AnyMessage, Body | None]


class Big:
    """An item whose payload is the second frame; it travels alone."""

    __slots__ = ("body", "item")

    def __init__(self, item: messages.Item, body: Body) -> None:
        self.item = item
        self.body = body


def runs(entries: list[Any]) -> list[tuple[type, list[Any]]]:
    """Split entries into runs of one type that fit a message; a message or a Big is a run of its own."""
    result: list[tuple[type, list[Any]]] = []
    run: list[Any] = []
    kind: type = object
    size = 0
    for entry in entries:
        entry_kind = type(entry)
        weight = _weight(entry)
        if (
            entry_kind is not kind
            or entry_kind is Big
            or len(run) >= limits.BATCH_MAX
            or size + weight > limits.BATCH_BYTES_MAX
            or issubclass(entry_kind, messages.Message)
        ):
            run = []
            result.append((entry_kind, run))
            kind = entry_kind
            size = 0
        run.append(entry)
        size += weight
    return result


def _weight(entry: Any) -> int:  # noqa: ANN401
    """Return about how many bytes an entry adds to an envelope."""
    kind = type(entry)
    if kind is messages.Outcome:
        if entry.body is not None:
            return len(entry.body) + 64
        return 64 if entry.fault is None else len(entry.fault.details) + len(entry.fault.message) * 4 + 64
    if kind is messages.Dispatch:
        return (len(entry.arguments) if entry.arguments is not None else 0) + len(bytes(entry.caller)) + 160
    if kind is messages.Part:
        return (len(entry.body) if entry.body is not None else 0) + 64
    return 64
