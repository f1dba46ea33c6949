"""Keys and the files that hold them.

Two kinds: CURVE pairs (X25519, https://rfc.zeromq.org/spec/26/) prove who speaks on a socket, Ed25519
pairs (RFC 8032) sign tokens. A secret file is readable by its owner alone, and is refused otherwise:
the check is made on the opened file, so nobody can swap it in between.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import nacl.bindings
import nacl.public
import nacl.signing
import tomli_w

from mcp_broker import limits
from mcp_broker.auth.zap import KEY_BYTES, jwk_thumbprint, thumbprint
from mcp_broker.errors import CredentialError

if TYPE_CHECKING:
    from mcp_broker.ids import UserId

__all__ = [
    "CurvePair",
    "IssuerKey",
    "load_curve_pair",
    "load_issuer_key",
    "read_secret",
    "save_curve_pair",
    "save_issuer_key",
    "thumbprint",
    "write_secret",
    "z85_decode",
    "z85_encode",
]

Z85_ALPHABET: Final = (
    "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"  # RFC 32
)
_Z85_DIGITS: Final = {character: digit for digit, character in enumerate(Z85_ALPHABET)}
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def z85_encode(data: bytes) -> str:
    """Write bytes as Z85 text, 5 characters for 4 bytes (https://rfc.zeromq.org/spec/32/).

    Raises:
        ValueError: the length is no multiple of 4.
    """
    if len(data) % 4:
        msg = f"Z85 takes a multiple of 4 bytes, not {len(data)}"
        raise ValueError(msg)
    text = []
    for start in range(0, len(data), 4):
        number = int.from_bytes(data[start : start + 4], "big")
        text += [Z85_ALPHABET[number // 85**power % 85] for power in (4, 3, 2, 1, 0)]
    return "".join(text)


def z85_decode(text: str) -> bytes:
    """Read Z85 text.

    Raises:
        ValueError: the length is no multiple of 5, a character is not of the alphabet, or a group of five
            is past 2**32 - 1 (libzmq's own decoder takes such a group modulo 2**32: two spellings of a key).
    """
    if len(text) % 5:
        msg = f"Z85 text has a multiple of 5 characters, not {len(text)}"
        raise ValueError(msg)
    data = bytearray()
    for start in range(0, len(text), 5):
        number = 0
        for character in text[start : start + 5]:
            if character not in _Z85_DIGITS:
                raise ValueError("a character that Z85 does not have")
            number = number * 85 + _Z85_DIGITS[character]
        if number >= 2**32:
            raise ValueError("five characters that stand for no four bytes")
        data += number.to_bytes(4, "big")
    return bytes(data)


@dataclass(frozen=True, slots=True)
class CurvePair:
    """A CURVE key pair.

    Attributes:
        public: 32 bytes.
        secret: 32 bytes; not shown by repr.
    """

    public: bytes
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.public) != KEY_BYTES or len(self.secret) != KEY_BYTES:
            raise ValueError("a CURVE key has 32 bytes")

    @classmethod
    def generate(cls) -> CurvePair:
        """Make a new pair from the system's randomness."""
        return cls.from_secret(bytes(nacl.public.PrivateKey.generate()))

    @classmethod
    def from_secret(cls, secret: bytes) -> CurvePair:
        """Make the pair of a secret key (32 bytes)."""
        return cls(nacl.bindings.crypto_scalarmult_base(secret), secret)

    @classmethod
    def from_z85(cls, public: str, secret: str) -> CurvePair:
        """Read a pair.

        Raises:
            ValueError: not Z85 of 32 bytes each, or the halves do not belong together. libzmq would only
                show the latter as a connection that never comes.
        """
        pair = cls(z85_decode(public), z85_decode(secret))
        if cls.from_secret(pair.secret).public != pair.public:
            raise ValueError("the public key does not belong to the secret key")
        return pair

    @property
    def public_z85(self) -> str:
        """The public key as 40 characters."""
        return z85_encode(self.public)

    @property
    def secret_z85(self) -> str:
        """The secret key as 40 characters."""
        return z85_encode(self.secret)

    @property
    def thumbprint(self) -> UserId:
        """What ZAP will call the holder."""
        return thumbprint(self.public)


@dataclass(frozen=True, slots=True)
class IssuerKey:
    """An Ed25519 key pair that signs tokens.

    Attributes:
        seed: the secret half, 32 bytes (RFC 8032); not shown by repr.
        public: the public half, 32 bytes, made from it.
        kid: its RFC 7638 thumbprint, which tokens name it by.
    """

    seed: bytes = field(repr=False)
    public: bytes = field(init=False)
    kid: str = field(init=False)

    def __post_init__(self) -> None:
        if len(self.seed) != KEY_BYTES:
            raise ValueError("an Ed25519 seed has 32 bytes")
        object.__setattr__(self, "public", bytes(nacl.signing.SigningKey(self.seed).verify_key))
        object.__setattr__(self, "kid", jwk_thumbprint("Ed25519", self.public))

    @classmethod
    def generate(cls) -> IssuerKey:
        """Make a new key from the system's randomness."""
        return cls(bytes(nacl.signing.SigningKey.generate()))


# -- files ------------------------------------------------------------------------------------------


def write_secret(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write a file that only its owner can read, whole or not at all.

    The bytes go to a new file beside it (never through a link that lies there), to the disk, and
    then under the name.

    Args:
        path: in a folder that exists.
        data: all of the file.
        replace: whether an older file may be replaced.

    Raises:
        FileExistsError: there is one, and ``replace`` is false.
        OSError: the folder cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            # an unusual umask can take rights from the owner as well
            os.fchmod(fd, 0o600)
            file.write(data)
            file.flush()
            os.fsync(fd)
        if replace:
            fresh.replace(path)
        else:
            # unlike rename, link refuses a name that is taken, in one step
            os.link(fresh, path, follow_symlinks=False)
    finally:
        fresh.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_secret(path: Path) -> bytes:
    """Read a file that only its owner can read.

    Raises:
        FileNotFoundError: there is none; the caller knows what that means.
        CredentialError: it is a link, no regular file, another user's, open to others, too large or not
            readable. The operator's fault; ``details`` holds ``path``, ``reason`` and ``hint``.
    """
    try:
        # O_NONBLOCK: opening a FIFO without a writer would wait for ever
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _refused(path, "symlink", "it is a symbolic link", "name the file itself") from None
        reason = os.strerror(error.errno or 0)
        raise _refused(path, "unreadable", reason, f"check the rights of {path}") from None
    try:
        # before fdopen, which takes no folder
        _check_status(path, os.fstat(fd))
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(limits.SECRET_BYTES_MAX + 1)
    finally:
        os.close(fd)
    if len(data) > limits.SECRET_BYTES_MAX:
        too_large = f"it has more than {limits.SECRET_BYTES_MAX} bytes"
        raise _refused(path, "too_large", too_large, "name a key or profile file")
    return data


def _check_status(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _refused(path, "not_a_file", "it is not a regular file", "name a regular file")
    if status.st_uid != os.geteuid():
        raise _refused(
            path,
            "owner",
            f"it belongs to uid {status.st_uid} and this process runs as uid {os.geteuid()}",
            f"run as its owner, or chown {os.geteuid()} {path}",
        )
    if status.st_mode & _OTHERS:
        mode = f"its mode is {stat.S_IMODE(status.st_mode):04o}, so others may use it"
        raise _refused(path, "mode", mode, f"chmod 600 {path}")


def _refused(path: Path, reason: str, why: str, hint: str) -> CredentialError:
    details = {"path": str(path), "reason": reason, "hint": hint}
    return CredentialError(f"{path} is refused: {why}; {hint}", details)


def save_curve_pair(path: Path, pair: CurvePair, *, replace: bool = True) -> None:
    """Write a pair to its own secret file (TOML, Z85)."""
    content = {"kind": "curve", "public_key": pair.public_z85, "secret_key": pair.secret_z85}
    write_secret(path, tomli_w.dumps(content).encode("ascii"), replace=replace)


def load_curve_pair(path: Path) -> CurvePair:
    """Read a pair.

    Raises:
        FileNotFoundError: there is no such file.
        CredentialError: the file may not be used, or holds no CURVE pair.
    """
    content = _key_file(path, "curve", ("public_key", "secret_key"))
    try:
        return CurvePair.from_z85(content["public_key"], content["secret_key"])
    except ValueError as error:
        raise _no_key(path, str(error)) from None


def save_issuer_key(path: Path, key: IssuerKey, *, replace: bool = True) -> None:
    """Write an issuer's key to its own secret file (TOML, hexadecimal)."""
    content = {"kind": "ed25519", "seed": key.seed.hex()}
    write_secret(path, tomli_w.dumps(content).encode("ascii"), replace=replace)


def load_issuer_key(path: Path) -> IssuerKey:
    """Read an issuer's key.

    Raises:
        FileNotFoundError: there is no such file.
        CredentialError: the file may not be used, or holds no Ed25519 seed.
    """
    try:
        return IssuerKey(bytes.fromhex(_key_file(path, "ed25519", ("seed",))["seed"]))
    except ValueError:
        raise _no_key(path, "the seed is not 64 hexadecimal digits") from None


def _key_file(path: Path, kind: str, names: tuple[str, ...]) -> dict[str, str]:
    try:
        content = tomllib.loads(read_secret(path).decode("utf-8"))
    except ValueError:
        raise _no_key(path, "it is not TOML") from None
    if content.get("kind") != kind:
        raise _no_key(path, f"it does not say kind = {kind!r}")
    if content.keys() != {"kind", *names} or not all(isinstance(content[name], str) for name in names):
        raise _no_key(path, f"it holds other entries than kind, {', '.join(names)}")
    return content


def _no_key(path: Path, why: str) -> CredentialError:
    hint = "restore it from a backup, or remove it: `mcp-broker start` then makes a new one"
    details = {"path": str(path), "reason": "not_a_key", "hint": hint}
    return CredentialError(f"{path} holds no key of ours: {why}; {hint}", details)
