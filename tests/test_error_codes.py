"""The error codes of the code and of docs/protocol.md are one list."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mcp_broker import errors

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "protocol.md").read_text()
SECTION = TEXT.split("\n## Errors\n")[1].split("\n## ")[0]
CODES = {
    code: retryable == "yes"
    for code, retryable in re.findall(
        r"^\| `([A-Z_]+)` \|[^|]*\|[^|]*\| (yes|no) \|[^|]*\|$", SECTION, re.MULTILINE
    )
}


def test_documented_codes_are_the_closed_set() -> None:
    assert list(CODES) == list(errors.CALL_ERRORS)


@pytest.mark.parametrize("code", errors.CALL_ERRORS)
def test_documented_code_is_as_retryable_as_its_class(code: str) -> None:
    assert CODES[code] is errors.CALL_ERRORS[code].retryable_by_default


def test_wire_errors_are_documented_too() -> None:
    wire = {cls.code for cls in errors.WireError.__subclasses__() if cls.__module__ == errors.__name__}
    assert wire == {"MALFORMED_FRAME", "UNKNOWN_KIND"}
    assert all(f"| `{code}` |" in SECTION for code in wire)


def test_no_two_errors_share_a_code_but_with_the_roots_of_the_tree() -> None:
    def below(cls: type[errors.BrokerError]) -> list[type[errors.BrokerError]]:
        return [one for sub in cls.__subclasses__() for one in (sub, *below(sub))]

    kinds = [cls for cls in below(errors.BrokerError) if cls.__module__ == errors.__name__]
    codes = [cls.code for cls in kinds if cls is not errors.CallError]
    assert {"CLIENT_CLOSED", "WRONG_PROCESS", "NOT_REACHABLE"} <= set(codes)
    assert sorted(codes) == sorted(set(codes))


@pytest.mark.parametrize("code", errors.CALL_ERRORS)
def test_code_becomes_its_own_class(code: str) -> None:
    error = errors.call_error(code, "text", {"a": 1})
    assert type(error) is errors.CALL_ERRORS[code]
    assert (error.code, error.details, str(error)) == (code, {"a": 1}, "text")
    assert error.retryable is errors.CALL_ERRORS[code].retryable_by_default


def test_code_of_a_newer_broker_is_still_a_call_error() -> None:
    error = errors.call_error("TOO_MODERN", "text", retryable=True)
    assert type(error) is errors.CallError
    assert (error.code, error.retryable) == ("TOO_MODERN", True)
    assert errors.CallError("other").code != "TOO_MODERN"


def test_an_instance_knows_better_than_its_class() -> None:
    assert errors.call_error("WORKER_LOST", "text", retryable=True).retryable
