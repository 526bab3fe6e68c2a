"""A file for records that the database cannot take, and the sign of life of the process that owns it.

Each process has one spool file, named after its instance id, and holds an exclusive lock on it for as long as it lives:
the operating system lets go of the lock when the process dies, however that happens. So a process that starts knows which
of the others are dead, and takes over what they left.
"""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from aibridge.records import Record

_SUFFIX: Final = ".jsonl"
_BATCH: Final = 1000

_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder(Record)


class Spool:
    """The spool file of one instance, in a directory that the instances of one database share."""

    def __init__(self, directory: Path, instance: str) -> None:
        self.instance = instance
        self.size = 0
        """Bytes of records that wait to be replayed."""
        self.directory = directory
        self._path = directory / f"{instance}{_SUFFIX}"
        self._file: int | None = None

    def acquire(self) -> None:
        """Create the file and lock it. Raises OSError."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """Give the lock up, and with it the file where it holds nothing."""
        if self._file is not None:
            file, self._file = self._file, None
            if not self.size:
                self._path.unlink(missing_ok=True)
            os.close(file)

    def append(self, records: list[Record]) -> None:
        """Write records to disk, all or nothing. Raises OSError."""
        if self._file is None:
            self.acquire()
        file = self._file
        assert file is not None  # noqa: S101  acquire opened it
        data = b"".join(_encoder.encode(record) + b"\n" for record in records)
        try:
            written = 0
            while written < len(data):
                written += os.write(file, data[written:])
            os.fsync(file)
        except OSError:
            os.ftruncate(file, self.size)
            raise
        self.size += len(data)

    def batches(self) -> Iterator[list[Record]]:
        """The records in the file, in order. Raises OSError."""
        yield from _read(self._path)

    def clear(self) -> None:
        """Forget the records: they are in the database. Raises OSError."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
        self.size = 0

    def left_behind(self) -> Iterator[list[Record]]:
        """The records of dead processes. A file is removed once the caller has come back for more. Raises OSError."""
        for path in self._others():
            file = os.open(path, os.O_RDWR)
            try:
                if _locked_by_another(file):
                    continue
                yield from _read(path)
                path.unlink(missing_ok=True)
            finally:
                os.close(file)

    def alive(self) -> list[str]:
        """The instances of other living processes."""
        found = []
        for path in self._others():
            file = os.open(path, os.O_RDWR)
            try:
                if _locked_by_another(file):
                    found.append(path.name.removesuffix(_SUFFIX))
            finally:
                os.close(file)
        return found

    def _others(self) -> list[Path]:
        return sorted(path for path in self.directory.glob(f"*{_SUFFIX}") if path != self._path)


def _locked_by_another(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _read(path: Path) -> Iterator[list[Record]]:
    batch: list[Record] = []
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break  # cut off by a crash: its writer never said that it was durable
            batch.append(_decoder.decode(line))
            if len(batch) == _BATCH:
                yield batch
                batch = []
    if batch:
        yield batch
