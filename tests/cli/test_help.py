"""The habits of friendliness that a script can check: help, suggestions, imports."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

import click
import pytest

from mcp_broker.cli import root, tools

if TYPE_CHECKING:
    from tests.cli.conftest import Run

COMMANDS = [
    *root.MODULES,
    *("credentials issue", "credentials list", "tools show"),
    *(f"tools {verb}" for verb in tools.VERBS),
]


def test_help_is_one_screen_and_names_every_command(run: Run) -> None:
    done = run("--help")
    lines = done.out.splitlines()
    assert done.code == 0
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for name in root.MODULES:
        assert f"\n  {name} " in done.out


def test_no_arguments_show_the_help(run: Run) -> None:
    assert "Usage: mcp-broker COMMAND" in "".join(run()[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_command_help_is_one_screen_with_an_example(run: Run, command: str) -> None:
    done = run(*command.split(), "--help")
    lines = done.out.splitlines()
    assert done.code == 0
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "Example" in done.out
    assert f"mcp-broker {command}" in done.out.split("Example", 1)[1]


def test_sections_list_exactly_the_commands_with_their_own_words() -> None:
    listed = {name: text for section in root.SECTIONS.values() for name, text in section.items()}
    assert set(listed) == set(root.MODULES)
    context = root.root.make_context("mcp-broker", [], resilient_parsing=True)
    for name, text in listed.items():
        command = root.root.get_command(context, name)
        assert command is not None
        assert command.short_help == text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("statsu", "status"), ("cal", "call"), ("tool", "tools"), ("credential", "credentials"), ("wy", "why")],
)
def test_mistyped_command_gets_a_suggestion(run: Run, typed: str, meant: str) -> None:
    done = run(typed)
    assert done.code == 2
    assert "did you mean" in done.err
    assert meant in done.err
    assert done.out == ""


def test_mistyped_subcommand_and_option_get_a_suggestion(run: Run) -> None:
    assert "did you mean issue" in run("credentials", "isue").err
    assert "--timeout" in run("call", "--timeot", "3", "add").err


def test_version(run: Run) -> None:
    done = run("--version")
    assert done.code == 0
    assert done.out.startswith("mcp-broker ")


@pytest.mark.parametrize("arguments", [["--help"], ["call", "--help"], ["completion", "bash"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom mcp_broker.cli import root\n"
        f"assert root.run({arguments!r}) == 0\n"
        "heavy = {'zmq', 'pydantic', 'rich', 'msgspec', 'msgpack', 'jwt', 'nacl', 'cryptography', 'psutil', 'asyncio'}\n"
        "sys.exit(','.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    # 0.05 s on an idle machine; the bound only catches a heavy import that the list above does not name
    assert time.monotonic() - began < 3


def test_completion_knows_live_tool_names(client: object, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    from mcp_broker.cli import call

    context = root.root.make_context("mcp-broker", [], resilient_parsing=True)
    inner = click.Context(tools.tools, parent=context)
    assert [item.value for item in tools.tools.shell_complete(inner, "te")] == ["text.word_count"]
    assert [item.value for item in tools.tools.shell_complete(inner, "pa")] == ["pause"]
    for command in (call.call, *tools.tools.commands.values()):
        (parameter,) = [each for each in command.params if each.name in {"tool", "name"}]
        assert [item.value for item in parameter.shell_complete(context, "te")] == ["text.word_count"]


def test_completion_stays_silent_without_a_broker() -> None:
    from mcp_broker.cli import connection, settings

    assert connection.tool_names(settings.Settings()) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_asks_us_back(run: Run, shell: str) -> None:
    done = run("completion", shell)
    assert done.code == 0
    assert "_MCP_BROKER_COMPLETE" in done.out
    assert done.err == ""


def _all_commands() -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    context = click.Context(root.root)
    for name in root.root.list_commands(context):
        command = root.root.get_command(context, name)
        assert command is not None
        found.append((name, command))
        if isinstance(command, click.Group):
            found += [(f"{name} {inner}", made) for inner, made in command.commands.items()]
    return found


def test_what_the_help_says_of_options_holds_for_the_commands() -> None:
    taken = {
        name: {option for each in command.params for option in each.opts} for name, command in _all_commands()
    }
    assert [name for name, options in taken.items() if "--debug" not in options] == []
    for option in ("--json", "--profile", "--state-dir"):
        assert sum(option in options for options in taken.values()) > len(taken) / 2, option
