"""Start, deaths, restarts and the end, with real processes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from mcp_broker import limits
from tests.supervisor.conftest import Start, is_running, of_instance
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.process, pytest.mark.slow]


def test_a_broker_is_told_all_before_it_serves_and_workers_become_ready(start: Start) -> None:
    node = start(pools={"left": {}, "right": {}})
    serving = node.event("Serving", pid=node.pid, epoch=1)
    ready = {node.event("PoolReady")["pool"] for _ in range(2)}
    assert ready == {"left", "right"}
    told = node.order()
    assert [one["kind"] for one in told[:4]] == ["BOOT", "DEATHS", "REPORT", "ADMIT"]
    assert [id_.split("-")[0] for id_ in told[3]["workers"]] == ["left", "right"], (
        "the first table is complete"
    )
    wait_for(lambda: node.pools()["left"]["state"] == "ready", what="the report of a ready pool")
    assert is_running(serving["broker_pid"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_drains_ends_zero_and_leaves_no_process_and_no_run_file(start: Start, number: int) -> None:
    node = start()
    node.event("PoolReady")
    node.order()
    assert len(of_instance(node.state_dir)) == 2
    assert node.stop(number) == 0
    assert of_instance(node.state_dir) == []
    assert not (node.state_dir / "run").exists()
    assert list(node.runtime_dir.iterdir()) == []
    node.event("Draining")
    node.event("Stopped")
    assert [event for event in node.events if event["event"].endswith("Died")] == []


def test_a_worker_that_ignores_sigterm_is_killed(start: Start) -> None:
    node = start({"deaf": True})
    node.event("PoolReady")
    begun = time.monotonic()
    assert node.stop() == 0
    assert 0.9 < time.monotonic() - begun < 5
    assert of_instance(node.state_dir) == []


def test_a_second_signal_ends_at_once(start: Start) -> None:
    node = start({"deaf": True}, head="[limits]\ndrain_s = 60\n")
    node.event("PoolReady")
    (node.state_dir / "stubborn").touch()
    node.popen.send_signal(signal.SIGINT)
    node.event("Draining")
    assert node.popen.poll() is None
    begun = time.monotonic()
    assert node.stop(signal.SIGINT) == 0
    assert time.monotonic() - begun < 10, "not the 60 s of the drain"
    assert of_instance(node.state_dir) == []


def test_what_a_broker_wants_that_comes_up_during_a_stop_starts_nothing(start: Start) -> None:
    node = start({"deaf": True})
    node.event("PoolReady")
    node.worker()
    node.order(exit=1)
    node.event("BrokerDied")
    # no broker is there that could drain: the workers are stopped at once, and this one takes a second
    node.popen.send_signal(signal.SIGTERM)
    node.event("Draining")
    scale = {
        "id": 1, "name": "system.pools.scale", "arguments": {"pool": "fake", "workers": 2}, "principal": "ada",
        "timeout_ms": 60_000,
    }  # fmt: skip
    isolate = {"pool": "fake", "tool": "t", "wanted": True}
    says = [("Command", scale), ("Isolate", isolate), ("Superseded", {"pool": "fake", "edition": 9})]
    try:
        told = node.order(say=says)
    except OSError:
        pytest.skip("the next broker came too late to want anything")
    assert node.popen.wait(10) == 0
    assert of_instance(node.state_dir) == []
    if not told:
        pytest.skip("the next broker came too late to want anything")
    assert "was told to stop" in (node.state_dir.parent / "state.log").read_text()
    assert list(node.state_dir.glob("shutdown-*")), "it is to take no calls"


def test_a_broker_that_hangs_is_killed_and_another_one_serves_the_workers_that_are_there(
    start: Start,
) -> None:
    node = start()
    pid = node.event("Serving")["broker_pid"]
    node.event("PoolReady")
    worker = node.worker()
    os.kill(pid, signal.SIGSTOP)
    died = node.event("BrokerDied", timeout_s=limits.BROKER_SILENCE_S * 3)
    assert (died["pid"], died["reason"]) == (pid, "hung: it said nothing for 10 s (killed by SIGKILL)")
    assert node.event("Serving")["broker_pid"] != pid
    assert is_running(worker["pid"])


def test_a_death_is_told_within_100_ms_with_its_cause_and_the_worker_replaced(start: Start) -> None:
    node = start({"started_seq": 41})
    node.event("PoolReady")
    delays = []
    open_files = len(list(Path(f"/proc/{node.pid}/fd").iterdir()))
    for _ in range(3):
        worker = node.worker()
        begun = time.monotonic()
        os.kill(worker["pid"], signal.SIGKILL)
        certificate = node.event("WorkerDied")["certificate"]
        delays.append(time.monotonic() - begun)
        assert (certificate["worker_id"], certificate["pid"]) == (worker["id"], worker["pid"])
        assert (certificate["kind"], certificate["signal"]) == ("signal", "SIGKILL")
        assert certificate["started_seq"] == 41
        node.event("PoolReady")
        assert not (node.state_dir / "run" / worker["id"]).exists()
    assert min(delays) < 0.1
    wait_for(
        lambda: len(list(Path(f"/proc/{node.pid}/fd").iterdir())) == open_files,
        what="no descriptor is left open",
    )
    told = node.order()
    died = [one["certificate"]["worker_id"] for one in told if one["kind"] == "DIED"]
    admitted = [id_ for one in told if one["kind"] == "ADMIT" for id_ in one["workers"]]
    assert len(died) == 3
    assert len(set(admitted)) == len(admitted) == 4, "each life has its own id and key"


def test_deaths_during_calls_do_not_end_a_pool(start: Start) -> None:
    node = start({"started_seq": 1}, head="[limits]\nrestarts = 0\n")
    for _ in range(4):
        node.event("PoolReady")
        os.kill(node.worker()["pid"], signal.SIGKILL)
        node.event("WorkerDied")
    node.event("PoolReady")
    assert node.pools()["fake"]["restarts"] == 4


def test_an_import_error_ends_its_pool_at_once_with_the_reason_and_no_other(start: Start) -> None:
    says = "mcp-broker worker: pool bad: cannot import fake: No module named 'nowhere'"
    node = start(pools={"bad": {"boot_exit": 3, "says": says}, "good": {}})
    failed = node.event("PoolFailed", pool="bad")
    assert failed["reason"] == "cannot import fake: No module named 'nowhere'"
    if not any(event["event"] == "PoolReady" for event in node.events):
        node.event("PoolReady", pool="good")
    assert sum(event["event"] == "WorkerDied" for event in node.events) == 1
    wait_for(lambda: node.pools()["bad"]["state"] == "failed", what="the report")
    bad = node.pools()["bad"]
    assert (bad["wanted"], bad["reason"]) == (1, failed["reason"])


def test_a_crash_loop_backs_off_and_ends_with_the_reason(start: Start) -> None:
    node = start({"boot_exit": 7, "says": "cannot open /dev/model"}, head="[limits]\nrestarts = 2\n")
    failed = node.event("PoolFailed")
    assert failed["reason"].startswith("died 3 times within")
    assert failed["reason"].endswith("the last time: cannot open /dev/model")
    deaths = [event["certificate"] for event in node.events if event["event"] == "WorkerDied"]
    assert [(one["kind"], one["exit_code"]) for one in deaths] == [("boot_failure", 7)] * 3
    assert deaths[0]["stderr"] == "cannot open /dev/model\n"


def test_a_start_that_hangs_is_killed_with_the_reason(start: Start) -> None:
    node = start({"do": "hang"}, head="[limits]\nstart_s = 0.6\nrestarts = 0\n")
    certificate = node.event("WorkerDied")["certificate"]
    assert certificate["kind"] == "boot_failure"
    assert certificate["cause"] == "was not ready after 0.6 s (killed by SIGKILL)"
    assert "was not ready after 0.6 s" in node.event("PoolFailed")["reason"]


def test_a_refused_registration_ends_its_pool_with_the_brokers_reason(start: Start) -> None:
    node = start({"refuse": True})
    assert node.event("PoolFailed")["reason"] == "the name fake.tool belongs to another pool"


def test_a_worker_without_its_walls_is_killed_and_its_pool_given_up_while_others_serve(start: Start) -> None:
    node = start(pools={"bare": {"unconfined": True}, "good": {}})
    failed = node.event("PoolFailed")
    assert failed["pool"] == "bare"
    assert failed["reason"] == (
        "worker bare-1 is not confined: it may gain privileges (NoNewPrivs 0), which level process forbids"
    )
    wait_for(lambda: node.pools()["good"]["state"] == "ready", what="the other pool")
    deaths = [event["certificate"] for event in node.events if event["event"] == "WorkerDied"]
    assert [death["kind"] for death in deaths] == ["boot_failure"]


def test_an_interpreter_that_cannot_be_run_ends_its_pool_only(start: Start, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/nowhere/at/all\n")
    script.chmod(0o700)
    node = start(keys=f"python = {json.dumps(str(script))}", head="[limits]\nrestarts = 1\n")
    assert "cannot start" in node.event("PoolFailed")["reason"]
    assert node.stop() == 0


def test_a_broker_that_dies_is_replaced_on_the_same_ports_and_told_everything(start: Start) -> None:
    node = start({"started_seq": 1})
    first = node.event("Serving")
    node.event("PoolReady")
    os.kill(node.worker()["pid"], signal.SIGKILL)
    dead = node.event("WorkerDied")["certificate"]
    node.event("PoolReady")
    worker = node.worker()
    os.kill(first["broker_pid"], signal.SIGKILL)
    begun = time.monotonic()
    assert node.event("BrokerDied")["reason"] == "killed by SIGKILL"
    second = node.event("Serving")
    assert time.monotonic() - begun < 2
    assert second["epoch"] > first["epoch"]
    assert second["client_endpoint"] == first["client_endpoint"]
    assert second["worker_endpoint"] == first["worker_endpoint"]
    assert is_running(worker["pid"]), "workers are left alone"
    told = node.order()
    assert [one["kind"] for one in told[:5]] == ["BOOT", "ADMIT", "DEATHS", "TOOLS", "REPORT"]
    assert told[1]["workers"] == [worker["id"]]
    assert [one["worker_id"] for one in told[2]["certificates"]] == [dead["worker_id"]]


def test_a_broker_that_flaps_is_tried_again(start: Start) -> None:
    node = start()
    node.event("PoolReady")
    for _ in range(3):
        node.order(exit=5)
        node.event("BrokerDied", reason="exited with code 5")
        node.event("Serving")
    assert node.stop() == 0


def test_a_broker_that_cannot_start_even_once_ends_the_supervisor(start: Start, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "broken").touch()
    node = start()
    message = node.event("error")["message"]
    assert message.startswith("the broker could not start: no room for a broker here")
    assert node.popen.wait(20) == 1
    assert of_instance(node.state_dir) == []


def test_ports_and_epoch_go_on_at_the_next_start(start: Start) -> None:
    node = start()
    first = node.event("Serving")
    node.event("PoolReady")
    first_worker = node.worker()["id"]
    assert node.stop() == 0
    again = start()
    second = again.event("Serving")
    again.event("PoolReady")
    assert second["client_endpoint"] == first["client_endpoint"]
    assert second["epoch"] > first["epoch"]
    assert again.worker()["id"] != first_worker
    deaths = next(told for told in again.order() if told["kind"] == "DEATHS")
    assert [(one["worker_id"], one["kind"]) for one in deaths["certificates"]] == [(first_worker, "operator")]


def test_a_second_start_is_refused_with_the_pid_of_the_first(start: Start) -> None:
    node = start()
    node.event("Serving")
    second = start()
    refused = second.event("error")
    assert f"(pid {node.pid})" in refused["message"]
    assert refused["details"]["pid"] == node.pid
    assert second.popen.wait(20) == 1
    assert is_running(node.pid)


def test_an_interrupt_raises_in_its_call_only_and_names_the_reason(start: Start, tmp_path: Path) -> None:
    heard = tmp_path / "heard"
    node = start({"started_seq": 7, "heard": str(heard)})
    node.event("PoolReady")
    worker = node.worker()
    order = {"worker_id": worker["id"], "seq": 7, "why": "deadline"}
    node.order(interrupt={**order, "stage": "raise"})
    assert wait_for(lambda: heard.exists() and heard.read_text(), what="the signal") == "7"
    node.order(interrupt={**order, "seq": 8, "stage": "kill"})  # has not started
    node.order(interrupt={**order, "seq": 6, "stage": "kill"})  # has ended
    node.order(interrupt={**order, "stage": "kill"})
    certificate = node.event("WorkerDied")["certificate"]
    assert certificate["kind"] == "deadline"
    assert certificate["cause"] == "stopped because its call was past its deadline (killed by SIGKILL)"
    assert certificate["stack"] == "", "nobody asked what it was doing"
    node.event("PoolReady")
    assert sum(one["kind"] == "DIED" for one in node.order()) == 1


@pytest.mark.parametrize(("detached_s", "kind"), [(60.0, "cancel"), (0.0, "silence"), (1e6, "silence")])
def test_a_worker_that_is_silent_for_a_detached_call_is_spared_until_that_is_over(
    start: Start, detached_s: float, kind: str
) -> None:
    node = start({"started_seq": 7, "detached_s": detached_s})
    node.event("PoolReady")
    order = {"worker_id": node.worker()["id"], "stage": "kill"}
    node.order(interrupt={**order, "seq": 0, "why": "silence"})
    if kind == "cancel":
        # it lives, and is killed by this
        node.order(interrupt={**order, "seq": 7, "why": "cancel"})
    assert node.event("WorkerDied")["certificate"]["kind"] == kind


def test_a_worker_that_says_nonsense_on_its_tether_is_killed_and_its_certificate_says_so(
    start: Start,
) -> None:
    node = start({"says_on_tether": ["91a3585858"], "do": "hang"}, head="[limits]\nrestarts = 0\n")
    certificate = node.event("WorkerDied")["certificate"]
    assert (certificate["kind"], certificate["signal"]) == ("violation", "SIGKILL")
    assert certificate["cause"].startswith("stopped because what it sent on its tether is no message")


def test_a_worker_past_its_deadline_says_what_it_was_doing(start: Start) -> None:
    node = start({"started_seq": 1, "deaf": True})
    node.event("PoolReady")
    worker = node.worker()
    order = {"worker_id": worker["id"], "seq": 1, "why": "deadline"}
    node.order(interrupt={**order, "stage": "term"})
    files = [fd for fd in Path(f"/proc/{worker['pid']}/fd").iterdir() if "mcpb-marks" in str(fd.readlink())]
    wait_for(lambda: b"most recent call first" in files[0].read_bytes(), what="the worker's stacks")
    node.order(interrupt={**order, "stage": "kill"})
    certificate = node.event("WorkerDied")["certificate"]
    assert (certificate["kind"], certificate["signal"]) == ("deadline", "SIGKILL")
    assert "most recent call first" in certificate["stack"]
    assert "fakes/worker.py" in certificate["stack"]
    node.event("PoolReady")
