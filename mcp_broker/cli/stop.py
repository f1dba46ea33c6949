"""``mcp-broker stop``: end a broker in order, and stay until it is gone."""

from __future__ import annotations

import os
import select
import signal
import time
from typing import Final

import click

from mcp_broker import limits
from mcp_broker.cli import output, settings
from mcp_broker.errors import SupervisionError

#: beyond the drain time: killing and reaping what did not drain
_MARGIN_S: Final = 5.0
_PROGRESS_S: Final = 2.0


@click.command(
    short_help="End a running broker in order.",
    epilog="""\b
Examples:
  mcp-broker stop
  mcp-broker stop --drain 2
  mcp-broker stop --state-dir /srv/broker --timeout 60""",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=limits.DRAIN_S + _MARGIN_S,
    show_default=True,
    metavar="SECONDS",
    help="Wait this long for it to end.",
)
@click.option(
    "--drain",
    "drain_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="End calls that still run after this long, if the configuration gives them more.",
)
@settings.shared("json", "state-dir")
def stop(timeout_s: float, drain_s: float | None) -> None:
    """Tell the broker of the state directory to drain and end, and wait for it.

    Running calls may finish, up to the drain time of its configuration.
    """
    from mcp_broker.supervisor.lock import holder

    chosen = settings.current()
    pid = holder(chosen.state_dir)
    pidfd = _opened(pid) if pid is not None else None
    if pid is None or pidfd is None:
        _say(chosen, None, f"nothing runs in {chosen.state_dir}")
        return
    began = time.monotonic()
    try:
        # the pidfd is of the process that held the lock just now: a recycled pid is not hit
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if drain_s is not None and not _is_gone(pidfd, drain_s):
            # told again, it ends at once
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        _wait(pid, pidfd, began + timeout_s, chosen)
    except PermissionError:
        raise SupervisionError(
            f"the broker (pid {pid}) belongs to another user",
            {"hint": f"stop it as its user: kill -TERM {pid}"},
        ) from None
    finally:
        os.close(pidfd)
    _say(chosen, pid, f"stopped pid {pid} after {output.duration(time.monotonic() - began)}")


def _opened(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None  # it ended just now


def _say(chosen: settings.Settings, pid: int | None, text: str) -> None:
    if chosen.as_json:
        output.document({"stopped": pid is not None, "pid": pid})
    else:
        output.note(text)


def _is_gone(pidfd: int, within_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(within_s * 1000))


def _wait(pid: int, pidfd: int, deadline: float, chosen: settings.Settings) -> None:
    """Wait until the process is gone, with a word now and then.

    Raises:
        SupervisionError: it still runs at the deadline (a call that does not end, or a fault of ours).
    """
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise SupervisionError(
                f"pid {pid} did not end in time; it may still be draining",
                {
                    "hint": f"{chosen.again('stop --timeout 60')} waits longer; "
                    f"{chosen.again('stop --drain 0')} ends it at once"
                },
            )
        if poll.poll(min(left, _PROGRESS_S) * 1000):
            return
        output.note(f"waiting for pid {pid} to finish its calls, {left:.0f} s left …")
