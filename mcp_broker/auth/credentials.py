"""The authority of one broker: its keys, and the profiles that it issues.

In the state directory::

    keys/issuer.key     Ed25519, signs tokens; only the supervisor and the command line read it
    keys/server.key     CURVE pair of the socket for clients
    keys/workers.key    CURVE pair of the socket for workers and nodes
    clients/NAME.toml   profiles (profile.py)

Folders have mode 0700 and files 0600; looser ones are refused, not repaired, since by then somebody
else may have read or planted them.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from mcp_broker import limits
from mcp_broker.auth import claims, forms, keys
from mcp_broker.auth.claims import Claims, VerifyKey
from mcp_broker.auth.keys import CurvePair, IssuerKey
from mcp_broker.auth.places import CLIENTS_FOLDER, DEFAULT_NAME, profile_in
from mcp_broker.auth.policy import LEVEL_MAX
from mcp_broker.auth.profile import (
    ENDPOINTS_MAX,
    Profile,
    instant,
    is_endpoint,
    load_profile,
    save_profile,
)
from mcp_broker.errors import BrokerError, ConfigError, CredentialError, NotReachable, Unauthenticated

KEYS_FOLDER: Final = "keys"
#: a profile's name is a file's name: no separators, nothing hidden, nothing that climbs
PROFILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DEFAULT_SCOPES: Final = ("*",)

_TTL: Final = re.compile(r"([0-9]{1,9})([smhd])")
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_Key = TypeVar("_Key")


def parse_ttl(text: str) -> int:
    """Read a token's life, such as "30d", "12h", "90m" or "45s", as seconds.

    Raises:
        ConfigError: not of that form, zero, or past ``limits.TOKEN_TTL_S_MAX``.
    """
    most = f"{limits.TOKEN_TTL_S_MAX // _UNIT_S['d']}d"
    hint = f"write a number and s, m, h or d, such as 30d, up to {most}"
    found = _TTL.fullmatch(text)
    if found is None:
        raise ConfigError(f"{text!r} is no life of a token; {hint}", {"hint": hint})
    ttl_s = int(found[1]) * _UNIT_S[found[2]]
    if not 0 < ttl_s <= limits.TOKEN_TTL_S_MAX:
        raise ConfigError(f"a token cannot live for {text}; {hint}", {"hint": hint})
    return ttl_s


@dataclass(frozen=True, slots=True)
class ListedProfile:
    """One file of ``clients/``.

    Attributes:
        name: the file's name without ".toml".
        path: the file.
        profile: its content, None when it cannot be used.
        claims: what its token says (also of an expired one), None when that is not this broker's.
        problem: why the profile would be refused, for people; None when it would not.
    """

    name: str
    path: Path
    profile: Profile | None = None
    claims: Claims | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Authority:
    """Keys of a broker, and the right to issue tokens for it. Open one with :meth:`open`.

    Attributes:
        folder: the state directory.
        issuer_key: signs tokens.
        server: the CURVE pair of the clients' socket.
        workers: the CURVE pair of the workers' socket.
        wall: seconds since 1970.
    """

    folder: Path
    issuer_key: IssuerKey
    server: CurvePair
    workers: CurvePair
    wall: Callable[[], float]

    @classmethod
    def open(cls, state_dir: Path, create: bool = True, wall: Callable[[], float] = time.time) -> Authority:
        """Read the keys, or make those that are missing.

        Args:
            state_dir: the state directory.
            create: whether folders and keys may be made. Safe for two processes at once: the first wins.
            wall: the clock of what is issued.

        Raises:
            NotReachable: a key is missing and ``create`` is false.
            ConfigError: a folder cannot be made.
            CredentialError: a folder or key file belongs to or is open to others, or is broken.
        """
        for folder in (state_dir, state_dir / KEYS_FOLDER, state_dir / CLIENTS_FOLDER):
            if create:
                _make_folder(folder)
            # the state directory was perhaps made by hand: others may look in, not write
            _check_folder(folder, stat.S_IWGRP | stat.S_IWOTH if folder == state_dir else 0o077)
        where = state_dir / KEYS_FOLDER
        return cls(
            state_dir,
            _key(where / "issuer.key", keys.load_issuer_key, _make_issuer_key if create else None),
            _key(where / "server.key", keys.load_curve_pair, _make_curve_pair if create else None),
            _key(where / "workers.key", keys.load_curve_pair, _make_curve_pair if create else None),
            wall,
        )

    @property
    def audience(self) -> str:
        """What the tokens of this broker name as theirs."""
        return f"mcp-broker:{self.server.thumbprint}"

    @property
    def issuer(self) -> str:
        """Who the tokens of this broker are from: the broker itself, until an issuer key is shared."""
        return self.audience

    @property
    def verify_keys(self) -> dict[str, VerifyKey]:
        """What the broker verifies tokens with, by kid."""
        return {self.issuer_key.kid: VerifyKey(self.issuer_key.public)}

    def profile_path(self, name: str) -> Path:
        """Return where the profile of that name lies.

        Raises:
            ConfigError: no profile can have this name.
        """
        if PROFILE_NAME.fullmatch(name) is None:
            raise ConfigError(
                f"{name!r} is no profile name: up to 64 of A-Z a-z 0-9 . _ -, a letter or digit first"
            )
        return profile_in(self.folder, name)

    def issue_profile(  # noqa: PLR0913 (what a token says, by name)
        self,
        name: str,
        *,
        scopes: Iterable[str],
        ttl_s: float,
        endpoints: Sequence[str],
        clearance: int = 0,
        admin: bool = False,
        weight: int = 1,
        priority: int = forms.PRIORITY_DEFAULT,
        path: Path | None = None,
        replace: bool = False,
    ) -> Path:
        """Make a key pair and a token bound to it, and write both as a profile.

        Args:
            name: the principal, and the file's name in ``clients/``.
            scopes: patterns of tool names (policy.py).
            ttl_s: life in seconds.
            endpoints: where the broker answers, "tcp://..." or "ipc://...".
            clearance: 0 to 10.
            admin: whether ``system.*`` is covered too.
            weight: its share of a busy pool, against that of one with weight 1.
            priority: the highest class in which its calls may wait, 0 (high) to 2 (low).
            path: another place for the file, in a folder that exists.
            replace: whether an older profile may be lost; its token would stay valid until it expires.

        Returns:
            Where the profile was written.

        Raises:
            ConfigError: an argument that cannot be used, or the profile exists.
        """
        place = self.profile_path(name)
        target = place if path is None else path
        pair = CurvePair.generate()
        share = {"weight": weight, "priority": priority}
        profile = self._profile(
            name, pair, scopes, ttl_s, endpoints, clearance=clearance, admin=admin, **share
        )
        try:
            save_profile(target, profile, replace=replace)
        except FileExistsError:
            hint = "choose another name, or rotate or revoke the profile that has it"
            raise ConfigError(
                f"there is a profile at {target} already; {hint}", {"path": str(target), "hint": hint}
            ) from None
        except OSError as error:
            raise ConfigError(
                f"the profile {target} cannot be written: {os.strerror(error.errno or 0)}",
                {"path": str(target)},
            ) from None
        return target

    def ensure_default(self, endpoints: Sequence[str]) -> Path:
        """Make or renew ``clients/default.toml``: scope ``*``, admin, clearance 10, priority high.

        It is renewed when its token is below half its life or would be refused, and when the endpoints,
        the server's key or the issuer's key are others. The key pair stays, and with it the user id.

        Raises:
            CredentialError: the file is there but others may use it, or it is broken: somebody should look.
        """
        path = self.profile_path(DEFAULT_NAME)
        try:
            old: Profile | None = load_profile(path)
        except NotReachable:
            old = None
        if old is None or not self._is_fresh(old, endpoints):
            pair = CurvePair.generate() if old is None else old.keys
            profile = self._profile(
                DEFAULT_NAME,
                pair,
                DEFAULT_SCOPES,
                limits.TOKEN_TTL_S,
                endpoints,
                clearance=LEVEL_MAX,
                admin=True,
                priority=0,
            )
            save_profile(path, profile)
        return path

    def list_profiles(self) -> tuple[ListedProfile, ...]:
        """Read all of ``clients/``, by name; a broken file is listed with its problem."""
        found = sorted((self.folder / CLIENTS_FOLDER).glob("*.toml"))
        return tuple(self._listed(path) for path in found if PROFILE_NAME.fullmatch(path.stem))

    def _profile(  # noqa: PLR0913 (the same)
        self,
        principal: str,
        pair: CurvePair,
        scopes: Iterable[str],
        ttl_s: float,
        endpoints: Sequence[str],
        *,
        clearance: int,
        admin: bool,
        weight: int = 1,
        priority: int = forms.PRIORITY_DEFAULT,
    ) -> Profile:
        if not 0 < len(endpoints) <= ENDPOINTS_MAX or not all(map(is_endpoint, endpoints)):
            raise ConfigError(
                f"a profile has 1 to {ENDPOINTS_MAX} endpoints like tcp://HOST:PORT, not {list(endpoints)!r}"
            )
        now = self.wall()
        token = claims.issue(
            self.issuer_key.seed,
            kid=self.issuer_key.kid,
            principal=principal,
            scopes=scopes,
            thumbprint=pair.thumbprint,
            audience=self.audience,
            issuer=self.issuer,
            ttl_s=ttl_s,
            wall_now=now,
            jti=secrets.token_hex(16),
            clearance=clearance,
            admin=admin,
            weight=weight,
            priority=priority,
        )
        return Profile(
            tuple(endpoints), self.server.public, pair, token, principal, instant(now), instant(now + ttl_s)
        )

    def _verify(self, profile: Profile, wall_now: float) -> Claims:
        return claims.verify(
            profile.token,
            self.verify_keys,
            audience=self.audience,
            issuer=self.issuer,
            wall_now=wall_now,
            user_id=profile.keys.thumbprint,
        )

    def _is_fresh(self, profile: Profile, endpoints: Sequence[str]) -> bool:
        now = self.wall()
        try:
            said = self._verify(profile, now)
        except Unauthenticated:
            return False
        return (
            profile.endpoints == tuple(endpoints)
            and profile.server_key == self.server.public
            and (said.scopes, said.clearance, said.admin, said.priority)
            == (DEFAULT_SCOPES, LEVEL_MAX, True, 0)
            and said.expires_wall - now >= (said.expires_wall - said.issued_wall) / 2
        )

    def _listed(self, path: Path) -> ListedProfile:
        try:
            profile = load_profile(path)
        except BrokerError as error:
            return ListedProfile(path.stem, path, problem=error.message)
        try:
            return ListedProfile(path.stem, path, profile, self._verify(profile, self.wall()))
        except Unauthenticated as error:
            problem = error.message
        try:
            # an expired token is still worth reading, at a time when it held
            said = self._verify(profile, profile.created.timestamp())
        except Unauthenticated:
            return ListedProfile(path.stem, path, profile, problem=problem)
        return ListedProfile(path.stem, path, profile, said, problem)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        hint = "choose another state directory (--state-dir, MCP_BROKER_STATE_DIR)"
        details = {"path": str(folder), "hint": hint}
        raise ConfigError(f"the folder {folder} cannot be made: {why}; {hint}", details) from None


def _check_folder(folder: Path, forbidden: int) -> None:
    try:
        status = folder.stat()
    except FileNotFoundError:
        hint = "run `mcp-broker start`, or name its state directory (--state-dir, MCP_BROKER_STATE_DIR)"
        details = {"path": str(folder), "hint": hint}
        raise NotReachable(f"there is no broker's state at {folder}; {hint}", details) from None
    if status.st_uid == os.geteuid() and not status.st_mode & forbidden:
        return
    is_ours = status.st_uid == os.geteuid()
    why = f"its mode is {stat.S_IMODE(status.st_mode):04o}" if is_ours else f"it is uid {status.st_uid}'s"
    hint = f"chmod 700 {folder}" if is_ours else f"run as its owner, or chown {os.geteuid()} {folder}"
    details = {"path": str(folder), "reason": "mode" if is_ours else "owner", "hint": hint}
    raise CredentialError(f"the folder {folder} is refused: {why}; {hint}", details)


def _key(path: Path, load: Callable[[Path], _Key], make: Callable[[Path], None] | None) -> _Key:
    try:
        return load(path)
    except FileNotFoundError:
        if make is None:
            hint = "run `mcp-broker start`, which makes its keys"
            details = {"path": str(path), "hint": hint}
            raise NotReachable(f"there is no key at {path}; {hint}", details) from None
    # when another process was first, its key counts
    with contextlib.suppress(FileExistsError):
        make(path)
    return load(path)


def _make_issuer_key(path: Path) -> None:
    keys.save_issuer_key(path, IssuerKey.generate(), replace=False)


def _make_curve_pair(path: Path) -> None:
    keys.save_curve_pair(path, CurvePair.generate(), replace=False)
