"""docs/isolation.md says what the rows of the table say, which a hostile tool has tried."""

from __future__ import annotations

from pathlib import Path

from tests.isolation.test_table import ROWS

DOCUMENT = Path(__file__).parents[2] / "docs" / "isolation.md"


def cell(outcome: str) -> str:
    return "allowed" if outcome == "done" else f"✅ `{outcome}`"


def row(name: str) -> str:
    _, _, *levels = ROWS[name]
    return f"| {name} | {' | '.join(cell(outcome) for level in levels for outcome in level)} |"


def test_the_document_says_of_every_row_what_was_tried() -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    written = [line for line in lines if line.startswith("| ") and line[2:].split(" |")[0] in ROWS]
    assert written == [row(name) for name in ROWS]
