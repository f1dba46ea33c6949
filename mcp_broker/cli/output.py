"""What commands print: JSON, tables of plain text, durations, and colour only where a person looks."""

from __future__ import annotations

import base64
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

import click

_MINUTE: Final = 60
_HOUR: Final = 3600
_DAY: Final = 86_400
_KIB: Final = 1024


def plain(value: Any) -> Any:  # noqa: ANN401 (any payload)
    """Turn a payload into what JSON can hold: bytes as base64, keys as text, NaN and infinities as text."""
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def dumps(value: Any, *, pretty: bool) -> str:  # noqa: ANN401 (any payload)
    """Return one JSON document as text."""
    return json.dumps(plain(value), ensure_ascii=False, indent=2 if pretty else None)


def is_terminal() -> bool:
    """Tell whether a person reads standard output."""
    return sys.stdout.isatty()


def colour_wanted() -> bool:
    """Colour only on a terminal, and never against NO_COLOR or a dumb terminal."""
    return is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def document(value: Any) -> None:  # noqa: ANN401 (any payload)
    """Print one JSON document: indented for a person, on one line for a pipe."""
    line(dumps(value, pretty=is_terminal()))


def result(value: Any) -> None:  # noqa: ANN401 (any payload)
    """Print a tool's result for people and pipes alike: JSON, coloured only on a terminal."""
    if colour_wanted() and isinstance(value, dict | list | tuple):
        from rich.console import Console

        Console(highlight=False).print_json(dumps(value, pretty=False), ensure_ascii=False)
        return
    document(value)


def line(text: str = "") -> None:
    """Print one line and let it out at once: a pipe is read while we still run."""
    click.echo(text)


def note(text: str) -> None:
    """Print a message for people, which is never a result."""
    click.echo(text, err=True)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, width: int = 0) -> list[str]:
    """Lay out rows in columns, two blanks apart; numbers to the right, the last column cut at ``width``."""
    cells = [[str(cell) for cell in row] for row in rows]
    lines = [list(head), *cells]
    widths = [max(len(row[column]) for row in lines) for column in range(len(head))]
    right = [
        bool(cells) and all(_is_number(row[column]) for row in cells) and any(row[column] for row in cells)
        for column in range(len(head))
    ]
    laid = []
    for row in lines:
        text = "  ".join(
            cell.rjust(widths[column]) if right[column] else cell.ljust(widths[column])
            for column, cell in enumerate(row)
        ).rstrip()
        laid.append(cut(text, width) if width else text)
    return laid


def _is_number(cell: str) -> bool:
    return cell in {"", "-"} or cell.replace(".", "", 1).isdigit()


def cut(text: str, width: int) -> str:
    """Shorten to ``width`` characters with an ellipsis."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def duration(seconds: float) -> str:
    """Return 0.3 s, 42 s, 3 min 12 s, 5 h 2 min or 3 d 4 h."""
    if seconds < 10:  # noqa: PLR2004 (below it, tenths matter)
        return f"{max(seconds, 0):.1f} s"
    whole = int(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"


def ago(wall: float) -> str:
    """Return how long ago a moment was (seconds since 1970)."""
    return f"{duration(time.time() - wall)} ago" if wall else "at an unknown time"


def mebibytes(kib: float) -> str:
    """Return KiB as MB for people, one decimal."""
    return f"{kib / _KIB:.1f}"
