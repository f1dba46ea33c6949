"""The demo: a broker of its own in a temporary directory, real tools on real data, and a worker that is killed.

It leaves nothing behind, and says so only after it has looked.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any

_SIGNAL_BASE = 128


def run(*, to_stderr: bool = False, debug: bool = False) -> dict[str, Any]:
    """Run the demo and return what came of it: ``ok``, ``seconds`` and a list of ``steps``.

    Args:
        to_stderr: show it on standard error, so that standard output is free for the result as JSON.
        debug: show the traceback of a step that failed.
    """
    from mcp_broker.demo.broker import DemoBroker  # noqa: PLC0415 (--help must not load rich or ZeroMQ)
    from mcp_broker.demo.stage import Failed, Stage  # noqa: PLC0415
    from mcp_broker.demo.steps import play  # noqa: PLC0415

    began = time.monotonic()
    stage = Stage(to_stderr=to_stderr, debug=debug)
    folder = Path(tempfile.mkdtemp(prefix="mcp-broker-demo-"))
    # whoever ends us by SIGTERM wants the same order as by Ctrl-C
    previous = signal.signal(signal.SIGTERM, _leave)
    try:
        with resources.as_file(resources.files("mcp_broker") / "demo_data") as data:
            broker = DemoBroker(folder, data)
            try:
                play(stage, broker)
            finally:
                with stage.step("Stop, and look for leftovers") as step:
                    try:
                        took = broker.stop()
                        left = broker.leftovers()
                    finally:
                        shutil.rmtree(folder, ignore_errors=True)
                    if left or folder.exists():
                        raise Failed(f"left behind: processes {left}, folder {folder}")
                    step.figure = f"all gone after {took:.1f} s"
                    step.finding = f"all processes gone {took:.1f} s after SIGTERM, no file left"
                    step.facts = {"stop_s": took}
    finally:
        signal.signal(signal.SIGTERM, previous)
    seconds = time.monotonic() - began
    ok = stage.summary(seconds)
    steps = [
        {"title": step.title, "ok": step.ok, "finding": step.finding, "seconds": step.seconds, **step.facts}
        for step in stage.steps
    ]
    return {"ok": ok, "seconds": seconds, "steps": steps}


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(_SIGNAL_BASE + number)
