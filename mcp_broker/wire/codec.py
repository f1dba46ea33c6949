"""Messages to bytes and back, with every bound checked before a value exists.

One decoder a socket and direction is the op table of that door: a kind that is not in its union does not
decode, whatever the sender's rights. Source: docs/protocol.md, "Frames" and "Messages".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import msgspec

from mcp_broker import limits
from mcp_broker.errors import MalformedFrame, UnknownKind, WireError
from mcp_broker.wire import messages, node

T_co = TypeVar("T_co", covariant=True)

#: what msgspec raises for bytes that are not of a type
_BROKEN: Final = (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError)

#: what it raises for values that are not of a type, or cannot be sent at all
_UNFIT: Final = (*_BROKEN, TypeError, ValueError)

#: One encoder for all: it keeps no state between messages.
encode: Final[Callable[[msgspec.Struct], bytes]] = msgspec.msgpack.Encoder().encode


class Decoder(Generic[T_co]):
    """Decodes what may arrive at one door.

    Args:
        union: the messages of this socket and direction.
        bytes_max: frames above it are refused unread.
        long_kind: the one message that may exceed ENVELOPE_BYTES_MAX, where ``bytes_max`` is more than that.
    """

    def __init__(
        self, union: object, bytes_max: int = limits.ENVELOPE_BYTES_MAX, long_kind: type | None = None
    ) -> None:
        self._decode: Callable[[bytes | memoryview], T_co] = msgspec.msgpack.Decoder(union).decode
        self._bytes_max = bytes_max
        self._long_kind = long_kind

    def decode(self, frame: bytes | memoryview) -> T_co:
        """Turn one frame into a message.

        Raises:
            UnknownKind: a message of another door, or of a later protocol (answered, not dropped).
            MalformedFrame: not a message, or one of its bounds is broken (the peer's fault).
        """
        if len(frame) > self._bytes_max:
            raise MalformedFrame(
                f"an envelope of {len(frame)} bytes; the limit is {self._bytes_max}",
                {"limit_bytes": self._bytes_max},
            )
        try:
            message = self._decode(frame)
        except _BROKEN as error:
            raise _explain(bytes(frame), error) from error
        if (
            self._long_kind is not None
            and len(frame) > limits.ENVELOPE_BYTES_MAX
            and type(message) is not self._long_kind
        ):
            raise MalformedFrame(
                f"an envelope of {len(frame)} bytes; the limit of its kind is {limits.ENVELOPE_BYTES_MAX}",
                {"limit_bytes": limits.ENVELOPE_BYTES_MAX},
            )
        return message


_parts_decoder: Final = msgspec.msgpack.Decoder(list[msgspec.Raw])
_text_decoder: Final = msgspec.msgpack.Decoder(str)
_KINDS: Final = frozenset(messages.kind_of(kind) for kind in messages.AnyMessage.__args__)


def _explain(frame: bytes, error: Exception) -> WireError:
    """Tell an unknown kind from a broken message; only ever called for frames that did not decode."""
    if isinstance(error, msgspec.ValidationError) and str(error).endswith("at `$[0]`"):
        try:
            # the fields are skipped, not built: a stranger may have sent anything in them
            kind = _text_decoder.decode(_parts_decoder.decode(frame)[0])[:32]
        except (*_BROKEN, IndexError):
            return MalformedFrame(f"not a message of this protocol: {error}"[:500])
        known = "not taken at this socket" if kind in _KINDS else "unknown"
        return UnknownKind(f"the kind {kind!r} is {known}", {"kind": kind})
    return MalformedFrame(f"not a message of this protocol: {error}"[:500])


#: What each door takes.
from_client: Final[Decoder[messages.FromClient]] = Decoder(messages.FromClient)
to_client: Final[Decoder[messages.ToClient]] = Decoder(messages.ToClient)
from_worker: Final[Decoder[messages.FromWorker]] = Decoder(
    messages.FromWorker, limits.REGISTER_BYTES_MAX, messages.Register
)
to_worker: Final[Decoder[messages.ToWorker]] = Decoder(messages.ToWorker)
from_supervisor: Final[Decoder[node.FromSupervisor]] = Decoder(node.FromSupervisor, limits.NODE_BYTES_MAX)
to_supervisor: Final[Decoder[node.ToSupervisor]] = Decoder(node.ToSupervisor, limits.NODE_BYTES_MAX)

_caller_decoder: Final = msgspec.msgpack.Decoder(messages.Caller)
_worker_boot_decoder: Final = msgspec.msgpack.Decoder(node.WorkerBoot)


_majors_decoder: Final = msgspec.msgpack.Decoder(tuple[int, ...])
#: places of HELLO and REGISTER that are the same in every version: kind, epoch, protocol, majors
_FIXED_PLACES: Final = 4


def foreign_majors(frame: bytes | memoryview) -> tuple[int, ...] | None:
    """Return the versions that a HELLO or REGISTER offers which this version cannot decode, if ours is not among them.

    Another version may have changed everything behind the fourth place; None means that the frame is simply broken.
    """
    try:
        parts = _parts_decoder.decode(frame)
        if len(parts) < _FIXED_PLACES or _text_decoder.decode(parts[0]) not in {"HELLO", "REGISTER"}:
            return None
        if _text_decoder.decode(parts[2]) != messages.PROTOCOL:
            return None
        majors = _majors_decoder.decode(parts[3])
    except _BROKEN:
        return None
    return None if messages.MAJOR in majors else majors


#: an item that is packed already
Raw = msgspec.Raw


def raw(item: msgspec.Struct) -> msgspec.Raw:
    """Pack an item once, to be embedded in many messages."""
    return msgspec.Raw(encode(item))


def decode_caller(packed: msgspec.Raw) -> messages.Caller:
    """Unpack a dispatch's caller.

    Raises:
        MalformedFrame: our broker's bug.
    """
    try:
        return _caller_decoder.decode(packed)
    except _BROKEN as error:
        raise MalformedFrame(f"not a caller: {error}") from error


def decode_worker_boot(packed: bytes) -> node.WorkerBoot:
    """Unpack what a supervisor hands a new worker.

    Raises:
        MalformedFrame: our supervisor's bug, or a worker started by hand.
    """
    try:
        return _worker_boot_decoder.decode(packed)
    except _BROKEN as error:
        raise MalformedFrame(f"not a worker's boot record: {error}") from error


def check_fields(item: msgspec.Struct) -> None:
    """Hold an item or record to its bounds, as its receiver will.

    Raises:
        MalformedFrame: one is broken; the text begins with the field's name.
    """
    try:
        msgspec.msgpack.decode(encode(item), type=type(item))
    except _UNFIT as error:
        raise MalformedFrame((_unfit_field(item) or str(error))[:500]) from error


def _unfit_field(item: msgspec.Struct) -> str:
    """Name the first field that does not fit, and say why. A hundred times as slow as all together."""
    for field in msgspec.structs.fields(item):
        try:
            msgspec.msgpack.decode(msgspec.msgpack.encode(getattr(item, field.name)), type=field.type)
        except _UNFIT as error:
            return f"{field.name}: {error}"
    return ""


def as_plain(value: Any) -> Any:  # noqa: ANN401 (any record, item or field)
    """Turn records into maps and items into lists, defaults filled in, for payloads and JSON; bytes stay bytes."""
    if isinstance(value, msgspec.Struct):
        names = value.__struct_fields__
        if value.__struct_config__.array_like:
            return [as_plain(getattr(value, name)) for name in names]
        return {name: as_plain(getattr(value, name)) for name in names}
    if isinstance(value, tuple | list):
        return [as_plain(item) for item in value]
    return value
