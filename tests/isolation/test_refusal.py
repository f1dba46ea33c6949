"""A level that this machine does not have: refused with the primitive and its errno, never lowered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcp_broker import errors, proctable
from mcp_broker.config import PoolTable
from mcp_broker.supervisor.isolation import plan, probe
from mcp_broker.supervisor.isolation.plan import Unattainable
from tests.isolation.conftest import IS_ROOT, ORDINARY
from tests.support.lacking import lack
from tests.support.ordinary import ROOT
from tests.support.running import Running
from tests.support.waiting import wait_for

LACKING = Path(ROOT) / "tests" / "support" / "lacking.py"

# -- decided ------------------------------------------------------------------------------------------


def found(**broken: str) -> dict[str, probe.Probe]:
    """Return what a machine has that lacks these: primitive -> detail."""
    return {
        name: probe.Probe(name, name not in broken, broken.get(name, ""), 1 if name in broken else None, 1.0)
        for name in (*probe.PRIMITIVES, "sandbox")
    }


def pool(**keys: Any) -> PoolTable:
    return PoolTable(module="m", **{"isolation": "restricted", **keys})


def test_root_gets_a_uid_a_file_system_and_an_address_of_its_own() -> None:
    expected = plan.Walls("restricted", "none", own_uid=True, own_mounts=True, own_endpoint=True)
    assert plan.walls(pool(), found(), is_root=True) == expected


def test_an_ordinary_user_gets_what_landlock_can() -> None:
    walls = plan.walls(pool(), found(own_uid="EPERM", own_mounts="EPERM"), is_root=False)
    assert walls == plan.Walls("restricted", "none")


def test_root_without_mounts_is_confined_as_an_ordinary_user_but_for_the_uid() -> None:
    walls = plan.walls(pool(), found(own_mounts="unshare: EPERM"), is_root=True)
    assert walls == plan.Walls("restricted", "none", own_uid=True)


def test_an_old_landlock_suffices_where_a_network_of_its_own_can_be_had() -> None:
    old = found(landlock_scopes="ABI 1", landlock_ports="ABI 1")
    assert plan.walls(pool(), old, is_root=True).own_network
    with pytest.raises(Unattainable, match="landlock_scopes: ABI 1"):
        plan.walls(pool(network="full"), old, is_root=True)
    with pytest.raises(Unattainable, match="landlock_scopes: ABI 1"):
        plan.walls(pool(), old, is_root=False)


def test_a_loopback_of_its_own_needs_a_network_of_its_own() -> None:
    assert plan.walls(pool(network="loopback"), found(), is_root=True).own_network
    ordinary = found(own_mounts="unshare: EPERM", own_network="unshare: EPERM")
    with pytest.raises(Unattainable, match="with network = 'loopback' cannot be had here: own_mounts"):
        plan.walls(pool(network="loopback"), ordinary, is_root=False)


@pytest.mark.parametrize("primitive", plan.RESTRICTED)
@pytest.mark.parametrize("is_root", [True, False])
def test_what_restricted_cannot_do_without_is_named(primitive: str, *, is_root: bool) -> None:
    with pytest.raises(Unattainable) as refused:
        plan.walls(pool(), found(**{primitive: "step: EPERM (Operation not permitted)"}), is_root=is_root)
    said = (
        f"isolation level restricted cannot be had here: {primitive}: step: EPERM (Operation not permitted)"
    )
    assert str(refused.value).startswith(said)
    assert refused.value.details["errno"] == 1


@pytest.mark.parametrize("primitive", plan.SANDBOXED)
@pytest.mark.parametrize("is_root", [True, False])
def test_what_sandboxed_cannot_do_without_is_named(primitive: str, *, is_root: bool) -> None:
    broken = found(**{primitive: "bwrap: No permissions to create new namespace"})
    with pytest.raises(Unattainable, match=f"level sandboxed cannot be had here: {primitive}: bwrap: No"):
        plan.walls(pool(isolation="sandboxed"), broken, is_root=is_root)


def test_a_sandbox_has_everything_of_its_own_and_a_uid_where_root_makes_it() -> None:
    walls = plan.walls(pool(isolation="sandboxed"), found(), is_root=True)
    expected = plan.Walls("sandboxed", "none", own_mounts=True, own_network=True, own_endpoint=True)
    assert walls == replace(expected, own_uid=True)
    assert plan.walls(pool(isolation="sandboxed"), found(own_uid="EPERM"), is_root=False) == expected
    full = plan.walls(pool(isolation="sandboxed", network="full"), found(), is_root=False)
    assert (full.network, full.own_network) == ("full", False)


def test_auto_takes_the_best_that_works_and_says_why_it_is_not_better() -> None:
    best = plan.walls(pool(isolation="auto"), found(), is_root=False)
    assert (best.level, best.shortfall) == ("sandboxed", "")
    middle = plan.walls(pool(isolation="auto"), found(sandbox="bwrap: not allowed"), is_root=False)
    assert middle.level == "restricted"
    assert middle.shortfall.startswith("isolation level sandboxed cannot be had here: sandbox: bwrap: not")
    lower = plan.walls(pool(isolation="auto"), found(seccomp="EINVAL"), is_root=False)
    assert (lower.level, lower.network) == ("process", "full")
    assert lower.shortfall.startswith("isolation level restricted cannot be had here: seccomp: EINVAL")
    with pytest.raises(Unattainable, match="level process cannot be had here: no_new_privs"):
        plan.walls(pool(isolation="auto"), found(no_new_privs="EINVAL"), is_root=False)


# -- probed -------------------------------------------------------------------------------------------


@pytest.fixture
def probed(tmp_path: Path) -> Any:
    """Probe a machine that lacks something, in a process of its own."""

    def run(**lacks: str) -> dict[str, probe.Probe]:
        file = tmp_path / "found"
        child = os.fork()
        if child == 0:
            try:
                lack(lacks)
                told = {name: [one.works, str(one), one.errno] for name, one in probe.probe().items()}
                file.write_text(json.dumps(told))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        return {
            name: probe.Probe(name, works, said.partition(": ")[2], number, 0.0)
            for name, (works, said, number) in json.loads(file.read_text()).items()
        }

    return run


@pytest.mark.parametrize("how", ["ENOSYS", "EOPNOTSUPP", "EPERM"])
def test_a_machine_without_landlock_is_found_out(probed: Any, how: str) -> None:
    seen = probed(landlock=how)
    for name in ("landlock", "landlock_ports", "landlock_scopes"):
        assert not seen[name].works
        assert f"landlock_create_ruleset: {how}" in str(seen[name])
    assert seen["seccomp"].works


def test_descriptors_are_closed_one_by_one_on_a_kernel_that_cannot_close_a_range(probed: Any) -> None:
    assert probed(close_range="ENOSYS")["descriptors"].works
    assert "close_range: EPERM" in str(probed(close_range="EPERM")["descriptors"])


def test_a_machine_without_filters_is_found_out(probed: Any) -> None:
    seen = probed(seccomp="EINVAL")
    assert not seen["seccomp"].works
    assert "seccomp: EINVAL" in str(seen["seccomp"])


@pytest.mark.skipif(not IS_ROOT, reason="who is not root is refused anyway; see the next test")
@pytest.mark.parametrize(
    ("lacks", "primitive", "said"),
    [("mount", "own_mounts", "unshare: EPERM"), ("uid", "own_uid", "setresgid")],
)
def test_a_root_that_may_not_is_found_out(probed: Any, lacks: str, primitive: str, said: str) -> None:
    seen = probed(**{lacks: "EPERM"})
    assert not seen[primitive].works
    assert said in str(seen[primitive])


@pytest.mark.skipif(IS_ROOT, reason="for ordinary users")
def test_an_ordinary_user_has_no_uid_and_no_mounts_to_give() -> None:
    seen = probe.probe()
    assert [seen[name].works for name in ("own_uid", "own_mounts", "own_network")] == [False] * 3


def test_everything_that_works_is_remembered_and_the_rest_is_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "probes.json"
    broken = True

    def work() -> str:
        return "ABI 9"

    def fail() -> str:
        if broken:
            raise OSError(1, "not today")
        return ""

    primitives = {"good": work, "bad": fail}
    first = probe.remembered(file, primitives)
    assert (first["good"].works, first["bad"].works, first["bad"].errno) == (True, False, 1)
    broken = False
    second = probe.remembered(file, primitives)
    assert second["good"] == first["good"], "not tried again"
    assert second["bad"].works
    file.write_text(file.read_text().replace(proctable.boot_id(), "another boot"))
    assert probe.remembered(file, primitives)["good"].detail == "ABI 9"


def test_a_probe_that_dies_or_hangs_is_one_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_PATIENCE_S", 0.1)

    def hang() -> str:
        time.sleep(60)
        return ""

    def break_down() -> str:
        raise ValueError("a bug of ours")

    assert probe.attempt("stuck", hang).detail == "its child ended with -9"
    assert probe.attempt("wrong", break_down).detail == "a bug of ours"


# -- refused ------------------------------------------------------------------------------------------

CONFIG = """
[pools.high]
module = "mcp_broker_workers.text"
isolation = "restricted"

[pools.best]
module = "mcp_broker_workers.sequence"
isolation = "auto"

[pools.low]
module = "mcp_broker_workers.echo"
"""


@pytest.fixture
def refused(tmp_path: Path) -> Iterator[Running]:
    running = Running(
        tmp_path,
        config=CONFIG,
        prefix=(sys.executable, str(LACKING), "landlock=EOPNOTSUPP", "--"),
        ready=False,
    )
    yield running
    running.stop()


@pytest.mark.process
@pytest.mark.slow
def test_a_pool_whose_level_cannot_be_had_fails_with_the_reason_and_the_others_serve(
    refused: Running,
) -> None:
    def settled() -> bool:
        states = {one["name"]: one["state"] for one in refused.status()["pools"]}
        return states == {"high": "failed", "best": "ready", "low": "ready"}

    wait_for(
        lambda: refused.profile.exists() and refused.command("status").returncode in {0, 1}, what="status"
    )
    wait_for(settled, what="every pool having settled")
    answer = refused.command("status")
    assert answer.returncode == 1
    reason = (
        "isolation level restricted cannot be had here: landlock: landlock_create_ruleset:"
        " EOPNOTSUPP (Operation not supported)"
    )
    high = next(one for one in refused.status()["pools"] if one["name"] == "high")
    assert high["reason"].startswith(reason)
    assert high["workers"] == []
    assert reason in " ".join((refused.folder / "start.log").read_text().split())
    with refused.client() as client:
        assert client.call("echo.echo", {"value": 7}) == 7
        assert client.call("sequence.translate", {"sequence": "ATG"}) == "M"
        with pytest.raises(errors.CallError, match="there is no tool text"):
            client.call("text.word_count", {"text": "a"}, timeout_s=1)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(not IS_ROOT, reason="only root drops a uid")
@pytest.mark.skipif(
    os.access("/", os.X_OK) and not sys.base_prefix.startswith("/root"), reason="all can reach it"
)
def test_an_interpreter_that_the_uid_cannot_reach_is_named_where_mounts_are_refused(tmp_path: Path) -> None:
    running = Running(
        tmp_path,
        config='[pools.high]\nmodule = "mcp_broker_workers.text"\nisolation = "restricted"\n',
        prefix=(sys.executable, str(LACKING), "mount=EPERM", "--"),
        ready=False,
    )
    try:
        log = tmp_path / "start.log"
        wait_for(lambda: "failed:" in log.read_text(), what="the pool having failed")
        said = " ".join(log.read_text().split())
        assert "cannot be confined at level restricted" in said
        assert "cannot reach it: install Python and the tools where others may read them" in said
    finally:
        running.stop()


def test_the_commands_that_run_as_somebody_else_are_there() -> None:
    subprocess.run([sys.executable, str(LACKING), "--", "/bin/true"], check=True)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("user", ["root", "ordinary"])
def test_without_user_namespaces_sandboxed_is_refused_in_the_programs_words_and_auto_says_what_it_took(
    user: str, tmp_path: Path
) -> None:
    if user == "root" and not IS_ROOT:
        pytest.skip("what root gets is tried by root only")
    ordinary = (sys.executable, str(ORDINARY), str(tmp_path)) if IS_ROOT and user == "ordinary" else ()
    running = Running(
        tmp_path,
        config=CONFIG.replace('"restricted"', '"sandboxed"'),
        prefix=(*ordinary, sys.executable, str(LACKING), "user_namespaces=EPERM", "--"),
        ready=False,
    )
    try:
        log = tmp_path / "start.log"
        wait_for(lambda: "failed:" in log.read_text(), what="the pool having failed")
        wait_for(
            lambda: (
                {one["name"]: one["state"] for one in running.status()["pools"]}
                == {"high": "failed", "best": "ready", "low": "ready"}
            ),
            what="every pool having settled",
        )
        high, best = (one for one in running.status()["pools"] if one["name"] in {"high", "best"})
        high, best = (high, best) if high["name"] == "high" else (best, high)
        said = {"root": "unshare (user namespace): EPERM", "ordinary": "bwrap: No permissions to creat"}[user]
        assert high["reason"].startswith(f"isolation level sandboxed cannot be had here: sandbox: {said}")
        assert high["workers"] == []
        (worker,) = best["workers"]
        assert worker["isolation"] == "restricted"
        assert worker["isolation_note"] == high["reason"]
    finally:
        running.stop()
