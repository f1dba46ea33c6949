"""``python -m bench``: measure against zmq.proxy in the same run, print a table, write JSON and Markdown."""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
import zmq
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import kernel, ours, rounds
from bench.reference import Reference

_CASES: Final = [case.name for case in rounds.CASES]
_FIGURES: Final = [title for title, _ in rounds.FIGURES]
#: whom ours is measured against -> the style of :mod:`bench.reference`
REFERENCES: Final = {"reference": "calls", "bare": "bare"}
#: as wide as the table of figures is
_FILE_COLUMNS: Final = 120
COLUMNS: Final = ("case", "figure", "side", "median", "quartiles", "ratio", "quartiles", "to bare", "n")


def facts() -> dict[str, Any]:
    """Return what a reader needs to know about this run."""
    packages = ("mcp-broker", "pyzmq", "msgpack", "msgspec", "pydantic")
    versions = {"python": platform.python_version(), "libzmq": zmq.zmq_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions,
        "machine": {"cpu": kernel.cpu_model(), "cores": os.cpu_count(), "kernel": platform.release()},
    }


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def rows(summaries: Sequence[rounds.Summary]) -> list[tuple[str, ...]]:
    """Return the table's cells, one row a figure and side."""
    return [
        (
            one.case,
            one.figure,
            one.side,
            _number(one.value.median),
            f"{_number(one.value.low)} to {_number(one.value.high)}",
            f"{ratio.median:.2f}" if (ratio := one.ratios.get("reference")) else "",
            f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio else "",
            f"{bare.median:.2f}" if (bare := one.ratios.get("bare")) else "",
            str(one.pairs),
        )
        for one in sorted(summaries, key=lambda one: (_CASES.index(one.case), _FIGURES.index(one.figure)))
        if one.figure != "MiB/s" or "MiB" in one.case
    ]


def tables(cells: Sequence[Sequence[str]]) -> list[Table]:
    """Return one rich table a case."""
    result = []
    for case in dict.fromkeys(row[0] for row in cells):
        one = Table(title=case, title_justify="left", box=box.SIMPLE, pad_edge=False)
        for index, title in enumerate(COLUMNS[1:]):
            one.add_column(title, justify="left" if index < 2 else "right", no_wrap=True)
        last = ""
        for _, figure, *rest in (row for row in cells if row[0] == case):
            one.add_row("" if figure == last else figure, *rest)
            last = figure
        result.append(one)
    return result


def markdown(document: dict[str, Any], cells: Sequence[Sequence[str]]) -> str:
    """Return the run as the text of RESULTS.md."""
    about, setting = document["facts"], document["setting"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    machine = about["machine"]
    memory = "- without ours: the reference alone"
    if setting["rss_first"]:
        memory = f"- memory of our broker: {setting['rss_first']:.1f} MiB after the first round, "
        memory += f"{setting['rss_last']:.1f} MiB after the last"
    lines = [
        "# Results",
        "",
        "Written by `python -m bench --markdown bench/RESULTS.md`; not edited by hand. What was tried: [LOG.md](LOG.md).",
        "",
        f"- {about['date']}; {machine['cores']} cores of {machine['cpu']}, Linux {machine['kernel']}",
        f"- {versions}",
        f"- {setting['pairs']} adjacent pairs a case, {setting['seconds']} s a round, incompressible payloads",
        f"- {setting['dropped']} of {setting['rounds']} rounds dropped for over {rounds.STOLEN_MAX:.0%} stolen CPU",
        memory,
        "- reference: `zmq.proxy` (ROUTER, DEALER) with CURVE in its own process, between a plain pyzmq client that",
        "  numbers its calls and a plain pyzmq worker that calls a function, both with msgpack; bare: the same proxy,",
        "  the payload's bytes alone, nothing that could tell which answer is whose",
        "- CPU and RSS are those of the process in the middle, our broker or the proxy, where nothing else is said",
        "- ratio: ours over the reference's, pair by pair; its median and quartiles; to bare: over the bare proxy's",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(row) + " |" for row in cells),
    ]
    return "\n".join(lines) + "\n"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--pairs", type=click.IntRange(1), default=11, show_default=True, help="Adjacent pairs a case.")
@click.option(
    "--seconds", type=click.FloatRange(0.05), default=1.0, show_default=True, help="Length of a round."
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all rounds here."
)
@click.option(
    "--markdown", "markdown_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a report."
)
@click.option("--quick", is_flag=True, help="Three pairs of 0.3 s: does it run at all?")
@click.option("--reference-only", is_flag=True, help="Leave ours out.")
def main(
    *,
    pairs: int,
    seconds: float,
    json_file: Path | None,
    markdown_file: Path | None,
    quick: bool,
    reference_only: bool,
) -> None:
    """Measure calls per second, latency, broker CPU and memory against libzmq's own proxy."""
    if quick:
        pairs, seconds = 3, 0.3
    console, err = Console(), Console(stderr=True)
    if not console.is_terminal:
        # a figure that is cut off says nothing in a file
        console = Console(width=_FILE_COLUMNS)
    done: list[rounds.Round] = []
    with contextlib.ExitStack() as stack:
        sides = []
        for name, style in REFERENCES.items():
            other = Reference(style)
            stack.callback(other.close)
            sides.append(rounds.Side(name, other.run, other.broker_pid, other.client_pid, other.worker_pid))
        if not reference_only:
            broker = ours.Broker()
            stack.callback(broker.close)
            for name, client in (("sync", broker.sync), ("asyncio", broker.aio)):
                sides.append(
                    rounds.Side(name, _asker(client), broker.broker_pid, client.pid, broker.worker_pid)
                )
        total = pairs * len(rounds.CASES) * len(sides)
        with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
            task = progress.add_task("rounds", total=total)
            for one in rounds.run(sides, pairs, seconds):
                done.append(one)
                progress.update(task, advance=1, description=f"{one.case}: {one.side}")
    summaries = rounds.summarise(done, tuple(REFERENCES))
    mine = [one.broker_rss_mib for one in done if one.side not in REFERENCES]
    document = {
        "facts": facts(),
        "setting": {
            "pairs": pairs,
            "seconds": seconds,
            "rounds": len(done),
            "dropped": sum(one.stolen > rounds.STOLEN_MAX for one in done),
            "rss_first": mine[0] if mine else None,
            "rss_last": mine[-1] if mine else None,
        },
        "summary": rounds.as_plain(summaries),
        "rounds": rounds.as_plain(done),
    }
    cells = rows(summaries)
    console.print(*tables(cells), sep="\n")
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=1) + "\n")
    if markdown_file is not None:
        markdown_file.write_text(markdown(document, cells))


def _asker(client: Any) -> Any:  # noqa: ANN401
    return lambda **case: client.ask(case)


if __name__ == "__main__":
    main()
