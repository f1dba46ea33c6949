"""What holds for all tests."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    # a shell starts what it puts into the background with SIGINT ignored, and children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
