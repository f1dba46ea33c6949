"""What people read holds together: links lead somewhere, and reasons stand where they are given."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mcp_broker
from mcp_broker import Client, limits, worker
from mcp_broker.cli.checkup import KERNEL_MIN
from mcp_broker.client.options import CallOptions
from mcp_broker.worker import ToolContext, hooks
from mcp_broker.worker.tool import ToolSettings

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
        r"\b(?:[Tt]he|[Ii]ts) origin\b",
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
        "the graph of the origin",
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


MIB = 1024 * 1024
LINUX = f"Linux {'.'.join(map(str, KERNEL_MIN))}"
#: what the README's rows of hard limits must say
HARD = {
    "arguments of a call": f"{limits.BODY_BYTES_MAX // MIB} MiB",
    "a result, a part of a stream": f"{limits.BODY_BYTES_MAX // MIB} MiB",
    "memory of a worker": f"{limits.MEMORY_MB} MiB {limits.MEMORY_MB_MAX} MiB",
    "CPU of a call": f"{limits.CPU_S:g} s {limits.CPU_S_MAX:g} s",
    "time of a call": f"{limits.CALL_TIMEOUT_S:g} s {limits.CALL_TIMEOUT_S_MAX / 3600:g} h",
    "unfinished calls of a client": f"{limits.CLIENT_WINDOW_MAX:,}",
    "calls that wait": f"{limits.QUEUE_CALLS_MAX:,} {limits.PRINCIPAL_QUEUE_CALLS_MAX:,} {limits.BROKER_QUEUE_CALLS_MAX:,}",
    "sessions, workers, tools": (
        f"{limits.SESSIONS_MAX:,} {limits.PRINCIPAL_SESSIONS_MAX:,} {limits.WORKERS_MAX:,} {limits.TOOLS_MAX:,}"
    ),
}


@pytest.mark.parametrize("what", HARD)
def test_hard_limits_of_the_readme_are_those_of_the_code(what: str) -> None:
    row = re.search(
        rf"^\| {re.escape(what)} \| (.*?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert row, f"the README has no hard limit of {what}"
    said = re.findall(r"\d{1,3}(?:,\d{3})*(?: (?:MiB|s|h)\b)?", row[1])
    assert " ".join(said) == HARD[what]


def test_the_readme_says_near_its_top_which_protocol_is_spoken_and_which_is_not() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split()).replace("*", "")
    top = text[: text.index("$ make demo")]
    assert "Machine Context Protocol" in top
    assert "It is not the Model Context Protocol" in top
    assert text.count(LINUX) == text.count(f"{LINUX} or newer") == 2, "what is needed, and the hard limit"


#: a document, and the names that it must tell of
PUBLIC = (
    ("docs/client.md", {*mcp_broker.__all__} - {"ConfigError", "__version__"}),
    ("docs/client.md", {*CallOptions.__annotations__, "timeout_s"}),
    ("docs/client.md", {name for name in vars(Client) if not name.startswith("_")}),
    ("docs/tools.md", {*worker.__all__} - {"LeasedPort", "Tool", "ToolCaller"}),
    ("docs/tools.md", {*ToolSettings.__annotations__}),
    (
        "docs/tools.md",
        {name for name in dir(ToolContext) if not name.startswith("_")} - {"cancelled", "lend", "deadline"},
    ),
    ("docs/recovery.md", hooks.LIFE | hooks.CALLS),
)


@pytest.mark.parametrize(("document", "names"), PUBLIC)
def test_a_guide_names_all_that_its_reader_may_use(document: str, names: set[str]) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert names
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", text)) == []
