"""The SQL tools: answers, and no way out of their folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_broker.errors import InvalidArgument, ResourceExhausted
from mcp_broker.worker import ToolContext

duckdb = pytest.importorskip("duckdb")
sql = pytest.importorskip("mcp_broker_workers.sql")


@pytest.fixture
def context(tmp_path: Path) -> Iterator[ToolContext]:
    """Return the context of a pool with a folder of three tables, a broken one, and a way out."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "people.csv").write_text("name,born\nAda,1815\nGrace,1906\n")
    (folder / "items.json").write_text(json.dumps([{"id": 1, "tags": ["a"]}, {"id": 2, "tags": []}]))
    duckdb.sql("SELECT i AS n, i / 2 AS half FROM range(5000) t(i)").write_parquet(
        str(folder / "numbers.parquet")
    )
    (folder / "broken.parquet").write_text("nothing of the kind")
    (folder / "notes.txt").write_text("no table")
    (tmp_path / "secret.csv").write_text("secret\nhunter2\n")
    (folder / "way_out.csv").symlink_to(tmp_path / "secret.csv")
    yield ToolContext(options={"folder": str(folder), "memory_mb": 64}, scratch=tmp_path / "scratch")
    for _, database in sql._open_databases.values():
        database.connection.close()
    sql._open_databases.clear()


def rows(context: ToolContext, query: str, parameters: Any = None) -> list[list[Any]]:
    return [row for batch in sql.query(query, context, parameters) for row in batch["rows"]]


def test_tables_are_the_files_of_the_folder(context: ToolContext) -> None:
    listed = {table["name"]: table for table in sql.tables(context)}
    assert set(listed) == {"people", "items", "numbers", "broken"}
    assert listed["people"]["columns"] == {"name": "VARCHAR", "born": "BIGINT"}
    assert listed["people"]["error"] is None
    assert listed["broken"]["error"]
    assert rows(context, "SELECT name FROM people ORDER BY born DESC") == [["Grace"], ["Ada"]]
    assert rows(context, "SELECT tags FROM items ORDER BY id") == [[["a"]], [[]]]


def test_rows_come_in_batches_that_name_their_columns(context: ToolContext) -> None:
    batches = list(sql.query("SELECT n FROM numbers ORDER BY n", context))
    assert [len(batch["rows"]) for batch in batches] == [1000] * 5
    assert all(batch["columns"] == ["n"] for batch in batches)
    assert batches[4]["rows"][-1] == [4999]
    assert list(sql.query("SELECT n FROM numbers WHERE n < 0", context)) == [{"columns": ["n"], "rows": []}]


def test_wide_rows_come_in_smaller_batches(context: ToolContext) -> None:
    batches = list(sql.query("SELECT repeat('x', 100000) FROM numbers LIMIT 10", context))
    assert max(sum(len(row[0]) for row in batch["rows"]) for batch in batches) <= 400_000
    assert sum(len(batch["rows"]) for batch in batches) == 10


def test_parameters_are_values_not_text(context: ToolContext) -> None:
    assert rows(context, "SELECT born FROM people WHERE name = ?", ["Ada"]) == [[1815]]
    assert rows(context, "SELECT born FROM people WHERE name = $who", {"who": "' OR 1=1 --"}) == []


def test_values_become_what_a_payload_carries(context: ToolContext) -> None:
    (row,) = rows(
        context,
        "SELECT 1.25, DATE '2026-01-02', TIMESTAMP '2026-01-02 03:04:05', {'a': [1, NULL]}, MAP {1: 'x'},"
        " 170141183460469231731687303715884105727, 0.1::DECIMAL(38, 30), 'NaN'::DOUBLE, '\\x00'::BLOB, NULL",
    )
    assert row[:5] == [1.25, "2026-01-02", "2026-01-02T03:04:05", {"a": [1, None]}, {"1": "x"}]
    assert row[5:] == ["170141183460469231731687303715884105727", 0.1, "nan", b"\0", None]
    ((now,),) = rows(context, "SELECT TIMESTAMPTZ '2026-01-02 03:04:05+00' AS at")
    assert now.startswith("2026-01-0")


def test_new_and_changed_files_are_seen(context: ToolContext) -> None:
    folder = Path(context.options["folder"])
    assert rows(context, "SELECT count(*) FROM people") == [[2]]
    (folder / "more.csv").write_text("a\n1\n")
    (folder / "people.csv").write_text("name,born,died\nAda,1815,1852\n")
    assert rows(context, "SELECT * FROM more") == [[1]]
    assert rows(context, "SELECT died FROM people") == [[1852]]


def test_files_with_one_stem_keep_their_endings(context: ToolContext) -> None:
    (Path(context.options["folder"]) / "people.tsv").write_text("name\nMary\n")
    assert {"people.csv", "people.tsv"} <= {table["name"] for table in sql.tables(context)}
    assert rows(context, 'SELECT name FROM "people.tsv"') == [["Mary"]]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM read_text('/proc/self/environ')",
        "SELECT * FROM glob('/*')",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM read_text('{folder}/notes.txt')",
        "SELECT * FROM read_csv('{folder}/way_out.csv')",
        "SELECT * FROM read_csv('{folder}/../secret.csv')",
        "SELECT * FROM way_out",
        "SELECT * FROM sniff_csv('/etc/passwd')",
        "SELECT * FROM parquet_metadata('/etc/passwd')",
        "SELECT * FROM read_json('http://127.0.0.1:9/x')",
        "SELECT * FROM query('COPY people TO ''{folder}/x.csv''')",
        "COPY people TO '{folder}/x.csv'",
        "COPY people TO '{folder}/people.csv'",
        "EXPORT DATABASE '{folder}/x'",
        "ATTACH '{folder}/x.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET memory_limit = '8GB'",
        "SET enable_external_access = true",
        "PRAGMA enable_external_access",
        "CREATE TABLE x (i INT)",
        "CREATE OR REPLACE VIEW people AS SELECT 1",
        "DROP VIEW people",
        "INSERT INTO people VALUES ('x', 1)",
        "EXPLAIN ANALYZE COPY people TO '{folder}/x.csv'",
        "SELECT 1; COPY people TO '{folder}/x.csv'",
        "",
        "   ",
        "-- nothing",
        "SELEC 1",
    ],
)
def test_there_is_no_way_out(statement: str, context: ToolContext, tmp_path: Path) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    before = state()
    with pytest.raises(InvalidArgument):
        rows(context, statement.format(folder=context.options["folder"]))
    assert state() == before
    assert rows(context, "SELECT count(*) FROM people") == [[2]]


@pytest.mark.parametrize(
    "statement",
    [
        "FROM read_csv('/etc/passwd')",
        "FROM read_csv('{folder}/way_out.csv')",
        "COPY people TO '{folder}/people.csv'",
        "ATTACH '{folder}/x.db'",
        "INSTALL httpfs",
        "SET allowed_paths = ['/etc/passwd']",
        "SET enable_external_access = true",
    ],
)
def test_database_itself_refuses_what_the_check_would(statement: str, context: ToolContext) -> None:
    _, database = sql._database(context)
    with pytest.raises(duckdb.Error):
        database.connection.execute(statement.format(folder=context.options["folder"])).fetchall()


def test_memory_is_bounded(context: ToolContext) -> None:
    with pytest.raises(ResourceExhausted) as exhausted:
        rows(
            context,
            "SELECT max(length(s)) FROM (SELECT string_agg(repeat('x', 100000), '') AS s FROM numbers)",
        )
    assert exhausted.value.details == {"limit": "memory_mb", "value": 64}


def test_pool_without_a_folder_has_no_tables(tmp_path: Path) -> None:
    context = ToolContext(scratch=tmp_path)
    assert sql.tables(context) == []
    assert rows(context, "SELECT 1") == [[1]]


@pytest.mark.parametrize("options", [{"folder": "/no/such"}, {"threads": 0}, {"memory_mb": "1"}])
def test_wrong_options_are_named(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        sql.tables(ToolContext(options=options, scratch=tmp_path))
