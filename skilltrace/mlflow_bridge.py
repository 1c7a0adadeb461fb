"""The one module that knows MLflow: the calls that delivery makes, and turning its autologging on.

Importing it imports no MLflow; that happens when a function is first used, which is off the caller's path.
"""

from __future__ import annotations

import contextvars
import errno
import functools
import http.client
import importlib
import math
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from skilltrace.errors import DeliveryError
from skilltrace.faults import logger, report, warn_once
from skilltrace.redaction import without_credentials
from skilltrace.tree import Node

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from skilltrace.records import Metric, Target

T = TypeVar("T")

KEY_TAG = "skilltrace.key"
KIND_TAG = "skilltrace.kind"
RECOVERED_TAG = "skilltrace.recovered"
PARENT_TAG = "mlflow.parentRunId"
# Without it MLflow takes an experiment that has traces for a GenAI one, and hides its runs behind another tab.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

# MLflow's own defaults (7 retries, 120 s) block for minutes, and repeat a POST whose answer was lost: one create_run
# then makes several runs. Delivery retries itself, and knows how to look first.
_TIMEOUT = (5.0, 30.0)  # seconds to connect, to read


class Unavailable(Exception):
    """MLflow cannot be reached, or answers that it cannot serve now: the same call may succeed later."""


class Refused(Exception):
    """MLflow understood and said no: the same call will never succeed."""


_REFUSALS = frozenset(
    [
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "INVALID_STATE",
        "RESOURCE_DOES_NOT_EXIST",
        "NOT_FOUND",
        "ENDPOINT_NOT_FOUND",
        "NOT_IMPLEMENTED",
        "RESOURCE_ALREADY_EXISTS",
        "FEATURE_DISABLED",
    ]
)


# A path that the store's file system cannot have, or an MLflow that lacks what is called: it will not come by waiting.
_FOR_GOOD = (
    FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError,
    AttributeError, TypeError, NotImplementedError,
)  # fmt: skip
_ERRNO_FOR_GOOD = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)


@contextmanager
def _errors_sorted() -> Iterator[None]:
    """Raise what MLflow raises as one of the two kinds that delivery acts on."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (Unavailable, Refused):
        raise
    except MlflowException as error:
        reason = f"{error.error_code}: {error.message}"
        raise (Refused if error.error_code in _REFUSALS else Unavailable)(reason) from error
    except Exception as error:
        for_good = isinstance(error, _FOR_GOOD) or (isinstance(error, OSError) and error.errno in _ERRNO_FOR_GOOD)
        raise (Refused if for_good else Unavailable)(f"{type(error).__name__}: {error}") from error


class Store:
    """One MLflow tracking store, and what skilltrace does there. Each call raises `Unavailable` or `Refused`.

    Args:
        uri: The tracking URI, without credentials as a journal has it, or with.
        lock: A context manager to hold while the store is opened: several processes that open a new sqlite store at
            once race in its schema migration, and all but one die.
    """

    def __init__(self, uri: str, lock: AbstractContextManager[Any] | None = None) -> None:
        self.uri = with_credentials(uri)
        self._experiments: dict[Target, str] = {}
        load()
        with _errors_sorted(), lock or nullcontext():
            from mlflow import MlflowClient

            _bound_requests()
            with _bounded():
                self._client: MlflowClient = MlflowClient(tracking_uri=self.uri)
        _opened.add(self)

    def experiment_id(self, target: Target) -> str:
        """The id of the target's experiment, which is created where there is none."""
        known = self._experiments.get(target)
        if known is not None:
            return known
        if target.experiment_id is not None:
            self._experiments[target] = target.experiment_id
            return target.experiment_id
        name = target.experiment or ""
        with _errors_sorted(), _bounded():
            experiment = self._client.get_experiment_by_name(name)
            if experiment is None:
                experiment = self._create_experiment(name, target.artifact_location)
        if experiment.lifecycle_stage != "active":
            raise Refused(
                f"the experiment {name!r} is deleted; restore it (mlflow experiments restore --experiment-id "
                f"{experiment.experiment_id}) or configure another"
            )
        self._experiments[target] = str(experiment.experiment_id)
        return self._experiments[target]

    def _create_experiment(self, name: str, artifact_location: str | None) -> Any:
        try:
            return self._client.get_experiment(
                self._client.create_experiment(name, artifact_location, tags=_EXPERIMENT_TAGS)
            )
        except Exception:
            # Another process may have been faster, or the answer was lost.
            experiment = self._client.get_experiment_by_name(name)
            if experiment is None:
                raise
            return experiment

    def find_run(self, experiment_id: str, key: str) -> str | None:
        """The id of the run that carries a key, or None."""
        with _errors_sorted(), _bounded():
            runs = self._client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return runs[0].info.run_id if runs else None

    def create_run(self, experiment_id: str, name: str, start_ms: int, tags: Mapping[str, str]) -> str:
        """Create a run; not idempotent, so after a doubt `find_run` comes first."""
        with _errors_sorted(), _bounded():
            run = self._client.create_run(experiment_id, start_time=start_ms, tags=dict(tags), run_name=name)
        run_id: str = run.info.run_id
        return run_id

    def log_batch(
        self, run_id: str, metrics: Iterable[Metric], params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        """Log metrics, params and tags in one request where MLflow's limits allow; repeating it changes nothing."""
        from mlflow import entities

        with _errors_sorted(), _bounded():
            self._client.log_batch(
                run_id,
                [entities.Metric(point.key, float(point.value), point.timestamp, point.step) for point in metrics],
                [entities.Param(key, value) for key, value in params.items()],
                [entities.RunTag(key, value) for key, value in tags.items()],
            )

    def log_artifact(self, run_id: str, file: Path, folder: str) -> None:
        """Upload a file; repeating it overwrites it with the same."""
        with _errors_sorted(), _bounded():
            self._client.log_artifact(run_id, str(file), folder or None)

    def link_traces(self, run_id: str, trace_ids: list[str]) -> None:
        """Link traces to the run; they need not have arrived yet. MLflow takes 100 at a time."""
        with _errors_sorted(), _bounded():
            for first in range(0, len(trace_ids), 100):
                self._client.link_traces_to_run(trace_ids[first : first + 100], run_id)

    def terminate(self, run_id: str, status: str, end_ms: int) -> None:
        """Set the final status and end time."""
        from mlflow.entities import RunStatus

        # Not MlflowClient.set_terminated: it prints, asks for the run once more, and shuts down asynchronous logging
        # of the store, which the user's own code shares.
        with _errors_sorted(), _bounded():
            self._client._tracking_client.store.update_run_info(
                run_id, RunStatus.from_string(status), end_ms, run_name=None
            )


def unavailable(message: str) -> Exception:
    """What MLflow raises where a store does not answer."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

    error: Exception = MlflowException(message, TEMPORARILY_UNAVAILABLE)
    return error


def get_run(uri: str, run_id: str) -> Any:
    """The `mlflow.entities.Run` of an id.

    Raises:
        DeliveryError: where MLflow cannot be asked, or does not know the run.
    """
    try:
        store = Store(uri)
        with _errors_sorted(), _bounded():
            return store._client.get_run(run_id)
    except (Unavailable, Refused) as error:
        raise DeliveryError(f"{uri} cannot be asked for the run {run_id}: {error}") from error


def read_job(target: Target, job_id: str) -> Node:
    """A job and the runs inside it, as MLflow has them.

    Raises:
        DeliveryError: where MLflow cannot be asked, or does not know the job.
    """
    try:
        store = Store(target.uri)
        with _errors_sorted(), _bounded():
            query = f"tags.job_id = '{job_id}' and tags.`{KIND_TAG}` = 'job'"
            runs = store._client.search_runs([store.experiment_id(target)], query, max_results=1)
            if runs:
                return _node(store._client, runs[0])
    except (Unavailable, Refused) as error:
        raise DeliveryError(f"{target.uri} cannot be asked for the job {job_id!r}: {error}") from error
    raise DeliveryError(f"{target.uri} does not know a job {job_id!r}")


def _node(client: MlflowClient, run: Any) -> Node:
    children = client.search_runs(
        [run.info.experiment_id], f"tags.`{PARENT_TAG}` = '{run.info.run_id}'", order_by=["attributes.start_time ASC"]
    )
    ended = run.info.end_time
    return Node(
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        name=run.info.run_name,
        status=run.info.status,
        seconds=(ended - run.info.start_time) / 1000 if ended else None,
        metrics=dict(run.data.metrics),
        tags=dict(run.data.tags),
        children=[_node(client, child) for child in children],
    )


# --- credentials: a journal has none, so a process keeps those that it was configured with --------------------------

_with_credentials: dict[str, str] = {}


def with_credentials(uri: str) -> str:
    """A URI as this process was configured with it, for the one that a journal has."""
    return _with_credentials.get(uri, uri)


def know(uri: str) -> None:
    """Remember a URI with its credentials, to be used where a journal names it without."""
    _with_credentials[without_credentials(uri)] = uri


# --- requests of delivery: our own time limits, without touching those of the user's calls ---------------------------

_request_is_ours: contextvars.ContextVar[bool] = contextvars.ContextVar("skilltrace_request", default=False)


@contextmanager
def _bounded() -> Iterator[None]:
    token = _request_is_ours.set(True)
    try:
        with _no_fork:
            yield
    finally:
        _request_is_ours.reset(token)


@functools.cache
def _bound_requests() -> None:
    """Have MLflow's HTTP requests obey our limits where delivery makes them.

    All of them go through one function, whose arguments MLflow takes from environment variables; those are the user's.
    """
    from mlflow.utils import rest_utils

    original = getattr(rest_utils, "_get_http_response_with_retries", None)
    if original is None:
        warn_once("rest_utils", "This MLflow sends requests in an unknown way: its own timeouts apply to delivery.")
        return

    @functools.wraps(original)
    def bounded(method: str, url: str, max_retries: int, *args: Any, **kwargs: Any) -> Any:
        if _request_is_ours.get():
            max_retries = 0
            kwargs["timeout"] = _TIMEOUT
        elif _traces_are_ours and _is_export():
            kwargs["timeout"] = _TIMEOUT_OF_TRACES
            return _export(functools.partial(original, method, url, 0, *args, **kwargs), max_retries)
        return original(method, url, max_retries, *args, **kwargs)

    rest_utils.__dict__["_get_http_response_with_retries"] = bounded


# --- forks: a child gets MLflow's modules, locks and connections as they are at that moment -------------------------

# Held while MLflow is imported or called here, and by a fork: a child forked in the middle would have half a module, a
# lock that nobody lets go of, or somebody else's place in a database connection.
_importing = threading.RLock()
_no_fork = threading.RLock()
_opened: weakref.WeakSet[Store] = weakref.WeakSet()
_fork_waited = threading.local()


def load() -> None:
    """Import MLflow, at a time when no fork happens."""
    with _importing:
        import mlflow.tracking.context.registry  # noqa: F401  # what is imported later, and in other threads


def _before_fork() -> None:
    _importing.acquire()
    # Seconds. A database on this machine answers; a server may hang, and there no lock is held while it is waited for.
    patience = 1.0 if any(store.uri.startswith("http") for store in list(_opened)) else 60.0
    _fork_waited.mine = _no_fork.acquire(timeout=patience)


def _after_fork_in_parent() -> None:
    if _fork_waited.mine:
        _no_fork.release()
    _importing.release()


def _after_fork_in_child() -> None:
    global _importing, _no_fork
    _importing, _no_fork = threading.RLock(), threading.RLock()
    for store in list(_opened):
        engine = getattr(store._client._tracking_client.store, "engine", None)
        if engine is not None:
            engine.dispose(close=False)  # the connections are the parent's


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


# --- what MLflow knows about the process --------------------------------------------------------------------------


def context_tags() -> dict[str, str]:
    """The tags that `mlflow.start_run` sets for user, source, git commit and notebook."""
    with _importing:
        from mlflow.tracking.context.registry import resolve_tags

        return {str(key): str(value) for key, value in resolve_tags().items()}


# --- autologging and traces ------------------------------------------------------------------------------------------


def answers(uri: str, timeout: float) -> bool:
    """Whether something answers at a tracking URI: a file always does, a server within `timeout` seconds or not."""
    if not uri.startswith(("http://", "https://")):
        return uri.startswith(("sqlite", "file:")) or "://" not in uri
    try:
        with urllib.request.urlopen(f"{without_credentials(uri)}/health", timeout=timeout):  # noqa: S310  # it is http
            return True
    except urllib.error.HTTPError:
        return True  # "not found" and "not allowed" are answers too
    except (OSError, ValueError, http.client.HTTPException):
        return False


def autolog(
    store: Store,
    target: Target,
    *,
    run: Callable[[Callable[[], Any]], Any],
    redact: Callable[[dict[str, Any]], dict[str, Any]],
    options: Mapping[str, bool] | None = None,
) -> None:
    """Turn on `mlflow.dspy.autolog`, with traces, compiles and evaluations going where the runs go.

    Args:
        store: An open store: MLflow asks it for the experiment on the caller's thread, so one that is down must not be
            set here.
        target: The experiment.
        run: Runs a function that configures DSPy, so that this does not become its owner.
        redact: Takes the secrets out of the attributes of a trace's span.
        options: Arguments of `mlflow.dspy.autolog`.
    """
    global _traces_are_ours
    experiment_id = store.experiment_id(target)
    with _importing:
        import mlflow

    _export_in_background()
    with _errors_sorted():
        with _environment_kept("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID"):
            if mlflow.get_tracking_uri() != store.uri:
                mlflow.set_tracking_uri(store.uri)
            with _bounded():
                mlflow.set_experiment(experiment_id=experiment_id)
        _redact_spans(redact)
        arguments: dict[str, Any] = {"log_compiles": True, "log_evals": True, "silent": True, **(options or {})}
        run(functools.partial(importlib.import_module("mlflow.dspy").autolog, **arguments))
        _traces_are_ours = True


@contextmanager
def _environment_kept(*names: str) -> Iterator[None]:
    """Undo what MLflow sets in the environment for child processes: a later `configure` would read it there, and take
    our own echo for the user's wish.
    """
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is not None:
                os.environ[name] = value
            else:
                os.environ.pop(name, None)


def disable_autolog(run: Callable[[Callable[[], Any]], Any]) -> None:
    """Turn `mlflow.dspy.autolog` off again; `run` as above."""
    run(functools.partial(importlib.import_module("mlflow.dspy").autolog, disable=True, silent=True))


def fluent_run_id() -> str | None:
    """The id of the run that MLflow's own fluent API has open here, or None."""
    active_run = _loaded("active_run")
    run = active_run() if active_run is not None else None
    return run.info.run_id if run is not None else None


def active_trace_id() -> str | None:
    """The id of the trace that is open in this context, or None."""
    active_span = _loaded("get_current_active_span")
    span = active_span() if active_span is not None else None
    return span.trace_id if span is not None else None


def _loaded(name: str) -> Any:
    """A function of MLflow's, or None where that is not imported, or just being imported by another thread."""
    return getattr(sys.modules.get("mlflow"), name, None)


# MLflow exports traces in threads of its own. Left to itself it holds up the process for minutes where the server is
# gone: at its end, before 3.9 even in the user's calls.

_TIMEOUT_OF_TRACES = (5.0, 10.0)  # seconds to connect, to read
_EXPORTERS = ("mlflowtracelogging", "otelbatchspan")  # how the names of those threads begin
_exporting: contextvars.ContextVar[bool] = contextvars.ContextVar("skilltrace_exporting", default=False)
_traces_are_ours = False  # whether autologging was turned on here
_ending = threading.Event()  # the process ends: what fails now is not tried again
_last_moment = math.inf  # by time.monotonic; nothing is sent after it


@functools.cache
def _export_in_background() -> None:
    """Have every version export in the background, as the later ones do, unless the user has decided otherwise."""
    from mlflow.environment_variables import MLFLOW_ENABLE_ASYNC_TRACE_LOGGING
    from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter

    decide = getattr(MlflowV3SpanExporter, "_should_enable_async_logging", None)
    if decide is not None:
        MlflowV3SpanExporter._should_enable_async_logging = lambda self: (
            decide(self) or not MLFLOW_ENABLE_ASYNC_TRACE_LOGGING.is_set()
        )


_at_span_end: dict[str, Callable[[Any], None]] = {}  # by what it is for


def _process_spans(purpose: str, process: Callable[[Any], None]) -> None:
    """Have a function called with each span at its end, after the user's own span processors; one for each purpose."""
    _at_span_end[purpose] = process
    spans = importlib.import_module("mlflow.entities.span")
    original = getattr(spans, "apply_span_processors", None)
    if original is None:
        warn_once("spans", "This MLflow ends its spans in an unknown way: traces are not redacted, nor linked to runs.")
    elif not hasattr(original, "skilltrace"):

        @functools.wraps(original)
        def processed(span: Any) -> None:
            original(span)
            for each in list(_at_span_end.values()):
                try:
                    each(span)
                except Exception:
                    report("see the end of a span")

        processed.skilltrace = True  # type: ignore[attr-defined]  # what says that it is ours
        spans.__dict__["apply_span_processors"] = processed


def on_span_end(act: Callable[[str], None]) -> None:
    """Have a function called with the trace's id where one of its spans ends, in whose context."""
    _process_spans("link", lambda span: act(span.trace_id))


def _redact_spans(redact: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Take secrets out of each span before it is exported."""

    def without_secrets(span: Any) -> None:
        attributes = span.attributes
        for key, value in redact(attributes).items():
            if value != attributes.get(key):
                span.set_attribute(key, value)
        with suppress(AttributeError):
            for event in span._span._events:  # exceptions, with their messages
                event._attributes = redact(dict(event.attributes))

    _process_spans("redact", without_secrets)


def _renew_exports() -> None:
    """In a forked child: the threads that export traces are the parent's, and so is what waits for them."""
    try:
        exporter = sys.modules["mlflow.tracing.provider"]._get_trace_exporter()
        parents, exporter._async_queue = exporter._async_queue, type(exporter._async_queue)()
        parents._is_active = False  # else the end of this process waits for what only the parent can do
    except (KeyError, AttributeError):
        return


os.register_at_fork(after_in_child=_renew_exports)


def _is_export() -> bool:
    return _exporting.get() or threading.current_thread().name.lower().startswith(_EXPORTERS)


def _export(request: Callable[[], Any], retries: int) -> Any:
    """Send a part of a trace, as patiently as MLflow does, but not beyond the end of the process."""
    for attempt in range(retries + 1):
        if time.monotonic() > _last_moment:
            break
        try:
            return request()
        except Exception:
            if attempt == retries or _ending.wait(min(60.0, 2.0**attempt)):
                raise
    raise TimeoutError("the process ends")


def flush_traces(timeout: float) -> None:
    """At the end of the process: wait until the traces made so far are exported, for `timeout` seconds at most.

    What is left then is given up.
    """
    global _last_moment
    _last_moment = time.monotonic() + timeout
    _ending.set()
    token = _exporting.set(True)
    try:
        provider = sys.modules["mlflow.tracing.provider"]
        exporter = provider._get_trace_exporter()
        exports = exporter._async_queue
        if not exports.is_active():
            exporter._is_async_enabled = False  # it has no threads yet, and from Python 3.12 on it is too late for them
        provider.provider.get().force_flush(int(timeout * 1000))  # the spans that wait for a batch
    except (KeyError, AttributeError):
        return  # no trace was made, or traces are exported in another way
    finally:
        _exporting.reset(token)
    left = exports._queue
    with left.all_tasks_done:
        if left.all_tasks_done.wait_for(lambda: not left.unfinished_tasks, _last_moment - time.monotonic()):
            return
    with suppress(queue.Empty):
        while True:
            left.get_nowait()
            left.task_done()
    logger.warning("MLflow did not take all traces before the end of the process; the rest of them is lost.")


def run_url(uri: str, experiment_id: str, run_id: str, ui: str) -> str:
    """The address of a run in the MLflow UI: the tracking server's, or for a local store the one that `ui` is at."""
    base = uri if uri.startswith(("http://", "https://")) else ui
    return f"{without_credentials(base).rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
