"""What a worker does to itself before it runs anybody's code. Levels and their walls: docs/isolation.md.

The modules stand for one kind of wall each; :mod:`mcp_broker.confine.application` knows their order. System calls go
through ctypes: the libraries for this either start a compiler when they are imported or drop what the kernel lacks
without a word.
"""

from __future__ import annotations

from mcp_broker.confine.application import apply

__all__ = ["apply"]
