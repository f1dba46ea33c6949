"""Progress of a call, told to whom asked for it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mcp_broker.client.session import CallBook

_log = logging.getLogger(__name__)

#: takes the fraction that is done (0 to 1, None: nobody knows) and a text for people
OnProgress = Callable[[float | None, str], object]


def reports(book: CallBook) -> Iterator[Callable[[], None]]:
    """Yield what is to be called to tell the news of all calls, and forget them."""
    news, book.progressed = book.progressed, {}
    for pending, fraction, message in news.values():
        yield functools.partial(_tell, pending.on_progress, fraction, message)


def _tell(on_progress: OnProgress, fraction: float | None, message: str) -> None:
    try:
        on_progress(fraction, message)
    except Exception:  # noqa: BLE001 (somebody else's code: the call goes on, and so do all the others)
        _log.exception("an on_progress callback raised")
