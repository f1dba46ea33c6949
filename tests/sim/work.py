"""What clients ask for: tools, what each call of them will do, and what is known about each call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.wire import messages, payload

if TYPE_CHECKING:
    from random import Random

    from mcp_broker.client.session import PendingCall
    from tests.sim.client import Client

#: the suffixes of each pool's tools
GET: Final = "get"  # idempotent
PUT: Final = "put"  # not
ROWS: Final = "rows"  # a stream, idempotent
TAIL: Final = "tail"  # a stream, not idempotent

#: the broker's own tool
OWN: Final = "system.tools"

_BIG: Final = bytes(limits.INLINE_BYTES_MAX + 100)


def definitions(pool: str, edition: int) -> tuple[messages.ToolDefinition, ...]:
    """Return what each worker of an edition of a pool offers."""
    return tuple(
        messages.ToolDefinition(
            name=f"{pool}.{name}",
            version=f"{edition}.0.0",
            capabilities=("sim",),
            idempotent=name in {GET, ROWS},
            streaming=name in {ROWS, TAIL},
        )
        for name in (GET, PUT, ROWS, TAIL)
    )


def traits(pool: str) -> dict[str, tuple[str, ...]]:
    """Return what each worker of a pool says of its tools besides."""
    hooks = ("pause", "reset", "resume", "start", "stop")
    return {f"{pool}.{GET}": (*hooks, "recover"), f"{pool}.{TAIL}": hooks}


@dataclass(frozen=True, slots=True)
class Plan:
    """What one call will do, wherever it runs; it travels as the call's arguments.

    Args:
        token: comes back as the result.
        does: ok, fail, crash (the worker), hang (until interrupted), stubborn (until killed).
        spent_s: how long it takes until then; of a stream: each part.
        parts: of a stream.
        is_big: its result takes a frame of its own; ``has_big_arguments``: they do.
    """

    token: int
    does: str = "ok"
    spent_s: float = 0.0
    parts: int = 0
    is_big: bool = False
    has_big_arguments: bool = False

    def pack(self) -> bytes:
        """Make the call's arguments."""
        arguments: dict[str, Any] = {
            "token": self.token, "does": self.does, "spent_s": self.spent_s, "parts": self.parts, "big": self.is_big,
        }  # fmt: skip
        if self.has_big_arguments:
            arguments["ballast"] = _BIG
        return payload.pack(arguments)

    @classmethod
    def unpack(cls, arguments: bytes | memoryview) -> Plan:
        """Read a call's arguments."""
        values = payload.unpack_map(arguments)
        return cls(
            values["token"],
            values["does"],
            values["spent_s"],
            values["parts"],
            values["big"],
            "ballast" in values,
        )

    @property
    def is_endless(self) -> bool:
        """Tell whether it runs until somebody stops it."""
        return self.does in {"hang", "stubborn"}

    @property
    def value(self) -> Any:
        """What the call returns, a stream excepted."""
        return [self.token, _BIG] if self.is_big else self.token


@dataclass(slots=True, eq=False)
class Record:
    """All that is known about one call.

    Attributes:
        epoch: of the broker when it was submitted.
        stalls_s: how long its client had stood still by then, all together.
        executions: how often its tool began.
        code: how it ended, "" before.
    """

    client: Client
    pending: PendingCall
    plan: Plan
    tool: str
    is_streamed: bool
    submitted_at: float
    epoch: int
    stalls_s: float
    is_proof: bool = False
    was_cancelled: bool = False
    executions: int = 0
    code: str = ""
    parts: list[Any] = field(default_factory=list)

    @property
    def call_id(self) -> bytes:
        return self.pending.call_id

    @property
    def is_idempotent(self) -> bool:
        return self.tool.endswith((GET, ROWS))

    @property
    def is_stream(self) -> bool:
        return self.tool.endswith((ROWS, TAIL))


class Wishes:
    """Draws what clients want next.

    Args:
        harm: share of calls that crash or hang.
    """

    def __init__(self, rng: Random, pools: list[str], harm: float) -> None:
        self._rng = rng
        self._pools = pools
        self.harm = harm
        self._tokens = 0

    def next_token(self) -> int:
        """Return a number that no other call returns."""
        self._tokens += 1
        return self._tokens

    def draw(self) -> tuple[str, float, Plan]:
        """Return a tool, a time-out in seconds, and a plan."""
        rng = self._rng
        if rng.random() < 0.02:
            return OWN, 1.0, Plan(self.next_token())
        tool = rng.choices((GET, PUT, ROWS, TAIL), (4, 5, 1, 1))[0]
        does = "ok"
        if rng.random() < self.harm:
            does = rng.choice(("crash", "hang", "stubborn", "crash"))
        elif rng.random() < 0.1:
            does = "fail"
        size = rng.random()
        spent_s = size * 1e-4 if size < 0.4 else size * 0.005 if size < 0.8 else size * 0.1
        timeout_s = rng.choice((0.05, 0.3, 1.0, 3.0, 3.0, 6.0))
        parts = rng.choice((0, 1, 5, 20, 40)) if tool in {ROWS, TAIL} else 0
        is_big, has_big_arguments = rng.random() < 0.01, rng.random() < 0.01
        plan = Plan(self.next_token(), does, spent_s, parts, is_big, has_big_arguments)
        return f"{rng.choice(self._pools)}.{tool}", timeout_s, plan
