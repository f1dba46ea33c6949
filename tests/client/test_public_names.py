"""The package's public names: all there, and nothing loaded before it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mcp_broker
from mcp_broker import errors


@pytest.mark.parametrize("name", mcp_broker.__all__)
def test_public_name_is_there(name: str) -> None:
    assert getattr(mcp_broker, name)
    assert name in dir(mcp_broker)


def test_every_call_error_is_public() -> None:
    assert {kind.__name__ for kind in errors.CALL_ERRORS.values()} <= set(mcp_broker.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Klient"):
        _ = mcp_broker.Klient


@pytest.mark.process
def test_importing_the_package_loads_no_zeromq() -> None:
    code = "import sys, mcp_broker, mcp_broker.client; sys.exit('zmq' in sys.modules or 'msgpack' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
