"""The commands around a broker's life: start, stop, doctor, credentials."""

from __future__ import annotations

import io
import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mcp_broker.auth.credentials import Authority
from mcp_broker.cli import checkup, output, root, settings, start
from mcp_broker.errors import ConfigError
from mcp_broker.supervisor import events
from mcp_broker.wire.node import Certificate

if TYPE_CHECKING:
    from tests.cli.conftest import Run

ENDPOINT = "tcp://127.0.0.1:9"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory in which a broker has run once."""
    folder = tmp_path / "used"
    Authority.open(folder).ensure_default([ENDPOINT])
    return folder


# -- what can be printed ---------------------------------------------------------------------------------


def test_what_standard_output_cannot_spell_is_printed_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="iso-8859-1"))
    assert root.run(["--version"]) == 0
    output.line("a \u2192 \udcff")
    assert written.getvalue().endswith(b"a \\u2192 \\udcff\n")


# -- where things are -------------------------------------------------------------------------------------


def test_profile_is_found_by_option_directory_variable_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = settings.Settings()
    assert chosen.profile == tmp_path / "state" / "clients" / "default.toml"
    monkeypatch.setenv("MCP_BROKER_PROFILE", str(tmp_path / "named.toml"))
    assert chosen.profile == tmp_path / "named.toml"
    chosen.state_dir_given = str(tmp_path / "other")
    assert chosen.profile == tmp_path / "other" / "clients" / "default.toml"
    chosen.profile_given = str(tmp_path / "given.toml")
    assert chosen.profile == tmp_path / "given.toml"


def test_command_to_copy_repeats_a_state_directory_that_is_not_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    assert shlex.split(settings.Settings().again("status"))[-2:] == ["--state-dir", str(tmp_path / "state")]
    monkeypatch.delenv("MCP_BROKER_STATE_DIR")
    assert settings.Settings().again("status").endswith("mcp-broker status")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(
            (command, "--profile")
            for command in ("ports", "dead-letters show 5f1d", "tools NAME", "call t.a '{}'")
        ),
        *((command, "--state-dir") for command in ("start", "stop --drain 0", "credentials issue NAME")),
        *((command, "") for command in ("demo", "completion bash")),
    ],
)
def test_command_to_copy_gets_the_option_that_it_takes(tmp_path: Path, command: str, option: str) -> None:
    chosen = settings.Settings(
        profile_given=str(tmp_path / "a b.toml"), state_dir_given=str(tmp_path / "other")
    )
    value = {"--profile": str(tmp_path / "a b.toml"), "--state-dir": str(tmp_path / "other")}
    words = shlex.split(chosen.again(command))
    assert words[words.index(command.split(maxsplit=1)[0]) :] == [
        *shlex.split(command),
        *([option, value[option]] if option else []),
    ]


# -- not reachable, refused -----------------------------------------------------------------------------------


def test_no_profile_is_not_reachable(run: Run, tmp_path: Path) -> None:
    done = run("status")
    assert done.code == 4
    assert str(tmp_path / "state" / "clients" / "default.toml") in done.err
    assert "start" in done.err.splitlines()[-1]


def test_nobody_at_the_address_is_not_reachable(run: Run, state: Path) -> None:
    done = run("call", "add", "{}", "--state-dir", str(state))
    assert done.code == 4
    assert ENDPOINT in done.err
    assert "start" in done.err.splitlines()[-1]
    assert len(done.err.splitlines()) <= 3


def test_profile_that_others_may_read_is_refused(run: Run, state: Path) -> None:
    profile = state / "clients" / "default.toml"
    profile.chmod(0o644)
    done = run("call", "add", "{}", "--profile", str(profile))
    assert done.code == 3
    assert str(profile) in done.err
    assert "chmod" in done.err
    assert "secret" not in done.err.replace("secret_key", "")


def test_broken_profile_is_refused(run: Run, state: Path) -> None:
    profile = state / "clients" / "default.toml"
    profile.write_text("version = 1\n")
    assert run("tools", "--state-dir", str(state)).code == 3


# -- start ----------------------------------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], pools: list[str], *happened: events.Event) -> list[str]:
    announcer = start.Announcer(settings.Settings(), pools)
    for event in happened:
        announcer.tell(event)
    return capsys.readouterr().out.splitlines()


def serving(state_dir: Path, pools: tuple[str, ...] = ("text",), epoch: int = 1) -> events.Serving:
    return events.Serving("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", 10, 11, epoch, pools, state_dir)


def test_start_prints_addresses_tools_and_next_steps(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ready = events.PoolReady("text", 1, ("text.word_count",))
    lines = told(capsys, ["text"], serving(tmp_path), ready)
    text = "\n".join(lines)
    for fact in ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", "default.toml", "text.word_count", "pid 10"):
        assert fact in text
    commands = [line.split()[1] for line in lines if line.startswith("  ") and "--state-dir" in line]
    assert commands == ["tools", "call", "status", "why", "stop"]


def test_start_tells_a_failed_pool_and_goes_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = told(
        capsys,
        ["text", "sql"],
        serving(tmp_path, ("text", "sql")),
        events.PoolFailed("sql", "No module named\n 'duckdb'"),
        events.PoolReady("text", 1, ("mine.tool",)),
    )
    assert any("failed: No module named 'duckdb'" in line for line in lines)
    assert any("1 failed" in line for line in lines)
    assert any("tools mine.tool" in line for line in lines)


def test_start_tells_a_death_in_one_line_with_its_cause(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    certificate = Certificate(
        worker_id="text-1", pool="text", pid=7, cause="killed by SIGKILL", kind="signal"
    )
    lines = told(
        capsys,
        ["text"],
        serving(tmp_path),
        events.PoolReady("text", 1, ("text.word_count",)),
        events.WorkerDied(certificate),
        events.PoolReady("text", 1, ("text.word_count",)),
        events.BrokerDied(11, "killed by SIGKILL"),
        serving(tmp_path, epoch=2),
        events.Draining(10.0),
        events.Stopped(),
    )
    later = [line[9:] for line in lines[lines.index("Ctrl-C here ends it too.") + 1 :]]
    assert later[0] == "worker text-1 (pid 7) died: killed by SIGKILL"
    assert later[1].startswith("pool text: 1 worker ready")
    assert "it is started again" in later[2]
    assert later[3] == "the broker is back, pid 11"
    assert later[5] == "stopped"
    assert sum("Next, in another shell" in line for line in lines) == 1


def test_start_without_pools_is_ready_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert any("Next, in another shell" in line for line in told(capsys, [], serving(tmp_path, ())))


def test_start_names_what_is_wrong_with_the_configuration(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("[broker]\nhots = '::1'\n")
    done = run("start", "--config", str(file))
    assert done.code == 1
    assert "did you mean 'host'" in done.err
    assert run("start", "--config", str(tmp_path / "none.toml")).code == 1


# -- stop -----------------------------------------------------------------------------------------------------


def test_stop_without_a_broker_says_so_and_is_done(run: Run, tmp_path: Path) -> None:
    done = run("stop", "--state-dir", str(tmp_path))
    assert done.code == 0
    assert "nothing runs" in done.err
    assert json.loads(run("stop", "--json").out) == {"stopped": False, "pid": None}


def test_stop_does_not_believe_a_lock_file_that_nobody_holds(run: Run, tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(f"{os.getpid()}\n")
    assert "nothing runs" in run("stop", "--state-dir", str(tmp_path)).err


HOLDER = """
import signal, sys
from pathlib import Path
from mcp_broker.supervisor.lock import Lock
stubborn = sys.argv[2] == "stubborn"
signal.signal(signal.SIGTERM, (lambda *_: None) if stubborn else (lambda *_: sys.exit(0)))
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
while True:
    signal.pause()
"""


@pytest.mark.process
@pytest.mark.parametrize(("manner", "code"), [("obedient", 0), ("stubborn", 1)])
def test_stop_signals_the_holder_and_waits_for_its_end(
    run: Run, tmp_path: Path, manner: str, code: int
) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path), manner]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            done = run("stop", "--state-dir", str(tmp_path), "--timeout", "0.5" if code else "10")
            assert done.code == code
            assert f"pid {process.pid}" in done.err
            if code == 0:
                assert process.wait(5) == 0
        finally:
            process.kill()


@pytest.mark.process
def test_stop_with_a_deadline_tells_it_again_when_that_is_over(run: Run, tmp_path: Path) -> None:
    twice = HOLDER.replace(
        "(lambda *_: None)", "(lambda *_: signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)))"
    )
    command = [sys.executable, "-c", twice, str(tmp_path), "stubborn"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            done = run("stop", "--state-dir", str(tmp_path), "--drain", "0.2")
            assert (done.code, process.wait(5)) == (0, 0)
        finally:
            process.kill()


# -- doctor ---------------------------------------------------------------------------------------------------


def test_doctor_finds_nothing_wrong_in_a_new_directory(run: Run) -> None:
    done = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.out)["checks"]}
    assert done.code == 0
    assert all(check["level"] != "fail" for check in checks.values())
    assert {"python", "kernel", "libzmq", "encryption", "state dir", "lock", "ports", "profile"} <= set(
        checks
    )
    assert checks["profile"]["level"] == "warn"
    assert "start" in checks["profile"]["mend"]


def test_doctor_fails_on_open_modes_and_names_the_mend(run: Run, state: Path) -> None:
    (state / "clients" / "default.toml").chmod(0o644)
    done = run("doctor", "--state-dir", str(state))
    assert done.code == 1
    assert "mend: chmod 600" in done.out
    assert "FAIL  secrets" in done.out
    assert done.err.startswith("failed: ")


def test_doctor_warns_of_a_token_that_ends_soon(run: Run, state: Path) -> None:
    path = Authority.open(state).issue_profile("short", scopes=["*"], ttl_s=3600, endpoints=[ENDPOINT])
    chosen = settings.Settings(profile_given=str(path), state_dir_given=str(state))
    check = checkup.profile(chosen)
    assert check.level == "warn"
    assert "ends in" in check.text


def test_check_that_breaks_is_a_failed_check() -> None:
    def broken(_chosen: settings.Settings) -> checkup.Check:
        raise ZeroDivisionError

    assert checkup.perform(broken, settings.Settings()).level == "fail"


# -- credentials ----------------------------------------------------------------------------------------------


def test_issued_profile_is_private_and_listed_with_its_scope(run: Run, state: Path) -> None:
    done = run(
        *("credentials", "issue", "alice", "--allow", "text.*", "--deny", "text.diff", "--ttl", "12h"),
        *("--clearance", "3", "--state-dir", str(state)),
    )
    path = Path(done.out.strip())
    assert done.code == 0
    assert path == state / "clients" / "alice.toml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listed = run("credentials", "list", "--state-dir", str(state))
    (row,) = [line for line in listed.out.splitlines() if line.startswith("alice")]
    assert "text.* !text.diff" in row
    assert "in 11 h 59 min" in row
    profiles = {
        each["name"]: each
        for each in json.loads(run("credentials", "list", "--json", "--state-dir", str(state)).out)[
            "profiles"
        ]
    }
    assert profiles["alice"]["clearance"] == 3
    assert profiles["default"]["admin"]
    assert "secret" not in json.dumps(profiles)


def test_profile_can_be_written_elsewhere(run: Run, state: Path, tmp_path: Path) -> None:
    target = tmp_path / "bob.toml"
    done = run(
        "credentials",
        "issue",
        "bob",
        "--allow",
        "*",
        "--out",
        str(target),
        "--json",
        "--state-dir",
        str(state),
    )
    assert json.loads(done.out)["path"] == str(target)
    assert target.exists()


def test_existing_profile_is_not_replaced(run: Run, state: Path) -> None:
    arguments = ("credentials", "issue", "bob", "--allow", "*", "--state-dir", str(state))
    assert run(*arguments).code == 0
    done = run(*arguments)
    assert done.code == 1
    assert "already" in done.err


@pytest.mark.parametrize("extra", [["--ttl", "400d"], ["--ttl", "soon"], ["--allow", "TEXT"]])
def test_bad_wish_is_refused_with_the_form(run: Run, state: Path, extra: list[str]) -> None:
    done = run("credentials", "issue", "bob", "--allow", "*", *extra, "--state-dir", str(state))
    assert done.code == 1
    assert "next: " in done.err


def test_issue_without_a_scope_is_a_syntax_error(run: Run, state: Path) -> None:
    assert run("credentials", "issue", "bob", "--state-dir", str(state)).code == 2


def test_credentials_without_a_broker_s_keys_are_not_reachable(run: Run, tmp_path: Path) -> None:
    assert run("credentials", "issue", "bob", "--allow", "*", "--state-dir", str(tmp_path / "no")).code == 4
    assert run("credentials", "list", "--state-dir", str(tmp_path / "no")).code == 4


def test_announcer_is_not_ended_by_a_closed_pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_text: str = "") -> None:
        raise BrokenPipeError

    monkeypatch.setattr(output, "line", broken)
    start.Announcer(settings.Settings(), []).tell(serving(tmp_path))


def test_configured_state_directory_counts_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mcp_broker import config

    configuration = config.parse(f'[state]\ndir = "{tmp_path / "configured"}"\n')
    assert start._state_dir(settings.Settings(), configuration) == tmp_path / "state"
    monkeypatch.delenv("MCP_BROKER_STATE_DIR")
    assert start._state_dir(settings.Settings(), configuration) == tmp_path / "configured"
    with pytest.raises(ConfigError):
        config.parse("x = 1")
