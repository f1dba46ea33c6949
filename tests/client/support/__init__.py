"""A broker by script and a TCP proxy with faults, for the tests of the clients."""
