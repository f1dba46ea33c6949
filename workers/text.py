"""Tools over text: counting words, finding patterns, comparing."""

from __future__ import annotations

import difflib
import re
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from mcp_broker.worker import InvalidArgument, tool

#: letters and digits of any script; an apostrophe or hyphen inside holds a word together ("don't")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")  # noqa: RUF001 (the apostrophe that typesetters use)
#: characters of a match, and of its line, that are returned
_SHOWN_CHARS = 200


@tool(name="text.word_count", idempotent=True, timeout_s=5, category="text", tags=("example",))
def word_count(text: str, top: Annotated[int, Field(ge=1, le=10_000)] = 10) -> dict[str, int]:
    """Count the words of a text.

    Returns the `top` most frequent words with their counts, most frequent first (equally frequent ones in the
    order of the text). Case does not count: "The" and "the" are one word.
    """
    return dict(Counter(word.casefold() for word in _WORD.findall(text)).most_common(top))


@dataclass(frozen=True)
class Match:
    """One place where a pattern matches."""

    #: from 1
    line: int
    #: from 1, in characters
    column: int
    #: the matched text, cut to 200 characters
    match: str
    #: what the pattern's groups took, in order; null for a group that took no part
    groups: list[str | None]
    #: the line in which the match starts, cut to 200 characters
    context: str


@dataclass(frozen=True)
class Found:
    """The matches, and whether there are more."""

    matches: list[Match]
    #: `limit` was reached: there may be more
    truncated: bool


@tool(name="text.search", idempotent=True, timeout_s=5, category="text", tags=("example",))
def search(
    text: str,
    pattern: Annotated[str, Field(max_length=1000)],
    ignore_case: bool = False,
    limit: Annotated[int, Field(ge=1, le=1000)] = 100,
) -> Found:
    """Find where a regular expression matches a text.

    The pattern is Python's; `^` and `$` match at every line, `.` does not match a line's end. Returns up to `limit`
    matches with line and column, both from 1. A pattern that backtracks without end is stopped at the call's timeout.
    """
    try:
        compiled = re.compile(pattern, re.MULTILINE | (re.IGNORECASE if ignore_case else 0))
    except re.error as error:
        raise InvalidArgument(
            f"text.search: the pattern is no regular expression: {error}",
            {"faults": [{"path": "/pattern", "expected": "a regular expression", "message": str(error)}]},
        ) from error
    starts = [0, *(found.end() for found in re.finditer("\n", text))]
    matches: list[Match] = []
    for found in compiled.finditer(text):
        if len(matches) == limit:
            return Found(matches, truncated=True)
        line = bisect_right(starts, found.start())
        begin = starts[line - 1]
        end = text.find("\n", begin)
        shown = text[begin : min(end if end >= 0 else len(text), begin + _SHOWN_CHARS)]
        groups = [None if group is None else group[:_SHOWN_CHARS] for group in found.groups()]
        matches.append(
            Match(line, found.start() - begin + 1, found.group()[:_SHOWN_CHARS], groups, shown.rstrip("\r"))
        )
    return Found(matches, truncated=False)


@tool(name="text.diff", idempotent=True, timeout_s=10, category="text", tags=("example",))
def diff(
    before: str,
    after: str,
    context_lines: Annotated[int, Field(ge=0, le=100)] = 3,
    before_name: str = "before",
    after_name: str = "after",
) -> str:
    """Compare two texts line by line, as a unified diff.

    Returns the empty text when they are equal. A last line without an end is marked as `diff -u` marks it.
    """
    lines = difflib.unified_diff(
        before.splitlines(keepends=True),
        after.splitlines(keepends=True),
        before_name,
        after_name,
        n=context_lines,
    )
    return "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )
