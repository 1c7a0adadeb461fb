"""Taking the current run to where Python does not take it by itself."""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, TypeVar

from skilltrace.errors import ConfigurationError

P = ParamSpec("P")
R = TypeVar("R")


def propagate(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs in the context in which `propagate` was called, in whichever thread it is called.

    `await`, tasks, `asyncio.to_thread` and DSPy's threads carry the current run by themselves; a bare
    `threading.Thread`, a `ThreadPoolExecutor` and `loop.run_in_executor` start with no context at all. What is carried
    is the whole of it: the current run, `dspy.context` and the context variables of others.

    Args:
        function: A function or a coroutine function. It may be called any number of times, also at once.

    Returns:
        A function with its signature.

    Raises:
        ConfigurationError: for a generator function, whose body runs where it is consumed: propagate its consumer.

    Example:
        >>> import threading
        >>> import skilltrace
        >>> with skilltrace.tracked_job("job"):
        ...     thread = threading.Thread(target=skilltrace.propagate(lambda: print(skilltrace.current_run().kind)))
        ...     thread.start()
        ...     thread.join()
        job
    """
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function) or not callable(function):
        raise ConfigurationError(
            f"propagate takes a function or a coroutine function, not {function!r:.100}; for a generator, propagate "
            "the function that consumes it"
        )
    context = contextvars.copy_context()

    @functools.wraps(function)
    async def acarried(*args: Any, **kwargs: Any) -> Any:
        with _entered(context):
            awaitable: Any = function(*args, **kwargs)
            return await awaitable

    @functools.wraps(function)
    def carried(*args: Any, **kwargs: Any) -> Any:
        return context.copy().run(function, *args, **kwargs)

    chosen: Any = acarried if inspect.iscoroutinefunction(function) else carried
    return chosen  # type: ignore[no-any-return]


@contextmanager
def _entered(context: contextvars.Context) -> Iterator[None]:
    """Set the variables of a context here: a coroutine runs in its task's, and cannot be run in another."""
    tokens = [(variable, variable.set(value)) for variable, value in context.items()]
    try:
        yield
    finally:
        for variable, token in reversed(tokens):
            with suppress(ValueError):  # closed from elsewhere, by the garbage collector
                variable.reset(token)
