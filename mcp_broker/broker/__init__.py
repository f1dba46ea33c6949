"""The broker process: the thin shell around :mod:`mcp_broker.core.routing`."""
