"""A client for a command: found by profile, told within a second when nobody is there."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

from mcp_broker.errors import BrokerError, NotReachable

if TYPE_CHECKING:
    from concurrent.futures import Future

    from mcp_broker.cli.settings import Settings
    from mcp_broker.client.progress import OnProgress

Map = dict[str, Any]

#: Nothing listens: known at once. Something listens and does not answer: that long.
_PROBE_S: Final = 0.8


class ClientLike(Protocol):
    """What commands use of a client (mcp_broker.Client, or a test's double)."""

    def call(self, tool: str, arguments: Map, /) -> Any: ...  # noqa: ANN401, D102 (any payload)
    def submit(  # noqa: D102
        self,
        tool: str,
        arguments: Map,
        /,
        *,
        timeout_s: float | None,
        on_progress: OnProgress | None,
        priority: int,
    ) -> Future[Any]: ...
    def stream(  # noqa: D102
        self,
        tool: str,
        arguments: Map,
        /,
        *,
        timeout_s: float | None,
        on_progress: OnProgress | None,
        priority: int,
    ) -> Iterator[Any]: ...
    def tools(  # noqa: D102
        self, name: str | None = None, capability: str | None = None, tag: str | None = None
    ) -> list[Map]: ...


@contextlib.contextmanager
def connected(chosen: Settings) -> Iterator[ClientLike]:
    """Connect as the settings say.

    Raises:
        NotReachable: there is no profile, or nothing answers at its address (exit code 4).
        CredentialError: the profile cannot be used, or the broker refuses it (exit code 3).
    """
    from mcp_broker.auth.profile import load_profile

    path = chosen.profile
    start = {"hint": chosen.again("start")}
    if not path.exists():
        raise NotReachable(f"there is no profile at {path}, so no broker was started for it", start)
    endpoints = load_profile(path).endpoints
    if not any(listens(endpoint) for endpoint in endpoints):
        raise NotReachable(f"no broker answers at {' or '.join(endpoints)}", start)
    from mcp_broker import Client

    with Client.connect(path) as client:
        yield client


def listens(endpoint: str) -> bool:
    """Tell whether anything listens there; the supervisor does, even while its broker restarts."""
    address = urlsplit(endpoint)
    if address.scheme != "tcp" or not address.hostname or not address.port:
        return True  # not ours to judge
    try:
        socket.create_connection((address.hostname, address.port), timeout=_PROBE_S).close()
    except OSError:
        return False
    return True


def tool_names(chosen: Settings) -> list[str]:
    """Return the live tools for the shell's completion; none at all when anything is wrong."""
    with contextlib.suppress(BrokerError, OSError, ImportError), connected(chosen) as client:
        return sorted(str(definition["name"]) for definition in client.tools())
    return []
