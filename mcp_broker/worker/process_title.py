"""What others see in /proc of this process: the command line and environment that it was started with.

They are read from its memory. A forked process shows its parent's, which would name the wrong worker to whoever looks
for what a worker has left behind; so it writes over them what it would have been started with.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

#: arg_start, arg_end, env_start and env_end in /proc/PID/stat, counted behind the name; see proc_pid_stat(5)
_ADDRESSES: Final = slice(45, 49)


class ProcessTitle:
    """The places of a process's command line and of one variable of its environment; a forked process has the same.

    Args:
        variable: of the environment that the process was started with. ``os.environ`` is another thing, and stays.
    """

    def __init__(self, variable: str) -> None:
        stat = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
        arg_start, arg_end, env_start, env_end = map(int, stat[stat.rindex(")") + 2 :].split()[_ADDRESSES])
        self._arguments = (arg_start, arg_end - arg_start)
        self._value = (env_start, 0)
        name = f"{variable}=".encode()
        at = env_start
        for entry in ctypes.string_at(env_start, env_end - env_start).split(b"\0"):
            if entry.startswith(name):
                self._value = (at + len(name), len(entry) - len(name))
            at += len(entry) + 1

    def show(self, arguments: Sequence[str], value: str) -> None:
        """Change the command line and the variable's value, as far as there was room for them at the start."""
        _write(*self._arguments, b"\0".join(argument.encode() for argument in arguments))
        _write(*self._value, value.encode())


def _write(address: int, room: int, text: bytes) -> None:
    """Fill a place with a text and zeros. The byte behind it is a zero already, or the kernel would read on."""
    ctypes.memmove(address, text[:room].ljust(room, b"\0"), room)
