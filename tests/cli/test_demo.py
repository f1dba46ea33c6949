from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from rich.console import Console

from mcp_broker.demo import stage as stages
from mcp_broker.demo.broker import CONFIG
from mcp_broker.errors import Forbidden

DATA = resources.files("mcp_broker") / "demo_data"


def quiet_stage() -> tuple[stages.Stage, io.StringIO]:
    stage, shown = stages.Stage(), io.StringIO()
    stage.console = Console(file=shown, width=80)
    return stage, shown


def fail(stage: stages.Stage, error: Exception) -> None:
    with stage.step("bad"):
        raise error


def test_failed_step_is_shown_and_fails_the_summary() -> None:
    stage, shown = quiet_stage()
    with stage.step("good") as step:
        step.finding = "[3] found"
    assert stage.summary(1.0)
    fail(stage, Forbidden("not yours"))
    assert not stage.summary(2.0)
    assert [step.ok for step in stage.steps] == [True, False]
    assert stage.steps[1].finding == "FORBIDDEN: not yours"
    assert "1 of 2 steps failed" in shown.getvalue()
    assert "[3] found" in shown.getvalue()


def test_demo_without_a_step_is_no_success() -> None:
    assert not quiet_stage()[0].summary(0.0)


def test_summary_fits_a_screen() -> None:
    stage, shown = quiet_stage()
    for number in range(12):
        with stage.step(f"step {number}"):
            pass
    before = len(shown.getvalue().splitlines())
    stage.summary(1.0)
    assert len(shown.getvalue().splitlines()) - before <= 24


def test_configuration_of_the_demo_loads(tmp_path: Path) -> None:
    from mcp_broker import config

    loaded = config.parse(CONFIG.format(data=json.dumps(str(tmp_path / 'a "quoted" folder'))))
    assert set(loaded.pools) == {"echo", "text", "sql", "sequence", "demo"}


def test_data_are_what_their_readme_says() -> None:
    rows = list(csv.DictReader(io.StringIO((DATA / "penguins.csv").read_text(encoding="utf-8"))))
    assert len(rows) == 344
    assert {row["species"] for row in rows} == {"Adelie", "Chinstrap", "Gentoo"}
    heads = [
        line for line in (DATA / "opuntia.fasta").read_text(encoding="ascii").splitlines() if line[:1] == ">"
    ]
    assert len(heads) == 7
    assert all("Opuntia" in head for head in heads)
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for entry in DATA.iterdir():
        assert entry.name == "README.md" or f"`{entry.name}`" in readme


@pytest.mark.process
@pytest.mark.slow
def test_demo_shows_everything_and_leaves_nothing(tmp_path: Path) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MCP_BROKER_")}
    done = subprocess.run(
        [sys.executable, "-m", "mcp_broker", "demo", "--json"],
        env={**kept, "TMPDIR": str(tmp_path), "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["ok"]
    assert all(step["ok"] for step in summary["steps"])
    for word in ("FORBIDDEN", "INVALID_ARGUMENT", "WORKER_LOST", "calls/s"):
        assert word in done.stderr
    assert list(tmp_path.iterdir()) == []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                assert str(tmp_path).encode() not in (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it ended while we looked
