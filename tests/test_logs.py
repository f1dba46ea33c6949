"""What a log line looks like, whoever wrote it, and which are left out."""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker import limits, logs
from mcp_broker.supervisor.output import Output
from mcp_broker.supervisor.poller import Poller
from mcp_broker.worker import ToolContext

if TYPE_CHECKING:
    from collections.abc import Iterator

HELD = limits.LOG_LINE_BYTES_MAX - 1


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Leave the process's logging as it was."""
    loggers = logging.getLogger(), logging.getLogger("mcp_broker")
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def record(text: str, level: int = logging.INFO, /, **extra: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "a.b", "msg": text, "levelno": level,
                                  "levelname": logging.getLevelName(level), **extra})  # fmt: skip


def raised(text: str) -> Any:
    try:
        raise ValueError(text)
    except ValueError:
        return sys.exc_info()


def supervised(*lines: bytes, level: str = "info") -> tuple[Output, int]:
    """Have a supervisor read what a child wrote to standard error."""
    logs.follow(level)
    ours, theirs = os.pipe()
    output = Output("t-1", ours, Poller(), logging.WARNING, holds_records=True)
    os.write(theirs, b"".join(line + b"\n" for line in lines))
    os.close(theirs)
    output.close()
    return output, len(lines)


def test_a_record_says_the_same_after_its_way_through_a_child_s_line() -> None:
    line = logs.JsonLines({"worker_id": "t-1"}, HELD).format(record("it rains", logging.ERROR, place="here"))
    found = logs.parse(line.encode())
    assert found is not None
    assert (found.level, found.event) == (logging.ERROR, "it rains")
    assert found.fields == {"logger": "a.b", "worker_id": "t-1", "place": "here"}


@pytest.mark.parametrize(
    "line",
    [b"hello", b"", b'{"wall_at": 1', b'{"wall_at": 1, "level": 3, "event": "a"}', b'{"wall_at": 1}', b'{"wall_at": ' * 5000],
)  # fmt: skip
def test_what_only_looks_like_a_record_is_none(line: bytes) -> None:
    assert logs.parse(line) is None


@pytest.mark.parametrize(
    "long",
    [
        record("ä" * 100_000),
        record("short", field="x" * 100_000, other="y" * 100_000),
        record("short", rows=list(range(50_000))),
        record("short", **{f"name_{number}": number for number in range(2000)}),
        record("short", exc_info=raised("the very end" + "!" * 3 + "x" * 10_000)),
    ],
    ids=["event", "fields", "list", "many fields", "traceback"],
)
def test_a_child_s_line_stays_within_its_bound_and_readable(long: logging.LogRecord) -> None:
    line = logs.JsonLines({"worker_id": "t-1"}, HELD).format(long).encode()
    assert len(line) <= HELD
    assert logs.parse(line) is not None
    assert json.loads(line)["level"] == "INFO"


def test_of_a_long_traceback_the_end_is_kept() -> None:
    line = logs.JsonLines({}, HELD).format(record("it broke", exc_info=raised("x" * 9000 + " THE END")))
    assert json.loads(line)["traceback"].endswith("THE END")


def test_a_text_line_has_a_date_a_level_and_who_wrote_and_stays_one_line() -> None:
    said = record(
        "two\nlines \x1b[31m",
        **{logs.FIELDS: {"source": "t-1", "worker_id": "t-1", "tool": "t.a", "x": "a b"}},
    )
    at, level, *rest = logs.TextLines().format(said).split(" ", 2)
    assert level == "INFO"
    assert len(at) == len("2026-01-01T00:00:00+0000")
    assert rest == ['t-1: two\\nlines \\x1b[31m tool=t.a x="a b"']


def test_whatever_a_tool_calls_its_fields_they_arrive_and_say_nothing_else() -> None:
    names: dict[str, Any] = {
        "fields": "a",
        "announced": True,
        "level": "x",
        "event": "y",
        "wall_at": 0,
        "source": "broker-1",
    }
    found = logs.parse(logs.JsonLines({}, HELD).format(record("it rains", **names)).encode())
    assert found is not None
    assert (found.level, found.event) == (logging.INFO, "it rains")
    assert {"fields": "a", "announced": True}.items() <= found.fields.items()


def test_the_supervisor_logs_a_child_s_record_at_its_own_level_and_prints_as_warnings(
    caplog: pytest.LogCaptureFixture,
) -> None:
    child = logs.JsonLines({"worker_id": "t-1"}, HELD)
    supervised(
        child.format(record("calm")).encode(), b"a bare print", child.format(record("no", 10)).encode()
    )
    assert [(one.levelname, one.getMessage()) for one in caplog.records] == [
        ("INFO", "calm"),
        ("WARNING", "a bare print"),
    ]
    assert all("t-1: " in logs.TextLines().format(one) for one in caplog.records)


def test_a_child_cannot_log_in_another_s_name(caplog: pytest.LogCaptureFixture) -> None:
    forged = logs.JsonLines({}, HELD).format(record("all is well", source="broker-1"))
    supervised(forged.encode())
    (one,) = caplog.records
    assert json.loads(logs.JsonLines({"source": "supervisor"}).format(one))["source"] == "t-1"


def test_the_last_words_of_a_child_hold_what_its_records_say() -> None:
    said = logs.JsonLines({}, HELD).format(record("opening", exc_info=raised("no such table")))
    output, _ = supervised(b"before", said.encode(), b"after", level="error")
    words = output.tail.decode().splitlines()
    assert words[:2] == ["before", "opening"]
    assert words[-2:] == ["ValueError: no such table", "after"]


def test_a_line_without_an_end_is_logged_in_pieces(caplog: pytest.LogCaptureFixture) -> None:
    output, _ = supervised(b"x" * 3 * limits.LOG_LINE_BYTES_MAX)
    assert max(len(one.getMessage()) for one in caplog.records) <= limits.LOG_LINE_BYTES_MAX
    assert len(output.tail) == limits.STDERR_TAIL_BYTES


class Spoken:
    """A pipe that a supervisor reads, and who writes to it."""

    def __init__(self, *, holds_records: bool = True) -> None:
        ours, self._theirs = os.pipe()
        self.poller = Poller()
        self.output = Output("t-1", ours, self.poller, logging.WARNING, holds_records=holds_records)

    def say(self, text: bytes) -> None:
        os.write(self._theirs, text)
        self.poller.turn(5.0)

    def end(self) -> None:
        os.close(self._theirs)
        self.output.close()
        self.poller.close()


def test_of_a_flood_of_lines_so_many_are_logged_the_others_counted_and_the_end_is_kept(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("mcp_broker.supervisor.output.time.monotonic", lambda: clock[0])
    logs.follow("info")
    spoken = Spoken()
    flood = b"x\n" * 30_000
    spoken.say(flood)
    first = [one.getMessage() for one in caplog.records]
    burst = limits.OUTPUT_LINES_BURST
    assert first[:-1] == ["x"] * burst
    assert first[-1].startswith(f"{30_000 - burst} lines are not in this log")
    assert all("t-1: " in logs.TextLines().format(one) for one in caplog.records)
    caplog.clear()
    spoken.say(flood)
    assert not caplog.records, "as often as it may be told, it was"
    clock[0] += 1.0
    last = logs.JsonLines({}, HELD).format(record("the last", exc_info=raised("no such table")))
    spoken.say(b"y\n" * 1000 + last.encode() + b"\nand ")
    said = [one.getMessage() for one in caplog.records]
    assert said.count("y") == limits.OUTPUT_LINES_PER_S
    assert said[-1].startswith(f"{30_000 + 1001 - limits.OUTPUT_LINES_PER_S:g} lines are not in this log")
    spoken.end()
    words = spoken.output.tail.decode().splitlines()
    assert words[-2:] == ["ValueError: no such table", "and "]
    assert "the last" in words
    assert len(spoken.output.tail) <= limits.STDERR_TAIL_BYTES


def test_lines_that_are_not_logged_at_this_level_are_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    logs.follow("error")
    spoken = Spoken(holds_records=False)
    spoken.say(b"x\n" * 5000)
    spoken.end()
    assert not caplog.records
    assert spoken.output.tail.endswith(b"x\n")


@pytest.mark.parametrize(("form", "seen"), [("text", 1), ("json", 2)])
def test_what_is_announced_is_left_out_for_people_and_kept_for_machines(
    form: str, seen: int, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(form, announces=True)
    logs.follow("info", form)
    log = logging.getLogger("mcp_broker.supervisor")
    log.warning("worker %s died", "t-1", extra={logs.ANNOUNCED: True})
    log.warning("something else")
    assert len(capsys.readouterr().err.splitlines()) == seen


def test_level_and_form_can_change_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text")
    logs.follow("warning", "text")
    log = logging.getLogger("mcp_broker.supervisor")
    log.info("unheard")
    logs.follow("debug", "json")
    log.debug("heard")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["heard"]
    assert logs.level() == "debug"


def test_a_child_logs_what_any_module_in_it_logs(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure_child("info", worker_id="t-1")
    logging.getLogger("somebody.s.library").info("hello")
    logging.getLogger("somebody.s.library").debug("unheard")
    (line,) = capsys.readouterr().err.splitlines()
    assert {"event": "hello", "logger": "somebody.s.library", "worker_id": "t-1"}.items() <= json.loads(
        line
    ).items()


def test_a_tool_s_logger_names_tool_and_call_beside_what_the_tool_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logs.follow("info")
    context = ToolContext(call_id="ab" * 16, tool="t.a")
    context.logger.info("%d rows", 3, extra={"table": "birds"})
    (one,) = caplog.records
    line = json.loads(logs.JsonLines().format(one))
    assert line["event"] == "3 rows"
    assert (line["tool"], line["call_id"], line["table"]) == ("t.a", "ab" * 16, "birds")
