"""What bubblewrap is told: read as the list that it is."""

from __future__ import annotations

from typing import Any

from mcp_broker.supervisor.launch.bubblewrap import Sandbox, arguments, packed


def told(**changes: Any) -> list[str]:
    usual: dict[str, Any] = {
        "system": ("/usr", "/srv/env/lib", "/srv/env"),
        "links": {"/lib": "usr/lib"},
        "scratch": "/var/run/w-1",
        "endpoint_folder": "/var/run/w-1/.broker",
        "environment": {"HOME": "/var/run/w-1"},
    }
    return arguments(Sandbox(**{**usual, **changes}))


def has(words: list[str], *part: str) -> bool:
    return any(tuple(words[at : at + len(part)]) == part for at in range(len(words)))


def place(words: list[str], *part: str) -> int:
    return next(at for at in range(len(words)) if tuple(words[at : at + len(part)]) == part)


def test_every_namespace_is_its_own_and_none_can_be_made_in_it() -> None:
    words = told()
    unshared = ("user", "pid", "ipc", "uts", "net", "cgroup-try")
    assert {f"--unshare-{name}" for name in unshared} <= set(words)
    assert {"--disable-userns", "--die-with-parent", "--new-session", "--clearenv", "--as-pid-1"} <= set(
        words
    )
    assert has(words, "--cap-drop", "ALL")
    assert "--cap-add" not in words


def test_full_network_is_the_hosts() -> None:
    assert "--unshare-net" not in told(has_network=True)


def test_in_a_namespace_of_roots_the_first_process_keeps_what_it_needs_to_become_nobody() -> None:
    words = told(user_namespace=7)
    assert has(words, "--userns", "7")
    assert "--unshare-user" not in words
    added = [words[at + 1] for at, word in enumerate(words) if word == "--cap-add"]
    assert added == ["CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_CHOWN"]


def test_only_what_it_needs_of_the_host_is_seen_and_cannot_be_written() -> None:
    words = told(read=("/data",))
    shown = {words[at + 1] for at, word in enumerate(words) if word == "--ro-bind"}
    # the inner of two folders is seen with the outer
    assert shown == {"/usr", "/srv/env", "/data", "/var/run/w-1/.broker"}
    assert [words[at + 1] for at, word in enumerate(words) if word == "--bind"] == ["/var/run/w-1"]
    assert has(words, "--ro-bind", "/var/run/w-1/.broker", "/run/broker")


def test_folders_that_may_be_written_lie_upon_those_that_may_be_read() -> None:
    words = told(read=("/data",), write=("/data/out",))
    assert place(words, "--ro-bind", "/data") < place(words, "--bind", "/data/out")


def test_a_closed_folder_is_covered_in_what_is_open_and_the_scratch_in_it_is_not() -> None:
    words = told(read=("/var",), hidden=("/var/run", "/home/keys"))
    covered = place(words, "--tmpfs", "/var/run")
    assert place(words, "--ro-bind", "/var") < covered < place(words, "--bind", "/var/run/w-1")
    assert not has(words, "--tmpfs", "/home/keys"), "nothing shows it"


def test_folders_on_the_way_can_be_passed_by_the_workers_uid() -> None:
    # bubblewrap itself makes them 0700
    words = told()
    for folder, *below in (
        ("/srv", "--ro-bind", "/srv/env"),
        ("/var", "--bind", "/var/run/w-1"),
        ("/var/run", "--bind", "/var/run/w-1"),
    ):
        assert place(words, "--dir", folder) < place(words, *below)
    assert not has(words, "--dir", "/usr")


def test_what_is_in_memory_has_a_size_and_the_rest_cannot_be_written() -> None:
    words = told(scratch_mb=5)
    for path, mode in (("/tmp", "1777"), ("/dev/shm", "1777"), ("/var/run/w-1", "0700")):
        assert has(words, "--size", str(5 * 1024 * 1024), "--perms", mode, "--tmpfs", path)
    assert words[-4:] == ["--remount-ro", "/dev", "--remount-ro", "/"]
    assert place(words, "--dev", "/dev") < place(words, "--tmpfs", "/dev/shm")


def test_a_checkout_below_the_folder_for_temporary_files_is_seen_there() -> None:
    words = told(system=("/tmp", "/tmp/checkout"))
    assert place(words, "--tmpfs", "/tmp") < place(words, "--ro-bind", "/tmp/checkout")
    assert not has(words, "--ro-bind", "/tmp", "/tmp")


def test_environment_goes_by_options_that_no_process_list_shows() -> None:
    words = told(environment={"KEY": "a value"})
    assert has(words, "--setenv", "KEY", "a value")
    assert packed(["--setenv", "KEY", "a value"]) == b"--setenv\0KEY\0a value\0"
