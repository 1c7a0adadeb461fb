"""Names and tags with fields in them: `"skill_creation_{job_id}"`, `"{request.skill_type}"`, `"{self.region}"`.

The fields look like those of `str.format`, but only read: attributes and items, never a call, never a name that begins
with an underscore. So a template cannot be made to run code or to reach into an object's internals.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from skilltrace.errors import ConfigurationError
from skilltrace.faults import warn_once
from skilltrace.redaction import MASK, Redactor

UNKNOWN = "unknown"
_ITEM = r"\[[^\[\]{}]+\]"
_FIELD = re.compile(rf"\s*([^\W\d_]\w*)((?:\.[^\W\d_]\w*|{_ITEM})*)\s*")
# In a result a field may have any name: `"rouge-L"`, `"report.pass@1"`, `"[0].score"`.
_NAME = r"[^_\s.\[\]{}][^.\[\]{}]*"
_PATH = re.compile(rf"\s*({_NAME}|{_ITEM})((?:\.{_NAME}|{_ITEM})*)\s*")
_STEP = re.compile(r"\.([^.\[\]]+)|\[([^\[\]]+)\]")
_MISSING: Any = object()
_OPEN = Redactor()
_PLAIN = (str, int, float, bool, type(None))


class Template:
    """A text with fields.

    Args:
        text: The template.
        option: The name of the option that it was given as, for error messages.

    Raises:
        ConfigurationError: where the text is no template, or has a field that is more than attributes and items.

    Example:
        >>> Template("skill_{job_id}").render({"job_id": "job_1"})
        'skill_job_1'
    """

    def __init__(self, text: str, option: str = "name") -> None:
        self.text = text
        # Each part is a literal and the field behind it.
        self._parts: list[tuple[str, _Field | None]] = []
        try:
            for literal, field, spec, conversion in Formatter().parse(text):
                self._parts.append((literal, None if field is None else _Field(text, field, spec, conversion)))
        except ValueError as error:
            raise ConfigurationError(
                f"{option}={text!r} is not a template: {error}. Fields are arguments with attributes and items, like "
                "{job_id} or {request.skill_type}; write {{ and }} for braces."
            ) from None

    @property
    def fixed(self) -> bool:
        """Whether there are no fields, so that it always renders the same."""
        return not self.roots

    @property
    def roots(self) -> tuple[str, ...]:
        """The names of the arguments that the fields begin with."""
        return tuple(field.steps[0] for _, field in self._parts if field is not None)

    def render(self, values: Mapping[str, Any], redactor: Redactor = _OPEN) -> str:
        """The text with its fields filled in; a field that cannot be filled is `unknown`, and warns once.

        Args:
            values: The arguments by name.
            redactor: What keeps secrets out.
        """
        return "".join(
            [literal if field is None else literal + field.fill(values, redactor) for literal, field in self._parts]
        )


class _Field:
    """One field of a template."""

    __slots__ = ("conversion", "spec", "steps", "text")

    def __init__(self, text: str, field: str, spec: str | None, conversion: str | None) -> None:
        self.text = text
        self.steps = _steps(_FIELD, field)
        self.spec = spec or ""
        self.conversion = conversion or ""
        if "{" in self.spec:
            raise ValueError(f"the format {self.spec!r} has a field of its own")
        if self.conversion not in {"", "s", "r", "a"}:
            raise ValueError(f"!{self.conversion} is no conversion")

    def fill(self, values: Mapping[str, Any], redactor: Redactor) -> str:
        name = self.steps[-1]
        if any(map(redactor.secret, self.steps)):
            return MASK
        try:
            value = follow(values, self.steps)
            if value is _MISSING:
                reason = "the call has no such argument, attribute or item"
            else:
                value = redactor.value(name, value)
                if self.conversion:
                    value = Formatter().convert_field(value, self.conversion)
                text = value if type(value) is str and not self.spec else format(value, self.spec)
                # A structure in a name or tag is rare, and may hold secrets under names of its own.
                return text if type(value) in _PLAIN and not self.conversion else redactor.printed(text)
        except Exception as exception:
            # The user's own __format__, __getitem__ or property may raise anything.
            reason = f"{type(exception).__name__} was raised"
        path = ".".join(self.steps)
        warn_once(("template", self.text, path), "{%s} in %r is recorded as 'unknown': %s.", path, self.text, reason)
        return UNKNOWN


def follow(value: Any, path: Sequence[str]) -> Any:
    """Follow attributes and items from a value; a private sentinel where one is missing (see `found`)."""
    for step in path:
        if isinstance(value, Mapping):
            found_here = value.get(step, _MISSING)
            if found_here is _MISSING and _is_number(step):
                found_here = value.get(int(step), _MISSING)
            value = found_here
        else:
            found_here = getattr(value, step, _MISSING) if step.isidentifier() else _MISSING
            if found_here is _MISSING and hasattr(type(value), "__getitem__"):
                try:
                    found_here = value[int(step) if _is_number(step) else step]
                except (LookupError, TypeError):
                    return _MISSING
            value = found_here
        if value is _MISSING:
            break
    return value


def _is_number(step: str) -> bool:
    return step.removeprefix("-").isdecimal()


def found(value: Any) -> bool:
    """Whether `follow` arrived at a value."""
    return value is not _MISSING


@functools.lru_cache(maxsize=1024)
def parse_path(path: str, option: str) -> tuple[str, ...]:
    """The steps of a path into a result, such as `"report.score"`, `"scores[0]"` or `"rouge-L"`.

    Raises:
        ConfigurationError: where it is no such path.
    """
    try:
        return _steps(_PATH, path)
    except ValueError as error:
        raise ConfigurationError(f"{option}: {path!r} is not a path of attributes and items: {error}") from None


def _steps(form: re.Pattern[str], path: str) -> tuple[str, ...]:
    match = form.fullmatch(path)
    if match is None:
        raise ValueError(f"{path!r} is no field")
    root = match[1].rstrip() if match[1][0] != "[" else ""
    rest = _STEP.findall(match[2] if root else match[1] + match[2])
    steps = tuple((attribute.rstrip() or item).strip("\"'") for attribute, item in rest)
    if any(step.startswith("_") for step in steps):
        raise ValueError(f"{path!r} reaches into something private")
    return (root, *steps) if root else steps
