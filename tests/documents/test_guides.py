"""README and guides hold: their tools serve, their commands print what they show, their programs run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

import pytest

from mcp_broker import DeadlineExceeded
from mcp_broker.config import shipped_pools
from tests.support.running import Running

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
TOOLS = ROOT / "docs" / "tools.md"
CLIENT = ROOT / "docs" / "client.md"
RUNS_S = 60.0

pytestmark = [pytest.mark.process, pytest.mark.slow]


class Command(NamedTuple):
    """A command of a document, and what stands below it."""

    line: str
    printed: str


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def files() -> dict[str, str]:
    """Return the files that the blocks of the authors' guide make: a block goes on with the last file that was named."""
    made: dict[str, str] = {}
    name = ""
    for block in blocks(TOOLS, "python"):
        head = re.match(r"# (\w+\.py)\n", block)
        name = head[1] if head else name
        made[name] = made.get(name, "") + block + "\n\n"
    return made


def commands(path: Path) -> list[Command]:
    """Return the calls that a document shows."""
    found = []
    for block in blocks(path, "console"):
        for line, printed in re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", block, re.MULTILINE):
            if line.startswith("mcp-broker call "):
                found.append(Command(line, printed))
    return found


#: `expression  # -> value` of a guide becomes a comparison
SHOWN = re.compile(r"^( *)(\S.*?)  # -> (.+)$", re.MULTILINE)
#: what the callers' program begins with, and ends with
BEFORE = """
_seen = 0


def _is(found, shown):
    global _seen
    assert found == shown, f"the guide shows {shown!r}, and this came out: {found!r}"
    _seen += 1


"""
AFTER = "\nprint(_seen)\n"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("guide")
    for name, text in files().items():
        (folder / name).write_text(text)
    key = folder / "api.key"
    key.touch(0o600)
    key.write_text("a secret\n")
    (config,) = blocks(TOOLS, "toml")
    config += "".join(
        f'[pools.{name}]\nmodule = "{pool.module}"\noptions = {json.dumps(pool.options).replace(": ", " = ")}\n'
        for name, pool in shipped_pools().items()
    )
    with Running(folder, config=config.replace("{", "{{").replace("}", "}}")) as broker:
        yield broker


def run(program: str, folder: Path, running: Running) -> subprocess.CompletedProcess[str]:
    """Run a caller's program, with the profile of a broker."""
    file = folder / "program.py"
    file.write_text(program)
    return subprocess.run(
        [sys.executable, str(file)],
        env={**os.environ, "MCP_BROKER_PROFILE": str(running.profile)},
        capture_output=True,
        text=True,
        timeout=RUNS_S,
        check=False,
    )


def test_tools_of_the_guide_are_served(running: Running) -> None:
    pools = {pool["name"]: pool["state"] for pool in running.status()["pools"]}
    assert pools == dict.fromkeys(("mine", "web", "echo", "text", "sql", "sequence"), "ready")


@pytest.mark.parametrize("command", [*commands(README), *commands(TOOLS)], ids=lambda command: command.line)
def test_command_of_a_document_prints_what_it_shows(running: Running, command: Command) -> None:
    ran = running.command(*shlex.split(command.line, comments=True)[1:])
    # the line that follows an error names the state directory of the test
    said = re.sub(r"^  next: .*\n", "", ran.stderr, flags=re.MULTILINE)
    assert ran.stdout + said == command.printed
    assert ran.returncode == (1 if command.printed.startswith("error: ") else 0)


@pytest.mark.parametrize("path", [README, TOOLS], ids=lambda path: path.name)
def test_document_shows_commands_that_work_and_that_fail(path: Path) -> None:
    printed = [command.printed for command in commands(path)]
    assert any(text.startswith("error: ") for text in printed)
    assert any(not text.startswith("error: ") for text in printed)
    assert all(printed)


def test_tests_of_the_guide_pass(running: Running) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_tools.py"],
        cwd=running.folder,
        capture_output=True,
        text=True,
        timeout=RUNS_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "3 passed" in ran.stdout


def test_program_of_the_callers_guide_does_what_it_shows(running: Running, tmp_path: Path) -> None:
    text = "\n".join(blocks(CLIENT, "python"))
    program, comparisons = SHOWN.subn(r"\1_is(\2, \3)", text)
    assert comparisons == text.count("# -> ") > 20
    ran = run(BEFORE + program + AFTER, tmp_path, running)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{comparisons}\n", "every line that shows a value was reached"


@pytest.mark.parametrize("program", [block for block in blocks(README, "python") if "Client" in block])
def test_program_of_the_readme_runs(running: Running, tmp_path: Path, program: str) -> None:
    ran = run(program, tmp_path, running)
    assert ran.returncode == 0, ran.stderr


def test_the_readme_has_programs() -> None:
    assert sum("Client.connect" in block for block in blocks(README, "python")) == 2


def test_tools_that_no_command_shows_do_what_their_text_says(running: Running) -> None:
    with running.client() as client:
        assert client.call("text.sorted", {"text": "b\na\n"}) == "a\nb\n"
        assert client.call("shop.key_print") == hashlib.sha256(b"a secret").hexdigest()[:8]
        assert client.call("web.checksum", {"rounds": 3}) == 31**3 % 1_000_003
        with client.stream("show.page", {"text": "hello"}) as parts:
            page = HTTPConnection(next(parts).removeprefix("http://"), timeout=RUNS_S)
            page.request("GET", "/")
            assert page.getresponse().read() == b"hello"
            page.close()
            assert list(parts) == ["served"]
        with pytest.raises(DeadlineExceeded):
            client.call("web.checksum", {"rounds": 10**12}, timeout_s=0.3)
