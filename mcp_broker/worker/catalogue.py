"""The tools of one module, by name."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from mcp_broker import limits
from mcp_broker.errors import ConfigError
from mcp_broker.worker.tool import Tool

#: the shipped tools; what they import beyond the project comes with its extra
SHIPPED = "mcp_broker_workers"

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
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"cannot import {module}: {error}{_advice(module, error)}") from error
    except Exception as error:
        raise ConfigError(
            f"cannot import {module}: {type(error).__name__}: {error}{_place(error)}"
        ) from error
    except SystemExit as error:
        raise ConfigError(f"cannot import {module}: it calls sys.exit({error.code!r})") from error
    return collect(module, vars(imported))


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
    """Say where an import failed: the last line that ran."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
