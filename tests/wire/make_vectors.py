"""Write the golden vectors: bytes that every implementation of docs/protocol.md must read and write alike.

Run by hand (``python tests/wire/make_vectors.py``) when a kind or field is appended; the files are checked in,
and a change of existing bytes is a new major version. ``index.json`` lists the valid frames, each with its
value (bytes as ``{"hex": ...}``) and its bytes in a ``.hex`` file; ``invalid.json`` lists frames that must be
refused, each with the door that it knocks at and the error code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgpack

from mcp_broker import ids, limits
from mcp_broker.wire import codec, payload
from mcp_broker.wire import messages as m

if TYPE_CHECKING:
    import msgspec

FOLDER: Final = Path(__file__).parent / "vectors"
PREFIX: Final = bytes.fromhex("0102030405060708")
FIRST: Final = ids.call_id(PREFIX, 1)
SECOND: Final = ids.call_id(PREFIX, 2)
SESSION: Final = bytes(range(0xA0, 0xB0))
EPOCH: Final = 7
TOKEN: Final = "header.claims.signature"
#: one zstd frame (magic, content size 1, one raw block) around an empty map
ZSTD_EMPTY_MAP: Final = bytes.fromhex("28b52ffd200109000080")


CALLER: Final = m.Caller("alice", 3, ("text.*",), encodings=("zstd",))


class Vector(NamedTuple):
    """One valid message, and the codec door that takes it."""

    name: str
    door: str
    message: msgspec.Struct


VECTORS: Final = (
    Vector("hello", "from_client", m.Hello(0, m.PROTOCOL, (m.MAJOR,), TOKEN, None, (), "raw/1")),
    Vector(
        "hello_resume", "from_client", m.Hello(0, m.PROTOCOL, (1, 2), TOKEN, SESSION, ("zstd",), "raw/1", 41)
    ),
    Vector(
        "welcome",
        "to_client",
        m.Welcome(
            EPOCH,
            (m.MAJOR, m.MINOR),
            SESSION,
            False,
            "alice",
            m.GrantedLimits(window=1024, heartbeat_ms=250, token_ms=3_600_000),
            (),
            "5f1d",
        ),
    ),
    Vector(
        "welcome_worker",
        "to_worker",
        m.Welcome(
            EPOCH,
            (m.MAJOR, m.MINOR),
            SESSION,
            False,
            "text-1",
            m.GrantedLimits(window=256, heartbeat_ms=250, batch=128, stream_window=8),
            ("zstd",),
        ),
    ),
    Vector("renew", "from_client", m.Renew(EPOCH, TOKEN)),
    Vector("renewed", "to_client", m.Renewed(EPOCH, 86_400_000)),
    Vector("goodbye", "from_client", m.Goodbye(EPOCH, "done")),
    Vector("goodbye_broker", "to_client", m.Goodbye(EPOCH, "shutting down")),
    Vector(
        "calls",
        "from_client",
        m.Calls(EPOCH, 0, (m.Call(FIRST, "text.word_count", 5000, payload.pack({"text": "a b a"})),)),
    ),
    Vector(
        "calls_batch",
        "from_client",
        m.Calls(
            EPOCH,
            2,
            (
                m.Call(FIRST, "echo.echo", 1, payload.pack({}), m.CallExtra(idle_timeout_ms=1)),
                m.Call(
                    SECOND,
                    "echo.echo",
                    86_400_000,
                    payload.pack({"blob": b"\x00\xff", "text": "\u00e9", "list": [None, True, -1, 1.5]}),
                    m.CallExtra(traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
                ),
            ),
        ),
    ),
    Vector(
        "calls_zstd",
        "from_client",
        m.Calls(
            EPOCH, 2, (m.Call(FIRST, "echo.echo", 30_000, ZSTD_EMPTY_MAP, m.CallExtra(encoding="zstd")),)
        ),
    ),
    Vector(
        "calls_priority",
        "from_client",
        m.Calls(
            EPOCH,
            2,
            (
                m.Call(FIRST, "echo.echo", 1000, payload.pack({}), m.CallExtra(priority=m.Priority.HIGH)),
                m.Call(SECOND, "echo.echo", 1000, payload.pack({}), m.CallExtra(priority=m.Priority.LOW)),
            ),
        ),
    ),
    Vector("calls_body", "from_client", m.Calls(EPOCH, 2, (m.Call(FIRST, "echo.echo", 30_000, None),))),
    Vector(
        "dispatch",
        "to_worker",
        m.Dispatches(
            EPOCH,
            0,
            (
                m.Dispatch(
                    1,
                    FIRST,
                    "text.word_count",
                    4998,
                    payload.pack({"text": "a b a"}),
                    codec.raw(CALLER),
                ),
            ),
        ),
    ),
    Vector(
        "dispatch_body",
        "to_worker",
        m.Dispatches(
            EPOCH,
            9,
            (
                m.Dispatch(
                    12,
                    SECOND,
                    "echo.echo",
                    30_000,
                    None,
                    codec.raw(m.Caller("ops", 10, ("*",), admin=True)),
                    m.CallExtra(traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
                ),
            ),
        ),
    ),
    Vector(
        "outcomes_ok",
        "to_client",
        m.Outcomes(
            EPOCH,
            1,
            (
                m.Outcome(
                    FIRST, m.OK, payload.pack({"a": 2, "b": 1}), m.Usage(1_790_000_000_000, 184, 160, 31_744)
                ),
            ),
        ),
    ),
    Vector(
        "outcomes_error",
        "to_client",
        m.Outcomes(
            EPOCH,
            2,
            (
                m.Outcome(
                    SECOND,
                    "NOT_FOUND",
                    None,
                    None,
                    m.Fault(
                        "no tool 'text.wordcount'", False, payload.pack({"did_you_mean": ["text.word_count"]})
                    ),
                ),
            ),
        ),
    ),
    Vector(
        "outcomes_batch",
        "from_worker",
        m.Outcomes(
            EPOCH,
            64,
            (
                m.Outcome(FIRST, m.OK, payload.pack(None), m.Usage(1_790_000_000_001, 1, 0, 2**21)),
                m.Outcome(
                    SECOND,
                    "TOOL_FAILED",
                    None,
                    m.Usage(1_790_000_000_002, 65_536, 70_000, 2**21),
                    m.Fault("ValueError: no", False, m.EMPTY_DETAILS),
                ),
            ),
        ),
    ),
    Vector(
        "outcomes_stream",
        "from_worker",
        m.Outcomes(
            EPOCH,
            65,
            (m.Outcome(FIRST, m.OK, payload.pack(None), m.Usage(1_790_000_000_003, 9, 8, 2**21), None, 2),),
        ),
    ),
    Vector("outcomes_body", "to_client", m.Outcomes(EPOCH, 66, (m.Outcome(FIRST, m.OK),))),
    Vector("ack", "from_client", m.Ack(EPOCH, 64)),
    Vector("ack_worker", "to_worker", m.Ack(EPOCH, 2**53)),
    Vector("partial", "to_client", m.Partial(EPOCH, (m.Part(FIRST, 0, payload.pack(["row", 1])),))),
    Vector(
        "outcomes_zstd",
        "to_client",
        m.Outcomes(EPOCH, 67, (m.Outcome(FIRST, m.OK, ZSTD_EMPTY_MAP, encoding="zstd"),)),
    ),
    Vector("partial_zstd", "from_worker", m.Partial(EPOCH, (m.Part(FIRST, 0, ZSTD_EMPTY_MAP, "zstd"),))),
    Vector("partial_body", "from_worker", m.Partial(EPOCH, (m.Part(FIRST, 1, None),))),
    Vector(
        "progress",
        "to_client",
        m.Progresses(EPOCH, (m.Progress(FIRST, 0.25, "row 1 of 4"), m.Progress(SECOND, None))),
    ),
    Vector(
        "calls_upload",
        "from_client",
        m.Calls(
            EPOCH, 2, (m.Call(FIRST, "file.store", 30_000, payload.pack({}), m.CallExtra(upload="data")),)
        ),
    ),
    Vector(
        "chunks", "from_client", m.Chunks(EPOCH, (m.Chunk(FIRST, 0, b"abc"), m.Chunk(FIRST, 1, b"", True)))
    ),
    Vector("chunks_body", "to_worker", m.Chunks(EPOCH, (m.Chunk(SECOND, 7, None),))),
    Vector("credit_upload", "from_worker", m.Credit(EPOCH, (m.StreamCredit(FIRST, 16),))),
    Vector("credit", "from_client", m.Credit(EPOCH, (m.StreamCredit(FIRST, 24), m.StreamCredit(SECOND, 17)))),
    Vector("cancel", "from_client", m.Cancel(EPOCH, (FIRST, SECOND))),
    Vector("heartbeat", "to_client", m.Heartbeat(EPOCH)),
    Vector(
        "register",
        "from_worker",
        m.Register(
            0,
            m.PROTOCOL,
            (m.MAJOR,),
            (
                m.ToolDefinition(
                    name="text.word_count",
                    version="1.0.0",
                    description="Count the words of a text.",
                    parameters='{"type":"object"}',
                    capabilities=("text",),
                    idempotent=True,
                    timeout_s=5.0,
                ),
                m.ToolDefinition(
                    name="sql.query",
                    version="0.1.0-rc.1+b2",
                    capabilities=("sql",),
                    tags=("data",),
                    level=10,
                    streaming=True,
                ),
            ),
            (),
            "mcp-broker/0.1.0",
        ),
    ),
    Vector(
        "register_bounded",
        "from_worker",
        m.Register(
            0,
            m.PROTOCOL,
            (m.MAJOR,),
            (
                m.ToolDefinition(
                    name="web.fetch",
                    version="1.0.0",
                    capabilities=("web",),
                    concurrency_max=4,
                    rate_per_s=2.5,
                    burst=10,
                ),
            ),
        ),
    ),
    Vector(
        "register_held",
        "from_worker",
        m.Register(
            0,
            m.PROTOCOL,
            (m.MAJOR,),
            (),
            seq=7,
            held=(m.Held(FIRST, 7, "ada"), m.Held(SECOND, 6, "ada", "text.word_count", 60_000)),
            let_go_ms=1500,
        ),
    ),
    Vector("ready", "from_worker", m.Ready(EPOCH, 16)),
    Vector("drain", "to_worker", m.Drain(EPOCH)),
    Vector("hook", "to_worker", m.Hook(EPOCH, 3, "reset", "text.word_count")),
    Vector("hooked", "from_worker", m.Hooked(EPOCH, 3)),
    Vector("hooked_failed", "from_worker", m.Hooked(EPOCH, 4, "OSError: the folder is gone (text.py:12)")),
    Vector(
        "error",
        "to_client",
        m.Error(0, "UNSUPPORTED_VERSION", "this broker speaks 1", payload.pack({"supported": [1]}), True),
    ),
)


def as_json(value: Any) -> Any:
    """Turn a msgpack value into JSON: bytes become ``{"hex": ...}``."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    return value


def from_json(value: Any) -> Any:
    """Turn the JSON form back."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        return (
            bytes.fromhex(value["hex"])
            if value.keys() == {"hex"}
            else {k: from_json(v) for k, v in value.items()}
        )
    return value


def _pack(*fields: Any) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


def _tool(**changes: Any) -> bytes:
    tool = {"name": "a.b", "version": "1.0.0", "capabilities": ["x"], **changes}
    return _pack(
        "REGISTER", 0, "MCPB", [1], [{key: value for key, value in tool.items() if value is not None}]
    )


BEAT: Final = _pack("HEARTBEAT", EPOCH)
BAD: Final = "MALFORMED_FRAME"
UNKNOWN: Final = "UNKNOWN_KIND"
#: name, door, error code, bytes, and a unit to repeat (with its times) after them
INVALID: Final[tuple[tuple[str, str, str, bytes, bytes, int], ...]] = (
    # -- not msgpack, or not one value
    ("empty", "from_client", BAD, b"", b"", 0),
    ("truncated", "from_client", BAD, BEAT[:-1], b"", 0),
    ("trailing_byte", "from_client", BAD, BEAT + b"\x00", b"", 0),
    ("two_messages", "from_client", BAD, BEAT + BEAT, b"", 0),
    ("never_used_byte", "from_client", BAD, b"\x92\xa9HEARTBEAT\xc1", b"", 0),
    ("bad_utf8_kind", "from_client", BAD, b"\x92\xa2\xff\xfe\x00", b"", 0),
    ("bad_utf8_text", "from_client", BAD, b"\x93\xa7GOODBYE\x07\xa2\xff\xfe", b"", 0),
    ("announces_too_many_items", "from_client", BAD, b"\xdd\xff\xff\xff\xff\xa9HEARTBEAT\x00", b"", 0),
    ("announces_too_long_bytes", "from_client", BAD, b"\x94\xa5CALLS\x07\x00\x91\x94\xc6\xff\xff\xff\xff", b"", 0),
    # -- not a message
    ("map_instead_of_array", "from_client", BAD, msgpack.packb({"kind": "HEARTBEAT"}), b"", 0),
    ("empty_array", "from_client", BAD, b"\x90", b"", 0),
    ("kind_is_number", "from_client", BAD, _pack(5, EPOCH), b"", 0),
    ("kind_is_bytes", "from_client", BAD, _pack(b"HEARTBEAT", EPOCH), b"", 0),
    ("kind_of_no_protocol", "from_client", UNKNOWN, _pack("NOVEL", EPOCH), b"", 0),
    ("kind_in_lower_case", "from_client", UNKNOWN, _pack("hello", 0), b"", 0),
    ("worker_kind_from_client", "from_client", UNKNOWN, _pack("READY", EPOCH, 1), b"", 0),
    ("client_kind_from_worker", "from_worker", UNKNOWN, _pack("HELLO", 0, "MCPB", [1], TOKEN), b"", 0),
    ("broker_kind_from_client", "from_client", UNKNOWN, _pack("WELCOME", EPOCH), b"", 0),
    ("worker_kind_to_client", "to_client", UNKNOWN, _pack("DISPATCH", EPOCH, 0, []), b"", 0),
    # -- fields
    ("field_missing", "from_client", BAD, _pack("ACK", EPOCH), b"", 0),
    ("epoch_negative", "from_client", BAD, _pack("HEARTBEAT", -1), b"", 0),
    ("epoch_too_large", "from_client", BAD, _pack("HEARTBEAT", 2**53 + 1), b"", 0),
    ("epoch_is_float", "from_client", BAD, _pack("HEARTBEAT", 1.0), b"", 0),
    ("epoch_is_ext", "from_client", BAD, b"\x92\xa9HEARTBEAT\xd4\x05\x01", b"", 0),
    ("epoch_is_timestamp", "from_client", BAD, b"\x92\xa9HEARTBEAT\xd6\xff\x00\x00\x00\x01", b"", 0),
    ("no_majors", "from_client", BAD, _pack("HELLO", 0, "MCPB", [], TOKEN), b"", 0),
    ("too_many_majors", "from_client", BAD, _pack("HELLO", 0, "MCPB", list(range(17)), TOKEN), b"", 0),
    ("token_too_long", "from_client", BAD, _pack("RENEW", EPOCH, "x" * (limits.TOKEN_BYTES_MAX + 1)), b"", 0),
    ("reason_too_long", "from_client", BAD, _pack("GOODBYE", EPOCH, "x" * 257), b"", 0),
    ("session_id_short", "from_client", BAD, _pack("HELLO", 0, "MCPB", [1], TOKEN, bytes(15)), b"", 0),
    ("too_many_capabilities", "from_client", BAD, _pack("HELLO", 0, "MCPB", [1], TOKEN, None, ["x"] * 33), b"", 0),
    # -- items
    ("no_calls", "from_client", BAD, _pack("CALLS", EPOCH, 0, []), b"", 0),
    ("too_many_cancels", "from_client", BAD, _pack("CANCEL", EPOCH, [FIRST] * (limits.BATCH_MAX + 1)), b"", 0),
    ("call_id_short", "from_client", BAD, _pack("CANCEL", EPOCH, [bytes(15)]), b"", 0),
    ("call_id_long", "from_client", BAD, _pack("CANCEL", EPOCH, [bytes(17)]), b"", 0),
    ("call_id_is_text", "from_client", BAD, _pack("CANCEL", EPOCH, ["a" * 16]), b"", 0),
    ("call_short", "from_client", BAD, _pack("CALLS", EPOCH, 0, [[FIRST, "a.b", 1]]), b"", 0),
    ("tool_name_empty", "from_client", BAD, _pack("CALLS", EPOCH, 0, [[FIRST, "", 1, b"\x80"]]), b"", 0),
    ("tool_name_long", "from_client", BAD, _pack("CALLS", EPOCH, 0, [[FIRST, "x" * 129, 1, b"\x80"]]), b"", 0),
    ("timeout_zero", "from_client", BAD, _pack("CALLS", EPOCH, 0, [[FIRST, "a.b", 0, b"\x80"]]), b"", 0),
    ("timeout_over_a_day", "from_client", BAD, _pack("CALLS", EPOCH, 0, [[FIRST, "a.b", 86_400_001, b"\x80"]]), b"", 0),
    ("arguments_are_a_map", "from_client", BAD, _pack("CALLS", EPOCH, 0, [[FIRST, "a.b", 1, {}]]), b"", 0),
    ("extra_is_array", "from_client", BAD, _pack("CALLS", EPOCH, 0, [[FIRST, "a.b", 1, b"\x80", []]]), b"", 0),
    (
        "details_too_long",
        "to_client",
        BAD,
        _pack("OUTCOMES", EPOCH, 1, [[FIRST, "INTERNAL", None, None, ["", False, bytes(limits.DETAILS_BYTES_MAX + 1)]]]),
        b"",
        0,
    ),
    ("chunk_is_text", "from_client", BAD, _pack("CHUNKS", EPOCH, [[FIRST, 0, "abc"]]), b"", 0),
    ("no_chunks", "from_client", BAD, _pack("CHUNKS", EPOCH, []), b"", 0),
    ("chunk_to_client", "to_client", UNKNOWN, _pack("CHUNKS", EPOCH, [[FIRST, 0, b"abc"]]), b"", 0),
    ("progress_over_one", "from_worker", BAD, _pack("PROGRESS", EPOCH, [[FIRST, 1.5, ""]]), b"", 0),
    ("progress_not_a_number", "from_worker", BAD, _pack("PROGRESS", EPOCH, [[FIRST, float("nan"), ""]]), b"", 0),
    ("idle_timeout_zero", "from_client", BAD, _pack("CALLS", EPOCH, 0, [[FIRST, "a.b", 1, b"\x80", {"idle_timeout_ms": 0}]]), b"", 0),
    ("priority_three", "from_client", BAD, _pack("CALLS", EPOCH, 0, [[FIRST, "a.b", 1, b"\x80", {"priority": 3}]]), b"", 0),
    (
        "priority_is_text",
        "from_client",
        BAD,
        _pack("CALLS", EPOCH, 0, [[FIRST, "a.b", 1, b"\x80", {"priority": "high"}]]),
        b"",
        0,
    ),
    ("depth_too_large", "from_worker", BAD, _pack("READY", EPOCH, limits.WORKER_DEPTH_MAX + 1), b"", 0),
    # -- tool definitions
    ("tool_name_upper_case", "from_worker", BAD, _tool(name="Text.count"), b"", 0),
    ("tool_name_newline", "from_worker", BAD, _tool(name="a.b\n"), b"", 0),
    ("tool_name_empty_part", "from_worker", BAD, _tool(name="a..b"), b"", 0),
    ("tool_version_two_parts", "from_worker", BAD, _tool(version="1.0"), b"", 0),
    ("tool_without_capability", "from_worker", BAD, _tool(capabilities=[]), b"", 0),
    ("tool_without_name", "from_worker", BAD, _tool(name=None), b"", 0),
    ("tool_level_eleven", "from_worker", BAD, _tool(level=11), b"", 0),
    ("tool_timeout_not_a_number", "from_worker", BAD, _tool(timeout_s=float("nan")), b"", 0),
    ("tool_timeout_infinite", "from_worker", BAD, _tool(timeout_s=float("inf")), b"", 0),
    ("tool_concurrency_zero", "from_worker", BAD, _tool(concurrency_max=0), b"", 0),
    ("tool_rate_zero", "from_worker", BAD, _tool(rate_per_s=0.0), b"", 0),
    ("tool_burst_zero", "from_worker", BAD, _tool(burst=0), b"", 0),
    ("tool_key_is_number", "from_worker", BAD, _pack("REGISTER", 0, "MCPB", [1], [{1: 2}]), b"", 0),
    ("too_many_tools", "from_worker", BAD, _pack("REGISTER", 0, "MCPB", [1], [{}] * 257), b"", 0),
    # -- bombs
    ("nested_arrays_in_field", "from_client", BAD, b"\x99\xa5HELLO\x00\xa4MCPB\x91\x01\xa0\xc0", b"\x91", 100_000),
    ("nested_arrays_appended", "from_client", BAD, b"\x93\xa9HEARTBEAT\x07", b"\x91", 100_000),
    ("nested_maps_appended", "from_client", BAD, b"\x93\xa9HEARTBEAT\x07", b"\x81\xa1a", 80_000),
    ("nested_arrays_of_unknown_kind", "from_client", BAD, b"\x92\xa5NOVEL", b"\x91", 100_000),
    ("oversized", "from_client", BAD, b"\x93\xa9HEARTBEAT\x07\xc6\x00\x04\x00\x00", b"\x00", limits.ENVELOPE_BYTES_MAX),
)  # fmt: skip


def write(folder: Path) -> None:
    """Write every vector, and remove those that are no longer made."""
    folder.mkdir(parents=True, exist_ok=True)
    index = []
    for vector in VECTORS:
        frame = codec.encode(vector.message)
        lines = [frame[at : at + 32].hex() for at in range(0, len(frame), 32)]
        (folder / f"{vector.name}.hex").write_text("\n".join(lines) + "\n")
        value = as_json(msgpack.unpackb(frame))
        index.append(
            {"name": vector.name, "kind": m.kind_of(vector.message), "door": vector.door, "value": value}
        )
    for stray in folder.glob("*.hex"):
        if stray.stem not in {vector.name for vector in VECTORS}:
            stray.unlink()
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    invalid = []
    for name, door, code, head, unit, times in INVALID:
        entry: dict[str, Any] = {"name": name, "door": door, "error": code}
        # a long run of one byte is written as a run
        if not times and len(head) > 200 and head[-64:] == head[-1:] * 64:
            kept = head.rstrip(head[-1:])
            head, unit, times = kept, head[-1:], len(head) - len(kept)  # noqa: PLW2901
        entry["hex"] = head.hex()
        if times:
            entry["then"] = {"hex": unit.hex(), "times": times}
        invalid.append(entry)
    (folder / "invalid.json").write_text(json.dumps(invalid, indent=1) + "\n")


if __name__ == "__main__":
    write(FOLDER)
