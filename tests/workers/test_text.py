"""The text tools, called as functions and through their validation."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp_broker_workers import text

from mcp_broker.errors import InvalidArgument


def test_words_are_counted_without_case_most_frequent_first() -> None:
    assert text.word_count("The cat and THE dog; and don't!") == {
        "the": 2,
        "and": 2,
        "cat": 1,
        "dog": 1,
        "don't": 1,
    }
    assert list(text.word_count("b a b c a b", top=2).items()) == [("b", 3), ("a", 2)]
    assert text.word_count("") == {}


def test_words_of_other_scripts_count_too() -> None:
    assert text.word_count("Straße STRASSE мир 世界") == {"strasse": 2, "мир": 1, "世界": 1}


def test_search_gives_line_column_groups_and_context() -> None:
    found = text.search("first line\r\nkey=value\nother=thing", r"^(\w+)=(v\w+)?")
    assert [dataclasses.astuple(match) for match in found.matches] == [
        (2, 1, "key=value", ["key", "value"], "key=value"),
        (3, 1, "other=", ["other", None], "other=thing"),
    ]
    assert not found.truncated
    assert text.search("one\ntwo line", "line").matches[0].column == 5
    assert text.search("ABC", "b", ignore_case=True).matches[0].match == "B"
    assert text.search("one line\r\n", "one").matches[0].context == "one line"


def test_search_is_bounded_in_matches_and_in_text() -> None:
    found = text.search("a" * 1000, "a", limit=10)
    assert len(found.matches) == 10
    assert found.truncated
    found = text.search("a" * 10, "a", limit=10)
    assert not found.truncated
    (match,) = text.search("x" * 5000, "x+").matches
    assert (len(match.match), len(match.context)) == (200, 200)


def test_search_refuses_a_pattern_that_is_none() -> None:
    with pytest.raises(InvalidArgument, match="unterminated") as refused:
        text.search("x", "[a")
    assert refused.value.details["faults"][0]["path"] == "/pattern"
    with pytest.raises(InvalidArgument):
        text.search.validate({"text": "x", "pattern": "x", "limit": 0})


def test_diff_is_unified_and_empty_for_equal_texts() -> None:
    assert (
        text.diff("a\nb\n", "a\nc\n", before_name="old")
        == "--- old\n+++ after\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n"
    )
    assert text.diff("same", "same") == ""
    assert text.diff("a", "a\n").endswith("-a\n\\ No newline at end of file\n+a\n")


@given(
    st.lists(st.sampled_from("abc"), max_size=8),
    st.lists(st.sampled_from("abc"), max_size=8),
    st.integers(0, 3),
    st.booleans(),
)
def test_diff_has_the_lines_of_both(before: list[str], after: list[str], context: int, ends: bool) -> None:
    old, new = ("\n".join(lines) + ("\n" if ends and lines else "") for lines in (before, after))
    lines = text.diff(old, new, context_lines=100).splitlines()[3:]
    assert [line[1:] for line in lines if line[0] in " -"] == (old.splitlines() if old != new else [])
    assert [line[1:] for line in lines if line[0] in " +"] == (new.splitlines() if old != new else [])


@pytest.mark.process
def test_patch_takes_the_diff(tmp_path: Path) -> None:
    before, after = "a\nb\nc", "a\nx\nc\nd"
    (tmp_path / "file").write_text(before)
    try:
        subprocess.run(
            ["patch", "file"],
            input=text.diff(before, after),
            text=True,
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("there is no patch(1)")
    assert (tmp_path / "file").read_text() == after
