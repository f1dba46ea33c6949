"""Tools behind the interface of :mod:`concurrent.futures`, for code that is written to it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from mcp_broker.client.sync import MAP_AHEAD
from mcp_broker.errors import CallError

if TYPE_CHECKING:
    from mcp_broker.client.future import CallFuture
    from mcp_broker.client.sync import Client

#: futures that are kept before those that are done are looked for
_KEPT: Final = 1024


class ToolExecutor(Executor):
    """An executor whose functions are tools, named, and run by the broker's workers.

    ::

        with Client.connect() as client, ToolExecutor(client) as executor:
            future = executor.submit("text.word_count", text="to be or not to be")
            for counts in executor.map("text.word_count", [{"text": "a b"}, {"text": "c"}]):
                ...

    What differs from a pool of threads: a future's ``cancel`` also stops a call that runs, and the errors that it raises
    are :class:`~mcp_broker.CallError`. All methods may be called from any thread.

    Args:
        client: stays open when the executor is shut down.
        timeout_s: of each call, in seconds; 30 if None.
    """

    def __init__(self, client: Client, *, timeout_s: float | None = None) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        #: those that may not be done, and some that are
        self._futures: list[CallFuture] = []
        self._tidy_at = _KEPT
        self._shut = threading.Event()
        #: maps of which nobody has taken a result: what was asked for is done even if nobody ever does
        self._untouched: set[_Results] = set()
        self._touched: weakref.WeakSet[_Results] = weakref.WeakSet()

    def submit(self, tool: str, /, **arguments: Any) -> CallFuture:  # type: ignore[override]  # tools have names
        """Call a tool; wait only for a place in the client's window.

        Raises:
            RuntimeError: the executor was shut down.
            Overloaded: the window stayed full for as long as the call may take.
            TypeError, ValueError: this is no tool's name, or the arguments hold something that cannot be sent.
        """
        return self.call(tool, arguments)

    def map(  # type: ignore[override]  # tools take their arguments by name
        self,
        tool: str,
        arguments: Iterable[Mapping[str, Any]],
        /,
        *,
        timeout: float | None = None,
        chunksize: int = 1,
    ) -> Iterator[Any]:
        """Call a tool once for each map of arguments, and return an iterator over the results, in order.

        The first 128 calls are made at once, each further one as a result is taken, and all the rest when the executor
        is shut down and waits, as at the end of a ``with``. An iterator that is dropped half-way, or closed, cancels
        what has not ended.

        Args:
            timeout: seconds from now until the last result, as an executor has it.
            chunksize: of no consequence: calls travel in batches anyway.

        Raises:
            CallError: at the place of the call that failed.
            TimeoutError: the next result did not come in time.
        """
        del chunksize
        ends = None if timeout is None else monotonic() + timeout
        results = _Results(self, tool, iter(arguments), ends)
        try:
            results.fill()
        except BaseException:
            results.close()
            raise
        with self._lock:
            self._untouched.add(results)
        return results

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; the client stays open.

        Args:
            wait: for the outcomes of all that was submitted.
            cancel_futures: cancel what has not ended, running or not.
        """
        with self._lock:
            maps = [*self._untouched, *self._touched]
            self._untouched.clear()
        for results in maps:
            if cancel_futures:
                results.close()
            elif wait:
                results.finish()
        with self._lock:
            self._shut.set()
            futures, self._futures = self._futures, []
        if cancel_futures:
            _cancel(futures)
        if wait:
            for future in futures:
                with contextlib.suppress(CallError):
                    future.result()

    def touched(self, results: _Results) -> None:
        """Take note that somebody takes this map's results; dropping it now means that they are not wanted."""
        with self._lock:
            self._untouched.discard(results)
            self._touched.add(results)

    def call(self, tool: str, arguments: Mapping[str, Any]) -> CallFuture:
        """As :meth:`submit`, with the arguments in a map."""
        if not isinstance(tool, str):
            raise TypeError(
                f"a tool is called by its name, such as 'text.word_count', and {tool!r} is none; "
                "what is no tool yet becomes one with @tool, in a pool of the broker's configuration"
            )
        if self._shut.is_set():
            raise RuntimeError("the executor was shut down and takes no more calls")
        # outside the lock: it may wait for a place in the window
        future = self._client.submit(tool, arguments, timeout_s=self._timeout_s)
        with self._lock:
            self._futures.append(future)
            is_late = self._shut.is_set()
            if len(self._futures) >= self._tidy_at:
                self._futures = [one for one in self._futures if not one.done()]
                self._tidy_at = max(_KEPT, 2 * len(self._futures))
        if is_late:
            # shut down while it waited: nobody would wait for this one any more
            future.cancel()
            raise RuntimeError("the executor was shut down and takes no more calls")
        return future


class _Results(Iterator[Any]):
    """The results of a map, in order; the calls are made some way ahead of whoever takes them."""

    def __init__(
        self, executor: ToolExecutor, tool: str, rest: Iterator[Mapping[str, Any]], ends: float | None
    ) -> None:
        self._executor = executor
        self._tool = tool
        self._rest = rest
        self._ends = ends
        #: one thread takes results, another may shut the executor down
        self._lock = threading.Lock()
        self._ahead: deque[CallFuture] = deque()
        self._is_touched = False

    def fill(self) -> None:
        """Make calls, as far ahead as there should be."""
        with self._lock:
            while len(self._ahead) < MAP_AHEAD and self._one_more():
                pass

    def finish(self) -> None:
        """Make all the other calls, no faster than they end."""
        with self._lock:
            while True:
                if len(self._ahead) >= MAP_AHEAD:
                    with contextlib.suppress(CallError):
                        self._ahead[-MAP_AHEAD].result()
                if not self._one_more():
                    return

    def _one_more(self) -> bool:
        arguments = next(self._rest, None)
        if arguments is None:
            return False
        self._ahead.append(self._executor.call(self._tool, arguments))
        return True

    def __next__(self) -> Any:  # noqa: ANN401 (any payload)
        if not self._is_touched:
            self._is_touched = True
            self._executor.touched(self)
        try:
            self.fill()
            if not self._ahead:
                raise StopIteration
            value = self._ahead[0].result(None if self._ends is None else max(0.0, self._ends - monotonic()))
        except BaseException:
            self.close()
            raise
        self._ahead.popleft()
        return value

    def close(self) -> None:
        """Cancel what has not ended."""
        self._rest = iter(())
        ahead, self._ahead = self._ahead, deque()
        _cancel(ahead)

    def __del__(self) -> None:
        for future in self._ahead:
            future.drop()


def _cancel(futures: Iterable[CallFuture]) -> None:
    for future in futures:
        future.cancel()
