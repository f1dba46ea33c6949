"""The broker's sockets: every option set on purpose, with its reason."""

from __future__ import annotations

from typing import Final

import zmq
from zmq.utils import z85

from mcp_broker import limits

#: ZAP domains: one an address, so that a client's key never opens the workers' door
CLIENT_DOMAIN: Final = "clients"


def listening_router(
    context: zmq.Context[zmq.Socket[bytes]],
    *,
    fd: int,
    endpoint: str,
    secret: bytes,
    domain: str,
    send_hwm: int = limits.SOCKET_HWM,
) -> zmq.Socket[bytes]:
    """Open a ROUTER on a socket that the supervisor has bound and keeps: nobody can take its port.

    Args:
        fd: the inherited listening socket.
        endpoint: the address it is bound to, ``tcp://HOST:PORT``.
        secret: CURVE secret key, 32 bytes.
        send_hwm: messages that wait in libzmq for one peer; the others wait in ours, which counts their bytes.
    """
    socket = context.socket(zmq.ROUTER)
    socket.curve_server = True
    socket.curve_secretkey = z85.encode(secret)
    # without it, a missing ZAP handler would admit everyone
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    # EHOSTUNREACH and EAGAIN instead of silent loss
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # a second connection may not take over a routing id that is in use
    socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
    # what a peer may announce before it has proved anything
    socket.setsockopt(zmq.MAXMSGSIZE, limits.FRAME_BYTES_MAX)
    socket.setsockopt(zmq.HANDSHAKE_IVL, limits.HANDSHAKE_MS)
    # finds half-open TCP; liveness itself is the protocol's business
    socket.setsockopt(zmq.HEARTBEAT_IVL, 1000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 3000)
    socket.setsockopt(zmq.SNDHWM, send_hwm)
    socket.setsockopt(zmq.RCVHWM, limits.SOCKET_HWM)
    # the last outcomes and GOODBYE leave before the process does, but nobody can hold its end up
    socket.setsockopt(zmq.LINGER, 300)
    bind_inherited(socket, fd, endpoint, domain)
    return socket


def bind_inherited(socket: zmq.Socket[bytes], fd: int, endpoint: str, domain: str) -> None:
    """Serve one more listening socket that the supervisor has bound.

    Args:
        fd: belongs to libzmq from here on.
        endpoint: as the fd is bound: ``tcp://HOST:PORT`` or ``ipc://PATH``.
        domain: what the ZAP handler is asked for those who connect there; libzmq keeps it for each address.

    Raises:
        zmq.ZMQError: libzmq does not take it; the fd is still the caller's.
    """
    socket.zap_domain = domain.encode()
    socket.setsockopt(zmq.USE_FD, fd)
    socket.bind(endpoint)
