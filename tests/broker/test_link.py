"""The broker's end of the node link."""

from __future__ import annotations

import contextlib
import socket

import pytest

from mcp_broker.broker.link import NodeLink, SupervisorGone
from mcp_broker.errors import MalformedFrame
from mcp_broker.wire import codec, node
from mcp_broker.wire.framing import frame

BOOT = node.Boot(1, 0, 0, "", "", bytes(32), bytes(32), {}, "", "", {}, 1, 0.0)
STANDING = node.Standings((node.Standing(tool="a.get", state="inactive"),))


def heard(*said: node.NodeMessage) -> tuple[node.Boot, list[node.FromSupervisor]]:
    ours, theirs = socket.socketpair()
    with ours, contextlib.closing(NodeLink(theirs.detach())) as link:
        for message in said:
            ours.sendall(frame(codec.encode(message)))
        return link.wait_for_boot(0.05)


def test_a_broker_does_not_serve_before_it_knows_what_operators_did_under_the_one_before() -> None:
    with pytest.raises(SupervisorGone):
        heard(BOOT, STANDING)
    boot, rest = heard(BOOT, STANDING, node.Report(()))
    assert boot == BOOT
    assert rest == [STANDING, node.Report(())]


def test_what_comes_before_boot_is_our_own_bug() -> None:
    with pytest.raises(MalformedFrame, match="before BOOT"):
        heard(node.Report(()), BOOT)
