"""What a peer is to be sent at the end of this turn: items in order, packed into as few messages as may be.

In the hot path an effect is a batch a peer, not an object a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol

from mcp_broker import limits
from mcp_broker.wire import messages

if TYPE_CHECKING:
    from mcp_broker.wire.items import Item


class Body(Protocol):
    """A second frame: bytes, or a socket's own frame, forwarded without a copy."""

    def __len__(self) -> int: ...

    def __bytes__(self) -> bytes: ...


#: an envelope and its second frame, if any
Packed = tuple[bytes, Body | None]


class Big:
    """An item whose payload is the second frame; it travels alone."""

    __slots__ = ("body", "item")

    def __init__(self, item: Item | messages.Message, body: Body) -> None:
        self.item = item
        self.body = body


class Whole(Big):
    """A message that is complete, with its second frame."""

    __slots__ = ()


def item_of(entry: Any) -> Any:  # noqa: ANN401 (an item, or a Big around one)
    """Return what an entry sends, without its body."""
    return entry.item if isinstance(entry, Big) else entry


def runs(entries: list[Any]) -> Iterator[tuple[type, list[Any]]]:
    """Split entries into runs of one type, of at most BATCH_MAX; what is no item is a run of its own."""
    kinds = set(map(type, entries))
    if len(kinds) == 1 and len(entries) <= limits.BATCH_MAX and not kinds.isdisjoint(_WEIGHTS):
        yield kinds.pop(), entries
        return
    run: list[Any] = []
    kind: type = object
    for entry in entries:
        if type(entry) is kind and kind in _WEIGHTS and len(run) < limits.BATCH_MAX:
            run.append(entry)
            continue
        if run:
            yield kind, run
        kind, run = type(entry), [entry]
    if run:
        yield kind, run


def split(items: list[Any]) -> Iterator[list[Any]]:
    """Split items that do not fit one envelope into runs that do.

    Weighing each costs more than packing them, and they nearly always fit: so whoever packs tries first.
    """
    run: list[Any] = []
    room_bytes = 0
    for item in items:
        weight = _WEIGHTS[type(item)](item)
        room_bytes -= weight
        if run and room_bytes < 0:
            yield run
            run = []
        if not run:
            room_bytes = limits.BATCH_BYTES_MAX - weight
        run.append(item)
    yield run


#: what an item adds to an envelope besides payloads: ids, numbers, names, at most about
_ITEM_BYTES: Final = 256


def _weigh_outcome(outcome: messages.Outcome) -> int:
    body, fault = outcome.body, outcome.fault
    if body is not None:
        return len(body) + _ITEM_BYTES
    # a character has up to 4 bytes
    return _ITEM_BYTES if fault is None else len(fault.details) + len(fault.message) * 4 + _ITEM_BYTES


def _weigh_dispatch(dispatch: messages.Dispatch) -> int:
    arguments = dispatch.arguments
    # the caller's scopes are as many as its token holds
    return (0 if arguments is None else len(arguments)) + memoryview(dispatch.caller).nbytes + _ITEM_BYTES


def _weigh_part(part: messages.Part) -> int:
    return (0 if part.body is None else len(part.body)) + _ITEM_BYTES


def _weigh_credit(_credit: messages.StreamCredit) -> int:
    return _ITEM_BYTES


#: the items that share a message with their like -> about how many bytes one adds to it
_WEIGHTS: Final[dict[type, Callable[[Any], int]]] = {
    messages.Outcome: _weigh_outcome,
    messages.Dispatch: _weigh_dispatch,
    messages.Part: _weigh_part,
    messages.StreamCredit: _weigh_credit,
}
