"""A real supervisor with the fake broker and worker. Prints each event as a JSON line.

Arguments: state directory, configuration file.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from pathlib import Path

from mcp_broker import config
from mcp_broker.errors import BrokerError
from mcp_broker.supervisor import Event, Supervisor
from mcp_broker.supervisor.launch.forks import ForkingLauncher
from mcp_broker.supervisor.launch.local import LocalLauncher
from mcp_broker.wire import codec

HERE = Path(__file__).parent


def show(event: Event) -> None:
    fields = {field.name: codec.as_plain(getattr(event, field.name)) for field in dataclasses.fields(event)
              if field.name != "state_dir"}  # fmt: skip
    print(json.dumps({"event": type(event).__name__, **fields}), flush=True)  # noqa: T201
    if type(event).__name__ == os.environ.get("FAKE_LISTENER_FAILS"):
        raise ValueError("the listener fails")


def main() -> int:
    logging.basicConfig(level=logging.INFO)
    local = LocalLauncher(worker=(str(HERE / "worker.py"),), broker=(str(HERE / "broker.py"),))
    launcher = ForkingLauncher(local, zygote=(str(HERE / "zygote.py"),))
    supervisor = Supervisor(config.load(sys.argv[2]), Path(sys.argv[1]), on_event=show, launcher=launcher)
    try:
        return supervisor.run()
    except BrokerError as error:
        print(json.dumps({"event": "error", "message": str(error), "details": error.details}), flush=True)  # noqa: T201
        return 1


if __name__ == "__main__":
    sys.exit(main())
