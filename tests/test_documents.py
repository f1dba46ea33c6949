"""What people read holds together: links lead somewhere, and reasons stand where they are given."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mcp_broker", "workers", "tests", "bench", "examples", "configs", "docs")
SUFFIXES = frozenset({".py", ".md", ".toml", ".cfg", ".mjs"})
#: what others wrote, or a program did
FOREIGN = frozenset({"node_modules", "__pycache__"})

#: a reader who has the repository has none of these: an earlier specification, its rows, a design paper by section
REFERENCES = tuple(
    re.compile(pattern)
    for pattern in (
        r"\bseed's\b",
        r"\b[Rr]ows? [RTFD]\d",
        r"\bspecification\b(?! of 2024)",
        r"§",
        r"\bdesign(?: section|:|,)",
        r"\b(?:of|by|in) (?:the|this) design\b",
        r"\bresearch/",
    )
)


def texts() -> Iterator[Path]:
    """Give every text of the project."""
    yield from (path for path in sorted(ROOT.iterdir()) if path.is_file() and path.suffix in SUFFIXES)
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and not FOREIGN & set(path.parts):
                yield path


def references(text: str) -> list[str]:
    """Return the lines that send their reader to a document that he does not have."""
    return [line for line in text.splitlines() if any(pattern.search(line) for pattern in REFERENCES)]


def anchors(text: str) -> set[str]:
    """Return what a link may name in a document: its headings, as they are written in links."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    """Return the links of a document that lead nowhere in the project."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    return broken


def test_no_text_refers_to_a_document_that_its_reader_does_not_have() -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in texts()
        if path != Path(__file__).resolve() and (lines := references(path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "one payload of 1 MiB (the seed's message bound)",
        "Row R5: shares of a limit",
        "as the specification wants it",
        "SIGTERM, then SIGKILL (design: outcome first)",
        "see design §5",
        "the bars of the design",
    ],
)
def test_such_a_reference_is_found(line: str) -> None:
    assert references(line) == [line]


def test_the_project_is_what_is_searched() -> None:
    found = {str(path.relative_to(ROOT)) for path in texts()}
    assert {"README.md", "setup.cfg", "mcp_broker/limits.py", "docs/protocol.md", "bench/LOG.md"} <= found


@pytest.mark.parametrize(
    "path", [path for path in texts() if path.suffix == ".md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_of_a_document_lead_somewhere(path: Path) -> None:
    assert broken_links(path) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One heading\n[a](none.md) [b](#one-heading) [c](#another) [d](page.md#one-heading)")
    assert broken_links(page) == ["none.md", "#another"]
