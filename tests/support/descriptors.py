"""A process that holds more descriptors than select() can name."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

import pytest

#: select() takes none from here on
BEYOND_SELECT = 1024


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold so many that the next one is beyond."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < BEYOND_SELECT + 200:
        pytest.skip(f"this machine lets a process hold {before[1]} descriptors only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (BEYOND_SELECT + 200, before[1]))
    own: list[int] = []
    try:
        while not own or own[-1] < BEYOND_SELECT:
            own.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        yield
    finally:
        for fd in own:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
