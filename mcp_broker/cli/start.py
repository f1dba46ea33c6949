"""``mcp-broker start``: the supervisor in the foreground, and what its user needs to know, as it happens."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Final

import click

from mcp_broker import logs
from mcp_broker.auth.places import STATE_DIR_VARIABLE, profile_in
from mcp_broker.cli import output, settings

if TYPE_CHECKING:
    from pathlib import Path

    from mcp_broker.config import Config
    from mcp_broker.supervisor import events

#: a call that works wherever the shipped tools are served
_EXAMPLES: Final = {
    "text.word_count": 'call text.word_count \'{"text": "a b a"}\'',
    "echo.echo": 'call echo.echo \'{"value": "hello"}\'',
}


@click.command(
    short_help="Serve tools until Ctrl-C.",
    epilog="""\b
Examples:
  mcp-broker start
  mcp-broker start --config broker.toml --state-dir ./state""",
)
@click.option(
    "--config", "config_file", metavar="FILE", help="Configuration, TOML; without it the shipped tools."
)
@settings.shared("state-dir")
def start(config_file: str | None) -> int:
    """Start a broker and its workers in the foreground.

    The first Ctrl-C lets running calls finish (10 s unless configured), a second one ends at once. Keys, ports and a
    profile for you are made at the first start and kept in the state directory.
    """
    from mcp_broker import config
    from mcp_broker.confine import rlimits
    from mcp_broker.supervisor import Supervisor

    chosen = settings.current()
    configuration = config.load(config_file)
    state_dir = _state_dir(chosen, configuration)
    announcer = Announcer(chosen, list(configuration.pools), config.skipped_pools(configuration))
    logs.configure(configuration.observe.log_format, announces=True)
    supervisor = Supervisor(
        configuration, state_dir, on_event=announcer.tell, reread=lambda: config.load(config_file)
    )
    rlimits.raise_files()
    return supervisor.run()


def _state_dir(chosen: settings.Settings, configuration: Config) -> Path:
    """Command line, environment, configuration, platform: the first that says."""
    named = configuration.state.dir
    if named and not chosen.state_dir_given and not os.environ.get(STATE_DIR_VARIABLE):
        chosen.state_dir_given = named
    return chosen.state_dir


class Announcer:
    """Turns the supervisor's events into lines.

    Args:
        chosen: for the commands to copy.
        pools: the names of all pools; when each is ready or has failed, the next steps are printed.
        skipped: shipped pools that are not served, since their packages are missing.
    """

    def __init__(self, chosen: settings.Settings, pools: list[str], skipped: tuple[str, ...] = ()) -> None:
        self._chosen = chosen
        self._skipped = skipped
        self._waiting = set(pools)
        self._began = time.monotonic()
        self._serving = False
        self._told_next_steps = False
        self._tools: set[str] = set()
        self._failed: set[str] = set()
        self._last_cause: dict[str, str] = {}

    def tell(self, event: events.Event) -> None:
        """Print one event; called by the supervisor, in order, which a closed pipe must not end."""
        with contextlib.suppress(OSError):
            self._tell(event)

    def _tell(self, event: events.Event) -> None:
        from mcp_broker.supervisor import events

        match event:
            case events.Serving():
                self._tell_serving(event)
            case events.PoolReady():
                self._tell_pool(event.pool, f"{_workers(event.workers)}: {', '.join(sorted(event.tools))}")
                self._tools |= set(event.tools)
                self._failed.discard(event.pool)
                self._settled(event.pool)
            case events.PoolFailed():
                known = event.reason == self._last_cause.get(event.pool)
                self._tell_pool(event.pool, f"failed: {'see above' if known else _one_line(event.reason)}")
                self._failed.add(event.pool)
                self._settled(event.pool)
            case events.WorkerDied():
                died = event.certificate
                self._last_cause[died.pool] = died.cause
                self._log(f"worker {died.worker_id} (pid {died.pid}) died: {_one_line(died.cause)}")
            case events.BrokerDied():
                self._log(
                    f"the broker (pid {event.pid}) died: {_one_line(event.reason)}; it is started again"
                )
            case events.Reloaded():
                self._log(f"reloaded: {event.changes}")
            case events.ReloadFailed():
                self._log(f"not reloaded, the configuration before stays: {_one_line(event.reason)}")
            case events.Draining():
                self._log(
                    f"stopping; running calls have {output.duration(event.drain_s)}, Ctrl-C again ends at once"
                )
            case events.Stopped():
                self._log("stopped")

    def _log(self, text: str) -> None:
        output.line(f"{time.strftime('%H:%M:%S')} {text}")

    def _tell_serving(self, event: events.Serving) -> None:
        if self._serving:
            self._log(f"the broker is back, pid {event.broker_pid}")
            return
        self._serving = True
        from mcp_broker import __version__

        output.line(
            f"mcp-broker {__version__} serves after {self._elapsed()} "
            f"(pid {event.pid}, broker {event.broker_pid})"
        )
        output.line(f"  clients      {event.client_endpoint}")
        output.line(f"  workers      {event.worker_endpoint}")
        output.line(f"  credentials  {profile_in(self._chosen.state_dir)}")
        output.line(f"  pools        {', '.join(sorted(event.pools)) or 'none'}")
        if self._skipped:
            output.line(f"  not served   {', '.join(self._skipped)}: pip install 'mcp-broker[tools]'")
        if not self._waiting:
            self._tell_next_steps()

    def _tell_pool(self, pool: str, text: str) -> None:
        if self._told_next_steps:
            self._log(f"pool {pool}: {text}")
        else:
            output.line(f"  {pool:<12} {text}")

    def _settled(self, pool: str) -> None:
        self._waiting.discard(pool)
        if not self._waiting and not self._told_next_steps:
            self._tell_next_steps()

    def _tell_next_steps(self) -> None:
        self._told_next_steps = True
        word = "all pools are ready"
        if self._failed:
            others = ", the others are ready" if self._tools else ", and no pool is ready"
            word = f"{len(self._failed)} failed{others}"
        output.line(f"{word} after {self._elapsed()}. Next, in another shell:")
        output.line()
        example = next((text for name, text in _EXAMPLES.items() if name in self._tools), None)
        if example is None and self._tools:
            example = f"tools {min(self._tools)}"
        mend = ("reload",) if self._failed else ()
        for command in (*mend, "tools", example, "status", "why", "stop"):
            if command:
                output.line(f"  {self._chosen.again(command)}")
        output.line()
        output.line("Ctrl-C here ends it too.")

    def _elapsed(self) -> str:
        return output.duration(time.monotonic() - self._began)


def _workers(count: int) -> str:
    return f"{count} worker{'' if count == 1 else 's'} ready"


def _one_line(text: str) -> str:
    return " ".join(text.split())
