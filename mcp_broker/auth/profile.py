"""A profile: all that a client needs to reach a broker, in one file that only its owner can read.

A TOML file::

    version = 1
    principal = "default"                       # who; for people, the token decides
    created = 2026-01-01T00:00:00Z              # for people, the token decides
    expires = 2026-01-31T00:00:00Z
    endpoints = ["tcp://127.0.0.1:40001"]       # tried in turn
    server_key = "..."                          # Z85: the broker's public CURVE key, pinned
    public_key = "..."                          # Z85: the client's CURVE pair
    secret_key = "..."
    token = "..."                               # JWT, bound to public_key

Nobody who lacks the file's secret key can use its token.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import tomli_w

from mcp_broker import limits
from mcp_broker.auth.keys import CurvePair, read_secret, write_secret, z85_decode, z85_encode
from mcp_broker.auth.zap import KEY_BYTES
from mcp_broker.errors import CredentialError, NotReachable

VERSION: Final = 1
#: printable ASCII behind the scheme: what libzmq connects to, and nothing that could break a log line
ENDPOINT: Final = re.compile(r"(?:tcp|ipc)://[!-~]{1,240}")
ENDPOINTS_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile's content.

    Attributes:
        endpoints: at least one, "tcp://HOST:PORT" or "ipc://PATH".
        server_key: the broker's public CURVE key, 32 bytes.
        keys: the client's own CURVE pair.
        token: the JWT; not shown by repr.
        principal: who the token is for.
        created: when it was made, with time zone.
        expires: when the token ends, with time zone.
    """

    endpoints: tuple[str, ...]
    server_key: bytes
    keys: CurvePair
    token: str = field(repr=False)
    principal: str
    created: datetime
    expires: datetime

    @property
    def server_key_z85(self) -> str:
        """The broker's public key as 40 characters."""
        return z85_encode(self.server_key)


def save_profile(path: Path, profile: Profile, *, replace: bool = True) -> None:
    """Write a profile, mode 0600, whole or not at all.

    Raises:
        FileExistsError: there is one and ``replace`` is false.
        OSError: the folder cannot be written.
    """
    content = {
        "version": VERSION,
        "principal": profile.principal,
        "created": profile.created,
        "expires": profile.expires,
        "endpoints": list(profile.endpoints),
        "server_key": profile.server_key_z85,
        "public_key": profile.keys.public_z85,
        "secret_key": profile.keys.secret_z85,
        "token": profile.token,
    }
    write_secret(path, tomli_w.dumps(content).encode("utf-8"), replace=replace)


def load_profile(path: Path) -> Profile:
    """Read a profile.

    The token is not verified: that is the broker's part.

    Raises:
        NotReachable: there is no such file.
        CredentialError: others may use the file, or its content is broken; the message names the key at
            fault and never its value.
    """
    try:
        data = read_secret(path)
    except FileNotFoundError:
        hint = "start a broker with `mcp-broker start`, or name a profile (--profile, MCP_BROKER_PROFILE)"
        raise NotReachable(
            f"there is no profile at {path}; {hint}", {"path": str(path), "hint": hint}
        ) from None
    try:
        content = tomllib.loads(data.decode("utf-8"))
    except ValueError as error:
        # tomllib says line and column, not the text there
        raise _broken(path, None, f"it is not TOML ({error})") from None
    for name in content:
        if name not in _NAMES:
            raise _broken(path, name, f"unknown key {name!r}")
    for name in _NAMES:
        if name not in content:
            raise _broken(path, name, f"the key {name!r} is missing")
        if not _FORMS[name](content[name]):
            raise _broken(path, name, f"the value of {name!r} is not of the right form")
    try:
        keys = CurvePair.from_z85(content["public_key"], content["secret_key"])
    except ValueError as error:
        raise _broken(path, "secret_key", str(error)) from None
    return Profile(
        endpoints=tuple(content["endpoints"]),
        server_key=z85_decode(content["server_key"]),
        keys=keys,
        token=content["token"],
        principal=content["principal"],
        created=content["created"],
        expires=content["expires"],
    )


def instant(wall: float) -> datetime:
    """Return seconds since 1970 as a profile writes them: UTC, whole seconds."""
    return datetime.fromtimestamp(int(wall), UTC)


def _broken(path: Path, key: str | None, why: str) -> CredentialError:
    hint = "make a new one with `mcp-broker credentials issue`; `mcp-broker start` makes the default again once it is removed"
    details: dict[str, Any] = {"path": str(path), "reason": "broken_profile", "hint": hint}
    if key is not None:
        details["key"] = key
    return CredentialError(f"the profile {path} cannot be used: {why}; {hint}", details)


def _is_key(value: object) -> bool:
    try:
        return isinstance(value, str) and len(z85_decode(value)) == KEY_BYTES
    except ValueError:
        return False


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_instant(value: object) -> bool:
    return isinstance(value, datetime) and value.tzinfo is not None


def _is_token(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and 0 < len(value) <= limits.TOKEN_BYTES_MAX


def is_endpoint(value: object) -> bool:
    """Whether a client can connect to this: "tcp://HOST:PORT" or "ipc://PATH"."""
    return isinstance(value, str) and ENDPOINT.fullmatch(value) is not None


def _is_endpoints(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= ENDPOINTS_MAX and all(map(is_endpoint, value))


_FORMS: Final = {
    "version": lambda value: value == VERSION and not isinstance(value, bool | float),
    "principal": _is_text,
    "created": _is_instant,
    "expires": _is_instant,
    "endpoints": _is_endpoints,
    "server_key": _is_key,
    "public_key": _is_key,
    "secret_key": _is_key,
    "token": _is_token,
}
_NAMES: Final = tuple(_FORMS)
