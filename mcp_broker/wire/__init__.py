"""Bytes and values: the only home of msgpack and msgspec. Normative text: docs/protocol.md."""
