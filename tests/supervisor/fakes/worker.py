"""A worker without ZeroMQ: does what ``options["do"]`` says."""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from mcp_broker import confine
from mcp_broker.wire import codec
from mcp_broker.wire.marks import MARKS_BYTES, Marks

#: leaves its parent, its session and its group, hears no signal, says who it is, and stays
DAEMON = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
with open(sys.argv[1] + ".part", "w") as file: file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(600)
"""


def open_files() -> list[str]:
    files = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            files.append(str(path.readlink()))
        except OSError:  # the listing itself
            continue
    return files


def watch(tether: socket.socket) -> None:
    while tether.recv(4096):
        pass
    os._exit(0)


def run(boot_fd: int, tether_fd: int) -> NoReturn:
    with open(boot_fd, "rb") as source:
        boot = codec.decode_worker_boot(source.read())
    options: dict[str, Any] = boot.options
    if not options.get("unconfined"):
        keep = (boot.marks_fd, tether_fd)
        confine.apply(boot.confinement, scratch=boot.scratch, endpoint=boot.endpoint, keep=keep)
    tether = socket.socket(fileno=tether_fd)
    if not options.get("untethered"):
        ctypes.CDLL(None).prctl(1, 0 if options.get("deaf") else signal.SIGKILL)
        threading.Thread(target=watch, args=(tether,), daemon=True).start()
    for packet in options.get("says_on_tether", ()):
        tether.send(bytes.fromhex(packet))
    if "boot_exit" in options:
        print(options.get("says", "something is wrong"), file=sys.stderr, flush=True)  # noqa: T201
        sys.exit(options["boot_exit"])
    if options.get("do") == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pause()
    marks = Marks(memoryview(mmap.mmap(boot.marks_fd, MARKS_BYTES)))
    os.lseek(boot.marks_fd, MARKS_BYTES, os.SEEK_SET)
    faulthandler.register(signal.SIGUSR2, file=boot.marks_fd)
    marks.start(options.get("started_seq", 0), b"c" * 16)
    if "detached_s" in options:
        marks.spare(options["started_seq"], time.monotonic() + options["detached_s"])
    heard = Path(options["heard"]) if "heard" in options else None

    def on_interrupt(_number: int, _frame: object) -> None:
        if heard is not None:
            heard.write_text(str(marks.interrupt_seq))

    signal.signal(signal.SIGUSR1, on_interrupt)
    if options.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "daemon" in options:
        env = {"PATH": os.environ["PATH"]} if options.get("wipes") else os.environ
        subprocess.run([sys.executable, "-c", DAEMON, options["daemon"]], check=True, env=env)
    if "environment" in options:
        seen: dict[str, Any] = {
            "env": dict(os.environ),
            "cwd": str(Path.cwd()),
            "fds": open_files(),
        }
        umask = os.umask(0)
        part = Path(options["environment"] + ".part")
        seen |= {"umask": umask, "sid": os.getsid(0), "pid": os.getpid(), "ppid": os.getppid()}
        seen |= {"random": random.random(), "threads": threading.active_count()}
        status = Path("/proc/self/status").read_text()
        seen["signals"] = [line for line in status.splitlines() if line.startswith(("SigBlk", "SigIgn"))]
        part.write_text(json.dumps(seen))
        part.rename(options["environment"])
    host, port = boot.endpoint.removeprefix("tcp://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{'refuse' if options.get('refuse') else 'up'} {boot.worker_id}\n".encode())
    while True:
        signal.pause()


def main() -> NoReturn:
    parser = argparse.ArgumentParser()
    parser.add_argument("--boot-fd", type=int)
    parser.add_argument("--tether-fd", type=int)
    given = parser.parse_args()
    run(given.boot_fd, given.tether_fd)


if __name__ == "__main__":
    main()
