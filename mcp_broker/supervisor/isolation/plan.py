"""What a level needs of the machine, and which walls a worker gets: decided from what was probed, and pure.

A level is a floor. What it promises is either put up or refused; nothing is left out because it happens to be missing.
Two ways lead to `restricted`: as root, a uid and a file system of one's own, which keep what belongs to others out of
sight; otherwise what Landlock can do about ports, abstract sockets and signals, which older kernels lack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from mcp_broker.errors import SupervisionError

if TYPE_CHECKING:
    from mcp_broker.config import PoolTable
    from mcp_broker.supervisor.isolation.probe import Probe

#: what each level cannot do without, in the order in which it is told
PROCESS: Final = ("no_new_privs", "resource_limits", "descriptors")
RESTRICTED: Final = (*PROCESS, "seccomp", "landlock")
SANDBOXED: Final = (*RESTRICTED, "sandbox")


class Unattainable(SupervisionError):  # noqa: N818 (what it says of a level)
    """This machine, or this configuration, cannot give a worker what its pool demands; trying again changes nothing."""


@dataclass(frozen=True, slots=True)
class Walls:
    """What a worker gets.

    Args:
        level: `auto` is decided.
        network: likewise where the pool does not say.
        own_uid, own_mounts, own_network: a uid, a file system, a network of its own.
        own_endpoint: it reaches the broker at an address of its own, by a file; else at the workers' common port.
    """

    level: str
    network: str
    own_uid: bool = False
    own_mounts: bool = False
    own_network: bool = False
    own_endpoint: bool = False
    #: of `auto`: why the next higher level cannot be had; "" where there is none
    shortfall: str = ""


def walls(table: PoolTable, probes: Mapping[str, Probe], *, is_root: bool) -> Walls:
    """Decide.

    Raises:
        Unattainable: a primitive that the level needs does not work here; the message names it and its errno.
    """
    if table.isolation == "auto":
        return _best(table, probes, is_root=is_root)
    if table.isolation == "sandboxed":
        return _sandboxed(table, probes, is_root=is_root)
    if table.isolation == "restricted":
        return _restricted(table, probes, is_root=is_root)
    return _process(table, probes)


def _best(table: PoolTable, probes: Mapping[str, Probe], *, is_root: bool) -> Walls:
    shortfall = ""
    for decide in (_sandboxed, _restricted):
        try:
            return replace(decide(table, probes, is_root=is_root), shortfall=shortfall)
        except Unattainable as error:
            shortfall = str(error)
    return replace(_process(table, probes), shortfall=shortfall)


def _sandboxed(table: PoolTable, probes: Mapping[str, Probe], *, is_root: bool) -> Walls:
    """Everything of its own, by bubblewrap; as root also a uid."""
    level, network = "sandboxed", table.network or "none"
    _demand(level, SANDBOXED, probes)
    if is_root:
        _demand(level, ("own_uid",), probes)
    return Walls(level, network, is_root, own_mounts=True, own_network=network != "full", own_endpoint=True)


def _process(table: PoolTable, probes: Mapping[str, Probe]) -> Walls:
    _demand("process", PROCESS, probes)
    return Walls("process", table.network or "full")


def _restricted(table: PoolTable, probes: Mapping[str, Probe], *, is_root: bool) -> Walls:
    level, network = "restricted", table.network or "none"
    _demand(level, RESTRICTED, probes)
    own_mounts = is_root and probes["own_mounts"].works
    if is_root:
        _demand(level, ("own_uid",), probes)
    if network == "loopback":
        # an address cannot be filtered: what must reach nothing else needs a network with nothing else in it
        _demand(f"{level} with network = 'loopback'", ("own_mounts", "own_network"), probes)
    own_network = network == "loopback"
    if not probes["landlock_scopes"].works:
        # abstract sockets and signals: a uid and a network of one's own do the same
        own_network = own_mounts and network != "full" and probes["own_network"].works
        if not own_network:
            _demand(level, ("landlock_scopes",), probes)
    if network == "none" and not own_mounts:
        # the broker is reached by a port then, and by no other
        _demand(f"{level} with network = 'none'", ("landlock_ports",), probes)
    return Walls(level, network, is_root, own_mounts, own_network, own_endpoint=own_mounts)


def _demand(level: str, primitives: tuple[str, ...], probes: Mapping[str, Probe]) -> None:
    for name in primitives:
        if not probes[name].works:
            raise Unattainable(
                f"isolation level {level} cannot be had here: {probes[name]}; see `mcp-broker doctor`",
                {"level": level, "primitive": name, "errno": probes[name].errno},
            )
