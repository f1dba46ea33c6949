"""Compressed payloads: when it pays, and what hostile ones cost."""

from __future__ import annotations

import random
import threading
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mcp_broker import limits
from mcp_broker.errors import MalformedFrame, PayloadTooLarge
from mcp_broker.wire import codec, encoding, messages

TEXT = b'{"name": "x", "value": 12345},' * 400
NOISE = random.Random(3).randbytes(limits.BODY_BYTES_MAX)


@given(st.binary(max_size=300).map(lambda seed: seed * 100))
def test_what_was_shrunk_expands_to_the_same(packed: bytes) -> None:
    smaller = encoding.shrink(packed)
    if smaller is not None:
        assert len(smaller) < len(packed) * limits.COMPRESS_WORTH
        assert encoding.expand(smaller, "zstd") == packed
        assert encoding.expand(memoryview(smaller), "zstd") == packed


def test_noise_is_left_as_it_is_after_a_sample() -> None:
    assert encoding.shrink(NOISE[: limits.COMPRESS_SAMPLE_BYTES]) is None
    assert encoding.shrink(NOISE[: limits.COMPRESS_SAMPLE_BYTES] + TEXT * 50) is None, (
        "only the beginning is tried"
    )


def test_payload_whose_beginning_alone_shrinks_is_left_as_it_is() -> None:
    assert (
        encoding.shrink(bytes(limits.COMPRESS_SAMPLE_BYTES) + NOISE[: 15 * limits.COMPRESS_SAMPLE_BYTES])
        is None
    )


def dispatch(takes: tuple[str, ...], extra: messages.CallExtra | None = None) -> messages.Dispatch:
    caller = codec.raw(messages.Caller("ada", 0, (), encodings=takes))
    return messages.Dispatch(1, b"i" * 16, "t", 1000, b"\x80", caller, extra)


@pytest.mark.parametrize(("takes", "encoded"), [((), None), (("zstd",), "zstd"), (("br",), None)])
def test_only_a_caller_who_takes_it_gets_it(takes: tuple[str, ...], encoded: str | None) -> None:
    data, how = encoding.shrink_for(dispatch(takes), TEXT)
    assert how == encoded
    assert (data == TEXT) is (encoded is None)
    assert encoding.shrink_for(dispatch(takes), NOISE) == (NOISE, None)


@pytest.mark.parametrize("extra", [messages.CallExtra(idempotency_key="k"), messages.CallExtra(detach=True)])
def test_result_that_somebody_else_may_get_stays_as_it_is(extra: messages.CallExtra) -> None:
    assert encoding.shrink_for(dispatch(("zstd",), extra), TEXT) == (TEXT, None)


def bomb(size: int) -> bytes:
    return zstandard.ZstdCompressor(level=19).compress(bytes(size))


def test_bomb_is_refused_before_there_is_room_for_it() -> None:
    packed = bomb(256 * 1024 * 1024)
    assert len(packed) < limits.INLINE_BYTES_MAX
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge) as refused:
            encoding.expand(packed, "zstd")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.details == {"limit_bytes": limits.BODY_BYTES_MAX, "bytes": 256 * 1024 * 1024}
    assert peak < 64 * 1024


def lying(packed: bytes, size: int) -> bytes:
    """Have a frame announce another content size: 4 bytes from place 5 where bit 5 of the descriptor is set."""
    assert packed[4] == 0xA0, "a single segment with a content size of 4 bytes"
    return packed[:5] + size.to_bytes(4, "little") + packed[9:]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"not zstd at all",
        bomb(1000)[:-1],
        bomb(1000) + b"\x00",
        bomb(1000) + bomb(1000),
        lying(bomb(1_000_000), 1_000),
        lying(bomb(1_000_000), 1_000_001),
        zstandard.ZstdCompressor(write_content_size=False).compress(TEXT),
    ],
    ids=["empty", "plain", "text", "cut", "trailing", "two", "says less", "says more", "says nothing"],
)
def test_what_is_not_one_honest_frame_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedFrame):
        encoding.expand(data, "zstd")
    # and the next one is read as if nothing had been
    assert encoding.expand(bomb(10), "zstd") == bytes(10)


def test_unknown_encoding_is_malformed() -> None:
    with pytest.raises(MalformedFrame, match="'br' is unknown"):
        encoding.expand(TEXT, "br")


def test_threads_do_not_share_a_compressor() -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        data = bytes([number]) * 200_000
        for _ in range(50):
            smaller = encoding.shrink(data)
            if smaller is None or encoding.expand(smaller, "zstd") != data:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
