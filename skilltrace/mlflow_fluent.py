"""MLflow's own fluent API inside tracked runs: `mlflow.log_metric`, `active_run`, `start_run(nested=True)`, `end_run`.

MLflow keeps a stack of active runs for each thread, so concurrent tasks mix up theirs, and DSPy's threads have none. In
the place of that stack stands an object that answers for the context that asks: inside a tracked run with that run and
what the user has started in it, elsewhere with MLflow's own stack. So whatever of MLflow asks for the active run (the
log functions, autologging of other flavours, `mlflow.evaluate`) gets the right one, and outside nothing has changed.

The run that MLflow is given is created in the store when something first wants to know its id: a body that does not
use MLflow waits for nothing.

This module is all that knows these internals of MLflow. Where a version has others, it says so and changes nothing.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import wrapt

from skilltrace import dspy_bridge, mlflow_bridge
from skilltrace.errors import DeliveryError
from skilltrace.faults import report, warn_once
from skilltrace.run import Run, current_run

_Started = tuple[tuple[Run, Any], ...]

# The runs that the user has started with MLflow inside tracked ones, each with the run that it was started in. They
# stand where the current run stands, for the same reason: see `run`.
_started: contextvars.ContextVar[_Started] = contextvars.ContextVar("skilltrace_started", default=())
_STARTED = "_skilltrace_started"  # the key in DSPy's context

_tracked_run: Any = None  # the class of what MLflow is given for a tracked run


def _all_started() -> _Started:
    started: _Started = _started.get() or dspy_bridge.recall(_STARTED) or ()
    return started


def _set_started(started: _Started) -> None:
    _started.set(started)
    dspy_bridge.remember(_STARTED, started)


def _started_in(run: Run) -> list[Any]:
    """What the user has started inside a run and not ended; also what a run inside that one has left behind."""
    return [active for owner, active in _all_started() if owner.innermost_open() is run]


def started_run_id(run: Run) -> str | None:
    """The id of the innermost run that the user has started with MLflow inside `run`, or None."""
    started = _started_in(run)
    return str(started[-1].info.run_id) if started else None


class _Stack(list[Any]):
    """The active runs of this context, in the shape in which MLflow keeps those of a thread."""

    def __init__(self, run: Run) -> None:
        super().__init__([_active(run), *_started_in(run)])
        self._run = run

    def append(self, active: Any) -> None:
        super().append(active)
        _set_started((*_all_started(), (self._run, active)))

    def pop(self, index: Any = -1) -> Any:
        active = super().pop(index)
        _set_started(tuple(entry for entry in _all_started() if entry[1] is not active))
        return active


def _active(run: Run) -> Any:
    """What MLflow is given for a tracked run: one object for each."""
    if run.active is None:
        run.active = _tracked_run(run)
    return run.active


class _ActiveRuns:
    """Stands in the place of MLflow's variable for each thread.

    Args:
        original: That variable.
    """

    def __init__(self, original: Any) -> None:
        self._original = original

    def get(self) -> list[Any]:
        """The stack of this context."""
        run = current_run()
        stack: list[Any] = _Stack(run) if run is not None else self._original.get()
        return stack

    def set(self, value: list[Any]) -> None:
        """Replace the stack of this context; a tracked run stays what it is."""
        run = current_run()
        if run is None:
            self._original.set(value)
        else:
            others = [entry for entry in _all_started() if entry[0].innermost_open() is not run]
            mine = [(run, active) for active in value if not isinstance(active, _tracked_run)]
            _set_started((*others, *mine))

    def reset(self) -> None:
        """Forget all stacks; a tracked run stays what it is."""
        self._original.reset()
        _set_started(())

    def get_all_thread_values(self) -> dict[int, list[Any]]:
        """Where a trace that starts now looks for its run: in this context only, if it is inside a tracked run.

        A run that MLflow does not have yet is left out: the trace is linked to it later, by its id.
        """
        run = current_run()
        if run is None:
            values: dict[int, list[Any]] = self._original.get_all_thread_values()
            return values
        return {threading.get_ident(): [active for active in _Stack(run) if getattr(active, "exists", True)]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _tracked_run_class(base: type) -> type:
    """The class of active runs that are tracked; `base` is MLflow's."""

    def from_store(name: str) -> property:
        return property(lambda self: getattr(self._in_store(), name))

    class TrackedRun(base):  # type: ignore[misc]  # its base is known only once MLflow is imported
        """A tracked run as `mlflow.ActiveRun`. Who reads what it holds waits until MLflow has the run."""

        def __init__(self, run: Run) -> None:
            self._tracked = run
            self._entity: Any = None

        @property
        def exists(self) -> bool:
            """Whether MLflow is known to have the run."""
            return self._entity is not None

        def _in_store(self) -> Any:
            if self._entity is None:
                try:
                    self._entity = self._tracked.entity()
                except DeliveryError as error:
                    # What MLflow's own call would raise; ours only stands in for it.
                    raise mlflow_bridge.unavailable(str(error)) from error
            return self._entity

        _info, _data, _inputs, _outputs = map(from_store, ("info", "data", "inputs", "outputs"))

        def __exit__(self, *_: object) -> None:
            """It ends when its call does."""

    return TrackedRun


# --- the functions that must know more than the stack tells -----------------------------------------------------------


def _start_run(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def start_run(*args: Any, **kwargs: Any) -> Any:
        run = current_run()
        if run is None:
            return original(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        if not arguments.get("nested") and not _started_in(run):
            # A function that starts runs of its own must go on working when it is decorated, or called by one that is.
            warn_once(
                "start_run",
                "mlflow.start_run() inside the tracked run %r starts a run nested in it, as with nested=True. "
                "(Said once.)",
                run.name,
            )
            arguments["nested"] = True
        if not (arguments.get("run_id") or arguments.get("experiment_id") or os.environ.get("MLFLOW_RUN_ID")):
            arguments["experiment_id"] = _active(run).info.experiment_id  # where its parent is, as the UI needs it
        return original(**arguments)

    return start_run


def _end_run(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def end_run(*args: Any, **kwargs: Any) -> Any:
        run = current_run()
        if run is None or _started_in(run):
            return original(*args, **kwargs)
        warn_once(
            "end_run",
            "mlflow.end_run() does nothing to the tracked run %r, which ends when its call does. (Said once.)",
            run.name,
        )
        return None

    return end_run


def _resolve_tracking_uri(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def resolve(tracking_uri: str | None = None) -> Any:
        run = current_run() if tracking_uri is None else None
        return mlflow_bridge.with_credentials(run.target.uri) if run is not None else original(tracking_uri)

    return resolve


# --- at MLflow's import -----------------------------------------------------------------------------------------------


def _missing(fluent: Any) -> list[str]:
    wanted = {
        "_active_run_stack": ("get", "set", "reset", "get_all_thread_values"),
        "ActiveRun": ("__enter__", "__exit__"),
        "start_run": ("__call__",),
        "end_run": ("__call__",),
    }
    return [name for name, methods in wanted.items() if not _has(getattr(fluent, name, None), methods)]


def _has(thing: Any, methods: Iterable[str]) -> bool:
    return thing is not None and all(hasattr(thing, method) for method in methods)


def install(fluent: Any) -> bool:
    """Have `mlflow.tracking.fluent` ask for the runs of its caller's context; False where this version cannot."""
    global _tracked_run
    missing = _missing(fluent)
    if missing:
        warn_once(
            "fluent",
            "This MLflow keeps its active runs in a way that skilltrace does not know (mlflow.tracking.fluent has no "
            "%s as before): mlflow.log_metric and the like go where MLflow itself sends them, also inside tracked "
            "runs. Use skilltrace.log_metric and the like there, which do not depend on it.",
            ", ".join(missing),
        )
        return False
    if isinstance(fluent._active_run_stack, _ActiveRuns):
        return True
    _tracked_run = _tracked_run_class(fluent.ActiveRun)
    fluent._active_run_stack = _ActiveRuns(fluent._active_run_stack)
    for name, wrap in (("start_run", _start_run), ("end_run", _end_run)):
        original = getattr(fluent, name)
        wrapped = wrap(original)
        for module in (fluent, sys.modules.get("mlflow")):
            if getattr(module, name, None) is original:
                setattr(module, name, wrapped)
    return True


def _fluent_imported(fluent: Any) -> None:
    try:
        install(fluent)
    except Exception:
        report("connect to MLflow's fluent API")


def _stores_imported(utils: Any) -> None:
    original = getattr(utils, "_resolve_tracking_uri", None)
    if original is not None:
        utils._resolve_tracking_uri = _resolve_tracking_uri(original)
    else:
        warn_once(
            "resolve",
            "This MLflow finds its tracking URI in a way that skilltrace does not know: inside tracked runs "
            "mlflow.log_metric and the like go to the store of mlflow.set_tracking_uri; set it to that of configure.",
        )


def _mlflow_imported(_: Any) -> None:
    try:
        mlflow_bridge.on_span_end(_note_trace)
    except Exception:
        report("see the traces that are made inside tracked runs")


def _note_trace(trace_id: str) -> None:
    run = current_run()
    if run is not None:
        run.note_trace(trace_id)


wrapt.register_post_import_hook(_fluent_imported, "mlflow.tracking.fluent")
wrapt.register_post_import_hook(_stores_imported, "mlflow.tracking._tracking_service.utils")
wrapt.register_post_import_hook(_mlflow_imported, "mlflow")
