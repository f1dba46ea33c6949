"""A client that answers from a script, and a way to run a command line in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

WORD_COUNT: dict[str, Any] = {
    "name": "text.word_count",
    "version": "1.0.0",
    "description": "Count the words of a text.\n\nCase does not count.",
    "parameters": {
        "type": "object",
        "properties": {"text": {"type": "string"}, "top": {"type": "integer", "default": 10}},
        "required": ["text"],
    },
    "returns": {"type": "object"},
    "capabilities": ["text"],
    "tags": ["example"],
    "timeout_s": 5.0,
    "idempotent": True,
    "pool": "text",
    "state": "ready",
}
ADD: dict[str, Any] = {
    "name": "add",
    "version": "1.0.0",
    "description": "Add.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
    "returns": {"type": "integer"},
    "capabilities": ["math"],
    "pool": "math",
    "state": "ready",
}

Answer = Callable[[str, dict[str, Any]], Any]


class Result(NamedTuple):
    """What a command line did."""

    code: int
    out: str
    err: str


@dataclass
class FakeClient:
    """Records calls; ``answer`` gives their results or raises."""

    answer: Answer = lambda _tool, arguments: arguments
    definitions: list[dict[str, Any]] = field(default_factory=lambda: [WORD_COUNT, ADD])
    calls: list[tuple[str, dict[str, Any], float | None]] = field(default_factory=list)
    priorities: list[int] = field(default_factory=list)
    tools_asked: int = 0
    future: Future[Any] | None = None

    def call(self, tool: str, arguments: dict[str, Any], /, timeout_s: float | None = None) -> Any:
        self.calls.append((tool, arguments, timeout_s))
        return self.answer(tool, arguments)

    def submit(
        self,
        tool: str,
        arguments: dict[str, Any],
        /,
        *,
        timeout_s: float | None,
        on_progress: Any = None,
        priority: int = 1,
    ) -> Future[Any]:
        self.priorities.append(priority)
        if on_progress is not None:
            on_progress(None, "begins")
            on_progress(0.5, "half way")
        if self.future is not None:
            self.calls.append((tool, arguments, timeout_s))
            return self.future
        future: Future[Any] = Future()
        try:
            future.set_result(self.call(tool, arguments, timeout_s))
        except Exception as error:  # noqa: BLE001 (whatever the script raises is the outcome)
            future.set_exception(error)
        return future

    def stream(
        self,
        tool: str,
        arguments: dict[str, Any],
        /,
        *,
        timeout_s: float | None,
        on_progress: Any = None,
        priority: int = 1,
    ) -> Iterator[Any]:
        self.priorities.append(priority)
        yield from self.call(tool, arguments, timeout_s)

    def tools(
        self, name: str | None = None, capability: str | None = None, tag: str | None = None
    ) -> list[Any]:
        self.tools_asked += 1
        return [
            dict(definition)
            for definition in self.definitions
            if name in {None, definition["name"]}
            and (capability is None or capability in definition["capabilities"])
            and (tag is None or tag in definition.get("tags", ()))
        ]


def status_report(**changes: Any) -> dict[str, Any]:
    """Return what `system.status` answers for two pools of two workers."""
    pools = [
        {
            "name": name,
            "state": "ready",
            "min": 2,
            "ready": 2,
            "reason": "",
            "restarts": 0,
            "tools": tools,
            "workers": [
                {
                    "id": f"{name}-{number}",
                    "pid": 4000 + number,
                    "state": "ready",
                    "in_flight": 0,
                    "served": 12,
                    "rss_mb": 41.3,
                    "cpu_s": 0.42,
                    "since_wall": 1.0,
                }
                for number in (1, 2)
            ],
        }
        for name, tools in (("text", ["text.diff", "text.word_count"]), ("echo", ["echo.echo"]))
    ]
    report: dict[str, Any] = {
        "version": "0.1.0",
        "state": "serving",
        "epoch": 1,
        "started_wall": time.time() - 192.0,
        "broker": {"pid": 4711},
        "supervisor": {"pid": 4710},
        "endpoints": {"clients": "tcp://127.0.0.1:40001", "workers": "tcp://127.0.0.1:40002"},
        "sessions": 1,
        "calls": {"accepted": 9, "in_flight": 0, "queued": 0, "succeeded": 8, "failed": {"TOOL_FAILED": 1}},
        "pools": pools,
        "deaths": [],
    }
    return {**report, **changes}


CERTIFICATE: dict[str, Any] = {
    "worker_id": "text-3",
    "pool": "text",
    "pid": 4242,
    "cause": "killed by SIGKILL",
    "kind": "signal",
    "exit_code": None,
    "signal": "SIGKILL",
    "started_seq": 7,
    "uptime_s": 12.5,
    "cpu_s": 0.3,
    "max_rss_kib": 42_000,
    "calls_started": 7,
    "stderr": "a word of warning\nlast words\n",
    "wall_at": 1_700_000_000.0,
}
