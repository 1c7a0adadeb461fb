"""The decorators: `tracked_job` and `tracked_phase`.

What can be known when something is decorated is worked out then: its options are checked, its templates read, and
whether it is a function, a generator or a module of DSPy's is decided. What a call then does is in `call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, TypeVar, overload

from skilltrace import capture, dspy_bridge
from skilltrace.artifact import safe_path
from skilltrace.call import ArtifactsOption, Call, Site, Spec, begin_call
from skilltrace.errors import ArtifactError, ConfigurationError
from skilltrace.functions import track_function
from skilltrace.modules import track_class, track_instance
from skilltrace.run import Run, current_run
from skilltrace.template import Template, parse_path

F = TypeVar("F", bound=Callable[..., Any])


class Tracked:
    """What `tracked_job(…)` and `tracked_phase(…)` give: a decorator that is a context manager too."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        name = spec.name.text if spec.name is not None and spec.name.fixed else ""
        self._site = Site(spec, name, None, capture.Binder(None))
        self._open: dict[str, Call] = {}
        self._off = 0  # entered while skilltrace was switched off, and not left yet

    def __call__(self, decorated: F) -> F:
        """Decorate a function, a method, a class of DSPy modules, or one module."""
        tracked: F = _track(self._spec, decorated)
        return tracked

    def __enter__(self) -> Run:
        call = begin_call(self._site, None, (), {})
        if call is None:
            self._off += 1
            return Run.detached(self._spec.kind)
        self._open[call.run.key] = call
        return call.run

    def __exit__(
        self, kind: type[BaseException] | None, exception: BaseException | None, trace: TracebackType | None
    ) -> None:
        # One object may be entered by many tasks at once: the run to close is the one of this context.
        run = current_run()
        while run is not None and run.key not in self._open:
            run = run.parent
        if run is not None:
            self._open.pop(run.key).end(exception)
        elif self._off:
            self._off -= 1
        elif self._open:
            self._open.popitem()[1].end(exception)  # entered in a context that is gone, as a generator's may be


def _track(spec: Spec, decorated: Any) -> Any:
    if dspy_bridge.is_module(decorated):
        return (track_class if isinstance(decorated, type) else track_instance)(spec, decorated)
    if isinstance(decorated, type):
        raise ConfigurationError(
            f"tracked_{spec.kind} decorates functions, methods and DSPy modules; {decorated.__name__} is a class of "
            "neither. Decorate its methods instead."
        )
    if not (callable(decorated) or isinstance(decorated, (staticmethod, classmethod))):
        raise ConfigurationError(
            f"tracked_{spec.kind} decorates functions, methods and DSPy modules, not {type(decorated).__name__}: "
            f"{decorated!r:.100}"
        )
    return track_function(spec, decorated)


@overload
def tracked_job(name: F, /) -> F: ...
@overload
def tracked_job(
    name: str | None = None,
    *,
    tags: Mapping[str, str] | None = None,
    params: bool | Iterable[str] = True,
    metrics: capture.MetricsOption = True,
    artifacts: ArtifactsOption = True,
    experiment: str | None = None,
) -> Tracked: ...
def tracked_job(
    name: Any = None,
    *,
    tags: Mapping[str, str] | None = None,
    params: bool | Iterable[str] = True,
    metrics: capture.MetricsOption = True,
    artifacts: ArtifactsOption = True,
    experiment: str | None = None,
) -> Any:
    """Make each call a run in MLflow: a job, the parent of the phases inside it.

    It decorates functions (also async, generators, async generators), methods (also class and static ones), classes of
    DSPy modules and single modules, with or without options; and it is a context manager. What is decorated stays what
    it was: signature, type, copying, pickling. A call returns and raises what it would have without it.

    Args:
        name: A template for the run's name, with fields over the call's arguments: `"skill_creation_{job_id}"`,
            `"{request.topic}"`, `"{self.region}"`. Default: the function's or class's name and `_{job_id}`. A job
            whose call has no `job_id` gets one, `job_` and 12 hex digits.
        tags: Tags, whose values are templates too. The job's phases inherit them.
        params: Which arguments become params: True for all scalar ones, a list of names, or False.
        metrics: Which numbers of the result become metrics: True for its top-level fields, a list of fields, a mapping
            from metric names to paths (`"report.score"`) or functions of the result, or False.
        artifacts: Which parts of the result become files: True for all, by field; a path for the whole result; a
            mapping from paths to paths in the result or functions of it; or False.
        experiment: MLflow experiment of this job, in place of the configured one.

    Returns:
        The decorated thing; with options, an object that decorates or is entered by `with`, which gives the `Run`.

    Raises:
        ConfigurationError: where an option has a bad value, or something is decorated that cannot be.

    Example:
        >>> import skilltrace
        >>> @skilltrace.tracked_job("greeting_{job_id}")
        ... def greet(name, job_id):
        ...     return {"text": f"Hello {name}", "length": len(name)}
        >>> greet("Ada", job_id="job_1")
        {'text': 'Hello Ada', 'length': 3}
    """
    return _tracked("job", name, tags, params, metrics, artifacts, experiment)


@overload
def tracked_phase(name: F, /) -> F: ...
@overload
def tracked_phase(
    name: str | None = None,
    *,
    tags: Mapping[str, str] | None = None,
    params: bool | Iterable[str] = True,
    metrics: capture.MetricsOption = True,
    artifacts: ArtifactsOption = True,
) -> Tracked: ...
def tracked_phase(
    name: Any = None,
    *,
    tags: Mapping[str, str] | None = None,
    params: bool | Iterable[str] = True,
    metrics: capture.MetricsOption = True,
    artifacts: ArtifactsOption = True,
) -> Any:
    """Make each call a run in MLflow: a phase, the child of the run that it is called in.

    As `tracked_job` in all but this: the default name is the function's or class's, the rendered name is the run's tag
    `phase`, and outside any job a phase is a run of its own.

    Args:
        name: See `tracked_job`.
        tags: See `tracked_job`.
        params: See `tracked_job`.
        metrics: See `tracked_job`.
        artifacts: See `tracked_job`.

    Returns:
        See `tracked_job`.

    Raises:
        ConfigurationError: where an option has a bad value, or something is decorated that cannot be.

    Example:
        >>> import skilltrace
        >>> with skilltrace.tracked_phase("validation", metrics={"quality_score": "score"}) as run:
        ...     run.result = {"score": 0.85, "issues": []}
    """
    return _tracked("phase", name, tags, params, metrics, artifacts, None)


def _tracked(
    kind: str,
    name: Any,
    tags: Mapping[str, str] | None,
    params: bool | Iterable[str],
    metrics: capture.MetricsOption,
    artifacts: ArtifactsOption,
    experiment: str | None,
) -> Any:
    bare = name is not None and not isinstance(name, str)
    spec = Spec(
        kind=kind,
        name=None if bare or name is None else Template(name),
        tags=_checked_tags(tags),
        params=_checked_params(params),
        metrics=_checked_metrics(metrics),
        artifacts=_checked_artifacts(artifacts),
        experiment=_checked_experiment(experiment),
    )
    return _track(spec, name) if bare else Tracked(spec)


def _checked_tags(tags: Any) -> dict[str, Template | str]:
    if tags is None:
        return {}
    if not isinstance(tags, Mapping) or not all(isinstance(key, str) and key for key in tags):
        raise ConfigurationError(f"tags must be a mapping from names to values, not {tags!r:.100}")
    return {
        key: Template(value, f"tags[{key!r}]") if isinstance(value, str) else capture.text_of(value)
        for key, value in tags.items()
    }


def _checked_params(params: Any) -> bool | frozenset[str]:
    if isinstance(params, bool):
        return params
    if isinstance(params, str) or not isinstance(params, Iterable) or not all(isinstance(name, str) for name in params):
        raise ConfigurationError(f"params must be True, False or a list of argument names, not {params!r:.100}")
    return frozenset(params)


def _checked_metrics(metrics: Any) -> capture.MetricsOption:
    if isinstance(metrics, bool):
        return metrics
    if isinstance(metrics, Mapping) and _are_picks(metrics, "metrics"):
        return dict(metrics)
    if isinstance(metrics, Iterable) and not isinstance(metrics, (str, Mapping)):
        return {name: name for name in metrics if _are_picks({name: name}, "metrics")}
    raise ConfigurationError(
        "metrics must be True, False, a list of fields, or a mapping from metric names to paths or functions, "
        f"not {metrics!r:.100}"
    )


def _checked_artifacts(artifacts: Any) -> ArtifactsOption:
    if isinstance(artifacts, bool):
        return artifacts
    try:
        if isinstance(artifacts, str):
            return safe_path(artifacts)
        if isinstance(artifacts, Mapping) and _are_picks(artifacts, "artifacts"):
            picks = {safe_path(path): pick for path, pick in artifacts.items()}
            for path in picks:
                if any(other.startswith(f"{path}/") for other in picks):
                    raise ArtifactError(f"{path!r} cannot be a file and a folder")
            return picks
    except ArtifactError as error:
        raise ConfigurationError(f"artifacts: {error}") from None
    raise ConfigurationError(
        "artifacts must be True, False, a path such as 'report.json', or a mapping from paths to paths in the result "
        f"or functions of it, not {artifacts!r:.100}"
    )


def _are_picks(picks: Mapping[Any, Any], option: str) -> bool:
    for name, pick in picks.items():
        if not isinstance(name, str) or not name or not (callable(pick) or isinstance(pick, str)):
            raise ConfigurationError(f"{option}: {name!r:.50} must map to a path in the result or a function of it")
        if isinstance(pick, str):
            parse_path(pick, option)
    return True


def _checked_experiment(experiment: Any) -> str | None:
    if experiment is not None and (not isinstance(experiment, str) or not experiment.strip()):
        raise ConfigurationError(f"experiment must be the name of an MLflow experiment, not {experiment!r:.100}")
    return experiment
