"""How a call ends whose worker died while it ran, or whose pool was given up: what is known of it, and what was tried."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mcp_broker.core.calls import Call, CallState, fault
from mcp_broker.core.worker import WORKER_CODES
from mcp_broker.wire import codec, messages

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mcp_broker.core.outbox import Body
    from mcp_broker.core.pool import Pool
    from mcp_broker.core.registry import Tool
    from mcp_broker.core.worker import Worker
    from mcp_broker.wire.messages import Outcome
    from mcp_broker.wire.node import Certificate


def exceeding(held: Iterable[Call], certificate: Certificate) -> int:
    """Count the calls of which one exceeded the limit that its worker was killed for; 0: it died of something else."""
    if certificate.kind != "limit":
        return 0
    return sum(call.state is not CallState.ENDED and call.seq <= certificate.started_seq for call in held)


def lost(call: Call, certificate: Certificate, code: str) -> Outcome:
    """Make the outcome of a call that died with its worker.

    Args:
        code: WORKER_LOST, or POISONED for one that has killed enough of them.
    """
    idempotent = call.tool.definition.idempotent
    worker, cause = certificate.worker_id, certificate.cause
    if code == "POISONED":
        sentence = (
            f"the call killed {len(call.killers)} workers and will not be run again; the last one: {cause}"
        )
    else:
        ran = (
            "it was not run again, because the tool is not declared idempotent"
            if not idempotent
            else (f"it was run {call.attempts} times")
        )
        sentence = f"worker {worker} was lost while it ran {call.tool.name}: {cause}; {ran}"
    details = _details(call, certificate)
    return fault(call.call_id, code, sentence, details, retryable=idempotent and code == "WORKER_LOST")


def forsaken(call_id: bytes, tool: Tool, certificate: Certificate) -> Outcome:
    """Make the outcome of a call that a worker had started for an earlier broker, or for nobody any more, when it died."""
    worker, cause = certificate.worker_id, certificate.cause
    text = (
        f"worker {worker} was lost after it had started {tool.name}: {cause}; it was not run again, because "
        + ("nobody asked for it" if tool.definition.idempotent else "the tool is not declared idempotent")
    )
    details: dict[str, Any] = {"worker": worker, "tool": tool.name, "attempts": 1}
    details["certificate"] = codec.as_plain(certificate)
    return fault(call_id, "WORKER_LOST", text, details)


def exhausted(call: Call, certificate: Certificate, *, among: int = 1) -> Outcome:
    """Make the outcome of a call whose worker was killed since it exceeded a limit.

    Args:
        among: so many calls ran in that worker, and which of them it was cannot be told.
    """
    worker, tool = certificate.worker_id, call.tool.name
    ran = f"ran {tool}" if among == 1 else f"ran {tool} and {among - 1} more"
    sentence = (
        f"worker {worker} was killed while it {ran}: {certificate.cause}. Do less in one call, or raise "
        f"{certificate.limit} in [pools.{certificate.pool}.limits]"
    )
    details = {
        "limit": certificate.limit,
        "limit_value": certificate.limit_value,
        "used": certificate.used,
        **_details(call, certificate),
    }
    if among > 1:
        details["among"] = among
    return fault(call.call_id, "RESOURCE_EXHAUSTED", sentence, details)


def checked(worker: Worker, outcome: Outcome, body: Body | None) -> tuple[Outcome, Body | None]:
    """Return a worker's outcome, or INTERNAL in place of one that a worker may not say."""
    if outcome.code == messages.OK:
        if outcome.body is not None or body is not None:
            return outcome, body
        text = f"worker {worker.worker_id} sent a result without a body"
    elif outcome.code in WORKER_CODES and outcome.fault is not None:
        return outcome, body
    else:
        text = f"worker {worker.worker_id} answered with {outcome.code!r}, which is not a worker's to say"
    return fault(outcome.call_id, "INTERNAL", text), None


def unavailable(call_id: bytes, pool: Pool, reason: str) -> Outcome:
    """Make the outcome of a call whose pool was given up."""
    return fault(
        call_id,
        "UNAVAILABLE",
        f"pool {pool.name!r} is not running: {reason}",
        {"pool": pool.name, "reason": reason},
    )


def _details(call: Call, certificate: Certificate) -> dict[str, Any]:
    return {
        "worker": certificate.worker_id,
        "tool": call.tool.name,
        "attempts": call.attempts,
        "certificate": codec.as_plain(certificate),
    }
