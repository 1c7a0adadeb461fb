"""From a journal to MLflow: read, fold by run, make the fewest calls, move the cursor.

A `Deliverer` works on one journal, whoever wrote it: a `Worker` thread runs one for the live journal of its own
process, and `sync` runs one after another for those of processes that died. So recovery is no second code path.

Each write to MLflow may be repeated without harm: a run is found again by its `skilltrace.key`, a metric point carries
its recorded time and step, tags, params, artifacts and the final status overwrite themselves. So after any doubt (a
lost answer, a crash before the cursor was saved) delivery simply does it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec

from skilltrace import mlflow_bridge, spool
from skilltrace.faults import logger, report
from skilltrace.mlflow_bridge import KEY_TAG, KIND_TAG, PARENT_TAG, RECOVERED_TAG, Refused, Store, Unavailable
from skilltrace.records import (
    Artifact,
    Logged,
    Metric,
    ProcessStarted,
    Record,
    RunEnded,
    RunStarted,
    Target,
    Turn,
    decode,
    encode,
)

_BATCH_BYTES = 1 << 20
_LINGER = 0.05  # seconds that a live journal is left alone after its first new record: short runs then come whole
_LONGEST_PAUSE = 30.0  # seconds between attempts while MLflow is down
_RECENT = 2000  # finished runs whose ids are kept, for children that start late
_UPLOAD_ATTEMPTS = 5  # of one artifact, where MLflow answers otherwise
_PARENT_PATIENCE = 60.0  # seconds that a run waits for a parent which another process has to deliver
_PARENT_PAUSE = 0.2  # seconds between looks for it

on_available: list[Callable[[], None]] = []
"""Called in the delivery thread when MLflow has answered for the first time, or again after an outage."""


class _ParentPending(Unavailable):
    """The run's parent is not in MLflow yet: another process has to deliver it."""


@dataclass
class _Run:
    """What is known of one run: what is to be delivered now, and what must be remembered while it is open."""

    target: Target | None = None
    start: RunStarted | None = None
    run_id: str | None = None
    refused: bool = False
    turns: list[Turn] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[Artifact] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)
    new_turns: bool = False
    end: RunEnded | None = None
    failed_uploads: int = 0  # of the first artifact
    doubtful: bool = False  # a create_run may have succeeded without our knowing

    def fold(self, record: RunStarted | Logged | RunEnded) -> None:
        if isinstance(record, RunStarted):
            self.start, self.target = record, record.target
            return
        self.metrics += record.metrics
        self.tags.update(record.tags)
        self.artifacts += record.artifacts
        for key, value in record.params.items():
            self.params.setdefault(key, value)
        if isinstance(record, RunEnded):
            self.end = record
            self.traces += record.traces
            return
        self.target = self.target or record.target
        if record.turns:
            self.turns += record.turns
            self.new_turns = True


class _Open(msgspec.Struct):
    """An open run in the cursor: what a later deliverer must know of it that lies before the cursor's offset."""

    start: RunStarted
    run_id: str | None
    turns: list[Turn]
    refused: bool = False


class _Cursor(msgspec.Struct):
    offset: int = 0
    last_ns: int = 0
    open: list[_Open] = []


@contextmanager
def opening(uri: str, spool_dir: Path) -> Iterator[None]:
    """Hold, for the first use of a local database, a lock that all processes of this spool share."""
    local = uri.startswith("sqlite")
    try:
        if local:
            spool.prepare(spool_dir)
    except OSError:
        local = False  # the journal's side says that the folder cannot be written
    if not local:
        yield
        return
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    path = spool_dir / f".store-{name}.lock"
    deadline = time.monotonic() + 60
    pause = threading.Event()  # never set: a lock of another process has no event to wait for
    while True:
        with spool.held(path) as mine:
            if mine or time.monotonic() > deadline:
                yield
                return
        pause.wait(0.05)


class Deliverer:
    """Delivers one journal.

    Args:
        folder: The journal's folder.
        lock: The descriptor from `spool.lock_delivery`; closed by `close`.
        stores: Open stores by URI, shared between the deliverers of a process.
        doubtful: Whether another may have delivered from this journal before, so that runs are looked for first.
    """

    def __init__(self, folder: Path, lock: int, stores: dict[str, Store], *, doubtful: bool = False) -> None:
        self.folder = folder
        self.offset = 0
        self._lock = lock
        self._stores = stores
        self._runs: dict[str, _Run] = {}
        self._recent: OrderedDict[str, str] = OrderedDict()  # key → run id, of runs that have ended
        self._process: ProcessStarted | None = None
        self._context: dict[str, str] | None = None
        self._last_ns = 0
        self._done_blobs: list[str] = []
        self._read_offset = 0
        self._doubtful = doubtful
        self._load_cursor()

    def close(self) -> None:
        """Let go of the journal."""
        os.close(self._lock)

    @property
    def open_keys(self) -> list[str]:
        """The keys of the runs that have started and not ended, as far as the journal has been read."""
        return [key for key, run in self._runs.items() if run.end is None]

    def run_id(self, key: str) -> str | None:
        """The MLflow id of an open run, where it has been created."""
        run = self._runs.get(key)
        return run.run_id if run is not None else self._recent.get(key)

    def step(self) -> bool:
        """Read what is new (a bounded part of it), deliver it, save the cursor.

        Returns:
            Whether there was anything to do.

        Raises:
            Unavailable: MLflow cannot take it now; call again later, nothing is lost.
        """
        if self._read_offset == self.offset and not self._read():
            return False
        self._deliver()
        return True

    def finish(self) -> None:
        """Deliver all of a dead process's journal, end its open runs as KILLED, and remove it.

        Raises:
            Unavailable: as `step`.
        """
        while self.step():
            pass
        size = (self.folder / spool.JOURNAL).stat().st_size
        if self.offset < size:
            logger.warning(
                "The journal %s ends in the middle of a line (%d bytes): its process died while it wrote.",
                self.folder.name,
                size - self.offset,
            )
        for key in self.open_keys:
            run = self._runs[key]
            started = run.start.ns if run.start is not None else self._last_ns
            run.fold(
                RunEnded(
                    key,
                    self._last_ns,
                    "KILLED",
                    metrics=[Metric("duration", (self._last_ns - started) / 1e9, self._last_ns // 1_000_000)],
                    tags={RECOVERED_TAG: "true"},
                )
            )
        self._deliver()
        spool.remove(self.folder)

    # --- reading -----------------------------------------------------------------------------------------------------

    def _load_cursor(self) -> None:
        path = self.folder / spool.CURSOR
        try:
            cursor = msgspec.json.decode(path.read_bytes(), type=_Cursor)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError):
            # All of it is delivered once more, which changes nothing in MLflow.
            logger.warning("The cursor of the journal %s cannot be read; it is delivered from its start.", path.parent)
            self._doubtful = True
            return
        self.offset = self._read_offset = cursor.offset
        self._last_ns = cursor.last_ns
        self._doubtful = True
        for run in cursor.open:
            self._runs[run.start.key] = _Run(run.start.target, run.start, run.run_id, run.refused, list(run.turns))

    def _save_cursor(self) -> None:
        opened = [
            _Open(run.start, run.run_id, run.turns, run.refused)
            for run in self._runs.values()
            if run.start is not None and run.end is None
        ]
        cursor = _Cursor(self._read_offset, self._last_ns, opened)
        spool.write_file(self.folder / spool.CURSOR, msgspec.json.encode(cursor))
        self.offset = self._read_offset
        for name in self._done_blobs:
            (self.folder / spool.BLOBS / name).unlink(missing_ok=True)
        self._done_blobs.clear()

    def _read(self) -> bool:
        """Fold the next records, about a megabyte of them, into the runs; False where there is no whole line."""
        with open(self.folder / spool.JOURNAL, "rb") as file:
            file.seek(self._read_offset)
            data = file.read(_BATCH_BYTES)
            while data and b"\n" not in data and (more := file.read(_BATCH_BYTES)):
                data += more
        whole = data.rfind(b"\n") + 1
        for line in data[:whole].split(b"\n"):
            if not line:
                continue
            try:
                self._fold(decode(line))
            except msgspec.DecodeError as error:
                logger.warning("A line of the journal %s is no record and is set aside: %s", self.folder.name, error)
                self._reject(f"not a record: {error}", line.decode("utf-8", "replace"))
        self._read_offset += whole
        return whole > 0

    def _fold(self, record: Record) -> None:
        self._last_ns = max(self._last_ns, record.ns)
        if isinstance(record, ProcessStarted):
            self._process = record
            return
        run = self._runs.get(record.key)
        if run is None:
            run = self._runs[record.key] = _Run(run_id=self._recent.get(record.key))
        run.fold(record)

    # --- delivering --------------------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        for key, run in list(self._runs.items()):
            try:
                self._deliver_run(key, run)
            except Refused as refusal:
                self._reject_run(key, run, str(refusal))
            except (Unavailable, OSError):
                raise
            except Exception as fault:
                report("deliver a run")
                self._reject_run(key, run, f"fault of skilltrace: {fault!r}")
            if run.end is not None or run.start is None:
                del self._runs[key]
                if run.run_id is not None:
                    self._recent[key] = run.run_id
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        self._save_cursor()

    def _deliver_run(self, key: str, run: _Run) -> None:
        if run.target is None:
            raise Refused("logged to a run that this journal does not know")
        if run.refused:
            self._reject_rest(key, run)
            return
        store = self._store(run.target.uri)
        if run.run_id is None:
            run.run_id = self._find_or_create(store, key, run)
        run_id = run.run_id
        self._log(store, run_id, key, run)
        if run.traces:
            self._or_reject(key, "traces", lambda: store.link_traces(run_id, run.traces))
            run.traces = []
        if run.end is not None:
            end = run.end
            self._or_reject(key, "end", lambda: store.terminate(run_id, end.status, end.ns // 1_000_000))

    def _store(self, uri: str) -> Store:
        store = self._stores.get(uri)
        if store is None:
            store = self._stores[uri] = Store(uri, opening(uri, self.folder.parent))
        return store

    def _find_or_create(self, store: Store, key: str, run: _Run) -> str:
        assert run.target is not None
        experiment_id, start = store.experiment_id(run.target), run.start
        if start is None or self._doubtful or run.doubtful:
            known = store.find_run(experiment_id, key)
            if known is not None:
                return known
        if start is None:
            raise Refused("logged to a run that MLflow does not have")
        tags = {**self._context_tags(), **start.tags, **run.tags, KEY_TAG: key, KIND_TAG: start.kind}
        if start.parent is not None:
            parent = self._parent_id(store, experiment_id, start)
            if parent is not None:
                tags[PARENT_TAG] = parent
        run.doubtful = True
        run_id = store.create_run(experiment_id, start.name, start.ns // 1_000_000, tags)
        run.tags = {}
        return run_id

    def _parent_id(self, store: Store, experiment_id: str, start: RunStarted) -> str | None:
        parent = start.parent
        assert parent is not None
        if parent in self._runs:
            return self._runs[parent].run_id
        if parent in self._recent:
            return self._recent[parent]
        # It stands in another process's journal (this one was forked), or before the cursor.
        found = store.find_run(experiment_id, parent)
        if found is None and time.time_ns() - start.ns < _PARENT_PATIENCE * 1e9:
            raise _ParentPending(f"the parent of the run {start.name!r} is not delivered yet")
        return found

    def _context_tags(self) -> dict[str, str]:
        """User and source as MLflow sets them: found by MLflow itself if it was there, else by the process alone."""
        if self._context is None:
            if self._process is None:
                with open(self.folder / spool.JOURNAL, "rb") as file, contextlib.suppress(msgspec.DecodeError):
                    first = decode(file.readline())
                    self._process = first if isinstance(first, ProcessStarted) else None
            tags = dict(self._process.tags) if self._process is not None else {}
            with contextlib.suppress(OSError, msgspec.DecodeError):
                content = (self.folder / spool.CONTEXT).read_bytes()
                tags.update(msgspec.json.decode(content, type=dict[str, str]))
            self._context = tags
        return self._context

    def _log(self, store: Store, run_id: str, key: str, run: _Run) -> None:
        if run.start is not None and run.end is not None:
            # With the last batch, not in one of their own: most runs then need a single one.
            run.params = {**run.start.params, **run.params}
        if run.metrics or run.params or run.tags:
            try:
                store.log_batch(run_id, run.metrics, run.params, run.tags)
            except Refused:
                self._log_one_by_one(store, run_id, key, run)
            run.metrics, run.params, run.tags = [], {}, {}
        if run.new_turns:
            run.artifacts.append(Artifact("conversation_history.json", json=[_turn(turn) for turn in run.turns]))
            run.new_turns = False
        while run.artifacts:
            artifact = run.artifacts[0]
            try:
                self._upload(store, run_id, run)
            except Refused as refusal:
                self._reject(f"{artifact.path}: {refusal}", [key, msgspec.to_builtins(artifact)])
            run.artifacts.pop(0)
            run.failed_uploads = 0

    def _log_one_by_one(self, store: Store, run_id: str, key: str, run: _Run) -> None:
        """One bad value makes MLflow refuse a whole batch: log the rest, and set aside what is refused."""
        for point in run.metrics:
            self._or_reject(key, f"metric {point.key}", lambda point=point: store.log_batch(run_id, [point], {}, {}))  # type: ignore[misc]  # mypy cannot infer a lambda's default
        for name, value in run.params.items():
            params = {name: value}
            self._or_reject(key, f"param {name}", lambda params=params: store.log_batch(run_id, [], params, {}))  # type: ignore[misc]
        for name, value in run.tags.items():
            tags = {name: value}
            self._or_reject(key, f"tag {name}", lambda tags=tags: store.log_batch(run_id, [], {}, tags))  # type: ignore[misc]

    def _upload(self, store: Store, run_id: str, run: _Run) -> None:
        try:
            self._upload_file(store, run_id, run.artifacts[0])
        except Unavailable as error:
            # A server says "internal error" also of a path that it cannot have: then it would be so for ever.
            run.failed_uploads += 1
            server = store.uri.startswith("http")
            if server and run.failed_uploads >= _UPLOAD_ATTEMPTS and mlflow_bridge.answers(store.uri, timeout=5.0):
                raise Refused(str(error)) from error
            raise

    def _upload_file(self, store: Store, run_id: str, artifact: Artifact) -> None:
        folder, _, name = artifact.path.rpartition("/")
        # MLflow uploads files, under the name that they have.
        with tempfile.TemporaryDirectory(prefix=".upload-", dir=self.folder) as temporary:
            file = Path(temporary) / name
            if artifact.blob is not None:
                blob = self.folder / spool.BLOBS / artifact.blob
                if not blob.exists() and self._doubtful:
                    return  # uploaded and removed before the cursor was saved
                os.link(blob, file)
                self._done_blobs.append(artifact.blob)
            else:
                file.write_bytes(_content(artifact))
            store.log_artifact(run_id, file, folder)

    # --- what MLflow refuses -----------------------------------------------------------------------------------------

    def _or_reject(self, key: str, what: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Refused as refusal:
            self._reject(f"{what}: {refusal}", key)

    def _reject(self, reason: str, what: Any) -> None:
        logger.warning("MLflow refused for good, and skilltrace keeps it in its rejected file: %s", reason)
        line = json.dumps({"reason": reason, "what": what, "at": datetime.now(timezone.utc).isoformat()}) + "\n"
        spool.append_rejected(self.folder, line.encode())

    def _reject_run(self, key: str, run: _Run, reason: str) -> None:
        run.refused = True
        self._reject(reason, msgspec.to_builtins(run.start) if run.start is not None else key)
        self._reject_rest(key, run)

    def _reject_rest(self, key: str, run: _Run) -> None:
        """All that comes for a run which MLflow refused goes the same way, so that nothing is lost."""
        if run.metrics or run.params or run.tags or run.artifacts or run.turns or run.end:
            ns, status = (run.end.ns, run.end.status) if run.end else (self._last_ns, "RUNNING")
            turns = [Artifact("conversation_history.json", json=[_turn(turn) for turn in run.turns])] if run.turns else []
            rest = RunEnded(key, ns, status, run.metrics, run.params, run.tags, [*run.artifacts, *turns])
            spool.append_rejected(self.folder, encode(rest))
        run.metrics, run.params, run.tags, run.artifacts, run.turns = [], {}, {}, [], []


def _turn(turn: Turn) -> dict[str, Any]:
    at = datetime.fromtimestamp(turn.ns / 1e9, timezone.utc).isoformat()
    return {"role": turn.role, "content": turn.content, "timestamp": at}


def _content(artifact: Artifact) -> bytes:
    if artifact.data is not None:
        return artifact.data
    if artifact.text is not None:
        return artifact.text.encode("utf-8", "replace")
    if artifact.path.endswith((".yaml", ".yml")):
        import yaml  # one of MLflow's own dependencies

        return str(yaml.safe_dump(artifact.json, allow_unicode=True, sort_keys=False)).encode()
    return (json.dumps(artifact.json, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")


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
        self._answered = False
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

    def run_id(self, key: str, deadline: float) -> str | None:
        """Wait for the id of a run whose start stands in the journal; None where it does not come in time."""
        self.flush(deadline)
        return self._deliverer.run_id(key) if self._deliverer is not None else None

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
                    if isinstance(error, _ParentPending):
                        self._pause(_PARENT_PAUSE)
                    else:
                        self._failed(error)
                    if self._stopping:
                        break  # what is undone stays on disk, for the next process or `skilltrace sync`
                    continue
                self._succeeded(busy)
                if busy:
                    continue
                if self._stopping:
                    break
                if leftovers:
                    self._recover(leftovers.pop())
                    continue
                self._news.wait()
                self._news.clear()
                self._linger()
        except Exception:
            report("deliver the journal")
        finally:
            with self._changed:
                self._changed.notify_all()
            deliverer.close()

    def _succeeded(self, busy: bool) -> None:
        if busy and (self._failures or not self._answered):
            if self._failures:
                logger.warning("MLflow answers again; what was kept is being delivered.")
            self._failures, self.last_error, self._answered = 0, None, True
            for listener in on_available:
                listener()
        with self._changed:
            self._changed.notify_all()

    def _failed(self, error: Exception) -> None:
        if not self._failures:
            logger.warning(
                "MLflow cannot be reached; runs are kept in %s and delivered when it can. (%s)", self.folder, error
            )
        self.last_error = str(error)
        with self._changed:
            self._failures += 1
            self._changed.notify_all()
        pause = min(_LONGEST_PAUSE, 0.25 * 2 ** min(self._failures, 10)) * random.uniform(0.5, 1.0)
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


def find(key: str, target: Target, run_id: str | None) -> tuple[str, str] | None:
    """The ids of a run's experiment and of the run, asking MLflow for what is not known yet; None without an answer."""
    try:
        store = Store(target.uri)
        experiment_id = store.experiment_id(target)
        run_id = run_id or store.find_run(experiment_id, key)
    except (Unavailable, Refused):
        return None
    return (experiment_id, run_id) if run_id is not None else None


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
        spool: The folder of the journals.
        journals: How many journals stand in it.
    """

    pending_runs: int
    oldest: datetime | None
    rejected: int
    last_error: str | None
    lost: int
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
        spool=spool_dir,
        journals=len(folders),
    )


def is_delivered(folder: Path) -> bool:
    """Whether MLflow has all that stands in a journal."""
    return next((record for record in _undelivered(folder) if not isinstance(record, ProcessStarted)), None) is None


def _undelivered(folder: Path) -> Iterator[Record]:
    try:
        cursor = msgspec.json.decode((folder / spool.CURSOR).read_bytes(), type=_Cursor)
    except (OSError, msgspec.DecodeError):
        cursor = _Cursor()
    try:
        with open(folder / spool.JOURNAL, "rb") as file:
            file.seek(cursor.offset)
            for line in file:
                with contextlib.suppress(msgspec.DecodeError):
                    yield decode(line)
    except FileNotFoundError:
        return  # delivered and removed meanwhile
