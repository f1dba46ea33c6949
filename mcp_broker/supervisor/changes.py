"""What is different in a configuration that was read again, pool by pool, and what of it takes effect how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mcp_broker.config import Config, PoolTable

#: keys of a pool that say how many workers there are and how fast they may be asked: no worker is replaced for them
SIZES: Final = frozenset({"min", "max", "spare", "grow_wait_s", "shrink_after_s", "rate_per_s", "burst"})
#: tables whose keys count from the next start on
_AT_START: Final = ("broker", "state", "ports")


@dataclass(frozen=True, slots=True)
class Changes:
    """What a configuration that was read again asks for.

    Args:
        added: pools that are new.
        removed: pools that are no more: they take no calls, and go once none is left.
        changed: pools whose workers are replaced, a new one ready before an old one leaves.
        resized: pools that only have other sizes or rates.
        unchanged: pools that are left alone.
        limits: keys that count from now on, "limits.drain_s".
        at_start: keys that count from the next start on.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    at_start: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Return it as what travels."""
        return {name: list(getattr(self, name)) for name in self.__slots__}

    def __str__(self) -> str:
        """Say it in one line for people."""
        words = (
            ("new", self.added),
            ("leaving", self.removed),
            ("replacing the workers of", self.changed),
            ("other sizes or rates for", self.resized),
            ("changed", self.limits),
            ("only after a restart", self.at_start),
        )
        return (
            "; ".join(f"{word} {', '.join(names)}" for word, names in words if names)
            or "nothing is different"
        )


def compare(old: Config, new: Config, also: frozenset[str] = frozenset()) -> Changes:
    """Compare two configurations.

    Args:
        also: pools whose workers are replaced although nothing is different: their code may be.
    """
    both = [name for name in new.pools if name in old.pools]
    rolled = {name for name in both if name in also or _shape(old.pools[name]) != _shape(new.pools[name])}
    resized = {name for name in both if name not in rolled and old.pools[name] != new.pools[name]}
    return Changes(
        added=tuple(name for name in new.pools if name not in old.pools),
        removed=tuple(name for name in old.pools if name not in new.pools),
        changed=tuple(name for name in both if name in rolled),
        resized=tuple(name for name in both if name in resized),
        unchanged=tuple(name for name in both if name not in rolled | resized),
        limits=tuple(key for table in ("limits", "observe") for key in _keys(old, new, table)),
        at_start=tuple(key for table in _AT_START for key in _keys(old, new, table)),
    )


def _shape(table: PoolTable) -> dict[str, Any]:
    """Return what a worker of the pool is made by."""
    return {key: value for key, value in table if key not in SIZES}


def _keys(old: Config, new: Config, table: str) -> list[str]:
    before, after = dict(getattr(old, table)), dict(getattr(new, table))
    return [f"{table}.{key}" for key in after if before.get(key) != after[key]]
