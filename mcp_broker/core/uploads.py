"""Arguments that come in chunks: the broker holds none of them, it keeps count.

A chunk goes on to the worker in the turn that it came in. It may come when the worker has said that it reads (a limit),
at most a window ahead; what came and was not read is the worker's to hold, and the client's to send again.

Source: docs/protocol.md, "Uploads".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mcp_broker import limits
from mcp_broker.core.calls import Call, Upload, fault
from mcp_broker.core.outbox import Whole
from mcp_broker.wire import messages

if TYPE_CHECKING:
    from mcp_broker.core.outbox import Body


def take(
    call: Call, upload: Upload, chunk: messages.Chunk, body: Body | None, epoch: int
) -> messages.Outcome | None:
    """Forward a call's next chunk; or return how the call has to end (the caller's fault)."""
    if chunk.index < upload.chunks:
        # sent again after a resume
        return None
    worker = call.worker
    if (
        worker is None
        or chunk.index != upload.chunks
        or chunk.index >= upload.limit
        or upload.is_whole
        or (chunk.data is None) is (body is None)
    ):
        text = f"chunk {chunk.index} came as number {upload.chunks} of at most {upload.limit}"
        return fault(call.call_id, "INVALID_ARGUMENT", text, {"limit": upload.limit})
    if body is not None and len(body) > limits.CHUNK_BYTES_MAX:
        text = f"a chunk of {len(body):,} bytes; the limit is {limits.CHUNK_BYTES_MAX:,}. Send smaller ones"
        return fault(call.call_id, "PAYLOAD_TOO_LARGE", text, {"limit_bytes": limits.CHUNK_BYTES_MAX})
    upload.chunks += 1
    upload.is_whole = chunk.last
    message = messages.Chunks(epoch, (chunk,))
    worker.send(message if body is None else Whole(message, body))
    return None


def grant(call: Call, limit: int, epoch: int, now: float) -> None:
    """Tell a caller that its call's worker takes chunks below a limit, as far as a window goes."""
    upload = call.upload
    if upload is None:
        return
    if call.idle is not None:
        call.idle.touched_at = now
    limit = min(limit, upload.chunks + limits.UPLOAD_WINDOW_MAX)
    if limit > upload.limit:
        upload.limit = limit
        call.session.send(credit(call, upload, epoch))


def credit(call: Call, upload: Upload, epoch: int) -> messages.Credit:
    """Return the message that tells a caller its limit."""
    return messages.Credit(epoch, (messages.StreamCredit(call.call_id, upload.limit),))
