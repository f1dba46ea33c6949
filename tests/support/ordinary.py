"""Runs a command as an ordinary user, in a process that is root: ``python ordinary.py FOLDER COMMAND...``.

The user has no home and no name, may write to FOLDER alone, and sees what the interpreter and this checkout need,
wherever those are: also inside root's home. The suite shows that way what an ordinary user gets, whoever runs it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mcp_broker.confine import folders, kernel, mounts, privileges

#: nobody's
UID = 61_616
ROOT = str(Path(__file__).resolve().parents[2])


def main(folder: str, *command: str) -> None:
    # bubblewrap makes its /dev of what is in ours
    system = (*folders.existing((*folders.SYSTEM, "/etc", "/sys", "/dev/tty")), *folders.runtime(), ROOT)
    mounts.leave(network=False)
    mounts.enter(mounts.View(system, (), (folder,), (), "/tmp", 16, UID))
    # as on most machines, everybody sees everybody's processes
    kernel.mount("proc", "/proc", "proc", 0)
    privileges.become(UID)
    os.environ.update(HOME="/tmp", TMPDIR="/tmp", XDG_RUNTIME_DIR="")
    os.chdir(folder)
    os.execv(command[0], command)  # noqa: S606 (what this program is for)


if __name__ == "__main__":
    main(*sys.argv[1:])
