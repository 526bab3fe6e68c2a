"""The directory of traffic dumps: private, bounded in size and age, shared by all processes that are told to use it."""

import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Final

# By time, provider and call: what tidying may delete, and nothing else that is in the directory.
_NAME: Final = re.compile(r"\d{8}T\d{6}\.\d{6}Z-[\w-]+-[\w.-]+\.warc")
_UNFIT: Final = re.compile(r"[^\w.-]", re.ASCII)
_TIDY_SECONDS: Final = 60.0
_TIDY_SHARE: Final = 64  # of the bound: as much as one process may write before it looks again


class NotPrivate(OSError):
    """Others could read the directory, or put links into it."""


class DumpFolder:
    """Makes files in the directory, and deletes the oldest. `max_bytes` is of all files, `max_seconds` their age.

    All methods may raise OSError. A directory that is not there is made; one that others can use is refused, because to take
    their access away might be wrong: it may be any directory.
    """

    def __init__(self, directory: Path, max_bytes: int, max_seconds: float) -> None:
        self.directory = directory
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._written = 0  # since it was tidied
        self._tidied = -_TIDY_SECONDS

    @property
    def untidy(self) -> bool:
        """Whether there may be something to delete."""
        return self._written * _TIDY_SHARE >= self._max_bytes or time.monotonic() - self._tidied >= _TIDY_SECONDS

    def create(self, at: datetime, provider: str, call_id: str) -> tuple[str, int]:
        """A new file for a call: its name and an open descriptor."""
        with suppress(FileExistsError):
            self.directory.mkdir(mode=0o700, parents=True)
        name = f"{at:%Y%m%dT%H%M%S.%f}Z-{provider}-{_UNFIT.sub('_', call_id)}.warc"
        with self._opened() as directory:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            return name, os.open(name, flags, 0o600, dir_fd=directory)

    def close(self, file: int) -> None:
        """A file is complete."""
        self._written += os.fstat(file).st_size
        os.close(file)

    def discard(self, name: str, file: int) -> None:
        """A file is not wanted."""
        os.close(file)
        with self._opened() as directory:
            os.unlink(name, dir_fd=directory)

    def tidy(self) -> None:
        """Delete what is too old, and the oldest of what is too much. What is written to now is not old."""
        self._tidied, self._written = time.monotonic(), 0
        with suppress(FileNotFoundError), self._opened() as directory:
            dumps = sorted(_dumps(directory), reverse=True)
            total, oldest = 0, time.time() - self._max_seconds
            for changed, name, size in dumps:
                total += size
                if changed < oldest or total > self._max_bytes:
                    with suppress(FileNotFoundError):  # another process was faster
                        os.unlink(name, dir_fd=directory)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The directory, for as long as it is needed: somebody may remove it."""
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(directory)
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise NotPrivate("others have access to the directory: it has to be this user's own, with mode 700")
            yield directory
        finally:
            os.close(directory)


def _dumps(directory: int) -> Iterator[tuple[float, str, int]]:
    """When each dump was last written to, its name, and its size on disk, if only for its entry."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    yield status.st_mtime, entry.name, max(status.st_size, status.st_blocks * 512)
