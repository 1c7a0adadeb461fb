"""One tracked call: the options that it was decorated with, and its run from the call to the return."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from skilltrace import autolog, capture, config, mlflow_fluent
from skilltrace.artifact import file_name
from skilltrace.faults import report
from skilltrace.redaction import Redactor
from skilltrace.run import Run, activate, current_run, deactivate, inherited_tags
from skilltrace.template import Template

ArtifactsOption = bool | str | Mapping[str, str | Callable[[Any], Any]]

_LONGEST_NAME = 250


@dataclass(frozen=True, eq=False)
class Spec:
    """The options of a decorator, checked."""

    kind: str
    name: Template | None
    tags: Mapping[str, Template | str]
    params: bool | frozenset[str]
    metrics: capture.MetricsOption
    artifacts: ArtifactsOption
    experiment: str | None

    @functools.cached_property
    def fields(self) -> frozenset[str]:
        """The arguments that the templates use."""
        templates = [self.name, *self.tags.values()]
        return frozenset(root for template in templates if isinstance(template, Template) for root in template.roots)

    def __deepcopy__(self, memo: dict[int, Any]) -> Spec:
        return self  # a copied module is tracked under the very same options

    def same_run(self, other: Spec) -> bool:
        """Whether the two make one run when both decorate the same thing."""
        return self.kind == other.kind and (self.name and self.name.text) == (other.name and other.name.text)


@dataclass(slots=True)
class Site:
    """The place that is decorated: what is the same for all of its calls."""

    spec: Spec
    default: str  # the function's or class's name
    service: str | None  # where the owner of the method does not tell
    binder: capture.Binder
    is_module: bool = False


class Call:
    """One tracked call: its run while it is open."""

    __slots__ = ("_name", "_spec", "_token", "run")

    def __init__(self, site: Site, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(owner, ModuleType):
            owner = None  # what Python gives as the owner of a built-in function
        spec, parent = site.spec, current_run()
        settings = parent.settings if parent is not None else config.current()
        redactor = settings.redactor
        autolog.ensure(config.current())  # not those of an open job: MLflow can be pointed at one place only
        arguments, first = site.binder.bind(owner, args, kwargs)

        tags = inherited_tags(parent)
        if parent is None:
            tags.update(capture.clean_tags(settings.tags, redactor))
        identity = capture.identity_tags(arguments, first)
        if spec.kind == "job":
            identity.setdefault("job_id", f"job_{secrets.token_hex(6)}")
        tags.update(capture.clean_tags(identity, redactor))
        service = _service(site, owner, parent)
        if service is not None:
            tags["service"] = service

        # Behind the arguments a template sees who the run is for, so that `{job_id}` works in each phase of a job.
        values = {key: tags[key] for key in capture.IDENTITY if key in tags}
        values.update({key: arguments[key] for key in spec.fields if key in arguments})
        name = redactor.text(self._render_name(site, values, redactor))[:_LONGEST_NAME] or "unnamed"
        rendered = {
            key: template.render(values, redactor) if isinstance(template, Template) else template
            for key, template in spec.tags.items()
        }
        tags.update(capture.clean_tags(rendered, redactor))
        if spec.kind == "phase":
            tags["phase"] = name

        self._spec = spec
        self._name = site.default if spec.kind == "job" and site.default else name
        self._token: Any = None
        self.run = Run(
            spec.kind,
            name,
            parent=parent,
            settings=settings,
            # Parent and child stand in one experiment, also where configure was called in between.
            target=settings.target_for(spec.experiment) if spec.experiment or parent is None else parent.target,
            tags=tags,
            params=capture.params(arguments, first, spec.params, redactor),
            mlflow_parent=mlflow_fluent.started_run_id(parent) if parent is not None else None,
        )

    @staticmethod
    def _render_name(site: Site, values: Mapping[str, Any], redactor: Redactor) -> str:
        if site.spec.name is not None:
            return site.spec.name.render(values, redactor)
        return f"{site.default or 'job'}_{values['job_id']}" if site.spec.kind == "job" else site.default or "phase"

    def enter(self) -> None:
        """Make the run the current one here."""
        self._token = activate(self.run)

    def leave(self) -> None:
        """Make the run around it the current one again."""
        deactivate(self.run, self._token)

    def close(self, exception: BaseException | None) -> None:
        """Write the end of the run."""
        try:
            self.run.close(
                exception, metrics=self._spec.metrics, artifacts=self._spec.artifacts, file_name=file_name(self._name)
            )
        except Exception:
            report("close a run")

    def end(self, exception: BaseException | None, result: Any = None) -> None:
        """Leave the run and write its end."""
        self.leave()
        if result is not None:
            self.run.result = result
        self.close(exception)


def open_call(site: Site, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Open the run of a call; None where tracking is off or failed, and the call simply goes on."""
    try:
        return Call(site, owner, args, kwargs) if config.current().enabled else None
    except Exception:
        report("open a run")
        return None


def begin_call(site: Site, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Open the run of a call and make it the current one; None as `open_call`."""
    call = open_call(site, owner, args, kwargs)
    if call is not None:
        call.enter()
    return call


def _service(site: Site, owner: Any, parent: Run | None) -> str | None:
    if site.is_module:
        # A module works for the service whose job it is part of.
        return None if parent is not None and parent.job is not None else site.service
    if owner is None:
        return site.service
    return owner.__name__ if isinstance(owner, type) else type(owner).__name__
