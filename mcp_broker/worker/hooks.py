"""``@on``: what a module wants to do when its worker or one of its tools comes, goes, pauses, or is called.

::

    @on("start")                      once in each worker, before it takes calls
    def connect() -> None: ...

    @on("reset", word_count)          when recovery, or an operator, wants this tool's state dropped
    def forget() -> None: ...

    @on("before")                     around every call of the module's tools
    def note(tool: str, arguments: dict[str, Any]) -> None: ...

Hooks run in the worker's one thread, between two calls or around one, in the order of their definition. A plain function; a
coroutine function cannot be a hook.

==============  ==========================  =====================================================================
event           arguments                   one that raises
==============  ==========================  =====================================================================
start           none                        the worker does not come up; of one tool: the tool is an ERROR
stop            none                        is written to standard error, and noted
reset           none                        the worker is replaced instead
pause           none                        is noted; the tool is paused all the same
resume          none                        the tool is an ERROR
activate        none                        is noted
deactivate      none                        is noted
before          tool, arguments             the call ends so, and is not run
after           tool, arguments, result     the call ends so; of a stream the result is None
error           tool, arguments, error      is written to standard error; the call ends with its own error
==============  ==========================  =====================================================================
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mcp_broker.wire.structs import Slim
from mcp_broker.worker import forks
from mcp_broker.worker.interrupts import CallInterrupted
from mcp_broker.worker.outcomes import shown

if TYPE_CHECKING:
    from mcp_broker.worker.tool import Tool

F = TypeVar("F", bound=Callable[..., Any])

#: what the broker may have run, for one tool
LIFE: Final = frozenset({"start", "stop", "reset", "pause", "resume", "activate", "deactivate"})
#: what happens around calls
CALLS: Final = frozenset({"before", "after", "error"})


class Hook(Slim):
    """One function and when it is to run; no tools: for all of its module."""

    event: str
    function: Callable[..., Any]
    tools: frozenset[str]


#: every hook of this process, in the order of making
made: list[Hook] = []


def on(event: str, *tools: Tool[..., Any] | str) -> Callable[[F], F]:
    """Have a function run at an event.

    Args:
        event: see the module.
        tools: of which tools of this module, as they are or by name; of all, if none is named.

    Raises:
        TypeError: there is no such event, or the function cannot be a hook (its author's fault).
    """
    if event not in LIFE | CALLS:
        raise TypeError(f"there is no event {event!r}; there are {', '.join(sorted(LIFE | CALLS))}")
    names = frozenset(one if isinstance(one, str) else one.name for one in tools)

    def decorate(function: F) -> F:
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function.__name__}: a hook is a plain function, not an asynchronous one")
        made.append(Hook(event, function, names))
        return function

    return decorate


class Hooks:
    """The hooks of one module."""

    def __init__(self, hooks: list[Hook]) -> None:
        self._hooks = hooks

    @classmethod
    def of(cls, module: str) -> Hooks:
        """Collect what a module made."""
        return cls([hook for hook in made if hook.function.__module__ == module])

    def events(self, tool: str) -> tuple[str, ...]:
        """Return what the broker may have run for a tool, sorted."""
        return tuple(sorted({hook.event for hook in self._for(tool) if hook.event in LIFE}))

    def traits(self, tool: Tool[..., Any]) -> tuple[str, ...]:
        """Return what REGISTER says of a tool besides its definition."""
        return (*self.events(tool.name), *(("recover",) if tool.recovers else ()))

    def unknown(self, tools: set[str]) -> set[str]:
        """Return the names of tools that hooks are for, and that are none of these."""
        return {name for hook in self._hooks for name in hook.tools} - tools

    def _for(self, tool: str, event: str | None = None) -> Iterator[Hook]:
        for hook in self._hooks:
            if (not hook.tools or tool in hook.tools) and event in {None, hook.event}:
                yield hook

    def run(self, event: str, tool: str) -> str:
        """Run a tool's hooks for an event; return what the first one that failed raised, or ""."""
        return _run([hook.function for hook in self._for(tool, event)])

    def begin(self) -> None:
        """Run every start hook; the first one that fails keeps the worker from coming up."""
        for hook in self._hooks:
            if hook.event == "start":
                with forks.contained():
                    hook.function()

    def end(self) -> None:
        """Run every stop hook, whatever the others do."""
        error = _run([hook.function for hook in self._hooks if hook.event == "stop"])
        if error:
            _say(f"a stop hook failed: {error}")

    def around(self, tool: Tool[..., Any]) -> Callable[..., Any]:
        """Return a tool's function with its hooks around it, or the function itself if it has none."""
        before = [hook.function for hook in self._for(tool.name, "before")]
        after = [hook.function for hook in self._for(tool.name, "after")]
        error = [hook.function for hook in self._for(tool.name, "error")]
        if not before and not after and not error:
            return tool.function
        return Around(tool, before, after, error).wrapped()


class Around:
    """The hooks around one tool's calls."""

    def __init__(
        self,
        tool: Tool[..., Any],
        before: list[Callable[..., Any]],
        after: list[Callable[..., Any]],
        error: list[Callable[..., Any]],
    ) -> None:
        self._tool = tool
        self._before, self._after, self._error = before, after, error

    def wrapped(self) -> Callable[..., Any]:
        """Return a function of the same kind."""
        function = self._tool.function
        if inspect.isasyncgenfunction(function):
            return functools.partial(self._async_stream, function)
        if inspect.isgeneratorfunction(function):
            return functools.partial(self._stream, function)
        if inspect.iscoroutinefunction(function):
            return functools.partial(self._coroutine, function)
        return functools.partial(self._call, function)

    def _call(self, function: Callable[..., Any], /, **arguments: Any) -> Any:
        self._begin(arguments)
        try:
            with forks.contained():
                result = function(**arguments)
        except Exception as error:
            self._failed(arguments, error)
            raise
        self._end(arguments, result)
        return result

    async def _coroutine(self, function: Callable[..., Any], /, **arguments: Any) -> Any:
        self._begin(arguments)
        try:
            with forks.contained():
                result = await function(**arguments)
        except Exception as error:
            self._failed(arguments, error)
            raise
        self._end(arguments, result)
        return result

    def _stream(self, function: Callable[..., Any], /, **arguments: Any) -> Iterator[Any]:
        self._begin(arguments)
        try:
            with forks.contained():
                yield from function(**arguments)
        except Exception as error:
            self._failed(arguments, error)
            raise
        self._end(arguments, None)

    async def _async_stream(self, function: Callable[..., Any], /, **arguments: Any) -> AsyncIterator[Any]:
        self._begin(arguments)
        try:
            with forks.contained():
                async for part in function(**arguments):
                    yield part
        except Exception as error:
            self._failed(arguments, error)
            raise
        self._end(arguments, None)

    def _begin(self, arguments: dict[str, Any]) -> None:
        for hook in self._before:
            hook(self._tool.name, arguments)

    def _end(self, arguments: dict[str, Any], result: Any) -> None:
        for hook in self._after:
            hook(self._tool.name, arguments, result)

    def _failed(self, arguments: dict[str, Any], error: Exception) -> None:
        text = _run([functools.partial(hook, self._tool.name, arguments, error) for hook in self._error])
        if text:
            _say(f"an error hook of {self._tool.name} failed: {text}")


def _run(functions: list[Callable[[], Any]]) -> str:
    """Call each, whatever the others do; return what the first one that failed raised, or ""."""
    error = ""
    for function in functions:
        try:
            with forks.contained():
                function()
        except CallInterrupted:  # of an error hook's call
            raise
        except BaseException as raised:  # also SystemExit: a hook does not end its worker by accident
            place = traceback.extract_tb(raised.__traceback__)[-1]
            error = error or shown(
                f"{type(raised).__name__}: {shown(raised)} ({place.filename}:{place.lineno})"
            )
    return error


def _say(text: str) -> None:
    # a module may have put anything into its place
    with contextlib.suppress(Exception):
        print(f"mcp-broker worker: {text}", file=sys.stderr, flush=True)  # noqa: T201 (its log is its stderr)
