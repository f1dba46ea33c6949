"""SQL over the files of one folder, read-only: DuckDB, with no way to any other file.

Options of the pool: ``folder`` (its CSV, Parquet and JSON files are the tables; without it there are none),
``memory_mb`` (384: DuckDB's own bound, beyond which it says so or writes to its scratch folder; the worker's limit, which
kills, is above it), ``threads`` (2), ``batch_rows`` (1000).

A query is one SELECT, checked before it runs. Under it, DuckDB itself may open exactly the files that are tables, may
not install or load anything, and its configuration is locked. A file whose real place is outside the folder (a
symbolic link) is no table.
"""

from __future__ import annotations

import datetime as dt
import decimal
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import duckdb
from pydantic import Field
from typing_extensions import TypedDict  # pydantic does not take typing's before Python 3.12

from mcp_broker.worker import InvalidArgument, ResourceExhausted, ToolContext, tool

#: ending of a file's name -> the function that reads it
_READERS = {
    ".csv": "read_csv",
    ".tsv": "read_csv",
    ".csv.gz": "read_csv",
    ".parquet": "read_parquet",
    ".json": "read_json",
    ".jsonl": "read_json",
    ".ndjson": "read_json",
}
#: about the size of a batch, so that it stays well under a message's bound
_BATCH_BYTES = 256 * 1024
#: beyond it an integer is no payload's
_INTEGER_MAX = 2**63


class Batch(TypedDict):
    """Some rows of a result, in order; every batch names the columns."""

    columns: list[str]
    rows: list[list[Any]]


class Table(TypedDict):
    """One file as a table."""

    name: str
    file: str
    #: column name -> DuckDB type
    columns: dict[str, str]
    #: why the file cannot be read, else null
    error: str | None


@dataclass
class Settings:
    """The pool's options, checked.

    Raises:
        ValueError: an option is wrong (the operator's fault).
    """

    folder: Path | None
    memory_mb: int = 384
    threads: int = 2
    batch_rows: int = 1000

    @classmethod
    def of(cls, options: dict[str, Any]) -> Settings:
        """Read a pool's options."""
        folder = options.get("folder")
        path = None if folder is None else Path(str(folder)).expanduser().resolve()
        if path is not None and not path.is_dir():
            raise ValueError(f"the pool's option folder = {str(folder)!r} is no folder")
        numbers = {}
        for name, lowest in (("memory_mb", 16), ("threads", 1), ("batch_rows", 1)):
            value = options.get(name, getattr(cls, name))
            if not isinstance(value, int) or value < lowest:
                raise ValueError(
                    f"the pool's option {name} = {value!r} must be an integer of at least {lowest}"
                )
            numbers[name] = value
        return cls(path, **numbers)


@dataclass
class Database:
    """A connection that knows the files as they were when it was made."""

    connection: duckdb.DuckDBPyConnection
    files: dict[str, Path]
    stamp: object
    errors: dict[str, str] = field(default_factory=dict)


def _files(folder: Path | None) -> dict[str, Path]:
    """Return the tables of a folder, by name: the file's, without its ending where that leaves no doubt."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for path in sorted(folder.iterdir()) if folder is not None else []:
        ending = next((ending for ending in _READERS if path.name.lower().endswith(ending)), None)
        if ending is None or not path.is_file() or path.resolve().parent != folder:
            continue
        found.setdefault(path.name[: -len(ending)], []).append((path.name, path))
    tables: dict[str, Path] = {}
    for stem, paths in found.items():
        for name, path in paths:
            tables[stem if len(paths) == 1 else name] = path.resolve()
    return tables


def _open(settings: Settings, files: dict[str, Path], scratch: Path) -> Database:
    """Make a database with one view a file, and lock it."""
    connection = duckdb.connect(
        ":memory:",
        config={
            "memory_limit": f"{settings.memory_mb}MB",
            "threads": settings.threads,
            "temp_directory": str(scratch / "duckdb"),
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
        },
    )
    database = Database(connection, files, _stamp(files))
    allowed = ", ".join(_text(str(path)) for path in files.values())
    connection.execute(f"SET allowed_paths = [{allowed}]")
    # from here on no other file opens, and nobody changes that
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    for name, path in files.items():
        reader = next(function for ending, function in _READERS.items() if path.name.lower().endswith(ending))
        try:
            connection.execute(
                f"CREATE VIEW {_identifier(name)} AS SELECT * FROM {reader}({_text(str(path))})"
            )
        except duckdb.Error as error:
            database.errors[name] = str(error).partition("\n")[0]
    return database


def _stamp(files: dict[str, Path]) -> object:
    return {name: (path, path.stat().st_mtime_ns) for name, path in files.items() if path.exists()}


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


#: the worker's one database, with the settings that it was made for
_open_databases: dict[str, tuple[Settings, Database]] = {}


def _database(context: ToolContext) -> tuple[Settings, Database]:
    """Return the database of this pool, made anew when its folder has changed."""
    settings = Settings.of(context.options)
    files = _files(settings.folder)
    known = _open_databases.get("it")
    if known is not None and known[0] == settings and known[1].stamp == _stamp(files):
        return known
    if known is not None:
        known[1].connection.close()
    made = settings, _open(settings, files, context.scratch)
    _open_databases["it"] = made
    return made


@tool(
    name="sql.query",
    idempotent=True,
    timeout_s=60,
    category="data",
    tags=("example", "stream"),
    # what DuckDB may have by default, and what Python needs to carry rows on
    memory_mb=500,
)
def query(
    sql: Annotated[str, Field(min_length=1, max_length=100_000)],
    context: ToolContext,
    parameters: list[Any] | dict[str, Any] | None = None,
) -> Iterator[Batch]:
    """Run one SELECT over the tables, and stream its rows in batches of {columns, rows}.

    `sql.tables` names the tables. The dialect is DuckDB's; `?` or `$name` in the query take `parameters`. Nothing can
    be changed, and no file but the tables can be read. There is always one batch, if only to name the columns. Dates
    and times come as ISO 8601 text; decimals as numbers, or as text where a number would lose digits.
    """
    settings, database = _database(context)
    cursor = database.connection.cursor()
    try:
        _check(cursor, sql)
        _execute(cursor, sql, parameters)
        columns = [str(column[0]) for column in cursor.description or ()]
        sent = False
        batch: list[list[Any]] = []
        room = _BATCH_BYTES
        while rows := cursor.fetchmany(settings.batch_rows):
            for row in rows:
                values = [_plain(value) for value in row]
                batch.append(values)
                room -= sum(len(value) + 5 if isinstance(value, str | bytes) else 9 for value in values)
                if room <= 0 or len(batch) >= settings.batch_rows:
                    yield {"columns": columns, "rows": batch}
                    sent, batch, room = True, [], _BATCH_BYTES
        if batch or not sent:
            yield {"columns": columns, "rows": batch}
    except duckdb.OutOfMemoryException as error:
        raise ResourceExhausted(
            f"sql.query: the query needs more than the {settings.memory_mb} MB of this pool: {error}",
            {"limit": "memory_mb", "value": settings.memory_mb},
        ) from error
    except duckdb.InternalError:
        raise
    except duckdb.Error as error:
        raise _refusal(str(error)) from error
    finally:
        cursor.close()


@tool(name="sql.tables", idempotent=True, timeout_s=30, category="data", tags=("example",))
def tables(context: ToolContext) -> list[Table]:
    """List the tables that `sql.query` can read: one a CSV, Parquet or JSON file, with columns and their types."""
    _, database = _database(context)
    listed: list[Table] = []
    for name, path in database.files.items():
        columns: dict[str, str] = {}
        error = database.errors.get(name)
        if error is None:
            try:
                described = database.connection.execute(f"DESCRIBE {_identifier(name)}").fetchall()
                columns = {str(row[0]): str(row[1]) for row in described}
            except duckdb.Error as changed:
                error = str(changed).partition("\n")[0]
        listed.append({"name": name, "file": path.name, "columns": columns, "error": error})
    return listed


def _check(cursor: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Refuse all but one SELECT (also FROM, WITH, DESCRIBE, SHOW, SUMMARIZE, which are SELECTs to DuckDB)."""
    statements = cursor.extract_statements(sql)
    if len(statements) != 1:
        raise _refusal(f"expected one statement, got {len(statements)}")
    if statements[0].type != duckdb.StatementType.SELECT:
        kind = str(statements[0].type).rpartition(".")[2]
        raise _refusal(f"only SELECT may be run here, not {kind}")


def _execute(
    cursor: duckdb.DuckDBPyConnection, sql: str, parameters: list[Any] | dict[str, Any] | None
) -> None:
    cursor.execute(sql, parameters)
    zoned = [
        str(name) for name, kind, *_ in cursor.description or () if str(kind) == "TIMESTAMP WITH TIME ZONE"
    ]
    if zoned:
        # Python's value of this type needs a further library; its text does not
        replaced = ", ".join(f"CAST({_identifier(name)} AS VARCHAR) AS {_identifier(name)}" for name in zoned)
        cursor.execute(f"SELECT * REPLACE ({replaced}) FROM ({sql.rstrip().rstrip(';')}\n)", parameters)


def _refusal(why: str) -> InvalidArgument:
    return InvalidArgument(
        f"sql.query: {why}",
        {"faults": [{"path": "/sql", "expected": "one SELECT over the tables", "message": why}]},
    )


def _plain(value: Any) -> Any:  # noqa: ANN401 (any value that DuckDB has)
    """Turn a value of a row into one of a payload."""
    if value is None or isinstance(value, str | bool | bytes):
        return value
    if isinstance(value, int):
        return value if -_INTEGER_MAX <= value < 2 * _INTEGER_MAX else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, decimal.Decimal):
        number = float(value)
        return number if decimal.Decimal(repr(number)) == value else str(value)
    if isinstance(value, dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value)
