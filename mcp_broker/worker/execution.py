"""One call at a time: from a dispatch to its outcome."""

from __future__ import annotations

import resource
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from mcp_broker import limits
from mcp_broker.errors import CallError, MalformedFrame, PayloadTooLarge
from mcp_broker.wire import codec, messages, payload
from mcp_broker.worker import results
from mcp_broker.worker.context import ToolCaller, ToolContext
from mcp_broker.worker.interrupts import CallInterrupted, Interrupts
from mcp_broker.worker.session import Pending, fault

if TYPE_CHECKING:
    from mcp_broker.worker.catalogue import Catalogue
    from mcp_broker.worker.tool import Tool

#: errors of the contract that a tool may raise itself, to be precise; any other is TOOL_FAILED
RAISABLE: Final = frozenset(
    {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "CANCELLED", "DEADLINE_EXCEEDED"}
)
TRACEBACK_CHARS: Final = 4000

Finished = tuple[messages.Outcome, bytes | None]


#: calls above this have their peak memory read anew, others every so many calls
_LONG_NS: Final = 1_000_000
_RSS_EVERY: Final = 64


class Meter:
    """What calls cost, by this process's own clocks and rusage.

    One sample a call: its end is the next one's start, so that a call is also charged for reading its arguments.
    """

    __slots__ = ("_cpu_ns", "_left", "_max_rss_kib")

    def __init__(self) -> None:
        self._cpu_ns = 0
        self._max_rss_kib = 0
        self._left = 0

    def reset(self) -> None:
        """Begin to count here: what the worker did meanwhile is nobody's."""
        self._cpu_ns = time.process_time_ns()

    def usage(self, started_ns: int, ended_ns: int) -> messages.Usage:
        """Return the cost of the call that has just ended."""
        cpu_ns = time.process_time_ns()
        spent_us = (cpu_ns - self._cpu_ns) // 1000
        self._cpu_ns = cpu_ns
        self._left -= 1
        # rusage costs as much as a small call: the peak, which only grows, is read after long calls and now and then
        if self._left < 0 or ended_ns - started_ns > _LONG_NS:
            self._left = _RSS_EVERY
            self._max_rss_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return messages.Usage(
            time.time_ns() // 1_000_000, (ended_ns - started_ns) // 1000, max(spent_us, 0), self._max_rss_kib
        )


class Run:
    """A call on its way: checked, and its function called or its generator made."""

    __slots__ = ("context", "index", "pending", "started_ns", "stream", "tool")

    def __init__(self, pending: Pending, tool: Tool[..., Any], started_ns: int) -> None:
        self.pending = pending
        self.tool = tool
        self.started_ns = started_ns
        self.context: ToolContext | None = None
        self.stream: Any = None
        self.index = 0


class Execution:
    """Runs the tools of a catalogue.

    Args:
        tools: by name.
        interrupts: told what runs.
        options: `options` of the pool.
        scratch: the worker's private folder.
        clock: of the deadlines, seconds.
    """

    def __init__(
        self,
        tools: Catalogue,
        interrupts: Interrupts,
        options: dict[str, Any],
        scratch: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tools = tools
        self._text_keys = {
            name: results.has_text_keys(tool.result.core_schema) for name, tool in tools.items()
        }
        self._interrupts = interrupts
        self._options = options
        self._scratch = scratch
        self._clock = clock
        self.meter = Meter()

    def prepare(self, pending: Pending) -> tuple[Run, dict[str, Any]] | messages.Outcome:
        """Mark a call started and check it; an outcome is the answer of a call that need not run."""
        dispatch = pending.dispatch
        self._interrupts.started(dispatch.seq)
        started_ns = time.perf_counter_ns()
        if self._clock() >= pending.deadline:
            text = "the time of the call was over before it could start"
            return fault(dispatch.call_id, "DEADLINE_EXCEEDED", text, {"started": False})
        tool = self._tools.get(dispatch.tool)
        if tool is None:
            return fault(dispatch.call_id, "NOT_FOUND", f"this worker has no tool {dispatch.tool!r}")
        run = Run(pending, tool, started_ns)
        try:
            arguments = tool.validate(payload.unpack_map(pending.arguments))
        except MalformedFrame as error:
            return fault(dispatch.call_id, "INVALID_ARGUMENT", f"{tool.name}: {error}", {"faults": []})
        except Exception as error:  # a refusal, or a validator of the author's own that broke
            return self.failed(run, error)
        if tool.arguments.context_parameter is not None:
            run.context = arguments[tool.arguments.context_parameter] = self._context(pending)
        return run, arguments

    def call(self, pending: Pending) -> Finished | Run:
        """Run a synchronous call to its outcome, or to the start of its stream."""
        prepared = self.prepare(pending)
        if isinstance(prepared, messages.Outcome):
            return prepared, None
        return self.invoke(*prepared)

    def invoke(self, run: Run, arguments: dict[str, Any]) -> Finished | Run:
        """Call a prepared call's synchronous function."""
        interrupts = self._interrupts
        try:
            try:
                interrupts.armed = run.pending.dispatch.seq
                value = run.tool.function(**arguments)
                interrupts.armed = 0
            except CallInterrupted:
                raise
            except BaseException as error:  # also SystemExit: a tool does not end its worker by accident
                interrupts.armed = 0
                return self.failed(run, error), None
        except CallInterrupted:
            interrupts.armed = 0
            return self.cancelled(run), None
        if run.tool.definition.streaming:
            run.stream = value
            return run
        return self.returned(run, value)

    def step(self, run: Run) -> bytes | messages.Outcome:
        """Return a synchronous stream's next part, packed, or the outcome when it ends."""
        interrupts = self._interrupts
        try:
            try:
                interrupts.armed = run.pending.dispatch.seq
                value = next(run.stream)
                interrupts.armed = 0
            except CallInterrupted:
                raise
            except StopIteration:
                interrupts.armed = 0
                return self.ended(run)
            except BaseException as error:
                interrupts.armed = 0
                return self.failed(run, error)
        except CallInterrupted:
            interrupts.armed = 0
            return self.cancelled(run)
        return self.part(run, value)

    def stop(self, run: Run) -> messages.Outcome:
        """End a synchronous stream that nobody wants any more; its ``finally`` blocks run."""
        interrupts = self._interrupts
        if run.context is not None:
            run.context.cancelled = True
        try:
            try:
                interrupts.armed = run.pending.dispatch.seq
                run.stream.close()
                interrupts.armed = 0
            except CallInterrupted:
                raise
            except BaseException:  # its clean-up failed: the call is cancelled all the same
                interrupts.armed = 0
        except CallInterrupted:
            interrupts.armed = 0
        return self.cancelled(run)

    # -- outcomes ----------------------------------------------------------------------------------------

    def part(self, run: Run, value: Any) -> bytes | messages.Outcome:
        """Pack one part; an outcome if it cannot be sent."""
        try:
            return self._pack(run, value)
        except CallError as error:
            return self.failed(run, error)

    def returned(self, run: Run, value: Any) -> Finished:
        """Make the outcome of a result."""
        ended_ns = time.perf_counter_ns()
        try:
            packed = self._pack(run, value)
        except Exception as error:
            return self.failed(run, error), None
        usage = self.meter.usage(run.started_ns, ended_ns)
        call_id = run.pending.dispatch.call_id
        if len(packed) > limits.INLINE_BYTES_MAX:
            return messages.Outcome(call_id, messages.OK, None, usage), packed
        return messages.Outcome(call_id, messages.OK, packed, usage), None

    def ended(self, run: Run) -> messages.Outcome:
        """Make the outcome of a stream that came to its end."""
        usage = self.meter.usage(run.started_ns, time.perf_counter_ns())
        return messages.Outcome(run.pending.dispatch.call_id, messages.OK, payload.pack(None), usage)

    def cancelled(self, run: Run) -> messages.Outcome:
        """Make the outcome of an interrupted call."""
        usage = self.meter.usage(run.started_ns, time.perf_counter_ns())
        return fault(run.pending.dispatch.call_id, "CANCELLED", "the call was interrupted", usage=usage)

    def failed(self, run: Run, error: BaseException) -> messages.Outcome:
        """Make the outcome of a call that raised."""
        if self._interrupts.raised == run.pending.dispatch.seq:
            return self.cancelled(run)
        usage = self.meter.usage(run.started_ns, time.perf_counter_ns())
        call_id = run.pending.dispatch.call_id
        if isinstance(error, CallError) and (error.code in RAISABLE or isinstance(error, PayloadTooLarge)):
            try:
                return fault(
                    call_id, error.code, error.message, error.details, usage=usage, retryable=error.retryable
                )
            except (TypeError, ValueError, OverflowError):  # details that cannot be sent
                return fault(call_id, error.code, error.message, usage=usage, retryable=error.retryable)
        return fault(call_id, "TOOL_FAILED", *describe(error, run.tool), usage=usage)

    def _pack(self, run: Run, value: Any) -> bytes:
        tool = run.tool
        name = tool.definition.name
        return results.pack(value, tool.result, keys_are_text=self._text_keys[name], tool=name)

    def _context(self, pending: Pending) -> ToolContext:
        dispatch = pending.dispatch
        caller = codec.decode_caller(dispatch.caller)
        return ToolContext(
            call_id=dispatch.call_id.hex(),
            tool=dispatch.tool,
            caller=ToolCaller(caller.principal, caller.clearance, caller.scopes, caller.admin),
            deadline=pending.deadline,
            options=self._options,
            scratch=self._scratch,
            traceparent=dispatch.extra.traceparent if dispatch.extra is not None else None,
        )


def describe(error: BaseException, tool: Tool[..., Any]) -> tuple[str, dict[str, Any]]:
    """Say what a tool raised and where in its author's code.

    Returns:
        The sentence, and details {type, message, file, line, traceback}.
    """
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be shown)"
    details: dict[str, Any] = {"type": name, "message": text[: limits.TEXT_CHARS_MAX]}
    own = tool.function.__code__.co_filename
    place = _place(error.__traceback__, own)
    if place is not None:
        details["file"], details["line"] = place
        # the first frames are ours
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != own and trace.tb_next is not None:
            trace = trace.tb_next
        shown = "".join(traceback.format_exception(type(error), error, trace, limit=-20))
        details["traceback"] = shown[-TRACEBACK_CHARS:]
    elif isinstance(error, CallError):
        details |= error.details
    return (f"{name}: {text}" if text else name), details


def _place(trace: TracebackType | None, own: str) -> tuple[str, int] | None:
    """Return file and line of the last frame of the tool's own module."""
    place: tuple[str, int] | None = None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == own:
            place = own, trace.tb_lineno
        trace = trace.tb_next
    return place
