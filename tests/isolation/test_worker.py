"""What a confined worker is, as it and the kernel tell, and what it may use."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tests.isolation.conftest import IS_ROOT, LEVELS, Site
from tests.support.ordinary import UID

pytestmark = [pytest.mark.process, pytest.mark.slow]

each_level = pytest.mark.parametrize("level", LEVELS)


@each_level
def test_no_program_of_a_worker_gains_rights(site: Site, level: str) -> None:
    assert site.whoami(level)["status"]["NoNewPrivs"] == "1"


def test_restricted_workers_of_root_have_a_uid_each_no_group_and_no_capability(site: Site) -> None:
    status = [Path(f"/proc/{pid}/status").read_text() for pid in site.pids["restricted"]]
    rows = [dict(row.split(":\t", 1) for row in text.splitlines() if ":\t" in row) for text in status]
    uids = [set(row["Uid"].split()) | set(row["Gid"].split()) for row in rows]
    assert all(len(ids) == 1 for ids in uids)
    if site.user == "root":
        assert len(set.union(*uids)) == len(rows)
        assert "0" not in set.union(*uids)
        assert {row["CapBnd"].strip("0") for row in rows} == {""}
    elif IS_ROOT:
        assert set.union(*uids) == {str(UID)}
    assert {row["CapEff"].strip("0") for row in rows} == {""}
    assert {row["Seccomp"] for row in rows} == {"2"}
    assert {row["Groups"].strip() for row in rows} == {""}


def test_a_restricted_worker_of_root_sees_no_process_but_its_own(site: Site) -> None:
    others = site.whoami("restricted")["others"]
    assert bool(others) is (site.user != "root")


@each_level
def test_a_worker_lives_in_its_scratch_folder_and_holds_nothing_of_ours(site: Site, level: str) -> None:
    seen = site.whoami(level)
    assert seen["scratch"] == seen["home"] == seen["tmp"] == seen["cwd"]
    assert seen["descriptors"] == []
    assert seen["core"] == 0
    assert site.attempt(level, "write", seen["scratch"]) == "done"


def test_a_restricted_worker_is_the_better_victim_when_memory_ends(site: Site) -> None:
    assert (site.whoami("process")["oom"], site.whoami("restricted")["oom"]) == (0, 500)


@each_level
def test_secrets_reach_the_tools_and_neither_environment_nor_arguments(site: Site, level: str) -> None:
    seen = site.whoami(level)
    assert seen["secrets"] == {"key": "open sesame"}
    assert "open sesame" not in str(seen["environment"]) + str(seen["arguments"])
    for pid in site.pids[level]:
        for place in ("environ", "cmdline"):
            assert b"open sesame" not in Path(f"/proc/{pid}/{place}").read_bytes()


def test_what_a_worker_makes_in_a_folder_belongs_to_the_folders_owner(site: Site) -> None:
    made = site.folder / "out" / "made"
    uid_inside = site.client.call("restricted.make", {"path": str(made)}, timeout_s=10)
    assert made.read_text() == "made"
    assert made.stat().st_uid == made.parent.stat().st_uid
    assert str(uid_inside) in (site.uids if site.user == "root" else {str(uid_inside)})


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other interface is that of 32-bit x86")
def test_another_system_call_interface_kills_who_uses_it(site: Site) -> None:
    assert site.attempt("restricted", "make a foreign system call") == "[Errno 0] killed by 31"


def test_nothing_of_a_shipped_pool_breaks_at_restricted(site: Site) -> None:
    assert site.client.call("text.word_count", {"text": "a b a"}) == {"a": 2, "b": 1}
    assert site.client.call("sequence.translate", {"sequence": "ATGGCC"}) == "MA"
    tables = site.client.call("sql.tables")
    assert {table["name"] for table in tables} >= {"penguins"}
    assert all(table["error"] is None for table in tables)


def test_a_worker_with_a_network_of_its_own_reaches_its_broker_all_the_same(site: Site) -> None:
    if site.user != "root":
        pytest.skip("an ordinary user has a network of his own at level sandboxed only")
    (pid,) = site.pids["text"]
    assert Path(f"/proc/{pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    assert site.client.call("text.word_count", {"text": "a b a"}) == {"a": 2, "b": 1}
