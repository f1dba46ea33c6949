"""``python -m mcp_broker.broker --link-fd N``: started by the supervisor, never by hand."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
from importlib import metadata

import zmq

from mcp_broker import limits, logs, transport
from mcp_broker.auth import zap
from mcp_broker.broker.admission import WORKER_DOMAIN, Admission
from mcp_broker.broker.endpoints import Endpoints
from mcp_broker.broker.link import NodeLink, SupervisorGone
from mcp_broker.broker.loop import Loop
from mcp_broker.broker.sockets import CLIENT_DOMAIN, listening_router
from mcp_broker.broker.tokens import TokenVerifier
from mcp_broker.broker.zap_handler import ZapHandler
from mcp_broker.confine import kernel
from mcp_broker.core.routing import Routing
from mcp_broker.ids import UserId
from mcp_broker.wire import node

_BOOT_TIMEOUT_S = 10.0
#: until BOOT names the configured one
_FIRST_LEVEL = "info"
#: the loop makes few cycles; a collection each 700 objects would walk the session tables for nothing
_GC_THRESHOLD = 100_000


def main() -> int:
    """Serve until the supervisor says otherwise or is gone."""
    parser = argparse.ArgumentParser(prog="python -m mcp_broker.broker")
    parser.add_argument("--link-fd", type=int, required=True)
    link_fd: int = parser.parse_args().link_fd
    kernel.die_with_parent(os.getppid())
    # the supervisor decides when the broker ends; a Ctrl-C of its terminal is not for us
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure_child(_FIRST_LEVEL)
    link = NodeLink(link_fd)
    try:
        boot, rest = link.wait_for_boot(_BOOT_TIMEOUT_S)
        logs.follow(boot.log_level)
        _serve(link, boot, rest)
    except SupervisorGone:
        return 1
    return 0


def _serve(link: NodeLink, boot: node.Boot, rest: list[node.FromSupervisor]) -> None:
    context = transport.new_context()
    context.set(zmq.MAX_SOCKETS, limits.SESSIONS_MAX + limits.WORKERS_MAX)
    admission = Admission()
    # before any bind: with no handler there, nobody could be refused for a reason
    admission.domains[CLIENT_DOMAIN] = zap.clients_rule(
        frozenset(), frozenset(map(UserId, boot.client_keys)) or None
    )
    machine = Routing(boot.epoch, time.monotonic(), os.urandom)
    ZapHandler(context, admission.domains, zap.networks(boot.allow), machine.refused)
    clients = listening_router(
        context,
        fd=boot.client_fd,
        endpoint=boot.client_endpoint,
        secret=boot.client_secret,
        domain=CLIENT_DOMAIN,
        send_hwm=limits.CLIENT_SEND_HWM,
    )
    workers = listening_router(
        context,
        fd=boot.worker_fd,
        endpoint=boot.worker_endpoint,
        secret=boot.worker_secret,
        domain=WORKER_DOMAIN,
    )
    machine.pid = os.getpid()
    machine.software_version = metadata.version("mcp-broker")
    machine.from_node(boot, time.monotonic())
    tokens = TokenVerifier(boot.issuer_keys, issuer=boot.issuer, audience=boot.audience)
    endpoints = Endpoints(workers, link.next_descriptor, admission)

    def take(message: node.FromSupervisor) -> None:
        admission.take(message)
        endpoints.take(message)
        if isinstance(message, node.Observe):
            logs.follow(message.log_level)

    loop = Loop(machine, clients, workers, link, tokens, take)
    loop.node_messages(rest, time.monotonic())
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 50, 100)
    link.send(node.Serving(os.getpid()))
    try:
        loop.run()
    finally:
        clients.close()
        workers.close()
        # not destroy(): it would close the ZAP thread's socket from this one
        context.term()


if __name__ == "__main__":
    sys.exit(main())
