"""What a worker's slot stands on: the supervisor, as far as a slot sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mcp_broker.supervisor.aftermath import Aftermath
    from mcp_broker.supervisor.isolation.warden import Warden
    from mcp_broker.supervisor.launch import Launcher
    from mcp_broker.supervisor.life import Life
    from mcp_broker.supervisor.poller import Poller
    from mcp_broker.wire import node


class Ground(Protocol):
    """The supervisor."""

    poller: Poller
    launcher: Launcher
    run_dir: Path
    instance: str
    worker_endpoint: str
    worker_server_public: bytes
    aftermath: Aftermath
    warden: Warden

    @property
    def is_leaving(self) -> bool:
        """Told to stop: a worker that ends by itself stays away."""

    @property
    def is_stopping(self) -> bool:
        """No worker starts any more."""

    def next_worker_id(self, pool: str) -> str:
        """Return an id that no worker had before."""

    def admitted(self, life: Life) -> None:
        """Let the broker admit this life's key, before its process exists."""

    def dismiss(self, worker_id: str) -> None:
        """Have the broker send this worker away once it holds no call."""

    def died(self, certificate: node.Certificate, started_calls: tuple[bytes, ...], *, is_news: bool) -> None:
        """Pass a death on."""

    def strayed(self) -> None:
        """Processes may have lost their parent."""

    def known(self) -> Mapping[int, str]:
        """Return our own children that are no strays: pid -> name."""

    def changed(self) -> None:
        """Something that a report shows is different now."""
