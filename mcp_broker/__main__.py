"""``python -m mcp_broker`` is ``mcp-broker``."""

from __future__ import annotations

from mcp_broker.cli import main

if __name__ == "__main__":
    main()
