"""A child process that answers one JSON line with another; it ends with its standard input."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
ANSWER_S: Final = 60.0


class Peer:
    """A child, started as ``python -m MODULE ROLE``, whose first line says that it is ready.

    Args:
        setup: what it needs to know, its first line of input.

    Raises:
        RuntimeError: it ended, or does not answer within :data:`ANSWER_S`.
    """

    def __init__(self, module: str, role: str, setup: Mapping[str, Any] | None = None) -> None:
        self._name = f"{module} {role}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            # the same interpreter settings for all, whatever the shell has
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.pid = self._process.pid
        self.ready = self.ask(dict(setup or {}))

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Send a line and wait for the answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(question).encode() + b"\n")
        stdin.flush()
        if not select.select([stdout], [], [], ANSWER_S)[0]:
            raise RuntimeError(f"{self._name} does not answer")
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it: by its standard input first, by force after 5 s."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def read() -> dict[str, Any] | None:
    """In the child: the parent's next line, or None at its end."""
    line = sys.stdin.readline()
    if not line:
        return None
    question: dict[str, Any] = json.loads(line)
    return question


def answer(value: Mapping[str, Any]) -> None:
    """In the child: answer the parent."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def serve(run: Callable[..., dict[str, Any]]) -> None:
    """In the child: answer each question by calling ``run`` with its keys, to the end of the input."""
    while (question := read()) is not None:
        answer(run(**question))


def percentile_us(seconds: list[float], share: float) -> float:
    """Return a percentile of durations, in µs."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1e6 if ordered else 0.0
