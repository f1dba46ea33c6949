"""The blocking client: what people call. How it works inside stands in :mod:`mcp_broker.client.leadership`."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

from mcp_broker import limits
from mcp_broker.client.future import CallFuture
from mcp_broker.client.leadership import Leadership
from mcp_broker.client.link import Link
from mcp_broker.client.options import CallOptions, wished
from mcp_broker.client.session import State, Wishes
from mcp_broker.client.sources import pack_rest
from mcp_broker.client.stream import PartStream
from mcp_broker.client.targets import Connected
from mcp_broker.wire import payload
from mcp_broker.wire.messages import Priority

if TYPE_CHECKING:
    from types import TracebackType

    from mcp_broker.auth.profile import Profile

#: calls that map() keeps going: a full batch, and the next one while its outcomes come back
MAP_AHEAD: Final = 128
NO_ARGUMENTS: Final = payload.pack({})
#: stands where the tool's name does; the broker knows which call is meant
ATTACH: Final = "system.attach"


class Client:
    """A session with a broker; make it with :meth:`connect`, and close it, best with ``with``.

    All methods may be called from any thread of the process that connected it.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._threads = Leadership(link)

    @classmethod
    def connect(
        cls, profile: str | os.PathLike[str] | Profile | None = None, *, timeout_s: float = limits.CONNECT_S
    ) -> Client:
        """Connect to the broker that a profile names, and wait for its welcome.

        Args:
            profile: a profile or its path; None: MCP_BROKER_PROFILE, then the default one.
            timeout_s: for how long the broker may be away, in seconds.

        Raises:
            NotReachable: there is no profile, or no broker answered in time.
            CredentialError: the profile cannot be used, or its key is refused.
            CallError: the broker refused the token (Unauthenticated) or the version (UnsupportedVersion).
        """
        link = Link.of(profile)
        client = cls(link)
        session = link.session
        try:
            session.wanted = True
            link.dial(monotonic())
            client._threads.await_end(Connected(link), timeout_s)
            session.wanted = False
            if session.refusal is not None:
                raise session.refusal
            if session.state is not State.OPEN:
                raise link.unreachable(timeout_s)
        except BaseException:
            client.close()
            raise
        return client

    @property
    def principal(self) -> str:
        """Who the broker takes this client for."""
        return self._link.session.name

    def call(
        self,
        tool: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[CallOptions],
    ) -> Any:  # noqa: ANN401 (any payload)
        """Call a tool and wait for its result; a streaming tool's parts come as a list.

        Args:
            arguments: names and values. Where the tool takes a ByteStream: bytes, or a binary file or an iterator of
                bytes, which is read in a thread of its own while the tool runs. What that raises cancels the call.
            timeout_s: how long the call may take, in seconds; 30 if None.
            options: see :class:`~mcp_broker.client.options.CallOptions`.

        Raises:
            CallError: it ended without a result; the class and ``code`` say how.
            ClientClosed, WrongProcess: this client takes no calls any more, or not in a process that was forked later.
            TypeError, ValueError: there is no such option, or the arguments hold something that cannot be sent.
        """
        future = CallFuture(self._threads)
        packed, wishes = prepared("call", arguments, options)
        self._threads.submit(tool, seconds(timeout_s), packed, future, waits=True, wishes=wishes)
        return future.result()

    def submit(
        self,
        tool: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[CallOptions],
    ) -> CallFuture:
        """Call a tool as :meth:`call` does, and return at once; wait only for a place in the session's window.

        Returns:
            A :class:`concurrent.futures.Future` that knows its ``call_id`` and, once done, its ``usage``.

        Raises:
            Overloaded: the window stayed full for ``timeout_s``. A full queue at the broker is an Overloaded of the
                future; nothing tries again by itself: see ``details["retry_after_s"]``.
            ClientClosed, WrongProcess: as :meth:`call`.
            TypeError, ValueError: there is no such option, or the arguments hold something that cannot be sent.
        """
        future = CallFuture(self._threads)
        packed, wishes = prepared("submit", arguments, options)
        self._threads.submit(tool, seconds(timeout_s), packed, future, wishes=wishes)
        return future

    def map(
        self,
        tool: str,
        arguments: Iterable[Mapping[str, Any]],
        *,
        timeout_s: float | None = None,
        priority: int = Priority.NORMAL,
    ) -> Iterator[Any]:
        """Yield the results of many calls, in order; up to 128 are under way at a time.

        Raises:
            CallError: at the place of the call that failed; the calls after it are cancelled.
        """
        ahead: deque[CallFuture] = deque()
        options: CallOptions = {} if priority == Priority.NORMAL else {"priority": priority}
        try:
            for one in arguments:
                ahead.append(self.submit(tool, one, timeout_s=timeout_s, **options))
                if len(ahead) >= MAP_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def stream(
        self,
        tool: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        **options: Unpack[CallOptions],
    ) -> PartStream:
        """Call a streaming tool and iterate over the parts of its result as they come.

        The tool is at most 16 parts ahead. Leaving the ``with`` block of the iterator, or closing it, cancels the
        call if it has not ended; so does dropping it.

        Raises:
            Overloaded, ClientClosed, WrongProcess, TypeError, ValueError: as :meth:`submit`.
        """
        stream = PartStream(self._threads)
        packed, wishes = prepared("stream", arguments, options)
        self._threads.submit(tool, seconds(timeout_s), packed, stream.inbox, streamed=True, wishes=wishes)
        return stream

    def tools(
        self, name: str | None = None, capability: str | None = None, tag: str | None = None
    ) -> list[dict[str, Any]]:
        """Return the definitions of the tools that this client may call, filtered."""
        answer = self.call("system.tools", asked(name=name, capability=capability, tag=tag))
        tools: list[dict[str, Any]] = answer["tools"]
        return tools

    def attach(self, call_id: bytes, *, timeout_s: float | None = None) -> CallFuture:
        """Take up a call that was detached, by this client or an earlier one of the same principal.

        Args:
            call_id: the future's ``call_id``, 16 bytes.
            timeout_s: how long to wait for its outcome, in seconds; 30 if None. The call has its own time.

        Returns:
            The call's future; it ends as NotFound if there is no such call, or no more.

        Raises:
            Overloaded, ClientClosed, WrongProcess: as :meth:`submit`.
        """
        future = CallFuture(self._threads)
        self._threads.submit(
            ATTACH, seconds(timeout_s), NO_ARGUMENTS, future, wishes=Wishes(attach_to=call_id)
        )
        return future

    def cancel(self, call: CallFuture | PartStream | bytes) -> bool:
        """Cancel a call, by its future, stream or id; False if it has ended."""
        if not isinstance(call, bytes):
            return call.cancel()
        pending = self._link.session.book.calls.get(call)
        return pending is not None and self._threads.cancel_pending(pending)

    def close(self) -> None:
        """End the session; calls that have not ended are cancelled."""
        self._threads.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pack(arguments: Mapping[str, Any] | None) -> bytes:
    """Pack a call's arguments.

    Raises:
        TypeError, ValueError: they hold something that cannot be sent, or are no map (the caller's fault).
    """
    if type(arguments) is dict:
        return payload.pack(arguments)
    if arguments is None:
        return NO_ARGUMENTS
    if not isinstance(arguments, Mapping):
        raise TypeError(f"arguments are a map of names to values, not {type(arguments).__name__}")
    return payload.pack(dict(arguments))


def prepared(
    method: str, arguments: Mapping[str, Any] | None, options: CallOptions
) -> tuple[bytes, Wishes | None]:
    """Pack a call's arguments, but for one that is a file or an iterator, which becomes a wish.

    Args:
        method: the one that was given them, for people.

    Raises:
        TypeError, ValueError: there is no such option; or the arguments hold something that cannot be sent, or are no
            map (the caller's fault).
    """
    wishes = wished(method, options)
    try:
        return pack(arguments), wishes
    except TypeError as error:
        return pack_rest(arguments, wishes, error)


def seconds(timeout_s: float | None) -> float:
    """Return a call's time-out in seconds, the default for None."""
    return limits.CALL_TIMEOUT_S if timeout_s is None else timeout_s


def asked(**filters: str | None) -> dict[str, str]:
    """Return the filters that were given."""
    return {name: value for name, value in filters.items() if value is not None}
