"""All that belongs to one worker process and goes with it."""

from __future__ import annotations

import contextlib
import signal
import time
from typing import TYPE_CHECKING, Final

from mcp_broker import proctable
from mcp_broker.auth.keys import CurvePair
from mcp_broker.core.metering import Level
from mcp_broker.supervisor import reclaim
from mcp_broker.supervisor.containment import contained
from mcp_broker.supervisor.page import Page
from mcp_broker.supervisor.tether import Tether, new_ends
from mcp_broker.wire import node

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mcp_broker.supervisor.certificates import Exceeded, Interrupted
    from mcp_broker.supervisor.endpoint import Endpoint
    from mcp_broker.supervisor.isolation.uids import Lease
    from mcp_broker.supervisor.isolation.warden import Cell
    from mcp_broker.supervisor.metering import Metered
    from mcp_broker.supervisor.process import Process
    from mcp_broker.wire.tether import Asks

#: how the broker is told how close a worker is to a limit
_PRESSURES: Final[dict[Level, node.Pressure]] = {
    Level.NORMAL: "normal",
    Level.WARNING: "warning",
    Level.THROTTLE: "throttle",
    Level.EXCEEDED: "exceeded",
}


class Life:
    """One life of a worker.

    Args:
        worker_id: of this life; its folder and record have the same name.
        run_dir: where they are.

    Raises:
        OSError: no descriptor, no memory, no room for its folder.
    """

    def __init__(self, worker_id: str, pool: str, edition: int, run_dir: Path) -> None:
        self.worker_id = worker_id
        self.pool = pool
        self.edition = edition
        #: its isolation level
        self.level = "process"
        self.keys = CurvePair.generate()
        self.scratch = run_dir / worker_id
        with contextlib.ExitStack() as undo:
            self.scratch.mkdir(mode=0o700)
            undo.callback(self.scratch.rmdir)
            self.page = Page()
            undo.callback(self.page.close)
            self.our_end, self.their_end = new_ends()
            undo.pop_all()
        self.marks = self.page.marks
        self.tether: Tether | None = None
        #: its walls, once they are decided
        self.cell: Cell | None = None
        self.process: Process | None = None
        #: what it did that no worker of ours does, for which we killed it
        self.violation = ""
        #: it has not been told to connect to the broker
        self.is_spare = False
        self.interrupted: Interrupted | None = None
        #: the limit that it is killed for
        self.exceeded: Exceeded | None = None
        self._was_asked = False
        self._lease: Lease | None = None
        #: limits that its tools ask for
        self.asks: dict[str, float] = {}
        #: what it uses, once it was ready
        self.metered: Metered | None = None
        self.rss_kib = 0
        self.cpu_s = 0.0

    def begun(self, tether: Tether) -> None:
        """Keep the tether to the process, which was born, and let go of what only it needs."""
        self.tether = tether
        self.their_end.close()

    def violate(self, what: str) -> None:
        """Kill it for what it did, which no worker of ours does."""
        if not self.violation and self.process is not None:
            self.violation = what
            self.process.kill()

    def asked(self, asks: Asks) -> None:
        """Take the limits that its tools ask for; later than its being ready nobody listens."""
        if self.metered is None:
            self.asks = {limit: float(getattr(asks, limit)) for limit in asks.__struct_fields__}

    @property
    def admitted(self) -> node.Admitted:
        """What the broker lets in for this life."""
        return node.Admitted(
            thumbprint=self.keys.thumbprint,
            worker_id=self.worker_id,
            pool=self.pool,
            edition=self.edition,
            is_measured=True,
            is_spare=self.is_spare,
        )

    @property
    def endpoint(self) -> Endpoint | None:
        """Its own address; without one it uses the workers' common one."""
        return None if self.cell is None else self.cell.endpoint

    def listen(self, endpoint: Endpoint) -> node.Listen:
        """What the broker serves at this life's own address."""
        return node.Listen(self.worker_id, self.keys.thumbprint, endpoint.address)

    def sample(self) -> None:
        """Read what the process costs now."""
        entry = None if self.process is None else proctable.read(self.process.main_pid)
        if entry is not None:
            self.rss_kib, self.cpu_s = entry.rss_kib, entry.cpu_s

    def report(self, state: str) -> node.WorkerReport:
        """Return what the broker tells those who ask."""
        reading = None if self.metered is None else self.metered.meter.reading
        return node.WorkerReport(
            id=self.worker_id,
            pid=0 if self.process is None else self.process.main_pid,
            state=state,
            since_wall=0.0 if self.process is None else self.process.started_wall,
            rss_kib=self.rss_kib,
            cpu_s=self.cpu_s,
            pressure="unmeasured" if reading is None else _PRESSURES[reading.level],
            limit="" if reading is None else reading.limit,
            share=0.0 if reading is None else round(reading.share, 3),
            start="" if self.process is None else self.process.start,
            isolation=self.level,
            isolation_note="" if self.cell is None else self.cell.shortfall,
        )

    def ask_stack(self) -> None:
        """Have the process write what its threads are doing; only one that was ready has a handler for the signal."""
        if self.process is not None:
            self.page.clear()
            self._was_asked = True
            self.process.signal(signal.SIGUSR2)

    @property
    def stack(self) -> str:
        """What its threads were doing when it was asked last; "" if it never was."""
        return self.page.stack() if self._was_asked else ""

    def remains(self, instance: str) -> reclaim.Remains:
        """Return what its end may leave behind; after :meth:`end`."""
        process = self.process
        return reclaim.Remains(
            worker_id=self.worker_id,
            pool=self.pool,
            pid=0 if process is None else process.pid,
            level=self.level,
            prefix=reclaim.prefix(instance, self.worker_id),
            scratch=self.scratch,
            started_wall=time.time() if process is None else process.started_wall,
            lease=self._lease,
        )

    def end(self) -> None:
        """Let go of all that is ours; what the process may have left is for reclaim."""
        ours: list[Callable[[], None]] = [self.page.close]
        if self.tether is None:
            ours += [self.their_end.close, self.our_end.close]
        else:
            ours.append(self.tether.close)
        if self.cell is not None:
            # the uid stays taken until nothing of it is left
            self._lease, self.cell.lease = self.cell.lease, None
            ours.append(self.cell.release)
        if self.metered is not None:
            ours.append(self.metered.close)
        for let_go in ours:
            with contained(f"letting go of what {self.worker_id} had"):
                let_go()
