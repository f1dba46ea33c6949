"""The log: which level is in force in a process, and what a line looks like.

Broker and workers write each record as one JSON line to standard error, where prints and last words of a crash go too.
Their supervisor reads both (:mod:`mcp_broker.supervisor.output`), says who wrote, and writes everything in the form that
`[observe] log_format` names. What a child claims about its own name counts for nothing: ``source`` is the supervisor's word.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TextIO

from mcp_broker import limits

_OURS: Final = "mcp_broker"
#: attribute of a record whose news whoever starts the supervisor prints in words of its own
ANNOUNCED: Final = "mcp_broker_announced"
#: attribute of a record that holds its fields in a mapping, for names that `extra` may not have
FIELDS: Final = "mcp_broker_fields"
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", ANNOUNCED, FIELDS}
#: how a record of a child begins, and hardly anything else
_BEGINS: Final = b'{"wall_at": '
_CUT: Final = "…"
#: what a line that is too long holds first
_ORDER: Final = {"wall_at": 0, "level": 1, "logger": 2, "event": 3}


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a record holds besides its text: `extra`, and where an exception came from."""
    found = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    found |= getattr(record, FIELDS, {})
    if record.exc_info and record.exc_info[0] is not None:
        found["traceback"] = logging.Formatter().formatException(record.exc_info)
    return found


def _printable(text: str) -> str:
    """Return text that stays on its line and steers no terminal."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char == "\t" else char.encode("unicode_escape").decode()
        for char in text
    )


class JsonLines(logging.Formatter):
    """One JSON object a line: instant, level, logger, the event, and its fields.

    Args:
        fields: of every record.
        bytes_max: what is longer is cut, the longest field first.
    """

    def __init__(self, fields: Mapping[str, Any] | None = None, bytes_max: int = sys.maxsize) -> None:
        super().__init__()
        self._fields = dict(fields or {})
        self._bytes_max = bytes_max

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        fields = {**self._fields, **_fields(record)}
        document = {
            "wall_at": round(record.created, 3),
            "level": record.levelname,
            "logger": fields.pop("logger", record.name),
            "event": record.getMessage(),
        }
        document = {**document, **{key: value for key, value in fields.items() if key not in document}}
        line = json.dumps(document, default=str)
        return (
            line
            if len(line) <= self._bytes_max
            else json.dumps(_fitting(document, self._bytes_max), default=str)
        )


def _fitting(document: dict[str, Any], bytes_max: int) -> dict[str, Any]:
    """Return as much of a document as fits: short fields whole, long ones cut; the event may take half."""
    left = bytes_max - len("{}")
    sizes = {key: len(json.dumps({key: value}, default=str)) for key, value in document.items()}
    order = sorted(document, key=lambda key: (_ORDER.get(key, len(_ORDER)), sizes[key]))
    kept: dict[str, Any] = {}
    for key in order:
        room = min(left, bytes_max // 2) if key == "event" else left
        value = document[key]
        if sizes[key] > room:
            value = _cut(value, room - len(json.dumps({key: ""})), from_end=key == "traceback")
            if not value:
                continue
        kept[key] = value
        left -= len(json.dumps({key: value}, default=str))
    return kept


def _cut(value: Any, bytes_max: int, *, from_end: bool) -> str:  # noqa: ANN401 (any field)
    """Return the beginning of a value as text, or its end; nothing when there is no room for it."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    # a character takes up to twelve bytes
    count = max(0, bytes_max - len(json.dumps(_CUT)))
    while count and len(json.dumps(text[-count:] if from_end else text[:count])) + len(_CUT) * 6 > bytes_max:
        count = count * 7 // 8
    if not count:
        return ""
    # the end of a traceback says what happened
    return _CUT + text[-count:] if from_end else text[:count] + _CUT


class TextLines(logging.Formatter):
    """One line for people: instant, level, who, the event, ``name=value``; a traceback follows, indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        fields = _fields(record)
        fields.pop("logger", None)
        source = fields.pop("source", "")
        traceback = str(fields.pop("traceback", ""))
        if fields.get("worker_id") == source:
            del fields["worker_id"]
        words = [time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(record.created)), record.levelname]
        words += [f"{source}:"] if source else []
        words.append(_printable(record.getMessage()))
        words += [f"{_printable(key)}={_shown(value)}" for key, value in fields.items()]
        return "\n    ".join([" ".join(words), *map(_printable, traceback.splitlines())])


def _shown(value: Any) -> str:  # noqa: ANN401 (any field)
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return _printable(json.dumps(text, ensure_ascii=False) if not text or " " in text else text)


FORMS: Final[Mapping[str, type[logging.Formatter]]] = {"text": TextLines, "json": JsonLines}


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to standard error.

    Args:
        announces: somebody prints news of its own for people, so that the text form leaves them out.
    """

    def __init__(self, *, announces: bool) -> None:
        super().__init__(sys.stderr)
        self._announces = announces
        self._form = ""

    def take(self, form: str) -> None:
        self._form = form
        self.setFormatter(JsonLines({"source": "supervisor"}) if form == "json" else FORMS[form]())

    def filter(self, record: logging.LogRecord) -> bool:
        is_told = self._announces and self._form == "text" and getattr(record, ANNOUNCED, False)
        return not is_told and bool(super().filter(record))


def configure(form: str = "text", *, announces: bool = False) -> None:
    """Have the supervisor's process write its own log, and its children's, to standard error."""
    ours = logging.getLogger(_OURS)
    handler = _Handler(announces=announces)
    handler.take(form)
    ours.handlers[:] = [handler]
    ours.propagate = False


def configure_child(level: str, **fields: str) -> None:
    """Have a broker or worker write what anybody in it logs as JSON lines; `fields` are in each."""
    handler = logging.StreamHandler(sys.stderr)
    # with the newline at most what a pipe takes whole: lines of two writers never mix
    handler.setFormatter(JsonLines(fields, limits.LOG_LINE_BYTES_MAX - 1))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    follow(level)
    root.setLevel(level.upper())


def follow(level: str, form: str | None = None) -> None:
    """Have another level, and another form, from now on."""
    ours = logging.getLogger(_OURS)
    ours.setLevel(level.upper())
    for handler in ours.handlers:
        if form is not None and isinstance(handler, _Handler):
            handler.take(form)


def level() -> str:
    """Return the level in force, as the configuration spells it; children start with it."""
    return logging.getLevelName(logging.getLogger(_OURS).getEffectiveLevel()).lower()


@dataclass(frozen=True, slots=True)
class Line:
    """A record that a child wrote."""

    level: int
    event: str
    fields: dict[str, Any] = field(default_factory=dict)


def parse(line: bytes) -> Line | None:
    """Read a line of a child; None when it is no record, but anything else that was written there."""
    if not line.startswith(_BEGINS):
        return None
    try:
        document = json.loads(line)
        del document["wall_at"]
        name, event = document.pop("level"), document.pop("event")
    except (ValueError, KeyError, RecursionError):
        return None
    if not isinstance(name, str) or not isinstance(event, str):
        return None
    return Line(logging.getLevelNamesMapping().get(name, logging.WARNING), event, document)
