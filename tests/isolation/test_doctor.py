"""The doctor's table: each primitive tried, and which levels follow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mcp_broker.supervisor.isolation import plan, survey
from tests.support.ordinary import ROOT

pytestmark = [pytest.mark.process, pytest.mark.slow]

LACKING = Path(ROOT) / "tests" / "support" / "lacking.py"


def doctor(state: Path, *words: str, lacks: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    prefix = (sys.executable, str(LACKING), *lacks, "--") if lacks else ()
    command = (*prefix, sys.executable, "-m", "mcp_broker", "doctor", "--state-dir", str(state), *words)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def isolation(done: subprocess.CompletedProcess[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    told = json.loads(done.stdout)["isolation"]
    return tuple({one["name"]: one for one in told[part]} for part in ("primitives", "levels"))  # type: ignore[return-value]


def test_every_primitive_is_tried_and_says_what_it_is_for(tmp_path: Path) -> None:
    primitives, levels = isolation(doctor(tmp_path / "state", "--json"))
    assert set(primitives) == set(survey.PURPOSES) >= set(plan.SANDBOXED)
    assert all(one["ms"] > 0 and one["purpose"] for one in primitives.values())
    assert list(levels) == ["process", "restricted", "sandboxed"]
    assert levels["process"]["is_there"]


def test_what_does_not_work_is_told_with_its_errno_and_with_what_cannot_be_had(tmp_path: Path) -> None:
    lacks = ("landlock=EOPNOTSUPP",)
    primitives, levels = isolation(doctor(tmp_path / "state", "--json", lacks=lacks))
    assert (primitives["landlock"]["works"], primitives["landlock"]["errno"]) == (False, 95)
    assert primitives["seccomp"]["works"]
    assert levels["process"]["is_there"]
    for name in ("restricted", "sandboxed"):
        assert levels[name]["reason"].startswith(f"isolation level {name} cannot be had here: landlock: ")
    done = doctor(tmp_path / "state", lacks=lacks)
    assert done.returncode == 0, "a level that nobody demands is no fault"
    words = " ".join(done.stdout.split())
    assert "no landlock " in words
    assert "landlock_create_ruleset: EOPNOTSUPP (Operation not supported)" in words
    assert "level restricted no: isolation level restricted cannot be had here: landlock" in words
    assert "level process can be had" in words
