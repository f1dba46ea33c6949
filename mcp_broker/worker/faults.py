"""Faults of arguments, as data and as sentences: pydantic's errors in the words of JSON."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails, ValidationError

#: faults that the sentence names, and faults that the details list (they travel in one frame)
TOLD_MAX: Final = 3
LISTED_MAX: Final = 32
#: characters of a received value that are shown
SHOWN_CHARS: Final = 60

_WORDS: Final = {
    "string_type": "string",
    "int_type": "integer",
    "int_from_float": "integer",
    "float_type": "number",
    "bool_type": "boolean",
    "bytes_type": "bytes",
    "list_type": "array",
    "tuple_type": "array",
    "set_type": "array",
    "frozen_set_type": "array",
    "dict_type": "object",
    "mapping_type": "object",
    "model_type": "object",
    "model_attributes_type": "object",
    "dataclass_type": "object",
    "none_required": "null",
}
_KINDS: Final = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    bytes: "bytes",
    list: "array",
    dict: "object",
}


def explain(error: ValidationError, arguments: Any, schema: dict[str, Any]) -> list[dict[str, str]]:
    """Turn a failed validation into faults, one a place.

    Args:
        error: what pydantic found.
        arguments: what it looked at.
        schema: the JSON Schema of the arguments, for what was expected of a missing one.

    Returns:
        A list of {path, expected, received, message}; ``path`` is a JSON pointer such as ``/rows/0/name``.
    """
    faults: dict[str, dict[str, str]] = {}
    for item in error.errors(include_url=False, include_context=False):
        steps = _steps(item, arguments)
        path = "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in steps)
        fault = _fault(item, steps, path, schema)
        known = faults.setdefault(path, fault)
        if known is not fault and fault["expected"] not in known["expected"].split(" or "):
            # the branches of a union fail one by one, at the same place
            known["expected"] += f" or {fault['expected']}"
            known["message"] = _sentence(steps, known["expected"], known["received"])
    return list(faults.values())


def _fault(item: ErrorDetails, steps: list[str | int], path: str, schema: dict[str, Any]) -> dict[str, str]:
    kind, value = item["type"], item["input"]
    if kind == "extra_forbidden" and len(steps) == 1:
        return _unknown(str(steps[0]), value, list(schema.get("properties", {})), path)
    if kind in {"missing", "missing_argument"}:
        expected = (
            words(schema.get("properties", {}).get(steps[-1], {}), schema) if len(steps) == 1 else "a value"
        )
        message = f"{_place(steps)} is missing; expected {expected}"
        return {"path": path, "expected": expected, "received": "nothing", "message": message}
    expected = _WORDS.get(kind) or item["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    received = show(value)
    return {
        "path": path,
        "expected": expected,
        "received": received,
        "message": _sentence(steps, expected, received),
    }


def _unknown(name: str, value: Any, known: list[str], path: str) -> dict[str, str]:
    message = f"there is no argument {name!r}"
    if close := difflib.get_close_matches(name, known, n=1):
        message += f"; did you mean {close[0]!r}?"
    expected = f"one of {', '.join(known)}" if known else "no arguments"
    return {"path": path, "expected": expected, "received": show(value), "message": message}


def _sentence(steps: list[str | int], expected: str, received: str) -> str:
    return f"{_place(steps)}: expected {expected}, got {received}"


def _place(steps: list[str | int]) -> str:
    if not steps:
        return "the arguments"
    inner = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps[1:])
    return f"argument '{steps[0]}{inner}'"


def _steps(item: ErrorDetails, arguments: Any) -> list[str | int]:
    """Keep of pydantic's location what leads through the value: names of union branches do not."""
    value = arguments
    steps: list[str | int] = []
    location = item["loc"]
    for number, step in enumerate(location):
        last = number == len(location) - 1
        if isinstance(value, dict) and isinstance(step, str) and step in value:
            value = value[step]
        elif isinstance(value, list | tuple) and isinstance(step, int) and 0 <= step < len(value):
            value = value[step]  # the same words for another type, which mypy cannot join
        elif not (last and item["type"] in {"missing", "missing_argument"}):
            continue
        steps.append(step)
    return steps


def show(value: Any) -> str:
    """Show a received value and its kind, briefly: ``'3' (string)``."""
    if value is None:
        return "null"
    kind = _KINDS.get(type(value), type(value).__name__)
    if isinstance(value, str | bytes):
        # cut before repr: a megabyte is not printed to show sixty characters of it
        text = repr(value[:SHOWN_CHARS]) + ("…" if len(value) > SHOWN_CHARS else "")
    elif isinstance(value, list | dict):
        return f"{kind} of {len(value)}"
    else:
        text = repr(value)[:SHOWN_CHARS]
    return f"{text} ({kind})"


def words(schema: dict[str, Any], root: dict[str, Any]) -> str:
    """Say in a few words what a JSON Schema asks for."""
    if reference := schema.get("$ref"):
        return words(root.get("$defs", {}).get(reference.rpartition("/")[2], {"type": "object"}), root)
    if branches := schema.get("anyOf") or schema.get("oneOf"):
        return _either(words(branch, root) for branch in branches)
    if "enum" in schema:
        return f"one of {', '.join(map(repr, schema['enum']))}"
    if "const" in schema:
        return repr(schema["const"])
    kind = schema.get("type")
    if kind == "array" and isinstance(schema.get("items"), dict) and schema["items"]:
        return f"array of {words(schema['items'], root)}"
    if kind == "string" and (form := schema.get("format")):
        return "bytes" if form == "binary" else f"string ({form})"
    return kind if isinstance(kind, str) else "any value"


def _either(texts: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(texts))
