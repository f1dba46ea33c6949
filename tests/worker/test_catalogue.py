"""What a tool author is told when a module cannot be served."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mcp_broker.errors import ConfigError
from mcp_broker.worker import catalogue

if TYPE_CHECKING:
    from pathlib import Path

HEAD = "from mcp_broker.worker import tool\n"
TWICE = (
    HEAD
    + '''
@tool
def f(x: int) -> int:
    """One."""
    return 1

@tool
def f(x: str) -> int:
    """Two."""
    return 2
'''
)


def refusal(folder: Path, name: str, source: str) -> str:
    (folder / f"{name}.py").write_text(source)
    with pytest.raises(ConfigError) as refused:
        catalogue.load(name, (str(folder),))
    return str(refused.value)


def test_second_tool_of_a_name_is_refused_also_when_it_hides_the_first(tmp_path: Path) -> None:
    text = refusal(tmp_path, "told_twice", TWICE)
    assert "defines the tool 'f' twice, in lines 3 and 8" in text


def test_syntax_error_is_placed_in_the_authors_file(tmp_path: Path) -> None:
    assert "told_syntax.py:2" in refusal(tmp_path, "told_syntax", "x = 1\ndef (\n")


def test_error_in_a_library_is_placed_at_the_authors_line_that_led_there(tmp_path: Path) -> None:
    text = refusal(tmp_path, "told_env", "import os\n\nos.environ['NO_SUCH_NAME_HERE']\n")
    assert "KeyError" in text
    assert "told_env.py:3" in text
