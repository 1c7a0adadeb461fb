"""One journal to MLflow: read, fold by run, make the fewest calls, move the cursor.

It does not matter who wrote the journal: the live one of this process and one left by a process that died are delivered
by the same code, so recovery is no second path.

Each write to MLflow may be repeated without harm: a run is found again by its `skilltrace.key`, a metric point carries
its recorded time and step, tags, params, artifacts and the final status overwrite themselves. So after any doubt (a
lost answer, a crash before the cursor was saved) delivery simply does it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
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
_RECENT = 2000  # finished runs whose ids are kept, for children that start late
_UPLOAD_ATTEMPTS = 5  # of one artifact, where MLflow answers otherwise
_PARENT_PATIENCE = 60.0  # seconds that a run waits for a parent which another process has to deliver


class ParentPending(Unavailable):
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


@dataclass(frozen=True)
class Wanted:
    """A run that is wanted in MLflow before its turn: its first record, and whether the run has ended meanwhile."""

    start: RunStarted
    ended: bool


class _Open(msgspec.Struct):
    """An open run in the cursor: what a later deliverer must know of it that lies before the cursor's offset."""

    start: RunStarted
    run_id: str | None
    turns: list[Turn]
    refused: bool = False


class Cursor(msgspec.Struct):
    """How far delivery has come, in bytes of the journal, and what must be remembered from before that."""

    offset: int = 0
    last_ns: int = 0
    open: list[_Open] = []


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
        self.asked = False  # whether MLflow has taken anything from here
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
        self._wanted: deque[tuple[Sequence[Wanted], Future[str | None]]] = deque()
        self._early: dict[str, _Run] = {}  # created because they were wanted, before the journal was read so far
        self._load_cursor()

    def close(self) -> None:
        """Let go of the journal."""
        os.close(self._lock)
        while self._wanted:
            self._wanted.popleft()[1].cancel()

    @property
    def open_keys(self) -> list[str]:
        """The keys of the runs that have started and not ended, as far as the journal has been read."""
        return [key for key, run in self._runs.items() if run.end is None]

    def run_id(self, key: str) -> str | None:
        """The MLflow id of a run, where it has been created not too long ago."""
        run = self._runs.get(key) or self._early.get(key)
        return run.run_id if run is not None else self._recent.get(key)

    def want(self, runs: Sequence[Wanted]) -> Future[str | None]:
        """Have a run created before anything else is delivered; from any thread.

        Args:
            runs: The run, the last of them, and those around it from the outermost in.

        Returns:
            Its MLflow id, in time; None where MLflow refuses it.
        """
        future: Future[str | None] = Future()
        self._wanted.append((runs, future))
        return future

    def step(self) -> bool:
        """Read what is new (a bounded part of it), deliver it, save the cursor.

        Returns:
            Whether there was anything to do.

        Raises:
            Unavailable: MLflow cannot take it now; call again later, nothing is lost.
        """
        self._create_wanted()
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
            cursor = msgspec.json.decode(path.read_bytes(), type=Cursor)
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
        cursor = Cursor(self._read_offset, self._last_ns, opened)
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
            run = self._early.pop(record.key, None) or _Run(run_id=self._recent.get(record.key))
            self._runs[record.key] = run
        run.fold(record)

    # --- delivering --------------------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        for key, run in list(self._runs.items()):
            self._create_wanted()
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
        self.asked = True

    def _create_wanted(self) -> None:
        while self._wanted:
            runs, future = self._wanted[0]
            try:
                for run in runs if not future.cancelled() else ():
                    self._create_early(run)
            except Refused:
                pass  # said, with the reason, when its turn comes
            except (Unavailable, OSError):
                raise
            except Exception:
                report("create a run before its turn")
            self._wanted.popleft()
            if future.set_running_or_notify_cancel():  # else nobody waits for it any longer
                future.set_result(self.run_id(runs[-1].start.key))

    def _create_early(self, wanted: Wanted) -> None:
        start = wanted.start
        if self.run_id(start.key) is not None:
            return
        run = self._runs.get(start.key) or self._early.get(start.key)
        if run is None:
            # An ended one may have been delivered long ago, and forgotten here.
            run = self._early[start.key] = _Run(start.target, start, doubtful=wanted.ended)
        if not run.refused:
            run.run_id = self._find_or_create(self._store(start.target.uri), start.key, run)

    def _store(self, uri: str) -> Store:
        store = self._stores.get(uri)
        if store is None:
            store = self._stores[uri] = Store(uri, spool.opening(uri, self.folder.parent))
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
        if start.parent is not None and PARENT_TAG not in tags:
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
        known = self._runs.get(parent) or self._early.get(parent)
        if known is not None and (known.run_id is not None or known.refused):
            return known.run_id
        if parent in self._recent:
            return self._recent[parent]
        # It stands in another process's journal (this one was forked), or before the cursor.
        found = store.find_run(experiment_id, parent)
        if found is None and time.time_ns() - start.ns < _PARENT_PATIENCE * 1e9:
            raise ParentPending(f"the parent of the run {start.name!r} is not delivered yet")
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
            run.artifacts.append(_transcript(run))
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
            artifacts = [*run.artifacts, _transcript(run)] if run.turns else run.artifacts
            rest = RunEnded(key, ns, status, run.metrics, run.params, run.tags, artifacts)
            spool.append_rejected(self.folder, encode(rest))
        run.metrics, run.params, run.tags, run.artifacts, run.turns = [], {}, {}, [], []


def _transcript(run: _Run) -> Artifact:
    return Artifact("conversation_history.json", json=[_turn(turn) for turn in run.turns])


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
