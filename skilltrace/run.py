"""A run: one tracked call while it lasts, the context that knows the current one, and what is logged to it.

The current run lives in two places. A context variable follows `await`, tasks and `to_thread`. DSPy's own threads
(`Parallel`, `batch`, `Evaluate`) carry DSPy's context and no other, so it stands there too.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import os
import secrets
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from skilltrace import artifact, capture, config, dspy_bridge, journal, mlflow_bridge
from skilltrace.config import UI_PORT, Settings
from skilltrace.deliverer import Wanted
from skilltrace.errors import ArtifactError, DeliveryError
from skilltrace.faults import report, warn_once
from skilltrace.journal import Journal
from skilltrace.records import Artifact, Logged, Metric, RunEnded, RunStarted, Target, Turn
from skilltrace.usage import LMCall, LMUsage, Meter

if TYPE_CHECKING:
    from types import TracebackType

_TURNS = "conversation_history.json"
_PACKAGE = f"{Path(__file__).parent}{os.sep}"
_NOT_INHERITED = frozenset({"phase", "model", "error.type", "error.message"})
_KILLED = (KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit)
_RESERVED_METRICS = frozenset({*LMUsage(cost=0.0).metrics(), "duration"})


class Run:
    """One tracked call. `current_run()` gives the innermost; a `with tracked_phase(…)` block gives its own.

    All methods may be called from any thread or task, and after the run has ended. None waits for MLflow, but for
    `run_id` and `url`.

    Attributes:
        name: The rendered name, MLflow's `mlflow.runName`.
        kind: `"job"` or `"phase"`.
        settings: What was configured when the run, or the job around it, was opened.
        target: The store and experiment it goes to.
        active: The `mlflow.ActiveRun` that stands for it inside, where MLflow was asked for one.
        key: 32 hex digits, the run's tag `skilltrace.key` in MLflow.
        parent: The run around this one, or None.
        result: What the call returned; in a `with` block, set it to what a decorated function would have returned.

    Example:
        >>> import skilltrace
        >>> with skilltrace.tracked_phase("validation") as run:
        ...     run.log_metric("quality_score", 0.85)
        ...     run.result = {"passed": True}
    """

    __slots__ = (
        "__weakref__",
        "_ended",
        "_generation",
        "_journal",
        "_meter",
        "_params",
        "_start",
        "_tags",
        "_timer",
        "_traces",
        "_turns",
        "active",
        "collector",
        "key",
        "kind",
        "name",
        "parent",
        "result",
        "settings",
        "target",
    )

    def __init__(
        self,
        kind: str,
        name: str,
        *,
        parent: Run | None,
        settings: Settings,
        target: Target,
        tags: dict[str, str],
        params: dict[str, str],
        mlflow_parent: str | None = None,
        journal_: Journal | None = None,
    ) -> None:
        self.kind = kind
        self.name = name
        self.key = secrets.token_hex(16)
        self.parent = parent
        self.result: Any = None
        self.settings = settings
        self.target = target
        self._tags = tags
        self._params = params
        self._ended = False
        self._traces: dict[str, None] = {}
        self._turns = False
        self.active: Any = None
        self._journal = journal_ or journal.of(settings)
        self._generation = journal.generation
        self._meter = Meter()
        self.collector = dspy_bridge.collector(self, self._meter)
        self._timer = time.perf_counter()
        self._start = RunStarted(
            self.key,
            time.time_ns(),
            name,
            kind,
            target,
            parent=parent.key if parent is not None else None,
            tags={**tags, mlflow_bridge.PARENT_TAG: mlflow_parent} if mlflow_parent is not None else dict(tags),
            params=dict(params),
        )
        self._journal.append(self._start)
        if journal_ is None:
            dspy_bridge.open_runs.add(self.key)

    @classmethod
    def detached(cls, kind: str) -> Run:
        """A run that records nothing: what `with` gives where skilltrace is switched off."""
        settings = config.current()
        nowhere = journal.Nowhere(settings)
        return cls(
            kind, kind, parent=None, settings=settings, target=settings.target, tags={}, params={}, journal_=nowhere
        )

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def job(self) -> Run | None:
        """The innermost job that this run is part of: itself, where it is one."""
        run: Run | None = self
        while run is not None and run.kind != "job":
            run = run.parent
        return run

    @property
    def tags(self) -> dict[str, str]:
        """The tags set so far, those inherited from the job included."""
        return dict(self._tags)

    @property
    def usage(self) -> LMUsage:
        """The LM calls made so far inside this run and its children. It is live: read it again for newer figures."""
        return self._meter.usage

    @property
    def ended(self) -> bool:
        """Whether the call has returned or raised."""
        return self._ended

    @property
    def run_id(self) -> str:
        """The id of the run in MLflow. Waits for MLflow, `flush_timeout` seconds at most.

        Raises:
            DeliveryError: where MLflow has not got the run in that time.
        """
        run_id = self._journal.run_id(self._wanted(), self.settings.flush_timeout)
        if run_id is None:
            raise DeliveryError(
                f"MLflow has not got the run {self.name!r} within {self.settings.flush_timeout} s; "
                "skilltrace.status() says why"
            )
        return run_id

    @property
    def url(self) -> str:
        """The address of the run in the MLflow UI: the tracking server's, or for a local store the one at which
        `mlflow ui --port 5001` shows it. Waits as `run_id` does.

        Raises:
            DeliveryError: where MLflow has not got the run in that time.
        """
        info = self.entity().info
        return mlflow_bridge.run_url(self.target.uri, info.experiment_id, info.run_id, f"http://127.0.0.1:{UI_PORT}")

    def innermost_open(self) -> Run | None:
        """The run itself, or where it has ended the nearest one around it that has not."""
        run: Run | None = self
        while run is not None and run._ended:
            run = run.parent
        return run

    def entity(self) -> Any:
        """The `mlflow.entities.Run`, as MLflow has it now. Waits and raises as `run_id` does."""
        return mlflow_bridge.get_run(self.target.uri, self.run_id)

    def _wanted(self) -> list[Wanted]:
        """The run and those around it, the outermost first, as far as they are of this process."""
        chain: list[Wanted] = []
        run: Run | None = self
        while run is not None and run._generation == self._generation:
            chain.append(Wanted(run._start, run._ended))
            run = run.parent
        return chain[::-1]

    def __repr__(self) -> str:
        return f"<Run {self.kind} {self.name!r} {'ended' if self._ended else 'open'} key={self.key}>"

    # --- logging -----------------------------------------------------------------------------------------------------

    def log_metric(self, key: str, value: float, step: int | None = None, timestamp: int | None = None) -> None:
        """Log one metric point.

        Args:
            key: Its name.
            value: A number (NaN and infinities too) or a boolean. Anything else is left out, with a warning.
            step: The step, 0 by default.
            timestamp: Milliseconds since the epoch, now by default.

        Example:
            >>> import skilltrace
            >>> with skilltrace.tracked_phase("training") as run:
            ...     run.log_metric("loss", 0.5, step=1)
        """
        self.log_metrics({key: value}, step, timestamp)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None, timestamp: int | None = None) -> None:
        """Log several metric points of one step; see `log_metric`."""
        at = time.time_ns() // 1_000_000 if timestamp is None else int(timestamp)
        points = []
        for key, value in metrics.items():
            number = capture.as_number(value)
            if number is None:
                warn_once(("metric", key), "The metric %r is not recorded: %.60r is no number.", key, value)
            else:
                points.append(Metric.of(capture.clean_key(key), number, at, int(step or 0)))
        self._log(metrics=points)

    def log_param(self, key: str, value: Any) -> Any:
        """Log a param and return its value. In MLflow a param keeps its first value: a second one is left out, with a
        warning. Text over 6000 characters is cut, as MLflow does.
        """
        self.log_params({key: value})
        return value

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log several params; see `log_param`."""
        redactor, new = self.settings.redactor, {}
        for key, value in params.items():
            name = capture.clean_key(key)
            text = redactor.text(capture.text_under(key, value, redactor))[: capture.LONGEST_LOGGED_PARAM]
            if self._params.setdefault(name, text) != text:
                warn_once(("param", name), "The param %r keeps its first value: MLflow allows no second one.", name)
            else:
                new[name] = text
        self._log(params=new)

    def set_tag(self, key: str, value: Any) -> None:
        """Set a tag; a later value replaces an earlier one. Phases that start later inherit a job's tags."""
        self.set_tags({key: value})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set several tags; see `set_tag`."""
        cleaned = capture.clean_tags(tags, self.settings.redactor)
        self._tags.update(cleaned)
        self._log(tags=cleaned)

    def log_text(self, text: str, artifact_file: str) -> None:
        """Log text as a file.

        Args:
            text: The content.
            artifact_file: Its path in the run, like `"notes/plan.md"`.

        Raises:
            ArtifactError: where the path leaves the run.
        """
        self._log(artifacts=[self._artifact(artifact_file, text)])

    def log_dict(self, dictionary: Mapping[str, Any] | list[Any], artifact_file: str) -> None:
        """Log a dict or list as a JSON file, or as YAML where the path ends with `.yaml` or `.yml`.

        Args:
            dictionary: The content. Values that JSON does not know are written as a result's would be.
            artifact_file: Its path in the run.

        Raises:
            ArtifactError: where the path leaves the run.
        """
        self._log(artifacts=[self._artifact(artifact_file, dictionary)])

    def log_artifact(self, local_path: str | os.PathLike[str], artifact_path: str | None = None) -> None:
        """Log a file, or the files of a folder, as they are now: they may change or go afterwards.

        Args:
            local_path: The file or folder.
            artifact_path: The folder in the run; its top by default.

        Raises:
            ArtifactError: where the file cannot be read, or the path leaves the run.
        """
        source = Path(local_path)
        prefix = f"{artifact.safe_path(artifact_path)}/" if artifact_path else ""
        try:
            if source.is_dir():
                files = sorted(path for path in source.rglob("*") if path.is_file())
                places = [(path, prefix + path.relative_to(source.parent).as_posix()) for path in files]
            else:
                places = [(source, prefix + source.name)]
            kept = [self._journal.keep_file(path, artifact.safe_path(place)) for path, place in places]
        except OSError as error:
            raise ArtifactError(f"{os.fspath(local_path)!r} cannot be logged as an artifact: {error}") from error
        self._log(artifacts=kept)

    def log_turn(self, role: str, content: Any) -> None:
        """Log a turn of the conversation with a person or a model; all turns are `conversation_history.json`.

        Args:
            role: Who spoke, like `"user"` or `"assistant"`.
            content: What was said: text, or anything that a result may hold.

        Example:
            >>> import skilltrace
            >>> with skilltrace.tracked_job("clarify") as run:
            ...     run.log_turn("assistant", "Which topic?")
            ...     run.log_turn("user", "Python decorators")
        """
        tree = artifact.JsonTree(self.settings.redactor, self.settings.max_artifact_bytes).of(content)
        self._turns = True
        self._log(turns=[Turn(str(role), tree, time.time_ns())])

    def _artifact(self, path: str, value: Any) -> Artifact:
        made = artifact.of_value(
            path, value, redactor=self.settings.redactor, max_bytes=self.settings.max_artifact_bytes
        )
        return self._journal.keep(made)

    def _log(self, **what: Any) -> None:
        if self._generation == journal.generation and any(what.values()):
            target = self.target if self._ended else None
            self._journal.append(Logged(self.key, time.time_ns(), target, **what))

    def note_trace(self, trace_id: str) -> None:
        """Have a trace linked to this run when it is delivered."""
        self._traces[trace_id] = None

    # --- its end -----------------------------------------------------------------------------------------------------

    def close(
        self,
        exception: BaseException | None,
        *,
        metrics: capture.MetricsOption,
        artifacts: bool | str | Mapping[str, str | Callable[[Any], Any]],
        file_name: str,
    ) -> None:
        """Write the end of the run: what its result, its LM calls and its exception amount to."""
        if self._ended or self._generation != journal.generation:
            return
        self._ended = True
        dspy_bridge.open_runs.discard(self.key)
        duration, now = time.perf_counter() - self._timer, time.time_ns()
        usage = self._meter.close()
        figures: dict[str, float] = {}
        tags: dict[str, str] = {}
        files: list[Artifact] = []
        # Each part by itself: a fault in one must not cost the others, nor the end of the run.
        try:
            for key, value in capture.metrics(self.result, metrics, self.settings.redactor).items():
                figures[f"result.{key}" if key in _RESERVED_METRICS else key] = value
        except Exception:
            report("take the metrics of a result")
        try:
            files = artifact.of_result(
                self.result,
                artifacts,
                name=file_name,
                redactor=self.settings.redactor,
                max_bytes=self.settings.max_artifact_bytes,
                taken=artifact.OWN_FILES | ({_TURNS} if self._turns else set()),
            )
        except Exception:
            report("take the artifacts of a result")
        figures.update(usage.metrics(), duration=duration)
        if usage.by_model:
            files.append(_usage_file(usage))
        models = self._meter.settings.get("lm.model")
        if models:
            key, text = capture.clean_tag("model", ",".join(models), self.settings.redactor)
            tags[key] = text
        if exception is not None and not isinstance(exception, GeneratorExit):
            tags.update(_error_tags(exception, self.settings))
            if not isinstance(exception, _KILLED):
                files.append(Artifact("error.txt", text=self.settings.redactor.printed(_traceback(exception))))
        self._tags.update(tags)
        self._journal.append(
            RunEnded(
                self.key,
                now,
                _status(exception),
                metrics=[Metric.of(key, value, now // 1_000_000) for key, value in figures.items()],
                params={name: ",".join(values)[:500] for name, values in self._meter.settings.items()},
                tags=tags,
                artifacts=[self._journal.keep(file) for file in files],
                traces=list(self._traces),
            )
        )

    def add_late(self, call: LMCall, settings: Mapping[str, Any]) -> None:
        """Count an LM call that came after the end, where no run around this one is open to count it: correct the
        figures that were written.
        """
        metrics, file = self._meter.add_late(call, settings, lambda usage: (usage.metrics(), _usage_file(usage)))
        now = time.time_ns() // 1_000_000
        self._log(metrics=[Metric.of(key, value, now) for key, value in metrics.items()], artifacts=[file])

    # DSPy deep-copies and pickles its context, where the current run stands: a copy would be a second end of the run.
    def __copy__(self) -> Run:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (_elsewhere, ())


def _elsewhere() -> None:
    """What a run is in another process: nothing. `carrier()` takes its identity there."""
    return


def _status(exception: BaseException | None) -> str:
    if exception is None:
        return "FINISHED"
    return "KILLED" if isinstance(exception, _KILLED) else "FAILED"


def _usage_file(usage: LMUsage) -> Artifact:
    return Artifact("lm_usage.json", json={name: _figures(part) for name, part in usage.by_model.items()})


def _figures(usage: LMUsage) -> dict[str, float]:
    return {name.removeprefix("lm_"): value for name, value in usage.metrics().items()}


def _error_tags(exception: BaseException, settings: Settings) -> dict[str, str]:
    kind = type(exception)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    pairs = {"error.type": name, "error.message": exception}
    return capture.clean_tags(pairs, settings.redactor)


def _traceback(exception: BaseException) -> str:
    """The traceback as Python prints it, from the user's first frame on."""
    frame: TracebackType | None = exception.__traceback__
    while frame is not None and frame.tb_next is not None and frame.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.tb_next
    try:
        lines = traceback.format_exception(type(exception), exception, frame)
    except Exception:
        lines = traceback.format_tb(frame)  # the exception's own __str__ or __cause__ is broken
    return "".join(lines)[-100_000:]


# --- the current run -------------------------------------------------------------------------------------------------

_current: contextvars.ContextVar[Run | None] = contextvars.ContextVar("skilltrace_run", default=None)


def current_run() -> Run | None:
    """The innermost open run of the calling context, or None outside any.

    Example:
        >>> import skilltrace
        >>> skilltrace.current_run() is None
        True
        >>> with skilltrace.tracked_phase("search"):
        ...     skilltrace.current_run().name
        'search'
    """
    run = _current.get() or dspy_bridge.current_run()
    return run.innermost_open() if run is not None else None


def activate(run: Run) -> tuple[Run | None, Any]:
    """Make `run` the current one here; returns what `deactivate` needs."""
    before, inner = _current.get(), None
    _current.set(run)
    try:
        inner = dspy_bridge.enter(run)
    except Exception:
        report("enter DSPy's context")
    return before, inner


def deactivate(run: Run, token: tuple[Run | None, Any]) -> None:
    """Undo `activate`. Not by the context variable's token: a generator may be closed in another context."""
    before, inner = token
    if _current.get() is run:
        _current.set(before)
    try:
        dspy_bridge.leave(run, inner)
    except Exception:
        report("leave DSPy's context")


def _adopt_dspy() -> None:
    """DSPy was imported inside a run: the runs around this point are put into its context."""
    run, chain = _current.get(), []
    while run is not None:
        chain.append(run)
        run = run.parent
    for run in reversed(chain):
        if not run._ended:
            dspy_bridge.enter(run)


dspy_bridge.on_import(_adopt_dspy)


def inherited_tags(parent: Run | None) -> dict[str, str]:
    """The tags that a run inside `parent` begins with: those of its job, or who it is for where there is no job."""
    if parent is None:
        return {}
    job = parent.job
    if job is not None:
        return {key: value for key, value in job._tags.items() if key not in _NOT_INHERITED}
    return {key: value for key, value in parent._tags.items() if key in capture.IDENTITY}


# --- the same, on the current run ------------------------------------------------------------------------------------


P = ParamSpec("P")
R = TypeVar("R")


def _on_current_run(method: Callable[Concatenate[Run, P], R]) -> Callable[P, R | None]:
    """A function that does to the current run what a method of `Run` does; outside a run it says so once."""

    @functools.wraps(method)
    def function(*args: P.args, **kwargs: P.kwargs) -> R | None:
        run = current_run()
        if run is None:
            name = method.__name__
            warn_once(("outside", name), "skilltrace.%s was called outside any run, where it does nothing.", name)
            return None
        return method(run, *args, **kwargs)

    signature = inspect.signature(method)
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]  # what inspect.signature looks for
        parameters=list(signature.parameters.values())[1:]
    )
    function.__qualname__ = method.__name__
    return function


log_metric = _on_current_run(Run.log_metric)
log_metrics = _on_current_run(Run.log_metrics)
log_param = _on_current_run(Run.log_param)
log_params = _on_current_run(Run.log_params)
set_tag = _on_current_run(Run.set_tag)
set_tags = _on_current_run(Run.set_tags)
log_text = _on_current_run(Run.log_text)
log_dict = _on_current_run(Run.log_dict)
log_artifact = _on_current_run(Run.log_artifact)
log_turn = _on_current_run(Run.log_turn)
