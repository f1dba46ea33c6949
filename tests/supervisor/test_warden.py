"""Who confines: uids, secrets, and what a pool may not open."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from mcp_broker.config import PoolTable
from mcp_broker.errors import SupervisionError
from mcp_broker.supervisor.isolation import attestation, probe
from mcp_broker.supervisor.isolation.plan import Unattainable
from mcp_broker.supervisor.isolation.uids import Uids, _spans, has_processes
from mcp_broker.supervisor.isolation.warden import Warden
from mcp_broker.supervisor.launch import sandbox
from mcp_broker.wire.confinement import Confinement
from tests.support.waiting import wait_for

#: nobody's, out of the range that is used, and of no other run of these tests
FIRST, COUNT = 1_960_000_000 + 100 * os.getpid(), 3


# -- uids ---------------------------------------------------------------------------------------------


def test_no_uid_is_given_out_twice_also_by_another_supervisor() -> None:
    ours, theirs = Uids(FIRST, COUNT), Uids(FIRST, COUNT)
    leases = [ours.lease(), theirs.lease(), ours.lease()]
    assert {lease.uid for lease in leases} == set(range(FIRST, FIRST + COUNT))
    with pytest.raises(SupervisionError, match=f"no uid from {FIRST} to {FIRST + 2} is free"):
        theirs.lease()
    given_back = leases.pop()
    for _ in range(2):
        given_back.release()
    leases.append(theirs.lease())
    assert leases[-1].uid == given_back.uid
    for lease in leases:
        lease.release()


def test_a_released_uid_comes_back_last() -> None:
    uids = Uids(FIRST, COUNT)
    seen = []
    for _ in range(COUNT):
        lease = uids.lease()
        seen.append(lease.uid)
        lease.release()
    assert sorted(seen) == list(range(FIRST, FIRST + COUNT))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs a process as somebody else")
def test_a_uid_with_a_process_left_is_not_given_out() -> None:
    uids = Uids(FIRST + 10, 2)
    busy = subprocess.Popen(["/bin/sleep", "60"], user=FIRST + 10, group=FIRST + 10, extra_groups=[])
    try:
        assert has_processes(FIRST + 10)
        lease = uids.lease()
        assert lease.uid == FIRST + 11
        with pytest.raises(SupervisionError):
            uids.lease()
        lease.release()
    finally:
        busy.kill()
        busy.wait()
    assert not has_processes(FIRST + 10)


def test_uids_of_people_and_containers_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passwd, subuid = tmp_path / "passwd", tmp_path / "subuid"
    passwd.write_text(f"ada:x:{FIRST}:100::/home/ada:/bin/sh\nbroken\n+::::::\n")
    subuid.write_text(f"ada:{FIRST + 1}:1\n")
    assert _spans(passwd, 2, None) == [range(FIRST, FIRST + 1)]
    assert _spans(subuid, 1, 2) == [range(FIRST + 1, FIRST + 2)]
    assert _spans(tmp_path / "none", 1, 2) == []
    rows = ((str(passwd), 2, None), (str(subuid), 1, 2))
    monkeypatch.setattr("mcp_broker.supervisor.isolation.uids._TAKEN_IN", rows)
    lease = Uids(FIRST, COUNT).lease()
    assert lease.uid == FIRST + 2
    lease.release()


# -- secrets, folders ---------------------------------------------------------------------------------


@pytest.fixture
def warden(tmp_path: Path) -> Warden:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "runtime" / "abc").mkdir(parents=True)
    warden = Warden(tmp_path / "state", tmp_path / "runtime" / "abc")
    # as an ordinary user of a machine that can do everything
    warden._probes = {
        name: probe.Probe(name, works=True, detail="", errno=None, ms=0.0) for name in probe.PRIMITIVES
    }
    return warden


def prepare(warden: Warden, tmp_path: Path, **keys: Any) -> Any:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return warden.prepare(PoolTable(module="m", **keys), "m-1", scratch)


def test_a_secret_is_read_anew_for_each_life(warden: Warden, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.touch(mode=0o600)
    for content in ("first\n", "second"):
        file.write_text(content)
        cell = prepare(warden, tmp_path, secrets={"key": str(file)})
        assert cell.secrets == {"key": content.strip()}
        cell.release()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file: None, "there is no file"),
        (lambda file: file.touch(mode=0o644), "its mode is 0644, so others may use it"),
        (lambda file: file.touch(mode=0o640), "its mode is 0640, so others may use it"),
        (lambda file: file.symlink_to("/etc/passwd"), "it is a symbolic link"),
        (lambda file: file.mkdir(), "it is not a regular file"),
        (lambda file: (file.touch(mode=0o600), file.write_bytes(b"\xff")), "is not UTF-8 text"),
        (
            lambda file: (file.touch(mode=0o600), file.write_bytes(b"x" * 70_000)),
            "it has more than 65536 bytes",
        ),
    ],
    ids=["missing", "open to all", "open to a group", "link", "folder", "binary", "large"],
)
def test_a_secret_that_others_could_read_or_that_is_none_is_refused(
    warden: Warden, tmp_path: Path, make: Any, said: str
) -> None:
    file = tmp_path / "key"
    make(file)
    with pytest.raises(Unattainable, match="its secret 'key' cannot be read") as refused:
        prepare(warden, tmp_path, secrets={"key": str(file)})
    assert said in str(refused.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file away")
def test_a_secret_of_somebody_else_is_refused(warden: Warden, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.touch(mode=0o600)
    os.chown(file, 12345, 12345)
    with pytest.raises(Unattainable, match="it belongs to uid 12345"):
        prepare(warden, tmp_path, secrets={"key": str(file)})


@pytest.mark.parametrize("key", ["read", "write"])
@pytest.mark.parametrize("folder", [".", "state", "state/keys"])
def test_a_folder_that_would_show_our_keys_is_refused(
    warden: Warden, tmp_path: Path, key: str, folder: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / folder)
    for name in (tmp_path / folder, tmp_path / "link"):
        with pytest.raises(Unattainable, match="which holds the state directory"):
            prepare(warden, tmp_path, isolation="restricted", **{key: (str(name),)})


@pytest.mark.parametrize("key", ["read", "write"])
@pytest.mark.parametrize("folder", ["runtime", "runtime/abc", "runtime/abc/m-2"])
def test_a_folder_that_would_show_what_other_workers_hold_is_refused(
    warden: Warden, tmp_path: Path, key: str, folder: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / folder)
    for name in (tmp_path / folder, tmp_path / "link"):
        with pytest.raises(Unattainable, match="which holds the runtime directory"):
            prepare(warden, tmp_path, isolation="restricted", **{key: (str(name),)})


@pytest.mark.skipif(os.geteuid() != 0, reason="uids are root's to give")
def test_a_life_gets_its_uid_and_its_scratch_folder_with_it(warden: Warden, tmp_path: Path) -> None:
    cell = prepare(warden, tmp_path, isolation="restricted")
    uid = cell.confinement.uid
    assert uid is not None
    assert (tmp_path / "scratch").stat().st_uid == uid
    assert cell.endpoint is not None
    assert cell.address == "ipc:///run/broker/m-1"
    assert Path(cell.confinement.endpoint_folder).stat().st_uid == uid
    address = Path(cell.confinement.endpoint_folder, "m-1")
    cell.release()
    # the file goes with the scratch folder
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(str(address))


def test_what_does_not_work_is_tried_once_by_one_supervisor(
    warden: Warden, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def attempt(name: str, _work: object) -> probe.Probe:
        tried.append(name)
        return probe.Probe(name, works=False, detail="no", errno=None, ms=0.0)

    monkeypatch.setattr(probe, "attempt", attempt)
    warden._probes = {}
    assert not warden.probes(sandbox=False)["seccomp"].works
    assert sorted(tried) == sorted(probe.PRIMITIVES)
    tried.clear()
    assert not warden.probes(sandbox=True)["sandbox"].works
    warden.probes(sandbox=True)
    assert tried == ["sandbox"]


def test_an_interpreter_that_cannot_say_what_it_needs_is_asked_again_after_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho x >> {asked}\nexit 1\n")
    python.chmod(0o755)
    for _ in range(3):
        with pytest.raises(SupervisionError, match=f"cannot ask {python} what it needs in a sandbox"):
            sandbox.visible(str(python))
    assert asked.read_text() == "x\n"
    monkeypatch.setattr(sandbox, "_mute", {})
    with pytest.raises(SupervisionError):
        sandbox.visible(str(python))
    python.write_text("#!/bin/sh\necho '[\"/usr\"]'\n")
    monkeypatch.setattr(sandbox, "_mute", {})
    assert "/usr" in sandbox.visible(str(python))["system"]


# -- attestation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confinement", "said"),
    [
        (Confinement(), "it may gain privileges (NoNewPrivs 0), which level process forbids"),
        (
            Confinement(level="restricted"),
            "it may gain privileges (NoNewPrivs 0), which level restricted forbids",
        ),
    ],
)
def test_a_process_without_walls_is_told_apart(confinement: Confinement, said: str) -> None:
    assert attestation.fault(os.getpid(), confinement) == said


def in_child(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}\nprint('.', flush=True)\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


PRIVS = "from mcp_broker.confine import privileges, seccomp; privileges.gain_no_more(); "
FILTER = "seccomp.install(seccomp.program(seccomp.Policy())); "


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "confinement", "said"),
    [
        (PRIVS, Confinement(), ""),
        (PRIVS, Confinement(level="restricted"), "no filter of system calls holds it (Seccomp 0)"),
        (PRIVS + FILTER, Confinement(level="restricted", uid=4), "and was to be uid 4"),
        (
            PRIVS + FILTER,
            Confinement(level="restricted", own_mounts=True),
            "our mnt namespace|it has capabilities",
        ),
    ],
)
def test_what_is_missing_is_named(code: str, confinement: Confinement, said: str) -> None:
    with in_child(code) as child:
        assert child.stdout is not None
        child.stdout.readline()
        fault = attestation.fault(child.pid, confinement)
        assert any(part in fault for part in said.split("|"))
        assert bool(fault) is bool(said)
        child.kill()


def test_a_process_that_is_gone_is_somebody_elses_news() -> None:
    with subprocess.Popen(["/bin/true"]) as child:
        child.wait()
    assert attestation.fault(child.pid, Confinement()) == ""


@pytest.mark.process
@pytest.mark.parametrize("confinement", [Confinement(), Confinement(level="restricted", own_mounts=True)])
def test_a_process_that_has_ended_and_waits_to_be_reaped_lacks_nothing(confinement: Confinement) -> None:
    with subprocess.Popen(["/bin/true"]) as child:
        wait_for(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, what="its end")
        assert attestation.fault(child.pid, confinement) == ""


def test_leases_are_names_that_go_with_their_holder() -> None:
    lease = Uids(FIRST + 20, 1).lease()
    other = socket.socket(socket.AF_UNIX)
    with pytest.raises(OSError, match="in use"):
        other.bind(f"\0mcp-broker-uid-{lease.uid}")
    lease.release()
    other.bind(f"\0mcp-broker-uid-{lease.uid}")
    other.close()
