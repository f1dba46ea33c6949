"""The base of records that are made for every call.

Their constructor is written in C: 0.08 us where an ``__init__`` with a dozen assignments takes 0.25.
"""

from __future__ import annotations

from typing import Final

import msgspec

#: copy a frozen struct with some fields changed
replaced: Final = msgspec.structs.replace


class Slim(msgspec.Struct, eq=False):
    """A mutable record with slots; equal to itself only, so that it can be a key."""
