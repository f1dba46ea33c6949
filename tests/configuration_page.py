"""The tables of docs/configuration.md, made from those of the code: ``python -m tests.configuration_page`` writes them."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from mcp_broker.config import tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
PLACE = re.compile(r"(<!-- keys of (\[\S+\]) -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = ("key", "type", "default", "means")


class Key(NamedTuple):
    """One key of a table, as the page has it."""

    name: str
    type: str
    default: str
    means: str


def models() -> dict[str, type[tables.Table]]:
    """Return every table of the file by its heading, in the order of the file."""
    found = {
        f"[{name}]": field.annotation
        for name, field in tables.Config.model_fields.items()
        if inspect.isclass(field.annotation) and issubclass(field.annotation, tables.Table)
    }
    return {**found, "[pools.NAME]": tables.PoolTable, "[pools.NAME.limits]": tables.PoolLimits}


def texts(model: type[tables.Table]) -> dict[str, str]:
    """Return what the comment before each field says; a field without one is not there."""
    lines = inspect.getsource(model).splitlines()
    (body,) = ast.parse("\n".join(lines)).body
    assert isinstance(body, ast.ClassDef)
    said = {}
    for statement in body.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            above = lines[: statement.lineno - 1]
            comment: list[str] = []
            while above and above[-1].strip().startswith("#:"):
                comment.insert(0, above.pop().strip().removeprefix("#:").strip())
            if comment:
                said[statement.target.id] = " ".join(comment)
    return said


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,g}"


def _span(schema: dict[str, Any]) -> str:
    low, above, high = (schema.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    if low is not None and high is not None:
        return f" {_number(low)} to {_number(high)}"
    bounds = [
        *([f"≥ {_number(low)}"] if low is not None else []),
        *([f"> {_number(above)}"] if above is not None else []),
        *([f"≤ {_number(high)}"] if high is not None else []),
    ]
    return f" {', '.join(bounds)}" if bounds else ""


def type_text(schema: dict[str, Any]) -> str:
    """Return a type and its bounds for people."""
    if "anyOf" in schema:
        (schema,) = (one for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    if "$ref" in schema:
        return "table"
    if schema["type"] == "array":
        at_most = f", at most {schema['maxItems']}" if "maxItems" in schema else ""
        return f"list of {type_text(schema['items'])}{at_most}"
    if schema["type"] == "object":
        inner = [schema.get("additionalProperties"), *schema.get("patternProperties", {}).values()]
        return (
            "table of text"
            if any(isinstance(one, dict) and one.get("type") == "string" for one in inner)
            else "table"
        )
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true` or `false`"}
    return names[schema["type"]] + _span(schema)


def default_text(schema: dict[str, Any], *, required: bool) -> str:
    """Return what a key that is left out means, as TOML."""
    if required:
        return "required"
    if schema["default"] is None:
        return "not set"
    if isinstance(schema["default"], dict):
        return "`{}`" if "$ref" not in schema else ""
    return f"`{json.dumps(schema['default'])}`"


def keys(model: type[tables.Table]) -> list[Key]:
    """Return the rows of a table."""
    schema = model.model_json_schema()
    said = texts(model)
    return [
        Key(
            f"`{name}`",
            type_text(one),
            default_text(one, required=name in schema.get("required", ())),
            said.get(name, ""),
        )
        for name, one in schema["properties"].items()
    ]


def table(model: type[tables.Table]) -> str:
    """Return a table's keys as Markdown."""
    rows = keys(model)
    if not rows:
        return "No key yet.\n"
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def page(text: str) -> str:
    """Return the page with its tables made anew."""
    known = models()
    return PLACE.sub(lambda place: place[1] + table(known[place[2]]) + place[3], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
