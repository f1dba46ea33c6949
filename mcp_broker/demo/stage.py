"""How the demo shows itself: a line when a step begins, its findings, and a summary of one screen."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table


@dataclass(slots=True)
class Step:
    """One step and what came of it."""

    title: str
    ok: bool = False
    finding: str = ""
    #: the finding in a few words, for the summary
    figure: str = ""
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


class Failed(Exception):  # noqa: N818 (an outcome, named as one)
    """A step did not show what it should; the message says what it showed instead."""


class Stage:
    """Prints the steps; a spinner where a person looks on, plain lines elsewhere."""

    def __init__(self, *, to_stderr: bool = False, debug: bool = False) -> None:
        self.console = Console(file=sys.stderr if to_stderr else sys.stdout, highlight=False, soft_wrap=True)
        self.steps: list[Step] = []
        self._debug = debug

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Run a step; whatever it raises is shown as its failure, and the demo goes on."""
        step = Step(title)
        self.steps.append(step)
        self.console.print(f"[bold cyan]▸[/] [bold]{escape(title)}[/]")
        began = time.monotonic()
        try:
            with self._spinner(title):
                yield step
            step.ok = True
        except Exception as error:  # noqa: BLE001 (one failed step is shown, and the others still run)
            step.finding = _words(error)
            if self._debug:
                self.console.print_exception()
        step.seconds = time.monotonic() - began
        self.say(
            f"[red]failed:[/] {escape(step.finding)}"
            if not step.ok
            else f"[green]✓[/] {escape(step.finding)}"
        )

    def _spinner(self, title: str) -> contextlib.AbstractContextManager[object]:
        return self.console.status(escape(title)) if self.console.is_terminal else contextlib.nullcontext()

    def say(self, text: str) -> None:
        """Print one line of a step; ``text`` is markup."""
        self.console.print(f"  {text}")

    def show(self, text: str) -> None:
        """Print one line of a step as it is."""
        self.say(escape(text))

    def rows(self, head: list[str], rows: list[list[object]]) -> None:
        """Print a small table."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in head:
            table.add_column(column)
        for row in rows:
            table.add_row(*(escape(str(cell)) for cell in row))
        self.console.print(_indented(table))

    def summary(self, seconds: float) -> bool:
        """Print what came of it all; True when every step went as it should."""
        ok = bool(self.steps) and all(step.ok for step in self.steps)
        table = Table(box=None, pad_edge=False, show_header=False)
        for width in (len("FAILED"), None, None):
            table.add_column(no_wrap=True, min_width=width)
        for step in self.steps:
            mark = "[green]ok[/]" if step.ok else "[red]FAILED[/]"
            table.add_row(mark, escape(step.title), escape(step.figure if step.ok else "see above"))
        self.console.rule("Summary")
        self.console.print(table)
        failed = sum(not step.ok for step in self.steps)
        word = "everything went as it should" if ok else f"{failed} of {len(self.steps)} steps failed"
        self.console.print(f"[bold {'green' if ok else 'red'}]{word}[/], in {seconds:.1f} s")
        return ok


def _indented(table: Table) -> object:
    return Padding(table, (0, 0, 0, 2))


def _words(error: BaseException) -> str:
    code = getattr(error, "code", "")
    text = str(error) or type(error).__name__
    if isinstance(error, Failed):
        return text
    return f"{code}: {text}" if code else f"{type(error).__name__}: {text}"
