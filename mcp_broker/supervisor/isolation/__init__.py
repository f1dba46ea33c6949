"""What this machine can do to confine a worker, what a pool demands, and whether a worker has it."""
