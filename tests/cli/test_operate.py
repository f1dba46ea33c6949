"""scale, reload and drain: what they ask for, what they say was done, and what to do next."""

from __future__ import annotations

import json
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker.errors import InvalidArgument, NotFound, Unavailable

if TYPE_CHECKING:
    from tests.cli.conftest import Run
    from tests.cli.doubles import FakeClient


def pool(name: str = "text", **changes: Any) -> dict[str, Any]:
    return {"pool": name, "state": "ready", "workers": 3, "ready": 3, "reason": "", **changes}


def reloaded(**changes: Any) -> dict[str, Any]:
    kinds = ("added", "removed", "changed", "resized", "unchanged", "limits", "at_start", "pools")
    return {**{kind: [] for kind in kinds}, **changes}


def test_scale_asks_for_a_number_and_says_how_many_are_ready(client: FakeClient, run: Run) -> None:
    client.answer = lambda *_: pool()
    done = run("scale", "text", "3")
    assert (done.code, done.out) == (0, "pool text: 3 of 3 workers ready\n")
    assert client.calls == [("system.pools.scale", {"pool": "text", "workers": 3}, 360.0)]
    assert client.priorities == [0]
    assert json.loads(run("scale", "text", "3", "--json").out) == pool()


def test_scale_auto_asks_for_what_the_configuration_says(client: FakeClient, run: Run) -> None:
    client.answer = lambda *_: pool()
    assert run("scale", "text", "auto", "--timeout", "5").code == 0
    assert client.calls == [("system.pools.scale", {"pool": "text"}, 5.0)]


def test_scale_to_nothing_says_how_to_come_back(client: FakeClient, run: Run) -> None:
    client.answer = lambda *_: pool(state="closed", workers=0, ready=0)
    assert "scale text auto" in run("scale", "text", "0").err


@pytest.mark.parametrize("words", [("text", "many"), ("text", "-1"), ("text",)])
def test_scale_without_a_number_is_a_matter_of_syntax(
    client: FakeClient, run: Run, words: tuple[str, ...]
) -> None:
    assert run("scale", *words).code == 2
    assert client.calls == []


def test_a_pool_that_does_not_come_up_is_a_failure_with_its_reason(client: FakeClient, run: Run) -> None:
    def answer(*_: object) -> Any:
        raise Unavailable("pool 'text' did not come up: no module named text", {"pool": "text"})

    client.answer = answer
    done = run("scale", "text", "2")
    assert done.code == 1
    assert "did not come up: no module named text" in done.err
    assert "status" in done.err


def test_an_unknown_pool_is_no_unknown_tool(client: FakeClient, run: Run) -> None:
    def answer(*_: object) -> Any:
        raise NotFound("there is no pool 'txt'; did you mean text", {"hint": "mcp-broker status"})

    client.answer = answer
    done = run("scale", "txt", "2")
    assert done.code == 1
    assert "next: mcp-broker status" in done.err


def test_reload_says_what_became_of_what_is_different(client: FakeClient, run: Run) -> None:
    client.answer = lambda *_: reloaded(
        added=["sql"],
        removed=["old"],
        changed=["text"],
        limits=["limits.drain_s"],
        at_start=["broker.host"],
        pools=[pool(), pool("sql", ready=1)],
    )
    done = run("reload")
    assert done.out.splitlines() == [
        "new: sql (1 ready)",
        "gone: old",
        "replaced: text (3 ready)",
        "in force now: limits.drain_s",
        "in force after a restart only (stop, then start): broker.host",
    ]
    assert client.calls == [("system.reload", {"pools": []}, 360.0)]


def test_reload_of_the_same_says_so_and_of_pools_names_them(client: FakeClient, run: Run) -> None:
    client.answer = lambda *_: reloaded()
    assert run("reload", "text", "sql").out == "nothing is different\n"
    assert client.calls[0][1] == {"pools": ["text", "sql"]}


def test_a_configuration_with_a_fault_is_a_failure_that_names_the_place(client: FakeClient, run: Run) -> None:
    def answer(*_: object) -> Any:
        raise InvalidArgument("the configuration was not taken: broker.toml, line 3: unknown key 'mni'")

    client.answer = answer
    done = run("reload", "--json")
    assert done.code == 1
    assert json.loads(done.out)["error"]["code"] == "INVALID_ARGUMENT"
    assert "broker.toml, line 3" in done.err


@pytest.mark.parametrize(
    ("words", "arguments", "answer", "said"),
    [
        (("text",), {"target": "text"}, {"pools": [pool()], "worker": None}, "drained: text"),
        ((), {}, {"pools": [pool(), pool("sql")], "worker": None}, "drained: text, sql"),
        (
            ("text-4",),
            {"target": "text-4"},
            {"pools": [pool()], "worker": "text-4"},
            "worker text-4 has finished and is replaced",
        ),
    ],
)
def test_drain_says_what_has_finished(
    client: FakeClient,
    run: Run,
    words: tuple[str, ...],
    arguments: dict[str, str],
    answer: dict[str, Any],
    said: str,
) -> None:
    client.answer = lambda *_: answer
    done = run("drain", *words)
    assert done.code == 0
    assert said in done.out
    assert client.calls == [("system.drain", arguments, 360.0)]
    assert ("auto" in done.err) is (answer["worker"] is None)


def test_an_interrupted_command_says_that_it_goes_on(client: FakeClient, run: Run) -> None:
    class Interrupted(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            del timeout
            raise KeyboardInterrupt

    client.future = Interrupted()
    done = run("reload")
    assert done.code == 130
    assert "it goes on" in done.err
