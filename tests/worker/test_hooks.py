"""Hooks of a module: when they run, in which order, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from mcp_broker.errors import ConfigError
from mcp_broker.worker import catalogue, hooks, on, tool
from mcp_broker.worker.hooks import Around, Hooks

SOURCE = '''
from mcp_broker.worker import on, tool

seen = []

@tool(name="h.one", recover=True)
def one(x: int = 1) -> int:
    """Return."""
    return x

@tool(name="h.two")
def two() -> None:
    """Return."""

@on("start")
def first() -> None:
    seen.append("first")

@on("start", one)
def second() -> None:
    seen.append("second")

@on("stop")
def broken() -> None:
    raise OSError("gone")

@on("stop")
def after_broken() -> None:
    seen.append("stopped")

@on("before", "h.one")
def before(tool: str, arguments: dict) -> None:
    seen.append(tool)
'''


@pytest.fixture
def module() -> Iterator[ModuleType]:
    made = ModuleType("hooked_tools")
    sys.modules["hooked_tools"] = made
    before = len(hooks.made)
    exec(SOURCE, vars(made))  # noqa: S102 (what a worker does with a module)
    yield made
    del sys.modules["hooked_tools"], hooks.made[before:]


def test_start_hooks_run_in_the_order_of_their_making_and_stop_hooks_all_of_them(
    module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Hooks.of("hooked_tools")
    found.begin()
    found.end()
    assert module.seen == ["first", "second", "stopped"]
    assert "OSError: gone" in capsys.readouterr().err


def test_the_broker_is_told_which_events_a_tool_has_hooks_for(module: ModuleType) -> None:
    found = Hooks.of("hooked_tools")
    assert found.traits(module.one) == ("start", "stop", "recover")
    assert found.traits(module.two) == ("start", "stop")


def test_a_hook_that_fails_is_told_with_its_place_and_the_others_run_all_the_same(module: ModuleType) -> None:
    assert Hooks.of("hooked_tools").run("stop", "h.one").startswith("OSError: gone (")
    assert module.seen == ["stopped"]
    assert Hooks.of("hooked_tools").run("pause", "h.one") == ""


class MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("\udcff"), "ValueError: \\udcff ("),
        (MuteError(), "MuteError: (its text cannot be shown) ("),
        (SystemExit(0), "SystemExit: 0 ("),
        (KeyboardInterrupt(), "KeyboardInterrupt:  ("),
    ],
)
def test_whatever_a_hook_raises_is_noted_and_can_be_sent(error: BaseException, says: str) -> None:
    def broken() -> None:
        raise error

    seen: list[int] = []
    told = Hooks(
        [hooks.Hook("reset", broken, frozenset()), hooks.Hook("reset", lambda: seen.append(1), frozenset())]
    ).run("reset", "any")
    assert told.encode().decode().startswith(says)
    assert seen == [1]


def test_a_stop_hook_that_fails_where_there_is_no_standard_error_is_no_fault(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Hooks.of("hooked_tools")
    monkeypatch.setattr(sys, "stderr", None)
    found.end()
    assert module.seen == ["stopped"]


def test_a_tool_without_hooks_around_it_is_called_as_it_is(module: ModuleType) -> None:
    found = Hooks.of("hooked_tools")
    assert found.around(module.two) is module.two.function
    assert found.around(module.one)(x=3) == 3
    assert module.seen == ["h.one"]


def test_a_hook_of_a_tool_that_there_is_not_is_the_authors_fault(module: ModuleType) -> None:
    vars(module)["on"]("reset", "h.three")(lambda: None)
    hooks.made[-1].function.__module__ = "hooked_tools"
    with pytest.raises(ConfigError, match=r"hooks of h\.three"):
        catalogue.hooks("hooked_tools", catalogue.collect("hooked_tools", vars(module)))


def test_only_what_there_is_can_be_hooked_and_only_by_plain_functions() -> None:
    with pytest.raises(TypeError, match="no event 'never'; there are activate, after"):
        on("never")

    async def later() -> None: ...

    with pytest.raises(TypeError, match="plain function"):
        on("start")(later)


def around(function: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    def before(name: str, arguments: dict[str, Any]) -> None:
        seen.append(f"before {name} {arguments}")

    def after(_name: str, _arguments: dict[str, Any], result: Any) -> None:
        seen.append(f"after {result}")

    def error(_name: str, _arguments: dict[str, Any], raised: Exception) -> None:
        seen.append(f"error {raised}")

    return Around(tool(name="h.kind")(function), [before], [after], [error]).wrapped()


def test_hooks_run_around_every_kind_of_tool() -> None:
    def plain(x: int) -> int:
        return x

    def stream(x: int) -> Iterator[int]:
        yield x

    async def later(x: int) -> int:
        return x

    async def stream_later(x: int) -> AsyncIterator[int]:
        yield x

    async def both() -> list[Any]:
        return [await around(later, seen)(x=1), [part async for part in around(stream_later, seen)(x=1)]]

    seen: list[str] = []
    assert around(plain, seen)(x=1) == 1
    assert list(around(stream, seen)(x=1)) == [1]
    assert asyncio.run(both()) == [1, [1]]
    begins = "before h.kind {'x': 1}"
    assert seen == [begins, "after 1", begins, "after None", begins, "after 1", begins, "after None"]


def test_error_hooks_see_what_was_raised_and_the_call_ends_with_that() -> None:
    def wrong() -> None:
        raise ValueError("so")

    def broken(*_arguments: Any) -> None:
        raise OSError("the hook itself")

    seen: list[str] = []
    with pytest.raises(ValueError, match="so"):
        around(wrong, seen)()
    assert seen[-1] == "error so"
    with pytest.raises(ValueError, match="so"):
        Around(tool(name="h.kind")(wrong), [], [], [broken]).wrapped()()


def test_a_before_hook_that_raises_keeps_the_call_from_running() -> None:
    def refuse(*_arguments: Any) -> None:
        raise PermissionError("not now")

    ran: list[int] = []

    def run() -> None:
        ran.append(1)

    with pytest.raises(PermissionError):
        Around(tool(name="h.kind")(run), [refuse], [], []).wrapped()()
    assert not ran
