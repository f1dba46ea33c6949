"""One call at a time: from a dispatch to its outcome."""

from __future__ import annotations

import copy
import functools
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import ValidationError

from mcp_broker import limits
from mcp_broker.errors import CallError, InvalidArgument, MalformedFrame
from mcp_broker.wire import codec, encoding, messages, payload
from mcp_broker.wire.structs import Slim
from mcp_broker.worker import exhaustion, forks, offspring, results
from mcp_broker.worker.context import ToolCaller, ToolContext
from mcp_broker.worker.hooks import Hooks
from mcp_broker.worker.interrupts import CallInterrupted, Interrupts
from mcp_broker.worker.outcomes import RAISABLE, describe, fault, raised, untold

if TYPE_CHECKING:
    from mcp_broker.worker.bytestream import ByteStream
    from mcp_broker.worker.catalogue import Catalogue
    from mcp_broker.worker.leases import LeasedPort
    from mcp_broker.worker.session import Pending
    from mcp_broker.worker.tool import Tool

Finished = tuple[messages.Outcome, bytes | None]

NO_HOOKS: Final = Hooks([])

#: Below it, a call is charged the time that it took: reading the process's CPU clock costs as much as a small tool
#: (0.6 us, where a virtual machine makes it a system call).
_SHORT_NS: Final = 100_000
#: calls above this have their peak memory read anew, others every so many calls
_LONG_NS: Final = 1_000_000
_RSS_EVERY: Final = 64
#: how long the distance between the wall clock and the monotonic one is believed
_WALL_NS: Final = 1_000_000_000


class Meter:
    """What calls cost, by this process's own clocks and rusage.

    A longer call is charged the CPU time since the last reading, less what shorter ones were charged since.
    """

    __slots__ = ("_charged_ns", "_cpu_ns", "_left", "_max_rss_kib", "_wall_ns", "_wall_until")

    def __init__(self) -> None:
        self._cpu_ns = 0
        self._charged_ns = 0
        self._max_rss_kib = 0
        self._left = 0
        self._wall_ns = 0
        self._wall_until = 0

    def reset(self) -> None:
        """Begin to count here: what the worker did meanwhile is nobody's."""
        self._cpu_ns = time.process_time_ns()
        self._charged_ns = 0

    def usage(self, started_ns: int, ended_ns: int) -> messages.Usage:
        """Return the cost of the call that has just ended; instants of the monotonic clock."""
        spent_ns = cpu_ns = ended_ns - started_ns
        if spent_ns < _SHORT_NS:
            self._charged_ns += spent_ns
        else:
            read_ns = time.process_time_ns()
            cpu_ns = read_ns - self._cpu_ns - self._charged_ns
            self._cpu_ns = read_ns
            self._charged_ns = 0
            cpu_ns = max(cpu_ns, 0)
        self._left -= 1
        # rusage costs as much as a small call: the peak, which only grows, is read after long calls and now and then
        if self._left < 0 or spent_ns > _LONG_NS:
            self._left = _RSS_EVERY
            self._max_rss_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if ended_ns > self._wall_until:
            self._wall_until = ended_ns + _WALL_NS
            self._wall_ns = time.time_ns() - ended_ns
        return messages.Usage(
            (self._wall_ns + ended_ns) // 1_000_000, spent_ns // 1000, cpu_ns // 1000, self._max_rss_kib
        )


class Plan(Slim):
    """What is looked up once about a tool, for all its calls.

    Attributes:
        function: the tool's, or what runs it between its hooks.
        read: reads results that fit the annotation.
    """

    tool: Tool[..., Any]
    function: Callable[..., Any]
    check: Callable[[dict[str, Any]], dict[str, Any]]
    read: results.Reader | None


class Run(Slim):
    """A call on its way: checked, and its function called or its generator made."""

    pending: Pending
    plan: Plan
    started_ns: int
    context: ToolContext | None = None
    stream: Any = None
    index: int = 0


class Execution:
    """Runs the tools of a catalogue.

    Args:
        tools: by name.
        interrupts: told what runs.
        is_alone: one call runs at a time, so that what was started meanwhile is that call's.
        hooks: of the module.
        options: `options` of the pool.
        scratch: the worker's private folder.
        secrets: of the pool, name -> content.
    """

    def __init__(
        self,
        tools: Catalogue,
        interrupts: Interrupts,
        options: dict[str, Any],
        scratch: Path,
        secrets: Mapping[str, str] = MappingProxyType({}),
        *,
        is_alone: bool = True,
        hooks: Hooks = NO_HOOKS,
    ) -> None:
        self.hooks = hooks
        self._plans = {
            name: Plan(
                tool, hooks.around(tool), tool.arguments.check, results.reader_of(tool.result.core_schema)
            )
            for name, tool in tools.items()
        }
        self._interrupts = interrupts
        # one tool must not change what the next one reads
        is_nested = any(isinstance(value, dict | list) for value in options.values())
        self._options = functools.partial(copy.deepcopy, options) if is_nested else options.copy
        self._scratch = scratch
        self._secrets = MappingProxyType(dict(secrets))
        self._is_alone = is_alone
        self.meter = Meter()
        #: what the worker may use, by the names of `[pools.NAME.limits]`
        self.bounds: Mapping[str, float] = {}
        #: takes what tools say of their progress; the shell's
        self.report: Callable[[Pending, float | None, str], object] | None = None
        #: lends a tool a port; the shell's
        self.lend: Callable[[int, float | None], LeasedPort] | None = None
        #: makes what a tool reads an upload from; the shell's
        self.open_upload: Callable[[Pending], ByteStream] | None = None

    def prepare(self, pending: Pending, started_ns: int) -> tuple[Run, dict[str, Any]] | messages.Outcome:
        """Mark a call started and check it; an outcome is the answer of a call that need not run.

        Args:
            started_ns: the instant, of the monotonic clock.
        """
        dispatch = pending.dispatch
        self._interrupts.started(dispatch.seq, dispatch.call_id)
        if dispatch.extra is not None and dispatch.extra.detach:
            self._interrupts.marks.spare(dispatch.seq, pending.deadline)
        if started_ns * 1e-9 >= pending.deadline:
            text = "the time of the call was over before it could start"
            details = {"which": "timeout", "started": False}
            return fault(dispatch.call_id, "DEADLINE_EXCEEDED", text, details)
        plan = self._plans.get(dispatch.tool)
        if plan is None:
            return fault(dispatch.call_id, "NOT_FOUND", f"this worker has no tool {dispatch.tool!r}")
        run = Run(pending, plan, started_ns)
        arguments = None
        try:
            packed, extra = pending.arguments, dispatch.extra
            if extra is not None and extra.encoding is not None:
                packed = encoding.expand(packed, extra.encoding)
            arguments = payload.unpack_map(packed)
            if extra is not None and extra.upload is not None:
                arguments[extra.upload] = self._upload(run, extra.upload)
            arguments = plan.check(arguments)
        except MalformedFrame as error:
            text = f"{plan.tool.name}: {error}"
            return fault(dispatch.call_id, "INVALID_ARGUMENT", text, {"faults": []})
        except ValidationError as error:
            return self.failed(run, _refusal(plan, arguments or {}, error))
        except BaseException as error:  # a validator of the author's own that broke, or leaves
            return self.failed(run, error)
        wants_context = plan.tool.arguments.context_parameter
        if wants_context is not None:
            run.context = arguments[wants_context] = self._context(pending)
        return run, arguments

    def call(self, pending: Pending, started_ns: int) -> Finished | Run:
        """Run a synchronous call to its outcome, or to the start of its stream."""
        prepared = self.prepare(pending, started_ns)
        if type(prepared) is not tuple:
            return prepared, None  # type: ignore[return-value]
        return self.invoke(*prepared)

    def invoke(self, run: Run, arguments: dict[str, Any]) -> Finished | Run:
        """Call a prepared call's synchronous function."""
        interrupts = self._interrupts
        tool = run.plan.tool
        try:
            try:
                interrupts.armed = run.pending.dispatch.seq
                value = run.plan.function(**arguments)
                interrupts.armed = 0
            except CallInterrupted:
                raise
            except BaseException as error:  # also SystemExit: a tool does not end its worker by accident
                interrupts.armed = 0
                return self.failed(run, error), None
        except CallInterrupted:
            interrupts.armed = 0
            return self.cancelled(run), None
        if tool.is_streaming:
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
        part = self.part(run, value)
        # what cannot be sent ends the stream: its clean-up is in its own time, not in the next call's
        if type(part) is not bytes and self._close(run):
            return self.cancelled(run)
        return part

    def stop(self, run: Run) -> messages.Outcome:
        """End a synchronous stream that nobody wants any more; its ``finally`` blocks run."""
        if run.context is not None:
            run.context.cancelled = True
        self._close(run)
        return self.cancelled(run)

    def _close(self, run: Run) -> bool:
        """Have a synchronous stream's ``finally`` blocks run; tell whether they were interrupted."""
        interrupts = self._interrupts
        try:
            try:
                interrupts.armed = run.pending.dispatch.seq
                with forks.contained():
                    run.stream.close()
                interrupts.armed = 0
            except CallInterrupted:
                raise
            except BaseException:  # its clean-up failed: the call ends as it would have
                interrupts.armed = 0
        except CallInterrupted:
            interrupts.armed = 0
            return True
        return False

    # -- outcomes ----------------------------------------------------------------------------------------

    def part(self, run: Run, value: Any) -> bytes | messages.Outcome:
        """Pack one part; an outcome if it cannot be sent."""
        if forks.is_fork:
            forks.leave()
        try:
            return results.pack(value, run.plan.tool, run.plan.read)
        except BaseException as error:  # converting it runs code of the tool's, which may leave too
            return self.failed(run, error)

    def returned(self, run: Run, value: Any) -> Finished:
        """Make the outcome of a result."""
        if forks.is_fork:
            forks.leave()
        plan = run.plan
        try:
            packed = results.pack(value, plan.tool, plan.read)
        except BaseException as error:
            return self.failed(run, error), None
        usage = self.meter.usage(run.started_ns, time.monotonic_ns())
        dispatch = run.pending.dispatch
        encoded = None
        if len(packed) >= limits.COMPRESS_BYTES_MIN:
            packed, encoded = encoding.shrink_for(dispatch, packed)
            if len(packed) > limits.INLINE_BYTES_MAX:
                return messages.Outcome(dispatch.call_id, messages.OK, None, usage, None, 0, encoded), packed
        return messages.Outcome(dispatch.call_id, messages.OK, packed, usage, None, 0, encoded), None

    def ended(self, run: Run) -> messages.Outcome:
        """Make the outcome of a stream that came to its end."""
        if forks.is_fork:
            forks.leave()
        usage = self.meter.usage(run.started_ns, time.monotonic_ns())
        call_id = run.pending.dispatch.call_id
        return messages.Outcome(call_id, messages.OK, payload.pack(None), usage, None, run.index)

    def cancelled(self, run: Run) -> messages.Outcome:
        """Make the outcome of an interrupted call, after the end of the processes that it started."""
        if forks.is_fork:
            forks.leave()
        if self._is_alone:
            offspring.kill_since(run.started_ns)
        now_ns = time.monotonic_ns()
        usage = self.meter.usage(run.started_ns, now_ns)
        if now_ns * 1e-9 >= run.pending.deadline:
            # the broker says so too, but this may be there first
            text = "the call was interrupted, since its time was over"
            return fault(
                run.pending.dispatch.call_id, "DEADLINE_EXCEEDED", text, {"which": "timeout"}, usage=usage
            )
        return fault(run.pending.dispatch.call_id, "CANCELLED", "the call was interrupted", usage=usage)

    def failed(self, run: Run, error: BaseException) -> messages.Outcome:
        """Make the outcome of a call that raised."""
        if forks.is_fork:
            forks.leave(error)
        if self._interrupts.raised == run.pending.dispatch.seq:
            return self.cancelled(run)
        usage = self.meter.usage(run.started_ns, time.monotonic_ns())
        try:
            return self._told(run, error, usage)
        except BaseException:  # the error is of the tool's making, and so is what looking at it does
            return untold(run.pending.dispatch.call_id, error, usage)

    def _told(self, run: Run, error: BaseException, usage: messages.Usage) -> messages.Outcome:
        call_id = run.pending.dispatch.call_id
        if isinstance(error, CallError) and error.code in RAISABLE:
            return raised(call_id, error, usage)
        sentence, details = describe(error, run.plan.tool)
        limit = exhaustion.limit_of(error, self._scratch)
        if limit:
            more, about = exhaustion.told(limit, self.bounds)
            return fault(
                call_id, "RESOURCE_EXHAUSTED", f"{sentence}. {more}", {**about, **details}, usage=usage
            )
        return fault(call_id, "TOOL_FAILED", sentence, details, usage=usage)

    def _upload(self, run: Run, name: str) -> ByteStream:
        tool = run.plan.tool
        if tool.arguments.stream_parameter != name or self.open_upload is None:
            raise InvalidArgument(
                f"{tool.name} does not read {name!r} in chunks; give the value itself. Signature: {tool.signature}"
            )
        return self.open_upload(run.pending)

    def _context(self, pending: Pending) -> ToolContext:
        dispatch = pending.dispatch
        caller = codec.decode_caller(dispatch.caller)
        return ToolContext(
            call_id=dispatch.call_id.hex(),
            tool=dispatch.tool,
            caller=ToolCaller(caller.principal, caller.clearance, caller.scopes, caller.admin),
            deadline=pending.deadline,
            options=self._options(),
            scratch=self._scratch,
            secrets=self._secrets,
            traceparent=dispatch.extra.traceparent if dispatch.extra is not None else None,
            report=functools.partial(self.report, pending) if self.report is not None else None,
            lend=self.lend,
        )


def _refusal(plan: Plan, arguments: dict[str, Any], error: ValidationError) -> BaseException:
    """Return the error that names what does not fit, or what a value of the tool's own raised when it was shown."""
    try:
        return plan.tool.arguments.refusal(arguments, error)
    except BaseException as broken:
        return broken
