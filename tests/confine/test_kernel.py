"""The death signal that all our processes ask for: they end with whoever started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

ASK = "import os\nfrom mcp_broker.confine import kernel\nkernel.die_with_parent({})\nprint('it lives', flush=True)\n"


def said(parent: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(parent)], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout


def test_whose_parent_has_ended_before_the_kernel_knew_ends_at_once() -> None:
    assert said("os.getppid() + 1") == ""
    assert said("os.getppid()") == "it lives\n"


def test_it_ends_with_its_parent() -> None:
    child = ASK.format("os.getppid()") + "import signal\nsignal.pause()\n"
    between = "\n".join(
        (
            "import subprocess, sys",
            f"started = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)",
            "assert started.stdout.readline() == b'it lives\\n'",
            "print(started.pid, flush=True)",
            "started.wait()",
        )
    )
    parent = subprocess.Popen([sys.executable, "-c", between], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    try:
        parent.kill()
        # both have it open: its end is the end of both
        parent.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        os.kill(pid, signal.SIGKILL)
        raise
