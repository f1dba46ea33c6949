"""The worker process: what it inherits, what ends it, and its exit codes."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import importlib.metadata
import mmap
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from mcp_broker import confine, limits, logs
from mcp_broker.confine import kernel
from mcp_broker.core.metering import asked
from mcp_broker.errors import ConfigError, WireError
from mcp_broker.wire import codec
from mcp_broker.wire.marks import MARKS_BYTES, Marks
from mcp_broker.wire.tether import Asks, Go, Warm
from mcp_broker.worker import catalogue, ending, forks, sharing
from mcp_broker.worker.execution import Execution
from mcp_broker.worker.interrupts import Interrupts
from mcp_broker.worker.leases import Lender
from mcp_broker.worker.link import Link
from mcp_broker.worker.session import Session
from mcp_broker.worker.tether import Tether

if TYPE_CHECKING:
    from collections.abc import Callable

    from mcp_broker.wire.node import WorkerBoot

#: it cannot serve at all, and would not a second time: no module, no tool, tools refused
EXIT_BOOT: Final = 3
#: which plugins pydantic leaves out
_PLUGINS: Final = "PYDANTIC_DISABLE_PLUGINS"


def read_boot(fd: int) -> WorkerBoot:
    """Read what the supervisor hands over, to its end, and close it.

    Raises:
        ConfigError: it is not a boot record (a worker started by hand).
    """
    with open(fd, "rb") as source:
        packed = source.read()
    try:
        return codec.decode_worker_boot(packed)
    except WireError as error:
        raise ConfigError(
            f"fd {fd} holds no boot record; workers are started by `mcp-broker start`"
        ) from error


def open_marks(fd: int) -> Marks:
    """Map the page shared with the supervisor, and write our stacks behind it when SIGUSR2 asks for them.

    The handler is C: it also answers while other C code holds the GIL.
    """
    page = mmap.mmap(fd, MARKS_BYTES)
    os.set_inheritable(fd, False)
    os.lseek(fd, MARKS_BYTES, os.SEEK_SET)
    faulthandler.register(signal.SIGUSR2, file=fd, all_threads=True)
    return Marks(memoryview(page))


def serve(boot: WorkerBoot, tether: Tether) -> None:
    """Import the tools and answer calls until the broker drains the worker.

    Args:
        tether: not listening yet.

    Raises:
        ConfigError: the module cannot serve (the operator's or its author's fault).
    """
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    interrupts = Interrupts(open_marks(boot.marks_fd), wake_write)
    is_called = threading.Event()

    def go() -> None:
        is_called.set()
        with contextlib.suppress(BlockingIOError):  # full of wake-ups
            os.write(wake_write, b"\0")

    tether.on(Go, go)
    tether.watch()
    sharing.name_with(boot.shared_prefix)
    forks.watch(interrupts.relinquish)
    tools = catalogue.load(boot.module, boot.path)
    hooks = catalogue.hooks(boot.module, tools)
    # not before the import: until here SIGTERM ends the process at once, as it should
    interrupts.install()
    session = Session(
        (tool.definition for tool in tools.values()),
        boot.concurrency,
        agent(),
        {name: traits for name, tool in tools.items() if (traits := hooks.traits(tool))},
    )
    if session.register_bytes > limits.REGISTER_BYTES_MAX:
        # the broker would drop it without a word
        raise ConfigError(
            f"the tools of {boot.module} take {session.register_bytes:,} bytes to describe; "
            f"the limit is {limits.REGISTER_BYTES_MAX:,}; split the module"
        )
    has_tasks = any(tool.is_async for tool in tools.values())
    is_alone = boot.concurrency == 1 or not has_tasks
    scratch = Path(boot.scratch)
    execution = Execution(
        tools, interrupts, boot.options, scratch, boot.secrets, is_alone=is_alone, hooks=hooks
    )
    asks = {
        limit: max(getattr(tool.asks, limit) for tool in tools.values()) for limit in Asks.__struct_fields__
    }
    if any(asks.values()):
        tether.say(Asks(**asks))
    execution.bounds = asked(boot.limits, boot.fixed_limits, asks)
    execution.lend = Lender(tether).lease
    hooks.begin()
    link = Link(boot, wake_read)
    # before a spare waits: it comes up faster
    run_calls: Callable[[], None]
    if has_tasks:
        from mcp_broker.worker.tasks import ConcurrentLoop

        run_calls = functools.partial(
            ConcurrentLoop(session, link, execution, interrupts).run, boot.concurrency
        )
    else:
        from mcp_broker.worker.loop import Loop

        run_calls = Loop(session, link, execution, interrupts).run
    # what was imported stays: no collection need look at it again
    gc.collect()
    gc.freeze()
    if boot.is_spare:
        tether.say(Warm())
        while not (is_called.is_set() or interrupts.stopping):
            link.wait_closed(None)
    run_calls()


@functools.cache
def agent() -> str:
    """Return what runs here, for the broker."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return f"mcp-broker/{importlib.metadata.version('mcp-broker')} python/{python}"


def warm() -> None:
    """Do beforehand what every worker does and none does differently: imports, and what they do at first use.

    Nobody's code but ours runs. A plugin of pydantic, which any installed package may bring, is not loaded here but in
    each worker.
    """
    from mcp_broker.worker import loop, tasks
    from mcp_broker.worker.tool import made, tool

    del loop, tasks
    agent()
    os.environ[_PLUGINS] = "__all__"
    try:

        @tool(name="warm.up")
        def warm_up(
            text: str, count: int = 1, *, rows: list[dict[str, float]] | None = None
        ) -> dict[str, int]:
            """Have pydantic load what it loads late."""
            del rows
            return {text: count}

        warm_up.validate({"text": "a"})
    finally:
        del os.environ[_PLUGINS]
        made.clear()


def run(boot_fd: int, tether_fd: int) -> NoReturn:
    """Be a worker, and end the process after what it owes."""
    # what its end is if it cannot even be told why
    status = 1
    try:
        status = main(boot_fd, tether_fd)
    except SystemExit as leaving:  # of a start hook
        status = forks.status_of(leaving.code)
    except BaseException:
        traceback.print_exc()
    finally:
        ending.leave(status)


def main(boot_fd: int, tether_fd: int) -> int:
    """Be a worker; return the exit code."""
    faulthandler.enable(all_threads=False)
    supervisor = os.getppid()
    kernel.die_with_parent(supervisor)
    pool = "?"
    try:
        boot = read_boot(boot_fd)
        pool = boot.pool
        logs.configure_child(boot.log_level, worker_id=boot.worker_id)
        tether = Tether(tether_fd)
        confine.apply(
            boot.confinement,
            scratch=boot.scratch,
            endpoint=boot.endpoint,
            path=boot.path,
            keep=(boot.marks_fd, tether_fd),
        )
        # once more: taking another uid undoes it
        kernel.die_with_parent(supervisor)
        serve(boot, tether)
    except ConfigError as error:
        print(f"mcp-broker worker: pool {pool}: {error}", file=sys.stderr)  # noqa: T201 (its log is its stderr)
        return EXIT_BOOT
    return 0
