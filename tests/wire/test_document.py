"""docs/protocol.md says what the code does: tables, limits and bytes are compared one by one."""

from __future__ import annotations

import base64
import hashlib
import re
import typing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from zmq.utils import z85

from mcp_broker import limits
from mcp_broker.wire import messages, node, tether, zygote
from mcp_broker.wire.items import Record
from tests.wire.field_tables import Row, rows
from tests.wire.make_vectors import FOLDER

if TYPE_CHECKING:
    import msgspec

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "protocol.md").read_text()

ITEMS = (
    *(
        messages.Call,
        messages.CallExtra,
        messages.Dispatch,
        messages.Caller,
        messages.Outcome,
        messages.Usage,
    ),
    *(messages.Fault, messages.Part, messages.Chunk, messages.Progress, messages.StreamCredit, messages.Held),
    *(messages.ToolDefinition, messages.GrantedLimits),
)
HEADINGS: dict[str, type[msgspec.Struct]] = {
    **{messages.kind_of(kind): kind for kind in messages.AnyMessage.__args__},
    **{f"{'Map' if issubclass(kind, Record) else 'Item'} {kind.__name__}": kind for kind in ITEMS},
}


def section(heading: str) -> str:
    """Return the text under a heading, up to the next of the same or a higher level."""
    match = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^#{{1,2}} |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert match, f"the document has no heading {heading!r}"
    body = match[2]
    return re.split(r"^### ", body, maxsplit=1, flags=re.MULTILINE)[0] if len(match[1]) > len("##") else body


def table(text: str) -> list[list[str]]:
    """Return the cells of a section's first table, its head excluded."""
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert lines
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[0].splitlines()[2:]]
    return [[cell.strip() for cell in line] for line in cells]


@pytest.mark.parametrize("heading", HEADINGS)
def test_table_of_fields_is_the_struct(heading: str) -> None:
    written = [Row(*line[:4]) for line in table(section(heading))]
    assert written == rows(HEADINGS[heading])


def test_messages_section_has_no_other_kinds() -> None:
    assert set(re.findall(r"^### (.*)$", section("Messages"), re.MULTILINE)) == set(HEADINGS)


@pytest.mark.parametrize("heading", [messages.kind_of(kind) for kind in messages.AnyMessage.__args__])
def test_sender_of_a_kind_is_the_doors(heading: str) -> None:
    kind = HEADINGS[heading]
    said = section(heading).split(".")[0].lower()
    doors = {
        "client to broker": kind in messages.FromClient.__args__,
        "broker to client": kind in messages.ToClient.__args__,
        "worker to broker": kind in messages.FromWorker.__args__,
        "broker to worker": kind in messages.ToWorker.__args__,
    }
    if "either way, both sockets" in said:
        assert all(doors.values())
        return
    said = said.replace("broker to client or worker", "broker to client, broker to worker")
    assert {door for door, is_open in doors.items() if is_open} == {door for door in doors if door in said}


def test_limits_are_the_numbers_of_the_code() -> None:
    written = {line[0]: float(line[1].replace(",", "")) for line in table(section("Limits"))}
    assert written == {name: getattr(limits, name) for name in written}


@pytest.mark.parametrize(
    ("name", "lines"), re.findall(r"^```hex (\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
)
def test_worked_example_is_a_golden_vector(name: str, lines: str) -> None:
    data = bytes.fromhex("".join(line.split("#")[0] for line in lines.splitlines()))
    assert data == bytes.fromhex((FOLDER / f"{name}.hex").read_text())


def test_kinds_that_must_be_shown_in_bytes_are() -> None:
    shown = set(re.findall(r"^```hex (\w+)$", TEXT, re.MULTILINE))
    assert shown >= {"hello", "welcome", "calls", "outcomes_ok", "outcomes_error", "partial"}


def test_node_kinds_are_those_of_the_code() -> None:
    written = [(line[0], line[1]) for line in table(section("Node link"))]
    sides = (("supervisor", node.FromSupervisor), ("broker", node.ToSupervisor))
    assert written == [(side, messages.kind_of(kind)) for side, union in sides for kind in union.__args__]


def test_tether_kinds_are_those_of_the_code() -> None:
    written = [(line[0], line[1]) for line in table(section("Tether"))]
    sides = (("worker", tether.FromWorker), ("supervisor", tether.ToWorker))
    kinds = [(side, kind) for side, union in sides for kind in typing.get_args(union) or (union,)]
    assert written == [(side, messages.kind_of(kind)) for side, kind in kinds]


def test_zygote_kinds_are_those_of_the_code() -> None:
    written = [(line[0], line[1]) for line in table(section("Zygote"))]
    kinds = [("supervisor", zygote.Order), *(("zygote", kind) for kind in zygote.FromZygote.__args__)]
    assert written == [(side, messages.kind_of(kind)) for side, kind in kinds]


def test_thumbprint_of_the_document_is_right() -> None:
    match = re.search(r"\(Z85 `([^`]+)`\), `X` is `([^`]+)`\nand the thumbprint is `([^`]+)`", TEXT)
    assert match
    key = z85.decode(match[1])
    assert key == bytes(range(32))
    x = base64.urlsafe_b64encode(key).rstrip(b"=").decode()
    digest = hashlib.sha256(f'{{"crv":"X25519","kty":"OKP","x":"{x}"}}'.encode()).digest()
    assert (match[2], match[3]) == (x, base64.urlsafe_b64encode(digest).rstrip(b"=").decode())


def test_thumbprint_of_the_document_is_what_the_broker_computes() -> None:
    from mcp_broker.auth import zap

    assert zap.thumbprint(bytes(range(32))) in TEXT


def test_links_within_the_document_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def test_sections_that_the_code_names_exist() -> None:
    named = {
        title
        for path in (ROOT / "mcp_broker").rglob("*.py")
        for line in path.read_text().splitlines()
        if "docs/protocol.md" in line
        for title in re.findall(r'"([A-Z][^"]+)"', line.partition("docs/protocol.md")[2])
    }
    titles = set(re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE))
    assert named - {title.strip() for title in titles} == set()
