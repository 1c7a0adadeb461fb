"""The journal of this process: what happens to runs is appended to a file, on the caller's thread, before it goes on.

One `write` a record. The file is opened when the first run starts, and locked until the process ends, so that others
can tell a live journal from one that was left behind. There is no other queue: delivery reads this file.
"""

from __future__ import annotations

import atexit
import getpass
import os
import secrets
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from skilltrace import config, delivery, mlflow_bridge, spool
from skilltrace.config import Settings
from skilltrace.delivery import DeliveryStatus, Worker
from skilltrace.errors import JournalError
from skilltrace.faults import logger, report, warn_once
from skilltrace.records import Artifact, ProcessStarted, Record, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skilltrace.deliverer import Wanted

_LARGEST_INLINE = 256 * 1024  # bytes; a larger content is a file beside the journal, not a part of a line

generation = 0
"""Counts the forks that led to this process: a run of another generation belongs to the parent."""


class Journal:
    """One append-only file, and the thread that delivers it.

    Args:
        settings: Where it stands and who delivers it.
    """

    def __init__(self, settings: Settings) -> None:
        self._spool = settings.spool_dir
        self._threaded = settings.delivery == "thread"
        self._lock = threading.Lock()
        self._descriptor = -1
        self._torn = False
        self.folder: Path | None = None
        self.worker: Worker | None = None
        self.lost = 0

    def append(self, record: Record) -> None:
        """Write a record. It never raises: what cannot be written is counted, and said once."""
        try:
            if self._descriptor < 0 or (self._threaded and self.worker is None):
                self._open()
            self._write(encode(record))
        except Exception as error:
            self.lost += 1
            if isinstance(error, (OSError, JournalError)):
                warn_once(
                    "journal",
                    "skilltrace cannot write its journal, so what happens now is not recorded: %s. "
                    "Your code is not affected. (Said once; skilltrace.status() counts what is lost.)",
                    error,
                )
            else:
                report("write a record to the journal")
            return
        worker = self.worker
        if worker is not None:
            worker.wake()

    def keep(self, artifact: Artifact) -> Artifact:
        """The artifact as a record may hold it: a large content is moved to a file beside the journal.

        Never raises: where that file cannot be written, the content is lost, and the artifact says so.
        """
        content: bytes | None = artifact.data
        if content is None and artifact.text is not None and len(artifact.text) > _LARGEST_INLINE // 4:
            content = artifact.text.encode("utf-8", "replace")
        if content is None or len(content) <= _LARGEST_INLINE:
            return artifact
        try:
            path = self._blob()
            spool.write_file(path, content)
        except (OSError, JournalError) as error:
            return self._not_kept(artifact.path, error)
        return Artifact(artifact.path, blob=path.name)

    def keep_file(self, source: Path, path: str) -> Artifact:
        """A copy of a file beside the journal, to be the artifact at `path`. Raises OSError where it cannot be read."""
        with open(source, "rb") as reader:
            try:
                blob = self._blob()
                descriptor = os.open(blob, os.O_CREAT | os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except (OSError, JournalError) as error:
                return self._not_kept(path, error)
            try:
                while chunk := reader.read(1 << 20):
                    spool.write_all(descriptor, chunk)
            finally:
                os.close(descriptor)
        return Artifact(path, blob=blob.name)

    def _not_kept(self, path: str, error: Exception) -> Artifact:
        self.lost += 1
        warn_once("blob", "An artifact could not be written beside the journal, and its content is lost: %s", error)
        return Artifact(path, text=f"[lost by skilltrace: {error}]")

    def _blob(self) -> Path:
        if self._descriptor < 0:
            self._open()
        assert self.folder is not None
        folder = self.folder / spool.BLOBS
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder / secrets.token_hex(8)

    def _write(self, line: bytes) -> None:
        # One write to a file opened with O_APPEND: lines of several threads do not mix, and no lock is needed.
        if self._torn:
            line, self._torn = b"\n" + line, False
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                spool.write_all(self._descriptor, line[written:])
        except OSError:
            # Part of the line may stand there: the next one begins on a line of its own.
            self._torn = True
            raise

    def _open(self) -> None:
        with self._lock:
            if self._descriptor < 0:
                self.folder, self._descriptor = spool.create_journal(self._spool)
                self._torn = False
                self._write(encode(_process_started()))
            if self._threaded and self.worker is None:
                assert self.folder is not None
                worker = Worker(self.folder)
                try:
                    worker.start()
                except RuntimeError:
                    # The interpreter is ending, and starts no thread any more: the next process delivers.
                    worker.close()
                    self._threaded = False
                else:
                    self.worker = worker

    def flush(self, timeout: float) -> bool:
        """Wait until what was recorded so far is delivered; True where it is."""
        worker, folder = self.worker, self.folder
        if self._descriptor < 0 or folder is None:
            return True
        if worker is not None:
            return worker.flush(time.monotonic() + timeout)
        return delivery.is_delivered(folder)

    def run_id(self, runs: Sequence[Wanted], timeout: float) -> str | None:
        """Have the last of these runs, which stands inside the others, in MLflow now rather than when its turn comes.

        Returns:
            Its MLflow id; None where MLflow has not got it in time.
        """
        worker, deadline, run = self.worker, time.monotonic() + timeout, runs[-1].start
        if worker is not None and worker.delivers:
            return worker.run_id(runs, deadline)
        return delivery.find(run.key, run.target, deadline)

    def close(self, timeout: float) -> bool:
        """Deliver, end the thread, and remove the journal where nothing is left in it; a later record opens another."""
        with self._lock:
            worker, self.worker = self.worker, None
            folder = self.folder
            if self._descriptor < 0 or folder is None:
                return True
            if worker is not None and worker.stop(time.monotonic() + timeout):
                spool.remove(folder)
                os.close(self._descriptor)
                self._descriptor = -1
                return True
        # Runs are open, or something is left: the file stays, locked until the process ends.
        return delivery.is_delivered(folder)

    def after_fork(self) -> None:
        """In a forked child: the file and the thread are the parent's; this process writes one of its own."""
        if self._descriptor >= 0:
            os.close(self._descriptor)  # closing a copy does not let go of the parent's lock
            self._descriptor = -1
        if self.worker is not None:
            self.worker.close()
            self.worker = None
        self._lock = threading.Lock()


class Nowhere(Journal):
    """The journal of runs that are not recorded."""

    def append(self, record: Record) -> None:
        """Forget the record."""

    def keep(self, artifact: Artifact) -> Artifact:
        """Leave the artifact as it is."""
        return artifact

    def keep_file(self, source: Path, path: str) -> Artifact:  # noqa: ARG002  # as its base
        """Copy nothing."""
        return Artifact(path)

    def run_id(self, runs: Sequence[Wanted], timeout: float) -> None:
        """There is none."""


def _process_started() -> ProcessStarted:
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):
        user = "unknown"  # a container's user without a name
    tags = {
        "mlflow.user": user,
        "mlflow.source.name": sys.argv[0] if getattr(sys, "argv", None) and sys.argv[0] else "<console>",
        "mlflow.source.type": "LOCAL",
    }
    return ProcessStarted(time.time_ns(), version("skilltrace"), os.getpid(), tags)


# --- the journals of this process: one, unless configure was called with another spool or another delivery ----------

_journals: dict[tuple[Path, str], Journal] = {}
_latest: tuple[Settings, Journal] | None = None
_lock = threading.Lock()


def of(settings: Settings) -> Journal:
    """The journal that runs opened with these settings write to."""
    global _latest
    latest = _latest
    if latest is not None and latest[0] is settings:
        return latest[1]
    with _lock:
        key = (settings.spool_dir, settings.delivery)
        journal = _journals.get(key)
        if journal is None:
            journal = _journals[key] = Journal(settings)
        mlflow_bridge.know(settings.tracking_uri)
        _latest = (settings, journal)
    return journal


def flush(timeout: float | None = None) -> bool:
    """Wait until all that was recorded in this process is delivered to MLflow.

    Args:
        timeout: Seconds to wait at most. Default: the setting `flush_timeout`.

    Returns:
        True where all is delivered; what is not stays in the journal and is delivered later.

    Example:
        >>> import skilltrace
        >>> skilltrace.flush(timeout=5)
        True
    """
    deadline = time.monotonic() + (config.current().flush_timeout if timeout is None else timeout)
    delivered = [journal.flush(max(0.0, deadline - time.monotonic())) for journal in list(_journals.values())]
    return all(delivered)


def shutdown(timeout: float | None = None) -> bool:
    """Deliver what was recorded, then end the delivery thread. A run that starts later starts it again.

    Args:
        timeout: Seconds to wait at most. Default: the setting `flush_timeout`.

    Returns:
        True where all is delivered; what is not stays in the journal, for the next process or `skilltrace sync`.

    Example:
        >>> import skilltrace
        >>> skilltrace.shutdown()
        True
    """
    deadline = time.monotonic() + (config.current().flush_timeout if timeout is None else timeout)
    delivered = [journal.close(max(0.0, deadline - time.monotonic())) for journal in list(_journals.values())]
    return all(delivered)


def status() -> DeliveryStatus:
    """What waits for delivery, in this process and in what earlier ones left.

    Example:
        >>> import skilltrace
        >>> skilltrace.status().pending_runs
        0
    """
    journals = list(_journals.values())
    errors = [journal.worker.last_error for journal in journals if journal.worker is not None]
    return delivery.status(
        config.current().spool_dir,
        last_error=next((error for error in errors if error), None),
        lost=sum(journal.lost for journal in journals),
    )


def _at_exit() -> None:
    """Deliver what is there, for at most `flush_timeout` seconds; say where the rest is."""
    try:
        settings = config.current()
        deadline = time.monotonic() + settings.flush_timeout
        for journal in list(_journals.values()):
            if journal.worker is not None and not journal.close(max(0.0, deadline - time.monotonic())):
                logger.warning(
                    "skilltrace: MLflow does not have all runs yet; they are kept in %s. "
                    "The next process that uses skilltrace delivers them, or: skilltrace sync",
                    journal.folder,
                )
        mlflow_bridge.flush_traces(max(0.0, deadline - time.monotonic()))
    except Exception:
        report("deliver what is left at the end of the process")


# Before Python ends its thread pools and refuses new ones: importing MLflow, and MLflow itself, need them. Its hook for
# that is private, and runs in reverse order, so the pools' own hook must be there before ours. The public one comes too
# late for delivery, but it finds what other threads have recorded meanwhile.
import concurrent.futures.thread  # noqa: E402, F401

getattr(threading, "_register_atexit", atexit.register)(_at_exit)
atexit.register(_at_exit)


def _after_fork_in_child() -> None:
    global generation, _latest, _lock
    generation += 1
    _lock, config._lock = threading.Lock(), threading.Lock()
    _latest = None
    for journal in _journals.values():
        journal.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
