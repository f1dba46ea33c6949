"""What an interrupted call leaves behind: processes that it started.

An exception that ends the tool ends none of them: ``subprocess.run`` kills the shell, and not what the shell had
started; ``Popen`` kills nothing. The next call must not share the worker with them.

The worker looks itself, since only it knows when the call began: what it started for earlier calls is none of its
business here. What hides from it (no parent among ours, no variable that names us) is the supervisor's to sweep.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from mcp_broker import proctable

#: looks at the process table, each of a few milliseconds; a process may fork while the others are killed
_LOOKS_MAX: Final = 20
#: SIGKILL takes effect within this time, seconds
_PAUSE_S: Final = 0.002


def kill_since(monotonic_ns: int) -> int:
    """Kill what this worker's calls have started since an instant.

    Args:
        monotonic_ns: the instant, of the monotonic clock.

    Returns:
        How many processes were killed.
    """
    since = proctable.ticks_at(monotonic_ns)
    killed: set[tuple[int, int]] = set()
    for _ in range(_LOOKS_MAX):
        try:
            left = _started(since)
        except OSError:  # no descriptor left to look with: they are the supervisor's to sweep
            break
        if not left:
            break
        for entry in left:
            killed.add((entry.pid, entry.starttime))
            proctable.kill_exactly(entry.pid, entry.starttime)
        time.sleep(_PAUSE_S)
    return len(killed)


def _started(since: int) -> list[proctable.Entry]:
    """Return the living processes below this one, or orphaned and its all the same, with this start or a later one."""
    table = proctable.read_all()
    below: dict[int, list[proctable.Entry]] = {}
    for entry in table.values():
        below.setdefault(entry.ppid, []).append(entry)
    name, group = os.environ.get(proctable.WORKER_VARIABLE, "").encode(), _own_group(os.getpid())
    # whoever loses its parent becomes a child of the supervisor, which is ours
    adopted = [
        entry
        for entry in below.get(os.getppid(), ())
        if entry.pid != os.getpid()
        and (
            (name and proctable.environment(entry.pid).get(_VARIABLE) == name)
            # the supervisor, too, takes whoever is in it for ours
            or (group and _own_group(entry.pid) == group)
        )
    ]
    queue = below.get(os.getpid(), []) + adopted
    found = []
    while queue:
        entry = queue.pop()
        queue += below.get(entry.pid, ())
        if entry.starttime >= since and entry.state != "Z":
            found.append(entry)
    return found


def _own_group(pid: int) -> bytes:
    """Return the control group of a process, if it is one that a worker has for itself."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_bytes().splitlines()
    except OSError:
        return b""
    return next((line for line in lines if line.startswith(b"0::") and b"/mcpb-" in line), b"")


_VARIABLE: Final = proctable.WORKER_VARIABLE.encode()
