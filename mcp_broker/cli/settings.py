"""The options that every command takes, and the places they lead to.

They may stand before or after the command; the later one counts.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from mcp_broker.auth import places

#: names of the classes in which calls wait, by their number
PRIORITIES: Final = ("high", "normal", "low")

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(slots=True)
class Settings:
    """What the user asked for on the whole command line."""

    as_json: bool = False
    debug: bool = False
    profile_given: str | None = None
    state_dir_given: str | None = None

    @property
    def state_dir(self) -> Path:
        """The state directory: option, environment, platform."""
        return places.state_dir(self.state_dir_given, os.environ).absolute()

    @property
    def profile(self) -> Path:
        """The profile: option, that of an explicit state directory, environment, default."""
        return places.find_profile(self.profile_given, os.environ, state=self.state_dir_given).absolute()

    def again(self, command: str) -> str:
        """Return a command to copy into any shell, which leads to the same broker as this one."""
        taken = _options_of(command)
        if self.profile_given and "--profile" in taken:
            command += f" --profile {shlex.quote(str(self.profile))}"
        elif self.state_dir != places.default_state_dir() and "--state-dir" in taken:
            command += f" --state-dir {shlex.quote(str(self.state_dir))}"
        return f"{program()} {command}"


def _options_of(line: str) -> set[str]:
    """Return the options that the command of a line takes."""
    from mcp_broker.cli.root import root

    command: click.Command = root
    for word in line.split():
        found = (
            command.get_command(click.Context(command), word) if isinstance(command, click.Group) else None
        )
        if found is None:
            break
        command = found
    return {option for parameter in command.params for option in parameter.opts}


def program() -> str:
    """Return how this program was called, so that a printed command runs in the same directory."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m mcp_broker"
    found = shutil.which("mcp-broker")
    if called.name != "mcp-broker" or (found and Path(found).resolve() == called.resolve()):
        return "mcp-broker"
    return shlex.quote(str(called))


def current(context: click.Context | None = None) -> Settings:
    """Return the settings of the running command."""
    context = context or click.get_current_context()
    settings = context.find_root().obj
    if not isinstance(settings, Settings):
        settings = context.find_root().obj = Settings()
    return settings


def _store(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def store(context: click.Context, _parameter: click.Parameter, value: Any) -> None:  # noqa: ANN401 (click's)
        if value:
            setattr(current(context), field, value)

    return store


def shared(*names: str, hidden: bool = False) -> Callable[[_Command], _Command]:
    """Add the shared options by name: json, debug, profile, state-dir."""
    known = {
        "state-dir": click.option(
            "--state-dir",
            metavar="DIR",
            hidden=hidden,
            expose_value=False,
            is_eager=True,
            callback=_store("state_dir_given"),
            help="State directory of the broker.",
        ),
        "profile": click.option(
            "--profile",
            metavar="FILE",
            hidden=hidden,
            expose_value=False,
            is_eager=True,
            callback=_store("profile_given"),
            help="Connect with this profile.",
        ),
        "json": click.option(
            "--json",
            is_flag=True,
            hidden=hidden,
            expose_value=False,
            is_eager=True,
            callback=_store("as_json"),
            help="Print one JSON document.",
        ),
        "debug": click.option(
            "--debug",
            is_flag=True,
            hidden=hidden,
            expose_value=False,
            is_eager=True,
            callback=_store("debug"),
            help="Show tracebacks.",
        ),
    }

    def decorate(command: _Command) -> _Command:
        for name in reversed((*names, "debug")):
            command = known[name](command)
        return command

    return decorate
