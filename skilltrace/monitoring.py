"""The names that services which track themselves by hand know: thin, on the same engine.

    from skilltrace import MLflowContext, setup_dspy_autologging

    setup_dspy_autologging(experiment_name="skill-creation")
    with MLflowContext(run_name="miprov2-run", tags={"optimizer": "miprov2"}):
        optimized = teleprompter.compile(program, trainset=trainset)

New code uses `configure`, `tracked_job` and `tracked_phase`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType

from skilltrace import autolog, config, dspy_bridge, mlflow_bridge
from skilltrace.errors import ConfigurationError, DeliveryError
from skilltrace.faults import logger, report
from skilltrace.run import Run, current_run
from skilltrace.tracked import Tracked, tracked_job, tracked_phase

DEFAULT_EXPERIMENT_NAME = "dspy"


def setup_dspy_autologging(
    tracking_uri: str | os.PathLike[str] | None = None,
    experiment_name: str = DEFAULT_EXPERIMENT_NAME,
    disable: bool = False,
    log_compiles: bool = True,
    log_evals: bool = True,
    log_traces: bool = False,
) -> bool:
    """Configure skilltrace and turn on `mlflow.dspy.autolog`, at the start of an application.

    Args:
        tracking_uri: As in `configure`.
        experiment_name: MLflow experiment.
        disable: Turn tracking and autologging off instead.
        log_compiles: Log optimizers' compiles.
        log_evals: Log evaluations.
        log_traces: Log traces of each module and LM call.

    Returns:
        True where autologging is on. False where it was disabled, or MLflow does not answer now: it is then turned on
        when it does, and runs are recorded all the same.

    Raises:
        ConfigurationError: where `tracking_uri` or `experiment_name` cannot be used.

    Example:
        >>> from skilltrace import setup_dspy_autologging
        >>> setup_dspy_autologging(disable=True)
        False
    """
    before = autolog.options
    if not disable:
        dspy_bridge.load()
        autolog.options = {"log_compiles": log_compiles, "log_evals": log_evals, "log_traces": log_traces}
    try:
        settings = config.configure(
            experiment_name, tracking_uri=tracking_uri, autolog=not disable, enabled=not disable
        )
    except ConfigurationError:
        autolog.options = before
        raise
    return autolog.ensure(settings)


class MLflowContext:
    """A run as a context manager, with the tags `status` and `error` that its users query for.

    Args:
        run_name: The run's name. Default: `"run"`.
        tags: Its tags.
        description: What the MLflow UI shows as the run's description.

    Example:
        >>> from skilltrace import MLflowContext
        >>> with MLflowContext(run_name="skill-creation", tags={"phase": "generation"}) as context:
        ...     context.run.log_metric("quality_score", 0.85)
    """

    def __init__(
        self, run_name: str | None = None, tags: Mapping[str, str] | None = None, description: str | None = None
    ) -> None:
        self._name = run_name or "run"
        self._tags = dict(tags or {})
        if description:
            self._tags["mlflow.note.content"] = description
        self._tracked: Tracked | None = None
        self._run: Run | None = None

    @property
    def run(self) -> Run:
        """The run, inside the block and after it."""
        if self._run is None:
            raise RuntimeError("the run begins when the block is entered: with MLflowContext(…) as context:")
        return self._run

    @property
    def run_id(self) -> str | None:
        """The id of the run in MLflow; None where MLflow does not answer in time."""
        return _run_id(self._run)

    def __enter__(self) -> MLflowContext:  # noqa: PYI034  # typing.Self is not in Python 3.10
        # A name or a tag is text here, not a template: braces stand for themselves.
        name = self._name.replace("{", "{{").replace("}", "}}")
        tags = {key: str(value).replace("{", "{{").replace("}", "}}") for key, value in self._tags.items()}
        self._tracked = (tracked_job if current_run() is None else tracked_phase)(name, tags=tags)
        self._run = self._tracked.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exception: BaseException | None, trace: TracebackType | None
    ) -> None:
        tracked, run = self._tracked, self._run
        if tracked is None or run is None:
            return
        try:
            run.set_tag("status", "success" if exception is None else "failed")
            if exception is not None:
                run.set_tag("error", exception)
        except Exception:
            report("tag the end of an MLflowContext")
        tracked.__exit__(kind, exception, trace)


def get_current_run_id() -> str | None:
    """The id of the current run in MLflow: skilltrace's innermost, else `mlflow.active_run()`; None outside any.

    It waits for MLflow to have the run, `flush_timeout` seconds at most, and returns None where it has not.

    Example:
        >>> from skilltrace import get_current_run_id
        >>> get_current_run_id() is None
        True
    """
    run = current_run()
    return _run_id(run) if run is not None else mlflow_bridge.fluent_run_id()


def _run_id(run: Run | None) -> str | None:
    try:
        return run.run_id if run is not None else None
    except DeliveryError as error:
        logger.warning("The run id is not known: %s", error)
        return None
