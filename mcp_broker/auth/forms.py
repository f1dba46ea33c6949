"""What a single claim of a token looks like, whoever writes or reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from mcp_broker import limits
from mcp_broker.auth.policy import LEVEL_MAX

PRINCIPAL_CHARS_MAX: Final = 256
JTI_CHARS_MAX: Final = 128
THUMBPRINT_CHARS: Final = 43
#: normal
PRIORITY_DEFAULT: Final = 1
PRIORITY_LOWEST: Final = 2
#: past this a float no longer counts single seconds (and no clock shows it)
WALL_MAX: Final = 2.0**53


def is_audience(value: object) -> bool:
    """One text, or a list of them."""
    listed = value if isinstance(value, list) else [value]
    return bool(listed) and all(isinstance(item, str) for item in listed)


def is_confirmation(value: object) -> bool:
    """A map with the thumbprint of a key."""
    jkt = value.get("jkt") if isinstance(value, dict) else None
    return isinstance(jkt, str) and len(jkt) == THUMBPRINT_CHARS and jkt.isascii()


def is_instant(value: object) -> bool:
    """Seconds since 1970."""
    # bool is an int; NaN and infinities fail the comparison
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= WALL_MAX


def is_level(value: object) -> bool:
    """A clearance."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LEVEL_MAX


def is_printable(value: object, longest: int) -> bool:
    """A text of 1 to ``longest`` printable characters."""
    # names go into logs and audit records: no line breaks, control characters, lone surrogates
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def is_weight(value: object) -> bool:
    """A share of a busy pool."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limits.WEIGHT_MAX


def is_priority(value: object) -> bool:
    """A class of waiting calls."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= PRIORITY_LOWEST


#: what a claim looks like, whoever reads it and whenever; in the order in which they are checked
FORMS: Final[dict[str, Callable[[Any], bool]]] = {
    "iss": lambda value: isinstance(value, str),
    "aud": is_audience,
    "sub": lambda value: is_printable(value, PRINCIPAL_CHARS_MAX),
    "exp": is_instant,
    "nbf": is_instant,
    "iat": is_instant,
    "jti": lambda value: is_printable(value, JTI_CHARS_MAX),
    "scope": lambda value: isinstance(value, str),
    "cnf": is_confirmation,
    "clearance": is_level,
    "admin": lambda value: isinstance(value, bool),
    "weight": is_weight,
    "priority": is_priority,
}
