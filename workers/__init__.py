"""The tools that ship with mcp-broker; installed as ``mcp_broker_workers``. Each module is one pool's."""
