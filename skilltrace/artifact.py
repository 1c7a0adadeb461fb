"""From a return value to files: which artifacts a result becomes, and how its values are written.

A mapping-like result (dict, `dspy.Prediction`, dataclass, attrs, pydantic, named tuple, object with `to_dict`) is laid
out by field; any other value is one file. Types that skilltrace does not know are added with `register`.

    @skilltrace.artifact.register(Molecule, suffix=".svg")
    def draw(molecule: Molecule) -> str:
        return molecule.to_svg()
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import io
import math
import numbers
import os
import pathlib
import re
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from skilltrace.errors import ArtifactError, ConfigurationError
from skilltrace.faults import warn_once
from skilltrace.records import Artifact
from skilltrace.template import follow, found, parse_path

if TYPE_CHECKING:
    from skilltrace.redaction import Redactor

T = TypeVar("T")

LONG_TEXT = 250
"""From this many characters on (or with a line break) a text field is a file of its own, not a value in result.json."""

_MAX_DEPTH = 50
_MAX_SECONDS = 2.0
_MAX_ROWS = 100_000


class _Serializer(NamedTuple):
    function: Callable[[Any], Any]
    suffix: str | None


_registered: dict[type, _Serializer] = {}
_by_type: weakref.WeakKeyDictionary[type, _Serializer | None] = weakref.WeakKeyDictionary()


def register(type_: type[T], *, suffix: str | None = None) -> Callable[[Callable[[T], Any]], Callable[[T], Any]]:
    """Teach skilltrace to record values of a type (and of its subclasses).

    Args:
        type_: The type.
        suffix: The file's suffix, `".svg"` for example. Default: by what the function returns.

    Returns:
        A decorator for the serializer: a function of one value that returns the file's content as `str` (`.md` where no
        suffix is given), as `bytes` (`.bin`), or as anything JSON-like (`.json`).

    Raises:
        ConfigurationError: where `type_` is not a class or `suffix` not a suffix.

    Example:
        >>> class Celsius:
        ...     degrees = 21.5
        >>> @register(Celsius, suffix=".txt")
        ... def celsius(value):
        ...     return f"{value.degrees} C"
    """
    if not isinstance(type_, type):
        raise ConfigurationError(f"register takes a class, not {type_!r}: @skilltrace.artifact.register(MyType)")
    if suffix is not None and not re.fullmatch(r"\.\w+(\.\w+)*", suffix):
        raise ConfigurationError(f"suffix={suffix!r} is not a file suffix such as '.svg'")

    def decorator(function: Callable[[T], Any]) -> Callable[[T], Any]:
        _registered[type_] = _Serializer(function, suffix)
        _by_type.clear()
        return function

    return decorator


def of_result(
    result: Any,
    option: bool | str | Mapping[str, str | Callable[[Any], Any]],
    *,
    name: str,
    redactor: Redactor,
    max_bytes: int,
) -> list[Artifact]:
    """The artifacts of a returned value.

    Args:
        result: What the call returned.
        option: The decorator's `artifacts=`: True (laid out by field), False (none), a path for the whole value, or a
            mapping from paths to a part of the result, each named by a path of attributes and items or computed by a
            function of the result.
        name: The file name, without suffix, of a value that has no fields.
        redactor: What keeps secrets out.
        max_bytes: A file's largest size, in bytes; what is cut says so in the file.
    """
    if option is False or result is None:
        return []
    layout = _Layout(redactor, max_bytes)
    if option is True:
        layout.add_result(result, name)
    elif isinstance(option, str):
        layout.add_at(option, result)
    else:
        for path, pick in option.items():
            try:
                part = pick(result) if callable(pick) else follow(result, parse_path(pick, "artifacts"))
            except Exception as exception:
                warn_once(("artifact", path, type(exception)), "The artifact %r is not recorded: %r.", path, exception)
                continue
            if found(part):
                layout.add_at(path, part)
            else:
                warn_once(("artifact", path), "The artifact %r is not recorded: the result has no %r.", path, pick)
    return layout.artifacts


def of_value(path: str, value: Any, *, redactor: Redactor, max_bytes: int) -> Artifact:
    """One value as the file `path`, as `log_text` and `log_dict` write it."""
    layout = _Layout(redactor, max_bytes)
    layout.add_at(path, value)
    return layout.artifacts[0]


def safe_path(path: str | os.PathLike[str]) -> str:
    """The path of an artifact, checked.

    Raises:
        ArtifactError: where it is empty, absolute, or leaves the run's folder.
    """
    text = os.fspath(path).replace("\\", "/")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if not parts or ".." in parts or text.startswith("/") or re.match(r"[A-Za-z]:", text) or "\0" in text:
        raise ArtifactError(
            f"{text!r} is no artifact path: it must be relative and stay inside the run, like 'reports/a.json'"
        )
    return "/".join(parts)


def file_name(name: str) -> str:
    """A name as one file name that every store takes."""
    return re.sub(r"[^\w\-. ]", "_", name).strip(". ")[:120] or "value"


class _Layout:
    """Collects the files of one result; no two get the same path."""

    def __init__(self, redactor: Redactor, max_bytes: int) -> None:
        self.artifacts: list[Artifact] = []
        self._redactor = redactor
        self._max_bytes = max_bytes
        self._taken: set[str] = set()

    def add_result(self, result: Any, name: str) -> None:
        known = _serializer_of(result)
        try:
            fields = None if known else fields_of(result)
        except Exception as exception:
            # The user's own property or mapping raises: its repr is all that there is.
            warn_once(
                ("fields", type(result), type(exception)),
                "The fields of %s could not be read: %s was raised. Its repr is recorded instead.",
                type(result).__qualname__,
                type(exception).__name__,
            )
            self._put(path := f"{file_name(name)}.txt", self._text(path, _safe_repr(result)))
            return
        if fields is None:
            self._add(file_name(name), result, known)
            return
        scalars: dict[str, Any] = {}
        files: list[tuple[str, Any]] = []
        for field, value in fields.items():
            text = field if isinstance(field, str) else _safe_repr(field)
            if self._redactor.secret(text) or _is_scalar(value):
                scalars[text] = value
            else:
                files.append((text, value))
        if scalars:
            self._put("result.json", Artifact("result.json", json=self._tree(scalars)))
        for field, value in files:
            self._add(file_name(field), self._redactor.value(field, value), _serializer_of(value))

    def add_at(self, path: str, value: Any) -> None:
        """The whole value as one file at a path that the user chose."""
        path = safe_path(path)
        known = _serializer_of(value)
        content = self._run(known, value)[0] if known else value
        if isinstance(content, str):
            self._put(path, self._text(path, content))
        elif isinstance(content, (bytes, bytearray, memoryview)):
            self._put(path, self._data(path, bytes(content)))
        else:
            self._put(path, Artifact(path, json=self._tree(content)))

    def _add(self, stem: str, value: Any, known: _Serializer | None) -> None:
        content, suffix = self._run(known, value) if known else (value, None)
        if isinstance(content, str):
            path = stem + (suffix or ".md")
            self._put(path, self._text(path, content))
        elif isinstance(content, (bytes, bytearray, memoryview)):
            path = stem + (suffix or ".bin")
            self._put(path, self._data(path, bytes(content)))
        elif known or _is_scalar(content) or _is_nested(content):
            path = stem + (suffix or ".json")
            self._put(path, Artifact(path, json=self._tree(content)))
        else:
            path = stem + ".txt"
            self._put(path, self._text(path, _repr_of_unknown(content)))

    def _run(self, serializer: _Serializer, value: Any) -> tuple[Any, str | None]:
        try:
            content = serializer.function(value)
        except Exception as exception:
            warn_once(
                ("serializer", type(value), type(exception)),
                "The serializer of %s raised %r; its repr is recorded instead.",
                type(value).__qualname__,
                exception,
            )
            return _safe_repr(value), ".txt"
        return content, serializer.suffix

    def _put(self, path: str, artifact: Artifact) -> None:
        stem, dot, suffix = path.rpartition(".") if "." in path.rpartition("/")[2] else (path, "", "")
        number, free = 2, path
        while free in self._taken:
            free, number = f"{stem}_{number}{dot}{suffix}", number + 1
        self._taken.add(free)
        self.artifacts.append(
            artifact
            if free == artifact.path
            else Artifact(free, artifact.text, artifact.json, artifact.data, artifact.blob)
        )

    def _text(self, path: str, text: str) -> Artifact:
        text = self._redactor.value(path.rpartition("/")[2].rpartition(".")[0] or path, text)
        if not isinstance(text, str):
            text = _safe_repr(text)
        size, limit = len(text), self._max_bytes
        # A character is one to four bytes: count them only where it can matter.
        if size * 4 > limit and (size > limit or len(text.encode("utf-8", "replace")) > limit):
            kept = text.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")
            text = f"{kept}\n[cut by skilltrace: {len(kept):,} of {size:,} characters; see max_artifact_bytes]\n"
        return Artifact(path, text=self._redactor.text(text))

    def _data(self, path: str, data: bytes) -> Artifact:
        if len(data) > self._max_bytes:
            return self._text(
                f"{path}.txt",
                f"[left out by skilltrace: {len(data):,} bytes are over max_artifact_bytes={self._max_bytes:,}]",
            )
        return Artifact(path, data=data)

    def _tree(self, value: Any) -> Any:
        return JsonTree(self._redactor, self._max_bytes).of(value)


class JsonTree:
    """Turns any value into what JSON can hold, with a bound on depth, size and time, and without secrets.

    Args:
        redactor: What keeps secrets out.
        max_bytes: How large the tree may become, in bytes of JSON (about).
    """

    def __init__(self, redactor: Redactor, max_bytes: int) -> None:
        self._redactor = redactor
        self._left = max_bytes
        self._open: set[int] = set()
        self._nodes = 0
        self._deadline = time.monotonic() + _MAX_SECONDS
        self._late = False

    def of(self, value: Any, depth: int = 0) -> Any:
        """The value as None, bool, int, float, str, list or dict. Never raises."""
        self._nodes += 1
        self._left -= 8
        if value is None or value is True or value is False:
            return value
        kind = type(value)
        if kind is str:
            return self._text(value)
        if kind is int:
            # Beyond 64 bits most readers of JSON lose digits.
            return value if -(2**63) <= value < 2**63 else str(value)
        if kind is float:
            return value if math.isfinite(value) else str(value)
        if self._left < 0:
            return "[cut by skilltrace: see max_artifact_bytes]"
        if not self._nodes % 256 and time.monotonic() > self._deadline:
            self._late = True
        if self._late:
            return f"[cut by skilltrace: serialising took over {_MAX_SECONDS} s]"
        if depth > _MAX_DEPTH:
            return f"[cut by skilltrace: deeper than {_MAX_DEPTH} levels]"
        if id(value) in self._open:
            return f"[cycle: {kind.__qualname__}]"
        self._open.add(id(value))
        try:
            return self._compound(value, depth + 1)
        except Exception as exception:
            # The user's own __iter__, to_dict or property: say so where the value would stand.
            warn_once(
                ("json", kind, type(exception)),
                "A value of %s could not be read: %s was raised. It is recorded as a note.",
                kind.__qualname__,
                type(exception).__name__,
            )
            return f"[unreadable {kind.__qualname__}: {type(exception).__name__}]"
        finally:
            self._open.discard(id(value))

    def _compound(self, value: Any, depth: int) -> Any:
        known = _serializer_of(value)
        if known is not None:
            content = known.function(value)
            return f"[{len(content):,} bytes]" if isinstance(content, bytes) else self.of(content, depth)
        fields = fields_of(value)
        if fields is not None:
            return self._mapping(fields, depth)
        if isinstance(value, (list, tuple, Set)):
            items = value if isinstance(value, (list, tuple)) else _sorted(value)
            return self._sequence(items, depth)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return f"[{len(bytes(value)):,} bytes]"
        simple = _simple(value)
        if simple is not _UNKNOWN:
            return self.of(simple, depth)
        if isinstance(value, Sequence):
            return self._sequence(value, depth)
        return self._text(_repr_of_unknown(value))

    def _mapping(self, fields: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for key, value in fields.items():
            name = key if isinstance(key, str) else self._key(key)
            self._left -= len(name)
            if self._left < 0:
                tree["[cut by skilltrace]"] = "see max_artifact_bytes"
                break
            tree[name] = self.of(self._redactor.value(name, value), depth)
        return tree

    def _sequence(self, items: Any, depth: int) -> list[Any]:
        tree: list[Any] = []
        for item in items:
            if self._left < 0 or self._late:
                tree.append(f"[cut by skilltrace: {len(tree):,} of {len(items):,} items]")
                break
            tree.append(self.of(item, depth))
        return tree

    def _key(self, key: Any) -> str:
        simple = _simple(key)
        return str(simple) if simple is not _UNKNOWN and not isinstance(key, bytes) else _safe_repr(key)

    def _text(self, text: str) -> str:
        self._left -= len(text)
        if self._left < 0:
            text = text[: max(0, len(text) + self._left)] + "[cut by skilltrace: see max_artifact_bytes]"
        return self._redactor.text(text)


def fields_of(value: Any) -> Mapping[Any, Any] | None:
    """The fields of a mapping-like value, or None where it has none. Only looks at the type, so that a hostile
    `__getattr__` is not run; what it then reads may raise."""
    if isinstance(value, dict):
        return value
    kind = type(value)
    if isinstance(value, type):
        return None
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        names = getattr(kind, "_fields", None)
        return dict(zip(names, value, strict=False)) if isinstance(names, tuple) else None
    names = getattr(kind, "model_fields", None)  # pydantic
    if isinstance(names, dict):
        return {**{name: getattr(value, name) for name in names}, **(getattr(value, "model_extra", None) or {})}
    names = getattr(kind, "__attrs_attrs__", None)
    if names is not None:
        return {field.name: getattr(value, field.name) for field in names}
    names = getattr(kind, "__struct_fields__", None)  # msgspec
    if names is not None:
        return {name: getattr(value, name) for name in names}
    if callable(getattr(kind, "toDict", None)) and callable(getattr(kind, "items", None)):  # dspy.Prediction
        return dict(value.items())
    if callable(getattr(kind, "to_dict", None)) and _serializer_of(value) is None:
        try:
            fields = value.to_dict()
        except Exception as exception:
            warn_once(
                ("to_dict", kind, type(exception)),
                "%s.to_dict raised %s; its repr is recorded instead.",
                kind.__qualname__,
                type(exception).__name__,
            )
            return None
        return fields if isinstance(fields, Mapping) else None
    return None


_UNKNOWN: Any = object()


def _simple(value: Any) -> Any:
    """A value of the standard library's or NumPy's small types as one of JSON's, or `_UNKNOWN`."""
    if isinstance(value, enum.Enum):
        return value.value if isinstance(value.value, (str, int, float)) else value.name
    if isinstance(value, (str, pathlib.PurePath, uuid.UUID, decimal.Decimal)):
        return str(value)
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__module__.partition(".")[0] == "numpy" and callable(getattr(value, "tolist", None)):
        return value.tolist()
    return _UNKNOWN


def _is_scalar(value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float)):
        return True
    if isinstance(value, str):
        return len(value) < LONG_TEXT and "\n" not in value
    if isinstance(value, (list, tuple, dict, bytes)) or _serializer_of(value):
        return False
    simple = _simple(value)
    return simple is not _UNKNOWN and not isinstance(simple, list)


def _is_nested(value: Any) -> bool:
    if isinstance(value, (list, tuple, Set, Mapping)) or _simple(value) is not _UNKNOWN:
        return True
    try:
        return fields_of(value) is not None
    except Exception:
        return True  # JsonTree says in the file what could not be read


def _sorted(values: Set[Any]) -> list[Any]:
    try:
        return sorted(values)
    except TypeError:
        return list(values)


def _repr_of_unknown(value: Any) -> str:
    kind = type(value)
    warn_once(
        ("unknown type", kind),
        "A value of %s.%s is recorded by its repr; @skilltrace.artifact.register(%s) teaches skilltrace to do better.",
        kind.__module__,
        kind.__qualname__,
        kind.__name__,
    )
    return _safe_repr(value)


def _safe_repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception as exception:
        return f"<{type(value).__qualname__} whose repr raised {type(exception).__name__}>"


# The types of other packages, found by the package and name of a class among a value's bases: none is imported here.


def _data_frame_csv(frame: Any) -> str:
    cut = frame.head(_MAX_ROWS)
    writer = getattr(cut, "to_csv", None)
    text: str = writer(index=False) if writer is not None else cut.write_csv()
    return text if len(cut) == len(frame) else f"{text}# cut by skilltrace: {len(cut):,} of {len(frame):,} rows\n"


def _pyplot_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def _plotly_html(figure: Any) -> str:
    html: str = figure.to_html(include_plotlyjs="cdn")
    return html


def _pillow_png(image: Any) -> bytes:
    buffer = io.BytesIO()
    (image if image.mode in {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"} else image.convert("RGB")).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def _module_state(module: Any) -> Any:
    return module.dump_state()


_FOREIGN: dict[tuple[str, str], _Serializer] = {
    ("pandas", "DataFrame"): _Serializer(_data_frame_csv, ".csv"),
    ("polars", "DataFrame"): _Serializer(_data_frame_csv, ".csv"),
    ("matplotlib", "Figure"): _Serializer(_pyplot_png, ".png"),
    ("plotly", "BaseFigure"): _Serializer(_plotly_html, ".html"),
    ("PIL", "Image"): _Serializer(_pillow_png, ".png"),
    ("dspy", "Module"): _Serializer(_module_state, ".json"),
    # Their own dumps hold a whole file as base64; the repr says what it was.
    ("dspy", "Image"): _Serializer(lambda value: repr(value)[:LONG_TEXT], ".txt"),
    ("dspy", "Audio"): _Serializer(lambda value: repr(value)[:LONG_TEXT], ".txt"),
}


def _serializer_of(value: Any) -> _Serializer | None:
    kind = type(value)
    try:
        return _by_type[kind]
    except KeyError:
        pass
    serializer = next((_registered[base] for base in kind.__mro__ if base in _registered), None) or next(
        (
            _FOREIGN[key]
            for base in kind.__mro__
            if (key := (base.__module__.partition(".")[0], base.__name__)) in _FOREIGN
        ),
        None,
    )
    _by_type[kind] = serializer
    return serializer
