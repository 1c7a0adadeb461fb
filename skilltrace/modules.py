"""Decorated DSPy modules and classes of them.

A tracked module, or class of modules, only carries a mark (its specs); nothing of it is replaced by a proxy. So it
stays what it was for copying, pickling, saving, loading and optimizing. The hook on dspy.Module looks for the mark.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import sys
import weakref
from typing import Any

from skilltrace import capture, dspy_bridge
from skilltrace.call import Call, Site, Spec, begin_call
from skilltrace.functions import TrackedFunction, spec_of

_MARK = "__skilltrace__"
_ENTRY_POINTS = ("__call__", "acall", "forward", "aforward")

_Running = tuple[Any, tuple[Any, ...]] | None

# The innermost tracked module that is called in this context, and its methods that this call has come through. One that
# another delegates to (`__call__` to `forward`, an override to its base's) is the same call; the same again is another.
_running: contextvars.ContextVar[_Running] = contextvars.ContextVar("skilltrace_running", default=None)


def track_class(spec: Spec, cls: Any) -> Any:
    """Mark a class of modules: the calls of all of its instances are tracked, and those of its subclasses."""
    for name in _ENTRY_POINTS:
        method = inspect.getattr_static(cls, name, None)
        if isinstance(method, TrackedFunction) and spec_of(method).same_run(spec):
            setattr(cls, name, method.__wrapped__)  # decorated twice: one run
    setattr(cls, _MARK, (*(mark for mark in cls.__dict__.get(_MARK, ()) if not mark.same_run(spec)), spec))
    _hook_entry_points(cls)
    _hook_subclasses(cls)
    return cls


def track_instance(spec: Spec, module: Any) -> Any:
    """Mark one module."""
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
) -> tuple[list[Call], _Running]:
    """Open the runs of a module's call: none where another of its entry points has done so and delegates to this."""
    before = _running.get()
    if before is not None and before[0] is module and method not in before[1]:
        _running.set((module, (*before[1], method)))
        return [], before
    _running.set((module, (method,)))
    opened = [begin_call(_module_site(spec, type(module)), module, args, kwargs) for spec in _marks(module)]
    return [call for call in opened if call is not None], before


_binders: weakref.WeakKeyDictionary[type, capture.Binder] = weakref.WeakKeyDictionary()


def _module_site(spec: Spec, cls: type) -> Site:
    binder = _binders.get(cls)
    if binder is None:
        methods = (inspect.getattr_static(cls, name, None) for name in ("forward", "aforward"))
        binder = _binders[cls] = capture.Binder(next((method for method in methods if method is not None), None))
    return Site(spec, cls.__name__, cls.__name__, binder, is_module=True)


def _end_module_calls(calls: list[Call], exception: BaseException | None, result: Any = None) -> None:
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
