"""The ZAP handler: a small thread of its own, so that a busy loop never delays a handshake's verdict.

It only looks things up; the decision is :mod:`mcp_broker.auth.zap`'s. Source: RFC 27 (ZAP).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence

import zmq

from mcp_broker import limits
from mcp_broker.auth import zap
from mcp_broker.core.refusals import Refusals

_log = logging.getLogger(__name__)

_ENDPOINT = "inproc://zeromq.zap.01"


class ZapHandler:
    """Answers every handshake's question until the context ends.

    Args:
        domains: one rule a ZAP domain; asked in the handler's thread, so they only look things up.
        allowed: networks that may come; without any, all.
        refused: counts handshakes that were refused, and those of them for their address; written by our thread.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        domains: Mapping[str, zap.Rule],
        allowed: Sequence[zap.Network],
        refused: dict[str, int],
    ) -> None:
        self._domains = domains
        self._allowed = allowed
        self._refused = refused
        self._refusals = Refusals()
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        # bound here, in the starter's thread: the broker's own sockets may bind only once somebody answers
        self._socket.bind(_ENDPOINT)
        self._thread = threading.Thread(target=self._serve, name="zap", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                if not self._socket.poll(self._wait_ms()):
                    self._tell(time.monotonic())
                    continue
                frames = self._socket.recv_multipart()
            except zmq.ContextTerminated:
                self._socket.close()
                return
            except zmq.ZMQError as error:
                _log.error("zap.receive_failed", extra={"reason": str(error)})
                continue
            self._socket.send_multipart(zap.reply_frames(self._reply(frames)))

    def _reply(self, frames: list[bytes]) -> zap.ZapReply:
        try:
            reply = zap.decide(zap.parse(frames), self._domains, self._allowed)
        except zap.ZapError as error:
            # libzmq itself wrote this request: answer whatever can be answered
            reply = zap.error_reply(error) or zap.ZapReply(b"", 500, "malformed request")
        if not reply.admitted:
            self._refused["handshakes"] += 1
            self._refused["addresses"] += reply.text == zap.NOT_HERE
            now = time.monotonic()
            # whoever keeps us busy must not keep us from telling
            self._tell(now)
            if self._refusals.note(reply.text, now):
                _log.warning("zap.refused", extra={"status": reply.status, "reason": reply.text})
        return reply

    def _wait_ms(self) -> int | None:
        due = self._refusals.due
        return None if math.isinf(due) else max(0, math.ceil((due - time.monotonic()) * 1000))

    def _tell(self, now: float) -> None:
        if more := self._refusals.expire(now):
            _log.warning("zap.refused_more", extra={"within_s": limits.REFUSALS_TOLD_S, "more": more})
