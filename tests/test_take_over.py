"""What an sqlite file and a URL are before rows are copied; `test_passwords.py` copies them into PostgreSQL."""

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from vila_ops.local.databases import merge_log
from vila_ops.local.take_over import for_psycopg

KILLED = """
import os, signal, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA journal_mode = WAL")
database.execute("CREATE TABLE flow (name TEXT)")
database.execute("INSERT INTO flow VALUES ('vila')")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_file_that_is_kept_has_what_a_killed_writer_left_beside_it(tmp_path: Path) -> None:
    file, alone = tmp_path / "prefect.db", tmp_path / "moved.db"
    subprocess.run([sys.executable, "-c", KILLED, file], check=False)
    assert (tmp_path / "prefect.db-wal").stat().st_size
    merge_log(file)
    shutil.copyfile(file, alone)
    with closing(sqlite3.connect(alone)) as database:
        assert database.execute("SELECT name FROM flow").fetchall() == [("vila",)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("vila:a%20b@db:5432/prefect", "vila:a%20b@db:5432/prefect"),
        ("vila@db/prefect?ssl=require", "vila@db/prefect?sslmode=require"),
        ("/prefect?host=%2Frun%2Fmy%20pg&ssl=disable", "/prefect?host=%2Frun%2Fmy%20pg&sslmode=disable"),
        ("vila@db/prefect?ssl=verify-full&prepared_statement_cache_size=0", "vila@db/prefect?sslmode=verify-full"),
        ("vila@db/prefect?command_timeout=5", "vila@db/prefect"),
    ],
)
def test_psycopg_takes_a_url_that_asyncpg_takes(given: str, expected: str) -> None:
    from psycopg.conninfo import conninfo_to_dict

    url = for_psycopg(f"postgresql+asyncpg://{given}")
    assert conninfo_to_dict(url) == conninfo_to_dict(f"postgresql://{expected}")
