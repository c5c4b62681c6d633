"""What an sqlite database has, copied into an empty one of PostgreSQL: at the first start after a setting names one."""

import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlencode

from vila_ops.errors import ServerFailed
from vila_ops.local.databases import UPGRADE, copy_database, merge_log
from vila_ops.tracking.outbox import shown

if TYPE_CHECKING:
    from psycopg import Connection

PREFECT_URL = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
VERSIONS = "alembic_version"
"""The table with the version of all others, which each database has for itself."""
NEW_ROWS = {
    "experiments": "experiment_id = 0",
    "workspaces": "name = 'default'",
    "work_pool": "name = 'default-agent-pool'",
    "work_queue": "name = 'default'",
}
"""What MLflow and Prefect write into tables by themselves, as soon as they make them or start; other rows are kept."""
COLUMNS = """SELECT table_name, column_name, data_type, column_default LIKE 'nextval(%' OR is_identity = 'YES'
FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
WHERE table_schema = current_schema() AND table_type = 'BASE TABLE' AND is_generated = 'NEVER'"""
FOREIGN_KEYS = """SELECT format('ALTER TABLE %s DROP CONSTRAINT %I', conrelid::regclass, conname),
       format('ALTER TABLE %s ADD CONSTRAINT %I %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
FROM pg_constraint WHERE contype = 'f' AND connamespace = current_schema()::regnamespace"""
COUNTER = "SELECT setval(pg_get_serial_sequence(%s, %s), coalesce(max({column}), 0) + 1, false) FROM {table}"
EPOCH = datetime(1970, 1, 1)
"""What SQLAlchemy's durations in sqlite are counted from."""
log = logging.getLogger(__name__)
Columns = dict[str, str]
"""Types of a table's columns in PostgreSQL."""


def take_over_mlflow(file: Path, url: str, env: Mapping[str, str]) -> None:
    """Copy MLflow's sqlite file into a database of PostgreSQL that has its tables. See `_take_over`."""
    upgrade = (sys.executable, "-c", UPGRADE)
    _take_over("mlflow", file, url, upgrade, {**env, "VILA_OPS_DATABASE": f"sqlite:///{_copy_of(file)}"})


def take_over_prefect(file: Path, url: str, env: Mapping[str, str]) -> None:
    """Copy Prefect's sqlite file into a database of PostgreSQL, whose tables are made. See `_take_over`."""
    upgrade = (sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y")
    of_copy, of_target = ({**env, PREFECT_URL: one} for one in (f"sqlite+aiosqlite:///{_copy_of(file)}", url))
    _take_over("prefect", file, for_psycopg(url), upgrade, of_copy, of_target=of_target)


def for_psycopg(url: str) -> str:
    """A URL for asyncpg as psycopg takes it: `ssl` is `sslmode` there, and options of asyncpg alone are left out."""
    from psycopg import pq

    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    place, _, query = url.partition("?")
    options = [("sslmode" if name == "ssl" else name, value) for name, value in parse_qsl(query)]
    kept = urlencode([option for option in options if option[0] in known], quote_via=quote)
    return place.replace("postgresql+asyncpg://", "postgresql://", 1) + (f"?{kept}" if kept else "")


def _take_over(
    name: str,
    file: Path,
    url: str,
    upgrade: tuple[str, ...],
    of_copy: Mapping[str, str],
    *,
    of_target: Mapping[str, str] | None = None,
) -> None:
    """Copy every row of an sqlite file, whose name then says so, unless PostgreSQL has rows that are not NEW_ROWS.

    The tables of PostgreSQL are made by `upgrade` with the variables `of_target`, unless they are there; a copy of the
    file is brought to their version before. Raises ServerFailed.
    """
    import psycopg

    copy = _copy_of(file)
    try:
        with psycopg.connect(url) as target:
            if (used := _used_table(target)) is not None:
                log.warning(
                    "%s: its database in PostgreSQL has rows already (of an earlier copy, or its own; in the table "
                    "%s), so what %s has is not copied; move this file away if that is meant", name, used, file,
                )  # fmt: skip
                return
            target.rollback()  # no lock is held while its tables are changed
            if of_target is not None:
                _run(name, upgrade, of_target)
            copy_database(file, copy)
            merge_log(file)
            _run(name, upgrade, of_copy)
            with closing(sqlite3.connect(copy)) as source:
                num_rows = _copy_all(source, target)
    except (psycopg.Error, sqlite3.Error) as error:
        way = "no row was written there; move the file away to start with an empty database"
        raise ServerFailed(shown(f"{name}: {file} was not copied into PostgreSQL ({error}); {way}")) from error
    finally:
        copy.unlink(missing_ok=True)
    moved = file.with_name(f"{file.name}.moved-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    file.rename(moved)
    log.info("%s: %d rows were copied from sqlite into PostgreSQL; %s is the file of before", name, num_rows, moved)


def _used_table(target: "Connection[Any]") -> str | None:
    """A table with rows that are not NEW_ROWS; None where there is no such table, or no table yet."""
    for table in sorted({table for table, *_ in target.execute(COLUMNS).fetchall()} - {VERSIONS}):
        found = f"SELECT EXISTS (SELECT 1 FROM {{table}} WHERE NOT ({NEW_ROWS.get(table, 'false')}))"
        if target.execute(_sql(found, table=table)).fetchone() == (True,):
            return str(table)
    return None


def _copy_of(file: Path) -> Path:
    return file.with_name(f".{file.name}.copied")


def _run(name: str, command: tuple[str, ...], env: Mapping[str, str]) -> None:
    """Bring tables to the version of the installed package; no list of processes shows a URL. Raises ServerFailed."""
    done = subprocess.run(
        command, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    if done.returncode:
        raise ServerFailed(shown(f"{name}: the tables of its database were not upgraded:\n{done.stdout[-4000:]}"))


def _copy_all(source: sqlite3.Connection, target: "Connection[Any]") -> int:
    """Copy all tables in one transaction, without foreign keys, some of which form circles; returns the rows."""
    target.execute("SET TIME ZONE 'UTC'")  # in which Prefect's sqlite has its times
    tables: dict[str, Columns] = {}
    counters: list[tuple[str, str]] = []
    for table, column, kind, counts in target.execute(COLUMNS).fetchall():
        tables.setdefault(table, {})[column] = kind
        if counts:
            counters.append((table, column))
    del tables[VERSIONS]
    there = {name for (name,) in source.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    keys = target.execute(FOREIGN_KEYS).fetchall()
    for drop, _ in keys:
        target.execute(drop)
    num_rows = 0
    for table in sorted(tables.keys() & there):
        target.execute(_sql("DELETE FROM {table}", table=table))  # what migrations write into new tables
        num_rows += _copy_table(table, tables[table], source, target)
    for table, column in counters:
        target.execute(_sql(COUNTER, table=table, column=column), (table, column))
    for _, add in keys:
        target.execute(add)
    return num_rows


def _copy_table(table: str, columns: Columns, source: sqlite3.Connection, target: "Connection[Any]") -> int:
    """Copy the rows of a table as texts, which PostgreSQL reads by the types of its columns."""
    from psycopg import sql

    names = [name for _, name, *_ in source.execute(f'PRAGMA table_info("{table}")')]  # without generated columns
    chosen = ", ".join(f'"{name}"' for name in names)
    rows = source.execute(f'SELECT {chosen} FROM "{table}"')
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, names))
    )
    kinds = [columns.get(name, "") for name in names]
    with target.cursor() as cursor:
        with cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row(list(_texts(row, kinds)))
        return cursor.rowcount


def _texts(row: tuple[Any, ...], kinds: list[str]) -> Iterator[str | None]:
    for value, kind in zip(row, kinds, strict=True):
        if value is None:
            yield None
        elif kind == "interval":
            yield f"{(datetime.fromisoformat(value) - EPOCH).total_seconds()} seconds"
        else:
            yield f"\\x{value.hex()}" if isinstance(value, bytes) else str(value)


def _sql(text: str, **names: str) -> Any:
    """A statement with names of tables and columns put in."""
    from psycopg import sql

    return sql.SQL(text).format(**{key: sql.Identifier(name) for key, name in names.items()})
