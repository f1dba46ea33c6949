"""The commands that read: tools, status, ps, why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mcp_broker.cli import settings, status, why
from mcp_broker.wire.node import DeathKind
from tests.cli.doubles import CERTIFICATE, FakeClient, status_report

if TYPE_CHECKING:
    from tests.cli.conftest import Run

NEVER_A_TERMINAL = "\x1b["


# -- tools --------------------------------------------------------------------------------------------


def test_tools_are_listed_by_name_with_their_first_line(run: Run, client: FakeClient) -> None:
    done = run("tools")
    assert done.out.splitlines() == ["add              Add.", "text.word_count  Count the words of a text."]
    assert done.code == 0


def test_tools_are_filtered(run: Run, client: FakeClient) -> None:
    assert run("tools", "--tag", "example").out.startswith("text.word_count")
    assert run("tools", "--capability", "math").out.startswith("add")
    done = run("tools", "--tag", "none")
    assert (done.code, done.out) == (0, "")


def test_tool_that_is_down_says_so(run: Run, client: FakeClient) -> None:
    client.definitions = [{**client.definitions[0], "state": "failed"}]
    assert "[pool text: failed]" in run("tools").out


def test_one_tool_shows_signature_schema_and_a_call_that_works(run: Run, client: FakeClient) -> None:
    done = run("tools", "text.word_count")
    assert "text.word_count(text: string, top: integer = 10) -> object" in done.out
    assert '"required": [' in done.out
    assert 'call text.word_count \'{"text": "text"}\'' in done.out


def test_unknown_tool_gets_a_suggestion(run: Run, client: FakeClient) -> None:
    done = run("tools", "text.wordcount")
    assert done.code == 1
    assert "did you mean text.word_count?" in done.err


def test_tools_as_json(run: Run, client: FakeClient) -> None:
    listed = json.loads(run("tools", "--json").out)["tools"]
    assert [tool["name"] for tool in listed] == ["add", "text.word_count"]
    assert json.loads(run("tools", "add", "--json").out)["parameters"]["required"] == ["a", "b"]


# -- status, ps -----------------------------------------------------------------------------------------


def answering(client: FakeClient, report: dict[str, Any]) -> None:
    client.answer = lambda _tool, _arguments: report


def test_status_of_a_whole_broker_exits_0_and_fits_the_screen(run: Run, client: FakeClient) -> None:
    answering(client, status_report(deaths=[CERTIFICATE] * 20))
    done = run("status")
    lines = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for fact in ("0.1.0", "3 min 12 s", "4001", "text.word_count", "killed by SIGKILL", "1 failed"):
        assert fact in done.out
    assert NEVER_A_TERMINAL not in done.out


def test_status_of_many_workers_still_fits() -> None:
    report = status_report(deaths=[CERTIFICATE] * 20)
    report["pools"] = [
        {**pool, "name": f"{pool['name']}{number}"} for pool in report["pools"] for number in range(30)
    ]
    lines = status.page(report)
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert any("more workers" in line for line in lines)


def test_status_of_a_lacking_pool_exits_1_and_names_it(run: Run, client: FakeClient) -> None:
    report = status_report()
    report["pools"][0].update(ready=1, state="degraded", reason="boom")
    answering(client, report)
    done = run("status")
    assert done.code == 1
    assert done.err == "not ready: pool text is degraded, 1 of 2 workers ready: boom\n"
    done = run("status", "--json")
    document = json.loads(done.out)
    assert (done.code, document["ready"]) == (1, False)
    assert document["missing"]


def test_draining_broker_is_not_ready() -> None:
    assert status.missing(status_report(state="draining")) == ["the broker is draining"]


def test_status_as_json_keeps_the_broker_s_own_shape(run: Run, client: FakeClient) -> None:
    answering(client, status_report())
    document = json.loads(run("status", "--json").out)
    assert document["broker"]["pid"] == 4711
    assert document["supervisor"]["pid"] == 4710
    assert {"id", "pid", "state"} <= set(document["pools"][0]["workers"][0])
    assert {"name", "state"} <= set(document["pools"][0])
    assert "endpoints" in document


def test_uptime_is_counted_from_the_start() -> None:
    report = status_report(started_wall=1.0)
    assert status.uptime_s(report) > 1e9


def test_ps_lists_every_worker_and_pools_without_any(run: Run, client: FakeClient) -> None:
    report = status_report()
    report["pools"][1].update(workers=[], state="failed")
    answering(client, report)
    lines = run("ps").out.splitlines()
    assert lines[0].split()[:4] == ["POOL", "WORKER", "PID", "STATE"]
    assert lines[1].split()[:4] == ["text", "text-1", "4001", "ready"]
    assert lines[3].split()[:4] == ["echo", "-", "-", "failed"]
    rows = json.loads(run("ps", "--json").out)["workers"]
    assert [row["pool"] for row in rows] == ["text", "text"]


# -- why ------------------------------------------------------------------------------------------------


def test_why_tells_a_signal_from_an_exit(run: Run, client: FakeClient) -> None:
    client.answer = lambda _tool, _arguments: {"found": True, "kind": "death", "certificate": CERTIFICATE}
    done = run("why", "4242")
    assert client.calls == [("system.why", {"id": "4242"}, None)]
    for fact in (
        "text-3",
        "pid 4242",
        "killed by SIGKILL",
        "mcp-broker did not send",
        "did not exit by itself",
        "last words",
    ):
        assert fact in done.out
    exited = {**CERTIFICATE, "kind": "exit", "signal": None, "exit_code": 3, "cause": "exited with code 3"}
    told = "\n".join(why.story({"found": True, "kind": "death", "certificate": exited}, settings.Settings()))
    assert "exit code  3" in told
    assert "signal     none" in told


def test_every_kind_of_death_has_words_of_its_own() -> None:
    kinds = get_args(DeathKind)
    told = {
        kind: "\n".join(
            why.story({"kind": "death", "certificate": {**CERTIFICATE, "kind": kind}}, settings.Settings())
        )
        for kind in kinds
    }
    assert set(why.KINDS) == set(kinds)
    assert len(set(why.KINDS.values())) == len(kinds)
    assert [kind for kind in kinds if f"{kind}: {why.KINDS[kind]}" not in told[kind]] == []


def test_a_kind_of_death_of_another_release_is_said_to_be_one() -> None:
    told = "\n".join(
        why.story({"kind": "death", "certificate": {**CERTIFICATE, "kind": "boredom"}}, settings.Settings())
    )
    assert "boredom: a kind that this version does not know" in told


def test_why_says_unknown_rather_than_guess() -> None:
    bare = {"worker_id": "text-1", "pid": 1, "kind": "unknown"}
    told = "\n".join(why.story({"kind": "death", "certificate": bare}, settings.Settings()))
    assert "why        unknown" in told
    assert "exit code  unknown" in told


def test_why_of_a_call_and_of_a_living_worker() -> None:
    call = {
        "found": True,
        "kind": "call",
        "call_id": "ab12",
        "tool": "add",
        "code": "WORKER_LOST",
        "certificate": CERTIFICATE,
    }
    told = "\n".join(why.story(call, settings.Settings()))
    assert "call ab12 of add: WORKER_LOST" in told
    assert "mcp-broker why add" in told, "how its tool is"
    assert "killed by SIGKILL" in told
    living = {
        "found": True,
        "kind": "worker",
        "id": "text-1",
        "state": "ready",
        "pool": "text",
        "alive": True,
    }
    assert why.story(living, settings.Settings()) == ["worker text-1 of pool text lives: ready"]


def test_why_without_an_id_tells_the_latest_death_or_that_there_is_none(run: Run, client: FakeClient) -> None:
    answering(client, status_report(deaths=[CERTIFICATE]))
    assert "text-3" in run("why").out
    answering(client, status_report())
    assert run("why") == (0, "no worker has died\n", "")


def test_why_of_something_unknown_fails(run: Run, client: FakeClient) -> None:
    client.answer = lambda _tool, _arguments: {"found": False, "id": "x"}
    done = run("why", "x")
    assert done.code == 1
    assert "nothing is known of 'x'" in done.err


def test_why_reads_the_records_when_no_broker_answers(run: Run, tmp_path: Path) -> None:
    state = tmp_path / "kept"
    state.mkdir()
    older = {**CERTIFICATE, "worker_id": "text-2", "pid": 1}
    lines = [json.dumps(older), json.dumps(CERTIFICATE), '{"worker_id": "torn']
    (state / "deaths.jsonl").write_text("\n".join(lines))
    done = run("why", "--state-dir", str(state))
    assert done.code == 0
    assert "text-3" in done.out
    assert "no broker answers" in done.err
    assert "text-2" in run("why", "1", "--state-dir", str(state)).out
    assert (
        json.loads(run("why", "4242", "--json", "--state-dir", str(state)).out)["certificate"]["pid"] == 4242
    )
    assert run("why", "77", "--state-dir", str(state)).code == 1


def test_why_without_broker_and_records_is_not_reachable(run: Run, tmp_path: Path) -> None:
    done = run("why", "1", "--state-dir", str(tmp_path / "none"))
    assert done.code == 4
    assert "start" in done.err


RECLAIM = {
    "worker_id": "text-3",
    "pool": "text",
    "ms": 41.6,
    "steps": [
        {"step": "processes", "count": 6, "bytes": 0, "ms": 9.1, "left": []},
        {"step": "ports", "count": 0, "bytes": 0, "ms": 0.1, "left": []},
        {
            "step": "scratch",
            "count": 12,
            "bytes": 5_242_880,
            "ms": 31.0,
            "left": ["hog: Operation not permitted"],
        },
    ],
}


def test_why_tells_what_was_taken_back_and_what_could_not_be(run: Run, tmp_path: Path) -> None:
    story = "\n".join(
        why.story({"kind": "death", "certificate": CERTIFICATE, "reclaim": RECLAIM}, settings.Settings())
    )
    assert "taken back within 42 ms" in story
    assert "processes" in story
    assert "ports" not in story, "nothing was there"
    assert "could not: hog: Operation not permitted" in story
    running = "\n".join(
        why.story({"kind": "death", "certificate": CERTIFICATE, "reclaim": None}, settings.Settings())
    )
    assert "taken back: not known" in running
    state = tmp_path / "kept"
    state.mkdir()
    (state / "deaths.jsonl").write_text(json.dumps(CERTIFICATE))
    (state / "reclaims.jsonl").write_text(
        json.dumps({**RECLAIM, "worker_id": "t-9"}) + "\n" + json.dumps(RECLAIM)
    )
    assert "taken back within 42 ms" in run("why", "text-3", "--state-dir", str(state)).out


def test_ports_lists_owners_and_traffic_or_that_there_are_none(run: Run, client: FakeClient) -> None:
    answering(client, status_report())
    assert run("ports") == (0, "no port is leased\n", "")
    port = {
        "port": 18001,
        "host": "127.0.0.1",
        "state": "active",
        "owner": "t-1",
        "connections": 2,
        "bytes_in": 2048,
    }
    answering(client, status_report(ports=[port]))
    shown = run("ports").out
    assert "127.0.0.1:18001" in shown
    assert "t-1" in shown
    assert json.loads(run("ports", "--json").out) == {"ports": [port]}
