"""What is counted of the recorder's work."""

from typing import Final, get_args

from aibridge.events import RecordLost, RecordsReplayed, RecordsWritten
from aibridge.metrics.series import Children, Consumers, Maker
from aibridge.records import Record

_WRITES: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Recording:
    """Counts records, and shows what waits to be written."""

    def __init__(self, make: Maker) -> None:
        self._written = make.counter("records_written_total", "Records that were written to the database when they came.")
        self._spooled = make.counter(
            "records_spooled_total", "Records that the database did not take, in the spool instead."
        )
        self._replayed = make.counter("records_replayed_total", "Records that have come from a spool into the database.")
        self._lost = Children(
            make.counter("records_lost_total", "Records that neither database nor spool could keep.", "kind")
        )
        for kind in (*(kind.__name__ for kind in get_args(Record)), ""):
            _ = self._lost[kind,]  # there with 0, or who looks at the rate would miss the first one
        self._seconds = Children(
            make.histogram(
                "recorder_write_seconds", "How long a commit, or a write to the spool, took.", "to", buckets=_WRITES
            )
        )
        self._queued = make.gauge("recorder_queue_depth", "What was handed to the recorder and is not durable yet.")
        self._spool = make.gauge("recorder_spool_bytes", "What the spool holds that is not in the database yet.")

    @property
    def consumers(self) -> Consumers:
        """What counts which events."""
        return {RecordsWritten: self._write, RecordsReplayed: self._replay, RecordLost: self._lose}

    def show(self, queued: int, spool_bytes: int) -> None:
        """Show what waits: submissions for a commit, bytes in the spool for the database."""
        self._queued.set(queued)
        self._spool.set(spool_bytes)

    def _write(self, event: RecordsWritten) -> None:
        (self._written if event.to == "database" else self._spooled).inc(event.records)
        self._seconds[event.to,].observe(event.seconds)

    def _replay(self, event: RecordsReplayed) -> None:
        self._replayed.inc(event.records)

    def _lose(self, event: RecordLost) -> None:
        self._lost[event.kind,].inc()
