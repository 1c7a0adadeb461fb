"""Decorated functions and methods, generators too: what they were, but for their calls."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

import wrapt

from skilltrace import capture, config, pickling
from skilltrace.call import Site, Spec, begin_call, open_call

_MOST_ITEMS = 10_000  # yielded items that are kept for the result


class _BoundFunction(wrapt.BoundFunctionWrapper):  # type: ignore[type-arg]  # generic only in wrapt's stubs
    """A decorated method, bound. Optimizers keep one in a module while they patch it, and then copy the module."""

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        function, instance, owner = _binding(self)
        return _bound(function, copy.deepcopy(instance, memo), owner)

    def __reduce_ex__(self, protocol: Any) -> Any:
        method = self.__wrapped__
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if owner is not None and pickling.in_class(owner, name) is self._self_parent:
            return getattr, (owner, name)  # as Python's own methods
        return _reduced_method(self)


class TrackedFunction(wrapt.FunctionWrapper):  # type: ignore[type-arg]  # generic only in wrapt's stubs
    """A decorated function: in all respects that function, but for its calls.

    wrapt's own wrapper can be neither copied nor pickled; this one is found again by its name, as functions are, or
    made again around what it wraps.
    """

    __bound_function_wrapper__ = _BoundFunction

    def __copy__(self) -> Any:
        return _around(self, copy.copy(self.__wrapped__))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _around(self, copy.deepcopy(self.__wrapped__, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return pickling.by_name(self) or _reduced(self)


def _around(tracked: Any, copied: Any) -> Any:
    # Functions are their own copies; an object that is called is not.
    return tracked if copied is tracked.__wrapped__ else _tracked(copied, spec_of(tracked))


def _binding(bound: Any) -> tuple[Any, Any, Any]:
    # A static method is the same by whichever instance it was reached, which may be one that cannot be copied.
    instance = None if bound._self_binding == "staticmethod" else bound._self_instance
    return bound._self_parent, instance, bound._self_owner


def _bound(function: Any, instance: Any, owner: Any) -> Any:
    return function.__get__(instance, owner)


def _tracked(function: Any, spec: Spec) -> Any:
    # The function is read at the first call: inside the pickle of one that calls itself it is not complete yet.
    known = functools.cache(functools.partial(_wrapper, spec, function))

    def wrapper(*call: Any) -> Any:
        return known()(*call)

    return _with_spec(TrackedFunction(function, wrapper), spec)


def _with_spec(tracked: Any, spec: Spec) -> Any:
    tracked._self_spec = spec
    return tracked


def _reduced(tracked: Any) -> tuple[Any, ...]:
    return _tracked, (tracked.__wrapped__, spec_of(tracked))


def _reduced_method(bound: Any) -> tuple[Any, ...]:
    return _bound, _binding(bound)


pickling.pickle_by_value(TrackedFunction, _reduced)
pickling.pickle_by_value(_BoundFunction, _reduced_method)


def spec_of(function: Any) -> Spec:
    """The options that a function was decorated with."""
    # No annotation of the class above declares it: that would stand in the `__annotations__` of each wrapped function.
    spec: Spec = function._self_spec
    return spec


def track_function(spec: Spec, function: Any) -> Any:
    """A function, or anything else that is called, with a run around each call."""
    if isinstance(function, TrackedFunction) and spec_of(function).same_run(spec):
        function = function.__wrapped__  # decorated twice: one run, with the outer options
    return _with_spec(TrackedFunction(function, _wrapper(spec, function)), spec)


def _wrapper(spec: Spec, function: Any) -> Callable[..., Any]:
    # Through staticmethod and classmethod, not through `__wrapped__`: a decorator may have made an async function sync.
    unbound = plain = getattr(function, "__func__", function)
    while isinstance(plain, functools.partial):
        plain = plain.func
    name = getattr(plain, "__name__", None) or type(plain).__name__
    owner = getattr(plain, "__qualname__", name).rpartition(".")[0].rpartition(".")[2]
    service = owner if owner and owner != "<locals>" else getattr(plain, "__module__", None)
    site = Site(spec, "function" if name == "<lambda>" else name, service, capture.Binder(unbound))
    return _wrapper_for(site, plain)


def _wrapper_for(site: Site, plain: Any) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(plain):
        return functools.partial(_async_generator_function, site)
    if inspect.isgeneratorfunction(plain):
        return functools.partial(_generator_function, site)
    if inspect.iscoroutinefunction(plain):
        return functools.partial(_coroutine_function, site)
    return functools.partial(_function, site)


def _function(site: Site, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = begin_call(site, instance, args, kwargs)
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
    site: Site, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    call = begin_call(site, instance, args, kwargs)
    if call is None:
        return await wrapped(*args, **kwargs)
    try:
        result = await wrapped(*args, **kwargs)
    except BaseException as exception:
        call.end(exception)
        raise
    call.end(None, result)
    return result


def _generator_function(site: Site, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    inner = wrapped(*args, **kwargs)  # at once, so that a bad call fails where it is made
    return _named_as(inner, _drive(site, inner, instance, args, kwargs)) if config.current().enabled else inner


def _async_generator_function(
    site: Site, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
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
    site: Site, inner: Generator[Any, Any, Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Generator[Any, Any, Any]:
    """Step a generator inside its run. The run is current only during a step: between them the consumer goes on."""
    call = open_call(site, owner, args, kwargs)
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
    site: Site, inner: AsyncGenerator[Any, Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsyncGenerator[Any, Any]:
    """As `_drive`, for an async generator."""
    call = open_call(site, owner, args, kwargs)
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
