"""Where a broker's state and the profiles of its clients are: what is named, in which order it counts, and the files' names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import platformdirs

STATE_DIR_VARIABLE: Final = "MCP_BROKER_STATE_DIR"
PROFILE_VARIABLE: Final = "MCP_BROKER_PROFILE"
CLIENTS_FOLDER: Final = "clients"
DEFAULT_NAME: Final = "default"


def default_state_dir() -> Path:
    """Return the platform's place for our state."""
    return platformdirs.user_state_path("mcp-broker")


def state_dir(explicit: str | Path | None, env: Mapping[str, str]) -> Path:
    """Say where the state lives.

    Args:
        explicit: what the command line says, first.
        env: the environment; MCP_BROKER_STATE_DIR comes second (empty counts as absent).

    Returns:
        The platform's folder for state when neither says anything.
    """
    if chosen := explicit or env.get(STATE_DIR_VARIABLE):
        return Path(chosen).expanduser()
    return default_state_dir()


def profile_in(state: Path, name: str = DEFAULT_NAME) -> Path:
    """Return where a state directory keeps the profile of this name."""
    return state / CLIENTS_FOLDER / f"{name}.toml"


def find_profile(
    explicit: str | Path | None, env: Mapping[str, str], *, state: str | Path | None = None
) -> Path:
    """Say which profile file to use; it need not exist.

    Args:
        explicit: what the caller says, first.
        env: the environment; MCP_BROKER_PROFILE comes second (empty counts as absent).
        state: the state directory if the caller names one; an explicit one beats the variable, since who
            names a broker's state means that broker.
    """
    if explicit:
        return Path(explicit).expanduser()
    if not state and (chosen := env.get(PROFILE_VARIABLE)):
        return Path(chosen).expanduser()
    return profile_in(state_dir(state, env))
