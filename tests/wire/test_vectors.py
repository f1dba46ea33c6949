"""The golden vectors: the same bytes in every language and for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgpack
import pytest

from mcp_broker.errors import WireError
from mcp_broker.wire import codec, messages
from tests.wire import make_vectors
from tests.wire.make_vectors import FOLDER, from_json

VALID: list[dict[str, Any]] = json.loads((FOLDER / "index.json").read_text())
INVALID: list[dict[str, Any]] = json.loads((FOLDER / "invalid.json").read_text())


def name_of(entry: dict[str, Any]) -> str:
    return str(entry["name"])


def valid_frame(entry: dict[str, Any]) -> bytes:
    return bytes.fromhex((FOLDER / f"{entry['name']}.hex").read_text())


def invalid_frame(entry: dict[str, Any]) -> bytes:
    then = entry.get("then", {"hex": "", "times": 0})
    return bytes.fromhex(entry["hex"]) + bytes.fromhex(then["hex"]) * int(then["times"])


def door_of(entry: dict[str, Any]) -> codec.Decoder[messages.AnyMessage]:
    door: codec.Decoder[messages.AnyMessage] = getattr(codec, entry["door"])
    return door


@pytest.mark.parametrize("entry", VALID, ids=name_of)
def test_valid_vector_decodes_and_encodes_to_the_same_bytes(entry: dict[str, Any]) -> None:
    frame = valid_frame(entry)
    message = door_of(entry).decode(frame)
    assert messages.kind_of(message) == entry["kind"]
    assert codec.encode(message) == frame


@pytest.mark.parametrize("entry", VALID, ids=name_of)
def test_valid_vector_means_its_value_to_another_codec(entry: dict[str, Any]) -> None:
    frame = valid_frame(entry)
    value = from_json(entry["value"])
    assert msgpack.unpackb(frame, raw=False, strict_map_key=True) == value
    assert msgpack.packb(value, use_bin_type=True) == frame


@pytest.mark.parametrize("entry", VALID, ids=name_of)
def test_valid_vector_with_appended_fields_is_taken(entry: dict[str, Any]) -> None:
    value = from_json(entry["value"])
    message = door_of(entry).decode(valid_frame(entry))
    defaults = len(message.__struct_fields__) + 1 - len(value)
    longer = msgpack.packb([*value, *[None] * defaults, {"x-later": [1, {"deep": b""}]}])
    assert door_of(entry).decode(longer) == message


@pytest.mark.parametrize("entry", INVALID, ids=name_of)
def test_invalid_vector_is_refused_with_its_code(entry: dict[str, Any]) -> None:
    with pytest.raises(WireError) as refused:
        door_of(entry).decode(invalid_frame(entry))
    assert refused.value.code == entry["error"]


def test_every_kind_has_a_vector() -> None:
    kinds = {messages.kind_of(kind) for kind in messages.AnyMessage.__args__}
    assert {entry["kind"] for entry in VALID} == kinds


def test_every_door_has_valid_and_invalid_vectors() -> None:
    doors = {"from_client", "to_client", "from_worker", "to_worker"}
    assert {entry["door"] for entry in VALID} == doors
    assert {entry["door"] for entry in INVALID} >= doors - {"to_worker"}


def test_vectors_are_what_the_script_makes(tmp_path: Path) -> None:
    make_vectors.write(tmp_path)
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in FOLDER.iterdir()}
    assert made == kept
