"""Payloads made smaller on their way: the two ends agree, and the broker carries what it does not open.

Only ``zstd`` is defined; no encoding means the payload as it is. A compressed payload is one zstd frame that says how
large its content is, so that a receiver refuses a bomb before it has room for it. Bounds of payloads count the
content: what a tool may be given does not depend on how well it compresses.

Source: docs/protocol.md, "Encodings".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import zstandard

from mcp_broker import limits
from mcp_broker.errors import MalformedFrame, PayloadTooLarge
from mcp_broker.wire import codec

if TYPE_CHECKING:
    from mcp_broker.wire.messages import Dispatch

ZSTD: Final = "zstd"

#: Used by one thread at a time: who needs one takes it out of the list. Making one costs several times a small payload.
_compressors: Final[list[zstandard.ZstdCompressor]] = []
_decompressors: Final[list[zstandard.ZstdDecompressor]] = []


def shrink(packed: bytes) -> bytes | None:
    """Compress a payload; None if that does not pay.

    What does not get smaller is found by a sample, since trying the whole would cost as much as sending it.
    """
    size = len(packed)
    sample = packed if size <= limits.COMPRESS_SAMPLE_BYTES else packed[: limits.COMPRESS_SAMPLE_BYTES]
    smaller = _compress(sample)
    if len(smaller) >= len(sample) * limits.COMPRESS_WORTH:
        return None
    if sample is not packed:
        smaller = _compress(packed)
        if len(smaller) >= size * limits.COMPRESS_WORTH:
            return None
    return smaller


def shrink_for(dispatch: Dispatch, packed: bytes) -> tuple[bytes, str | None]:
    """Compress a payload of COMPRESS_BYTES_MIN or more for a caller who takes that, where it pays.

    An outcome that others than the caller may get (by an idempotency key, by attaching) stays as it is: nobody knows
    what they take.

    Returns:
        The bytes to send, and their encoding.
    """
    extra = dispatch.extra
    if extra is not None and (extra.idempotency_key is not None or extra.detach):
        return packed, None
    if ZSTD in codec.decode_caller(dispatch.caller).encodings:
        smaller = shrink(packed)
        if smaller is not None:
            return smaller, ZSTD
    return packed, None


def expand(data: bytes | memoryview, encoding: str) -> bytes:
    """Undo an encoding.

    Raises:
        MalformedFrame: no such encoding, or not what it says (the sender's fault).
        PayloadTooLarge: its content is larger than any payload may be (the sender's fault); nothing was unpacked.
    """
    if encoding != ZSTD:
        raise MalformedFrame(f"the payload's encoding {encoding[:32]!r} is unknown")
    try:
        size = zstandard.frame_content_size(data)
        if size > limits.BODY_BYTES_MAX:
            raise PayloadTooLarge(
                f"the payload has {size:,} bytes once decompressed; the limit is {limits.BODY_BYTES_MAX:,}",
                {"limit_bytes": limits.BODY_BYTES_MAX, "bytes": size},
            )
        if size < 0:
            raise MalformedFrame("the payload is a zstd frame that does not say how large its content is")
        return _decompress(data)
    except zstandard.ZstdError as error:
        raise MalformedFrame(f"the payload is not one zstd frame: {error}") from error


def _compress(data: bytes) -> bytes:
    try:
        compressor = _compressors.pop()
    except IndexError:
        compressor = zstandard.ZstdCompressor(level=limits.COMPRESS_LEVEL)
    smaller = compressor.compress(data)
    _compressors.append(compressor)
    return smaller


def _decompress(data: bytes | memoryview) -> bytes:
    try:
        decompressor = _decompressors.pop()
    except IndexError:
        decompressor = zstandard.ZstdDecompressor()
    # not returned to the list when it raises: nothing is known of its state then
    content = decompressor.decompress(data, allow_extra_data=False)
    _decompressors.append(decompressor)
    return content
