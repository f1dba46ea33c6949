"""The package's public names: all there, and nothing loaded before it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import mcp_broker
from mcp_broker import errors


@pytest.mark.parametrize("name", mcp_broker.__all__)
def test_public_name_is_there(name: str) -> None:
    assert getattr(mcp_broker, name)
    assert name in dir(mcp_broker)


def test_every_call_error_is_public() -> None:
    assert {kind.__name__ for kind in errors.CALL_ERRORS.values()} <= set(mcp_broker.__all__)


def test_checkers_see_the_names_that_there_are() -> None:
    tree = ast.parse(Path(mcp_broker.__file__).read_text())
    seen = {
        alias.name: node.module
        for branch in tree.body
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {*seen, "__version__"} == set(mcp_broker.__all__)
    assert {name: home for name, home in seen.items() if home != errors.__name__} == mcp_broker._HOMES


def test_the_options_types_can_be_read_at_run_time() -> None:
    hints = get_type_hints(mcp_broker.CallOptions)
    assert hints["on_progress"] == mcp_broker.OnProgress | None
    assert set(hints) == set(mcp_broker.CallOptions.__annotations__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Klient"):
        _ = mcp_broker.Klient


@pytest.mark.process
def test_importing_the_package_loads_no_zeromq() -> None:
    code = "import sys, mcp_broker, mcp_broker.client; sys.exit('zmq' in sys.modules or 'msgpack' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
