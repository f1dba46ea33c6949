"""The last steps of a worker and of its forks, which must come to an end with the right code."""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import signal
import sys
from typing import NoReturn

import pytest

from mcp_broker.worker import ending, forks, process, zygote


class Left(BaseException):
    """The process has ended."""


class BrokenStream:
    """What a module may have put into the place of a standard stream."""

    def write(self, _text: str) -> NoReturn:
        raise LookupError

    def flush(self) -> NoReturn:
        sys.exit(5)


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the codes with which the process would have ended."""
    codes: list[int] = []

    def leave(code: int) -> NoReturn:
        codes.append(code)
        raise Left

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(ending, "bound", lambda _: None)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: None)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    return codes


@pytest.fixture(params=["none", "broken"])
def _streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None if request.param == "none" else BrokenStream())


@pytest.mark.usefixtures("_streams")
@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (ValueError("no"), 1), (SystemExit(3), 3), (SystemExit("said"), 1)],
    ids=str,
)
def test_a_fork_ends_with_its_code_though_it_cannot_write(
    codes: list[int], error: BaseException | None, code: int
) -> None:
    with pytest.raises(Left):
        forks.leave(error)
    assert codes == [code]


@pytest.mark.usefixtures("_streams")
@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (ValueError("no"), 1), (SystemExit(4), 4), (SystemExit("said"), 1)],
    ids=str,
)
def test_a_worker_ends_with_its_code_though_it_cannot_write(
    codes: list[int], monkeypatch: pytest.MonkeyPatch, error: BaseException | None, code: int
) -> None:
    def main(_boot_fd: int, _tether_fd: int) -> int:
        if error is not None:
            raise error
        return 0

    monkeypatch.setattr(process, "main", main)
    with pytest.raises(Left):
        process.run(3, 4)
    assert codes == [code]


def test_a_worker_that_fails_before_it_is_one_does_not_seem_to_have_ended_well(
    codes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Orders:
        def detach(self) -> None:
            """Give the descriptor away."""

    def become(*_: object) -> NoReturn:
        raise LookupError("not even a traceback could be written")

    monkeypatch.setattr(os, "fork", lambda: 0)
    nothing: object = None
    with pytest.raises(Left):
        zygote._fork_again(Orders(), nothing, [], -1, become)  # type: ignore[arg-type]
    assert codes == [1]


def test_where_no_thread_is_to_be_had_the_kernel_bounds_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("unable to start watchdog thread")

    monkeypatch.setattr(ending, "_is_bound", False)
    monkeypatch.setattr(faulthandler, "dump_traceback_later", refuse)
    handler = signal.getsignal(signal.SIGALRM)
    try:
        ending.bound(1000)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        ending.bound(2000)
        assert signal.getitimer(signal.ITIMER_REAL)[0] <= 1000, "the first one counts"
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
