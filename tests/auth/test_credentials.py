"""The authority: keys made once, profiles issued, renewed, listed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mcp_broker import limits
from mcp_broker.auth import claims
from mcp_broker.auth.credentials import Authority, parse_ttl
from mcp_broker.auth.profile import load_profile
from mcp_broker.errors import ConfigError, CredentialError, NotReachable, Unauthenticated
from tests.auth.forge import NOW

if TYPE_CHECKING:
    from mcp_broker.auth.claims import Claims

ENDPOINTS = ("tcp://127.0.0.1:4000",)
DAY = 86_400


class Clock:
    """A wall clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def authority(state: Path, clock: Clock) -> Authority:
    return Authority.open(state, wall=clock)


def verify(authority: Authority, path: Path, **changes: Any) -> Claims:
    profile = load_profile(path)
    expected = {
        "audience": authority.audience,
        "issuer": authority.issuer,
        "wall_now": authority.wall(),
        "user_id": profile.keys.thumbprint,
    }
    return claims.verify(profile.token, authority.verify_keys, **{**expected, **changes})


def issue(authority: Authority, name: str = "ada", **changes: Any) -> Path:
    good: dict[str, Any] = {"scopes": ["text.*"], "ttl_s": DAY, "endpoints": ENDPOINTS}
    return authority.issue_profile(name, **{**good, **changes})


# -- keys


def test_keys_are_made_once_for_their_owner_alone(state: Path, authority: Authority) -> None:
    assert Authority.open(state, create=False, wall=authority.wall) == authority
    modes = {str(path.relative_to(state)): path.stat().st_mode & 0o777 for path in sorted(state.rglob("*"))}
    assert modes == {
        "clients": 0o700,
        "keys": 0o700,
        "keys/issuer.key": 0o600,
        "keys/server.key": 0o600,
        "keys/workers.key": 0o600,
    }
    assert state.stat().st_mode & 0o777 == 0o700
    assert len({authority.server.secret, authority.workers.secret, authority.issuer_key.seed}) == 3


def test_nothing_is_made_when_only_reading(state: Path) -> None:
    with pytest.raises(NotReachable, match="mcp-broker start"):
        Authority.open(state, create=False)
    assert not state.exists()


def test_lost_key_is_not_made_again_when_only_reading(state: Path, authority: Authority) -> None:
    (state / "keys/issuer.key").unlink()
    with pytest.raises(NotReachable, match=r"issuer\.key"):
        Authority.open(state, create=False)


def test_openers_at_once_agree_on_the_keys(state: Path, clock: Clock) -> None:
    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(lambda _: Authority.open(state, wall=clock), range(8)))
    assert opened == [opened[0]] * 8


@pytest.mark.parametrize("name", ["issuer.key", "server.key", "workers.key"])
def test_key_file_that_others_may_read_is_refused(state: Path, authority: Authority, name: str) -> None:
    (state / "keys" / name).chmod(0o644)
    with pytest.raises(CredentialError) as caught:
        Authority.open(state)
    assert caught.value.hint == f"chmod 600 {state / 'keys' / name}"


@pytest.mark.parametrize(
    ("folder", "mode"), [("keys", 0o755), ("clients", 0o711), (".", 0o777), (".", 0o720)]
)
def test_folder_that_others_may_use_is_refused(
    state: Path, authority: Authority, folder: str, mode: int
) -> None:
    (state / folder).chmod(mode)
    with pytest.raises(CredentialError) as caught:
        Authority.open(state)
    assert caught.value.hint == f"chmod 700 {state / folder}"


def test_folder_of_another_user_is_refused(
    state: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = state.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(CredentialError) as caught:
        Authority.open(state)
    assert caught.value.details["reason"] == "owner"


def test_state_directory_made_by_hand_is_taken(state: Path) -> None:
    state.mkdir(mode=0o755)
    assert Authority.open(state).folder == state


def test_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigError, match=str(place)):
            Authority.open(place)


# -- issuing


def test_issued_profile_verifies_for_this_broker_and_its_own_key(authority: Authority, clock: Clock) -> None:
    path = issue(authority, clearance=3)
    said, profile = verify(authority, path), load_profile(path)
    assert (said.principal, said.scopes, said.clearance, said.admin) == ("ada", ("text.*",), 3, False)
    assert said.thumbprint == profile.keys.thumbprint
    assert authority.audience == f"mcp-broker:{authority.server.thumbprint}"
    assert profile.server_key == authority.server.public
    assert profile.expires.timestamp() == said.expires_wall == clock.now + DAY
    assert path == authority.folder / "clients/ada.toml"
    assert path.stat().st_mode & 0o777 == 0o600


def test_profiles_share_neither_keys_nor_token_names(authority: Authority) -> None:
    one, other = (load_profile(issue(authority, name)) for name in ("ada", "bob"))
    assert one.keys != other.keys
    said = [verify(authority, authority.profile_path(name)) for name in ("ada", "bob")]
    assert said[0].jti != said[1].jti
    with pytest.raises(Unauthenticated) as caught:
        verify(authority, authority.profile_path("ada"), user_id=other.keys.thumbprint)
    assert caught.value.details["reason"] == "bound_to_other_key"


def test_profile_of_another_broker_is_refused(authority: Authority, tmp_path: Path, clock: Clock) -> None:
    other = Authority.open(tmp_path / "other", wall=clock)
    path = issue(other)
    with pytest.raises(Unauthenticated) as caught:
        verify(authority, path)
    assert caught.value.details["reason"] == "unknown_key"
    with pytest.raises(Unauthenticated) as caught:
        verify(other, path, audience=authority.audience)
    assert caught.value.details["reason"] == "wrong_audience"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../ada", "a/b", "/etc/x", ".hidden", "a\0b", "a\n", "é", "a" * 65, "-a", "a b"]
)
def test_profile_name_cannot_leave_its_folder(authority: Authority, name: str) -> None:
    with pytest.raises(ConfigError, match="no profile name"):
        issue(authority, name)
    assert not any((authority.folder / "clients").iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"scopes": []},
        {"scopes": ["te*"]},
        {"ttl_s": 91 * DAY},
        {"clearance": 11},
        {"weight": 0},
        {"priority": 3},
        {"endpoints": []},
        {"endpoints": ["http://127.0.0.1"]},
    ],
    ids=str,
)
def test_profile_that_no_broker_would_take_is_not_written(
    authority: Authority, changes: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError):
        issue(authority, **changes)
    assert not any((authority.folder / "clients").iterdir())


def test_profile_is_not_lost_to_a_second_of_its_name(authority: Authority) -> None:
    first = load_profile(issue(authority))
    with pytest.raises(ConfigError, match="already"):
        issue(authority)
    assert load_profile(authority.profile_path("ada")) == first
    assert load_profile(issue(authority, replace=True)) != first


def test_profile_goes_where_it_is_wanted(authority: Authority, tmp_path: Path) -> None:
    wanted = tmp_path / "for-ada.toml"
    assert issue(authority, path=wanted) == wanted
    assert verify(authority, wanted).principal == "ada"
    with pytest.raises(ConfigError, match="No such file"):
        issue(authority, path=tmp_path / "none/p.toml")


# -- the default profile


def test_default_profile_may_do_everything(authority: Authority) -> None:
    said = verify(authority, authority.ensure_default(ENDPOINTS))
    assert (said.scopes, said.admin, said.clearance, said.priority) == (("*",), True, 10, 0)
    assert said.expires_wall - said.issued_wall == limits.TOKEN_TTL_S


def test_default_profile_is_renewed_below_half_its_life_and_keeps_its_key(
    authority: Authority, clock: Clock
) -> None:
    path = authority.ensure_default(ENDPOINTS)
    first = path.read_bytes()
    clock.now += limits.TOKEN_TTL_S / 2
    assert authority.ensure_default(ENDPOINTS).read_bytes() == first
    clock.now += 1
    old, new = load_profile(path), load_profile(authority.ensure_default(ENDPOINTS))
    assert new.keys == old.keys
    assert new.token != old.token
    assert verify(authority, path).expires_wall == clock.now + limits.TOKEN_TTL_S


@pytest.mark.parametrize("days", [31, -31, 4000])
def test_default_profile_is_renewed_when_its_token_would_be_refused(
    authority: Authority, clock: Clock, days: int
) -> None:
    path = authority.ensure_default(ENDPOINTS)
    clock.now += days * DAY
    assert verify(authority, authority.ensure_default(ENDPOINTS)).issued_wall == clock.now
    assert path == authority.profile_path("default")


def test_default_profile_follows_the_endpoints(authority: Authority) -> None:
    authority.ensure_default(ENDPOINTS)
    assert load_profile(authority.ensure_default(["ipc:///run/b"])).endpoints == ("ipc:///run/b",)


@pytest.mark.parametrize("name", ["server.key", "issuer.key"])
def test_default_profile_follows_the_brokers_keys(
    authority: Authority, state: Path, clock: Clock, name: str
) -> None:
    authority.ensure_default(ENDPOINTS)
    (state / "keys" / name).unlink()
    after = Authority.open(state, wall=clock)
    path = after.ensure_default(ENDPOINTS)
    assert verify(after, path).admin
    assert load_profile(path).server_key == after.server.public


def test_default_profile_with_fewer_rights_is_made_whole(authority: Authority) -> None:
    issue(authority, "default", ttl_s=30 * DAY)
    assert verify(authority, authority.ensure_default(ENDPOINTS)).admin


def test_default_profile_that_others_may_read_is_not_silently_mended(authority: Authority) -> None:
    path = authority.ensure_default(ENDPOINTS)
    path.chmod(0o644)
    with pytest.raises(CredentialError, match="chmod 600"):
        authority.ensure_default(ENDPOINTS)


# -- listing


def test_profiles_are_listed_with_what_is_wrong_with_them(authority: Authority, clock: Clock) -> None:
    issue(authority, "short", ttl_s=60)
    issue(authority, "good")
    issue(authority, "open").chmod(0o644)
    (authority.folder / "clients/broken.toml").write_text("")
    (authority.folder / "clients/broken.toml").chmod(0o600)
    (authority.folder / "clients/.good.toml.123.tmp").write_text("")
    clock.now += 120
    listed = {each.name: each for each in authority.list_profiles()}
    assert sorted(listed) == ["broken", "good", "open", "short"]
    assert {name: each.problem is None for name, each in listed.items()} == {
        "broken": False, "good": True, "open": False, "short": False,
    }  # fmt: skip
    assert "chmod 600" in str(listed["open"].problem)
    assert "expired" in str(listed["short"].problem)
    # an expired token is still read
    for name in ("good", "short"):
        said = listed[name].claims
        assert said is not None
        assert said.scopes == ("text.*",)
    assert "token=" not in repr(listed)


def test_token_of_another_authority_is_listed_as_a_problem(authority: Authority, state: Path) -> None:
    issue(authority)
    (state / "keys/issuer.key").unlink()
    (listed,) = Authority.open(state, wall=authority.wall).list_profiles()
    assert listed.claims is None
    assert "does not know" in str(listed.problem)


# -- life


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 30 * DAY), ("12h", 43_200), ("90m", 5_400), ("45s", 45), ("90d", 90 * DAY), ("007s", 7)],
)
def test_life_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert parse_ttl(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "30", "d", "0s", "-1d", "91d", "2161h", "1.5h", "1w", "1D", " 1d", "1d\n", "٣d", "9" * 30 + "s"],
)
def test_other_lives_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="90d"):
        parse_ttl(text)
