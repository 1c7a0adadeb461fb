"""From a call to what is recorded of it: arguments to tags and params, the result to metrics."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import functools
import inspect
import math
import numbers
import pathlib
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from skilltrace import artifact
from skilltrace.faults import warn_once
from skilltrace.redaction import Redactor
from skilltrace.template import follow, found, parse_path

IDENTITY = ("job_id", "user_id", "skill_type")
"""Arguments, or fields of arguments, of these names become tags by themselves."""

LONGEST_PARAM = 500
"""Characters of an argument that is still a param by itself."""

LONGEST_LOGGED_PARAM = 6000
"""Characters of a param that was logged by name; MLflow cuts there."""

# MLflow's limits: https://mlflow.org/docs/latest/api_reference/rest-api.html (entity keys 250, tag values 8000
# characters). It cuts longer values without a word, and some stores refuse them.
_LONGEST_KEY = 250
_LONGEST_TAG = 8000
_MOST_METRICS = 1000
_OPEN = Redactor()
_BAD_KEY = re.compile(r"[^\w\-. :/]")
_OWN_TAGS = frozenset({"skilltrace.key", "skilltrace.kind"})  # delivery finds a run by them

# Arguments that are params: their text is short, says all, and runs none of the user's code.
_SCALARS = (enum.Enum, str, pathlib.PurePath, uuid.UUID, dt.date, dt.time, dt.timedelta, numbers.Number)
_NO_SCALARS = frozenset({dict, list, tuple, set, bytes, type(None)})
_NO_FIELDS = frozenset({str, int, float, bool, list, set, bytes, type(None)})

MetricsOption = bool | Iterable[str] | Mapping[str, "str | Callable[[Any], Any]"]


class Binder:
    """Knows a function's parameters and turns a call's arguments into a dict by name, defaults included.

    `inspect.Signature.bind` does the same in ten times the time, and raises on a bad call; here the call itself does.
    """

    def __init__(self, function: Any) -> None:
        self._positional: list[str] = []
        self._defaults: dict[str, Any] = {}
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            parameters = []  # a built-in without a signature
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                self._positional.append(parameter.name)
            if parameter.default is not parameter.empty:
                self._defaults[parameter.name] = parameter.default

    def bind(self, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """The arguments by name, and the name of the one that is the method's owner (`self`, `cls`), if any."""
        bound = {**self._defaults}
        names, first = self._positional, None
        if owner is not None and names:
            first, names = names[0], names[1:]
            bound[first] = owner
        bound.update(zip(names, args, strict=False))
        bound.update(kwargs)
        return bound, first


def identity_tags(arguments: Mapping[str, Any], first: str | None) -> dict[str, str]:
    """`job_id`, `user_id` and `skill_type`, from the arguments and their fields.

    Args:
        arguments: The arguments by name.
        first: The one that is the method's owner, which is not looked into.
    """
    tags = {name: text for name in IDENTITY if name in arguments and (text := _scalar_text(arguments[name]))}
    if len(tags) == len(IDENTITY):
        return tags
    for key, argument in arguments.items():
        if type(argument) not in _NO_FIELDS and key != first:
            for name in IDENTITY:
                if name not in tags and (text := _scalar_text(_field(argument, name))):
                    tags[name] = text
    return tags


def _field(argument: Any, name: str) -> Any:
    """A field of an argument; None where it has none.

    Not by getattr: an argument may be a client or a mock that answers to any name, or computes on being asked.
    """
    kind = type(argument)
    try:
        if kind is dict:
            return argument.get(name)
        if issubclass(kind, (tuple, type)):
            return getattr(argument, name) if name in getattr(kind, "_fields", ()) else None
        try:
            fields = object.__getattribute__(argument, "__dict__")
        except AttributeError:
            fields = {}  # a class with __slots__
        if name in fields:
            return fields[name]
        if inspect.ismemberdescriptor(getattr(kind, name, None)):
            return getattr(argument, name)
        if type(store := fields.get("_store")) is dict:  # dspy.Example
            return store.get(name)
        return argument.get(name) if issubclass(kind, Mapping) else None
    except Exception:
        return None  # the argument's own code raised: it tells nobody who the call is for


def params(
    arguments: Mapping[str, Any], first: str | None, option: bool | Iterable[str], redactor: Redactor
) -> dict[str, str]:
    """Scalar arguments, by name; structures and long strings are left out, and so are secrets."""
    if option is False:
        return {}
    wanted = None if option is True else frozenset(option)
    texts: dict[str, str] = {}
    for name, argument in arguments.items():
        if name == first or (wanted is not None and name not in wanted) or redactor.secret(name):
            continue
        value = redactor.value(name, argument)
        text = "None" if value is None else _scalar_text(value)
        if text is not None and len(text) <= LONGEST_PARAM:
            texts[clean_key(name)] = text
    return redactor.texts(texts)


def metrics(result: Any, option: MetricsOption, redactor: Redactor = _OPEN) -> dict[str, float]:
    """Numbers of the result: its top-level fields, or those that the option names or computes.

    Args:
        result: What the call returned.
        option: The decorator's `metrics=`.
        redactor: What keeps secrets out: a number under a secret name is no metric.
    """
    if option is False or result is None:
        return {}
    if option is True:
        return _number_fields(result, redactor)
    picks = option if isinstance(option, Mapping) else {name: name for name in option}
    picked: dict[str, float] = {}
    for name, pick in picks.items():
        try:
            value = pick(result) if callable(pick) else follow(result, parse_path(pick, "metrics"))
        except Exception as exception:
            warn_once(
                ("metric", name, type(exception)), "The metric %r is not recorded: %r was raised.", name, exception
            )
            continue
        if not found(value):
            warn_once(("metric", name), "The metric %r is not recorded: the result has no %r.", name, pick)
        elif (number := as_number(redactor.value(name, value))) is not None:
            picked[clean_key(name)] = number
        elif not redactor.secret(name):
            warn_once(("metric", name), "The metric %r is not recorded: %s is no number.", name, type(value).__name__)
    return picked


def _number_fields(result: Any, redactor: Redactor) -> dict[str, float]:
    numbers_: dict[str, float] = {}
    try:
        for name, value in artifact.fields_of(result, redactor) or ():
            if as_number(value) is None or not isinstance(name, str):
                continue
            number = as_number(redactor.value(name, value))
            if number is None:
                continue
            if len(numbers_) == _MOST_METRICS:
                warn_once("metrics", "A result has over %d numbers; the first of them are metrics.", _MOST_METRICS)
                break
            numbers_[clean_key(redactor.names[name][1])] = number
    except Exception:
        return numbers_  # of a result that cannot be read the artifacts' side speaks
    return numbers_


def as_number(value: Any) -> float | None:
    """The value as a float (booleans as 0 and 1), or None where it is no real number."""
    kind = type(value)
    if kind is float:
        return float(value)
    if kind is str or kind is dict or kind is list or value is None:
        return None
    try:
        return float(value) if kind is int or kind is bool or _is_number(kind) else None
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except Exception:
        return None  # a number whose own __float__ raises, or a signalling NaN


def _is_number(kind: type) -> bool:
    # By the type, not by isinstance: a mock may claim to be anything.
    return issubclass(kind, (numbers.Real, decimal.Decimal)) or _is_numpy_bool(kind)


def _is_numpy_bool(kind: type) -> bool:
    return kind.__name__ in {"bool", "bool_"} and kind.__module__ == "numpy"  # it is none of `numbers`


def _scalar_text(value: Any) -> str | None:
    """A scalar argument's text; None for anything else."""
    kind = type(value)
    if kind is str:
        return str(value)
    if kind in _NO_SCALARS:
        return None
    try:
        if kind is int or kind is float or kind is bool:
            return str(value)
        if not (issubclass(kind, _SCALARS) or _is_numpy_bool(kind)):
            return None
        return exact(str(value.value if issubclass(kind, enum.Enum) else value))
    except Exception:
        return None  # its own __str__ raised, or an integer of thousands of digits


def exact(text: str) -> str:
    """The same text as `str` itself: a journal takes no subclass."""
    return text if type(text) is str else str.__str__(text)


def clean_key(key: str) -> str:
    """A key of a tag, param or metric as MLflow takes it; what it would refuse is replaced, with one warning."""
    cleaned = _cleaned_key(key if type(key) is str else text_of(key))
    if cleaned != key:
        warn_once(("key", key), "The key %.60r is recorded as %.60r: MLflow would refuse it.", key, cleaned)
    return cleaned


@functools.lru_cache(maxsize=4096)
def _cleaned_key(key: str) -> str:
    key = _BAD_KEY.sub("_", key[:_LONGEST_KEY])
    # MLflow takes keys for paths, which must be relative and in their shortest form.
    key = "/".join(part for part in key.split("/") if part.strip("."))
    return (f"_{key[2:]}" if key.startswith("..") else key) or "_"


def clean_tags(tags: Mapping[str, Any], redactor: Redactor) -> dict[str, str]:
    """Tags as MLflow takes them, without secrets; a value over its limit is cut, with one warning."""
    texts: dict[str, str] = {}
    for name, value in tags.items():
        key = name if type(name) is str else text_of(name)
        if key in _OWN_TAGS:
            warn_once(("tag", key), "The tag %r is skilltrace's own and cannot be set.", key)
        else:
            texts[clean_key(key)] = _tag_text(key, value, redactor)
    return redactor.texts(texts)


def clean_tag(key: str, value: Any, redactor: Redactor) -> tuple[str, str]:
    """A tag as MLflow takes it; see `clean_tags`."""
    return clean_key(key), redactor.text(_tag_text(key, value, redactor))


def _tag_text(key: str, value: Any, redactor: Redactor) -> str:
    text = text_under(key, value, redactor)
    if len(text) <= _LONGEST_TAG:
        return text
    warn_once(("tag", key), "The tag %.60r is cut to %d characters: MLflow holds no more.", key, _LONGEST_TAG)
    # Masked before it is cut: a credential that the cut goes through would no longer look like one.
    return redactor.text(text)[: _LONGEST_TAG - 1] + "…"


def text_under(name: str, value: Any, redactor: Redactor) -> str:
    """A value's text, to be recorded under a name in a tag or param; for `Redactor.text` to look through."""
    value = redactor.value(name, value)
    if type(value) is str:
        text = value
    elif _scalar_text(value) is not None:
        text = text_of(value)
    else:
        text = redactor.printed(text_of(value))  # a structure may hold secrets under names of its own
    # PostgreSQL takes no NUL.
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}") if "\0" in text else text


def text_of(value: Any) -> str:
    """The value's `str`, whatever that raises."""
    try:
        return exact(str(value))
    except Exception as exception:
        return f"<{type(value).__qualname__} whose str raised {type(exception).__name__}>"
