"""Configuration: one TOML file and the environment, read once into frozen, validated values.

An unknown key is an error that names it, the nearest known key, the file and the line. The key of a table that
no version reads yet is refused by name: a limit that nobody enforces must not look as if it were in force.

The environment overrides single keys of the tables without sub-tables: ``MCP_BROKER_BROKER__CLIENT_PORT=7000`` is
``client_port`` in ``[broker]``. Values are read as TOML, and as plain text when they are none.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from mcp_broker.config.tables import (
    BrokerTable,
    Config,
    LimitsTable,
    ObserveTable,
    PoolLimits,
    PoolTable,
    PortsTable,
    StateTable,
    Table,
)
from mcp_broker.errors import ConfigError

__all__ = [
    "BrokerTable",
    "Config",
    "LimitsTable",
    "ObserveTable",
    "PoolLimits",
    "PoolTable",
    "PortsTable",
    "StateTable",
    "Table",
    "load",
    "parse",
    "shipped_pools",
    "skipped_pools",
]

_ENVIRONMENT_PREFIX: Final = "MCP_BROKER_"

#: tables whose names are taken for a later version: refused by name, never silently accepted
_POOL_NAME: Final = re.compile(r"^[a-z][a-z0-9_.]{0,63}\Z")
_TABLES: Final[Mapping[str, type[Table]]] = {
    "broker": BrokerTable,
    "limits": LimitsTable,
    "state": StateTable,
    "observe": ObserveTable,
    "ports": PortsTable,
}


class _Source:
    """The text that a configuration came from, to say where in it a fault stands."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._text = text

    def at(self, path: tuple[str | int, ...]) -> str:
        """Return "FILE, line N" for a key, or the file alone when its line cannot be told."""
        keys = [str(key) for key in path if not isinstance(key, int)]
        table: list[str] = []
        best: int | None = None
        for number, line in enumerate(self._text.splitlines(), start=1):
            if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
                table = [part.strip().strip("\"'") for part in header[1].split(".")]
                if table == keys[: len(table)] and table:
                    best = number
                if table == keys:
                    return f"{self.name}, line {number}"
            elif assignment := re.match(r"\s*[\"']?([\w.-]+)[\"']?\s*=", line):
                full = [*table, *assignment[1].split(".")]
                if full == keys:
                    return f"{self.name}, line {number}"
        return self.name if best is None else f"{self.name}, line {best}"


def load(path: Path | str | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Read a configuration, or the default one when there is no file.

    Args:
        path: the TOML file.
        environ: the environment; the process's own by default.

    Raises:
        ConfigError: the file cannot be read, or says something that we do not know or cannot do.
    """
    environ = os.environ if environ is None else environ
    text, folder, name = "", Path.cwd(), "the configuration"
    if path is not None:
        file = Path(path)
        folder, name = file.absolute().parent, str(file)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(
                f"cannot read the configuration {file}: {reason}", {"file": str(file)}
            ) from error
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name} is not TOML: {error}", {"file": name}) from error
    return _validated(raw, _Source(name, text), folder, environ)


def parse(text: str, *, environ: Mapping[str, str] | None = None) -> Config:
    """Read a configuration from text; paths in it are relative to the working directory.

    Raises:
        ConfigError: as :func:`load`.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration is not TOML: {error}") from error
    return _validated(raw, _Source("the configuration", text), Path.cwd(), environ or {})


#: shipped pools whose tools need a package of the extra [tools] -> the module that it installs
_NEEDS: Final[Mapping[str, str]] = {"sql": "duckdb", "sequence": "Bio"}


def shipped_pools() -> dict[str, PoolTable]:
    """Return the pools of a start without configuration: those whose packages are installed."""
    demo_data = str(resources.files("mcp_broker") / "demo_data")
    pools = {
        "echo": PoolTable(module="mcp_broker_workers.echo"),
        "text": PoolTable(module="mcp_broker_workers.text"),
        "sql": PoolTable(module="mcp_broker_workers.sql", options={"folder": demo_data}),
        "sequence": PoolTable(module="mcp_broker_workers.sequence"),
    }
    return {name: pool for name, pool in pools.items() if _is_installed(name)}


def skipped_pools(config: Config) -> tuple[str, ...]:
    """Return the shipped pools that a start without configuration leaves out, since their packages are missing."""
    if config.pools != shipped_pools():
        return ()
    return tuple(name for name in _NEEDS if not _is_installed(name))


def _is_installed(pool: str) -> bool:
    return pool not in _NEEDS or importlib.util.find_spec(_NEEDS[pool]) is not None


# -- from TOML to values ---------------------------------------------------------------------------


def _validated(raw: dict[str, Any], source: _Source, folder: Path, environ: Mapping[str, str]) -> Config:
    _refuse_unknown_keys(raw, source)
    _override(raw, environ)
    try:
        config = Config.model_validate(_tuples(raw))
    except ValidationError as error:
        raise _explain(error, source) from error
    pools = {name: _resolved(pool, folder) for name, pool in config.pools.items()} or shipped_pools()
    for name, pool in pools.items():
        if pool.python is not None and not os.access(pool.python, os.X_OK):
            at = source.at(("pools", name, "python"))
            raise ConfigError(f"{at}: the interpreter {pool.python} of pool {name!r} cannot be run")
    return config.model_copy(update={"pools": pools})


def _refuse_unknown_keys(raw: dict[str, Any], source: _Source) -> None:
    for key in raw:
        _check_key((), key, Config, source)
    for table, model in _TABLES.items():
        for key in _a_table(raw, (table,), source):
            _check_key((table,), key, model, source)
    for name in _a_table(raw, ("pools",), source):
        if not _POOL_NAME.match(name):
            raise ConfigError(
                f"{source.at(('pools', name))}: {name!r} is no name for a pool;"
                " use lower-case letters, digits, '_' and '.', at most 64"
            )
        for key in _a_table(raw["pools"], (name,), source, within=("pools",)):
            _check_key(("pools", name), key, PoolTable, source)
        for key in _a_table(raw["pools"][name], ("limits",), source, within=("pools", name)):
            _check_key(("pools", name, "limits"), key, PoolLimits, source)


def _a_table(
    raw: dict[str, Any], path: tuple[str], source: _Source, within: tuple[str, ...] = ()
) -> dict[str, Any]:
    value = raw.get(path[0], {})
    if not isinstance(value, dict):
        where = ".".join((*within, *path))
        raise ConfigError(f"{source.at((*within, *path))}: {where!r} must be a table, [{where}]")
    return value


def _check_key(path: tuple[str, ...], key: str, model: type[Table], source: _Source) -> None:
    if key in model.model_fields:
        return
    at = source.at((*path, key))
    place = f"in [{'.'.join(path)}]" if path else "at the top"
    known = sorted(model.model_fields)
    near = difflib.get_close_matches(key, known, n=1)
    mend = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
    if model is PoolTable and key in PoolLimits.model_fields:
        mend = f"it belongs in [{'.'.join(path)}.limits]"
    raise ConfigError(f"{at}: unknown key {key!r} {place}; {mend}", {"key": ".".join((*path, key))})


def _override(raw: dict[str, Any], environ: Mapping[str, str]) -> None:
    for variable, text in environ.items():
        table, separator, key = variable.removeprefix(_ENVIRONMENT_PREFIX).lower().partition("__")
        if not variable.startswith(_ENVIRONMENT_PREFIX) or not separator:
            continue
        if table not in _TABLES:
            known = ", ".join(_TABLES)
            raise ConfigError(f"the environment variable {variable} names no table; known: {known}")
        _check_key((table,), key, _TABLES[table], _Source(f"the environment ({variable})", ""))
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        raw[table] = {**raw.get(table, {}), key: value}


#: keys of a pool that are lists of paths
_LISTS: Final = frozenset({"path", "read", "write"})


def _tuples(raw: dict[str, Any]) -> dict[str, Any]:
    """Give strict validation the tuples that TOML cannot say."""
    pools = {
        name: {
            key: tuple(value) if key in _LISTS and isinstance(value, list) else value
            for key, value in pool.items()
        }
        for name, pool in raw.get("pools", {}).items()
    }
    return {**raw, **({"pools": pools} if "pools" in raw else {})}


def _resolved(pool: PoolTable, folder: Path) -> PoolTable:
    """Make a pool's paths absolute: its workers start in a folder of their own."""
    path = tuple(str((folder / Path(entry).expanduser()).resolve()) for entry in pool.path)
    # not resolved: an environment's interpreter is a link, and where it points to is not the environment
    python = None if pool.python is None else str(folder / Path(pool.python).expanduser())
    # not resolved either: a tool uses the name that its operator gave
    read, write = (
        tuple(str(_placed(entry, folder)) for entry in entries) for entries in (pool.read, pool.write)
    )
    secrets = {name: str(_placed(file, folder)) for name, file in pool.secrets.items()}
    changed = {"path": path, "python": python, "read": read, "write": write, "secrets": secrets}
    return pool.model_copy(update=changed)


def _placed(entry: str, folder: Path) -> Path:
    return Path(os.path.normpath(folder / Path(entry).expanduser()))


def _explain(error: ValidationError, source: _Source) -> ConfigError:
    faults = []
    for fault in error.errors(include_url=False):
        path = tuple(fault["loc"])
        message = str(fault["msg"]).removeprefix("Value error, ")
        faults.append(f"{source.at(path)}: {'.'.join(map(str, path))}: {message}")
    return ConfigError("; ".join(faults), {"faults": faults})
