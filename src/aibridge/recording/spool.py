"""A file for records that the database cannot take, and the sign of life of the process that owns it.

Each process has one spool file, named after its instance id, and holds an exclusive lock on it for as long as it lives:
the operating system lets go of the lock when the process dies, however that happens. So a process that starts knows which
of the others are dead, and takes over what they left. A file is locked before it gets its name, so nobody ever finds the
file of a living process without its lock.

One record is one line of JSON. A line that cannot be read is skipped and counted: the others are worth more than it.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Final, get_args, get_type_hints

import msgspec
import uuid_utils

from aibridge.records import Record

UNENCODABLE: Final = (AttributeError, TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError)
"""What a value that has no JSON form raises: a foreign type, text that is not Unicode, a structure without an end."""

_SUFFIX: Final = ".jsonl"
_BATCH: Final = 1000
_BATCH_BYTES: Final = 16 * 1024 * 1024

_encoder: Final = msgspec.json.Encoder()


@dataclass(frozen=True, slots=True)
class Batch:
    """Records as they were read from the spool of `instance`. `damaged` counts the lines that are none any more."""

    instance: str
    records: Sequence[Record]
    damaged: int
    end: int
    """Where in the file the next batch begins."""


class Spool:
    """The spool file of one instance, in a directory that the instances of one database share."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.instance = ""
        """The id of this life: from `acquire` to `release`."""
        self._file: int | None = None
        self._start = 0
        self._end = 0
        self._wanted = 0  # bytes for which there was no room

    @property
    def waiting(self) -> int:
        """Bytes of records that wait to be replayed."""
        return self._end - self._start

    @property
    def is_short_of_room(self) -> bool:
        """Whether the disk has less room than what it had none for last. Less than that may have fitted since."""
        if self._wanted:
            with suppress(OSError):
                room = os.statvfs(self.directory)
                if room.f_bavail * room.f_frsize >= self._wanted:
                    self._wanted = 0
        return self._wanted > 0

    def acquire(self) -> None:
        """Make sure that the file is there under its name, and locked. Raises OSError."""
        if self._file is None:
            self.instance = str(uuid_utils.uuid7())
            self._start = self._end = 0
        elif _is_at(self._file, self._path):
            return
        # Somebody has removed it: what it holds, and our sign of life, move to a new one.
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        unnamed = self._path.with_suffix(".new")
        file = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._file is not None:
                _copy(self._file, file)
            unnamed.rename(self._path)
        except OSError:
            os.close(file)
            unnamed.unlink(missing_ok=True)
            raise
        if self._file is not None:
            os.close(self._file)
        self._file = file

    def release(self) -> None:
        """Give the lock up, and with it the file where it holds nothing. Raises OSError."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            if not self.waiting:
                self._path.unlink(missing_ok=True)
        finally:
            os.close(file)

    def append(self, records: Sequence[Record]) -> Mapping[int, str]:
        """Write records to disk, all or nothing. Answers which of them cannot be written, ever, and why. Raises OSError."""
        rejected: dict[int, str] = {}
        lines: list[bytes] = []
        for index, record in enumerate(records):
            try:
                line = _encoder.encode(record)
            except UNENCODABLE as error:
                rejected[index] = type(error).__name__
            else:  # a provider's raw JSON may be indented; in JSON a line feed can only be white space
                lines.append(line.replace(b"\n", b" ") + b"\n")
        self.acquire()
        assert self._file is not None  # noqa: S101  acquire opened it
        data = b"".join(lines)
        try:
            _write_at(self._file, self._end, data)
            os.fsync(self._file)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                self._wanted = len(data)
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(data)
        return rejected

    def next_batch(self) -> Batch | None:
        """The oldest records that wait. Raises OSError."""
        if self._file is None or not self.waiting:
            return None
        batch = _read(self._file, self.instance, self._start, self._end)
        if batch.end == self._start:  # somebody cut our file short
            return Batch(self.instance, (), 1, self._end)
        return batch

    def forget(self, batch: Batch) -> None:
        """The batch that `next_batch` gave is in the database. Raises OSError."""
        self._start = batch.end
        if self._file is not None and not self.waiting:
            os.ftruncate(self._file, 0)
            self._start = self._end = 0

    def left_behind(self) -> Generator[Batch]:
        """The records of dead processes. A file is removed once the caller has come back for more. Raises OSError."""
        for path in self._others():
            with _opened(path) as file:
                if file is None or _locked_by_another(file):
                    continue
                batch = _read(file, _instance(path), 0)
                while batch.records or batch.damaged:
                    yield batch
                    batch = _read(file, batch.instance, batch.end)
                path.unlink(missing_ok=True)

    def alive(self) -> list[str]:
        """The instances of the processes that live, this one included."""
        found = [self.instance]
        for path in self._others():
            with _opened(path) as file:
                if file is not None and _locked_by_another(file):
                    found.append(_instance(path))
        return found

    @property
    def _path(self) -> Path:
        return self.directory / f"{self.instance}{_SUFFIX}"

    def _others(self) -> list[Path]:
        return sorted(path for path in self.directory.glob(f"*{_SUFFIX}") if path != self._path)


def _instance(path: Path) -> str:
    return path.name.removesuffix(_SUFFIX)


@contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    """A file for as long as it is looked at; None where its owner has just removed it."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield None
        return
    try:
        yield file
    finally:
        os.close(file)


def _locked_by_another(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _copy(source: int, target: int) -> None:
    with os.fdopen(os.dup(source), "rb") as old, os.fdopen(os.dup(target), "wb") as new:
        old.seek(0)
        shutil.copyfileobj(old, new)


def _write_at(file: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        offset += written
        view = view[written:]


def _read(file: int, instance: str, start: int, limit: int | None = None) -> Batch:
    records: list[Record] = []
    damaged = 0
    end = start
    with os.fdopen(os.dup(file), "rb") as lines:
        lines.seek(start)
        for line in lines:
            # A line without an end was cut off by a crash, or for want of room: nobody was told that it is durable.
            if not line.endswith(b"\n") or (limit is not None and end + len(line) > limit):
                break
            end += len(line)
            try:
                records.append(_decode(line))
            except (msgspec.MsgspecError, UnicodeError, RecursionError):
                damaged += 1
            if len(records) + damaged == _BATCH or end - start >= _BATCH_BYTES:
                break
    return Batch(instance, records, damaged, end)


def _with_raw_metadata(kind: type[Any]) -> type[Any]:
    """The same record, but what is in `metadata` stays the text that it was: it holds JSON that a provider wrote."""
    types = get_type_hints(kind)
    fields = [(name, dict[str, msgspec.Raw] if name == "metadata" else types[name]) for name in kind.__struct_fields__]
    return msgspec.defstruct(kind.__name__, fields, tag=True)


_KINDS: Final[dict[str, type[Record]]] = {kind.__name__: kind for kind in get_args(Record)}
_STORED: Final = reduce(or_, map(_with_raw_metadata, _KINDS.values()))
_decoder: Final[msgspec.json.Decoder[Any]] = msgspec.json.Decoder(_STORED)


def _decode(line: bytes) -> Record:
    stored = _decoder.decode(line)
    return _KINDS[type(stored).__name__](**msgspec.structs.asdict(stored))
