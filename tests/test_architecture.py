"""Holds the code to ARCHITECTURE.md: which way imports point, what stays pure, what stays small.

Read from the syntax trees, so that a rule also covers imports inside functions, which no run may reach.
"""

from __future__ import annotations

import ast
import configparser
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"mcp_broker": "mcp_broker", "mcp_broker_workers": "workers"}

#: a part imports itself and the parts of a lower rank, never its neighbours of the same rank
RANKS = {
    **dict.fromkeys(("errors", "limits", "ids"), 0),
    "wire": 1,
    # config is no machine's: the shells read it, and hand values to the machines
    **dict.fromkeys(("core", "auth", "confine", "config", "transport", "proctable", "logs"), 2),
    **dict.fromkeys(("broker", "supervisor", "client", "worker"), 3),
    # the demo is a program of its own that the cli starts
    "demo": 4,
    "cli": 5,
}

#: the neighbours that may be seen all the same: (from, to)
NEIGHBOURS = {
    ("errors", "limits"),
    ("errors", "ids"),
    ("core", "auth.policy"),  # every call is authorised where it is routed, and the policy is pure
    ("core", "auth.claims"),
}

PURE = (
    *("errors", "limits", "ids", "wire", "core", "client.session"),
    *("auth.zap", "auth.claims", "auth.forms", "auth.policy"),
    *(
        "worker.session",
        "worker.pace",
        "worker.outcomes",
        "worker.kept",
        "worker.uploads",
        "worker.faults",
        "worker.results",
    ),
    *("supervisor.changes", "supervisor.events", "supervisor.sizing", "supervisor.standing"),
    "supervisor.isolation.plan",
)
IMPURE = frozenset(
    (
        *("zmq", "socket", "select", "selectors", "asyncio", "os", "subprocess", "multiprocessing", "signal"),
        *("threading", "time", "random", "secrets", "uuid", "psutil", "logging", "nacl"),
        *("ctypes", "fcntl", "mmap", "resource"),
    ),
)

#: third-party packages with one home
HOMES = {"msgpack": "wire", "msgspec": "wire", "zstandard": "wire", "jwt": "auth.claims"}

MAX_LINES = 400
VAGUE = frozenset({"utils", "util", "helpers", "helper", "common", "manager", "misc"})


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module, with where it stands."""

    target: str
    line: int
    #: inside a function
    lazy: bool
    #: under `if TYPE_CHECKING`, so never run
    typing_only: bool


@dataclass(frozen=True, slots=True)
class Module:
    """A module of the project, as far as its imports and size go."""

    name: str
    imports: tuple[Import, ...]
    lines: int


Project = Mapping[str, Module]


# ---------------------------------------------------------------- reading


def _absolute(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".") if is_package else module.split(".")[:-1]
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _is_typing_only(node: ast.If) -> bool:
    return ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _walk(node: ast.AST, *, lazy: bool, typing_only: bool) -> Iterator[tuple[ast.stmt, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy, typing_only
        elif isinstance(child, ast.If) and _is_typing_only(child):
            for statement in child.body:
                yield from _walk(ast.Module([statement], []), lazy=lazy, typing_only=True)
            for statement in child.orelse:
                yield from _walk(ast.Module([statement], []), lazy=lazy, typing_only=typing_only)
        else:
            deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, lazy=lazy or deferred, typing_only=typing_only)


def parse(sources: Mapping[str, str], packages: frozenset[str] = frozenset()) -> Project:
    """Read modules given as text; `packages` names those that are an `__init__`."""
    project = {}
    for name, text in sources.items():
        found: list[Import] = []
        for node, lazy, typing_only in _walk(ast.parse(text), lazy=False, typing_only=False):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                assert isinstance(node, ast.ImportFrom)
                base = _absolute(node, name, is_package=name in packages)
                # "from package import module" names a module, "from module import name" does not
                joined = [f"{base}.{alias.name}" for alias in node.names]
                targets = sorted({name if name in sources else base for name in joined})
            found += [Import(target, node.lineno, lazy, typing_only) for target in targets]
        project[name] = Module(name, tuple(found), len(text.splitlines()))
    return project


def _read(folders: Mapping[str, str]) -> tuple[dict[str, str], frozenset[str]]:
    sources, packages = {}, set()
    for package, folder in folders.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            if parts[-1] == "__init__":
                parts.pop()
                packages.add(".".join(parts))
            sources[".".join(parts)] = path.read_text()
    return sources, frozenset(packages)


SOURCES, PACKAGES = _read(FOLDERS)
PROJECT = parse(SOURCES, PACKAGES)


# ---------------------------------------------------------------- rules: each returns what breaks it


def _inner(name: str) -> str:
    """Return the name below mcp_broker, "" for the package itself and for anything outside."""
    return name.removeprefix("mcp_broker.") if name.startswith("mcp_broker.") else ""


def _within(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def _seen(source: str, target: str) -> bool:
    return any(_within(source, left) and _within(target, right) for left, right in NEIGHBOURS)


def _at(module: Module, found: Import, why: str) -> str:
    return f"{module.name}:{found.line} imports {found.target}: {why}"


def layers(project: Project) -> list[str]:
    """Imports point down."""
    wrong = []
    for module in project.values():
        source = _inner(module.name)
        part = source.split(".")[0]
        if module.name.startswith("mcp_broker.") and part not in RANKS and part != "__main__":
            wrong.append(f"{module.name}: which layer is {part!r} in? Say so in RANKS")
            continue
        for found in module.imports:
            target = _inner(found.target)
            other = target.split(".")[0]
            if not source or not target or part in {other, "__main__"}:
                continue
            if RANKS.get(other, -1) >= RANKS[part] and not _seen(source, target):
                wrong.append(_at(module, found, f"{part} does not stand above {other}"))
    return wrong


def purity(project: Project) -> list[str]:
    """A machine imports no input, output, clock, thread or randomness, nor a module that does."""
    wrong = []
    for module in project.values():
        if not any(_within(_inner(module.name), part) for part in PURE):
            continue
        for found in module.imports:
            target = _inner(found.target)
            if found.target.split(".")[0] in IMPURE and not found.typing_only:
                wrong.append(_at(module, found, "this module is pure"))
            elif target and not found.typing_only and not any(_within(target, part) for part in PURE):
                wrong.append(_at(module, found, "this module is pure and that one is not"))
    return wrong


def homes(project: Project) -> list[str]:
    """The codecs stay in wire/, the token library in auth/claims."""
    return [
        _at(module, found, f"only {home} may")
        for module in project.values()
        for found in module.imports
        if (home := HOMES.get(found.target.split(".")[0])) and not _within(_inner(module.name), home)
    ]


def shipped_tools(project: Project) -> list[str]:
    """The shipped tools use what any tool author has, and the broker knows none of them by import."""
    wrong = []
    for module in project.values():
        is_tool = _within(module.name, "mcp_broker_workers")
        for found in module.imports:
            if not is_tool and _within(found.target, "mcp_broker_workers"):
                wrong.append(_at(module, found, "tools are named in configuration"))
            target = _inner(found.target)
            if is_tool and target and target.split(".")[0] != "worker":
                wrong.append(_at(module, found, "a tool imports mcp_broker.worker"))
    return wrong


def _path_to_zmq(project: Project, start: str, *, follow_lazy: bool) -> list[str]:
    """Return the chain of imports from a module to zmq, empty when there is none."""
    chains = [[start]]
    done = {start}
    while chains:
        chain = chains.pop(0)
        if chain[-1] == "zmq":
            return chain
        module = project.get(chain[-1])
        # importing a.b.c runs a and a.b too, though not what they import lazily
        names = [chain[-1].rpartition(".")[0]] if "." in chain[-1] else []
        if module is not None:
            is_parent_only = module.name == "mcp_broker"
            names += [
                "zmq" if _within(found.target, "zmq") else found.target
                for found in module.imports
                if not found.typing_only and (not found.lazy or (follow_lazy and not is_parent_only))
            ]
        for name in names:
            if name not in done and (name in project or name == "zmq"):
                done.add(name)
                chains.append([*chain, name])
    return []


def supervisor_without_zmq(project: Project) -> list[str]:
    """The supervisor holds no ZeroMQ context: it forks, and it must outlive every network fault."""
    chains = [
        _path_to_zmq(project, name, follow_lazy=True)
        for name in project
        if _within(name, "mcp_broker.supervisor")
    ]
    return [" -> ".join(chain) for chain in chains if chain]


def quick_cli(project: Project) -> list[str]:
    """Importing the command line loads no ZeroMQ, so that --help and completion are quick."""
    chains = [
        _path_to_zmq(project, name, follow_lazy=False) for name in project if _within(name, "mcp_broker.cli")
    ]
    return [" -> ".join(chain) for chain in chains if chain]


def sizes(project: Project) -> list[str]:
    """A module past this size holds two nouns."""
    return [f"{module.name}: {module.lines} lines" for module in project.values() if module.lines > MAX_LINES]


def names(project: Project) -> list[str]:
    """A module is named by the noun that it owns."""
    return [name for name in project if VAGUE & set(name.split("."))]


RULES = (layers, purity, homes, shipped_tools, supervisor_without_zmq, quick_cli, sizes, names)


# ---------------------------------------------------------------- the project


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_project_keeps_the_rule(rule: Callable[[Project], list[str]]) -> None:
    assert "mcp_broker" in PROJECT
    assert rule(PROJECT) == []


def test_tests_and_benchmarks_are_named_by_nouns() -> None:
    paths = [path for folder in ("tests", "bench", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert Path(__file__).resolve() in paths
    assert [path for path in paths if VAGUE & {path.stem, *path.relative_to(ROOT).parts}] == []


def test_rules_speak_of_what_there_is() -> None:
    """A rule about a part that is gone, or is yet to come, holds nobody to anything."""
    parts = {_inner(name).split(".")[0] for name in PROJECT} - {"", "__main__"}
    assert set(RANKS) == parts
    named = [*PURE, *HOMES.values(), *(part for pair in NEIGHBOURS for part in pair)]
    assert [name for name in named if f"mcp_broker.{name}" not in PROJECT] == []


def test_code_map_names_every_part() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.partition("## Code map\n")[2].partition("\n## ")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = [name for cell in first_cells for name in re.findall(r"`(.+?)`", cell)]
    packages = {f"{part}/" if f"mcp_broker.{part}" in PACKAGES else f"{part}.py" for part in RANKS}
    assert sorted(named) == sorted({*packages, "workers/"})


def test_the_order_of_layers_is_written_as_it_is_held() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    written = re.search(r"^`(cli -> .*)`\.$", text, re.MULTILINE)
    assert written
    layers_of = [set(re.findall(r"\w+", layer)) for layer in written[1].split(" -> ")]
    assert layers_of == [
        {part for part, rank in RANKS.items() if rank == one}
        for one in sorted(set(RANKS.values()), reverse=True)
    ]


def test_wheel_lists_every_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    homes_of_modules = {name if name in PACKAGES else name.rpartition(".")[0] for name in PROJECT}
    assert homes_of_modules <= PACKAGES, "these folders want an __init__.py"
    assert listed == sorted(PACKAGES), "write these under [options] packages in setup.cfg"


def test_every_shipped_config_loads() -> None:
    folder = ROOT / "configs"
    files = sorted(folder.rglob("*.toml"))
    assert files or not folder.exists(), "configs/ holds no configuration"
    for path in files:
        importlib.import_module("mcp_broker.config").load(path)


def _limits_of(sources: Mapping[str, str]) -> tuple[set[str], set[str]]:
    """Return the names of the module limits, and those of them that other modules read."""
    defined = {
        node.target.id
        for node in ast.parse(sources["mcp_broker.limits"]).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    used = set()
    for name, text in sources.items():
        for node in ast.walk(ast.parse(text)) if name != "mcp_broker.limits" else ():
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and "limits" in node.value.id
            ):
                used.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and node.module == "mcp_broker.limits":
                used |= {alias.name for alias in node.names}
    return defined, defined & used


def test_every_limit_bounds_something() -> None:
    defined, used = _limits_of(SOURCES)
    assert len(defined) > 100
    assert sorted(defined - used) == []


def test_a_limit_that_nothing_reads_is_found() -> None:
    sources = {
        "mcp_broker.limits": "READ_MAX: Final = 1\nUNREAD_MAX: Final = 2",
        "mcp_broker.core.calls": "from mcp_broker import limits\nREAD = limits.READ_MAX\nUNREAD_MAX = 2",
    }
    assert _limits_of(sources) == ({"READ_MAX", "UNREAD_MAX"}, {"READ_MAX"})


# ---------------------------------------------------------------- the rules can fail

MANY_LINES = "\n" * (MAX_LINES + 1)
BREACHES: tuple[tuple[Callable[[Project], list[str]], dict[str, str]], ...] = (
    (layers, {"mcp_broker.wire.codec": "import mcp_broker.core.calls"}),
    (layers, {"mcp_broker.wire.codec": "from mcp_broker import core", "mcp_broker.core": ""}),
    (layers, {"mcp_broker.core.calls": "from mcp_broker.config import tables"}),
    (layers, {"mcp_broker.core.calls": "from ..broker import loop"}),
    (layers, {"mcp_broker.client.sync": "def f():\n    from mcp_broker.worker import tool"}),
    (layers, {"mcp_broker.broker.loop": "from mcp_broker.supervisor.loop import Loop"}),
    (layers, {"mcp_broker.broker.loop": "import mcp_broker.cli"}),
    (layers, {"mcp_broker.novelty": ""}),
    (purity, {"mcp_broker.core.calls": "import time"}),
    (purity, {"mcp_broker.core.calls": "def f():\n    from os import path"}),
    (purity, {"mcp_broker.client.session": "import zmq.asyncio"}),
    (purity, {"mcp_broker.worker.session": "from time import monotonic"}),
    (
        purity,
        {
            "mcp_broker.supervisor.sizing": "from mcp_broker.supervisor import pool",
            "mcp_broker.supervisor.pool": "",
        },
    ),
    (purity, {"mcp_broker.auth.policy": "from mcp_broker.auth import keys", "mcp_broker.auth.keys": ""}),
    (homes, {"mcp_broker.client.sync": "import msgpack"}),
    (homes, {"mcp_broker.auth.keys": "from jwt import encode"}),
    (shipped_tools, {"mcp_broker_workers.text": "from mcp_broker.wire import codec"}),
    (shipped_tools, {"mcp_broker_workers.text": "from mcp_broker.errors import InvalidArgument"}),
    (shipped_tools, {"mcp_broker.broker.loop": "import mcp_broker_workers.text"}),
    (supervisor_without_zmq, {"mcp_broker.supervisor.loop": "import zmq"}),
    (
        supervisor_without_zmq,
        {"mcp_broker.supervisor.loop": "import mcp_broker.auth.keys", "mcp_broker.auth.keys": "import zmq"},
    ),
    (
        supervisor_without_zmq,
        {
            "mcp_broker": "from mcp_broker.client import Client",
            "mcp_broker.client": "from zmq import Context",
            "mcp_broker.supervisor": "",
        },
    ),
    (quick_cli, {"mcp_broker.cli": "import mcp_broker.client", "mcp_broker.client": "import zmq"}),
    (sizes, {"mcp_broker.ids": MANY_LINES}),
    (names, {"mcp_broker.core.utils": ""}),
    (names, {"mcp_broker.common.text": ""}),
)


@pytest.mark.parametrize(("rule", "sources"), BREACHES)
def test_rule_finds_a_breach(rule: Callable[[Project], list[str]], sources: dict[str, str]) -> None:
    assert len(rule(parse(sources))) == 1


def test_rules_allow_what_they_should() -> None:
    sources = {
        "mcp_broker": "def __getattr__(name):\n    from mcp_broker.client import Client",
        "mcp_broker.wire.codec": "import msgspec, msgpack\nfrom mcp_broker.errors import BrokerError",
        "mcp_broker.errors": "from mcp_broker import limits",
        "mcp_broker.limits": "",
        "mcp_broker.auth.policy": "",
        "mcp_broker.core.calls": "from mcp_broker.auth import policy\n"
        "if TYPE_CHECKING:\n    from random import Random",
        "mcp_broker.client": "import zmq\nfrom mcp_broker.wire import codec",
        "mcp_broker.worker": "import zmq",
        "mcp_broker.supervisor.loop": "import os\nfrom mcp_broker.core import calls",
        "mcp_broker.cli": "def main():\n    from mcp_broker.client import Client",
        "mcp_broker_workers.text": "from mcp_broker.worker import tool",
    }
    project = parse(sources, frozenset({"mcp_broker", "mcp_broker.client", "mcp_broker.cli"}))
    assert [breach for rule in RULES for breach in rule(project)] == []
