from __future__ import annotations

import io
import json
import sys
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker import Priority
from mcp_broker.cli import output, schema, settings
from mcp_broker.errors import InvalidArgument, ToolFailed
from tests.cli.doubles import ADD, FakeClient

if TYPE_CHECKING:
    from tests.cli.conftest import Run


def test_json_and_pairs_make_the_same_call(run: Run, client: FakeClient) -> None:
    client.answer = lambda _tool, arguments: arguments["a"] + arguments["b"]
    assert run("call", "add", '{"a": 1, "b": 2}') == (0, "3\n", "")
    assert client.tools_asked == 0
    assert run("call", "add", "a=1", "b=2") == (0, "3\n", "")
    assert client.tools_asked == 1


def test_text_stays_text_where_the_schema_says_so(run: Run, client: FakeClient) -> None:
    run("call", "text.word_count", "text=12", "top=3")
    assert client.calls[0][1] == {"text": "12", "top": 3}


def test_what_does_not_fit_is_left_to_the_tool(run: Run, client: FakeClient) -> None:
    run("call", "add", "a=x", "b=1.5")
    assert client.calls[0][1] == {"a": "x", "b": 1.5}


def test_arguments_from_standard_input(run: Run, client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"a": 1}'))
    run("call", "add", "-")
    assert client.calls[0][1] == {"a": 1}


def test_no_arguments_are_an_empty_map(run: Run, client: FakeClient) -> None:
    run("call", "add")
    assert client.calls[0][1] == {}


@pytest.mark.parametrize("text", ['{"a":', "[1]", "plain", "=3"])
def test_arguments_of_no_form_are_a_syntax_error(run: Run, client: FakeClient, text: str) -> None:
    assert run("call", "add", text).code == 2
    assert client.calls == []


def test_timeout_is_passed_on(run: Run, client: FakeClient) -> None:
    run("call", "add", "{}", "--timeout", "1.5")
    run("call", "add", "{}")
    assert [timeout_s for _, _, timeout_s in client.calls] == [1.5, None]
    assert run("call", "add", "{}", "--timeout", "0").code == 2


def test_priority_is_passed_on_by_its_name(run: Run, client: FakeClient) -> None:
    client.answer = lambda _tool, _arguments: []
    run("call", "add", "{}")
    run("call", "add", "{}", "--priority", "high")
    run("call", "add", "{}", "--stream", "--priority", "low")
    assert client.priorities == [Priority.NORMAL, Priority.HIGH, Priority.LOW]
    assert run("call", "add", "{}", "--priority", "urgent").code == 2
    assert tuple(priority.name.lower() for priority in Priority) == settings.PRIORITIES


def test_bytes_are_base64_and_raw_as_they_are(
    client: FakeClient, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    from mcp_broker.cli import root

    client.answer = lambda _tool, _arguments: b"\x00\xff"
    assert root.run(["call", "add", "{}"]) == 0
    assert root.run(["call", "add", "{}", "--raw"]) == 0
    assert capfdbinary.readouterr().out == b'"AP8="\n\x00\xff'


def test_raw_text_has_no_quotes(run: Run, client: FakeClient) -> None:
    client.answer = lambda _tool, _arguments: "two\nlines"
    assert run("call", "add", "{}").out == '"two\\nlines"\n'
    assert run("call", "add", "{}", "--raw").out == "two\nlines\n"


def test_piped_result_is_one_line_without_colour(run: Run, client: FakeClient) -> None:
    client.answer = lambda _tool, _arguments: {"ä": [1, None]}
    done = run("call", "add", "{}")
    assert done.out == '{"ä": [1, null]}\n'


def test_stream_prints_a_document_a_line(run: Run, client: FakeClient) -> None:
    client.answer = lambda _tool, _arguments: [{"n": 1}, {"n": 2}]
    done = run("call", "add", "{}", "--stream")
    assert [json.loads(line) for line in done.out.splitlines()] == [{"n": 1}, {"n": 2}]


def test_progress_is_a_bar_where_standard_error_is_a_terminal(
    run: Run, client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[object, float, str]] = []

    class Bar:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def add_task(self, title: str, **_: object) -> str:
            return title

        def start(self) -> None:
            shown.append(("start", 0.0, ""))

        def stop(self) -> None:
            shown.append(("stop", 0.0, ""))

        def update(self, task: str, *, total: object, completed: float, message: str) -> None:
            shown.append((total, completed, message))

    monkeypatch.setattr("rich.progress.Progress", Bar)
    client.answer = lambda _tool, _arguments: 3
    assert run("call", "add", "{}") == (0, "3\n", "")
    assert shown == [], "nobody looks"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("call", "add", "{}") == (0, "3\n", "")
    assert shown == [("start", 0.0, ""), (None, 0.0, "begins"), (1.0, 0.5, "half way"), ("stop", 0.0, "")]


def test_stream_that_fails_ends_with_the_error(run: Run, client: FakeClient) -> None:
    def parts() -> Any:
        yield 1
        raise ToolFailed("ValueError: no")

    client.answer = lambda _tool, _arguments: parts()
    done = run("call", "add", "{}", "--stream", "--json")
    first, last = map(json.loads, done.out.splitlines())
    assert (first, last["error"]["code"], done.code) == (1, "TOOL_FAILED", 1)


class Interrupted(Future[Any]):
    """Waiting for it is what Ctrl-C ends."""

    def __init__(self) -> None:
        super().__init__()
        self.was_cancelled = False

    def result(self, timeout: float | None = None) -> Any:
        raise KeyboardInterrupt

    def cancel(self) -> bool:
        self.was_cancelled = True
        return True


def test_interrupt_cancels_the_call(run: Run, client: FakeClient) -> None:
    client.future = future = Interrupted()
    assert run("call", "add", "{}").code == 130
    assert future.was_cancelled


# -- schema -----------------------------------------------------------------------------------------


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


@pytest.mark.parametrize(
    ("part", "text", "value"),
    [
        ({"type": "string"}, "true", "true"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", "null"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "3", 3),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "3.5", "3.5"),
        ({"type": "number"}, "3", 3),
        ({"type": "boolean"}, "true", True),
        ({"type": "boolean"}, "yes", "yes"),
        ({"type": "array", "items": {"type": "string"}}, "[1]", [1]),
        ({"type": "array", "items": {"type": "string"}}, "1", ["1"]),
        ({"type": "array", "items": {"type": "integer"}}, "1", [1]),
        ({"type": "object"}, '{"x": 1}', {"x": 1}),
        ({"type": "string", "format": "binary"}, "AP8=", b"\x00\xff"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"$ref": "#/$defs/Mode"}, "7", "7"),
        ({}, "7", 7),
        ({}, "seven", "seven"),
    ],
)
def test_value_is_read_by_its_schema(part: dict[str, Any], text: str, value: Any) -> None:
    whole = {**of(x=part), "$defs": {"Mode": {"type": "string"}}}
    assert schema.read_pairs([("x", text)], whole) == {"x": value}


def test_repeated_key_makes_a_list_only_where_one_fits() -> None:
    pairs = [("x", "1"), ("x", "2")]
    assert schema.read_pairs(pairs, of(x={"type": "array", "items": {"type": "integer"}})) == {"x": [1, 2]}
    with pytest.raises(InvalidArgument, match="x is given twice"):
        schema.read_pairs(pairs, of(x={"type": "integer"}))


def test_bytes_that_are_not_base64_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="base64"):
        schema.read_pairs([("x", "ü")], of(x={"type": "string", "format": "binary"}))


def test_signature_and_example() -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "top": {"type": "integer", "default": 10}, "any": {}},
        "required": ["a"],
    }
    assert (
        schema.signature("t", parameters, {"type": "object"})
        == "t(a: integer, top: integer = 10, any: any = null) -> object"
    )
    assert schema.example_call("t", parameters) == "call t '{\"a\": 1}'"
    assert schema.example_call("t", {}) == "call t"
    assert schema.signature("add", ADD["parameters"]) == "add(a: integer, b: integer)"


def test_broken_schema_takes_everything() -> None:
    assert schema.load("no json") == {}
    assert schema.properties({"properties": 3}) == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("nan"), '"nan"'),
        ({1: b"a"}, '{"1": "YQ=="}'),
        ((1, {2}), "[1, [2]]"),
        (object, "\"<class 'object'>\""),
    ],
)
def test_any_payload_becomes_json(value: Any, text: str) -> None:
    assert output.dumps(value, pretty=False) == text
