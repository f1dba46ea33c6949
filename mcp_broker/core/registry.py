"""Which tools there are, and which pool serves each.

A worker's tools are registered all together or not at all. A name belongs to one pool and has one definition;
it stays while its pool has no live worker, so that calls can wait for one. Workers of a later edition of a pool may bring
other definitions while earlier ones live; a pool that closes may lose its names to another.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from mcp_broker import limits
from mcp_broker.core.bucket import Bucket, Rate
from mcp_broker.core.fairness import Gate
from mcp_broker.core.pool import APART
from mcp_broker.errors import InvalidArgument
from mcp_broker.wire import codec, payload

if TYPE_CHECKING:
    from mcp_broker.core.condition import Condition
    from mcp_broker.core.pool import Pool
    from mcp_broker.wire.messages import ToolDefinition

#: Names under it are the broker's own.
RESERVED_PREFIX = "system."


def _check_schemas(definition: ToolDefinition) -> None:
    """Refuse schemas that could not be listed: callers get them as payloads.

    Raises:
        InvalidArgument: it is no JSON, too deep, or holds what msgpack cannot carry (the worker's fault).
    """
    for text in (definition.parameters, definition.returns):
        try:
            value = json.loads(text)
            _check_depth(value)
            payload.pack(value)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidArgument(
                f"a schema of the tool {definition.name!r} cannot be listed: {error}",
                {"name": definition.name},
            ) from error


def _check_depth(value: Any) -> None:  # noqa: ANN401 (JSON)
    """Refuse JSON of more levels than any stack takes, without a stack of our own.

    Raises:
        ValueError: it has more.
    """
    level = [value]
    for _ in range(limits.SCHEMA_DEPTH_MAX + 1):
        level = [outer for outer in level if isinstance(outer, dict | list)]
        if not level:
            return
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
    raise ValueError(f"it is nested deeper than {limits.SCHEMA_DEPTH_MAX} levels")


class Registration(Enum):
    """What came of a worker's tools."""

    #: the worker serves what its pool serves
    JOINED = 0
    #: the pool serves what this worker brought; those of earlier editions do not
    SUPERSEDES = 1
    #: the pool serves what a later edition brought; this worker does not
    OUTDATED = 2


def _is_apart(tool: Tool, pool: Pool) -> bool:
    """Tell whether a pool's tool has a worker of its own: what others of the module say of it does not count."""
    return tool.pool is not None and tool.pool.name == f"{pool.name}{APART}{tool.name}"


def _may_move(tool: Tool, pool: Pool) -> bool:
    """Tell whether another pool may have a tool's name.

    Its own closes, or is closed or no more since an earlier broker; or workers of a later edition of it are on their way: should
    these bring the tool too, it is they who are refused.
    """
    report = pool.report
    is_gone = tool.is_recalled and (report is None or report.state == "closed")
    return bool(pool.closed) or is_gone or any(one.edition > pool.edition for one in pool.workers.values())


class Tool:
    """A registered tool. ``pool`` is None for the broker's own.

    Attributes:
        result_bytes: what its next result may have, where late ones were large; else 0.
        listing: its pool, its state, and what is told of it in this state, packed; None: nobody has asked.
        is_recalled: known from an earlier time only; no worker of this broker has brought it yet.
    """

    __slots__ = (
        *(
            "bucket",
            "condition",
            "definition",
            "gate",
            "is_held",
            "is_recalled",
            "is_streaming",
            "level",
            "listing",
            "name",
            "pool",
        ),
        "result_bytes",
        "traits",
    )

    def __init__(self, definition: ToolDefinition, pool: Pool | None) -> None:
        self.pool = pool
        self.name = definition.name
        self.result_bytes = 0
        self.is_recalled = False
        #: events for which its workers have hooks, and "recover"
        self.traits: frozenset[str] = frozenset()
        #: what is known of its failures and its life; None: nothing yet
        self.condition: Condition | None = None
        #: its calls wait, however many workers are free
        self.is_held = False
        #: what its calls have to pass, if it is bounded: to be taken by the broker, and to be given to workers
        self.bucket: Bucket | None = None
        self.gate: Gate | None = None
        self.define(definition)

    def define(self, definition: ToolDefinition) -> None:
        """Take another definition of the same name."""
        self.definition = definition
        self.listing: tuple[str, str, bytes] | None = None
        self.level = definition.level
        self.is_streaming = definition.streaming
        self.fence()
        self.meter()

    def fence(self) -> None:
        """Have a gate that lets through what may run now; its pool has to count anew (:meth:`Pool.regate`)."""
        most = 0 if self.is_held else self.definition.concurrency_max
        if most is None:
            self.gate = None
        elif self.gate is None or self.gate.limit != most:
            self.gate = Gate(most)

    def meter(self) -> None:
        """Have a bucket of the rate that counts: the operator's for its pool, or else its own."""
        rate = Rate.of(self.definition.rate_per_s, self.definition.burst)
        if self.pool is not None and self.pool.rate is not None:
            rate = self.pool.rate
        if rate is None:
            self.bucket = None
        elif self.bucket is None or self.bucket.rate != rate:
            self.bucket = Bucket(rate)


class Registry:
    """Tools by name."""

    def __init__(self) -> None:
        self.tools: dict[str, Tool] = {}
        #: counts changes, so that whoever caches a look-up can tell
        self.version = 0
        #: tools that there may be, the broker's own excepted
        self.most = limits.TOOLS_MAX
        #: some tool has a rate
        self.is_metered = False

    def add_own(self, definitions: Iterable[ToolDefinition]) -> None:
        """Add the broker's own tools, once, before it serves."""
        for definition in definitions:
            self.tools[definition.name] = Tool(definition, None)

    def recall(self, pool: Pool, definitions: tuple[ToolDefinition, ...]) -> None:
        """Know a pool's tools before any of its workers has come, from an earlier broker's time."""
        for definition in definitions:
            if definition.name not in self.tools:
                tool = self.tools[definition.name] = Tool(definition, pool)
                tool.is_recalled = True
        self.changed()

    def of(self, pool: Pool) -> list[Tool]:
        """Return a pool's tools."""
        return [tool for tool in self.tools.values() if tool.pool is pool]

    def set_rate(self, pool: Pool, rate: Rate | None) -> None:
        """Take the operator's word on how many calls each tool of a pool takes."""
        if rate == pool.rate:
            return
        pool.rate = rate
        for tool in self.of(pool):
            tool.meter()
        self.changed()

    def changed(self) -> None:
        """Have whoever caches a look-up look again."""
        self.version += 1
        self.is_metered = any(tool.bucket is not None for tool in self.tools.values())

    def learn(self, pool: Pool, traits: Mapping[str, tuple[str, ...]]) -> None:
        """Take a worker's word on what else is to be known of its tools."""
        for tool in self.of(pool):
            tool.traits = frozenset(traits.get(tool.name, ()))

    def register(self, pool: Pool, definitions: tuple[ToolDefinition, ...], edition: int = 0) -> Registration:
        """Add a worker's tools, all or none.

        Other definitions than the pool's present ones may come from a worker of a pool that has no other worker, or of a
        later edition: from then on they are the pool's, and workers of earlier editions that serve others are outdated.

        Raises:
            InvalidArgument: a name is reserved, twice in the list, another pool's, or differs from what the
                pool's live workers of this edition serve (the worker's fault); ``details["name"]`` says which.
        """
        if APART in pool.name:
            return self._register_apart(pool, definitions)
        apart = [tool.name for tool in self.tools.values() if _is_apart(tool, pool)]
        brought = {definition.name: definition for definition in definitions}
        definitions = tuple(definition for definition in definitions if definition.name not in apart)
        mine = {tool.name: tool.definition for tool in self.of(pool)}
        # of a tool that is served apart, too: it may come back
        differs = [name for name, one in brought.items() if pool.brought.get(name, one) != one]
        if edition < pool.edition:
            # whatever it brings, it gets no calls of it; what it holds is told of yet
            is_same = not differs and mine == {definition.name: definition for definition in definitions}
            return Registration.JOINED if is_same else Registration.OUTDATED
        known = self._examine(pool, definitions)
        self._check_room(known)
        others = any(worker.is_registered for worker in pool.workers.values())
        is_later, pool.edition = edition > pool.edition, edition
        if others and not is_later:
            if differs:
                raise InvalidArgument(
                    f"the tool {differs[0]!r} differs from what the other workers of pool {pool.name!r} serve",
                    {"name": differs[0], "pool": pool.name},
                )
            self._check_size(pool, mine | {definition.name: definition for definition in definitions})
        else:
            pool.brought = {}
            for name in mine.keys() - known.keys():
                del self.tools[name]
        pool.brought |= brought
        for definition in definitions:
            tool = known[definition.name]
            if tool is None:
                # calls that wait in another pool are for its worker to answer
                self.tools[definition.name] = Tool(definition, pool)
                continue
            tool.is_recalled = False
            if tool.definition != definition:
                # the same object, so that calls that wait for it find the new definition
                tool.define(definition)
        self.changed()
        is_other = bool(differs) or mine != {tool.name: tool.definition for tool in self.of(pool)}
        return Registration.SUPERSEDES if others and is_later and is_other else Registration.JOINED

    def _examine(self, pool: Pool, definitions: tuple[ToolDefinition, ...]) -> dict[str, Tool | None]:
        """Return the pool's present tools of these names, None for those that are new to it.

        Raises:
            InvalidArgument: a name cannot be had.
        """
        known: dict[str, Tool | None] = {}
        for definition in definitions:
            name = definition.name
            if name.startswith(RESERVED_PREFIX):
                raise InvalidArgument(
                    f"the name {name!r} is reserved: names under 'system.' are the broker's own",
                    {"name": name},
                )
            if name in known:
                raise InvalidArgument(f"the tool {name!r} is defined twice by one worker", {"name": name})
            _check_schemas(definition)
            tool = known[name] = self.tools.get(name)
            if tool is None or tool.pool is pool:
                continue
            if tool.pool is None or not _may_move(tool, tool.pool):
                owner = tool.pool.name if tool.pool is not None else "the broker"
                raise InvalidArgument(
                    f"the tool {name!r} is already served by pool {owner!r}; rename one of the two",
                    {"name": name, "pool": owner},
                )
            # it may have moved to another pool
            known[name] = None
        return known

    def _check_room(self, known: dict[str, Tool | None]) -> None:
        new = sum(tool is None and name not in self.tools for name, tool in known.items())
        there = sum(tool.pool is not None for tool in self.tools.values())
        if new and there + new > self.most:
            raise InvalidArgument(
                f"the broker serves {there} tools already, of at most {self.most}; raise tools in [limits]",
                {"limit": "tools", "maximum": self.most},
            )

    @staticmethod
    def _check_size(pool: Pool, definitions: Mapping[str, ToolDefinition]) -> None:
        """Refuse what makes a pool's tools more than one worker could bring.

        Raises:
            InvalidArgument: they are too many bytes together (the worker's fault).
        """
        size = sum(len(codec.encode(definition)) for definition in definitions.values())
        if size > limits.REGISTER_BYTES_MAX:
            raise InvalidArgument(
                f"the {len(definitions)} tools of pool {pool.name!r} have {size:,} bytes with their schemas, of at most "
                f"{limits.REGISTER_BYTES_MAX:,}; split the module",
                {"limit": "tools_bytes", "maximum": limits.REGISTER_BYTES_MAX, "pool": pool.name},
            )

    def forget(self, pool: Pool) -> None:
        """Forget the tools of a pool that is no more."""
        for tool in self.of(pool):
            del self.tools[tool.name]
        self.changed()

    def _register_apart(self, pool: Pool, definitions: tuple[ToolDefinition, ...]) -> Registration:
        """Take the one tool of a worker that serves it alone; who moves it there is not asked here."""
        name = pool.name.partition(APART)[2]
        definition = next((definition for definition in definitions if definition.name == name), None)
        if definition is None:
            raise InvalidArgument(
                f"the module of pool {pool.name!r} has no tool {name!r} any more", {"name": name}
            )
        _check_schemas(definition)
        pool.brought = {name: definition}
        known = self.tools.get(name)
        if known is None:
            self.tools[name] = Tool(definition, pool)
        elif known.pool is pool:
            known.is_recalled = False
            known.define(definition)
        self.changed()
        return Registration.JOINED

    def similar(self, name: str, among: Iterable[str]) -> list[str]:
        """Return up to three names that the caller may have meant, the likeliest first."""
        candidates = list(among)
        close = difflib.get_close_matches(name, candidates, n=3, cutoff=0.6)
        if not close:
            short = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
            close = [
                short[key] for key in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(short), 3, 0.75)
            ]
        return close
