"""The endpoints that serve one worker each: opened when the supervisor says so, closed after their worker's death.

They are further addresses of the workers' ROUTER. Each has a ZAP domain of its own, so that it lets in the key of its
worker and no other; that key opens no other door.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import zmq

from mcp_broker import limits
from mcp_broker.broker.sockets import bind_inherited
from mcp_broker.wire import node

if TYPE_CHECKING:
    from mcp_broker.broker.admission import Admission

_log = logging.getLogger(__name__)

#: what a dying worker sent last may still be on its way when its death is told
_CLOSE_S: Final = 10 * limits.DEATH_SETTLE_S


class Endpoints:
    """Opens and closes them, on the supervisor's word.

    Args:
        workers: the ROUTER of all workers.
        next_descriptor: returns the listening socket that came with a message; raises LookupError when none did.
        admission: which key each of them lets in.
    """

    def __init__(
        self, workers: zmq.Socket[bytes], next_descriptor: Callable[[], int], admission: Admission
    ) -> None:
        self._workers = workers
        self._next_descriptor = next_descriptor
        self._admission = admission
        #: worker id -> its endpoint
        self._open: dict[str, str] = {}
        #: (when, endpoint), the oldest first
        self._closing: deque[tuple[float, str]] = deque()

    def take(self, message: node.FromSupervisor) -> None:
        """Do what a message of the supervisor means here; most mean nothing."""
        # a report comes every second at least, so nothing waits for long
        self._close_due(time.monotonic())
        if isinstance(message, node.Listen):
            self._listen(message)
        elif isinstance(message, node.Died):
            endpoint = self._open.pop(message.certificate.worker_id, None)
            if endpoint is not None:
                self._closing.append((time.monotonic() + _CLOSE_S, endpoint))

    def _listen(self, message: node.Listen) -> None:
        try:
            fd = self._next_descriptor()
        except LookupError:
            # the kernel drops descriptors that this process may not hold; the worker will not become ready
            _log.error("endpoint.no_descriptor", extra={"worker_id": message.worker_id})
            return
        domain = self._admission.own_door(message.worker_id, message.thumbprint)
        try:
            bind_inherited(self._workers, fd, message.endpoint, domain)
        except zmq.ZMQError as error:
            os.close(fd)
            _log.error("endpoint.failed", extra={"worker_id": message.worker_id, "reason": str(error)})
            return
        self._open[message.worker_id] = message.endpoint

    def _close_due(self, now: float) -> None:
        while self._closing and self._closing[0][0] <= now:
            _, endpoint = self._closing.popleft()
            # libzmq closes the listening socket with it; the file is the supervisor's
            with contextlib.suppress(zmq.ZMQError):
                self._workers.unbind(endpoint)
