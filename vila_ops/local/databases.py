"""The servers' databases: MLflow's is upgraded after an update of MLflow; an sqlite file is copied while it is used."""

import errno
import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

from vila_ops.artifacts.disk_faults import WAY_OUT, free_bytes, require
from vila_ops.config.base import fingerprint
from vila_ops.config.local import LocalServers
from vila_ops.errors import CorruptArtifact, DiskFault, ServerFailed
from vila_ops.local.process import root_of
from vila_ops.tracking.outbox import shown

UPGRADE = "import os; from mlflow.db import commands; commands(['upgrade', os.environ['VILA_OPS_DATABASE']])"
"""`mlflow db upgrade` of a URL that no list of processes shows. It makes the tables of an empty database."""
UPGRADED = "mlflow.version"
"""File in the servers' folder: the version of MLflow that has upgraded a database, and a digest of its URL."""
log = logging.getLogger(__name__)


def upgrade_mlflow(settings: LocalServers, url: str, env: Mapping[str, str]) -> None:
    """Upgrade the tables of MLflow's database, unless this version of MLflow has had it; an sqlite file is copied.

    `env` are the servers' variables. Raises ServerFailed, and errors of `copy_database` for an sqlite file.
    """
    root, now = root_of(settings), version("mlflow")
    file, marker, upgraded = root / "mlflow.db", root / UPGRADED, f"{now} {fingerprint(url)}"
    before = marker.read_text() if marker.exists() else None
    has_tables = settings.mlflow_database is not None or file.exists()
    if before != upgraded and has_tables:
        if settings.mlflow_database is None:
            _keep_copy(file, now)
        done = subprocess.run(
            [sys.executable, "-c", UPGRADE], env={**os.environ, **env, "VILA_OPS_DATABASE": url},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if done.returncode:
            raise ServerFailed(shown(f"the tables of MLflow's database were not upgraded:\n{done.stdout[-4000:]}"))
        log.info("mlflow: its database has the tables of MLflow %s", now)
    marker.write_text(upgraded)


def _keep_copy(file: Path, now: str) -> None:
    """Copy an sqlite file to a name with the new version and the time of its last change."""
    changed = datetime.fromtimestamp(file.stat().st_mtime, UTC)
    copy = file.with_name(f"{file.name}.before-{now}-{changed:%Y%m%dT%H%M%SZ}")
    if not copy.exists():
        draft = copy.with_name(f".{copy.name}")
        copy_database(file, draft)
        draft.replace(copy)


def merge_log(file: Path) -> None:
    """Write into an sqlite file what the log beside it has, which a killed writer leaves. Raises sqlite3.Error."""
    with closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def copy_database(live: Path, target: Path) -> None:
    """Copy an sqlite database as of one moment, whoever writes to it. Raises CorruptArtifact and DiskFault."""
    require(target, live.stat().st_size)
    try:
        uri = f"file:{quote(str(live))}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as source, closing(sqlite3.connect(target)) as copy:
            source.backup(copy)
            (state,) = copy.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:  # the file may be whole: a full or broken disk, no right to read it
        number = errno.ENOSPC if error.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
        raise DiskFault(
            number,
            f"{live} was not copied to {target} ({error}), and its disk has {free_bytes(target)} bytes free; {WAY_OUT}",
        ) from error
    except sqlite3.DatabaseError as error:
        state = str(error)
    if state != "ok":
        raise CorruptArtifact(f"{live} cannot be copied as a database of sqlite ({state}); restore an earlier backup")
