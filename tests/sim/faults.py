"""What goes wrong, how often, and for how long. Each seed has its own mixture: some faults not at all, others often."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mcp_broker.core.steering import WISHES
from mcp_broker.wire import node

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.sim.world import World

#: how long after a fault its traces may still be on their way, seconds; a silent cut is noticed that late
_SILENT_S: Final = 3.0


class Faults:
    """Draws faults for one world.

    Args:
        a_second: how many, in the mean.
    """

    def __init__(self, world: World, a_second: float) -> None:
        self._world = world
        self.a_second = a_second
        rng = world.rng
        #: (weight, fault); the weight of each is drawn too
        kinds: list[tuple[int, Callable[[], None]]] = [
            (4, self.cut_client),
            (2, self.cut_client_silently),
            (3, self.freeze_client),
            (3, self.stall_client),
            (1, self.kill_client),
            (1, self.close_client),
            (3, self.cut_worker),
            (2, self.cut_worker_silently),
            (2, self.freeze_worker),
            (3, self.stall_worker),
            (4, self.kill_worker),
            (2, self.terminate_worker),
            (1, self.hang_start),
            (3, self.retire_worker),
            (2, self.change_pool),
            (4, self.steer_tool),
            (2, self.kill_broker),
            (2, self.stall_broker),
            (1, self.drain_broker),
            (1, self.close_the_way),
            (1, self.want_all),
        ]
        self._faults = [fault for _, fault in kinds]
        self._weights = [weight * rng.choice((0, 0, 1, 1, 4)) for weight, _ in kinds]
        self.count = 0

    def only(self, *faults: Callable[[], None]) -> None:
        """Let nothing but these go wrong."""
        self._weights = [int(fault in faults) for fault in self._faults]

    def strike(self) -> None:
        """Let one thing go wrong."""
        if any(self._weights):
            self.count += 1
            self._world.rng.choices(self._faults, self._weights)[0]()

    # -- clients ----------------------------------------------------------------------------------------

    def cut_client(self) -> None:
        """Break a client's connection; both ends notice soon."""
        self._cut_client(is_silent=False)

    def cut_client_silently(self) -> None:
        """Break it so that nobody is told."""
        self._cut_client(is_silent=True)

    def _cut_client(self, *, is_silent: bool) -> None:
        client = self._world.rng.choice(self._world.clients)
        client.trouble(_SILENT_S if is_silent else 0.1)
        if client.wire is not None:
            client.wire.cut(is_silent=is_silent)

    def freeze_client(self) -> None:
        """Let nothing through to and from a client for a while."""
        world = self._world
        client = world.rng.choice(world.clients)
        seconds = world.rng.random() * 2
        client.trouble(seconds)
        if client.wire is not None:
            world.note(client.name, "freezes", seconds)
            client.wire.frozen_until = world.agenda.now + seconds

    def stall_client(self) -> None:
        """Let a client stand still."""
        world = self._world
        client = world.rng.choice(world.clients)
        seconds = world.rng.random() * 2.5
        world.note(client.name, "stalls", seconds)
        client.trouble(seconds)
        client.stall(world.agenda.now + seconds)

    def kill_client(self) -> None:
        """Let a client vanish; another takes its place."""
        self._world.replace(self._world.rng.choice(self._world.clients)).kill()

    def close_client(self) -> None:
        """Let a client close; another takes its place."""
        client = self._world.rng.choice(self._world.clients)
        if self._world.agenda.now >= client.stalled_until:
            self._world.replace(client).close()

    # -- workers ----------------------------------------------------------------------------------------

    def cut_worker(self) -> None:
        """Break a worker's connection; both ends notice soon."""
        self._cut_worker(is_silent=False)

    def cut_worker_silently(self) -> None:
        """Break it so that nobody is told."""
        self._cut_worker(is_silent=True)

    def _cut_worker(self, *, is_silent: bool) -> None:
        workers = self._world.supervisor.workers()
        if workers:
            wire = self._world.rng.choice(workers).wire
            if wire is not None:
                wire.cut(is_silent=is_silent)

    def freeze_worker(self) -> None:
        """Let nothing through to and from a worker for a while."""
        world = self._world
        workers = world.supervisor.workers()
        if workers:
            worker = world.rng.choice(workers)
            if worker.wire is not None:
                seconds = world.rng.random() * 2
                world.note(worker.name, "freezes", seconds)
                worker.wire.frozen_until = world.agenda.now + seconds

    def stall_worker(self) -> None:
        """Let a worker stand still."""
        world = self._world
        workers = world.supervisor.workers()
        if workers:
            worker, seconds = world.rng.choice(workers), world.rng.random() * 2.5
            world.note(worker.name, "stalls", seconds)
            worker.stall(world.agenda.now + seconds)

    def kill_worker(self) -> None:
        """SIGKILL a worker."""
        workers = self._world.supervisor.workers()
        if workers:
            self._world.rng.choice(workers).die("killed")

    def terminate_worker(self) -> None:
        """SIGTERM a worker."""
        workers = self._world.supervisor.workers()
        if workers:
            worker = self._world.rng.choice(workers)
            self._world.note(worker.name, "gets SIGTERM")
            worker.terminate()

    def retire_worker(self) -> None:
        """Let an operator replace a worker, which is to cost no call."""
        self._world.supervisor.retire(self._world.rng.choice(self._world.supervisor.pools))

    def steer_tool(self) -> None:
        """Let an operator want something of a tool."""
        world = self._world
        broker = world.supervisor.broker
        if broker is None or not broker.is_serving:
            return
        tools = [tool for tool in broker.machine.registry.tools.values() if tool.pool is not None]
        if tools:
            name = world.rng.choice(sorted(WISHES))
            world.steer(world.rng.choice(tools), name)

    def change_pool(self) -> None:
        """Let an operator bring a new version of a pool's tools, which is to cost no call."""
        self._world.supervisor.change(self._world.rng.choice(self._world.supervisor.pools))

    def hang_start(self) -> None:
        """Let the next worker that starts never come up."""
        self._world.hanging_starts += 1

    # -- the broker -------------------------------------------------------------------------------------

    def kill_broker(self) -> None:
        """SIGKILL the broker; its supervisor starts another."""
        self._world.trouble(0.0)
        self._world.supervisor.kill_broker()

    def stall_broker(self) -> None:
        """Let the broker stand still."""
        world = self._world
        broker = world.supervisor.broker
        if broker is not None:
            seconds = world.rng.random() * 1.5
            world.note("broker", "stalls", seconds)
            world.trouble(seconds)
            broker.stall(world.agenda.now + seconds)

    def drain_broker(self) -> None:
        """Let the broker end in good order; its supervisor starts another."""
        world = self._world
        broker = world.supervisor.broker
        if broker is not None and broker.is_serving:
            drain_s = world.rng.random()
            world.trouble(drain_s + 0.5)
            world.supervisor.send(node.Shutdown(drain_s))

    def close_the_way(self) -> None:
        """Let no new connection come up for a while."""
        world = self._world
        seconds = world.rng.random() * 2
        world.note("network", "takes no new connections for", seconds)
        world.network.closed_until = world.agenda.now + seconds

    def want_all(self) -> None:
        """Let an operator start what was given up."""
        self._world.supervisor.want_all()
