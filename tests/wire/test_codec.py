"""Any bytes become a message or a wire error; any message becomes bytes and itself again."""

from __future__ import annotations

import itertools
import math
import struct
import time
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from mcp_broker import limits
from mcp_broker.errors import MalformedFrame, UnknownKind, WireError
from mcp_broker.wire import codec, messages, node
from tests.wire import strategies
from tests.wire.make_vectors import BEAT, CALLER, FIRST, VECTORS

DOORS: dict[str, tuple[codec.Decoder[Any], Any]] = {
    "from_client": (codec.from_client, messages.FromClient),
    "to_client": (codec.to_client, messages.ToClient),
    "from_worker": (codec.from_worker, messages.FromWorker),
    "to_worker": (codec.to_worker, messages.ToWorker),
    "from_supervisor": (codec.from_supervisor, node.FromSupervisor),
    "to_supervisor": (codec.to_supervisor, node.ToSupervisor),
}
KINDS = messages.AnyMessage.__args__
#: kind -> a door that takes it
OPEN_DOOR = {kind: door for door, union in reversed(DOORS.values()) for kind in union.__args__}

doors = st.sampled_from(sorted(DOORS))
#: what msgpack can say, legal here or not
anything = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.binary(max_size=40)),
        st.text(strategies.TEXT, max_size=40),
        st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=6), st.dictionaries(st.text(strategies.TEXT), inner, max_size=3)
    ),
    max_leaves=20,
)
kinds = st.sampled_from([messages.kind_of(kind) for door, union in DOORS.values() for kind in union.__args__])


def is_message_or_wire_error(door: str, frame: bytes) -> None:
    decoder, union = DOORS[door]
    try:
        message = decoder.decode(frame)
    except WireError as error:
        message, refusal = None, error
    if message is not None:
        assert isinstance(message, union.__args__)
    else:
        assert refusal.code in {"MALFORMED_FRAME", "UNKNOWN_KIND"}
        assert len(str(refusal)) <= limits.TEXT_CHARS_MAX


@given(doors, st.binary(max_size=300))
@example("from_client", b"\x92\xa1X\x81\x90\xc0")
@example("from_worker", b"\x93\xa5READY\x00\xca\x7f\xc0\x00\x00")
def test_any_bytes_become_a_message_or_a_wire_error(door: str, frame: bytes) -> None:
    is_message_or_wire_error(door, frame)


@given(doors, kinds, st.lists(anything, max_size=9))
def test_any_fields_behind_a_kind_become_a_message_or_a_wire_error(
    door: str, kind: str, fields: list[Any]
) -> None:
    is_message_or_wire_error(door, msgpack.packb([kind, *fields]))


@given(doors, st.sampled_from(VECTORS), st.data())
def test_mutated_message_becomes_a_message_or_a_wire_error(
    door: str, vector: Any, data: st.DataObject
) -> None:
    frame = bytearray(codec.encode(vector.message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(frame) - 1)))
        match data.draw(st.sampled_from(["set", "insert", "delete", "cut"])):
            case "set":
                frame[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "insert":
                frame[at:at] = data.draw(st.binary(min_size=1, max_size=5))
            case "delete":
                del frame[at : at + data.draw(st.integers(1, 8))]
            case _:
                del frame[at:]
    is_message_or_wire_error(door, bytes(frame))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_message_cut_anywhere_is_malformed(vector: Any) -> None:
    frame = codec.encode(vector.message)
    decoder, _ = DOORS[vector.door]
    for length in range(len(frame)):
        with pytest.raises(MalformedFrame):
            decoder.decode(frame[:length])


@pytest.mark.parametrize("kind", KINDS, ids=messages.kind_of)
def test_message_survives_the_wire(kind: type[msgspec.Struct]) -> None:
    @settings(max_examples=50)
    @given(strategies.struct(kind))
    def check(message: msgspec.Struct) -> None:
        frame = codec.encode(message)
        decoded = OPEN_DOOR[kind].decode(frame)
        assert type(decoded) is kind
        assert codec.encode(decoded) == frame
        if kind is not messages.Dispatches:  # its callers are packed, equal in bytes rather than as values
            assert decoded == message

    check()


@settings(max_examples=50)
@given(st.sampled_from(KINDS).flatmap(strategies.struct))
def test_message_is_what_another_codec_reads(message: msgspec.Struct) -> None:
    value = msgpack.unpackb(codec.encode(message), raw=False, strict_map_key=True)
    assert value[0] == messages.kind_of(message)
    assert len(value) == 1 + len(message.__struct_fields__)
    assert OPEN_DOOR[type(message)].decode(msgpack.packb(value)) == message


@pytest.mark.parametrize("name", DOORS)
def test_door_takes_its_own_kinds_only(name: str) -> None:
    decoder, union = DOORS[name]
    for vector in VECTORS:
        frame = codec.encode(vector.message)
        if isinstance(vector.message, union.__args__):
            assert type(decoder.decode(frame)) is type(vector.message)
        else:
            with pytest.raises(UnknownKind) as refused:
                decoder.decode(frame)
            assert refused.value.details == {"kind": messages.kind_of(vector.message)}


# -- bounds -----------------------------------------------------------------------------------------


def _bounded(kind: inspect.Type) -> list[tuple[Any, Any]]:
    """Return pairs of a value at a bound of the type, and the next one beyond it."""
    match kind:
        case inspect.Metadata():
            return _bounded(kind.type)
        case inspect.UnionType():
            return [pair for part in kind.types for pair in _bounded(part)]
        case inspect.IntType():
            assert kind.ge is not None
            assert kind.le is not None
            return [(kind.ge, kind.ge - 1), (kind.le, kind.le + 1)]
        case inspect.FloatType():
            return [(kind.le, (kind.le or 0) + 1), (kind.le, kind.gt)]
        case inspect.BytesType() | inspect.StrType():
            unit: Any = b"\x80" if isinstance(kind, inspect.BytesType) else "a"
            pairs = []
            if kind.min_length:
                pairs.append((unit * kind.min_length, unit * (kind.min_length - 1)))
            # what no envelope can hold is refused by the envelope's own bound
            if kind.max_length and kind.max_length < limits.ENVELOPE_BYTES_MAX:
                text = (
                    "1.0.0-"
                    if isinstance(kind, inspect.StrType) and (kind.pattern or "").startswith(r"^\d")
                    else ""
                )
                head = text or unit * 0
                pairs.append(
                    (head + unit * (kind.max_length - len(head)), head + unit * (kind.max_length + 1))
                )
            return pairs
        case inspect.VarTupleType():
            item = _legal(kind.item_type)
            pairs = [((item,) * kind.min_length, (item,) * (kind.min_length - 1))] if kind.min_length else []
            if kind.max_length:
                pairs.append(((item,) * kind.max_length, (item,) * (kind.max_length + 1)))
            return pairs
        case inspect.DictType():
            names = [f"n{number}" for number in range((kind.max_length or 0) + 1)]
            return [(dict.fromkeys(names[:-1], ()), dict.fromkeys(names, ()))]
        case _:
            return []


def _legal(kind: inspect.Type) -> Any:  # noqa: C901, PLR0911, PLR0912 (one return a type)
    match kind:
        case inspect.Metadata():
            return _legal(kind.type)
        case inspect.UnionType():
            return None
        case inspect.StructType():
            return smallest(kind.cls)
        case inspect.TupleType():
            return tuple(_legal(part) for part in kind.item_types)
        case inspect.BoolType():
            return False
        case inspect.RawType():
            return codec.raw(CALLER)
        case inspect.StrType() if kind.pattern:
            return "1.0.0" if kind.pattern.startswith(r"^\d") else "a"
        case inspect.VarTupleType() if not kind.min_length:
            return ()
        case inspect.DictType():
            return {}
        case inspect.IntType():
            return kind.ge
        case inspect.FloatType():
            return kind.le
        case inspect.BytesType():
            return bytes(kind.min_length or 0)
        case inspect.StrType():
            return "a" * (kind.min_length or 0)
        case inspect.VarTupleType():
            return (_legal(kind.item_type),) * (kind.min_length or 0)
        case _:
            raise AssertionError(kind)


def smallest(cls: type[msgspec.Struct]) -> msgspec.Struct:
    """Return a legal value, each field as small as may be."""
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    return cls(**{field.name: _legal(field.type) for field in info.fields})


ITEM_HOME: dict[type[msgspec.Struct], Any] = {
    messages.Call: lambda item: messages.Calls(1, 0, (item,)),
    messages.Dispatch: lambda item: messages.Dispatches(1, 0, (item,)),
    messages.Outcome: lambda item: messages.Outcomes(1, 1, (item,)),
    messages.Usage: lambda item: messages.Outcomes(1, 1, (messages.Outcome(FIRST, "OK", None, item),)),
    messages.Fault: lambda item: messages.Outcomes(1, 1, (messages.Outcome(FIRST, "X", None, None, item),)),
    messages.Part: lambda item: messages.Partial(1, (item,)),
    messages.StreamCredit: lambda item: messages.Credit(1, (item,)),
    messages.ToolDefinition: lambda item: messages.Register(0, "MCPB", (1,), (item,)),
    messages.GrantedLimits: lambda item: messages.Welcome(
        1, (1, 0), FIRST, resumed=False, name="", granted=item
    ),
}


def _bounds() -> list[Any]:
    cases = []
    for cls in (*KINDS, *ITEM_HOME):
        info = inspect.type_info(cls)
        assert isinstance(info, inspect.StructType)
        for field in info.fields:
            cases += [
                pytest.param(cls, field.name, inside, beyond, id=f"{cls.__name__}.{field.name}-{number}")
                for number, (inside, beyond) in enumerate(_bounded(field.type))
            ]
    return cases


@pytest.mark.parametrize(("cls", "name", "inside", "beyond"), _bounds())
def test_bound_is_enforced(cls: type[msgspec.Struct], name: str, inside: Any, beyond: Any) -> None:
    def decode(value: Any) -> Any:
        changed = msgspec.structs.replace(smallest(cls), **{name: value})
        message = ITEM_HOME[cls](changed) if cls in ITEM_HOME else changed
        return OPEN_DOOR[type(message)].decode(codec.encode(message))

    decode(inside)
    with pytest.raises(MalformedFrame):
        decode(beyond)


# -- size before sense --------------------------------------------------------------------------------


def test_only_registrations_may_be_longer_than_an_envelope() -> None:
    padding = limits.ENVELOPE_BYTES_MAX
    long_beat = b"\x93" + BEAT[1:] + b"\xc6" + padding.to_bytes(4, "big") + bytes(padding)
    with pytest.raises(MalformedFrame, match="limit of its kind"):
        codec.from_worker.decode(long_beat)


@pytest.mark.parametrize("name", DOORS)
def test_oversized_frame_is_refused_before_it_is_read(name: str) -> None:
    most = {
        "from_worker": limits.REGISTER_BYTES_MAX,
        "from_supervisor": limits.NODE_BYTES_MAX,
        "to_supervisor": limits.NODE_BYTES_MAX,
    }.get(name, limits.ENVELOPE_BYTES_MAX)

    class Unread(bytes):
        def __len__(self) -> int:
            return most + 1

    with pytest.raises(MalformedFrame) as refused:
        DOORS[name][0].decode(Unread(BEAT))
    assert refused.value.details == {"limit_bytes": most}
    if name in {"from_client", "to_client", "to_worker"}:
        padding = most - len(BEAT) - len(b"\xc6\x00\x00\x00\x00")
        full = b"\x93" + BEAT[1:] + b"\xc6" + padding.to_bytes(4, "big") + bytes(padding)
        assert len(full) == most
        assert DOORS[name][0].decode(full) == messages.Heartbeat(7)


def test_memoryview_decodes_like_bytes() -> None:
    assert codec.from_client.decode(memoryview(BEAT)) == messages.Heartbeat(7)
    with pytest.raises(UnknownKind):
        codec.from_client.decode(memoryview(msgpack.packb(["NOVEL"])))


def test_kinds_of_a_refusal_are_cut_to_size() -> None:
    with pytest.raises(UnknownKind) as refused:
        codec.from_client.decode(msgpack.packb(["X" * 100_000]))
    assert refused.value.details == {"kind": "X" * 32}


# -- records between our own processes --------------------------------------------------------------------


@given(strategies.struct(messages.Caller))
def test_caller_survives_being_packed(caller: messages.Caller) -> None:
    assert codec.decode_caller(codec.raw(caller)) == caller


def test_broken_records_are_malformed() -> None:
    with pytest.raises(MalformedFrame):
        codec.decode_caller(msgspec.Raw(b"\x90"))
    with pytest.raises(MalformedFrame):
        codec.decode_worker_boot(b"\x80")


def test_caller_of_bad_text_is_malformed() -> None:
    with pytest.raises(MalformedFrame):
        codec.decode_caller(msgspec.Raw(b"\x93\xa1\xff\x00\x90"))


def test_boot_record_of_any_depth_is_malformed() -> None:
    with pytest.raises(MalformedFrame):
        codec.decode_worker_boot(b"\x81\xa1a" + b"\x91" * 100_000)


def test_unknown_kind_is_told_without_building_its_fields() -> None:
    # keys whose hashes collide: a dict of them takes quadratic time
    floats = [math.ldexp(8.0, 61 * step) for step in (-2, -1, 0, 1)]
    packed = [b"\xca" + struct.pack(">f", value) for value in floats]
    keys = [b"\x98" + b"".join(key) for key in itertools.islice(itertools.product(packed, repeat=8), 6000)]
    frame = b"\x92\xa5NOVEL\xdf" + len(keys).to_bytes(4, "big") + b"".join(key + b"\xc0" for key in keys)
    began = time.process_time()
    with pytest.raises(UnknownKind):
        codec.from_client.decode(frame)
    assert time.process_time() - began < 0.05


def test_plain_form_fills_in_defaults_and_keeps_bytes() -> None:
    plain = codec.as_plain(messages.Call(FIRST, "a.b", 1, b"\x80"))
    assert plain == [FIRST, "a.b", 1, b"\x80", None]
    limits_ = codec.as_plain(messages.GrantedLimits(window=1, heartbeat_ms=2))
    assert isinstance(limits_, dict)
    assert limits_["batch"] == limits.BATCH_MAX
