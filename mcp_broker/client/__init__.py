"""The Python clients: a pure session machine, the connection that it drives, and two thin shells around both.

Nothing is imported here: ``mcp_broker.Client`` and ``mcp_broker.AsyncClient`` load what they need.
"""
