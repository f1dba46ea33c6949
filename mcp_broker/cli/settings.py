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

STATE_DIR_VARIABLE: Final = "MCP_BROKER_STATE_DIR"
#: names of the classes in which calls wait, by their number
PRIORITIES: Final = ("high", "normal", "low")
PROFILE_VARIABLE: Final = "MCP_BROKER_PROFILE"

#: commands that take --profile
_WITH_PROFILE: Final = frozenset(
    {"tools", "call", "status", "ps", "why", "doctor", "scale", "reload", "drain"}
)

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
        given = self.state_dir_given or os.environ.get(STATE_DIR_VARIABLE)
        return Path(given).expanduser().absolute() if given else default_state_dir()

    @property
    def profile(self) -> Path:
        """The profile: option, that of an explicit state directory, environment, default."""
        if self.profile_given:
            return Path(self.profile_given).expanduser().absolute()
        named = os.environ.get(PROFILE_VARIABLE)
        if named and not self.state_dir_given:
            return Path(named).expanduser().absolute()
        return self.state_dir / "clients" / "default.toml"

    def again(self, command: str) -> str:
        """Return a command to copy into any shell, which leads to the same broker as this one."""
        if self.profile_given and command.split(maxsplit=1)[0] in _WITH_PROFILE:
            command += f" --profile {shlex.quote(str(self.profile))}"
        elif self.state_dir != default_state_dir():
            command += f" --state-dir {shlex.quote(str(self.state_dir))}"
        return f"{program()} {command}"


def default_state_dir() -> Path:
    """Return the platform's place for our state."""
    from platformdirs import user_state_path

    return user_state_path("mcp-broker")


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
