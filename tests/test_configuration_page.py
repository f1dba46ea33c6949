"""docs/configuration.md and configs/default.toml say all that the code's tables say, and the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mcp_broker import config
from mcp_broker.config import tables
from tests import configuration_page
from tests.configuration_page import PAGE, PLACE, models

TEXT = PAGE.read_text(encoding="utf-8")
DEFAULT = Path(__file__).parents[1] / "configs" / "default.toml"


def test_page_has_the_tables_of_the_code() -> None:
    assert configuration_page.page(TEXT) == TEXT, "make documents writes them anew"
    assert sorted(place[1] for place in PLACE.findall(TEXT)) == sorted(models())


def test_page_with_another_default_is_found_out() -> None:
    changed = TEXT.replace("| `10.0` |", "| `11.0` |")
    assert changed != TEXT
    assert configuration_page.page(changed) == TEXT


@pytest.mark.parametrize("heading", models())
def test_every_key_says_what_it_means(heading: str) -> None:
    assert [key.name for key in configuration_page.keys(models()[heading]) if not key.means] == []


def test_bounds_and_defaults_are_told() -> None:
    rows = {key.name: key for key in configuration_page.keys(tables.PoolTable)}
    assert rows["`max`"][1:3] == ("integer 0 to 1,024", "not set")
    assert rows["`module`"].default == "required"
    assert rows["`isolation`"].type == "`process`, `restricted`, `sandboxed`, `auto`"
    assert rows["`env`"][1:3] == ("table of text", "`{}`")


def test_examples_of_the_page_are_configurations() -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        assert config.parse(block).pools


def _whole() -> dict[str, Any]:
    """Return the shipped default with its lines behind a "# " as if they were no comments."""
    return tomllib.loads(
        re.sub(r"^# (?=\w+ = )", "", DEFAULT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    )


def test_shipped_default_names_every_key() -> None:
    whole = _whole()
    pool = whole["pools"]["echo"]
    written = {
        **{f"[{name}]": table for name, table in whole.items() if name != "pools"},
        "[pools.NAME]": pool,
        "[pools.NAME.limits]": pool["limits"],
    }
    assert {heading: sorted(table) for heading, table in written.items()} == {
        heading: sorted(model.model_fields) for heading, model in models().items()
    }


def test_what_the_shipped_default_does_not_set_is_valid_too() -> None:
    whole = _whole()
    assert whole["limits"]["burst"] == 200, "what was behind a comment counts"
    # lists are tuples to strict validation, as the reader of files makes them
    echo = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in whole["pools"]["echo"].items()
    }
    tables.Config.model_validate({**whole, "pools": {"echo": echo}})
