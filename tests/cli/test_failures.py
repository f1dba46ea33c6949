"""Exit codes, the words of errors, and that a user never meets a traceback."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker import errors
from mcp_broker.cli import failures
from mcp_broker.cli.settings import Settings
from tests.cli.doubles import CERTIFICATE, FakeClient

if TYPE_CHECKING:
    from tests.cli.conftest import Run

CODES = {
    **dict.fromkeys(errors.CALL_ERRORS, 1),
    "FORBIDDEN": 3,
    "UNAUTHENTICATED": 3,
    "DEADLINE_EXCEEDED": 5,
}


def failing(client: FakeClient, error: BaseException) -> None:
    def answer(_tool: str, _arguments: dict[str, Any]) -> Any:
        raise error

    client.answer = answer


@pytest.mark.parametrize("code", errors.CALL_ERRORS)
def test_every_call_error_has_its_exit_code(run: Run, client: FakeClient, code: str) -> None:
    failing(client, errors.call_error(code, "it did not work"))
    done = run("call", "add", "{}")
    assert done.code == CODES[code]
    assert done.out == ""
    assert 1 <= len(done.err.splitlines()) <= 3
    assert f"error: {code}: it did not work" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.CredentialError("x"), 3),
        (errors.NotReachable("x"), 4),
        (errors.ConfigError("x"), 1),
        (errors.SupervisionError("x"), 1),
        (OSError(13, "Permission denied", "/a/file"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_other_errors_have_their_exit_code(error: BaseException, code: int) -> None:
    assert failures.explain(error, Settings()).exit_code == code


def test_every_call_error_without_its_own_hint_gets_one_or_needs_none() -> None:
    assert set(failures.HINTS) <= {*errors.CALL_ERRORS, "NOT_REACHABLE"}


def test_hint_leads_to_the_same_broker() -> None:
    error = errors.InvalidArgument("no")
    error.tool = "add"
    (_, hint) = failures.explain(error, Settings(profile_given="/a b/p.toml")).lines()
    assert hint.endswith("tools add --profile '/a b/p.toml'  # its arguments and an example call")
    (_, hint) = failures.explain(error, Settings(state_dir_given="/s")).lines()
    assert "tools add --state-dir /s" in hint


def test_a_bare_command_that_the_broker_hints_at_leads_to_the_same_broker() -> None:
    error = errors.NotFound("there is no worker 't-9'", {"hint": "mcp-broker ps"})
    (_, hint) = failures.explain(error, Settings(state_dir_given="/s")).lines()
    assert hint.endswith("ps --state-dir /s")
    error = errors.NotFound("no", {"hint": "mcp-broker start makes one"})
    (_, hint) = failures.explain(error, Settings(state_dir_given="/s")).lines()
    assert hint.endswith("mcp-broker start makes one")


def test_json_error_is_one_document_and_the_message_goes_to_standard_error(
    run: Run, client: FakeClient
) -> None:
    failing(client, errors.NotFound("there is no tool 'ad'", {"did_you_mean": ["add"]}))
    done = run("call", "ad", "{}", "--json")
    error = json.loads(done.out)["error"]
    assert done.code == 1
    assert error["code"] == "NOT_FOUND"
    assert error["details"]["did_you_mean"] == ["add"]
    assert error["hint"]
    assert not error["retryable"]
    assert "did you mean add?" in done.err


def test_syntax_error_as_json(run: Run) -> None:
    done = run("call", "--json")
    assert done.code == 2
    assert json.loads(done.out)["error"]["code"] == "USAGE"


def test_all_faults_are_named(run: Run, client: FakeClient) -> None:
    faults = [
        {
            "path": "/a",
            "expected": "integer",
            "received": "'x' (string)",
            "message": "argument 'a': expected integer",
        },
        {"path": "/b", "expected": "integer", "received": "nothing", "message": "argument 'b' is missing"},
    ]
    failing(
        client,
        errors.InvalidArgument(
            "add: argument 'a': expected integer", {"faults": faults, "signature": "add(a: int, b: int)"}
        ),
    )
    done = run("call", "add", "{}")
    assert "argument 'b' is missing" in done.err
    assert done.err.count("expected integer") == 1
    assert "add(a: int, b: int)" in done.err
    assert len(done.err.splitlines()) <= 3


def test_lost_worker_is_described(run: Run, client: FakeClient) -> None:
    error = errors.WorkerLost("the worker of add died", {"certificate": CERTIFICATE})
    error.call_id, error.tool = bytes(range(16)), "add"
    failing(client, error)
    done = run("call", "add", "{}")
    for fact in ("pid 4242", "SIGKILL", bytes(range(16)).hex(), "last words"):
        assert fact in done.err
    assert len(done.err.splitlines()) == 3


def test_tool_failure_shows_the_authors_line(run: Run, client: FakeClient) -> None:
    failing(client, errors.ToolFailed("ValueError: no", {"file": "/home/me/tools.py", "line": 12}))
    assert "/home/me/tools.py:12" in run("call", "add", "{}").err


def test_hint_is_not_said_twice() -> None:
    failure = failures.explain(
        errors.CredentialError("mode 0644; chmod 600 f", {"hint": "chmod 600 f"}), Settings()
    )
    assert failure.lines() == ["error: CREDENTIAL: mode 0644", "  next: chmod 600 f"]


def test_our_own_bug_shows_no_traceback_unless_asked(run: Run, client: FakeClient) -> None:
    failing(client, ZeroDivisionError("oh"))
    done = run("call", "add", "{}")
    assert done.code == 1
    assert "Traceback" not in done.err
    assert "--debug" in done.err
    assert "Traceback" in run("call", "add", "{}", "--debug").err


def test_options_may_stand_before_the_command(run: Run, client: FakeClient) -> None:
    failing(client, ZeroDivisionError("oh"))
    done = run("--json", "--debug", "call", "add", "{}")
    assert "Traceback" in done.err
    assert json.loads(done.out)["error"]["code"] == "INTERNAL"
