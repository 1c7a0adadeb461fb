"""Pickling of what is decorated: by its name where it has one, else by value.

A decorated function says that it is a function, and cloudpickle believes it: a function that it takes by value (of
`__main__`, a local one, a lambda) it would make anew from its code alone. So cloudpickle's picklers are hooked.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import wrapt

from skilltrace.faults import warn_once

# Each of them exports its pickler; the copies in other packages are classes of their own.
_CLOUDPICKLES = ("cloudpickle", "joblib.externals.cloudpickle", "pyspark.cloudpickle", "ray.cloudpickle")

_by_value: dict[type, Callable[[Any], tuple[Any, ...]]] = {}


def pickle_by_value(kind: type, reduce: Callable[[Any], tuple[Any, ...]]) -> None:
    """Have cloudpickle make objects of a type from what `reduce` gives, where it cannot or shall not take a name."""
    _by_value[kind] = reduce


def by_name(function: Any) -> str | tuple[Any, ...] | None:
    """What a function that is found by its name is reduced to; None where it is not (a local one, or one renamed)."""
    owner = _owner(function)
    if owner is None:
        return None
    name: str = function.__qualname__
    # A method is no attribute that pickle finds: each access binds it anew.
    return (_attribute, (function.__module__, name)) if isinstance(owner, type) else name


def in_class(owner: Any, name: str) -> Any:
    """An attribute of an object, a class or a module as it stands there: not bound, not a static or class method."""
    found = inspect.getattr_static(owner, name, None)
    return found.__func__ if type(found) in (staticmethod, classmethod) else found


def _owner(function: Any) -> Any:
    """The module or class where a function stands under its name, or None."""
    try:
        owner, name = _place(function.__module__, function.__qualname__)
        return owner if in_class(owner, name) is function else None
    except Exception:
        return None  # no name, or none that leads anywhere: as for a local function


def _place(module: str, qualname: str) -> tuple[Any, str]:
    path, _, name = qualname.rpartition(".")
    owner = importlib.import_module(module)
    return functools.reduce(getattr, path.split(".") if path else (), owner), name


def _attribute(module: str, qualname: str) -> Any:
    return in_class(*_place(module, qualname))


def _hook(cloudpickle: Any) -> None:
    try:
        pickler = cloudpickle.CloudPickler
        original = pickler.reducer_override
    except AttributeError:
        warn_once(
            ("cloudpickle", cloudpickle.__name__),
            "%s %s has no CloudPickler.reducer_override: decorated functions that it pickles by value (those of "
            "__main__, local ones, lambdas) are not tracked where they are loaded. Put them into a module.",
            cloudpickle.__name__,
            getattr(cloudpickle, "__version__", "of an unknown version"),
        )
        return

    @functools.wraps(original)
    def reducer_override(self: Any, obj: Any) -> Any:
        reduce = _by_value.get(type(obj))
        if reduce is None:
            return original(self, obj)
        # By value, too, where its module was registered for that: cloudpickle knows, and says so of its class.
        owner = _owner(obj)
        by_reference = owner is not None and original(self, owner if isinstance(owner, type) else obj) is NotImplemented
        return NotImplemented if by_reference else reduce(obj)

    pickler.reducer_override = reducer_override


for _name in _CLOUDPICKLES:
    wrapt.register_post_import_hook(_hook, _name)
