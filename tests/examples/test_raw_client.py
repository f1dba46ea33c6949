"""The examples run, as their own text says, against a broker started as an operator starts one."""

from __future__ import annotations

import ast
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CLIENT = EXAMPLES / "raw_client.py"
SERVES_S = 30.0
STOPS_S = 20.0

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=SERVES_S, check=False, cwd=ROOT
    )


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A broker with the pool of examples/hello.toml; gives its state directory."""
    folder = tmp_path_factory.mktemp("broker")
    directory = folder / "state"
    start = [sys.executable, "-m", "mcp_broker", "start", "--state-dir", str(directory)]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*start, "--config", str(EXAMPLES / "hello.toml")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=ROOT,
        )
    try:
        until = time.monotonic() + SERVES_S
        # status exits 0 only once every pool has its workers
        while run("-m", "mcp_broker", "status", "--state-dir", directory).returncode:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
        yield directory
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOPS_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def profile(state: Path) -> Path:
    return state / "clients" / "default.toml"


@pytest.mark.process
def test_raw_client_gets_a_result_and_a_typed_error(profile: Path) -> None:
    ran = run(CLIENT, profile, "hello.greet", "name=Ada")
    assert ran.returncode == 0, ran.stderr
    result, error = ran.stdout.splitlines()
    assert result == "default OK Hello Ada"
    assert error.startswith("default NOT_FOUND {'message': ")


@pytest.mark.process
def test_raw_client_is_told_what_is_wrong_with_its_arguments(profile: Path) -> None:
    ran = run(CLIENT, profile, "hello.greet", "nome=Ada")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("default INVALID_ARGUMENT ")
    assert "nome" in ran.stdout


@pytest.mark.process
def test_raw_client_without_a_token_is_refused(profile: Path, tmp_path: Path) -> None:
    forged = tmp_path / "forged.toml"
    forged.touch(0o600)
    forged.write_text(re.sub(r'^token = ".*"$', 'token = ""', profile.read_text(), flags=re.MULTILINE))
    ran = run(CLIENT, forged)
    assert ran.returncode == 1
    assert "UNAUTHENTICATED" in ran.stderr


@pytest.mark.process
def test_command_of_the_readme_prints_what_it_says(state: Path) -> None:
    text = (EXAMPLES / "README.md").read_text()
    match = re.search(r"^\$ mcp-broker call ([^#\n]+?) *#.*\n(.+)$", text, re.MULTILINE)
    assert match
    ran = run("-m", "mcp_broker", "call", *match[1].split(), "--state-dir", state)
    assert ran.returncode == 0, ran.stderr
    assert match[2] in {ran.stdout.strip(), f'"{ran.stdout.strip()}"'}


def test_raw_client_is_short_and_stands_alone() -> None:
    text = CLIENT.read_text()
    assert len(text.splitlines()) < 80
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert "mcp_broker" not in imported
    assert imported - set(sys.stdlib_module_names) == {"msgpack", "zmq"}


def test_raw_client_refuses_a_profile_that_others_may_read(tmp_path: Path) -> None:
    loose = tmp_path / "loose.toml"
    loose.touch(0o644)
    ran = run(CLIENT, loose)
    assert ran.returncode == 1
    assert "others may read" in ran.stderr


def test_readme_shows_the_files_as_they_are() -> None:
    readme = (EXAMPLES / "README.md").read_text()
    python, toml = (re.search(rf"```{kind}\n(.*?)```", readme, re.DOTALL) for kind in ("python", "toml"))
    assert python
    assert toml

    def code(text: str) -> list[str]:
        lines = [line.partition(" #")[0].rstrip() for line in text.splitlines()]
        return [line for line in lines if line and not line.startswith("#")]

    shown = code(python[1])
    assert [line for line in code((EXAMPLES / "hello_tool.py").read_text()) if line in shown] == shown
    assert code((EXAMPLES / "hello.toml").read_text()) == code(toml[1])
