"""Reclaim records of a state directory, newest first; a file of JSON lines, oldest first."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from pathlib import Path

from mcp_broker import limits
from mcp_broker.supervisor.reclaim.folders import printable
from mcp_broker.supervisor.records import append, write_atomically
from mcp_broker.wire import codec
from mcp_broker.wire.reclaims import Reclaim, Taken


class Reclaims:
    """Recent reclaim records.

    Args:
        state_dir: holds ``reclaims.jsonl``.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "reclaims.jsonl"
        self._recent: deque[Reclaim] = deque(maxlen=limits.RECLAIMS_MAX)
        self._lines = 0
        with contextlib.suppress(OSError):
            data = self._path.read_bytes()
            for line in data.splitlines():
                self._lines += 1
                record = _record(line)
                if record is not None:
                    self._recent.appendleft(record)
            if data and not data.endswith(b"\n"):
                # torn by a crash: the next line must not continue it
                self._rewrite()

    @property
    def recent(self) -> tuple[Reclaim, ...]:
        """The records kept, newest first."""
        return tuple(self._recent)

    def add(self, record: Reclaim) -> None:
        """Keep one more; the file is written anew when it holds twice what is kept."""
        self._recent.appendleft(record)
        if self._lines >= 2 * limits.RECLAIMS_MAX:
            with contextlib.suppress(OSError):
                self._rewrite()
            return
        # without room for it on the disk it is known for as long as we live
        with contextlib.suppress(OSError):
            append(self._path, _line(record))
            self._lines += 1

    def _rewrite(self) -> None:
        write_atomically(self._path, b"".join(map(_line, reversed(self._recent))))
        self._lines = len(self._recent)


def _line(record: Reclaim) -> bytes:
    return json.dumps(codec.as_plain(record)).encode() + b"\n"


def _record(line: bytes) -> Reclaim | None:
    """Read one line; None when it is torn, or of a version that we do not read."""
    try:
        fields = json.loads(line)
        steps = tuple(
            Taken(**{**step, "left": tuple(map(printable, step["left"]))}) for step in fields.pop("steps")
        )
        return Reclaim(steps=steps, **fields)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
