"""Leased ports: every cell of their table, and what leases promise."""

from __future__ import annotations

import itertools

import pytest

from mcp_broker import limits
from mcp_broker.core.ports import PORT_TABLE, Port, PortEvent, Ports, PortState, Release, StopListening
from mcp_broker.errors import InvalidTransition, PortInvalid, PortsExhausted, PortUnavailable

FIRST, LAST = 7000, 7003


@pytest.fixture
def ports() -> Ports:
    return Ports(FIRST, LAST, reserved=(7001,), per_worker=2)


def states(ports: Ports) -> dict[int, str]:
    return {port.number: port.state.value for port in ports.listed}


def leased(ports: Ports, owner: str = "t-1", **wishes: float) -> int:
    number = ports.lease(owner, 0.0, **wishes)  # type: ignore[arg-type]
    ports.bound(number)
    return number


def test_the_table_has_a_cell_for_every_state_and_event() -> None:
    assert set(PORT_TABLE) == set(PortState)
    assert all(set(row) == set(PortEvent) for row in PORT_TABLE.values())


@pytest.mark.parametrize(("state", "event"), list(itertools.product(PortState, PortEvent)))
def test_a_port_moves_by_its_table_or_names_the_bug(state: PortState, event: PortEvent) -> None:
    port = Port(7000, state, owner="t-1", due=1.0)
    after = PORT_TABLE[state][event]
    if after is None:
        with pytest.raises(InvalidTransition, match=f"7000: {event.name} in state {state.name}"):
            port.step(event)
        assert port.state is state
        return
    port.step(event)
    assert port.state is after
    assert port.due is None
    assert (port.owner == "") is (after in {PortState.AVAILABLE, PortState.CLOSED})


def test_ports_are_lent_in_turn_and_never_a_reserved_one(ports: Ports) -> None:
    assert [leased(ports), leased(ports), leased(ports, "t-2")] == [7000, 7002, 7003]
    assert states(ports) == {7000: "active", 7001: "closed", 7002: "active", 7003: "active"}
    assert ports.give_back(7000, "t-1") == [Release(7000)]
    assert ports.give_back(7002, "t-1") == [Release(7002)]
    assert leased(ports) == 7000


def test_a_worker_has_at_most_so_many_and_all_together_the_range(ports: Ports) -> None:
    for _ in range(2):
        leased(ports)
    with pytest.raises(PortsExhausted) as refused:
        ports.lease("t-1", 0.0)
    assert refused.value.details == {"which": "worker", "limit": 2}
    leased(ports, "t-2")
    with pytest.raises(PortsExhausted) as refused:
        ports.lease("t-2", 0.0)
    assert refused.value.details == {"which": "range"}


def test_a_certain_port_is_lent_if_it_is_free(ports: Ports) -> None:
    assert leased(ports, wanted=7002) == 7002
    with pytest.raises(PortUnavailable, match="port 7002 is active"):
        ports.lease("t-2", 0.0, wanted=7002)
    with pytest.raises(PortUnavailable, match="port 7001 is closed: reserved by the configuration"):
        ports.lease("t-2", 0.0, wanted=7001)
    with pytest.raises(PortInvalid, match="the range is 7000 to 7003"):
        ports.lease("t-2", 0.0, wanted=80)


def test_a_port_that_somebody_else_has_is_closed_and_tried_again_later(ports: Ports) -> None:
    number = ports.lease("t-1", 0.0)
    ports.refused(number, "Address already in use", 0.0)
    assert ports.lease("t-1", 0.0) == 7002
    with pytest.raises(PortUnavailable, match="Address already in use"):
        ports.lease("t-2", 0.0, wanted=number)
    assert ports.deadline() == limits.PORT_RETRY_S
    assert ports.expire(limits.PORT_RETRY_S) == []
    assert ports.lease("t-1", 0.0, wanted=number) == number


def test_a_lease_ends_by_a_drain_when_its_time_is_over(ports: Ports) -> None:
    number = leased(ports, ttl_s=5.0)
    assert ports.expire(4.9) == []
    assert ports.expire(5.0) == [StopListening(number)]
    assert states(ports)[number] == "draining"
    with pytest.raises(PortUnavailable, match="draining"):
        ports.lease("t-2", 5.0, wanted=number)
    assert ports.expire(5.0 + limits.PORT_DRAIN_S) == [Release(number)]
    assert number not in states(ports)


def test_a_lease_without_an_end_has_none(ports: Ports) -> None:
    leased(ports)
    assert ports.deadline() is None
    assert ports.expire(1e9) == []


def test_all_ports_of_the_dead_are_free_again_and_no_others(ports: Ports) -> None:
    first, second = leased(ports), ports.lease("t-1", 0.0)
    other = leased(ports, "t-2")
    assert ports.owner_died("t-1") == [Release(first)], "the second was not bound yet"
    assert states(ports) == {7001: "closed", other: "active"}
    assert leased(ports, wanted=second) == second


def test_nobody_gives_back_what_another_has(ports: Ports) -> None:
    number = leased(ports)
    assert ports.give_back(number, "t-2") == []
    assert ports.give_back(80, "t-1") == []
    assert ports.give_back(number, "t-1") == [Release(number)]
    assert ports.give_back(number, "t-1") == []


def test_after_the_end_there_are_no_leases_and_the_old_ones_drain(ports: Ports) -> None:
    number = leased(ports)
    assert ports.shut(1.0) == [StopListening(number)]
    assert states(ports) == {7000: "draining", 7001: "closed", 7002: "closed", 7003: "closed"}
    with pytest.raises(PortsExhausted, match="the supervisor is stopping"):
        ports.lease("t-2", 1.0)
    assert ports.shut(2.0) == []
    assert ports.expire(2.0) == []
    assert ports.owner_died("t-1") == [Release(number)]
    assert set(states(ports).values()) == {"closed"}
    assert ports.expire(1e9) == []
