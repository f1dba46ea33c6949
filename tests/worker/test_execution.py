"""Calls to outcomes, without a process or a socket."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NoReturn

import pytest
import zstandard
from pydantic import AfterValidator, BaseModel, BeforeValidator

from mcp_broker import limits, worker
from mcp_broker.errors import CALL_ERRORS, ConfigError, InvalidArgument, NotFound, Overloaded
from mcp_broker.wire import codec, encoding, messages, payload
from mcp_broker.wire.marks import MARKS_BYTES, Marks
from mcp_broker.worker import Tool, ToolContext, catalogue, tool
from mcp_broker.worker.execution import Execution, Run
from mcp_broker.worker.interrupts import CallInterrupted, Interrupts
from mcp_broker.worker.outcomes import RAISABLE
from mcp_broker.worker.session import Pending


class Point(BaseModel):
    x: int
    at: dt.datetime


@dataclasses.dataclass
class Pair:
    left: Decimal
    data: bytes


class Bench:
    """Runs one tool."""

    def __init__(self, made: Tool[..., Any], options: Any = MappingProxyType({"a": 1})) -> None:
        self.marks = Marks(memoryview(bytearray(MARKS_BYTES)))
        self.interrupts = Interrupts(self.marks, -1)
        self.execution = Execution({made.name: made}, self.interrupts, dict(options), Path("scratch"))
        self.name = made.name

    def pending(
        self,
        arguments: Any = None,
        *,
        name: str | None = None,
        deadline: float = math.inf,
        encoded: bytes | None = None,
        takes: tuple[str, ...] = (),
    ) -> Pending:
        packed = encoded or payload.pack({} if arguments is None else arguments)
        caller = codec.raw(messages.Caller("ada", 3, ("x.*",), encodings=takes))
        extra = messages.CallExtra(traceparent="00-1", encoding="zstd" if encoded else None)
        dispatch = messages.Dispatch(5, b"c" * 16, name or self.name, 1000, packed, caller, extra)
        return Pending(dispatch, packed, deadline, 0)

    def call(self, arguments: Any = None, **settings: Any) -> messages.Outcome:
        finished = self.execution.call(self.pending(arguments, **settings), time.monotonic_ns())
        assert not isinstance(finished, Run)
        return finished[0]


def result_of(value: Any, annotation: Any = Any) -> messages.Outcome:
    def give() -> Any:
        return value

    give.__annotations__["return"] = annotation
    return Bench(tool(give)).call()


def details(outcome: messages.Outcome) -> dict[str, Any]:
    assert outcome.fault is not None
    return payload.unpack_map(outcome.fault.details)


def test_result_comes_with_its_cost() -> None:
    bench = Bench(tool(lambda_sum))
    bench.execution.meter.reset()
    outcome = bench.call({"count": 100_000})
    assert outcome.code == "OK"
    assert payload.unpack(outcome.body or b"") == 4_999_950_000
    assert outcome.usage is not None
    assert 0 < outcome.usage.execution_us < 5_000_000
    assert outcome.usage.cpu_us > 0
    assert bench.marks.started_seq == 5


def lambda_sum(count: int) -> int:
    return sum(range(count))


def test_context_holds_what_the_dispatch_says() -> None:
    seen: list[ToolContext] = []

    @tool
    def look(context: ToolContext) -> None:
        seen.append(context)

    Bench(look).call()
    (context,) = seen
    assert (context.call_id, context.tool, context.traceparent) == (b"c".hex() * 16, "look", "00-1")
    assert (context.caller.principal, context.caller.clearance, context.caller.scopes) == ("ada", 3, ("x.*",))
    assert (context.options, context.scratch) == ({"a": 1}, Path("scratch"))


def test_what_a_call_does_to_its_options_no_other_call_sees() -> None:
    @tool
    def greedy(context: ToolContext) -> str:
        shown = repr(context.options)
        context.options.get("names", []).clear()
        context.options.clear()
        return shown

    for options in ({"a": 1}, {"names": ["x"]}, {}):
        bench = Bench(greedy, options)
        assert {bench.call().body for _ in range(2)} == {payload.pack(repr(options))}


@pytest.mark.parametrize(("takes", "encoded"), [(("zstd",), "zstd"), ((), None)])
def test_large_result_is_compressed_for_a_caller_who_takes_it(
    takes: tuple[str, ...], encoded: str | None
) -> None:
    @tool
    def fill() -> str:
        return "ab" * 100_000

    finished = Bench(fill).execution.call(Bench(fill).pending(takes=takes), time.monotonic_ns())
    assert isinstance(finished, tuple)
    outcome, body = finished
    assert outcome.encoding == encoded
    # compressed, it needs no frame of its own
    assert (body is None) is (encoded == "zstd")
    packed = encoding.expand(outcome.body or b"", encoded) if encoded else body or b""
    assert payload.unpack(packed) == "ab" * 100_000


def test_small_or_random_result_is_sent_as_it_is() -> None:
    @tool
    def fill(size: int) -> bytes:
        return os.urandom(size) if size > 1000 else bytes(size)

    for size in (1000, 10_000):
        assert Bench(fill).call({"size": size}, takes=("zstd",)).encoding is None


def test_compressed_arguments_are_expanded_and_a_bomb_is_its_senders_error() -> None:
    bench = Bench(tool(lambda_sum))
    assert bench.call(encoded=zstandard.compress(payload.pack({"count": 3}))).code == "OK"
    refused = bench.call(encoded=zstandard.compress(bytes(2 * limits.BODY_BYTES_MAX)))
    assert (refused.code, details(refused)["limit_bytes"]) == ("PAYLOAD_TOO_LARGE", limits.BODY_BYTES_MAX)
    assert bench.call(encoded=b"no frame").code == "INVALID_ARGUMENT"


def test_progress_is_reported_at_most_every_so_often() -> None:
    heard: list[tuple[float | None, str]] = []

    @tool
    def work(context: ToolContext) -> None:
        for step in range(1000):
            context.progress(step / 1000, f"{step}" * 100)

    bench = Bench(work)
    bench.execution.report = lambda _pending, *news: heard.append(news)
    began = time.monotonic()
    assert bench.call().code == "OK"
    assert 1 <= len(heard) <= 2 + (time.monotonic() - began) / limits.PROGRESS_S
    assert heard[0] == (0.0, "0" * 100)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_progress_that_is_no_fraction_is_the_authors_fault(fraction: float) -> None:
    with pytest.raises(ValueError, match="0 to 1"):
        ToolContext().progress(fraction)


def test_interrupt_while_progress_is_sent_is_raised_behind_it() -> None:
    ended: list[str] = []

    @tool
    def work(context: ToolContext) -> None:
        context.progress(0.5)
        ended.append("too far")

    bench = Bench(work)

    def send(pending: Pending, *_news: object) -> None:
        with bench.interrupts.shielded():
            # as the handler does while no tool code is armed
            bench.interrupts.asked = pending.dispatch.seq
            ended.append("sent")

    bench.execution.report = send
    assert bench.call().code == "CANCELLED"
    assert ended == ["sent"]


def test_call_whose_time_is_over_does_not_run() -> None:
    ran: list[int] = []

    @tool
    def run() -> None:
        ran.append(1)

    outcome = Bench(run).call(deadline=0.0)
    assert (outcome.code, ran) == ("DEADLINE_EXCEEDED", [])


def test_unknown_tool_and_broken_arguments_are_answered() -> None:
    bench = Bench(tool(lambda_sum))
    assert bench.call(name="other").code == "NOT_FOUND"
    assert bench.call([1]).code == "INVALID_ARGUMENT"
    broken = bench.pending()
    broken.arguments = b"\xc1"
    finished = bench.execution.call(broken, time.monotonic_ns())
    assert isinstance(finished, tuple)
    assert finished[0].code == "INVALID_ARGUMENT"


def test_failure_names_the_authors_line_not_ours_or_a_librarys() -> None:
    @tool
    def broken() -> None:
        int("x" * 3, base=99)

    outcome = Bench(broken).call()
    assert outcome.code == "TOOL_FAILED"
    assert outcome.fault is not None
    assert outcome.fault.message == "ValueError: int() base must be >= 2 and <= 36, or 0"
    told = details(outcome)
    assert told["type"] == "ValueError"
    assert told["file"] == __file__
    assert told["line"] == broken.function.__code__.co_firstlineno + 2
    assert "mcp_broker/worker/" not in told["traceback"]


def test_a_limit_that_a_tool_meets_by_itself_is_named_with_its_place() -> None:
    @tool
    def greedy() -> None:
        raise MemoryError

    bench = Bench(greedy)
    bench.execution.bounds = {"memory_mb": 100.0}
    outcome = bench.call()
    assert outcome.code == "RESOURCE_EXHAUSTED"
    assert outcome.fault is not None
    assert "limit memory_mb = 100 was reached" in outcome.fault.message
    details = payload.unpack_map(outcome.fault.details)
    assert (details["limit"], details["limit_value"], details["type"]) == ("memory_mb", 100.0, "MemoryError")
    assert details["file"] == __file__


def test_failure_of_a_cached_function_names_its_line() -> None:
    @tool
    @functools.lru_cache
    def broken() -> None:
        raise ValueError("no")

    outcome = Bench(broken).call()
    assert outcome.code == "TOOL_FAILED"
    assert details(outcome)["line"] == broken.code.co_firstlineno + 3


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), RecursionError(), BufferError()])
def test_whatever_a_tool_raises_is_its_outcome(error: BaseException) -> None:
    @tool
    def broken() -> None:
        raise error

    outcome = Bench(broken).call()
    assert outcome.code == "TOOL_FAILED"
    assert details(outcome)["type"] == type(error).__name__


@pytest.mark.parametrize("code", CALL_ERRORS)
def test_authors_have_the_errors_that_a_tool_may_raise_and_are_told_of_them(code: str) -> None:
    kind = CALL_ERRORS[code]

    @tool
    def refuse() -> None:
        raise kind("no", {"limit": "patience"})

    outcome = Bench(refuse).call()
    if code in RAISABLE:
        assert (outcome.code, details(outcome)) == (code, {"limit": "patience"})
        assert getattr(worker, kind.__name__) is kind
        assert f"``{kind.__name__}``" in (tool.__doc__ or "")
    else:
        assert (outcome.code, details(outcome)["type"]) == ("TOOL_FAILED", kind.__name__)
        assert kind.__name__ not in worker.__all__


def test_error_without_a_text_is_still_told() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    @tool
    def broken() -> None:
        raise MuteError

    outcome = Bench(broken).call()
    assert outcome.fault is not None
    assert outcome.fault.message == "MuteError: (its text cannot be shown)"


class Bare(NotFound):
    """An error whose author forgot ours."""

    def __init__(self, which: int) -> None:
        self.which = which


class Leaving(dict[str, int]):
    """A map that nobody can look into."""

    def items(self) -> NoReturn:
        sys.exit(3)


def encoded(outcome: messages.Outcome) -> messages.Outcome:
    """Send an outcome to a broker."""
    sent = codec.from_worker.decode(codec.encode(messages.Outcomes(1, 1, (outcome,))))
    assert isinstance(sent, messages.Outcomes)
    return sent.outcomes[0]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("bad name \udcff"), "TOOL_FAILED", r"ValueError: bad name \udcff"),
        (NotFound("no file \udcff"), "NOT_FOUND", r"no file \udcff"),
        (NotFound("no file", {"name": "\udcff"}), "NOT_FOUND", "no file"),
        (NotFound("no file", {1: 2}), "NOT_FOUND", "no file"),  # type: ignore[dict-item]
        (NotFound("no file", ["a"]), "NOT_FOUND", "no file"),  # type: ignore[arg-type]
        (NotFound("no file", Leaving(a=1)), "NOT_FOUND", "no file"),
        (NotFound("no file", retryable="yes"), "NOT_FOUND", "no file"),  # type: ignore[arg-type]
        (NotFound(KeyError("x")), "NOT_FOUND", "'x'"),  # type: ignore[arg-type]
        (NotFound(404), "NOT_FOUND", "404"),  # type: ignore[arg-type]
        (NotFound(None), "NOT_FOUND", "None"),  # type: ignore[arg-type]
        (Bare(3), "NOT_FOUND", "3"),
        (SyntaxError("m", ("f", 1, 1, 5)), "TOOL_FAILED", "SyntaxError: m (f, line 1)"),  # type: ignore[arg-type]
        (OSError(28, "full", "\0"), "TOOL_FAILED", "OSError: [Errno 28] full: '\\x00'"),
    ],
    ids=str,
)
def test_an_error_is_told_whatever_its_author_put_into_it(error: Exception, code: str, says: str) -> None:
    @tool
    def broken() -> None:
        raise error

    outcome = encoded(Bench(broken).call())
    assert outcome.fault is not None
    assert (outcome.code, outcome.fault.message) == (code, says)
    assert details(outcome) == {} or details(outcome)["type"] == type(error).__name__


def test_of_an_error_that_cannot_be_looked_at_only_the_type_is_told() -> None:
    class VeiledError(OSError):
        @property
        def errno(self) -> NoReturn:  # type: ignore[override]
            sys.exit(3)

    @tool
    def broken() -> None:
        raise VeiledError

    outcome = encoded(Bench(broken).call())
    assert (outcome.code, details(outcome)) == ("TOOL_FAILED", {"type": "VeiledError"})


def test_a_full_disk_is_told_from_a_working_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()

    @tool
    def broken() -> None:
        raise OSError(28, "full", "relative")

    outcome = Bench(broken).call()
    assert outcome.fault is not None
    assert outcome.fault.message == "OSError: [Errno 28] full: 'relative'"


def leaving(_value: object) -> NoReturn:
    sys.exit(3)


class Unshown:
    def __repr__(self) -> str:
        raise RuntimeError("not to be seen")


def test_arguments_whose_check_leaves_or_cannot_be_told_end_their_call_only() -> None:
    @tool
    def left(x: Annotated[int, AfterValidator(leaving)]) -> None: ...

    @tool
    def veiled(x: Annotated[int, BeforeValidator(lambda _: Unshown())]) -> None: ...

    outcome = Bench(left).call({"x": 1})
    assert (outcome.code, details(outcome)["type"]) == ("TOOL_FAILED", "SystemExit")
    outcome = Bench(veiled).call({"x": 1})
    assert (outcome.code, details(outcome)["type"]) == ("TOOL_FAILED", "RuntimeError")


def numbers_and_away() -> Iterator[int]:
    yield 1
    sys.exit(0)


class BrokenItems(dict[str, int]):
    def items(self) -> NoReturn:
        raise KeyError("items")


@pytest.mark.parametrize(
    "value",
    [
        {"\udcff": object()},
        {"a": "\udcff"},
        memoryview(b"abcd")[::2],
        BrokenItems(a=1),
        numbers_and_away(),
        (1 // (2 - number) for number in range(3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_sent_fails_its_call_only_as_a_result_and_as_a_part(value: Any) -> None:
    @tool
    def stream() -> Iterator[Any]:
        yield value

    execution, run = stream_of(stream)
    part = execution.step(run)
    assert isinstance(part, messages.Outcome)
    assert encoded(part).code == "TOOL_FAILED"
    if not isinstance(value, Iterator):  # which the stream has used up
        assert encoded(result_of(value)).code == "TOOL_FAILED"


def test_tool_may_refuse_its_arguments_itself_but_not_speak_for_the_broker() -> None:
    @tool
    def refuse(which: int) -> None:
        if which:
            raise Overloaded("no")
        raise InvalidArgument("no such folder", {"faults": [{"path": "/which"}]})

    outcome = Bench(refuse).call({"which": 0})
    assert (outcome.code, details(outcome)) == ("INVALID_ARGUMENT", {"faults": [{"path": "/which"}]})
    assert Bench(refuse).call({"which": 1}).code == "TOOL_FAILED"


def test_interruption_is_cancelled_even_when_c_code_wraps_it() -> None:
    bench: Bench

    @tool
    def interrupted(wrapped: bool) -> None:
        try:
            bench.marks.interrupt_seq = 5
            bench.interrupts._on_interrupt(0, None)
        except CallInterrupted as error:
            if wrapped:
                raise RuntimeError("Query interrupted") from error
            raise

    for wrapped in (False, True):
        bench = Bench(interrupted)
        assert bench.call({"wrapped": wrapped}).code == "CANCELLED"
        assert bench.interrupts.armed == 0


NOW = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("value", "annotation", "arrives"),
    [
        (Point(x=1, at=NOW), Point, {"x": 1, "at": "2026-01-02T00:00:00Z"}),
        (Pair(Decimal("1.5"), b"x"), Pair, {"left": "1.5", "data": b"x"}),
        ([Point(x=1, at=NOW)], Any, [{"x": 1, "at": "2026-01-02T00:00:00Z"}]),
        ({1: "one", None: 2}, dict[Any, Any], {"1": "one", "null": 2}),
        ({1: "one"}, Any, {"1": "one"}),
        ({"a": {2: 3}}, dict[str, Any], {"a": {"2": 3}}),
        # of another type than their annotations say
        ({1: 2}, dict[str, int], {"1": 2}),
        ({1: 2}, str, {"1": 2}),
        ({"a": {1: 2}}, dict[str, int], {"a": {"1": 2}}),
        ([{None: 2}], list[dict[str, int]], [{"null": 2}]),
        (({1: 2}, 1), tuple[dict[str, int], int], [{"1": 2}, 1]),
        ({"a": "b", "c": 2.5}, dict[str, int], {"a": "b", "c": 2.5}),
        ([NOW], list[str], ["2026-01-02T00:00:00Z"]),
        # and of the same
        ({"a": [1, None]}, dict[str, list[int | None]], {"a": [1, None]}),
        ([(1, 2.5), (3, 4)], list[tuple[int, float]], [[1, 2.5], [3, 4]]),
        ({"a": 2**64 - 1}, dict[str, int] | None, {"a": 2**64 - 1}),
        ((b"x", b"y"), tuple[bytes, ...], [b"x", b"y"]),
        ((1, {2}), Any, [1, [2]]),
        (uuid.UUID(int=1), uuid.UUID, "00000000-0000-0000-0000-000000000001"),
        (bytearray(b"x"), Any, b"x"),
        (Path("a"), Path, "a"),
        (None, None, None),
    ],
)
def test_results_become_what_a_payload_carries(value: Any, annotation: Any, arrives: Any) -> None:
    outcome = result_of(value, annotation)
    assert outcome.code == "OK", outcome.fault
    assert payload.unpack(outcome.body or b"") == arrives


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"rows": [object()]}, "builtins.object at /rows/0"),
        ({(1, 2): 1}, "a key of type tuple"),
        (2**70, "out of range"),
        (lambda: None, "builtins.function at /"),
    ],
)
def test_result_that_cannot_be_sent_says_what_and_where(value: Any, says: str) -> None:
    outcome = result_of(value)
    assert outcome.code == "TOOL_FAILED"
    assert outcome.fault is not None
    assert says in outcome.fault.message


def test_result_over_the_bound_names_the_bound() -> None:
    outcome = result_of(bytes(2_000_000), bytes)
    assert outcome.code == "PAYLOAD_TOO_LARGE"
    assert details(outcome)["limit_bytes"] < details(outcome)["bytes"]


def stream_of(made: Tool[..., Any]) -> tuple[Execution, Run]:
    bench = Bench(made)
    run = bench.execution.call(bench.pending(), time.monotonic_ns())
    assert isinstance(run, Run)
    return bench.execution, run


def test_stream_yields_packed_parts_and_ends_with_nil() -> None:
    @tool
    def stream() -> Iterator[int]:
        yield from (1, 2)

    execution, run = stream_of(stream)
    assert [execution.step(run) for _ in range(2)] == [b"\x01", b"\x02"]
    outcome = execution.step(run)
    assert isinstance(outcome, messages.Outcome)
    assert (outcome.code, outcome.body) == ("OK", b"\xc0")


def test_stream_that_fails_or_stops_is_told_and_cleaned_up() -> None:
    closed: list[str] = []

    @tool
    def stream() -> Iterator[int]:
        try:
            yield 1
            raise ValueError("late")
        finally:
            closed.append("closed")

    execution, run = stream_of(stream)
    execution.step(run)
    outcome = execution.step(run)
    assert isinstance(outcome, messages.Outcome)
    assert outcome.code == "TOOL_FAILED"
    execution, run = stream_of(stream)
    execution.step(run)
    assert execution.stop(run).code == "CANCELLED"
    assert closed == ["closed", "closed"]


def test_stream_whose_part_cannot_be_sent_is_cleaned_up_before_it_is_answered() -> None:
    closed: list[int] = []

    @tool
    def stream() -> Iterator[object]:
        try:
            yield object()
        finally:
            closed.append(execution._interrupts.armed)

    execution, run = stream_of(stream)
    outcome = execution.step(run)
    assert isinstance(outcome, messages.Outcome)
    assert outcome.code == "TOOL_FAILED"
    assert closed == [5], "in the time of its call"


def test_clean_up_of_a_stream_whose_part_cannot_be_sent_may_be_interrupted_and_may_fail() -> None:
    @tool
    def stopped() -> Iterator[bytes]:
        try:
            yield bytes(limits.BODY_BYTES_MAX)
        finally:
            interrupts.marks.interrupt_seq = 5
            interrupts._on_interrupt(0, None)

    @tool
    def broken() -> Iterator[bytes]:
        try:
            yield bytes(limits.BODY_BYTES_MAX)
        finally:
            raise LookupError

    execution, run = stream_of(stopped)
    interrupts = execution._interrupts
    outcome = execution.step(run)
    assert isinstance(outcome, messages.Outcome)
    assert outcome.code == "CANCELLED"
    execution, run = stream_of(broken)
    outcome = execution.step(run)
    assert isinstance(outcome, messages.Outcome)
    assert outcome.code == "PAYLOAD_TOO_LARGE"


def test_module_is_searched_for_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    head = "from mcp_broker.worker import tool\n"
    sources = {
        "fine": head + "@tool(name='x.a')\ndef a(): ...\nalias = a\n",
        "none": "x = 1\n",
        "twice": head + "@tool(name='x.a')\ndef a(): ...\n@tool(name='x.a')\ndef b(): ...\n",
        "broken": "1 / 0\n",
        "leaves": "import sys\nsys.exit(3)\n",
    }
    for name, source in sources.items():
        (tmp_path / f"catalogued_{name}.py").write_text(source)
    path = (str(tmp_path),)
    assert list(catalogue.load("catalogued_fine", path)) == ["x.a"]
    for name, says in [
        ("none", "defines no tool"),
        ("twice", "'x.a' twice"),
        ("broken", r"ZeroDivisionError: division by zero \(.*catalogued_broken.py:1\)"),
        ("leaves", "sys.exit"),
        ("absent", "No module named 'catalogued_absent'"),
    ]:
        with pytest.raises(ConfigError, match=says):
            catalogue.load(f"catalogued_{name}", path)


def test_missing_library_of_a_shipped_tool_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mcp_broker_workers.sql", raising=False)
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(ConfigError, match=r"duckdb.*; install mcp-broker\[tools\]"):
        catalogue.load("mcp_broker_workers.sql")
