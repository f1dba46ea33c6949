"""An argument that is read in chunks while it comes: a parameter annotated :class:`ByteStream`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Self

from pydantic_core import core_schema

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler

#: gives the next bytes; none at the end
Read = Callable[[], bytes]
ReadLater = Callable[[], Awaitable[bytes]]


class ByteStream:
    """The bytes of one argument, which its caller gives as a file, as an iterator of bytes, or as bytes.

    Iterate over it (``for`` or ``async for``) for chunks of at most 256 KiB as they come, or :meth:`read` it like a file.
    Only a few chunks are ahead of what is read, so its length does not matter. A synchronous tool reads it in the thread
    that it was called in. Leaving it unread is fine: the caller then stops sending when the call ends.

    Args:
        source: for tests and direct calls: bytes, or chunks of them.
    """

    def __init__(self, source: bytes | Iterable[bytes] = ()) -> None:
        chunks = iter((source,) if isinstance(source, bytes) else source)
        self._next: Read = lambda: next((chunk for chunk in chunks if chunk), b"")
        self._later: ReadLater | None = None
        self._rest = b""

    @classmethod
    def over(cls, read: Read, later: ReadLater | None) -> ByteStream:
        """Make a stream of what comes from elsewhere."""
        made = cls()
        made._next = read
        made._later = later
        return made

    def read(self, size: int = -1) -> bytes:
        """Return the next ``size`` bytes, fewer only at the end; all that is left if it is negative."""
        parts = [self._rest]
        have = len(self._rest)
        while (size < 0 or have < size) and (chunk := self._next()):
            parts.append(chunk)
            have += len(chunk)
        whole = b"".join(parts)
        self._rest = whole[size:] if size >= 0 else b""
        return whole[:size] if size >= 0 else whole

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        chunk, self._rest = self._rest or self._next(), b""
        if not chunk:
            raise StopIteration
        return chunk

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        chunk, self._rest = self._rest, b""
        if not chunk:
            chunk = await self._later() if self._later is not None else self._next()
        if not chunk:
            raise StopAsyncIteration
        return chunk

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: GetCoreSchemaHandler) -> Any:
        return core_schema.no_info_plain_validator_function(_checked)

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: Any, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "format": "byte-stream"}


def _checked(value: Any) -> ByteStream:
    if isinstance(value, ByteStream):
        return value
    if isinstance(value, bytes):
        return ByteStream(value)
    raise ValueError("bytes, or a file or an iterator of bytes that is sent in chunks")
