"""What a state directory remembers from one supervisor to the next: epoch, lives, tools, deaths."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from mcp_broker import limits
from mcp_broker.core.death_log import keep
from mcp_broker.errors import WireError
from mcp_broker.wire import codec, node
from mcp_broker.wire.framing import FrameReader, frame
from mcp_broker.wire.structs import replaced

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mcp_broker.wire.messages import ToolDefinition
    from mcp_broker.wire.reclaims import Reclaim

_log = logging.getLogger("mcp_broker.supervisor")

_KINDS: Final = get_args(node.DeathKind)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that a reader, or the next start after a crash, sees the old or the new one."""
    part = path.with_name(path.name + ".part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    part.replace(path)


def append(path: Path, line: bytes) -> None:
    """Put a line at the end of a file of such. A crash in between costs this line only: reading skips what is torn.

    Raises:
        OSError: there is no room for it; the file is as it was.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        whole = os.fstat(fd).st_size
        try:
            _write(fd, line)
        except OSError:
            # the next line must not continue what there was room for
            os.ftruncate(fd, whole)
            raise
    finally:
        os.close(fd)


def _write(fd: int, data: bytes) -> None:
    """Write all of it: with little room left, the kernel takes a part, and refuses the next."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def _keep(path: Path, data: bytes) -> bool:
    """Write what would be good to have after a crash; a full disk must not end who goes on without it."""
    try:
        write_atomically(path, data)
    except OSError as error:
        _log.warning("cannot write %s: %s", path, error.strerror)
        return False
    return True


class Counters:
    """Numbers that only grow, for the life of the state directory.

    Args:
        state_dir: holds ``counters.json``. Numbers are reserved on disk before they are used.
    """

    #: a write for each life would cost an fsync per restart
    _RESERVE: Final = 64

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "counters.json"
        saved: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            loaded = json.loads(self._path.read_bytes())
            saved = loaded if isinstance(loaded, dict) else {}
        self._epoch = _count(saved.get("epoch"))
        #: numbers given so far, and up to which they are reserved
        self._life = self._reserved = _count(saved.get("life"))
        #: which folder this is: a copy has another one, and must not take the original's processes for its own
        self._place = _place(state_dir)
        #: marks the processes of this state directory, so that the next start knows them
        instance = saved.get("instance") if saved.get("place", self._place) == self._place else None
        self.instance = instance if isinstance(instance, str) and instance else secrets.token_hex(8)

    def next_epoch(self) -> int:
        """Return the epoch of a new broker, greater than every one before."""
        self._epoch += 1
        self._save()
        return self._epoch

    def next_life(self) -> int:
        """Return the number of a new worker process."""
        self._life += 1
        if self._life > self._reserved:
            self._reserved = self._life + self._RESERVE
            self._save()
        return self._life

    def close(self) -> None:
        """Give back the numbers that were reserved and not used."""
        self._reserved = self._life
        self._save()

    def _save(self) -> None:
        state = {
            "epoch": self._epoch,
            "life": self._reserved,
            "instance": self.instance,
            "place": self._place,
        }
        _keep(self._path, json.dumps(state).encode())


def _place(folder: Path) -> list[int]:
    found = folder.stat()
    return [found.st_dev, found.st_ino]


def _count(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


class Definitions:
    """What each pool served last, so that calls can wait for workers that have not come yet.

    Args:
        state_dir: holds ``tools.bin``, TOOLS messages as on the node link.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "tools.bin"

    def load(self) -> dict[str, tuple[ToolDefinition, ...]]:
        """Return the tools by pool; none from a file that is missing, torn or of another version."""
        known: dict[str, tuple[ToolDefinition, ...]] = {}
        with contextlib.suppress(OSError, WireError):
            for body in FrameReader().feed(self._path.read_bytes()):
                message = codec.from_supervisor.decode(body)
                if isinstance(message, node.Tools):
                    known[message.pool] = message.tools
        return known

    def save(self, pools: Iterable[node.Tools]) -> None:
        """Keep what they serve now."""
        _keep(self._path, b"".join(frame(codec.encode(tools)) for tools in pools))


class Started:
    """Calls that dead workers had started last, which no broker may run again; of this supervisor's life only.

    Attributes:
        calls: worker id -> ids of its calls, the newest last; who died first is first. Bounded in workers, and in ids:
            beyond those whoever died first keeps its newest, and a fair share at least.
    """

    def __init__(self) -> None:
        self.calls: dict[str, tuple[bytes, ...]] = {}
        #: of the same workers, without their last words
        self._certificates: dict[str, node.Certificate] = {}
        self._count = 0

    def told(self, recent: tuple[node.Certificate, ...], reclaims: tuple[Reclaim, ...] = ()) -> node.Deaths:
        """Return what the next broker is told, beside recent certificates and what was taken back after deaths."""
        known = {one.worker_id for one in recent}
        others = (one for one in self._certificates.values() if one.worker_id not in known)
        return node.Deaths(recent, self.calls, reclaims, tuple(others))

    def add(self, certificate: node.Certificate, call_ids: tuple[bytes, ...]) -> None:
        """Remember what one more had started."""
        worker_id = certificate.worker_id
        self.calls[worker_id] = call_ids
        self._certificates[worker_id] = replaced(certificate, stderr="", stack="")
        self._count += len(call_ids)
        if len(self.calls) > limits.WORKERS_MAX:
            first = next(iter(self.calls))
            self._count -= len(self.calls.pop(first))
            del self._certificates[first]
        share = limits.STARTED_MAX // len(self.calls)
        for other, known in self.calls.items():
            if self._count <= limits.STARTED_MAX:
                break
            if len(known) > share:
                self.calls[other] = known[-share:]
                self._count -= len(known) - share


class Deaths:
    """Recent death certificates, newest first; a file of JSON lines, oldest first.

    Args:
        state_dir: holds ``deaths.jsonl``.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "deaths.jsonl"
        self._recent: deque[node.Certificate] = deque(maxlen=limits.DEATHS_MAX)
        self._started = Started()
        self._lines = 0
        with contextlib.suppress(OSError):
            data = self._path.read_bytes()
            for line in data.splitlines():
                self._lines += 1
                certificate = _certificate(line)
                if certificate is not None:
                    keep(self._recent, certificate)
            if data and not data.endswith(b"\n"):
                # torn by a crash: the next line must not continue it
                self._rewrite()

    @property
    def recent(self) -> tuple[node.Certificate, ...]:
        """The certificates kept, newest first."""
        return tuple(self._recent)

    def told(self, reclaims: tuple[Reclaim, ...] = ()) -> node.Deaths:
        """Return what the next broker is told, with what was taken back after the deaths."""
        return self._started.told(self.recent, reclaims)

    def add(self, certificate: node.Certificate, started_calls: tuple[bytes, ...] = ()) -> None:
        """Keep one more; the file is written anew when it holds twice what is kept."""
        keep(self._recent, certificate)
        if started_calls:
            self._started.add(certificate, started_calls)
        if self._lines >= 2 * limits.DEATHS_MAX:
            self._rewrite()
            return
        try:
            append(self._path, _line(certificate))
        except OSError as error:
            _log.warning("cannot write %s: %s", self._path, error.strerror)
            return
        self._lines += 1

    def _rewrite(self) -> None:
        if _keep(self._path, b"".join(map(_line, reversed(self._recent)))):
            self._lines = len(self._recent)


def _line(certificate: node.Certificate) -> bytes:
    return json.dumps(codec.as_plain(certificate)).encode() + b"\n"


def _certificate(line: bytes) -> node.Certificate | None:
    """Read one line; None when it is torn, or of a release that we do not read."""
    known = set(node.Certificate.__struct_fields__)
    try:
        fields = json.loads(line)
        if fields.get("kind") not in _KINDS:
            # of another release: a broker of this one takes none but its own
            fields["kind"] = "unknown"
        return node.Certificate(**{key: value for key, value in fields.items() if key in known})
    except (ValueError, TypeError, AttributeError):
        return None


class Abandoned:
    """Calls whose clients brokers gave up, the oldest first; of this supervisor's life only."""

    def __init__(self) -> None:
        self._call_ids: dict[bytes, None] = {}

    def add(self, call_ids: Iterable[bytes]) -> None:
        """Remember some more."""
        self._call_ids.update(dict.fromkeys(call_ids))
        while len(self._call_ids) > limits.STARTED_MAX:
            del self._call_ids[next(iter(self._call_ids))]

    def told(self) -> list[node.Abandoned]:
        """Return what the next broker is told."""
        return [node.Abandoned(tuple(self._call_ids))] if self._call_ids else []
