"""``python -m mcp_broker.confine.witness``: a process to look at, that ends with its standard input."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.stdin.buffer.read()
