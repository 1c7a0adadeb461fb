"""The decorators: `tracked_job` and `tracked_phase`.

What can be known when something is decorated is worked out then: whether it is a coroutine function or a generator, its
parameters, its templates. A call then opens a run, calls, and closes it; `_Call` is the one place where that is done.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import inspect
import secrets
import sys
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, TypeVar, overload

import wrapt

from skilltrace import autolog, capture, config, dspy_bridge
from skilltrace.artifact import file_name, safe_path
from skilltrace.errors import ArtifactError, ConfigurationError
from skilltrace.faults import report
from skilltrace.redaction import Redactor
from skilltrace.run import Run, activate, current_run, deactivate, inherited_tags
from skilltrace.template import Template, parse_path

F = TypeVar("F", bound=Callable[..., Any])

ArtifactsOption = bool | str | Mapping[str, str | Callable[[Any], Any]]

_MARK = "__skilltrace__"
_ENTRY_POINTS = ("__call__", "acall", "forward", "aforward")
_LONGEST_NAME = 250
_MOST_ITEMS = 10_000  # yielded items that are kept for the result


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
class _Site:
    """The place that is decorated: what is the same for all of its calls."""

    spec: Spec
    default: str  # the function's or class's name
    service: str | None  # where the owner of the method does not tell
    binder: capture.Binder
    is_module: bool = False


class _Call:
    """One tracked call: its run while it is open."""

    __slots__ = ("_name", "_spec", "_token", "run")

    def __init__(self, site: _Site, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(owner, ModuleType):
            owner = None  # what Python gives as the owner of a built-in function
        spec, parent = site.spec, current_run()
        settings = parent.settings if parent is not None else config.current()
        redactor = settings.redactor
        autolog.ensure(settings)
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
        )

    @staticmethod
    def _render_name(site: _Site, values: Mapping[str, Any], redactor: Redactor) -> str:
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


def _open(site: _Site, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    """Open the run of a call; None where tracking is off or failed, and the call simply goes on."""
    try:
        return _Call(site, owner, args, kwargs) if config.current().enabled else None
    except Exception:
        report("open a run")
        return None


def _begin(site: _Site, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    call = _open(site, owner, args, kwargs)
    if call is not None:
        call.enter()
    return call


def _service(site: _Site, owner: Any, parent: Run | None) -> str | None:
    if site.is_module:
        # A module works for the service whose job it is part of.
        return None if parent is not None and parent.job is not None else site.service
    if owner is None:
        return site.service
    return owner.__name__ if isinstance(owner, type) else type(owner).__name__


# --- functions and methods -------------------------------------------------------------------------------------------


class _BoundFunction(wrapt.BoundFunctionWrapper):  # type: ignore[type-arg]  # generic only in wrapt's stubs
    """A decorated method, bound. Optimizers keep one in a module while they patch it, and then copy the module."""

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._self_parent.__get__(copy.deepcopy(self._self_instance, memo), type(self._self_instance))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (self._self_instance, self.__wrapped__.__name__)


class TrackedFunction(wrapt.FunctionWrapper):  # type: ignore[type-arg]  # generic only in wrapt's stubs
    """A decorated function: in all respects that function, but for its calls.

    wrapt's own wrapper can be neither copied nor pickled; this one is found again by its name, as functions are.
    """

    __bound_function_wrapper__ = _BoundFunction

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__wrapped__.__qualname__


def _spec_of(function: Any) -> Spec:
    # No annotation of the class above declares it: that would stand in the `__annotations__` of each wrapped function.
    spec: Spec = function._self_spec
    return spec


def _track_function(spec: Spec, function: Any) -> Any:
    if isinstance(function, TrackedFunction) and _spec_of(function).same_run(spec):
        function = function.__wrapped__  # decorated twice: one run, with the outer options
    # Through staticmethod and classmethod, not through `__wrapped__`: a decorator may have made an async function sync.
    unbound = plain = getattr(function, "__func__", function)
    while isinstance(plain, functools.partial):
        plain = plain.func
    name = getattr(plain, "__name__", None) or type(plain).__name__
    owner = getattr(plain, "__qualname__", name).rpartition(".")[0].rpartition(".")[2]
    service = owner if owner and owner != "<locals>" else getattr(plain, "__module__", None)
    site = _Site(spec, "function" if name == "<lambda>" else name, service, capture.Binder(unbound))
    tracked: Any = TrackedFunction(function, _wrapper_for(site, plain))
    tracked._self_spec = spec
    return tracked


def _wrapper_for(site: _Site, plain: Any) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(plain):
        return functools.partial(_async_generator_function, site)
    if inspect.isgeneratorfunction(plain):
        return functools.partial(_generator_function, site)
    if inspect.iscoroutinefunction(plain):
        return functools.partial(_coroutine_function, site)
    return functools.partial(_function, site)


def _function(site: _Site, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _begin(site, instance, args, kwargs)
    if call is None:
        return wrapped(*args, **kwargs)
    try:
        result = wrapped(*args, **kwargs)
    except BaseException as exception:
        call.end(exception)
        raise
    call.end(None, result)
    return result


async def _coroutine_function(
    site: _Site, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    call = _begin(site, instance, args, kwargs)
    if call is None:
        return await wrapped(*args, **kwargs)
    try:
        result = await wrapped(*args, **kwargs)
    except BaseException as exception:
        call.end(exception)
        raise
    call.end(None, result)
    return result


def _generator_function(site: _Site, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    inner = wrapped(*args, **kwargs)  # at once, so that a bad call fails where it is made
    return _named_as(inner, _drive(site, inner, instance, args, kwargs)) if config.current().enabled else inner


def _async_generator_function(
    site: _Site, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    inner = wrapped(*args, **kwargs)
    return _named_as(inner, _adrive(site, inner, instance, args, kwargs)) if config.current().enabled else inner


def _named_as(inner: Any, outer: Any) -> Any:
    outer.__name__, outer.__qualname__ = inner.__name__, inner.__qualname__
    return outer


class _Items:
    """What a generator yielded: the result of its run."""

    def __init__(self) -> None:
        self._items: list[Any] = []

    def add(self, item: Any) -> None:
        if len(self._items) < _MOST_ITEMS:
            self._items.append(item)
        elif len(self._items) == _MOST_ITEMS:
            self._items.append(f"[cut by skilltrace: only the first {_MOST_ITEMS:,} items are kept]")

    def result(self) -> Any:
        items = self._items
        if not items:
            return None
        return "".join(items) if all(isinstance(item, str) for item in items) else items


def _drive(
    site: _Site, inner: Generator[Any, Any, Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Generator[Any, Any, Any]:
    """Step a generator inside its run. The run is current only during a step: between them the consumer goes on."""
    call = _open(site, owner, args, kwargs)
    if call is None:
        return (yield from inner)
    items = _Items()
    step: Callable[[], Any] = functools.partial(inner.send, None)
    while True:
        call.enter()
        try:
            item = step()
        except StopIteration as stop:
            call.end(None, items.result())
            return stop.value
        except BaseException as exception:
            call.end(exception, items.result())
            raise
        call.leave()
        items.add(item)
        try:
            step = functools.partial(inner.send, (yield item))
        except GeneratorExit as exit_:
            call.enter()
            try:
                inner.close()
            except BaseException as exception:
                call.end(exception, items.result())
                raise
            call.end(exit_, items.result())
            raise
        except BaseException as exception:
            step = functools.partial(inner.throw, exception)
        finally:
            item = None  # the consumer may be done with it long before the next step


async def _adrive(
    site: _Site, inner: AsyncGenerator[Any, Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsyncGenerator[Any, Any]:
    """As `_drive`, for an async generator."""
    call = _open(site, owner, args, kwargs)
    items = _Items()
    step: Callable[[], Any] = functools.partial(inner.asend, None)
    while True:
        if call is not None:
            call.enter()
        try:
            item = await step()
        except StopAsyncIteration:
            if call is not None:
                call.end(None, items.result())
            return
        except BaseException as exception:
            if call is not None:
                call.end(exception, items.result())
            raise
        if call is not None:
            call.leave()
            items.add(item)
        try:
            step = functools.partial(inner.asend, (yield item))
        except GeneratorExit as exit_:
            if call is not None:
                call.enter()
            try:
                await inner.aclose()
            except BaseException as exception:
                if call is not None:
                    call.end(exception, items.result())
                raise
            if call is not None:
                call.end(exit_, items.result())
            raise
        except BaseException as exception:
            step = functools.partial(inner.athrow, exception)
        finally:
            item = None


# --- DSPy modules ----------------------------------------------------------------------------------------------------
#
# A tracked module, or class of modules, only carries a mark (its specs); nothing of it is replaced by a proxy. So it
# stays what it was for copying, pickling, saving, loading and optimizing. The hook on dspy.Module looks for the mark.

_Running = tuple[Any, tuple[Any, ...]] | None

# The innermost tracked module that is called in this context, and its methods that this call has come through. One that
# another delegates to (`__call__` to `forward`, an override to its base's) is the same call; the same again is another.
_running: contextvars.ContextVar[_Running] = contextvars.ContextVar("skilltrace_running", default=None)


def _track_class(spec: Spec, cls: Any) -> Any:
    for name in _ENTRY_POINTS:
        method = inspect.getattr_static(cls, name, None)
        if isinstance(method, TrackedFunction) and _spec_of(method).same_run(spec):
            setattr(cls, name, method.__wrapped__)  # decorated twice: one run
    setattr(cls, _MARK, (*(mark for mark in cls.__dict__.get(_MARK, ()) if not mark.same_run(spec)), spec))
    _hook_entry_points(cls)
    _hook_subclasses(cls)
    return cls


def _track_instance(spec: Spec, module: Any) -> Any:
    marks = (*(mark for mark in module.__dict__.get(_MARK, ()) if not mark.same_run(spec)), spec)
    module.__dict__[_MARK] = marks
    _hook_entry_points(type(module))
    return module


def _marks(module: Any) -> tuple[Spec, ...]:
    """The specs on a module and on its class, the outermost first; each run only once."""
    own: tuple[Spec, ...] = module.__dict__.get(_MARK, ())
    marks: tuple[Spec, ...] = getattr(type(module), _MARK, ())
    for spec in own:
        marks = (*(mark for mark in marks if not mark.same_run(spec)), spec)
    return marks[::-1]


def _is_marked(module: Any) -> bool:
    return _MARK in module.__dict__ or hasattr(type(module), _MARK)


def _hook_entry_points(cls: type) -> None:
    """Have the methods by which a module may be called look for a mark.

    `__call__` and `acall` are hooked on dspy.Module, for all. A class that defines an entry point of its own is hooked
    itself: with plain functions, for wrapt's stay in a module's `__dict__` when an optimizer patches its `forward`.
    """
    base = sys.modules["dspy"].Module
    for owner in cls.__mro__:
        for name in _ENTRY_POINTS if owner not in base.__mro__ else ():
            method = owner.__dict__.get(name)
            if inspect.isfunction(method) and not hasattr(method, "skilltrace"):
                setattr(owner, name, _hooked_method(method))


def _hooked_method(method: Any) -> Any:
    @functools.wraps(method)
    async def ahooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_marked(self):
            return await _acall_module(self, method, args, kwargs)
        return await method(self, *args, **kwargs)

    @functools.wraps(method)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call_module(self, method, args, kwargs) if _is_marked(self) else method(self, *args, **kwargs)

    chosen: Any = ahooked if inspect.iscoroutinefunction(method) else hooked
    chosen.skilltrace = True  # what says that it is hooked
    return chosen


def _hook_subclasses(cls: Any) -> None:
    """A subclass of a tracked class is tracked too, by the entry points that it overrides as well."""
    before = cls.__dict__.get("__init_subclass__")

    def __init_subclass__(subclass: type, /, **kwargs: Any) -> None:  # noqa: N807  # Python's own hook
        if before is not None:
            before.__get__(None, subclass)(**kwargs)
        else:
            super(cls, subclass).__init_subclass__(**kwargs)
        _hook_entry_points(subclass)

    cls.__init_subclass__ = classmethod(__init_subclass__)


def _begin_module_calls(
    module: Any, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[_Call], _Running]:
    """Open the runs of a module's call: none where another of its entry points has done so and delegates to this."""
    before = _running.get()
    if before is not None and before[0] is module and method not in before[1]:
        _running.set((module, (*before[1], method)))
        return [], before
    _running.set((module, (method,)))
    opened = [_begin(_module_site(spec, type(module)), module, args, kwargs) for spec in _marks(module)]
    return [call for call in opened if call is not None], before


_binders: weakref.WeakKeyDictionary[type, capture.Binder] = weakref.WeakKeyDictionary()


def _module_site(spec: Spec, cls: type) -> _Site:
    binder = _binders.get(cls)
    if binder is None:
        methods = (inspect.getattr_static(cls, name, None) for name in ("forward", "aforward"))
        binder = _binders[cls] = capture.Binder(next((method for method in methods if method is not None), None))
    return _Site(spec, cls.__name__, cls.__name__, binder, is_module=True)


def _end_module_calls(calls: list[_Call], exception: BaseException | None, result: Any = None) -> None:
    for call in reversed(calls):
        call.end(exception, result)


def _call_module(module: Any, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    calls, before = _begin_module_calls(module, method, args, kwargs)
    try:
        result = method(module, *args, **kwargs)
    except BaseException as exception:
        _end_module_calls(calls, exception)
        raise
    finally:
        _running.set(before)
    _end_module_calls(calls, None, dspy_bridge.prediction_of(module, result))
    return result


async def _acall_module(module: Any, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    calls, before = _begin_module_calls(module, method, args, kwargs)
    try:
        result = await method(module, *args, **kwargs)
    except BaseException as exception:
        _end_module_calls(calls, exception)
        raise
    finally:
        _running.set(before)
    _end_module_calls(calls, None, dspy_bridge.prediction_of(module, result))
    return result


# At DSPy's import, not at the first decoration: a program may come from `dspy.load` with its mark.
dspy_bridge.on_import(lambda: dspy_bridge.hook_modules(_is_marked, _call_module, _acall_module))


# --- the public names ------------------------------------------------------------------------------------------------


class Tracked:
    """What `tracked_job(…)` and `tracked_phase(…)` give: a decorator that is a context manager too."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        name = spec.name.text if spec.name is not None and spec.name.fixed else ""
        self._site = _Site(spec, name, None, capture.Binder(None))
        self._open: dict[str, _Call] = {}

    def __call__(self, decorated: F) -> F:
        """Decorate a function, a method, a class of DSPy modules, or one module."""
        tracked: F = _track(self._spec, decorated)
        return tracked

    def __enter__(self) -> Run:
        call = _begin(self._site, None, (), {})
        if call is None:
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
        elif self._open:
            self._open.popitem()[1].end(exception)  # entered in a context that is gone, as a generator's may be


def _track(spec: Spec, decorated: Any) -> Any:
    if dspy_bridge.is_module(decorated):
        return (_track_class if isinstance(decorated, type) else _track_instance)(spec, decorated)
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
    return _track_function(spec, decorated)


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
