"""Keys, and the files that hold them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import nacl.signing
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_broker import limits
from mcp_broker.auth import keys
from mcp_broker.auth.keys import CurvePair, IssuerKey
from mcp_broker.errors import CredentialError


def refusal(read: Callable[[Path], object], path: Path) -> CredentialError:
    with pytest.raises(CredentialError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    return caught.value


# -- Z85


def test_z85_is_the_one_of_rfc_32() -> None:
    data = bytes.fromhex("864fd26fb559f75b")
    assert keys.z85_encode(data) == "HelloWorld"
    assert keys.z85_decode("HelloWorld") == data


@given(st.binary(max_size=64).filter(lambda data: len(data) % 4 == 0))
def test_z85_comes_back_and_agrees_with_pyzmq(data: bytes) -> None:
    z85 = pytest.importorskip("zmq.utils.z85")
    assert keys.z85_decode(keys.z85_encode(data)) == data
    assert keys.z85_encode(data) == z85.encode(data).decode()


@pytest.mark.parametrize(
    "text", ["a", "abcd", "abcdef", "abc d", "abc,d", "abcd\n", "#####", "%nSc1", "ábcde"]
)
def test_text_that_is_no_z85_is_refused(text: str) -> None:
    # "#####" and "%nSc1" are past 2**32 - 1: libzmq would take the second as four zero bytes
    with pytest.raises(ValueError, match=r"."):
        keys.z85_decode(text)
    with pytest.raises(ValueError, match="3"):
        keys.z85_encode(b"abc")


@given(st.text(max_size=20))
def test_z85_text_has_one_spelling(text: str) -> None:
    try:
        data = keys.z85_decode(text)
    except ValueError:
        return
    assert keys.z85_encode(data) == text


# -- pairs


def test_curve_pair_is_what_libzmq_makes_of_its_secret() -> None:
    zmq = pytest.importorskip("zmq")
    pair = CurvePair.generate()
    assert zmq.curve_public(pair.secret_z85.encode()).decode() == pair.public_z85
    public, secret = zmq.curve_keypair()
    assert CurvePair.from_z85(public.decode(), secret.decode()).public_z85 == public.decode()


def test_halves_of_two_pairs_are_refused() -> None:
    one, other = CurvePair.generate(), CurvePair.generate()
    with pytest.raises(ValueError, match="does not belong"):
        CurvePair.from_z85(one.public_z85, other.secret_z85)


def test_secrets_are_not_shown() -> None:
    pair, key = CurvePair.generate(), IssuerKey.generate()
    shown = f"{pair!r} {pair} {key!r} {key}"
    for secret in (pair.secret, key.seed):
        assert repr(secret) not in shown
        assert secret.hex() not in shown
    assert pair.secret_z85 not in shown


def test_keys_have_32_bytes() -> None:
    with pytest.raises(ValueError, match="32"):
        CurvePair(b"p" * 32, b"s" * 31)
    with pytest.raises(ValueError, match="32"):
        IssuerKey(b"s" * 33)


def test_issuer_key_is_named_by_its_thumbprint() -> None:
    # RFC 8037, appendix A
    key = IssuerKey(bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"))
    assert key.public == bytes(nacl.signing.SigningKey(key.seed).verify_key)
    assert key.kid == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


# -- files (attack 27)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "a.key"
    keys.write_secret(path, b"secret")
    return path


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_secret_file_is_its_owners_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        keys.write_secret(tmp_path / "a.key", b"secret")
    finally:
        os.umask(old)
    assert (tmp_path / "a.key").stat().st_mode & 0o7777 == 0o600
    assert keys.read_secret(tmp_path / "a.key") == b"secret"
    assert list(tmp_path.iterdir()) == [tmp_path / "a.key"]


def test_secret_file_is_replaced_whole_or_kept(secret: Path) -> None:
    secret.chmod(0o644)
    keys.write_secret(secret, b"newer")
    assert keys.read_secret(secret) == b"newer"
    with pytest.raises(FileExistsError):
        keys.write_secret(secret, b"newest", replace=False)
    assert keys.read_secret(secret) == b"newer"
    assert list(secret.parent.iterdir()) == [secret]


def test_failed_write_leaves_nothing_behind(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        keys.write_secret(secret, b"newer")
    assert list(secret.parent.iterdir()) == [secret]
    assert keys.read_secret(secret) == b"secret"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o602, 0o601, 0o610, 0o777])
def test_secret_file_that_others_may_use_is_refused_with_the_remedy(secret: Path, mode: int) -> None:
    secret.chmod(mode)
    error = refusal(keys.read_secret, secret)
    assert error.details["reason"] == "mode"
    assert error.hint == f"chmod 600 {secret}"
    assert error.hint in str(error)
    assert f"{mode:04o}" in str(error)


def test_secret_file_of_another_user_is_refused(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = secret.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert refusal(keys.read_secret, secret).details["reason"] == "owner"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_secret_file_given_away_is_refused_even_by_root(secret: Path) -> None:
    os.chown(secret, 61_234, 61_234)
    assert refusal(keys.read_secret, secret).details["reason"] == "owner"


def test_link_to_a_secret_file_is_refused(secret: Path) -> None:
    link = secret.with_name("link.key")
    link.symlink_to(secret)
    assert refusal(keys.read_secret, link).details["reason"] == "symlink"
    # writing replaces the link, not what it points to
    keys.write_secret(link, b"other")
    assert not link.is_symlink()
    assert keys.read_secret(secret) == b"secret"


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    for path in (fifo, tmp_path):
        assert refusal(keys.read_secret, path).details["reason"] == "not_a_file"
    assert refusal(keys.read_secret, fifo / "below").details["reason"] == "unreadable"


def test_mode_is_read_from_the_file_that_was_opened(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted file that is swapped for a good one after the open is still refused."""
    real, planted = os.open, secret.with_name("planted.key")
    keys.write_secret(planted, b"planted")
    planted.chmod(0o644)

    def swap(path: Path, flags: int, *rest: int) -> int:
        fd = real(planted, flags, *rest)
        planted.unlink()
        return fd

    monkeypatch.setattr(os, "open", swap)
    assert refusal(keys.read_secret, secret).details["reason"] == "mode"


def test_huge_file_is_refused_and_a_missing_one_is_the_callers_matter(tmp_path: Path) -> None:
    keys.write_secret(tmp_path / "log", b"x" * (limits.SECRET_BYTES_MAX + 1))
    assert refusal(keys.read_secret, tmp_path / "log").details["reason"] == "too_large"
    with pytest.raises(FileNotFoundError):
        keys.read_secret(tmp_path / "none")


# -- key files


def test_keys_come_back_from_their_files(tmp_path: Path) -> None:
    pair, key = CurvePair.generate(), IssuerKey.generate()
    keys.save_curve_pair(tmp_path / "pair", pair)
    keys.save_issuer_key(tmp_path / "key", key)
    assert keys.load_curve_pair(tmp_path / "pair") == pair
    assert keys.load_issuer_key(tmp_path / "key") == key
    # one kind is not taken for the other
    assert "curve" in str(refusal(keys.load_curve_pair, tmp_path / "key"))
    assert "ed25519" in str(refusal(keys.load_issuer_key, tmp_path / "pair"))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"kind =", b'kind = "curve"', b'kind = "curve"\npublic_key = 1\nsecret_key = 2',
     b'kind = "curve"\npublic_key = "a"\nsecret_key = "b"',
     b'kind = "ed25519"\nseed = "00"', b'kind = "ed25519"\nseed = "xx"', b'kind = "ed25519"\nseed = "00"\nmore = 1'],
)  # fmt: skip
def test_broken_key_file_is_refused(tmp_path: Path, content: bytes) -> None:
    keys.write_secret(tmp_path / "key", content)
    for load in (keys.load_curve_pair, keys.load_issuer_key):
        assert refusal(load, tmp_path / "key").details["reason"] == "not_a_key"
