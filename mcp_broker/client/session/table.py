"""Which event a client session takes in which state, and by which method; a test visits every cell."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

from mcp_broker.wire import messages


class State(Enum):
    """What the client knows of its connection; the words of docs/protocol.md."""

    DISCONNECTED = "disconnected"
    #: a socket connects
    OPENING = "opening"
    #: HELLO is on its way
    WAITING = "waiting"
    OPEN = "open"
    #: the broker takes this key, token or version never
    REFUSED = "refused"
    CLOSED = "closed"


class Event(Enum):
    """What the shell does; the other events are the broker's messages."""

    DIAL = "dial"
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    BACK_OFF = "back off"
    REFUSE = "refuse"
    SUBMIT = "submit"
    CANCEL = "cancel"
    TAKE = "take"
    EXPIRE = "expire"
    CLOSE = "close"


class Cell(Enum):
    """What a session does about an event: the name of its method."""

    IGNORE = "_ignore"
    #: only our own bug leads here
    BUG = "_bug"
    NO_SUBMIT = "_no_submit"
    DIAL = "_dial"
    CONNECTED = "_connected"
    DISCONNECTED = "_disconnected"
    BACK_OFF = "_back_off"
    REFUSE = "_refuse"
    SUBMIT = "_submit"
    CANCEL = "_cancel"
    TAKE = "_take"
    EXPIRE = "_expire"
    CLOSE = "_close"
    WELCOME = "_welcome"
    OUTCOMES = "_outcomes"
    PARTIAL = "_partial"
    PROGRESS = "_progress"
    CREDIT = "_credit"
    HEARTBEAT = "_heartbeat"
    GOODBYE = "_goodbye"
    REFUSED_HELLO = "_refused_hello"
    ERROR = "_error"


_I: Final = Cell.IGNORE
_B: Final = Cell.BUG

#: the columns: first what the shell does, then what the broker says
EVENTS: Final[tuple[Event | type[messages.Message], ...]] = (
    *(Event.DIAL, Event.CONNECTED, Event.DISCONNECTED, Event.BACK_OFF, Event.REFUSE),
    *(Event.SUBMIT, Event.CANCEL, Event.TAKE, Event.EXPIRE, Event.CLOSE),
    *(messages.Welcome, messages.Outcomes, messages.Partial, messages.Heartbeat),
    *(messages.Goodbye, messages.Error, messages.Renewed, messages.Progresses, messages.Credit),
)

_CALLS: Final = (Cell.SUBMIT, Cell.CANCEL, Cell.TAKE, Cell.EXPIRE, Cell.CLOSE)
#: before WELCOME counts only the answer to HELLO; a broker that has no HELLO yet has nothing to say
_SILENT: Final = (_I, _I, _I, _I, _I, _I, _I, _I, _I)
_HEARD: Final = (Cell.WELCOME, _I, _I, _I, Cell.GOODBYE, Cell.REFUSED_HELLO, _I, _I, _I)
_SERVED: Final = (
    _I,
    Cell.OUTCOMES,
    Cell.PARTIAL,
    Cell.HEARTBEAT,
    Cell.GOODBYE,
    Cell.ERROR,
    _I,
    Cell.PROGRESS,
    Cell.CREDIT,
)

_LINES: Final[dict[State, tuple[Cell, ...]]] = {
    State.DISCONNECTED: (Cell.DIAL, _B, _I, Cell.BACK_OFF, Cell.REFUSE, *_CALLS, *_SILENT),
    State.OPENING: (_B, Cell.CONNECTED, Cell.DISCONNECTED, _B, Cell.REFUSE, *_CALLS, *_SILENT),
    State.WAITING: (_B, _B, Cell.DISCONNECTED, _B, Cell.REFUSE, *_CALLS, *_HEARD),
    State.OPEN: (_B, _B, Cell.DISCONNECTED, _B, Cell.REFUSE, *_CALLS, *_SERVED),
    State.REFUSED: (_B, _B, _I, _B, _I, Cell.NO_SUBMIT, _I, _I, _I, Cell.CLOSE, *_SILENT),
    State.CLOSED: (_B, _B, _I, _B, _I, Cell.NO_SUBMIT, _I, _I, _I, _I, *_SILENT),
}

#: state -> event -> cell, complete
TABLE: Final[Mapping[State, Mapping[Event | type[messages.Message], Cell]]] = {
    state: dict(zip(EVENTS, line, strict=True)) for state, line in _LINES.items()
}

#: answers to HELLO that another attempt would not change
FINAL_REFUSALS: Final = frozenset({"UNAUTHENTICATED", "FORBIDDEN", "UNSUPPORTED_VERSION"})
