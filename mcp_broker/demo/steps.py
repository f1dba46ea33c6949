"""What the demo shows, in order. Each step checks what it shows: a wrong answer is a failure, not a curiosity."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any, Final

from mcp_broker.auth.credentials import Authority
from mcp_broker.auth.profile import load_profile
from mcp_broker.client.sync import Client
from mcp_broker.demo.broker import DemoBroker, wait_until
from mcp_broker.demo.stage import Failed, Stage, Step
from mcp_broker.errors import CallError, Forbidden, InvalidArgument, WorkerLost

PIPELINED: Final = 10_000
OPUNTIAS: Final = 7
NAP_S: Final = 30.0
WHOLE_AGAIN_S: Final = 10.0
#: a pool of these may be down for want of a library: then its step fails, and the others go on
_NEED_LIBRARIES: Final = frozenset({"sql", "sequence"})
_DAY_S: Final = 86_400

_PENGUINS: Final = """
SELECT species, count(*) AS penguins, CAST(round(avg(CAST(body_mass_g AS INTEGER))) AS INTEGER) AS mean_mass_g,
       max(CAST(flipper_length_mm AS INTEGER)) AS longest_flipper_mm
FROM penguins WHERE sex IN ('female', 'male') GROUP BY species ORDER BY species
"""


def play(stage: Stage, broker: DemoBroker) -> None:
    """Start the broker and run every step; a step that needs another one's success is left out without it."""
    with stage.step("Start broker and workers") as step:
        broker.start()
        failed = _start(stage, broker, step)
    if not step.ok:
        return
    with ExitStack() as open_clients:
        with stage.step("Issue two credentials") as step:
            reader, worker = _issue(broker)
            operator, limited, client = (
                open_clients.enter_context(Client.connect(profile))
                for profile in (broker.profile, reader, worker)
            )
            step.figure = "text.* and *"
            step.finding = (
                "reader: scope text.*; worker: scope *; each a file with a key pair and a token bound to it"
            )
        if not step.ok:
            return
        _work(stage, client, failed)
        _refusals(stage, client, limited)
        with stage.step("kill -9 a worker in mid-call") as step:
            _crash(stage, broker, client, operator, step)


def _start(stage: Stage, broker: DemoBroker, step: Step) -> dict[str, str]:
    began = time.monotonic()
    broker.wait_serving()
    with Client.connect(broker.profile) as operator:
        serving_s = time.monotonic() - began
        failed = broker.wait_settled(operator)
        report = broker.status(operator)
    for pool in report["pools"]:
        pids = ", ".join(str(worker["pid"]) for worker in pool["workers"]) or "none"
        reason = f"  {failed[pool['name']]}" if pool["name"] in failed else ""
        stage.show(f"{pool['name']:<10} {pool['state']:<9} pid {pids:<16} {', '.join(pool['tools'])}{reason}")
    ready_s = time.monotonic() - began
    step.facts = {"serving_s": serving_s, "ready_s": ready_s, "endpoint": report["endpoints"]["clients"]}
    step.figure = f"serving in {serving_s:.1f} s, pools ready in {ready_s:.1f} s"
    step.finding = (
        f"{report['endpoints']['clients']}, CURVE and JWT, serving after {serving_s:.1f} s, "
        f"{len(report['pools']) - len(failed)} of {len(report['pools'])} pools ready after {ready_s:.1f} s"
    )
    if set(failed) - _NEED_LIBRARIES:
        raise Failed(f"pools that are down: {', '.join(sorted(failed))}")
    return failed


def _issue(broker: DemoBroker) -> list[Path]:
    authority = Authority.open(broker.state_dir, create=False)
    endpoints = load_profile(broker.profile).endpoints
    return [
        authority.issue_profile(name, scopes=[scope], ttl_s=_DAY_S, endpoints=endpoints)
        for name, scope in (("reader", "text.*"), ("worker", "*"))
    ]


# -- real work ------------------------------------------------------------------------------------


def _work(stage: Stage, client: Client, failed: dict[str, str]) -> None:
    with stage.step("Count words of the README") as step:
        what, text = _readme()
        counts = client.call("text.word_count", {"text": text, "top": 6})
        _expect(bool(counts) and all(isinstance(count, int) for count in counts.values()), counts)
        stage.show("  ".join(f"{word} {count}" for word, count in counts.items()))
        step.figure = f"{len(text):,} characters"
        step.finding = f"text.word_count read {what}, {len(text):,} characters"
    with stage.step("Query penguins.csv (DuckDB)") as step:
        stage.show("344 penguins of the Palmer Archipelago; Gorman, Williams and Fraser 2014; CC0")
        _need(failed, "sql")
        head, rows = _penguins(client)
        stage.rows(head, rows)
        # known from the data: 333 of the 344 have a sex on record
        _expect([row[:2] for row in rows] == [["Adelie", 146], ["Chinstrap", 68], ["Gentoo", 119]], rows)
        step.figure = "3 species"
        step.finding = "sql.query, streamed; 333 of the 344 have a sex on record"
    with stage.step("Analyse opuntia.fasta") as step:
        stage.show("rpl16 introns of seven prickly pears; GenBank AF191658 to AF191665; free to use")
        _need(failed, "sequence")
        _fasta(stage, client, step)
    with stage.step(f"Make {PIPELINED:,} pipelined calls") as step:
        began = time.monotonic()
        answers = client.map("echo.echo", [{"value": number} for number in range(PIPELINED)])
        _expect(list(answers) == list(range(PIPELINED)), "answers out of order or missing")
        seconds = time.monotonic() - began
        rate = PIPELINED / seconds
        step.facts = {"calls": PIPELINED, "calls_per_s": round(rate)}
        step.figure = f"{rate:,.0f} calls/s"
        step.finding = f"{rate:,.0f} calls/s: {PIPELINED:,} answers, in order, in {seconds:.2f} s"


def _need(failed: dict[str, str], pool: str) -> None:
    """Say what is missing before a call would only say that there is no such tool.

    Raises:
        Failed: the pool is down.
    """
    if pool in failed:
        raise Failed(f"pool {pool} is down: {failed[pool]}; mend: pip install 'mcp-broker[tools]'")


def _readme() -> tuple[str, str]:
    """Return the README as the installed package carries it; the data's own when the package has none."""
    try:
        text = str(metadata("mcp-broker").get_payload() or "")  # type: ignore[attr-defined] # it is an email.Message
    except (PackageNotFoundError, AttributeError):
        text = ""
    if text.strip():
        return "the README of mcp-broker", text
    from importlib import resources  # noqa: PLC0415 (the rare case)

    text = (resources.files("mcp_broker") / "demo_data" / "README.md").read_text(encoding="utf-8")
    return "the README of the demo's data", text


def _penguins(client: Client) -> tuple[list[str], list[list[object]]]:
    rows: list[list[object]] = []
    head: list[str] = []
    for part in client.stream("sql.query", {"sql": _PENGUINS}):
        head = part["columns"]
        rows += [list(row) for row in part["rows"]]
    return head, rows


def _fasta(stage: Stage, client: Client, step: Step) -> None:
    from importlib import resources  # noqa: PLC0415 (next to its use)

    text = (resources.files("mcp_broker") / "demo_data" / "opuntia.fasta").read_text(encoding="ascii")
    found = client.call("sequence.fasta_statistics", {"fasta": text})
    _expect(found["count"] == OPUNTIAS and found["total_length"] == sum(found["lengths"].values()), found)
    stage.rows(
        ["sequences", "letters", "shortest", "longest", "N50", "G and C"],
        [
            [
                *(found["count"], found["total_length"], found["shortest"], found["longest"], found["n50"]),
                f"{found['gc_fraction']:.1%}",
            ]
        ],
    )
    step.figure = f"{found['count']} sequences, {found['total_length']:,} letters"
    step.finding = f"sequence.fasta_statistics over {len(text):,} characters"


# -- refusals -------------------------------------------------------------------------------------


def _refusals(stage: Stage, client: Client, limited: Client) -> None:
    with stage.step("Call without the scope") as step:
        with _refused(Forbidden) as caught:
            limited.call("echo.echo", {"value": 1})
        step.figure = caught[0].code
        step.finding = _told(caught)
    with stage.step("Call with bad arguments") as step:
        with _refused(InvalidArgument) as caught:
            client.call("text.word_count", {"text": 7, "topp": 3})
        step.figure = caught[0].code
        step.finding = _told(caught)
        step.facts = {"faults": caught[0].details.get("faults")}


@contextmanager
def _refused(kind: type[CallError]) -> Iterator[list[CallError]]:
    """Expect one kind of refusal.

    Raises:
        Failed: there was none.
    """
    caught: list[CallError] = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
        return
    raise Failed(f"the call was answered; it should have been refused with {kind.code}")


def _told(caught: list[CallError]) -> str:
    return f"{caught[0].code}: {' '.join(caught[0].message.split())}"


# -- the crash ------------------------------------------------------------------------------------


def _crash(stage: Stage, broker: DemoBroker, client: Client, operator: Client, step: Step) -> None:
    marker = broker.folder / "started"
    future = client.submit("demo.nap", {"seconds": NAP_S, "marker": str(marker)}, timeout_s=2 * NAP_S)
    wait_until(marker.exists, WHOLE_AGAIN_S, "the start of the call")
    pool = _pool(broker.status(operator))
    victim = next(worker["pid"] for worker in pool["workers"] if worker["in_flight"])
    wanted = pool["min"]
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    stage.show(f"kill -9 {victim}, which runs demo.nap; the pool has {wanted} workers")
    with _refused(WorkerLost) as caught:
        future.result(timeout=WHOLE_AGAIN_S)
    told_s = time.monotonic() - began
    stage.show(f"its caller got, after {told_s * 1000:.0f} ms: {_told(caught)}")

    def whole() -> bool:
        workers = _pool(broker.status(operator))
        return workers["ready"] >= wanted and all(worker["pid"] != victim for worker in workers["workers"])

    wait_until(whole, WHOLE_AGAIN_S, "the restart of the worker")
    whole_s = time.monotonic() - began
    certificate = caught[0].details.get("certificate", {})
    _expect(certificate.get("pid") == victim and certificate.get("signal") == "SIGKILL", certificate)
    step.facts = {"pid": victim, "told_s": told_s, "whole_again_s": whole_s, "code": caught[0].code}
    step.figure = f"{caught[0].code} in {told_s * 1000:.0f} ms, whole in {whole_s * 1000:.0f} ms"
    step.finding = f"the pool was whole again {whole_s * 1000:.0f} ms after the kill"


def _pool(report: dict[str, Any]) -> dict[str, Any]:
    pool: dict[str, Any] = next(pool for pool in report["pools"] if pool["name"] == "demo")
    return pool


def _expect(truth: bool, seen: object) -> None:
    if not truth:
        raise Failed(f"unexpected: {str(seen)[:300]}")
