"""The broker's own tools: what it knows of itself, answered like any other call.

They read the machines, and change nothing but the list of poisoned calls. Shapes: docs/protocol.md, "The broker's own tools".
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.core.calls import Call, fault
from mcp_broker.core.dead_letters import described
from mcp_broker.core.workers import WorkerState
from mcp_broker.wire import codec, messages, payload

if TYPE_CHECKING:
    from mcp_broker.core.pool import Pool
    from mcp_broker.core.registry import Tool
    from mcp_broker.core.routing import Routing

_TEXT: Final = {"type": "string"}


def _definition(tool: str, description: str, /, **parameters: dict[str, Any]) -> messages.ToolDefinition:
    schema = {"type": "object", "properties": parameters, "additionalProperties": False}
    return messages.ToolDefinition(
        name=tool,
        version="1.0.0",
        description=description,
        parameters=json.dumps(schema),
        returns=json.dumps({"type": "object"}),
        capabilities=("system",),
        category="system",
        idempotent=True,
    )


DEFINITIONS: Final = (
    _definition(
        "system.tools", "List the tools that the caller may call.", name=_TEXT, capability=_TEXT, tag=_TEXT
    ),
    _definition("system.status", "Describe the broker, its pools, workers and recent deaths."),
    _definition("system.why", "Tell how a worker ended or what became of a call.", id=_TEXT),
    _definition(
        "system.dead_letters",
        "List the poisoned calls, show one, or drop one.",
        action={"type": "string", "enum": ["list", "show", "drop"]},
        id=_TEXT,
    ),
)

#: what one answer lists of wrong arguments
_FAULTS_MAX: Final = 16
_REQUIRED: Final = {"system.why": ("id",)}


def answer(routing: Routing, call: Call, arguments: dict[str, Any]) -> tuple[messages.Outcome, bytes | None]:
    """Answer one of :data:`DEFINITIONS`; returns the outcome and, if the answer is large, its second frame."""
    name = call.tool.name
    known = json.loads(call.tool.definition.parameters)["properties"]
    faults = [
        {
            "path": f"/{key}",
            "expected": "no such argument",
            "received": repr(value)[:80],
            "message": "not an argument",
        }
        for key, value in list(arguments.items())[:_FAULTS_MAX]
        if key not in known
    ]
    faults += [
        {
            "path": f"/{key}",
            "expected": "string",
            "received": repr(arguments.get(key))[:80],
            "message": "a text",
        }
        for key in known
        if (key in arguments or key in _REQUIRED.get(name, ())) and not isinstance(arguments.get(key), str)
    ]
    faults += [
        {
            "path": f"/{key}",
            "expected": " or ".join(known[key]["enum"]),
            "received": repr(value)[:80],
            "message": f"one of {', '.join(known[key]['enum'])}",
        }
        for key, value in arguments.items()
        if key in known and value not in known[key].get("enum", (value,))
    ]
    if faults:
        listed = "; ".join(
            f"{fault_['path']}: {fault_['message']}, got {fault_['received']}" for fault_ in faults
        )
        text = f"the arguments of {name} do not fit: {listed}"
        return fault(call.call_id, "INVALID_ARGUMENT", text, {"faults": faults}), None
    if name == "system.tools":
        result = _tools(routing, call, arguments)
    elif name == "system.status":
        result = status(routing)
    elif name == "system.dead_letters":
        found = _dead_letters(routing, arguments)
        if isinstance(found, str):
            return fault(call.call_id, "NOT_FOUND", found, {"id": arguments.get("id", "")}), None
        result = found
    else:
        result = why(routing, arguments["id"])
    packed = payload.pack(result)
    if len(packed) > limits.BODY_BYTES_MAX:
        text = f"the answer has {len(packed)} bytes; narrow the question"
        return fault(call.call_id, "PAYLOAD_TOO_LARGE", text, {"limit_bytes": limits.BODY_BYTES_MAX}), None
    if len(packed) > limits.INLINE_BYTES_MAX:
        return messages.Outcome(call.call_id, messages.OK), packed
    return messages.Outcome(call.call_id, messages.OK, packed), None


def _tools(routing: Routing, call: Call, wanted: dict[str, Any]) -> dict[str, Any]:
    grant = call.session.grant
    listed = []
    for tool in sorted(routing.registry.tools.values(), key=lambda tool: tool.name):
        definition = tool.definition
        if (
            grant.refusal(tool.name, tool.level) is None
            and wanted.get("name", tool.name) == tool.name
            and ("capability" not in wanted or wanted["capability"] in definition.capabilities)
            and ("tag" not in wanted or wanted["tag"] in definition.tags)
        ):
            listed.append(_described(routing, tool))
    return {"tools": listed}


def _described(routing: Routing, tool: Tool) -> dict[str, Any]:
    plain: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value
        for key in messages.ToolDefinition.__struct_fields__
        for value in (getattr(tool.definition, key),)
    }
    plain["parameters"] = _schema(tool.definition.parameters)
    plain["returns"] = _schema(tool.definition.returns)
    plain["pool"] = tool.pool.name if tool.pool is not None else "system"
    plain["state"] = "ready" if tool.pool is None else _pool_state(routing, tool.pool)
    return plain


def _dead_letters(routing: Routing, wanted: dict[str, Any]) -> dict[str, Any] | str:
    """Do what is asked of the poisoned calls; returns a sentence when no single one is meant."""
    letters, action = routing.dispatcher.dead_letters, wanted.get("action", "list")
    found = letters.find(wanted.get("id", ""))
    if action == "list":
        return {"dead_letters": [described(letter, routing.now, whole=False) for letter in found]}
    if len(found) != 1 or not wanted.get("id"):
        many = f"{len(found)} poisoned calls begin so" if found and wanted.get("id") else "there is none"
        return f"no single poisoned call is meant by {wanted.get('id', '')!r}: {many}; list shows their ids"
    if action == "drop":
        letters.drop(found[0])
    return {"dead_letter": described(found[0], routing.now, whole=True)}


def _schema(text: str) -> Any:  # noqa: ANN401 (JSON)
    return json.loads(text)  # it was looked at when it was registered


def _pool_state(routing: Routing, pool: Pool) -> str:
    ready = sum(worker.state is WorkerState.READY for worker in pool.workers.values())
    if pool.failure:
        return "failed"
    wanted = pool.report.wanted if pool.report is not None else 1
    if ready >= wanted:
        return "draining" if routing.draining else "ready"
    return "degraded" if ready else "starting"


def _pool(routing: Routing, pool: Pool) -> dict[str, Any]:
    report = pool.report
    workers = []
    for seen in report.workers if report is not None else ():
        worker = pool.workers.get(seen.id)
        state = seen.state
        if worker is not None and worker.state is WorkerState.READY:
            state = "busy" if worker.held else "ready"
        workers.append(
            {
                "id": seen.id,
                "pid": seen.pid,
                "state": state,
                "in_flight": len(worker.held) if worker is not None else 0,
                "served": worker.served if worker is not None else 0,
                "rss_mb": round(seen.rss_kib / 1024, 1),
                "cpu_s": round(seen.cpu_s, 2),
                "since_wall": seen.since_wall,
            }
        )
    return {
        "name": pool.name,
        "state": _pool_state(routing, pool),
        "min": report.wanted if report is not None else 0,
        "ready": sum(worker.state is WorkerState.READY for worker in pool.workers.values()),
        "queued": pool.waiting.calls,
        "queued_bytes": pool.waiting.bytes,
        "drain_per_s": round(pool.drain_per_s, 1),
        "reason": pool.failure or (report.reason if report is not None else ""),
        "restarts": report.restarts if report is not None else 0,
        "tools": sorted(tool.name for tool in routing.registry.tools.values() if tool.pool is pool),
        "workers": workers,
    }


def status(routing: Routing) -> dict[str, Any]:
    """Describe the whole broker. Process facts that only the shell knows are in its boot record."""
    boot = routing.boot
    ledger = routing.ledger
    queued = routing.dispatcher.budget.total.calls
    return {
        "version": routing.software_version,
        "state": "draining" if routing.draining else "serving",
        "epoch": routing.epoch,
        "started_wall": boot.started_wall if boot is not None else 0.0,
        "broker": {"pid": routing.pid},
        "supervisor": {"pid": boot.supervisor_pid if boot is not None else 0},
        "endpoints": {
            "clients": boot.client_endpoint if boot is not None else "",
            "workers": boot.worker_endpoint if boot is not None else "",
        },
        "sessions": len(routing.clientele.open),
        "calls": {
            "accepted": ledger.accepted,
            "in_flight": len(ledger) - queued,
            "queued": queued,
            "succeeded": ledger.succeeded,
            "failed": dict(ledger.failed),
            "refused": dict(ledger.refused),
            "late": routing.dispatcher.late,
            "poisoned": len(routing.dispatcher.dead_letters),
        },
        "pools": [_pool(routing, pool) for _, pool in sorted(routing.dispatcher.pools.items())],
        "deaths": [codec.as_plain(certificate) for certificate in list(routing.crew.deaths)[:20]],
    }


def why(routing: Routing, wanted: str) -> dict[str, Any]:
    """Find what is known of a worker (by id or pid) or a call (by the start of its id, in hex)."""
    for certificate in routing.crew.deaths:
        if wanted in (certificate.worker_id, str(certificate.pid)):
            return {"found": True, "kind": "death", "certificate": codec.as_plain(certificate)}
    worker = routing.crew.by_id.get(wanted)
    if worker is not None:
        state = worker.state.name.lower()
        return {
            "found": True,
            "kind": "worker",
            "id": wanted,
            "state": state,
            "alive": True,
            "pool": worker.pool.name,
        }
    for pool in routing.dispatcher.pools.values():
        for seen in pool.report.workers if pool.report is not None else ():
            if wanted == str(seen.pid):
                return {
                    "found": True,
                    "kind": "worker",
                    "id": seen.id,
                    "state": seen.state,
                    "alive": True,
                    "pool": pool.name,
                }
    prefix = wanted.lower()
    if len(prefix) >= _PREFIX_CHARS:
        for call_id, call in routing.ledger.calls.items():
            if call_id.hex().startswith(prefix):
                where = call.worker.worker_id if call.worker is not None else None
                return {
                    "found": True,
                    "kind": "call",
                    "call_id": call_id.hex(),
                    "state": call.state.name.lower(),
                    "tool": call.tool.name,
                    "worker": where,
                    "attempts": call.attempts,
                }
        for ended in reversed(routing.ledger.ended):
            if ended.call_id.hex().startswith(prefix):
                return {
                    "found": True,
                    "kind": "call",
                    "call_id": ended.call_id.hex(),
                    "state": "ended",
                    "tool": ended.tool,
                    "code": ended.code,
                    "message": ended.message,
                    "principal": ended.principal,
                    "certificate": ended.certificate,
                }
    return {"found": False, "id": wanted}


#: shorter prefixes of call ids would match by accident
_PREFIX_CHARS: Final = 6
