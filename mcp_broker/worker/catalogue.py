"""The tools of one module, by name."""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

from mcp_broker import limits
from mcp_broker.errors import ConfigError
from mcp_broker.worker import forks
from mcp_broker.worker.hooks import Hooks
from mcp_broker.worker.tool import Tool, made

#: the shipped tools; what they import beyond the project comes with its extra
SHIPPED = "mcp_broker_workers"

#: files whose lines explain nothing to a tool's author
_OURS = str(Path(__file__).resolve().parent)
_STANDARD = str(Path(importlib.__file__).resolve().parent.parent)

Catalogue = dict[str, Tool[..., Any]]


def load(module: str, path: tuple[str, ...] = ()) -> Catalogue:
    """Import a module and collect its tools.

    Args:
        module: dotted name.
        path: folders to look into first.

    Raises:
        ConfigError: it cannot be imported, has no tool, or one name twice (the operator's or author's fault).
    """
    for folder in reversed(path):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    before = len(made)
    try:
        with forks.contained():
            imported = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"cannot import {module}: {error}{_advice(module, error)}") from error
    except Exception as error:
        raise ConfigError(
            f"cannot import {module}: {type(error).__name__}: {error}{_place(error)}"
        ) from error
    except SystemExit as error:
        raise ConfigError(f"cannot import {module}: it calls sys.exit({error.code!r})") from error
    _refuse_twice(module, made[before:])
    return collect(module, vars(imported))


def hooks(module: str, tools: Catalogue) -> Hooks:
    """Return the hooks of a module that was loaded.

    Raises:
        ConfigError: one is for a tool that the module does not have (its author's fault).
    """
    found = Hooks.of(module)
    unknown = found.unknown(set(tools))
    if unknown:
        raise ConfigError(
            f"{module} has hooks of {', '.join(sorted(unknown))}, which it does not define as tools"
        )
    return found


def _refuse_twice(module: str, tools: list[Tool[..., Any]]) -> None:
    """Refuse a module that makes two tools of one name, also where the second took the first's place."""
    lines: dict[str, list[int]] = {}
    for tool in tools:
        if tool.function.__module__ == module:
            lines.setdefault(tool.name, []).append(tool.code.co_firstlineno)
    for name, at in lines.items():
        if len(at) > 1:
            where = " and ".join(map(str, at))
            raise ConfigError(
                f"{module} defines the tool {name!r} twice, in lines {where}; rename one of them"
            )


def collect(module: str, names: dict[str, Any]) -> Catalogue:
    """Return the tools among a module's names.

    Raises:
        ConfigError: there is none, too many, or one name twice.
    """
    tools: Catalogue = {}
    for value in names.values():
        if not isinstance(value, Tool):
            continue
        if tools.setdefault(value.name, value) is not value:
            raise ConfigError(f"{module} defines the tool {value.name!r} twice")
    if not tools:
        raise ConfigError(f"{module} defines no tool; decorate a function with @mcp_broker.worker.tool")
    if len(tools) > limits.TOOLS_PER_WORKER_MAX:
        raise ConfigError(f"{module} defines {len(tools)} tools; the limit is {limits.TOOLS_PER_WORKER_MAX}")
    return tools


def _advice(module: str, error: ImportError) -> str:
    missing = (error.name or "").partition(".")[0]
    if module.partition(".")[0] == SHIPPED and missing and missing != SHIPPED:
        return "; install mcp-broker[tools]"
    return ""


def _place(error: BaseException) -> str:
    """Say where an import failed: the last line of the author's that ran."""
    if isinstance(error, SyntaxError):
        return f" ({error.filename}:{error.lineno})"
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<", _OURS)) and not _is_standard(frame.filename)
    ]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def _is_standard(filename: str) -> bool:
    return filename.startswith(_STANDARD) and "site-packages" not in filename
