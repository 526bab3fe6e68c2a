"""The ledger's schema, kept by Alembic. The migrations are in ``migrations/versions``."""

import fcntl
import os
import sqlite3
from pathlib import Path
from typing import Final

HEAD: Final = "0001"
"""The newest migration. A database that is there already does not need Alembic, which takes a quarter of a second and
20 MB to load (a test compares this with the migrations)."""

MIGRATIONS: Final = Path(__file__).parent / "migrations"


def migrate(path: Path, lock_directory: Path) -> None:
    """Bring a SQLite database up to date; processes that start together take turns. Raises sqlite3.Error or OSError."""
    if _revision(path) == HEAD:
        return
    lock_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(lock_directory / "migration.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _revision(path) != HEAD:
            _upgrade(path)
    finally:
        os.close(lock)


def _revision(path: Path) -> str | None:
    database = sqlite3.connect(path, timeout=1.0)
    try:
        found = database.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return None
        raise
    finally:
        database.close()
    return str(found[0]) if found else None


def _upgrade(path: Path) -> None:
    from alembic import command  # noqa: PLC0415  only a new or an old database needs it
    from alembic.config import Config  # noqa: PLC0415
    from sqlalchemy import URL, create_engine  # noqa: PLC0415
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415
    from sqlalchemy.pool import NullPool  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    engine = create_engine(URL.create("sqlite", database=str(path)), poolclass=NullPool)
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except DBAPIError as error:
        if isinstance(error.orig, sqlite3.Error):
            raise error.orig from error
        raise
