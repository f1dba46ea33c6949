"""Profiles: found, read, refused."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import tomli_w

from mcp_broker.auth import profile as profiles
from mcp_broker.auth.keys import CurvePair, write_secret
from mcp_broker.auth.places import find_profile, state_dir
from mcp_broker.auth.profile import Profile, load_profile, save_profile
from mcp_broker.errors import CredentialError, NotReachable

PAIR = CurvePair.from_secret(b"s" * 32)
OTHER = CurvePair.from_secret(b"o" * 32)
PROFILE = Profile(
    endpoints=("tcp://127.0.0.1:4000", "ipc:///run/b"),
    server_key=OTHER.public,
    keys=PAIR,
    token="a.b.c",
    principal="ada",
    created=datetime(2026, 1, 1, tzinfo=UTC),
    expires=datetime(2026, 1, 31, tzinfo=UTC),
)
CONTENT: dict[str, Any] = {
    "version": 1,
    "principal": "ada",
    "created": PROFILE.created,
    "expires": PROFILE.expires,
    "endpoints": ["tcp://127.0.0.1:4000"],
    "server_key": OTHER.public_z85,
    "public_key": PAIR.public_z85,
    "secret_key": PAIR.secret_z85,
    "token": "a.b.c",
}


def refusal(path: Path) -> CredentialError:
    with pytest.raises(CredentialError) as caught:
        load_profile(path)
    assert PAIR.secret_z85 not in str(caught.value)
    assert caught.value.hint
    return caught.value


def test_saved_profile_comes_back_in_a_file_of_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    save_profile(path, PROFILE)
    assert load_profile(path) == PROFILE
    assert path.stat().st_mode & 0o777 == 0o600


def test_profile_shows_neither_key_nor_token() -> None:
    assert PAIR.secret_z85 not in repr(PROFILE)
    assert repr(PAIR.secret) not in repr(PROFILE)
    assert "a.b.c" not in repr(PROFILE)


def test_missing_profile_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(NotReachable, match="mcp-broker start") as caught:
        load_profile(tmp_path / "none.toml")
    assert caught.value.hint
    assert "mcp-broker start" in caught.value.hint


def test_profile_that_others_may_read_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    save_profile(path, PROFILE)
    path.chmod(0o644)
    assert refusal(path).hint == f"chmod 600 {path}"


def test_link_to_a_profile_is_refused(tmp_path: Path) -> None:
    save_profile(tmp_path / "p.toml", PROFILE)
    (tmp_path / "link.toml").symlink_to(tmp_path / "p.toml")
    assert refusal(tmp_path / "link.toml").details["reason"] == "symlink"


@pytest.mark.parametrize("name", sorted(CONTENT))
def test_missing_key_is_named(tmp_path: Path, name: str) -> None:
    content = {key: value for key, value in CONTENT.items() if key != name}
    write_secret(tmp_path / "p.toml", tomli_w.dumps(content).encode())
    error = refusal(tmp_path / "p.toml")
    assert error.details["key"] == name
    assert f"{name!r} is missing" in str(error)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokn", "a.b.c"),
        ("version", 2),
        ("version", True),
        ("version", "1"),
        ("principal", ""),
        ("principal", 1),
        ("created", "yesterday"),
        ("created", datetime(2026, 1, 1)),  # noqa: DTZ001 (without a zone on purpose)
        ("expires", 1),
        ("endpoints", []),
        ("endpoints", "tcp://127.0.0.1:1"),
        ("endpoints", ["http://127.0.0.1"]),
        ("endpoints", ["tcp://127.0.0.1:1\n"]),
        ("endpoints", ["tcp://"]),
        ("endpoints", [1]),
        ("endpoints", ["tcp://127.0.0.1:1"] * 17),
        ("server_key", ""),
        ("server_key", "a" * 39),
        ("server_key", OTHER.public_z85 + "00000"),
        ("public_key", OTHER.public_z85[:-1] + "\u00e9"),
        ("secret_key", 1),
        ("secret_key", OTHER.secret_z85),
        ("token", ""),
        ("token", "é"),
        ("token", "a" * 8193),
        ("token", ["a"]),
    ],
)
def test_key_at_fault_is_named(tmp_path: Path, name: str, value: object) -> None:
    write_secret(tmp_path / "p.toml", tomli_w.dumps({**CONTENT, name: value}).encode())
    error = refusal(tmp_path / "p.toml")
    assert error.details["key"] == name


@pytest.mark.parametrize("content", [b"\xff", b"version =", b"[", b"version = 1\nversion = 1"])
def test_file_that_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    write_secret(tmp_path / "p.toml", content)
    assert "not TOML" in str(refusal(tmp_path / "p.toml"))


def test_older_profile_is_kept_if_asked(tmp_path: Path) -> None:
    save_profile(tmp_path / "p.toml", PROFILE)
    with pytest.raises(FileExistsError):
        save_profile(tmp_path / "p.toml", PROFILE, replace=False)


def test_state_is_where_the_caller_says_then_the_environment_then_the_platform() -> None:
    env = {"MCP_BROKER_STATE_DIR": "/env"}
    assert state_dir("/said", env) == Path("/said")
    assert state_dir(None, env) == Path("/env")
    for empty in ({}, {"MCP_BROKER_STATE_DIR": ""}):
        assert state_dir(None, empty) == platformdirs.user_state_path("mcp-broker")


def test_profile_is_where_the_caller_says_then_the_environment_then_the_state() -> None:
    env = {"MCP_BROKER_PROFILE": "/env.toml", "MCP_BROKER_STATE_DIR": "/state"}
    assert find_profile(Path("/said.toml"), env) == Path("/said.toml")
    assert find_profile(None, env) == Path("/env.toml")
    assert find_profile(None, {"MCP_BROKER_STATE_DIR": "/state"}) == Path("/state/clients/default.toml")
    assert find_profile(None, {}) == platformdirs.user_state_path("mcp-broker") / "clients/default.toml"


def test_state_directory_said_aloud_beats_the_environments_profile() -> None:
    found = find_profile(None, {"MCP_BROKER_PROFILE": "/env.toml"}, state="/said")
    assert found == Path("/said/clients/default.toml")


def test_home_is_expanded() -> None:
    assert state_dir("~/s", {}) == Path.home() / "s"
    assert find_profile("~/p.toml", {}) == Path.home() / "p.toml"


def test_instants_are_whole_seconds_of_utc() -> None:
    assert profiles.instant(1.9) == datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
