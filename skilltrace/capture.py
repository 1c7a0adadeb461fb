"""From a call to what is recorded of it: arguments to tags and params, the result to metrics."""

from __future__ import annotations

import decimal
import enum
import inspect
import math
import numbers
import re
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
_BAD_KEY = re.compile(r"[^\w\-. :/]")

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
    """`job_id`, `user_id` and `skill_type`, from the arguments and their fields."""
    tags: dict[str, str] = {}
    for name in IDENTITY:
        value = arguments.get(name)
        if value is None:
            for key, argument in arguments.items():
                if key != first and (value := _field(argument, name)) is not None:
                    break
        if value is not None and (text := _scalar_text(value)) is not None:
            tags[name] = text
    return tags


def _field(argument: Any, name: str) -> Any:
    if argument is None or isinstance(argument, (str, bytes, int, float, list, tuple, type)):
        return getattr(argument, name, None) if hasattr(type(argument), "_fields") else None
    if isinstance(argument, Mapping):
        return argument.get(name)
    # Not getattr: an argument may be a client or a mock that answers to any name, or computes on being asked.
    fields = getattr(argument, "__dict__", None)
    if isinstance(fields, dict) and name in fields:
        return fields[name]
    slots = getattr(type(argument), name, None)
    if inspect.ismemberdescriptor(slots):
        return getattr(argument, name, None)
    return _field(fields["_store"], name) if isinstance(fields, dict) and "_store" in fields else None  # dspy.Example


def params(
    arguments: Mapping[str, Any], first: str | None, option: bool | Iterable[str], redactor: Redactor
) -> dict[str, str]:
    """Scalar arguments, by name; structures and long strings are left out, and so are secrets."""
    if option is False:
        return {}
    wanted = None if option is True else frozenset(option)
    found_params: dict[str, str] = {}
    for name, value in arguments.items():
        if name == first or (wanted is not None and name not in wanted) or redactor.secret(name):
            continue
        text = _scalar_text(redactor.value(name, value))
        if text is not None and len(text) <= LONGEST_PARAM:
            found_params[clean_key(name)] = redactor.text(text)
    return found_params


def metrics(result: Any, option: MetricsOption) -> dict[str, float]:
    """Numbers of the result: its top-level fields, or those that the option names or computes."""
    if option is False or result is None:
        return {}
    if option is True:
        try:
            fields: Mapping[Any, Any] = artifact.fields_of(result) or {}
        except Exception:
            return {}  # the artifacts' side has said so
        return {
            clean_key(name): number
            for name, value in fields.items()
            if isinstance(name, str) and (number := as_number(value)) is not None
        }
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
        elif (number := as_number(value)) is None:
            warn_once(("metric", name), "The metric %r is not recorded: %s is no number.", name, type(value).__name__)
        else:
            picked[clean_key(name)] = number
    return picked


def as_number(value: Any) -> float | None:
    """The value as a float (booleans as 0 and 1), or None where it is no real number."""
    kind = type(value)
    if kind is float:
        return float(value)
    if isinstance(value, (int, numbers.Real, decimal.Decimal)) or (
        kind.__module__ == "numpy" and kind.__name__ == "bool"  # numpy.bool is no numbers.Real
    ):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
        except (TypeError, ValueError):
            return None
    return None


def _scalar_text(value: Any) -> str | None:
    kind = type(value)
    if kind is str:
        return str(value)
    if value is None or kind is bool or kind is int or kind is float:
        return str(value)
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, (str, numbers.Number, decimal.Decimal)) or kind.__name__ in ("UUID", "date", "datetime"):
        try:
            return str(value)
        except Exception:
            return None
    return None


def clean_key(key: str) -> str:
    """A key of a tag, param or metric as MLflow takes it; what it would refuse is replaced, with one warning."""
    cleaned = _BAD_KEY.sub("_", key[:_LONGEST_KEY])
    if "/" in cleaned or "." in cleaned:
        # MLflow takes keys for paths: no empty, leading or parent parts.
        cleaned = "/".join(part for part in cleaned.split("/") if part.strip(".")) or "_"
    cleaned = cleaned or "_"
    if cleaned != key:
        warn_once(("key", key), "The key %.60r is recorded as %.60r: MLflow would refuse it.", key, cleaned)
    return cleaned


def clean_tags(tags: Mapping[str, Any], redactor: Redactor) -> dict[str, str]:
    """Tags as MLflow takes them; see `clean_tag`."""
    return dict(clean_tag(key, value, redactor) for key, value in tags.items())


def clean_tag(key: str, value: Any, redactor: Redactor) -> tuple[str, str]:
    """A tag as MLflow takes it, without secrets; a value over its limit is cut, with one warning."""
    text = value if isinstance(value, str) else text_of(value)
    text = redactor.text(str(redactor.value(key, text)))
    if len(text) > _LONGEST_TAG:
        warn_once(("tag", key), "The tag %.60r is cut to %d characters: MLflow holds no more.", key, _LONGEST_TAG)
        text = text[: _LONGEST_TAG - 1] + "…"
    return clean_key(key), text


def text_of(value: Any) -> str:
    """The value's `str`, whatever that raises."""
    try:
        return str(value)
    except Exception as exception:
        return f"<{type(value).__qualname__} whose str raised {type(exception).__name__}>"
