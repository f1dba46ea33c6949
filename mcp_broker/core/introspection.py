"""What the broker knows of itself, for :mod:`mcp_broker.core.own_tools`.

It reads the machines, and changes nothing but the list of poisoned calls. Shapes: docs/protocol.md, "The broker's own tools".
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.core import condition
from mcp_broker.core.dead_letters import described
from mcp_broker.core.death_log import is_wished
from mcp_broker.core.lifecycle import Treatment
from mcp_broker.core.worker import WorkerState
from mcp_broker.errors import NotFound, PayloadTooLarge
from mcp_broker.wire import codec, messages, payload

if TYPE_CHECKING:
    from mcp_broker.core.calls import Call
    from mcp_broker.core.pool import Pool
    from mcp_broker.core.registry import Tool
    from mcp_broker.core.routing import Routing
#: certificates that the story of a pool quotes
_DEATHS_TOLD: Final = 5


def tools(routing: Routing, call: Call, wanted: dict[str, Any]) -> bytes:
    """List what the caller may call.

    Raises:
        PayloadTooLarge: one message does not hold it.
    """
    grant = call.session.grant
    listed: list[bytes] = []
    states: dict[Pool, str] = {}
    for tool in sorted(routing.registry.tools.values(), key=lambda tool: tool.name):
        definition = tool.definition
        if (
            grant.refusal(tool.name, tool.level) is None
            and wanted.get("name", tool.name) == tool.name
            and ("capability" not in wanted or wanted["capability"] in definition.capabilities)
            and ("tag" not in wanted or wanted["tag"] in definition.tags)
        ):
            listed.append(_listed(routing, tool, states))
    size = sum(map(len, listed))
    if size > limits.BODY_BYTES_MAX:
        text = f"{len(listed)} tools have {size:,} bytes with their schemas; ask by name, capability or tag"
        raise PayloadTooLarge(text, {"limit_bytes": limits.BODY_BYTES_MAX})
    return payload.pack_list_in_map("tools", listed)


def _listed(routing: Routing, tool: Tool, states: dict[Pool, str]) -> bytes:
    """Return what is told of a tool, packed; it is packed anew when that has changed."""
    pool = tool.pool
    state = "ready" if pool is None else _tool_state(routing, tool, pool, states)
    name = "system" if pool is None else pool.name
    if tool.listing is None or tool.listing[:2] != (name, state):
        tool.listing = name, state, payload.pack(_described(tool, name, state))
    return tool.listing[2]


def _described(tool: Tool, pool: str, state: str) -> dict[str, Any]:
    plain: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value
        for key in messages.ToolDefinition.__struct_fields__
        for value in (getattr(tool.definition, key),)
    }
    plain["parameters"] = _schema(tool.definition.parameters)
    plain["returns"] = _schema(tool.definition.returns)
    plain["pool"], plain["state"] = pool, state
    return plain


def dead_letters(routing: Routing, _call: Call, wanted: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked of the poisoned calls.

    Raises:
        NotFound: no single one is meant.
    """
    letters, action = routing.dispatcher.dead_letters, wanted.get("action", "list")
    found = letters.find(wanted.get("id", ""))
    if action == "list":
        return {"dead_letters": [described(letter, routing.now, whole=False) for letter in found]}
    if len(found) != 1 or not wanted.get("id"):
        many = f"{len(found)} poisoned calls begin so" if found and wanted.get("id") else "there is none"
        text = f"no single poisoned call is meant by {wanted.get('id', '')!r}: {many}; list shows their ids"
        raise NotFound(text, {"id": wanted.get("id", "")})
    if action == "drop":
        letters.drop(found[0])
    return {"dead_letter": described(found[0], routing.now, whole=True)}


def _schema(text: str) -> Any:  # noqa: ANN401 (JSON)
    return json.loads(text)  # it was looked at when it was registered


def _pool_state(routing: Routing, pool: Pool) -> str:
    ready = _ready(pool)
    if pool.failure:
        return pool.report.state if pool.report is not None else "failed"
    if ready >= _least(pool):
        return "draining" if routing.draining else "ready"
    return "degraded" if ready else "starting"


def _ready(pool: Pool) -> int:
    """Count the workers that can take calls and can be shown: a new one may register before the supervisor has told its pid."""
    ready = {worker.worker_id for worker in pool.workers.values() if worker.state is WorkerState.READY}
    if pool.report is None:
        return len(ready)
    return sum(seen.id in ready for seen in pool.report.workers)


def _least(pool: Pool) -> int:
    """Return how many ready workers make a pool ready."""
    if pool.report is None:
        return 1
    return pool.report.wanted if pool.report.least is None else pool.report.least


def _tool_state(routing: Routing, tool: Tool, pool: Pool, states: dict[Pool, str]) -> str:
    """Tell what keeps a tool from serving: its own state, its breaker, or its pool's state.

    Args:
        states: of pools, as far as they were found out for this answer.
    """
    condition = tool.condition
    if condition is not None and condition.life.treatment is not Treatment.ACCEPT:
        return condition.life.state.name.lower()
    if condition is not None and condition.breaker is not None and not condition.is_plain:
        return f"breaker {condition.breaker.state.name.lower().replace('_', ' ')}"
    if pool not in states:
        states[pool] = _pool_state(routing, pool)
    return states[pool]


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
                "start": seen.start,
                "isolation": seen.isolation,
                "isolation_note": seen.isolation_note,
                "pressure": seen.pressure,
                "limit": seen.limit,
                "limit_share": seen.share,
                "since_wall": seen.since_wall,
            }
        )
    return {
        "name": pool.name,
        "state": _pool_state(routing, pool),
        "min": _least(pool) if report is not None else 0,
        "wanted": report.wanted if report is not None else 0,
        "max": (report.most or report.wanted) if report is not None else 0,
        "spares": report.spares if report is not None else 0,
        "ready": _ready(pool),
        "queued": pool.waiting.calls,
        "queued_bytes": pool.waiting.bytes,
        "drain_per_s": round(pool.drain_per_s, 1),
        "reason": pool.failure or (report.reason if report is not None else ""),
        "restarts": report.restarts if report is not None else 0,
        "tools": sorted(tool.name for tool in routing.registry.tools.values() if tool.pool is pool),
        "workers": workers,
    }


def _deaths(routing: Routing) -> list[Any]:
    """Return the newest deaths that nobody had wished for; `why` knows the others too."""
    unwished = [one for one in routing.workers.deaths if not is_wished(one)]
    return [codec.as_plain(certificate) for certificate in unwished[:_DEATHS_MAX]]


def status(
    routing: Routing, _call: Call | None = None, _wanted: dict[str, Any] | None = None
) -> dict[str, Any]:
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
        "sessions": len(routing.clients.open),
        "refused": dict(routing.refused),
        "cut_off": routing.clients.cut_offs,
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
        "ports": [codec.as_plain(port) for port in routing.workers.ports],
        "deaths": _deaths(routing),
    }


def why(routing: Routing, _call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
    """Find what is known of a tool or pool (by name), a worker (by id or pid) or a call (by the start of its id, in hex)."""
    wanted: str = arguments["id"]
    tool = routing.registry.tools.get(wanted)
    if tool is not None and tool.pool is not None:
        told = condition.described(routing.health.lifecycles.of(tool), routing.now)
        return {"found": True, "kind": "tool", "pool": tool.pool.name, **told}
    if wanted in routing.dispatcher.pools:
        return {"found": True, "kind": "pool", **_pool_story(routing, routing.dispatcher.pools[wanted])}
    for certificate in routing.workers.deaths:
        if wanted in (certificate.worker_id, str(certificate.pid)):
            return {
                "found": True,
                "kind": "death",
                "certificate": codec.as_plain(certificate),
                "reclaim": _reclaim(routing, certificate.worker_id),
                "calls": _ended_by(routing, certificate.worker_id),
            }
    worker = routing.workers.by_id.get(wanted)
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
                    "certificate": None if ended.certificate is None else codec.as_plain(ended.certificate),
                }
    return {"found": False, "id": wanted}


def _pool_story(routing: Routing, pool: Pool) -> dict[str, Any]:
    """Describe a pool, its tools that do not simply serve, and its latest deaths."""
    deaths = [certificate for certificate in routing.workers.deaths if certificate.pool == pool.name]
    troubled = [
        condition.described(tool.condition, routing.now)
        for tool in routing.registry.of(pool)
        if tool.condition is not None and (not tool.condition.is_plain or tool.condition.ladder is not None)
    ]
    latest = [codec.as_plain(certificate) for certificate in deaths[:_DEATHS_TOLD]]
    return {**_pool(routing, pool), "troubled": troubled, "deaths": latest}


def _reclaim(routing: Routing, worker_id: str) -> dict[str, Any] | None:
    """Return what was taken back after this worker's death, None while that goes on."""
    for record in routing.workers.reclaims:
        if record.worker_id == worker_id:
            plain: dict[str, Any] = codec.as_plain(record)
            return plain
    return None


#: what one status lists of deaths
_DEATHS_MAX: Final = 20


def _ended_by(routing: Routing, worker_id: str) -> list[dict[str, str]]:
    """Return the calls that ended with a worker's death, as far as they are remembered."""
    return [
        {"call_id": ended.call_id.hex(), "tool": ended.tool, "code": ended.code}
        for ended in routing.ledger.ended
        if ended.certificate is not None and ended.certificate.worker_id == worker_id
    ]


#: shorter prefixes of call ids would match by accident
_PREFIX_CHARS: Final = 6
