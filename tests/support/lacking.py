"""Runs a command on a machine that lacks something: ``python lacking.py landlock=ENOSYS mount=EPERM -- COMMAND...``.

A filter of system calls answers those of the primitive with the errno. That is how containers refuse, too.
"""

from __future__ import annotations

import errno
import os
import platform
import struct
import sys

from mcp_broker.confine import kernel, privileges, seccomp

#: primitive -> its system calls
CALLS = {
    "landlock": ("landlock_create_ruleset",),
    "mount": ("mount", "unshare"),
    "uid": ("setresuid", "setresgid"),
    "close_range": ("close_range",),
    "user_namespaces": ("clone3",),
}
NUMBERS = {
    "x86_64": {
        "mount": 165,
        "unshare": 272,
        "setresuid": 117,
        "setresgid": 119,
        "prctl": 157,
        "clone": 56,
        "clone3": 435,
    },
    "aarch64": {
        "mount": 40,
        "unshare": 97,
        "setresuid": 147,
        "setresgid": 149,
        "prctl": 167,
        "clone": 220,
        "clone3": 435,
    },
}[platform.machine()]
PR_SET_SECCOMP = 22
LOAD, EQUAL, ANY_OF, RETURN, ALLOW, ERRNO = 0x20, 0x15, 0x45, 0x06, 0x7FFF0000, 0x00050000
NEW_USER = 0x10000000


def program(lacks: dict[str, str]) -> bytes:
    made = [(LOAD, 0, 0, 0)]
    filters = lacks.pop("seccomp", None)
    for primitive, name in lacks.items():
        verdict = ERRNO | getattr(errno, name)
        for call in CALLS[primitive]:
            number = kernel.NUMBERS.get(call) or NUMBERS[call]
            # its flags cannot be looked into, so containers say that there is none, and clone is called instead
            answer = verdict if call != "clone3" else ERRNO | errno.ENOSYS
            made += [(EQUAL, 0, 1, number), (RETURN, 0, 0, answer)]
        if primitive == "user_namespaces":
            for call in ("clone", "unshare"):
                made += [(EQUAL, 0, 4, NUMBERS[call]), (LOAD, 0, 0, 16), (ANY_OF, 0, 1, NEW_USER)]
                made += [(RETURN, 0, 0, verdict), (LOAD, 0, 0, 0)]
    if filters:
        # a filter that is there already cannot be taken away, but no other one comes
        refuse = (RETURN, 0, 0, ERRNO | getattr(errno, filters))
        made += [(EQUAL, 0, 3, NUMBERS["prctl"]), (LOAD, 0, 0, 16), (EQUAL, 0, 1, PR_SET_SECCOMP), refuse]
    made.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("<HBBI", *one) for one in made)


def lack(lacks: dict[str, str]) -> None:
    """Take the primitives from this process and its children."""
    privileges.gain_no_more()
    seccomp.install(program(dict(lacks)))


def main(*words: str) -> None:
    split = words.index("--")
    lack(dict(word.split("=", 1) for word in words[:split]))
    command = words[split + 1 :]
    os.execv(command[0], command)  # noqa: S606 (what this program is for)


if __name__ == "__main__":
    main(*sys.argv[1:])
