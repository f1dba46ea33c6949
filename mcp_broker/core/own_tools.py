"""The broker's own tools: what it tells of itself, and what it passes on to its supervisor, called like any other tool.

To add one: write its answer (:mod:`~mcp_broker.core.introspection`), or, for what the supervisor does, its handler
(``mcp_broker/supervisor/commands.py``), and a row of :data:`TOOLS`. Whoever may call it has a scope that spells
``system``. Shapes: docs/protocol.md, "The broker's own tools".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.core import introspection, steering
from mcp_broker.core.calls import Call, fault
from mcp_broker.errors import CallError
from mcp_broker.wire import messages, payload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mcp_broker.core.outbox import Body
    from mcp_broker.core.routing import Routing

_TEXT: Final = {"type": "string"}
_COUNT: Final = {"type": "integer", "minimum": 0, "maximum": limits.WORKERS_MAX}

#: JSON schema's word for a type -> how it is called in a message, and whether a value is one
_TYPES: Final[dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "string": ("a text", lambda value: isinstance(value, str)),
    "integer": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "boolean": ("true or false", lambda value: isinstance(value, bool)),
    "array": (
        "a list of texts",
        lambda value: isinstance(value, list | tuple) and all(isinstance(item, str) for item in value),
    ),
}
#: what one answer lists of wrong arguments
_FAULTS_MAX: Final = 16


#: what makes a result of a call and its arguments
Answer = Callable[["Routing", Call, dict[str, Any]], dict[str, Any] | bytes]


@dataclass(frozen=True, slots=True)
class OwnTool:
    """One of the broker's own tools.

    Args:
        definition: as it is listed.
        schema: of its parameters.
        answer: makes the result, packed or not, or raises a CallError; None: the supervisor carries it out.
        only_tells: its answer changes nothing that another call could count on, and may wait for a turn.
    """

    definition: messages.ToolDefinition
    schema: dict[str, Any]
    answer: Answer | None
    only_tells: bool


def _tool(
    name: str,
    description: str,
    answer: Answer | None,
    /,
    *,
    changes: bool = False,
    required: tuple[str, ...] = (),
    **parameters: dict[str, Any],
) -> OwnTool:
    schema = {"type": "object", "properties": parameters, "additionalProperties": False}
    if required:
        schema["required"] = list(required)
    definition = messages.ToolDefinition(
        name=name,
        version="1.0.0",
        description=description,
        parameters=json.dumps(schema),
        returns=json.dumps({"type": "object"}),
        capabilities=("system",),
        category="system",
        idempotent=True,
    )
    return OwnTool(definition, schema, answer, answer is not None and not changes)


_TABLE: Final = (
    _tool(
        "system.tools",
        "List the tools that the caller may call.",
        introspection.tools,
        name=_TEXT,
        capability=_TEXT,
        tag=_TEXT,
    ),
    _tool(
        "system.status", "Describe the broker, its pools, workers and recent deaths.", introspection.status
    ),
    _tool(
        "system.why",
        "Tell how a worker ended or what became of a call.",
        introspection.why,
        required=("id",),
        id=_TEXT,
    ),
    _tool(
        "system.dead_letters",
        "List the poisoned calls, show one, or drop one.",
        introspection.dead_letters,
        action={"type": "string", "enum": ["list", "show", "drop"]},
        id=_TEXT,
    ),
    _tool(
        "system.pools.scale",
        "Keep so many workers of a pool, until told otherwise; without a number as many as its configuration says.",
        None,
        required=("pool",),
        pool=_TEXT,
        workers=_COUNT,
    ),
    _tool(
        "system.reload",
        "Read the configuration again and follow it; replace the workers of these pools in any case.",
        None,
        pools={"type": "array", "items": _TEXT},
    ),
    _tool(
        "system.drain",
        "Let a pool, or all, finish and take no more calls; or have a worker finish and be replaced.",
        None,
        target=_TEXT,
    ),
)

#: what operators do with one tool
_STEERING: Final = tuple(
    _tool(
        f"system.tools.{name}",
        description,
        steering.answering(wish),
        changes=True,
        required=("tool",),
        tool=_TEXT,
        **({} if name == "history" else {"reason": _TEXT}),
    )
    for name, (wish, description) in steering.WISHES.items()
)

TOOLS: Final = {tool.definition.name: tool for tool in (*_TABLE, *_STEERING)}
DEFINITIONS: Final = tuple(tool.definition for tool in TOOLS.values())


def serve(
    routing: Routing, call: Call, arguments: dict[str, Any], now: float
) -> tuple[messages.Outcome, Body | None] | None:
    """Answer a call of one of :data:`TOOLS`.

    Returns:
        The outcome and, if the answer is large, its second frame; None if the supervisor is to answer.
    """
    tool = TOOLS[call.tool.name]
    faults = list(_faults(tool.schema, arguments))[:_FAULTS_MAX]
    if faults:
        listed = "; ".join(f"{one['path']}: {one['message']}, got {one['received']}" for one in faults)
        text = f"the arguments of {call.tool.name} do not fit: {listed}"
        return fault(call.call_id, "INVALID_ARGUMENT", text, {"faults": faults}), None
    if tool.answer is None:
        refusal = routing.commands.begin(call, arguments, now)
        return None if refusal is None else (refusal, None)
    try:
        answer = tool.answer(routing, call, arguments)
        packed = answer if isinstance(answer, bytes) else payload.pack(answer)
    except CallError as error:
        return fault(call.call_id, error.code, error.message, error.details), None
    except Exception as error:  # noqa: BLE001 (our bug costs this caller an answer, nobody the broker)
        routing.bug(call.tool.name, error)
        text = f"{call.tool.name} broke ({type(error).__name__}), and the broker's log says where; please report it"
        return fault(call.call_id, "INTERNAL", text, {"tool": call.tool.name}), None
    return packed_outcome(call.call_id, packed)


def packed_outcome(call_id: bytes, packed: bytes) -> tuple[messages.Outcome, bytes | None]:
    """Make the outcome of a call whose result is packed."""
    if len(packed) > limits.BODY_BYTES_MAX:
        text = f"the answer has {len(packed)} bytes; narrow the question"
        return fault(call_id, "PAYLOAD_TOO_LARGE", text, {"limit_bytes": limits.BODY_BYTES_MAX}), None
    if len(packed) > limits.INLINE_BYTES_MAX:
        return messages.Outcome(call_id, messages.OK), packed
    return messages.Outcome(call_id, messages.OK, packed), None


def _faults(schema: dict[str, Any], arguments: dict[str, Any]) -> Iterator[dict[str, str]]:
    known: dict[str, dict[str, Any]] = schema["properties"]
    for key, value in list(arguments.items()):
        if key not in known:
            yield _fault(key, "no such argument", value, "not an argument")
    for key, wanted in known.items():
        if key not in arguments and key not in schema.get("required", ()):
            continue
        value, (name, is_one) = arguments.get(key), _TYPES[wanted["type"]]
        if not is_one(value):
            yield _fault(key, wanted["type"], value, name)
        elif value not in wanted.get("enum", (value,)):
            yield _fault(key, " or ".join(wanted["enum"]), value, f"one of {', '.join(wanted['enum'])}")
        elif "minimum" in wanted and not wanted["minimum"] <= value <= wanted["maximum"]:
            between = f"{wanted['minimum']} to {wanted['maximum']}"
            yield _fault(key, between, value, f"from {between}")


def _fault(key: str, expected: str, value: Any, message: str) -> dict[str, str]:  # noqa: ANN401 (any payload)
    return {"path": f"/{key}", "expected": expected, "received": repr(value)[:80], "message": message}
