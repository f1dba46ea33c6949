"""What the command line says of tools that fail, and how it steers them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker.cli import condition, settings, tools, why
from mcp_broker.core.steering import WISHES

if TYPE_CHECKING:
    from tests.cli.conftest import Run
    from tests.cli.doubles import FakeClient

CONDITION: dict[str, Any] = {
    "tool": "text.word_count",
    "state": "unregistered",
    "since_s": 3.0,
    "reason": "recovery gave it up after a crash: exited with code 7",
    "calls": "end",
    "isolated": True,
    "history": [
        {
            "age_s": 9.0,
            "event": "ready",
            "before": "registered",
            "after": "active",
            "duration_s": 0.1,
            "error": "",
        },
        {
            "age_s": 3.0,
            "event": "done",
            "before": "pausing",
            "after": "paused",
            "duration_s": 6.0,
            "error": "OSError: gone",
        },
    ],
    "breaker": {"state": "half_open", "calls": 24, "failures": 20, "openings": 2, "retry_after_s": 0.0},
    "ladder": {
        "position": "unregister",
        "in_a_row": 4,
        "tried": 4,
        "recovered": 1,
        "success_rate": 0.25,
        "failures": [
            {
                "age_s": 3.0,
                "cause": "crash",
                "principal": "ann",
                "text": "exited with code 7",
                "resources": {"worker": "text-4", "max_rss_kib": 2048, "cpu_s": 0.5},
            }
        ],
        "attempts": [
            {
                "age_s": 8.0,
                "step": "restart",
                "cause": "crash",
                "outcome": "succeeded",
                "duration_s": 0.12,
                "error": "",
            }
        ],
    },
}


def test_why_of_a_tool_tells_state_breaker_recovery_history_and_what_to_do(
    run: Run, client: FakeClient
) -> None:
    client.answer = lambda _tool, _arguments: {"found": True, "kind": "tool", "pool": "text", **CONDITION}
    done = run("why", "text.word_count")
    for fact in (
        "tool text.word_count: unregistered for 3",
        "recovery gave it up after a crash",
        "are refused, and those that waited were ended",
        "half open; 20 of the last 24 calls failed",
        "1 of 4 steps helped",
        "crash: exited with code 7 (text-4: 2.0 MB, 0.5 s of CPU)",
        "restart for a crash: succeeded after 0.12 s",
        "pausing -> paused (done): OSError: gone",
        "tools enable text.word_count",
    ):
        assert fact in done.out, fact


def test_a_tool_of_which_nothing_is_wrong_is_told_in_few_lines() -> None:
    plain: dict[str, Any] = {
        "tool": "add",
        "state": "active",
        "calls": "accept",
        "breaker": None,
        "ladder": None,
        "history": [],
    }
    assert len(condition.told(plain, settings.Settings())) == 4


def test_why_of_a_pool_tells_its_troubled_tools_and_deaths() -> None:
    record = {
        "kind": "pool", "name": "text", "state": "failed", "ready": 0, "min": 2, "restarts": 5, "reason": "died 6 times",
        "troubled": [CONDITION], "deaths": [{"worker_id": "text-4", "pid": 7, "cause": "exited with code 7"}],
    }  # fmt: skip
    told = "\n".join(why.story(record, settings.Settings()))
    for fact in (
        "0 of 2 workers ready",
        "died 6 times",
        "tool text.word_count",
        "worker text-4",
        "scale text auto",
    ):
        assert fact in told, fact


@pytest.mark.parametrize("verb", tools.VERBS)
def test_each_verb_asks_for_the_tool_of_its_name(run: Run, client: FakeClient, verb: str) -> None:
    client.answer = lambda _tool, _arguments: {**CONDITION, "state": "pausing"}
    reason = [] if verb == "history" else ["--reason", "spring"]
    done = run("tools", verb, "text.word_count", *reason)
    asked = {"tool": "text.word_count", **({"reason": "spring"} if reason else {})}
    assert client.calls == [(f"system.tools.{verb}", asked, None)]
    assert done.out.startswith("tool text.word_count: pausing")
    assert json.loads(run("tools", verb, "text.word_count", "--json").out)["state"] == "pausing"


def test_every_wish_has_a_verb_in_its_own_words() -> None:
    assert {verb: text for verb, (_, text) in WISHES.items()} == tools.VERBS


def test_a_verb_that_there_is_not_is_a_mistake_on_the_command_line(run: Run, client: FakeClient) -> None:
    done = run("tools", "break", "text.word_count")
    assert done.code == 2
    assert "there is no command 'break'" in done.err
    assert not client.calls


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pause"], "Missing argument 'TOOL'"),
        (["puase", "text.word_count"], "did you mean pause"),
        (["history", "text.word_count", "--reason", "x"], "No such option '--reason'"),
        (["text.word_count", "--reason", "x"], "No such option '--reason'"),
        (["--tag", "x", "pause", "text.word_count"], "are for the list"),
    ],
)
def test_words_that_do_not_belong_together_are_mistakes_and_ask_nothing(
    run: Run, client: FakeClient, words: list[str], said: str
) -> None:
    done = run("tools", *words)
    assert (done.code, client.calls, client.tools_asked) == (2, [], 0)
    assert said in done.err


def test_a_tool_that_is_called_like_a_command_can_be_shown(run: Run, client: FakeClient) -> None:
    client.definitions = [{**client.definitions[0], "name": "pause"}]
    assert run("tools", "show", "pause").out.startswith("pause ")
