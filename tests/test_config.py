"""Configuration: what is read, what is refused, and how a refusal reads."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from mcp_broker import config, limits
from mcp_broker.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"


def refusal(text: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as refused:
        config.parse(text, environ=environ)
    return str(refused.value)


def test_without_a_file_the_shipped_tools_are_served_on_free_loopback_ports() -> None:
    loaded = config.load(environ={})
    assert list(loaded.pools) == ["echo", "text", "sql", "sequence"]
    assert {pool.module for pool in loaded.pools.values()} == {
        f"mcp_broker_workers.{n}" for n in loaded.pools
    }
    assert (loaded.broker.host, loaded.broker.client_port, loaded.broker.worker_port) == ("127.0.0.1", 0, 0)
    assert loaded.limits.drain_s == limits.DRAIN_S
    assert Path(loaded.pools["sql"].options["folder"]).name == "demo_data"
    assert config.skipped_pools(loaded) == ()


def test_shipped_pools_whose_packages_are_missing_are_left_out_and_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "duckdb" else found(name))
    loaded = config.load(environ={})
    assert list(loaded.pools) == ["echo", "text", "sequence"]
    assert config.skipped_pools(loaded) == ("sql",)
    assert config.skipped_pools(config.parse('[pools.mine]\nmodule = "mine"')) == ()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_example_loads(path: Path) -> None:
    assert config.load(path, environ={}).pools


def test_the_example_of_the_default_is_the_default() -> None:
    written, built_in = config.load(CONFIGS / "default.toml", environ={}), config.load(environ={})
    assert written.model_copy(update={"pools": {}}) == built_in.model_copy(update={"pools": {}})
    assert {n: p.module for n, p in written.pools.items()} == {n: p.module for n, p in built_in.pools.items()}


def test_a_pool_in_the_file_replaces_the_shipped_ones() -> None:
    assert list(config.parse('[pools.mine]\nmodule = "mine"').pools) == ["mine"]


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    file = tmp_path / "broker.toml"
    file.write_text('[pools.mine]\nmodule = "mine"\npath = ["tools"]\npython = "bin/python"')
    pool = config.load(file, environ={}).pools["mine"]
    assert pool.path == (str(tmp_path / "tools"),)
    assert pool.python == str(tmp_path / "bin" / "python"), "a link to an interpreter is an environment: kept"


def test_values_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        config.parse("").broker.client_port = 1  # type: ignore[misc]  # that it may not is the point


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[broker]\nclient_prot = 1",
            "line 2: unknown key 'client_prot' in [broker]; did you mean 'client_port'?",
        ),
        (
            "[pools.mine]\nmodule = 'm'\nmemory_mb = 60",
            "line 3: unknown key 'memory_mb' in [pools.mine]; it belongs in [pools.mine.limits]",
        ),
        ("[brokr]\nhost = 'x'", "line 1: unknown key 'brokr' at the top; did you mean 'broker'?"),
        (
            "\n[pools.mine]\nmodule = 'mine'\noption = {}",
            "line 4: unknown key 'option' in [pools.mine]; did you mean 'options'?",
        ),
        ("[observe]\nxyzzy = 1", "unknown key 'xyzzy' in [observe]; known: log_format, log_level"),
        ("[auth]\nissuer = 'x'", "line 1: unknown key 'auth' at the top; known: broker, limits,"),
        ("[broker]\nclient_port = 70000", "line 2: broker.client_port: Input should be less than"),
        ("[broker]\nclient_port = '7000'", "line 2: broker.client_port: Input should be a valid integer"),
        ("[pools.mine]\nmin = 1", "line 1: pools.mine.module: Field required"),
        ("[pools.mine]\nmodule = 'a; b'", "line 2: pools.mine.module: String should match"),
        ("[pools.mine]\nmodule = 'm'\nmin = 3\nmax = 2", "line 1: pools.mine: max = 2 is below min = 3"),
        ("[pools.Mine]\nmodule = 'm'", "line 1: 'Mine' is no name for a pool"),
        ("broker = 3", "line 1: 'broker' must be a table"),
        ("pools.mine = 3", "line 1: 'pools.mine' must be a table"),
        ("[limits]\nrate_per_s = 0", "line 2: limits.rate_per_s: Input should be greater than 0"),
        ("[limits]\nburst = 3", "line 1: limits: burst says nothing without rate_per_s"),
        ("[pools.m]\nmodule = 'm'\nburst = 3", "line 1: pools.m: burst says nothing without rate_per_s"),
        ("[limits]\ndrain_s = -1", "line 2: limits.drain_s: Input should be greater than or equal to 0"),
        (
            "[pools.m]\nmodule = 'm'\npython = '/nowhere/python'",
            "line 3: the interpreter /nowhere/python of pool 'm'",
        ),
        ("[broker", "is not TOML"),
    ],
)
def test_a_wrong_configuration_is_refused_with_place_and_mend(text: str, said: str) -> None:
    assert said in refusal(text)


@pytest.mark.parametrize(
    "row", ["read = ['/data']", "write = ['/data']", "network = 'none'", "network = 'loopback'"]
)
def test_a_bound_that_level_process_cannot_hold_is_refused(row: str) -> None:
    said = refusal(f"[pools.mine]\nmodule = 'mine'\n{row}")
    assert "cannot be enforced at isolation = 'process'; use 'restricted'" in said
    config.parse(f"[pools.mine]\nmodule = 'mine'\nisolation = 'restricted'\n{row}")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("isolation = 'strict'", "pools.mine.isolation: Input should be 'process'"),
        ("network = 'some'", "pools.mine.network: Input should be 'none'"),
        ("env = { MCPB_WORKER = 'x' }", "env may not set 'MCPB_WORKER'"),
        ("secrets = { 'a-b' = 'file' }", "pools.mine.secrets.a-b"),
    ],
)
def test_what_confines_is_checked_by_value(row: str, said: str) -> None:
    assert said in refusal(f"[pools.mine]\nmodule = 'mine'\n{row}")


def test_what_a_pool_may_read_write_and_keep_secret_is_relative_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(
        "[pools.m]\nmodule = 'm'\nisolation = 'restricted'\nread = ['in', '/data/']\nwrite = ['../out']\n"
        "secrets = { key = 'keys/key' }"
    )
    pool = config.load(file, environ={}).pools["m"]
    assert (pool.read, pool.write) == ((str(tmp_path / "in"), "/data"), (str(tmp_path.parent / "out"),))
    assert pool.secrets == {"key": str(tmp_path / "keys" / "key")}


def test_a_worker_has_limits_without_a_word_and_may_have_up_to_the_most() -> None:
    usual = config.parse("[pools.m]\nmodule = 'm'").pools["m"].limits
    assert (usual.memory_mb, usual.cpu_s, usual.open_files, usual.connections) == (100, 30.0, 50, 10)
    assert (usual.processes, usual.scratch_mb) == (limits.PROCESSES, limits.SCRATCH_MB)
    assert (usual.adaptive, usual.recycle_calls, usual.recycle_rss_mb, usual.recycle_age_s) == (
        False, None, None, None,
    )  # fmt: skip
    most = config.parse(
        "[pools.m]\nmodule = 'm'\n[pools.m.limits]\nmemory_mb = 500\ncpu_s = 120\nopen_files = 200\nconnections = 50"
    )
    assert most.pools["m"].limits.cpu_s == 120.0


@pytest.mark.parametrize("row", ["memory_mb = 501", "cpu_s = 120.5", "open_files = 201", "connections = 51"])
def test_more_than_the_most_is_refused(row: str) -> None:
    said = refusal(f"[pools.mine]\nmodule = 'mine'\n[pools.mine.limits]\n{row}")
    assert "line 4: pools.mine.limits." in said
    assert "less than or equal to" in said


def test_an_unknown_limit_names_the_nearest_one() -> None:
    said = refusal("[pools.mine]\nmodule = 'mine'\n[pools.mine.limits]\nmemory = 5")
    assert "unknown key 'memory' in [pools.mine.limits]; did you mean 'memory_mb'?" in said
    assert "must be a table" in refusal("[pools.mine]\nmodule = 'mine'\nlimits = 5")


def test_what_this_version_does_is_accepted() -> None:
    pool = config.parse("[pools.m]\nmodule = 'm'\nisolation = 'process'\nmin = 2\nmax = 2").pools["m"]
    assert (pool.min, pool.max) == (2, 2)


def test_the_environment_overrides_single_keys() -> None:
    environ = {
        "MCP_BROKER_BROKER__CLIENT_PORT": "7000",
        "MCP_BROKER_OBSERVE__LOG_LEVEL": "debug",
        "MCP_BROKER_LIMITS__DRAIN_S": "2",
        "MCP_BROKER_STATE_DIR": "/else/where",
        "MCP_BROKER_PROFILE": "/a/profile.toml",
    }
    loaded = config.parse("[broker]\nclient_port = 1\nworker_port = 2", environ=environ)
    assert (loaded.broker.client_port, loaded.broker.worker_port) == (7000, 2)
    assert (loaded.observe.log_level, loaded.limits.drain_s) == ("debug", 2.0)


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        (
            "MCP_BROKER_BROKER__PORT",
            "the environment (MCP_BROKER_BROKER__PORT): unknown key 'port' in [broker]",
        ),
        ("MCP_BROKER_POOLS__X", "names no table"),
    ],
)
def test_an_unknown_variable_is_refused_by_name(variable: str, said: str) -> None:
    assert said in refusal("", {variable: "1"})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none\.toml: No such file"):
        config.load(tmp_path / "none.toml")


def test_a_fault_names_its_file(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("[broker]\nhots = 'x'")
    with pytest.raises(ConfigError, match=r"broker\.toml, line 2: unknown key 'hots'"):
        config.load(file, environ={})
