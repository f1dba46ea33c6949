"""``@tool``: a typed Python function becomes a tool that callers find, understand and call."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import json
import typing
from collections.abc import Callable
from typing import Any, Final, Generic, ParamSpec, TypeVar, overload

from pydantic import TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUserError

from mcp_broker import limits
from mcp_broker.errors import WireError
from mcp_broker.wire import codec, messages, tether
from mcp_broker.wire.tether import Asks
from mcp_broker.worker.arguments import Arguments, hints_of, type_text

P = ParamSpec("P")
R = TypeVar("R")

#: what a generator function may say it returns; the first type argument is the part's type
_STREAMS: Final = (
    collections.abc.Iterator,
    collections.abc.Iterable,
    collections.abc.Generator,
    collections.abc.AsyncIterator,
    collections.abc.AsyncIterable,
    collections.abc.AsyncGenerator,
)


#: every tool of this process in the order of making, also those whose name in their module was taken by a later one
made: list[Tool[..., Any]] = []


class Tool(Generic[P, R]):
    """A function with a name, schemas and limits; calling it calls the function.

    Attributes:
        definition: what the worker registers.
        arguments: the checked description of what it takes.
        is_async: the function is a coroutine function or an asynchronous generator.
        is_streaming: it is a generator of either kind.
        result: converts results of the annotated type.
        recovers: an exception that it raises is a fault of its process.
    """

    def __init__(self, function: Callable[P, R], **settings: Any) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        made.append(self)
        name = settings.pop("name") or function.__name__
        hints = hints_of(function)
        self.arguments = Arguments(function, hints, name)
        self.is_streaming = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
        returned = _returned(hints.get("return", Any), streaming=self.is_streaming)
        self.result: TypeAdapter[Any] = _adapter(returned, name)
        description = inspect.cleandoc(function.__doc__ or "")
        capabilities = tuple(settings.pop("capabilities")) or (name.partition(".")[0],)
        timeout_s = settings.pop("timeout_s")
        self.recovers: bool = settings.pop("recover")
        #: limits that its worker has to be allowed; 0: the usual one
        self.asks = _checked_asks(name, {limit: settings.pop(limit) or 0 for limit in Asks.__struct_fields__})
        self.definition = _checked(
            messages.ToolDefinition(
                name=name,
                description=_shortened(description),
                parameters=json.dumps(self.arguments.schema, ensure_ascii=False),
                returns=json.dumps(_result_schema(self.result, returned, name), ensure_ascii=False),
                capabilities=capabilities,
                streaming=self.is_streaming,
                timeout_s=limits.CALL_TIMEOUT_S if timeout_s is None else timeout_s,
                tags=tuple(settings.pop("tags")),
                **settings,
            )
        )

    @property
    def name(self) -> str:
        """The name under which it is called."""
        return self.definition.name

    @property
    def summary(self) -> str:
        """The first paragraph of the description, on one line."""
        return " ".join(self.definition.description.partition("\n\n")[0].split())

    @property
    def signature(self) -> str:
        """``word_count(text: str, top: int = 10)``."""
        return self.arguments.signature

    def validate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Check a call's arguments and return the keyword arguments of the function.

        Raises:
            InvalidArgument: see :meth:`mcp_broker.worker.arguments.Arguments.validate`.
        """
        return self.arguments.validate(arguments)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function itself, unchecked."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<tool {self.name} {self.definition.version}>"


@overload
def tool(function: Callable[P, R], /) -> Tool[P, R]: ...


@overload
def tool(
    *,
    name: str | None = None,
    version: str = "1.0.0",
    idempotent: bool = False,
    timeout_s: float | None = None,
    level: int = 0,
    capabilities: tuple[str, ...] = (),
    tags: tuple[str, ...] = (),
    category: str = "",
    concurrency_max: int | None = None,
    rate_per_s: float | None = None,
    burst: int | None = None,
    memory_mb: int | None = None,
    cpu_s: float | None = None,
    open_files: int | None = None,
    connections: int | None = None,
    recover: bool = False,
) -> Callable[[Callable[P, R]], Tool[P, R]]: ...


def tool(  # noqa: PLR0913 (one keyword a field of the definition)
    function: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    version: str = "1.0.0",
    idempotent: bool = False,
    timeout_s: float | None = None,
    level: int = 0,
    capabilities: tuple[str, ...] = (),
    tags: tuple[str, ...] = (),
    category: str = "",
    concurrency_max: int | None = None,
    rate_per_s: float | None = None,
    burst: int | None = None,
    memory_mb: int | None = None,
    cpu_s: float | None = None,
    open_files: int | None = None,
    connections: int | None = None,
    recover: bool = False,
) -> Tool[P, R] | Callable[[Callable[P, R]], Tool[P, R]]:
    """Make a tool of a function: plain, ``async``, or a generator of either kind, which streams its parts.

    Args:
        function: the function, when used without parentheses.
        name: dotted lower-case name, ``text.word_count``; the function's name if absent.
        version: semantic version.
        idempotent: it may run again for the same call, after its worker died.
        timeout_s: a call's timeout where its caller names none, seconds (30).
        level: clearance that a caller needs, 0 to 10.
        capabilities: what callers look for; the first part of the name if absent.
        tags: labels for people.
        category: one heading for lists.
        concurrency_max: how many of its calls the pool's workers hold at a time, all together; others wait.
        rate_per_s: calls of it a second, all callers together; a caller beyond it gets RATE_LIMITED.
        burst: of these, calls at once after a pause; one second's calls if absent.
        memory_mb: what its worker has to be allowed above what it held when it was ready, MiB, at most 500; the worker
            has the most that one of its tools asks for, unless the operator's configuration says otherwise.
        cpu_s: of one call, seconds, at most 120; so with it.
        open_files: at most 200; so with them.
        connections: at most 50; so with them.
        recover: an exception that it raises is a fault of its process: an idempotent call runs again, and the tool is
            recovered. Without it an exception is an answer like any other.

    What the function raises ends its call, and its worker lives on. Of the errors in :mod:`mcp_broker.worker`, these reach
    the caller as they are, with their details:

    - ``InvalidArgument``: a value that fits the schema is still none that the tool can take.
    - ``NotFound``: there is nothing of that name.
    - ``ResourceExhausted``, ``PayloadTooLarge``: a bound of the tool's own is reached; ``details["limit"]`` names it.
    - ``Cancelled``, ``DeadlineExceeded``: what :meth:`ToolContext.check_cancelled` raises, let pass.

    A ``MemoryError`` or ``OSError`` that is surely about a limit of the worker becomes RESOURCE_EXHAUSTED too. Every other
    exception, also another of the broker's own and ``SystemExit``, is TOOL_FAILED for the caller, with its type, message,
    file and line.

    Raises:
        TypeError: the function or a setting cannot make a tool (its author's fault).
    """

    def decorate(target: Callable[P, R]) -> Tool[P, R]:
        return Tool(
            target,
            name=name,
            version=version,
            idempotent=idempotent,
            timeout_s=timeout_s,
            level=level,
            capabilities=capabilities,
            tags=tags,
            category=category,
            concurrency_max=concurrency_max,
            rate_per_s=rate_per_s,
            burst=burst,
            memory_mb=memory_mb,
            cpu_s=cpu_s,
            open_files=open_files,
            connections=connections,
            recover=recover,
        )

    return decorate if function is None else decorate(function)


def _returned(hint: Any, *, streaming: bool) -> Any:
    """Return the type of the result, or of one part of a stream."""
    if streaming and typing.get_origin(hint) in _STREAMS:
        return (typing.get_args(hint) or (Any,))[0]
    return Any if streaming else hint


def _adapter(returned: Any, name: str) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(returned)
    except PydanticUserError as error:
        raise TypeError(
            f"{name}: a result of type {type_text(returned)} cannot be described: {error}"
        ) from error


def _result_schema(adapter: TypeAdapter[Any], returned: Any, name: str) -> dict[str, Any]:
    try:
        return adapter.json_schema(mode="serialization")
    except PydanticInvalidForJsonSchema as error:
        raise TypeError(
            f"{name}: a result of type {type_text(returned)} has no JSON Schema: {error}"
        ) from error


def _shortened(text: str) -> str:
    return text if len(text) <= limits.TEXT_CHARS_MAX else text[: limits.TEXT_CHARS_MAX - 1] + "…"


def _checked_asks(name: str, asks: dict[str, Any]) -> Asks:
    """Read them as the supervisor will."""
    made = Asks(**asks)
    try:
        tether.from_worker.decode(codec.encode(made))
    except WireError as error:
        why = str(error).removeprefix("not a message of this protocol: ")
        raise TypeError(f"tool {name!r} asks for a limit that it cannot have: {why}") from error
    return made


def _checked(definition: messages.ToolDefinition) -> messages.ToolDefinition:
    """Read the definition as the broker will, so that its author hears of a fault, not the operator."""
    register = messages.Register(
        epoch=0, protocol=messages.PROTOCOL, majors=(messages.MAJOR,), tools=(definition,)
    )
    try:
        codec.from_worker.decode(codec.encode(register))
    except WireError as error:
        why = str(error).removeprefix("not a message of this protocol: ").replace("`$[4][0].", "`")
        raise TypeError(f"tool {definition.name!r} cannot be registered: {why}") from error
    return definition
