"""Who delivers, and when: a background thread for the journal of this process, `sync` for those that others left.

What is done with one journal is the business of `deliverer`.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FuturesTimeout  # another class than Python's own before 3.11
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from skilltrace import mlflow_bridge, spool
from skilltrace.deliverer import Cursor, Deliverer, ParentPending, Wanted
from skilltrace.faults import logger, report
from skilltrace.mlflow_bridge import Refused, Store, Unavailable
from skilltrace.records import ProcessStarted, Record, Target, decode
from skilltrace.usage import strays

_LINGER = 0.05  # seconds that a live journal is left alone after its first new record: short runs then come whole
_LONGEST_PAUSE = 30.0  # seconds between attempts while MLflow is down
_PATIENCE_IN_OUTAGE = 1.0  # seconds to wait for a run that is wanted at once
_PARENT_PAUSE = 0.2  # seconds between looks for a parent that another process delivers

on_available: list[Callable[[], bool]] = []
"""Called in the delivery thread when MLflow has answered for the first time, or again after an outage. One that returns
False could not use the occasion, and is called again after the next delivery."""


class Worker:
    """The background thread that delivers the journal of this process, and then what dead processes left.

    Args:
        folder: The live journal's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last_error: str | None = None
        self._stores: dict[str, Store] = {}
        self._news = threading.Event()
        self._changed = threading.Condition()
        self._urgent = 0  # how many callers wait for the journal to be delivered
        self._stopping = False
        self._failures = 0
        self._announced = False
        lock = spool.lock_delivery(folder)
        # No lock: `skilltrace sync` has it, and delivers all that is there.
        self._deliverer = Deliverer(folder, lock, self._stores) if lock is not None else None
        self._thread = threading.Thread(target=self._run, name="skilltrace-delivery", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Say that there is something new in the journal."""
        if not self._news.is_set():
            self._news.set()

    def flush(self, deadline: float, *, attempts: int | None = None) -> bool:
        """Wait until what now stands in the journal is delivered.

        Args:
            deadline: Until when, by `time.monotonic`.
            attempts: After this many failed attempts it is given up before that.
        """
        deliverer, size, failures = self._deliverer, _size(self.folder), 0
        if deliverer is None:
            return False
        with self._changed:
            self._urgent += 1
            self._news.set()
            self._changed.notify_all()
            try:
                while deliverer.offset < size:
                    before, left = self._failures, deadline - time.monotonic()
                    if left <= 0 or not self._thread.is_alive() or (attempts is not None and failures >= attempts):
                        return False
                    self._changed.wait(min(left, 1.0))
                    failures += self._failures > before
                return True
            finally:
                self._urgent -= 1

    @property
    def delivers(self) -> bool:
        """Whether this process delivers the journal, and still does so."""
        return self._deliverer is not None and self._thread.is_alive()

    def run_id(self, runs: Sequence[Wanted], deadline: float) -> str | None:
        """Have the last of these runs created before its turn; None where that does not come to be in time.

        Args:
            runs: As `Deliverer.want` takes them.
            deadline: Until when, by `time.monotonic`. Where MLflow is known to be down it is not waited for so long.
        """
        deliverer = self._deliverer
        assert deliverer is not None
        known = deliverer.run_id(runs[-1].start.key)
        if known is not None:
            return known
        future = deliverer.want(runs)
        with self._changed:
            self._urgent += 1
            self._news.set()
            self._changed.notify_all()
        left = max(0.0, deadline - time.monotonic())
        try:
            return future.result(min(left, _PATIENCE_IN_OUTAGE) if self._failures else left)
        except (FuturesTimeout, CancelledError):
            future.cancel()
            return None
        finally:
            with self._changed:
                self._urgent -= 1

    def stop(self, deadline: float) -> bool:
        """Deliver what is there, until `deadline` at most, and end the thread. True where nothing is left or open."""
        delivered = self.flush(deadline, attempts=3)
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._news.set()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        ended, deliverer = not self._thread.is_alive(), self._deliverer
        return delivered and ended and deliverer is not None and not deliverer.open_keys

    def close(self) -> None:
        """Let go of the journal, where the thread does not run: it never started, or did not come through a fork."""
        if self._deliverer is not None:
            self._deliverer.close()

    def _run(self) -> None:
        deliverer = self._deliverer
        if deliverer is None:
            return
        try:
            self._find_context()
            leftovers = [path for path in reversed(spool.journals(self.folder.parent)) if path != self.folder]
            while True:
                try:
                    busy = deliverer.step()
                except (Unavailable, OSError) as error:
                    if isinstance(error, ParentPending):
                        self._pause(_PARENT_PAUSE)
                    else:
                        self._failed(error)
                    if self._stopping:
                        break  # what is undone stays on disk, for the next process or `skilltrace sync`
                    continue
                if busy and deliverer.asked:  # not where there was nothing yet to ask MLflow for
                    self._answers()
                with self._changed:
                    self._changed.notify_all()
                if busy:
                    continue
                if leftovers:
                    # Also while stopping, as long as its caller waits: where all processes are short, who else would?
                    self._recover(leftovers.pop())
                    continue
                if self._stopping:
                    break
                self._news.wait()
                self._news.clear()
                self._linger()
        except Exception:
            report("deliver the journal")
        finally:
            with self._changed:
                self._changed.notify_all()
            deliverer.close()

    def _answers(self) -> None:
        if self._failures:
            logger.warning("MLflow answers again; what was kept is being delivered.")
            self._failures, self.last_error, self._announced = 0, None, False
        if not self._announced:
            content = [listener() for listener in on_available]
            self._announced = all(content)

    def _failed(self, error: Exception) -> None:
        if not self._failures:
            logger.warning(
                "MLflow cannot be reached; runs are kept in %s and delivered when it can. (%s)", self.folder, error
            )
        self.last_error = str(error)
        with self._changed:
            self._failures += 1
            self._changed.notify_all()
        jitter = random.uniform(0.5, 1.0)  # noqa: S311  # not for cryptography
        pause = min(_LONGEST_PAUSE, 0.25 * 2 ** min(self._failures, 10)) * jitter
        # A caller of flush makes the next attempt come sooner, not at once: a server that refuses answers fast.
        self._pause(min(pause, 0.5) if self._urgent else pause)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, timeout=seconds)

    def _recover(self, folder: Path) -> None:
        try:
            _recover(folder, self._stores)
        except (Unavailable, OSError) as error:
            # Its store is not ours, or ours went away: either way the next process, or `skilltrace sync`, has it.
            logger.warning("The journal %s, left by an earlier process, cannot be delivered now: %s", folder, error)
        except Exception:
            report("deliver the journal of an earlier process")

    def _linger(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._urgent > 0 or self._stopping, timeout=_LINGER)

    def _find_context(self) -> None:
        try:
            tags = mlflow_bridge.context_tags()
            spool.write_file(self.folder / spool.CONTEXT, msgspec.json.encode(tags))
        except Exception:
            report("find the source tags of the process")


def _size(folder: Path) -> int:
    try:
        return (folder / spool.JOURNAL).stat().st_size
    except OSError:
        return 0


def _recover(folder: Path, stores: dict[str, Store]) -> bool:
    """Deliver a dead process's journal; False where its process lives or another delivers it."""
    if spool.owner_is_alive(folder):
        return False
    lock = spool.lock_delivery(folder)
    if lock is None:
        return False
    deliverer = Deliverer(folder, lock, stores, doubtful=True)
    try:
        deliverer.finish()
    finally:
        deliverer.close()
    return True


def find(key: str, target: Target, deadline: float) -> str | None:
    """The MLflow id of a run that another process delivers, when that has done so; None where it does not in time."""
    pause = threading.Event()  # never set: another process has no event to wait for
    try:
        store = Store(target.uri)
        experiment_id = store.experiment_id(target)
        while (run_id := store.find_run(experiment_id, key)) is None and time.monotonic() + _PARENT_PAUSE <= deadline:
            pause.wait(_PARENT_PAUSE)
    except (Unavailable, Refused):
        return None
    return run_id


@dataclass(frozen=True)
class SyncReport:
    """What `sync` did: journals delivered whole, those of live processes, and those left with the reason."""

    delivered: int
    alive: int
    left: int
    error: str | None


def sync(*spools: Path) -> SyncReport:
    """Deliver what dead processes left in the spools, and what there is of live ones that leave it to others.

    Args:
        spools: Folders of journals.

    Returns:
        What was done.
    """
    stores: dict[str, Store] = {}
    delivered = alive = left = 0
    error: str | None = None
    for folder in (path for spool_dir in spools for path in spool.journals(spool_dir)):
        try:
            if _recover(folder, stores):
                delivered += 1
            elif spool.owner_is_alive(folder):
                alive += 1
                _deliver_live(folder, stores)
        except (Unavailable, OSError) as failure:
            left += 1
            error = str(failure)
    return SyncReport(delivered, alive, left, error)


def _deliver_live(folder: Path, stores: dict[str, Store]) -> None:
    lock = spool.lock_delivery(folder)
    if lock is None:
        return  # its process delivers it
    deliverer = Deliverer(folder, lock, stores)
    try:
        while deliverer.step():
            pass
    finally:
        deliverer.close()


@dataclass(frozen=True)
class DeliveryStatus:
    """What waits for delivery.

    Attributes:
        pending_runs: Runs with something recorded that MLflow does not have yet.
        oldest: When the oldest of these records was made, or None.
        rejected: Lines in the rejected files: what MLflow refused for good.
        last_error: Why delivery does not get on, or None.
        lost: Records of this process that could not be written to its journal.
        lm_calls_late: LM calls of this process that came after the end of their run; the nearest open run around that
            has counted them, or else the outermost.
        lm_calls_unattributed: LM calls of this process made where no run could be found, since its first run. Where
            they belong to one, `propagate` is missing.
        spool: The folder of the journals.
        journals: How many journals stand in it.
    """

    pending_runs: int
    oldest: datetime | None
    rejected: int
    last_error: str | None
    lost: int
    lm_calls_late: int
    lm_calls_unattributed: int
    spool: Path
    journals: int


def status(spool_dir: Path, *, last_error: str | None = None, lost: int = 0) -> DeliveryStatus:
    """Count what waits in a spool. Reads the undelivered part of each journal."""
    keys: set[str] = set()
    oldest: int | None = None
    folders = spool.journals(spool_dir)
    for folder in folders:
        for record in _undelivered(folder):
            if not isinstance(record, ProcessStarted):
                keys.add(record.key)
                oldest = record.ns if oldest is None else min(oldest, record.ns)
    rejected = 0
    for path in spool.rejected_files(spool_dir):
        rejected += path.read_bytes().count(b"\n")
    return DeliveryStatus(
        pending_runs=len(keys),
        oldest=datetime.fromtimestamp(oldest / 1e9, timezone.utc) if oldest is not None else None,
        rejected=rejected,
        last_error=last_error,
        lost=lost,
        lm_calls_late=strays.late,
        lm_calls_unattributed=strays.unattributed,
        spool=spool_dir,
        journals=len(folders),
    )


def is_delivered(folder: Path) -> bool:
    """Whether MLflow has all that stands in a journal."""
    return next((record for record in _undelivered(folder) if not isinstance(record, ProcessStarted)), None) is None


def _undelivered(folder: Path) -> Iterator[Record]:
    try:
        cursor = msgspec.json.decode((folder / spool.CURSOR).read_bytes(), type=Cursor)
    except (OSError, msgspec.DecodeError):
        cursor = Cursor()
    try:
        with open(folder / spool.JOURNAL, "rb") as file:
            file.seek(cursor.offset)
            for line in file:
                with contextlib.suppress(msgspec.DecodeError):
                    yield decode(line)
    except FileNotFoundError:
        return  # delivered and removed meanwhile
