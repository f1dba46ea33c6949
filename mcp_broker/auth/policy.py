"""What a token lets its holder call. Deny by default, deny wins, patterns are anchored.

A *scope* is a list of patterns over tool names::

    text.word_count   that tool
    text.*            everything below text: text.word_count, text.nlp.tag; not text, not textual.x
    *                 everything except what is below system
    !sql.*            nothing below sql, whatever else the scope says
    !*                nothing at all, system tools included

Tools below ``system.`` run the broker itself, so a plain ``*`` does not reach them. They are covered
by a pattern that spells ``system`` (``system.status``, ``system.jobs.*``, ``system.*``) or by the claim
``admin: true``, which is short for ``system.*``. Exempt are :data:`PUBLIC_TOOLS`, which every session
may call unless a deny pattern names them.

Besides the scope, a tool's level (0 to 10) must not exceed the token's clearance.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from mcp_broker import limits

if TYPE_CHECKING:
    from mcp_broker.auth.claims import Claims

#: A tool's name; match it with ``fullmatch``. ASCII on purpose: no look-alikes, no case, no NFKC twins.
TOOL_NAME: Final = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*")
PATTERN: Final = re.compile(rf"!?(?:\*|{TOOL_NAME.pattern}(?:\.\*)?)")
SYSTEM: Final = "system."
#: What a client needs to find its way; it lists only what the asker may call.
PUBLIC_TOOLS: Final = frozenset({"system.tools"})
LEVEL_MAX: Final = 10

DenyCode = Literal["FORBIDDEN", "NOT_FOUND"]
DenyReason = Literal["not_a_name", "denied", "out_of_scope", "clearance"]


@dataclass(frozen=True, slots=True)
class Allow:
    """The call may go on."""


@dataclass(frozen=True, slots=True)
class Deny:
    """The call may not.

    Attributes:
        code: the wire code to answer with (docs/protocol.md, "Errors"). A name that no tool can have
            is NOT_FOUND, everything else FORBIDDEN.
        reason: from a closed set, for ``details["reason"]``, metrics and audit.
        message: for people; holds no text that the caller sent unless it is a well-formed name.
    """

    code: DenyCode
    reason: DenyReason
    message: str


Decision = Allow | Deny
#: the one value of Allow, so that the hot path can ask ``decision is ALLOWED``
ALLOWED: Final = Allow()


def is_tool_name(name: str) -> bool:
    """Whether a tool can have this name."""
    return len(name) <= limits.TOOL_NAME_CHARS_MAX and TOOL_NAME.fullmatch(name) is not None


def bad_patterns(scopes: Iterable[str]) -> list[str]:
    """Return the patterns that break the grammar; empty when all are good."""
    # a deny mark and ".*" may come on top of the longest name
    longest = limits.TOOL_NAME_CHARS_MAX + 3
    return [scope for scope in scopes if len(scope) > longest or PATTERN.fullmatch(scope) is None]


@dataclass(frozen=True, slots=True)
class _Matcher:
    """Patterns, sorted by how they match.

    Attributes:
        everything: ``*`` is among them.
        names: the literal ones.
        prefixes: those that ended in ``.*``, up to and with the dot.
    """

    everything: bool
    names: frozenset[str]
    prefixes: tuple[str, ...]

    @classmethod
    def of(cls, patterns: Iterable[str]) -> _Matcher:
        wanted = set(patterns)
        return cls(
            everything="*" in wanted,
            names=frozenset(pattern for pattern in wanted if not pattern.endswith("*")),
            prefixes=tuple(sorted(pattern[:-1] for pattern in wanted if pattern.endswith(".*"))),
        )

    def spells(self, name: str) -> bool:
        """Whether a pattern other than ``*`` matches."""
        return name in self.names or name.startswith(self.prefixes)


@dataclass(frozen=True, slots=True)
class Policy:
    """A token's scope and clearance, ready to be asked about each call.

    Make it once a session, with :meth:`compile`. It knows nothing of expiry and revocation, which
    change while a session lasts.
    """

    clearance: int
    allowed: _Matcher
    denied: _Matcher

    @classmethod
    def compile(cls, claims: Claims) -> Policy:
        """Make the policy of verified claims."""
        return cls.of(claims.scopes, clearance=claims.clearance, admin=claims.admin)

    @classmethod
    def of(cls, scopes: Iterable[str], *, clearance: int = 0, admin: bool = False) -> Policy:
        """Make a policy from its parts.

        Args:
            scopes: patterns, in any order.
            clearance: 0 to 10.
            admin: adds the pattern ``system.*``.

        Raises:
            ValueError: a pattern breaks the grammar (verified claims never do).
        """
        patterns = [*scopes, f"{SYSTEM}*"] if admin else list(scopes)
        if bad := bad_patterns(patterns):
            msg = f"not scope patterns: {', '.join(map(repr, bad))}"
            raise ValueError(msg)
        return cls(
            clearance,
            allowed=_Matcher.of(pattern for pattern in patterns if not pattern.startswith("!")),
            denied=_Matcher.of(pattern[1:] for pattern in patterns if pattern.startswith("!")),
        )

    def allows(self, tool_name: str, level: int = 0) -> Decision:
        """Decide on one call.

        Args:
            tool_name: as the peer sent it; anything but a tool's name is refused, never normalised.
            level: the clearance that the tool asks for, 0 to 10.
        """
        if not is_tool_name(tool_name):
            return Deny("NOT_FOUND", "not_a_name", "no tool can have this name")
        if self.denied.everything or self.denied.spells(tool_name):
            return Deny("FORBIDDEN", "denied", f"the token's scope excludes {tool_name}")
        if not self._covers(tool_name):
            return Deny("FORBIDDEN", "out_of_scope", f"the token's scope does not cover {tool_name}")
        # a level below 0 is nobody's to give: fail closed
        if not 0 <= level <= self.clearance:
            return Deny(
                "FORBIDDEN",
                "clearance",
                f"{tool_name} needs clearance {level}, the token has {self.clearance}",
            )
        return ALLOWED

    def _covers(self, name: str) -> bool:
        if self.allowed.everything and not name.startswith(SYSTEM) and name != SYSTEM[:-1]:
            return True
        return name in PUBLIC_TOOLS or self.allowed.spells(name)
