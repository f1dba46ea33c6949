"""A broker whose tools are hostile, at each level, for each kind of user."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker.supervisor.isolation import probe
from mcp_broker.supervisor.isolation.sandbox import try_it
from tests.support.ordinary import ROOT
from tests.support.running import Running

if TYPE_CHECKING:
    from mcp_broker import Client

HERE = Path(__file__).parent
ORDINARY = Path(ROOT) / "tests" / "support" / "ordinary.py"
IS_ROOT = os.geteuid() == 0
DEMO_DATA = str(Path(ROOT) / "mcp_broker" / "demo_data")
LEVELS = ("process", "restricted", "sandboxed")

CONFIG = """
[pools.sibling]
module = "mcp_broker_workers.echo"

[pools.text]
module = "mcp_broker_workers.text"
isolation = "restricted"
network = "{own_network}"

[pools.sql]
module = "mcp_broker_workers.sql"
isolation = "restricted"
read = ["{demo_data}"]
options = {{ folder = "{demo_data}" }}

[pools.sequence]
module = "mcp_broker_workers.sequence"
isolation = "restricted"

[pools.process]
module = "hostile"
path = ["{folder}/tools"]
min = 2
env = {{ PREFIX = "process" }}
secrets = {{ key = "{folder}/key" }}

[pools.restricted]
module = "hostile"
path = ["{folder}/tools"]
min = 2
isolation = "restricted"
env = {{ PREFIX = "restricted" }}
secrets = {{ key = "{folder}/key" }}
read = ["{folder}/in"]
write = ["{folder}/out"]
"""
SANDBOXED = """
[pools.sandboxed]
module = "hostile"
path = ["{folder}/tools"]
min = 2
isolation = "sandboxed"
env = {{ PREFIX = "sandboxed" }}
secrets = {{ key = "{folder}/key" }}
read = ["{folder}/in"]
write = ["{folder}/out"]
"""


@functools.cache
def sandbox() -> probe.Probe:
    """Try whether this machine can make a sandbox at all."""
    return probe.attempt("sandbox", try_it)


def need_sandbox() -> None:
    """Skip where there is none; the refusal is tested everywhere."""
    if not sandbox().works:
        pytest.skip(f"level sandboxed is refused on this machine: {sandbox()}")


class Site:
    """A running broker, what its hostile tools may aim at, and who runs it.

    Args:
        user: "root" or "ordinary".
        folder: of this site.
    """

    def __init__(self, user: str, folder: Path) -> None:
        self.user = user
        self.folder = folder
        for name in ("tools", "in", "out", "else"):
            (folder / name).mkdir(mode=0o755)
            (folder / name / "file").write_text("x")
        shutil.copy(HERE / "hostile.py", folder / "tools")
        (folder / "key").touch(mode=0o600)
        (folder / "key").write_text("open sesame\n")
        # a folder that is closed to all but its owner, as data often are
        (folder / "in" / "file").chmod(0o600)
        (folder / "in").chmod(0o700)
        prefix = (sys.executable, str(ORDINARY), str(folder)) if IS_ROOT and user == "ordinary" else ()
        # an ordinary user has it at level sandboxed only
        own_network = "loopback" if user == "root" else "none"
        config = CONFIG + SANDBOXED * sandbox().works
        self.running = Running(
            folder,
            config=config.replace("{demo_data}", DEMO_DATA).replace("{own_network}", own_network),
            prefix=prefix,
        )
        status = self.running.status()
        self.supervisor, self.broker = status["supervisor"]["pid"], status["broker"]["pid"]
        self.pids = {pool["name"]: [worker["pid"] for worker in pool["workers"]] for pool in status["pools"]}
        self.pids.setdefault("sandboxed", [])
        #: a worker that serves no hostile tool and stays out of the way
        names = {pool["name"]: pool["workers"][0]["id"] for pool in status["pools"]}
        self.scratch_of_a_sibling = str(self._runtime() / names["sibling"])
        self.client: Client = self.running.client()
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract_name = f"mcpb-test-{os.getpid()}-{user}"
        self.abstract.bind("\0" + self.abstract_name)
        self.abstract.listen()
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix_path = folder / "else" / "socket"
        self.unix.bind(str(self.unix_path))
        self.unix_path.chmod(0o777)
        self.unix.listen()

    def _runtime(self) -> Path:
        # as it is called where the supervisor is
        return (self.running.state_dir / "run").readlink()

    @property
    def uids(self) -> set[str]:
        """The uids of the restricted workers."""
        status = [Path(f"/proc/{pid}/status").read_text() for pid in self.pids["restricted"]]
        return {text.partition("Uid:\t")[2].split()[0] for text in status}

    def attempt(self, level: str, what: str, argument: Any = None) -> str:
        """Have a hostile tool of this level try something."""
        self._need(level)
        return str(self.client.call(f"{level}.attempt", {"what": what, "argument": argument}, timeout_s=10))

    def whoami(self, level: str) -> dict[str, Any]:
        """Ask a worker of this level what it sees of itself."""
        self._need(level)
        seen: dict[str, Any] = self.client.call(f"{level}.self", timeout_s=10)
        return seen

    def _need(self, level: str) -> None:
        if level == "sandboxed":
            need_sandbox()

    def close(self) -> None:
        """End it; nothing may be left."""
        for one in (self.tcp, self.abstract, self.unix):
            one.close()
        self.client.close()
        self.running.stop()


@pytest.fixture(scope="module", params=["root", "ordinary"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if request.param == "root" and not IS_ROOT:
        pytest.skip("what root gets is tried by root only")
    made = Site(request.param, tmp_path_factory.mktemp(f"site-{request.param}"))
    yield made
    made.close()
