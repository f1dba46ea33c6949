"""What a worker is doing, told to its supervisor by a handler that needs no interpreter."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.support.waiting import wait_for

if TYPE_CHECKING:
    from tests.worker.conftest import ScriptedBroker, Start

pytestmark = [pytest.mark.process]

STUCK = """
import re
from pathlib import Path

@tool(name="try.match")
def match(mark: str) -> None:
    Path(mark).touch()
    re.match(r"(a+)+$", "a" * 60 + "b")
"""


def test_the_stack_of_a_call_whose_c_code_holds_the_interpreter_can_be_read(
    start: Start, broker: ScriptedBroker
) -> None:
    worker = start(STUCK)
    broker.welcome()
    mark = worker.scratch / "mark"
    wait_for(lambda: worker.marks.is_resting)
    broker.give(broker.dispatch("try.match", {"mark": str(mark)}))
    wait_for(mark.exists)
    assert not worker.marks.is_resting
    worker.page.clear()
    os.kill(worker.pid, signal.SIGUSR2)
    wait_for(lambda: "in main" in worker.page.stack())
    assert "tried_tools.py" in worker.page.stack()
    assert "in match" in worker.page.stack()
    worker.page.clear()
    assert worker.page.stack() == ""


def test_a_worker_that_was_asked_for_its_stack_goes_on(start: Start, broker: ScriptedBroker) -> None:
    worker = start('@tool(name="try.add")\ndef add(left: int) -> int:\n    return left + 1\n')
    broker.welcome()
    for _ in range(3):
        os.kill(worker.pid, signal.SIGUSR2)
    assert broker.call("try.add", {"left": 1}).code == "OK"
