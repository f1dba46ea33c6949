"""The machines: events and ``now`` in, values out. No sockets, processes, clocks, threads or randomness."""
