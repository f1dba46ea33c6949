"""A real broker, started and used by real command lines, as a newcomer does it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from mcp_broker import Client, RateLimited
from mcp_broker.auth.credentials import Authority
from mcp_broker.auth.profile import load_profile

pytestmark = [pytest.mark.process, pytest.mark.slow]

READY_S = 30.0
END_S = 15.0
TOOLS = '''
import os, time
from mcp_broker.worker import tool

@tool(name="add")
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b

@tool(name="nap")
def nap(seconds: float) -> str:
    """Sleep."""
    time.sleep(seconds)
    return "done"

@tool(name="die")
def die(marker: str) -> None:
    """Wait to be killed, after writing own pid to `marker`."""
    with open(marker + ".part", "w") as file:
        file.write(str(os.getpid()))
    os.rename(marker + ".part", marker)
    time.sleep(60)

@tool(name="wrong")
def wrong() -> None:
    """Fail."""
    raise ValueError("it cannot be")

@tool(name="count")
def count(to: int):
    """Count."""
    yield from range(to)

@tool(name="blob")
def blob() -> bytes:
    """Return bytes."""
    return b"\\x00\\xff"
'''
CONFIG = """
[pools.mine]
module = "mine"
path = ["."]
[pools.text]
module = "mcp_broker_workers.text"
"""


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MCP_BROKER_")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


def command(*arguments: str | Path, timeout_s: float = 30.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mcp_broker", *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


class Started:
    """`mcp-broker start` and the lines that it printed."""

    def __init__(self, folder: Path, config: str = CONFIG) -> None:
        self.state_dir = folder / "state"
        self.lines: list[str] = []
        self._new: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        (folder / "mine.py").write_text(TOOLS)
        (folder / "broker.toml").write_text(config)
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mcp_broker", "start"),
                *("--config", str(folder / "broker.toml"), "--state-dir", str(self.state_dir)),
            ],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._new.put(line.rstrip("\n"))
        self._new.put(None)

    def wait_for(self, pattern: str, timeout_s: float = READY_S) -> str:
        """Return the first line, new or old, in which the pattern is found."""
        deadline = time.monotonic() + timeout_s
        for known in self.lines:
            if re.search(pattern, known):
                return known
        while True:
            line: str | None = None
            with contextlib.suppress(queue.Empty):
                line = self._new.get(timeout=max(0.0, deadline - time.monotonic()))
            if line is None:
                raise AssertionError(f"no line {pattern!r} in\n" + "\n".join(self.lines))
            self.lines.append(line)
            if re.search(pattern, line):
                return line

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                raise
            finally:
                self._reader.join(END_S)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    started = Started(tmp_path_factory.mktemp("broker"))
    try:
        started.wait_for("Ctrl-C here ends it")
        yield started
    finally:
        started.end()


def call(broker: Started, *arguments: str) -> subprocess.CompletedProcess[str]:
    return command("call", *arguments, "--state-dir", broker.state_dir)


def status(broker: Started) -> dict[str, Any]:
    done = command("status", "--json", "--state-dir", broker.state_dir)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def wait_ready(broker: Started, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while command("status", "--state-dir", broker.state_dir).returncode != 0:
        assert time.monotonic() < deadline, "\n".join(broker.lines)


def pasted(line: str) -> subprocess.CompletedProcess[str]:
    """Run a printed line as a shell does into which it was copied."""
    return subprocess.run(
        ["/bin/sh", "-c", line], env=environment(), capture_output=True, text=True, timeout=30, check=False
    )


def assert_clear(done: subprocess.CompletedProcess[str], code: int, *facts: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert 1 <= len(done.stderr.splitlines()) <= 3, done.stderr
    assert "Traceback" not in done.stderr
    for fact in facts:
        assert fact in done.stderr


# -- the newcomer's path ----------------------------------------------------------------------------------


def test_printed_next_steps_run_unchanged(broker: Started) -> None:
    steps = [line.strip() for line in broker.lines if line.startswith("  ") and "--state-dir" in line]
    assert len(steps) >= 5
    for step in steps:
        if step.split(" --state-dir")[0].endswith("stop"):
            continue  # the last test of the life of a broker has it
        done = pasted(step)
        assert done.returncode == 0, (step, done.stderr)


def test_both_spellings_of_a_call(broker: Started) -> None:
    assert call(broker, "add", '{"a": 1, "b": 2}').stdout == "3\n"
    assert call(broker, "add", "a=1", "b=2").stdout == "3\n"
    done = call(broker, "text.word_count", '{"text": "a b a"}')
    assert json.loads(done.stdout) == {"a": 2, "b": 1}


def test_bytes_and_streams(broker: Started) -> None:
    assert call(broker, "blob").stdout == '"AP8="\n'
    assert call(broker, "count", "to=3", "--stream").stdout == "0\n1\n2\n"
    assert call(broker, "count", "to=3").stdout == "[0, 1, 2]\n"


def test_status_ps_tools_agree(broker: Started) -> None:
    wait_ready(broker)
    document = status(broker)
    assert document["supervisor"]["pid"] == broker.process.pid
    pools = {pool["name"]: pool for pool in document["pools"]}
    assert pools["mine"]["state"] == "ready"
    (worker,) = pools["mine"]["workers"]
    assert str(worker["pid"]) in command("ps", "--state-dir", broker.state_dir).stdout
    listed = json.loads(command("tools", "--json", "--state-dir", broker.state_dir).stdout)["tools"]
    assert {"add", "text.word_count"} <= {tool["name"] for tool in listed}
    page = command("status", "--state-dir", broker.state_dir).stdout.splitlines()
    assert len(page) <= 24
    assert max(map(len, page)) <= 80
    shown = command("tools", "add", "--state-dir", broker.state_dir).stdout
    example = re.search(r"^Example: (.*)$", shown, re.MULTILINE)
    assert example is not None
    done = pasted(example[1])
    assert (done.returncode, done.stdout) == (0, "2\n")


def test_doctor_is_content_with_a_running_broker(broker: Started) -> None:
    done = command("doctor", "--state-dir", broker.state_dir)
    assert done.returncode == 0, done.stdout
    assert f"pid {broker.process.pid}" in done.stdout


def test_second_start_names_the_holder(broker: Started) -> None:
    done = command("start", "--state-dir", broker.state_dir)
    assert_clear(done, 1, f"pid {broker.process.pid}")


# -- five different errors --------------------------------------------------------------------------------


def test_missing_argument(broker: Started) -> None:
    assert_clear(call(broker, "add", "a=1"), 1, "INVALID_ARGUMENT", "'b'", "add(")


def test_wrong_types_are_all_named(broker: Started) -> None:
    assert_clear(
        call(broker, "add", "a=x", "b=1.5"), 1, "INVALID_ARGUMENT", "'a'", "'b'", "integer", "'x'", "1.5"
    )


def test_unknown_tool(broker: Started) -> None:
    assert_clear(call(broker, "text.wordcount", "{}"), 1, "NOT_FOUND", "text.word_count")


def test_no_server(tmp_path: Path) -> None:
    Authority.open(tmp_path / "state").ensure_default(["tcp://127.0.0.1:1"])
    began = time.monotonic()
    done = command("call", "add", "{}", "--state-dir", tmp_path / "state")
    assert_clear(done, 4, "tcp://127.0.0.1:1", "start")
    assert time.monotonic() - began < 5  # one second on an idle machine, most of it Python's own start


def test_profile_of_mode_0644(broker: Started, tmp_path: Path) -> None:
    profile = tmp_path / "open.toml"
    profile.write_bytes((broker.state_dir / "clients" / "default.toml").read_bytes())
    profile.chmod(0o644)
    assert_clear(command("call", "add", "{}", "--profile", profile), 3, str(profile), "chmod 600")


def test_expired_token(broker: Started) -> None:
    def yesterday() -> float:
        return time.time() - 86_400

    endpoints = load_profile(broker.state_dir / "clients" / "default.toml").endpoints
    authority = Authority.open(broker.state_dir, create=False, wall=yesterday)
    profile = authority.issue_profile("late", scopes=["*"], ttl_s=60, endpoints=endpoints, replace=True)
    assert_clear(command("call", "add", "a=1", "b=2", "--profile", profile), 3, "expired")


def test_scope_that_does_not_cover_the_tool(broker: Started, tmp_path: Path) -> None:
    profile = tmp_path / "reader.toml"
    issued = command(
        *("credentials", "issue", "reader", "--allow", "text.*", "--out", profile),
        *("--state-dir", broker.state_dir),
    )
    assert issued.returncode == 0, issued.stderr
    assert_clear(command("call", "add", '{"a": 1, "b": 2}', "--profile", profile), 3, "FORBIDDEN")
    assert command("call", "text.word_count", "text=a", "--profile", profile).returncode == 0


# -- what goes wrong in a call --------------------------------------------------------------------------------


def test_deadline(broker: Started) -> None:
    assert_clear(call(broker, "nap", "seconds=30", "--timeout", "0.3"), 5, "DEADLINE_EXCEEDED")


def test_exception_of_a_tool_shows_the_authors_line(broker: Started) -> None:
    assert_clear(call(broker, "wrong"), 1, "TOOL_FAILED", "ValueError: it cannot be", "mine.py:")


def test_interrupt_cancels_the_call(broker: Started) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mcp_broker", "call", "nap", "seconds=30"),
            "--state-dir",
            str(broker.state_dir),
        ],
        env=environment() | {"PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_busy(broker)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            # it says where it stands
            process.send_signal(signal.SIGABRT)
            _, err = process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    deadline = time.monotonic() + 10
    while busy(broker):
        assert time.monotonic() < deadline, "the call goes on"


def busy(broker: Started) -> bool:
    return any(worker["in_flight"] for pool in status(broker)["pools"] for worker in pool["workers"])


def wait_for_busy(broker: Started) -> None:
    deadline = time.monotonic() + 10
    while not busy(broker):
        assert time.monotonic() < deadline, "the call never started"


def test_killed_worker_is_explained_to_its_caller_and_later(broker: Started, tmp_path: Path) -> None:
    wait_ready(broker)
    marker = tmp_path / "pid"
    arguments = ["call", "die", f"marker={marker}", "--state-dir", str(broker.state_dir)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mcp_broker", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 10
        while not marker.exists():
            assert time.monotonic() < deadline, "the call never started"
            assert process.poll() is None
        pid = int(marker.read_text())
        os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=10)
    finally:
        process.kill()
    done = subprocess.CompletedProcess(arguments, process.returncode, out, err)
    assert_clear(done, 1, "WORKER_LOST", f"pid {pid}", "SIGKILL", "why")
    found = re.search(r"why (\w{6,})", err)
    assert found is not None
    for wanted in (str(pid), found[1]):
        told = command("why", wanted, "--state-dir", broker.state_dir)
        assert told.returncode == 0, told.stderr
        assert "SIGKILL" in told.stdout
        assert str(pid) in told.stdout
    wait_ready(broker)
    assert any(death["pid"] == pid for death in status(broker)["deaths"])
    broker.wait_for(rf"pid {pid}.*SIGKILL")


# -- the end --------------------------------------------------------------------------------------------------


def test_stop_ends_everything_and_why_still_knows(tmp_path: Path) -> None:
    started = Started(tmp_path)
    try:
        started.wait_for("Ctrl-C here ends it")
        document = status(started)
        pids = [worker["pid"] for pool in document["pools"] for worker in pool["workers"]]
        os.kill(pids[0], signal.SIGKILL)
        started.wait_for(rf"pid {pids[0]}.*SIGKILL")
        wait_ready(started)
        (stop,) = [
            line.strip() for line in started.lines if re.search(r"mcp.broker.* stop --state-dir", line)
        ]
        done = pasted(stop)
        assert done.returncode == 0, done.stderr
        assert started.process.wait(5) == 0
    finally:
        started.end()
    for pid in (*pids, document["broker"]["pid"]):
        assert not Path(f"/proc/{pid}").exists()
    told = command("why", str(pids[0]), "--state-dir", started.state_dir)
    assert told.returncode == 0
    assert "SIGKILL" in told.stdout
    assert "nothing runs" in command("stop", "--state-dir", started.state_dir).stderr
    assert command("status", "--state-dir", started.state_dir).returncode == 4


LIMITED = """
[limits]
rate_per_s = 0.01
burst = 5
[pools.mine]
module = "mine"
path = ["."]
rate_per_s = 0.01
burst = 2
[pools.text]
module = "mcp_broker_workers.text"
"""


def test_rates_of_the_configuration_hold_and_refusals_are_counted(tmp_path: Path) -> None:
    started = Started(tmp_path, LIMITED)
    try:
        started.wait_for("Ctrl-C here ends it")
        issue = ("credentials", "issue", "eager", "--allow", "*", "--state-dir", started.state_dir)
        profile = command(*issue).stdout.strip()

        def limits_met(tool: str, arguments: dict[str, Any], times: int) -> list[str]:
            outcomes = [client.submit(tool, arguments).exception() for _ in range(times)]
            return [
                error.details["limit"] if isinstance(error, RateLimited) else repr(error)
                for error in outcomes
            ]

        with Client.connect(profile) as client:
            assert limits_met("add", {"a": 1, "b": 2}, 3) == ["None", "None", "tool_rate"]
            words = limits_met("text.word_count", {"text": "a"}, 4)
            assert words == ["None", "None", "None", "principal_rate"]
        assert status(started)["calls"]["refused"] == {"RATE_LIMITED": 2}
    finally:
        started.end()
