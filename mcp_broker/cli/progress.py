"""A call's progress for the person who waits: a bar on standard error, where that is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcp_broker.client.progress import OnProgress


@contextlib.contextmanager
def bar(title: str, *, among_lines: bool = False) -> Iterator[OnProgress | None]:
    """Yield what shows progress, or None where nobody would see it; the bar appears with the first news, and goes.

    Args:
        among_lines: lines go to standard output meanwhile: on the same terminal they and the bar would mix.
    """
    if not sys.stderr.isatty() or (among_lines and sys.stdout.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    shown = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[message]}"),
        console=Console(stderr=True),
        transient=True,
    )
    task: Any = None

    def show(fraction: float | None, message: str) -> None:
        nonlocal task
        if task is None:
            task = shown.add_task(title, total=None, message="")
            shown.start()
        # a bar without a total moves to and fro: nobody knows how far it is
        shown.update(
            task, total=None if fraction is None else 1.0, completed=fraction or 0.0, message=message
        )

    try:
        yield show
    finally:
        if task is not None:
            shown.stop()
