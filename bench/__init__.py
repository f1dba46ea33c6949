"""How fast it is, against libzmq's own proxy in the same run. ``python -m bench --help``."""
