"""Policy: what a scope covers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_broker.auth import policy
from mcp_broker.auth.policy import ALLOWED, Deny, Policy

# few and short parts, so that names often share a prefix or are equal
PARTS = st.sampled_from(["a", "ab", "a_1", "b", "system", "tools"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)

TABLE = [
    # scope, tool, covered
    ("text.word_count", "text.word_count", True),
    ("text.word_count", "text.word_count2", False),
    ("text.word_count", "text.word_count.more", False),
    ("text.word_count", "text", False),
    ("text.word_count", "more.text.word_count", False),
    ("text", "text", True),
    ("text", "text.word_count", False),
    ("text.*", "text.word_count", True),
    ("text.*", "text.nlp.tag", True),
    ("text.*", "text", False),
    ("text.*", "textual.x", False),
    ("text.*", "my.text.x", False),
    ("text.nlp.*", "text.nlp.tag", True),
    ("text.nlp.*", "text.word_count", False),
    ("*", "text.word_count", True),
    ("*", "text", True),
    ("*", "systems.x", True),
    ("*", "system.status", False),
    ("*", "system.jobs.submit", False),
    ("*", "system", False),
    ("system.status", "system.status", True),
    ("system.status", "system.stop", False),
    ("system.*", "system.jobs.submit", True),
    ("system.*", "text.word_count", False),
    ("system.jobs.*", "system.jobs.submit", True),
    ("system.jobs.*", "system.stop", False),
    ("text.x", "system.tools", True),
    ("!text.*", "text.x", False),
    ("!text.*", "sql.query", False),
    ("* !sql.*", "text.x", True),
    ("* !sql.*", "sql.query", False),
    ("!sql.* *", "sql.query", False),
    ("sql.query !sql.*", "sql.query", False),
    ("sql.* !sql.drop", "sql.query", True),
    ("sql.* !sql.drop", "sql.drop", False),
    ("* !*", "text.x", False),
    ("system.* !*", "system.status", False),
    ("* !system.tools", "system.tools", False),
    ("* !system.*", "system.tools", False),
]


@pytest.mark.parametrize(("scope", "tool", "covered"), TABLE)
def test_scope_covers_what_the_table_says(scope: str, tool: str, covered: bool) -> None:
    assert (Policy.of(scope.split()).allows(tool) is ALLOWED) == covered


def test_admin_covers_system_tools_and_nothing_else() -> None:
    admin = Policy.of(["text.*"], admin=True)
    assert admin.allows("system.stop") is ALLOWED
    assert admin.allows("sql.query") is not ALLOWED
    assert Policy.of(["!system.stop"], admin=True).allows("system.stop") is not ALLOWED


@pytest.mark.parametrize(
    ("clearance", "level", "allowed"),
    [(0, 0, True), (0, 1, False), (5, 5, True), (10, 10, True), (10, -1, False)],
)
def test_level_must_not_exceed_clearance(clearance: int, level: int, allowed: bool) -> None:
    decision = Policy.of(["*"], clearance=clearance).allows("text.x", level)
    assert (decision is ALLOWED) == allowed
    if isinstance(decision, Deny):
        assert (decision.code, decision.reason) == ("FORBIDDEN", "clearance")


def test_public_tool_needs_clearance_like_any_other() -> None:
    assert Policy.of(["text.*"]).allows("system.tools", 1) is not ALLOWED


def test_denial_says_which_rule_it_was() -> None:
    policy_ = Policy.of(["text.*", "!text.secret"])
    decisions = [policy_.allows(name) for name in ("text.secret", "sql.query", "SQL.query")]
    assert [(each.code, each.reason) for each in decisions if isinstance(each, Deny)] == [
        ("FORBIDDEN", "denied"),
        ("FORBIDDEN", "out_of_scope"),
        ("NOT_FOUND", "not_a_name"),
    ]


HOSTILE_NAMES = [
    "",
    ".",
    "..",
    "*",
    "text.*",
    "!text.x",
    "text.",
    ".text",
    "text..x",
    "text.../../etc/passwd",
    "text./x",
    "../text.x",
    "text.x\0",
    "text.x\n",
    "\ntext.x",
    " text.x",
    "text.x ",
    "Text.x",
    "TEXT.X",
    "text.1x",
    "1text.x",
    "_text.x",
    "text.__class__",
    "text.-x",
    "t\u0435xt.x",  # a Cyrillic e
    "\uff54\uff45\uff58\uff54.x",  # full width: NFKC would make it "text.x"
    "text.\u0131d",  # a dotless i
    "text.x\u0661",  # an Arabic digit
    "text.\ud800",
    "a" * 129,
    "a." * (1 << 19) + "a",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name)[:30])
def test_name_that_no_tool_can_have_is_refused_whatever_the_scope(name: str) -> None:
    decision = Policy.of(["*", "text.*"], clearance=10, admin=True).allows(name)
    assert decision == Deny("NOT_FOUND", "not_a_name", "no tool can have this name")


@pytest.mark.parametrize("name", ["a", "text.word_count", "a1.b_2.c3", "a" * 128])
def test_tool_names_are_dotted_lower_case(name: str) -> None:
    assert policy.is_tool_name(name)


@pytest.mark.parametrize(
    "pattern",
    ["", "!", "!!a", "**", "*.text", "text.*.x", "text*", "te*t", "*.*", "Text.*", "text.**", "a b", "a\n", "-a",
     ".*", "text.?", "a" * 132, "\u0430"],
)  # fmt: skip
def test_pattern_outside_the_grammar_is_refused(pattern: str) -> None:
    assert policy.bad_patterns(["text.*", pattern]) == [pattern]
    with pytest.raises(ValueError, match="not scope patterns"):
        Policy.of([pattern])


@pytest.mark.parametrize("pattern", ["*", "!*", "a", "!a", "a.b", "a.*", "!a.b.*", "!" + "a" * 128 + ".*"])
def test_pattern_of_the_grammar_is_taken(pattern: str) -> None:
    assert policy.bad_patterns([pattern]) == []


@given(st.text())
def test_any_text_as_a_name_gets_an_answer(name: str) -> None:
    decision = Policy.of(["*"], admin=True).allows(name)
    assert (decision is ALLOWED) == policy.is_tool_name(name) or name == "system"


@given(st.lists(NAMES, max_size=5), st.lists(NAMES, max_size=5), NAMES)
def test_deny_wins_in_any_order(allowed: list[str], others: list[str], denied: str) -> None:
    scopes = [*allowed, "*", denied, f"!{denied}", f"!{denied}.*", *others]
    for order in (scopes, scopes[::-1]):
        assert Policy.of(order, admin=True).allows(denied) is not ALLOWED
        assert Policy.of(order, admin=True).allows(f"{denied}.x") is not ALLOWED


@given(NAMES, NAMES)
def test_wildcard_matches_exactly_what_is_below_its_prefix(prefix: str, name: str) -> None:
    decision = Policy.of([f"{prefix}.*"]).allows(name)
    below = name.split(".")[: len(prefix.split("."))] == prefix.split(".") and name != prefix
    assert (decision is ALLOWED) == (below or name in policy.PUBLIC_TOOLS)
