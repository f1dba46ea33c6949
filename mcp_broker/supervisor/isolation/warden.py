"""Who confines: knows what this machine can do, leases uids, and gives each life its walls."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mcp_broker import limits
from mcp_broker.auth.keys import read_secret
from mcp_broker.confine import folders
from mcp_broker.errors import CredentialError, SupervisionError
from mcp_broker.supervisor import quota
from mcp_broker.supervisor.endpoint import Endpoint
from mcp_broker.supervisor.isolation import plan, probe
from mcp_broker.supervisor.isolation.sandbox import try_it
from mcp_broker.supervisor.isolation.uids import Lease, Uids
from mcp_broker.wire.confinement import ENDPOINT_FOLDER, Confinement

if TYPE_CHECKING:
    from mcp_broker.config import PoolTable

#: in the scratch folder: where its own endpoint is
_ENDPOINT: Final = ".broker"


@dataclass(slots=True)
class Cell:
    """What one life was given.

    Args:
        confinement: for its boot record.
        secrets: name -> content.
        endpoint: its own, or None.
        address: of the broker as the worker sees it; "" where it uses the common one.
        lease: of its uid, or None.
    """

    confinement: Confinement
    secrets: dict[str, str]
    endpoint: Endpoint | None = None
    address: str = ""
    lease: Lease | None = None
    #: of `auto`: why its level is not higher
    shortfall: str = ""

    def release(self) -> None:
        """Give everything back; the process is gone."""
        if self.endpoint is not None:
            self.endpoint.close()
        if self.lease is not None:
            self.lease.release()


class Warden:
    """Gives lives their walls.

    Args:
        state_dir: holds what was probed, and is closed to every worker.
        run_dir: holds the scratch folders of all workers, and the records of who runs: closed to every worker but for
            its own scratch folder.
    """

    def __init__(self, state_dir: Path, run_dir: Path) -> None:
        self._state_dir = state_dir
        self._run_dir = run_dir
        self._probes: dict[str, probe.Probe] = {}
        self._uids: Uids | None = None

    def probes(self, *, sandbox: bool) -> dict[str, probe.Probe]:
        """Return what this machine can do; tried when it is asked for first.

        Args:
            sandbox: also what takes an interpreter's start to find out.
        """
        wanted = probe.PRIMITIVES if not sandbox else {**probe.PRIMITIVES, "sandbox": try_it}
        # what did not work is not tried again by this supervisor: each may take seconds, and workers wait
        untried = {name: work for name, work in wanted.items() if name not in self._probes}
        if untried:
            self._probes |= probe.remembered(self._state_dir / "probes.json", untried)
        return self._probes

    def walls(self, table: PoolTable) -> plan.Walls:
        """Return what a pool's workers get.

        Raises:
            plan.Unattainable: this machine cannot do what the pool demands.
        """
        probes = self.probes(sandbox=table.isolation in {"sandboxed", "auto"})
        return plan.walls(table, probes, is_root=os.geteuid() == 0)

    def prepare(self, table: PoolTable, worker_id: str, scratch: Path) -> Cell:
        """Make what a life needs before its process exists.

        Args:
            scratch: exists, and is given to the worker's uid.

        Raises:
            plan.Unattainable: it cannot be had, and will not be had by trying again.
            SupervisionError: it cannot be had now.
        """
        walls = self.walls(table)
        if walls.level == "process":
            confinement = Confinement(rlimits=quota.rlimits(table, is_confined=False, has_own_uid=False))
            return Cell(confinement, _read(table.secrets), shortfall=walls.shortfall)
        for folder in (*table.read, *table.write):
            self._check_folder(folder)
        cell = Cell(Confinement(), _read(table.secrets), shortfall=walls.shortfall)
        try:
            if walls.own_uid:
                cell.lease = self._lease()
            uid = None if cell.lease is None else cell.lease.uid
            if walls.own_endpoint:
                owner = None if uid is None else (uid, uid)
                cell.endpoint = Endpoint(scratch / _ENDPOINT, worker_id, owner)
                cell.address = f"ipc://{ENDPOINT_FOLDER}/{worker_id}"
            if uid is not None:
                os.chown(scratch, uid, uid)
        except OSError as error:
            cell.release()
            why = f"cannot give {scratch} to a worker: {error.strerror}"
            raise SupervisionError(why, {"errno": error.errno}) from error
        except SupervisionError:
            cell.release()
            raise
        cell.confinement = Confinement(
            level=walls.level,
            uid=uid,
            read=table.read,
            write=table.write,
            hidden=(str(self._state_dir), str(self._run_dir)),
            network=walls.network,
            own_mounts=walls.own_mounts,
            own_network=walls.own_network,
            endpoint_folder="" if cell.endpoint is None else str(cell.endpoint.folder),
            shm_mb=table.limits.memory_mb,
            rlimits=quota.rlimits(table, is_confined=True, has_own_uid=uid is not None),
            oom_score_adj=limits.WORKER_OOM_SCORE,
        )
        return cell

    def _lease(self) -> Lease:
        if self._uids is None:
            # the primitive works, so there is a range
            self._uids = Uids(*(probe.uid_range() or limits.UID_RANGES[0]))
        return self._uids.lease()

    def _check_folder(self, folder: str) -> None:
        """Refuse what would show a worker our keys, or what other workers hold."""
        real = os.path.realpath(folder)
        for what, ours in (("state", self._state_dir), ("runtime", self._run_dir)):
            closed = os.path.realpath(ours)
            if folders.is_within(real, closed) or folders.is_within(closed, real):
                raise plan.Unattainable(
                    f"its read or write lists {folder}, which holds the {what} directory {closed} or is in it;"
                    " name the folders that its tools need"
                )


def _read(files: dict[str, str]) -> dict[str, str]:
    """Read the files that secrets are in."""
    secrets = {}
    for name, file in files.items():
        try:
            secrets[name] = read_secret(Path(file)).decode().removesuffix("\n")
        except FileNotFoundError:
            raise plan.Unattainable(f"its secret {name!r} cannot be read: there is no file {file}") from None
        except CredentialError as error:
            raise plan.Unattainable(f"its secret {name!r} cannot be read: {error}") from error
        except UnicodeDecodeError:
            raise plan.Unattainable(f"its secret {name!r} cannot be read: {file} is not UTF-8 text") from None
    return secrets
