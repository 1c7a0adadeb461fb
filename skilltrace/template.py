"""Names and tags with fields in them: `"skill_creation_{job_id}"`, `"{request.skill_type}"`, `"{self.region}"`.

The fields look like those of `str.format`, but only read: attributes and items, never a call, never a name that begins
with an underscore. So a template cannot be made to run code or to reach into an object's internals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any

from skilltrace.errors import ConfigurationError
from skilltrace.faults import warn_once
from skilltrace.redaction import MASK

UNKNOWN = "unknown"
_PATH = re.compile(r"\s*([A-Za-z]\w*)((?:\.[A-Za-z]\w*|\[[^\[\]]+\])*)\s*")
_STEP = re.compile(r"\.([A-Za-z]\w*)|\[([^\[\]]+)\]")
_MISSING: Any = object()


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
        # Each part is a literal and the field behind it: (root, path, format spec, conversion).
        self._parts: list[tuple[str, tuple[str, tuple[str, ...], str, str] | None]] = []
        try:
            for literal, field, spec, conversion in Formatter().parse(text):
                filled = None if field is None else (*_parse_path(field), spec or "", conversion or "")
                self._parts.append((literal, filled))
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
        return tuple(field[0] for _, field in self._parts if field is not None)

    def render(self, values: Mapping[str, Any], secret: Callable[[str], bool] = lambda name: False) -> str:
        """The text with its fields filled in; a field that cannot be filled is `unknown`, and warns once.

        Args:
            values: The arguments by name.
            secret: Says of a name whether its value must not appear.
        """
        return "".join(
            literal if field is None else literal + self._fill(values, secret, *field) for literal, field in self._parts
        )

    def _fill(
        self,
        values: Mapping[str, Any],
        secret: Callable[[str], bool],
        root: str,
        path: tuple[str, ...],
        spec: str,
        conversion: str,
    ) -> str:
        if secret(root) or any(secret(step) for step in path):
            return MASK
        try:
            value = follow(values.get(root, _MISSING), path)
            if value is not _MISSING:
                if conversion:
                    value = Formatter().convert_field(value, conversion)
                return format(value, spec)
            reason = "the call has no such argument, attribute or item"
        except Exception as exception:
            # The user's own __format__, __getitem__ or property may raise anything.
            reason = f"{type(exception).__name__} was raised"
        field = root + "".join(f".{step}" for step in path)
        warn_once(("template", self.text, field), "{%s} in %r is recorded as 'unknown': %s.", field, self.text, reason)
        return UNKNOWN


def follow(value: Any, path: Sequence[str]) -> Any:
    """Follow attributes and items from a value; a private sentinel where one is missing (see `found`)."""
    for step in path:
        if value is _MISSING:
            return value
        if isinstance(value, Mapping):
            value = value.get(step, _MISSING)
            continue
        attribute = getattr(value, step, _MISSING) if step.isidentifier() else _MISSING
        if attribute is _MISSING and hasattr(type(value), "__getitem__"):
            try:
                attribute = value[int(step) if step.lstrip("-").isdigit() else step]
            except (LookupError, TypeError):
                attribute = _MISSING
        value = attribute
    return value


def found(value: Any) -> bool:
    """Whether `follow` arrived at a value."""
    return value is not _MISSING


def parse_path(path: str, option: str) -> tuple[str, ...]:
    """The steps of a path such as `"report.score"` or `"scores[0]"`.

    Raises:
        ConfigurationError: where it is no such path.
    """
    try:
        root, steps = _parse_path(path)
    except ValueError as error:
        raise ConfigurationError(f"{option}: {path!r} is not a path of attributes and items: {error}") from None
    return (root, *steps)


def _parse_path(path: str) -> tuple[str, tuple[str, ...]]:
    match = _PATH.fullmatch(path)
    if match is None:
        raise ValueError(f"{path!r} is no field")
    steps = tuple((attribute or item).strip("\"'") for attribute, item in _STEP.findall(match[2]))
    if any(step.startswith("_") for step in steps):
        raise ValueError(f"{path!r} reaches into something private")
    return match[1], steps
