"""The database: where it is, and its schema, kept by Alembic. The migrations are in ``migrations/versions``.

A new database is made from ``migrations/schema.sql``, which is what all of them come to.
"""

import fcntl
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

HEAD: Final = "0002"
"""The newest migration. Only a database of an earlier version needs Alembic, which takes a quarter of a second and 20 MB to
load (a test compares this with the migrations)."""

MIGRATIONS: Final = Path(__file__).parent / "migrations"
SCHEMA: Final = MIGRATIONS / "schema.sql"


def directory_beside(path: Path) -> Path:
    """The directory for what belongs to a database and is not in it: spools, and the lock for migrations."""
    return path.with_name(path.name + "-spool")


def identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from the one that takes its place, should it be deleted while we are connected to it.

    None where there is none. Raises OSError where that cannot be found out, such as for want of permission.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def connect(path: Path, seconds: float) -> sqlite3.Connection:
    """Connect to a database that is there; wait for others' locks that long. Raises sqlite3.Error."""
    uri = f"{path.absolute().as_uri()}?mode=rw"
    return sqlite3.connect(uri, uri=True, timeout=seconds, isolation_level=None, cached_statements=32)


def migrate(path: Path, lock_directory: Path, seconds: float) -> None:
    """Create a SQLite database, or bring it up to date; processes that start together take turns.

    Raises sqlite3.Error or OSError.
    """
    if path.exists() and _revision(path, seconds) == HEAD:
        return
    lock_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(lock_directory / "migration.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _create(path)
        match _revision(path, seconds):
            case None:
                _populate(path, seconds)
            case revision if revision != HEAD:
                _upgrade(path, seconds)
    finally:
        os.close(lock)


def _create(path: Path) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # What a database that was deleted has left must not be taken for a part of the new one.
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # prompts are nobody else's business


def _revision(path: Path, seconds: float) -> str | None:
    """The migration that the schema is at; None where there is no schema yet."""
    with closing(connect(path, seconds)) as database:
        try:
            found = database.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return None
            raise
    return str(found[0]) if found else ""


def _populate(path: Path, seconds: float) -> None:
    with closing(connect(path, seconds)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(f"BEGIN IMMEDIATE;\n{SCHEMA.read_text(encoding='utf-8')}COMMIT;")


def _upgrade(path: Path, seconds: float) -> None:
    from alembic import command  # noqa: PLC0415  only an old database needs it
    from alembic.config import Config  # noqa: PLC0415
    from alembic.util import CommandError  # noqa: PLC0415
    from sqlalchemy import create_engine  # noqa: PLC0415
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415
    from sqlalchemy.pool import NullPool  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    engine = create_engine("sqlite://", creator=lambda: connect(path, seconds), poolclass=NullPool)
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            # All of it or nothing, whatever happens on the way. sqlite3 alone begins no transaction for DDL.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as error:  # such as a revision that is not known
        raise sqlite3.DatabaseError(f"the database is not one of this version of aibridge: {error}") from error
    except DBAPIError as error:
        raise (error.orig or error) from error
