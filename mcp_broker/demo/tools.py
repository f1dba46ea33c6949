"""The one tool that only the demo needs: something slow enough to be killed in the middle."""

from __future__ import annotations

import time
from pathlib import Path

from mcp_broker.worker import tool


@tool(name="demo.nap", version="1.0.0", timeout_s=60)
def nap(seconds: float, marker: str) -> str:
    """Sleep, after writing the file `marker` to show that the call has started."""
    Path(marker).touch()
    time.sleep(seconds)
    return "slept undisturbed"
