"""``@tool``: a typed Python function becomes a tool that callers find, understand and call."""

from __future__ import annotations

import collections.abc
import difflib
import functools
import inspect
import json
import types
import typing
from collections.abc import Callable
from typing import Any, Final, Generic, ParamSpec, TypedDict, TypeVar, Unpack, overload

from pydantic import TypeAdapter
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUserError

from mcp_broker import limits
from mcp_broker.errors import MalformedFrame
from mcp_broker.wire import codec, messages
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


class ToolSettings(TypedDict, total=False):
    """What may be said of a tool; :func:`tool` says what each means, and :data:`DEFAULTS` what it is when left out."""

    name: str | None
    version: str
    idempotent: bool
    timeout_s: float | None
    level: int
    capabilities: tuple[str, ...]
    tags: tuple[str, ...]
    category: str
    concurrency_max: int | None
    rate_per_s: float | None
    burst: int | None
    memory_mb: int | None
    cpu_s: float | None
    open_files: int | None
    connections: int | None
    recover: bool


DEFAULTS: Final[ToolSettings] = {
    "name": None,
    "version": "1.0.0",
    "idempotent": False,
    "timeout_s": None,
    "level": 0,
    "capabilities": (),
    "tags": (),
    "category": "",
    "concurrency_max": None,
    "rate_per_s": None,
    "burst": None,
    "memory_mb": None,
    "cpu_s": None,
    "open_files": None,
    "connections": None,
    "recover": False,
}

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
        code: of the function that its author wrote, under what wraps it.
    """

    def __init__(self, function: Callable[P, R], /, **settings: Unpack[ToolSettings]) -> None:
        for setting in settings:
            if setting not in DEFAULTS:
                raise TypeError(f"tool() has no setting {setting!r}; {_instead(setting)}")
        self.code = _code(function)
        known: ToolSettings = {**DEFAULTS, **settings}
        functools.update_wrapper(self, function)
        self.function = function
        made.append(self)
        name = known["name"] or function.__name__
        hints = hints_of(function)
        self.arguments = Arguments(function, hints, name)
        self.is_streaming = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
        self.is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
        returned = _returned(hints.get("return", Any), streaming=self.is_streaming)
        self.result: TypeAdapter[Any] = _adapter(returned, name)
        self.recovers = known["recover"]
        #: limits that its worker has to be allowed; 0: the usual one
        self.asks = Asks(
            memory_mb=known["memory_mb"] or 0,
            cpu_s=known["cpu_s"] or 0,
            open_files=known["open_files"] or 0,
            connections=known["connections"] or 0,
        )
        _check(self.asks, f"tool {name!r} asks for a limit that it cannot have")
        timeout_s = known["timeout_s"]
        self.definition = messages.ToolDefinition(
            name=name,
            version=known["version"],
            description=_shortened(inspect.cleandoc(function.__doc__ or "")),
            parameters=json.dumps(self.arguments.schema, ensure_ascii=False),
            returns=json.dumps(_result_schema(self.result, returned, name), ensure_ascii=False),
            capabilities=tuple(known["capabilities"]) or (name.partition(".")[0],),
            tags=tuple(known["tags"]),
            category=known["category"],
            level=known["level"],
            idempotent=known["idempotent"],
            streaming=self.is_streaming,
            timeout_s=limits.CALL_TIMEOUT_S if timeout_s is None else timeout_s,
            concurrency_max=known["concurrency_max"],
            rate_per_s=known["rate_per_s"],
            burst=known["burst"],
        )
        _check(self.definition, f"tool {name!r} cannot be registered")

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
def tool(**settings: Unpack[ToolSettings]) -> Callable[[Callable[P, R]], Tool[P, R]]: ...


def tool(
    function: Callable[P, R] | None = None, /, **settings: Unpack[ToolSettings]
) -> Tool[P, R] | Callable[[Callable[P, R]], Tool[P, R]]:
    """Make a tool of a function: plain, ``async``, or a generator of either kind, which streams its parts.

    Args:
        function: the function, when used without parentheses.

    Settings, each with what it is when it is left out:

    - ``name``: dotted lower-case name, ``text.word_count`` (the function's name).
    - ``version``: semantic version ("1.0.0").
    - ``idempotent``: it may run again for the same call, after its worker died (False).
    - ``timeout_s``: a call's timeout where its caller names none, seconds (30).
    - ``level``: clearance that a caller needs, 0 to 10 (0).
    - ``capabilities``: what callers look for (the first part of the name).
    - ``tags``: labels for people (none).
    - ``category``: one heading for lists (none).
    - ``concurrency_max``: how many of its calls the pool's workers hold at a time, all together; others wait (no bound).
    - ``rate_per_s``: calls of it a second, all callers together; a caller beyond it gets RATE_LIMITED (no bound).
    - ``burst``: of these, calls at once after a pause (one second's calls).
    - ``memory_mb``: what its worker has to be allowed above what it held when it was ready, MiB, at most 500; the worker
      has the most that one of its tools asks for, unless the operator's configuration says otherwise (the usual).
    - ``cpu_s``: of one call, seconds, at most 120; so with it (the usual).
    - ``open_files``: at most 200; so with them (the usual).
    - ``connections``: at most 50; so with them (the usual).
    - ``recover``: an exception that it raises is a fault of its process: an idempotent call runs again, and the tool is
      recovered. Without it an exception is an answer like any other (False).

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
        return Tool(target, **settings)

    return decorate if function is None else decorate(function)


def _code(function: Callable[..., Any]) -> types.CodeType:
    """Return the code of what was decorated."""
    code = None if isinstance(function, Tool) else getattr(inspect.unwrap(function), "__code__", None)
    if isinstance(code, types.CodeType):
        return code
    kind = "a tool already" if isinstance(function, Tool) else f"of type {type(function).__name__}"
    raise TypeError(
        f"@tool stands over a function, and {function!r} is {kind}; write a function that calls it"
    )


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


def _check(told: messages.ToolDefinition | Asks, otherwise: str) -> None:
    """Read a definition or a wish as its receiver will, so that its author hears of a fault, not the operator."""
    try:
        codec.check_fields(told)
    except MalformedFrame as error:
        raise TypeError(f"{otherwise}: {error}") from None


def _instead(setting: str) -> str:
    near = difflib.get_close_matches(setting, DEFAULTS, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(DEFAULTS)}"
