"""From a return value to files: which artifacts a result becomes, and how its values are written.

A mapping-like result (dict, `dspy.Prediction`, dataclass, attrs, pydantic, named tuple, object with `to_dict`) is laid
out by field; any other value is one file. Types that skilltrace does not know are added with `register`.

    @skilltrace.artifact.register(Molecule, suffix=".svg")
    def draw(molecule: Molecule) -> str:
        return molecule.to_svg()

A result is the user's, and may be anything: huge, cyclic, lazy, or with methods that raise. So what to do with a value
is decided by its type alone, and each place that runs the user's code is guarded.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import io
import math
import numbers
import os
import pathlib
import re
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from skilltrace.errors import ArtifactError, ConfigurationError
from skilltrace.faults import warn_once
from skilltrace.records import Artifact
from skilltrace.redaction import MASK
from skilltrace.template import follow, found, parse_path

if TYPE_CHECKING:
    from skilltrace.redaction import Redactor

T = TypeVar("T")

LONG_TEXT = 250
"""From this many characters on (or with a line break) a text field is a file of its own, not a value in result.json."""

OWN_FILES = frozenset({"lm_usage.json", "error.txt"})
"""What skilltrace itself writes at the end of a run: a field of that name gets another file."""

_DOCUMENTS = frozenset({"skill_content"})  # fields that are a file of their own however short they are
_MAX_DEPTH = 50
_MAX_SECONDS = 2.0  # for one value's tree, or for reading one lazy mapping or sequence
_MAX_SECONDS_ALL = 10.0  # for all files of a result
_MAX_FILES = 100
_MAX_FIELDS = 100_000
_MAX_CELLS = 500_000
_LONGEST_KEY = 1000
_SMALLEST, _LARGEST = -(2**63), 2**63 - 1  # integers that readers of JSON take; all but a few floats are in between
_LOOK = 1 << 16  # bytes of JSON after which the clock is looked at
_MARGIN = 4096  # characters behind a cut that are looked at too: a credential may stand across it

_CUT = "cut by skilltrace"
_OVER_SIZE = f"[{_CUT}: see max_artifact_bytes]"
_OVER_TIME = f"[{_CUT}: it took over {_MAX_SECONDS:.0f} s]"
_OVER_DEPTH = f"[{_CUT}: deeper than {_MAX_DEPTH} levels]"


def register(type_: type[T], *, suffix: str | None = None) -> Callable[[Callable[[T], Any]], Callable[[T], Any]]:
    """Teach skilltrace to record values of a type (and of its subclasses).

    Args:
        type_: The type. `object` stands for all that skilltrace knows nothing better for.
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
    if type_ in (str, int, float, bool, type(None)):
        raise ConfigurationError(f"register takes a class of your own; a {type_.__name__} is recorded as it is")
    if suffix is not None and not re.fullmatch(r"\.\w+(\.\w+)*", suffix):
        raise ConfigurationError(f"suffix={suffix!r} is not a file suffix such as '.svg'")

    def decorator(function: Callable[[T], Any]) -> Callable[[T], Any]:
        _registered[type_] = _Reader(_IS_FILE, lambda value, _: function(value), suffix)
        _exact.pop(type_, None)
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
    taken: Iterable[str] = OWN_FILES,
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
        taken: Paths that the run uses for other things.
    """
    if option is False or result is None:
        return []
    layout = _Layout(redactor, max_bytes, taken)
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
            if not found(part):
                warn_once(("artifact", path), "The artifact %r is not recorded: the result has no %r.", path, pick)
            elif part is not None:
                layout.add_at(path, part)
    return layout.finished()


def of_value(path: str, value: Any, *, redactor: Redactor, max_bytes: int) -> Artifact:
    """One value as the file `path`, as `log_text` and `log_dict` write it.

    Raises:
        ArtifactError: where the path is none.
    """
    layout = _Layout(redactor, max_bytes, ())
    layout.add_at(safe_path(path), value)
    return layout.finished()[0]


def safe_path(path: str | os.PathLike[str]) -> str:
    """The path of an artifact, checked.

    Raises:
        ArtifactError: where it is empty, absolute, leaves the run's folder, or no store could hold it.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise ArtifactError(f"an artifact's path must be text, like 'reports/a.json', not {path!r}")
    # A server takes spaces round a name away.
    parts = [part for spaced in text.replace("\\", "/").split("/") if (part := spaced.strip(" ")) not in ("", ".")]
    if not parts or ".." in parts or text[0] in "/\\" or re.match(r"[A-Za-z]:", text):
        raise ArtifactError(
            f"{text!r} is no artifact path: it must be relative and stay inside the run, like 'reports/a.json'"
        )
    # A server takes # and ? for parts of a URL and % for an escape; a surrogate is half of a character.
    if re.search(r"[\0-\x1f\x7f#?%\ud800-\udfff]", text) or any(len(part.encode()) > 200 for part in parts):
        raise ArtifactError(
            f"{text!r:.300} is no artifact path: '#', '?', '%', control characters and names over 200 bytes do not "
            "pass all of MLflow's stores"
        )
    return "/".join(parts)


@functools.lru_cache(maxsize=1024)
def file_name(name: str) -> str:
    """A name as one file name that every store takes."""
    # Stores count bytes, and have room for 255.
    cut = re.sub(r"[^\w\-. ]", "_", name[:200]).encode()[:120].decode("utf-8", "ignore")
    return cut.strip(". ") or "value"


# --- what is to be done with a value, by its type --------------------------------------------------------------------


# The roles; plain texts, as an enum's members take longer to get at.
_IS_TEXT = "text"
_IS_SCALAR = "scalar"  # None, or a boolean or a number of Python's own
_IS_BYTES = "bytes"
_IS_FIELDS = "fields"  # mapping-like: read as pairs
_IS_ITEMS = "items"
_IS_OTHER = "other"  # stands for another value, as which it is read
_IS_FILE = "file"  # has a serializer
_IS_UNKNOWN = "unknown"


class _Reader(NamedTuple):
    """How the values of a type are read: the function may run the user's code, and so may raise."""

    role: str
    read: Callable[[Any, Redactor], Any]
    suffix: str | None = None


def _as(read: Callable[[Any], Any]) -> _Reader:
    return _Reader(_IS_OTHER, lambda value, _: read(value))


def _fields(read: Callable[[Any], Iterable[tuple[Any, Any]]]) -> _Reader:
    return _Reader(_IS_FIELDS, lambda value, _: read(value))


def _items(read: Callable[[Any], Iterable[Any]]) -> _Reader:
    return _Reader(_IS_ITEMS, lambda value, _: read(value))


def _same(value: Any, _: Any = None) -> Any:
    return value


def _sorted(values: set[Any]) -> list[Any]:
    try:
        return sorted(values)
    except Exception:
        return list(values)


_UNKNOWN = _Reader(_IS_UNKNOWN, _same)
_TEXT = _Reader(_IS_TEXT, _same)
_DICT = _Reader(_IS_FIELDS, lambda value, _: dict(value).items())  # a copy: another thread may change it meanwhile
_LIST = _Reader(_IS_ITEMS, _same)
_SET = _items(_sorted)
_BYTES = _Reader(_IS_BYTES, lambda value, _: bytes(value))

_registered: dict[type, _Reader] = {}
_by_type: weakref.WeakKeyDictionary[type, _Reader] = weakref.WeakKeyDictionary()
_exact: dict[type, _Reader] = {
    **dict.fromkeys((type(None), bool, int, float), _Reader(_IS_SCALAR, _same)),
    **dict.fromkeys((list, tuple), _LIST),
    **dict.fromkeys((bytes, bytearray, memoryview), _BYTES),
    **dict.fromkeys((set, frozenset), _SET),
    str: _TEXT,
    dict: _DICT,
}


def _reader_of(kind: type) -> _Reader:
    try:
        reader = _exact.get(kind) or _by_type.get(kind)
        if reader is None:
            reader = _by_type[kind] = _serializer_of(kind) or _own_reader(kind)
        return reader
    except Exception:
        return _UNKNOWN  # a metaclass that raises


def _serializer_of(kind: type) -> _Reader | None:
    for base in kind.__mro__[:-1]:
        reader = _registered.get(base) or _FOREIGN.get((base.__module__.partition(".")[0], base.__name__))
        if reader is not None:
            return reader
    return None


def _own_reader(kind: type) -> _Reader:
    """How a type is read that has no serializer. Attributes are looked up on the type, never on the value."""
    for base, reader in _BASES:
        if issubclass(kind, base):
            return reader
    if dataclasses.is_dataclass(kind):
        return _attributes([field.name for field in dataclasses.fields(kind)])
    names: Any = getattr(kind, "_fields", None)
    if issubclass(kind, tuple):
        return _fields(lambda value: zip(names, value, strict=False)) if isinstance(names, tuple) else _LIST
    if getattr(kind, "__pydantic_root_model__", False):
        return _as(lambda value: value.root)
    names = getattr(kind, "model_fields", None)
    if isinstance(names, dict):  # pydantic
        computed = getattr(getattr(kind, "__pydantic_decorators__", None), "computed_fields", ())
        return _attributes([*names, *computed], extra="model_extra")
    names = getattr(kind, "__attrs_attrs__", None)
    if names is not None:
        return _attributes([field.name for field in names])
    names = getattr(kind, "__struct_fields__", None)  # msgspec
    if names is not None:
        return _attributes(list(names))
    if hasattr(kind, "__next__") or hasattr(kind, "__anext__") or hasattr(kind, "__await__"):
        return _registered.get(object, _UNKNOWN)  # reading it would use it up
    if callable(getattr(kind, "toDict", None)) and callable(getattr(kind, "items", None)):
        return _fields(lambda value: list(value.items()))  # dspy.Prediction and dspy.Example
    if callable(getattr(kind, "to_dict", None)):
        return _fields(_to_dict)
    if issubclass(kind, Mapping):
        return _fields(lambda value: _in_time(((key, value[key]) for key in value), (f"[{_CUT}]", _OVER_TIME)))
    if issubclass(kind, (Sequence, AbstractSet, ValuesView)):
        return _items(lambda value: _in_time(iter(value), _OVER_TIME))
    if kind.__module__.partition(".")[0] == "numpy" and hasattr(kind, "tolist"):
        return _as(_numpy)
    return _registered.get(object, _UNKNOWN)


def _attributes(names: Sequence[str], extra: str | None = None) -> _Reader:
    def read(value: Any) -> Iterable[tuple[str, Any]]:
        fields = [(name, _attribute(value, name)) for name in names]
        more = getattr(value, extra, None) if extra else None
        return [*fields, *more.items()] if more else fields

    return _fields(read)


def _attribute(value: Any, name: str) -> Any:
    try:
        return getattr(value, name)
    except Exception as exception:
        return _unreadable(type(value), exception, f".{name}")


def _to_dict(value: Any) -> Iterable[tuple[Any, Any]]:
    fields = value.to_dict()
    if not isinstance(fields, Mapping):
        raise TypeError("to_dict did not return a mapping")
    return dict(fields).items()


def _in_time(items: Iterator[T], cut: T) -> Iterator[T]:
    """What a lazy collection holds, as far as it can be read in the time; its end then says that it was cut."""
    deadline = time.monotonic() + _MAX_SECONDS
    for item in items:
        yield item
        if time.monotonic() > deadline:
            yield cut
            return


def _numpy(value: Any) -> Any:
    if getattr(value, "size", 0) <= _MAX_CELLS:
        return value.tolist()
    return [*value.ravel()[:_MAX_CELLS].tolist(), f"[{_CUT}: {_MAX_CELLS:,} of {value.size:,} elements]"]


def _big(value: int) -> int | str:
    # Beyond 64 bits most readers of JSON lose digits; Python itself does not print an integer of thousands of digits.
    if _SMALLEST <= value <= _LARGEST:
        return value
    return str(value) if value.bit_length() < 10_000 else hex(value)


# The first that fits counts. The plain value of a subclass is taken by the base's own method: the subclass's may lie.
_BASES: tuple[tuple[Any, _Reader], ...] = (
    (enum.Enum, _as(lambda value: value.value if isinstance(value.value, (str, int, float)) else value.name)),
    (str, _as(str.__str__)),
    (int, _as(int.__int__)),
    (float, _as(float.__float__)),
    ((bytes, bytearray), _BYTES),
    (dict, _DICT),
    (list, _LIST),
    ((set, frozenset), _SET),
    ((pathlib.PurePath, uuid.UUID, decimal.Decimal, complex, collections.UserString), _as(str)),
    ((dt.date, dt.time), _as(lambda value: value.isoformat())),
    (dt.timedelta, _as(lambda value: value.total_seconds())),
    (numbers.Integral, _as(int)),
    (numbers.Real, _as(float)),
    (BaseException, _Reader(_IS_OTHER, lambda value, redactor: redactor.printed(f"{type(value).__name__}: {value}"))),
    (type, _as(lambda value: f"{value.__module__}.{value.__qualname__}")),
)


def fields_of(value: Any, redactor: Redactor) -> Iterable[tuple[Any, Any]] | None:
    """The fields of a mapping-like value as pairs, or None where it has none. Reading them may raise anything."""
    reader = _reader_of(type(value))
    return reader.read(value, redactor) if reader.role is _IS_FIELDS else None


def _key_text(key: Any, redactor: Redactor) -> str:
    """A mapping's key as text."""
    try:
        key = _settled(key, redactor)[1]
        return key if type(key) is str else str(_big(key) if type(key) is int else key)
    except Exception:
        return _safe_repr(key, redactor)


def _settled(value: Any, redactor: Redactor) -> tuple[_Reader, Any]:
    """A value, or what it stands for, with how it is read."""
    reader = _reader_of(type(value))
    steps = 0
    while reader.role is _IS_OTHER and steps < 10:
        value = reader.read(value, redactor)
        reader, steps = _reader_of(type(value)), steps + 1
    return reader, value


# --- what is said of values that cannot be recorded as they are ------------------------------------------------------


def _unreadable(kind: type, exception: Exception, where: str = "") -> str:
    name = f"{_name_of(kind)}{where}"
    warn_once(
        ("unreadable", name),
        "A value of %s could not be read: %s was raised. It is recorded as a note, or by its repr.",
        name,
        type(exception).__name__,
    )
    return f"[unreadable {name}: {type(exception).__name__}]"


def _repr_of_unknown(value: Any, redactor: Redactor) -> str:
    name, module = _name_of(type(value)), _module_of(type(value))
    warn_once(
        ("unknown type", module, name),
        "A value of %s.%s is recorded by its repr; @skilltrace.artifact.register(%s) teaches skilltrace to do better.",
        module,
        name,
        name,
    )
    return _safe_repr(value, redactor)


def _safe_repr(value: Any, redactor: Redactor) -> str:
    try:
        return redactor.printed(str.__str__(repr(value)))
    except Exception as exception:
        return f"<{_name_of(type(value))} whose repr raised {type(exception).__name__}>"


# By `type`'s own descriptors: a metaclass may have others.


def _name_of(kind: type) -> str:
    return str(type.__dict__["__qualname__"].__get__(kind))


def _module_of(kind: type) -> str:
    return str(type.__dict__["__module__"].__get__(kind))


def _is_small(field: str, value: Any, redactor: Redactor) -> bool:
    """Whether a field belongs into result.json."""
    if type(value) is not str:
        try:
            reader, value = _settled(value, redactor)
        except Exception:
            return True  # a note will stand there
        if reader.role is not _IS_TEXT:
            return reader.role is _IS_SCALAR
    return len(value) < LONG_TEXT and "\n" not in value and field not in _DOCUMENTS


# --- the files of a result -------------------------------------------------------------------------------------------


class _Layout:
    """Collects the files of one result; no two get the same path."""

    def __init__(self, redactor: Redactor, max_bytes: int, taken: Iterable[str]) -> None:
        self._artifacts: list[Artifact] = []
        self._redactor = redactor
        self._max_bytes = max_bytes
        self._taken = {path.casefold() for path in taken}
        self._json = JsonTree(redactor, max_bytes)
        self._texts = self._json.texts
        self._deadline = time.monotonic() + _MAX_SECONDS_ALL

    def finished(self) -> list[Artifact]:
        """All files, without credentials. Most results hold none: all of their texts are looked through at once."""
        redactor = self._redactor
        if not redactor.suspects(self._texts):
            return self._artifacts
        return [
            Artifact(file.path, file.text and redactor.text(file.text), masked(file.json, redactor), file.data)
            for file in self._artifacts
        ]

    def add_result(self, result: Any, name: str) -> None:
        """By field where it has fields, else as one file."""
        redactor = self._redactor
        scalars: dict[Any, Any] = {}
        files: list[tuple[str, Any]] = []
        try:
            fields = fields_of(result, redactor)
            if fields is None:
                self._add(name, redactor.value(name, result))
                return
            for field, value in islice(fields, _MAX_FIELDS):
                text = field if type(field) is str else _key_text(field, redactor)
                if _is_small(text, value, redactor) or redactor.secret(text) or len(files) >= _MAX_FILES:
                    scalars[field] = value
                else:
                    files.append((text, value))
        except Exception as exception:
            _unreadable(type(result), exception)
            self._put_text(f"{file_name(name)}.txt", _safe_repr(result, redactor))
            return
        if scalars:
            self._put(Artifact("result.json", json=self._json.unmasked(scalars)))
        for field, value in files:
            self._add(field, redactor.value(field, value))
        if len(files) >= _MAX_FILES:
            warn_once(("files", name), "The result of %r has more than %d fields that are files of their own; the rest "
                      "is in result.json.", name, _MAX_FILES)  # fmt: skip

    def add_at(self, path: str, value: Any) -> None:
        """The whole value as one file at a path that the user chose."""
        name = path.rpartition("/")[2].partition(".")[0] or path
        self._add(name, self._redactor.value(name, value), path)

    def _add(self, name: str, value: Any, path: str | None = None) -> None:
        """One value as one file, whose path is made from the name where it is not given."""
        redactor, kind = self._redactor, type(value)
        stem = file_name(redactor.names[name][1])
        if time.monotonic() > self._deadline:
            self._put_text(path or f"{stem}.txt", f"[{_CUT}: the result took over {_MAX_SECONDS_ALL:.0f} s]")
            return
        try:
            reader, value = _settled(value, redactor)
            suffix, serialized_by = reader.suffix, None
            for _ in range(3):  # a serializer may return what has one too, but not for ever
                if reader.role is not _IS_FILE or reader is serialized_by:
                    break
                suffix, serialized_by = suffix or reader.suffix, reader
                reader, value = _settled(reader.read(value, redactor), redactor)
            data = reader.read(value, redactor) if reader.role is _IS_BYTES else None
        except Exception as exception:
            _unreadable(kind, exception)
            self._put_text(path or f"{stem}.txt", _safe_repr(value, redactor))
            return
        if data is not None:
            self._put_data(path or stem + (suffix or ".bin"), data)
        elif reader.role is _IS_TEXT:
            self._put_text(path or stem + (suffix or ".md"), value)
        elif reader.role is _IS_UNKNOWN and not (path or suffix or "").endswith((".json", ".yaml", ".yml")):
            self._put_text(path or stem + (suffix or ".txt"), _repr_of_unknown(value, redactor))
        else:
            json = self._json.unmasked(value, serialized_by)
            self._put(Artifact(path or stem + (suffix or ".json"), json=json))

    def _put_text(self, path: str, text: str) -> None:
        size, limit = len(text), self._max_bytes
        # A character is one to four bytes: count them only where it can matter.
        if size * 4 > limit and (size > limit or len(text.encode("utf-8", "replace")) > limit):
            text = self._redactor.text(text[: limit + _MARGIN])
            kept = text.encode("utf-8", "replace")[: limit - 120].decode("utf-8", "ignore")
            text = f"{kept}\n[{_CUT}: {len(kept):,} of {size:,} characters; see max_artifact_bytes]\n"
        else:
            self._texts.append(text)
        self._put(Artifact(path, text=text))

    def _put_data(self, path: str, data: bytes) -> None:
        if len(data) > self._max_bytes:
            note = f"[{_CUT}: {len(data):,} bytes are over max_artifact_bytes={self._max_bytes:,}]\n"
            self._put(Artifact(f"{path}.txt", text=note))
        else:
            self._put(Artifact(path, data=data))

    def _put(self, artifact: Artifact) -> None:
        # Without regard to case: some stores have none.
        if (key := artifact.path.casefold()) in self._taken:
            folder, slash, file = artifact.path.rpartition("/")
            stem, dot, suffix = file.rpartition(".") if "." in file else (file, "", "")
            number = 2
            while (key := (path := f"{folder}{slash}{stem}_{number}{dot}{suffix}").casefold()) in self._taken:
                number += 1
            artifact = Artifact(path, artifact.text, artifact.json, artifact.data)
        self._taken.add(key)
        self._artifacts.append(artifact)


# --- a value as JSON -------------------------------------------------------------------------------------------------


class JsonTree:
    """Turns any value into what JSON can hold, with a bound on depth, size and time, and without secrets.

    Args:
        redactor: What keeps secrets out.
        max_bytes: How large the tree may become, in bytes of JSON (about).

    Example:
        >>> from skilltrace.redaction import Redactor
        >>> JsonTree(Redactor(), 1 << 20).of({"seen": {3, 1}, "password": "hunter2"})
        {'seen': [1, 3], 'password': '[redacted]'}
    """

    def __init__(self, redactor: Redactor, max_bytes: int) -> None:
        self.texts: list[str] = []
        self._redactor = redactor
        self._max_bytes = max_bytes
        self._open: set[int] = set()

    def of(self, value: Any) -> Any:
        """The value as None, bool, int, float, str, list or dict. Never raises."""
        tree = self.unmasked(value)
        return masked(tree, self._redactor) if self._redactor.suspects(self.texts) else tree

    def unmasked(self, value: Any, serialized_by: _Reader | None = None) -> Any:
        """The same with the credentials that stand in its texts, if any; the texts are added to `texts`.

        Args:
            value: The value.
            serialized_by: The serializer whose content the value is; it is not asked again.
        """
        self._left = self._max_bytes
        self._look = max(0, self._left - _LOOK)
        self._deadline = time.monotonic() + _MAX_SECONDS
        return self._of(value, 0, serialized_by)

    def _of(self, value: Any, depth: int, serialized_by: _Reader | None = None) -> Any:
        kind = type(value)
        self._left -= 8
        if kind is not dict and kind is not list:
            if kind is str:
                return self._text(value)
            if value is None or kind is bool:
                return value
            if kind is float:
                return value if math.isfinite(value) else str(value)
            if kind is int:
                return _big(value)
            # The user's code may run, and take any time.
            if stop := self._stop():
                return stop
        if depth > _MAX_DEPTH:
            return _OVER_DEPTH
        identity = id(value)
        if identity in self._open:
            return f"[cycle: {_name_of(kind)}]"
        self._open.add(identity)
        try:
            reader = _reader_of(kind)
            if reader is serialized_by:
                reader = _own_reader(kind)
            role = reader.role
            if role is _IS_UNKNOWN:
                return self._text(_repr_of_unknown(value, self._redactor))
            content = reader.read(value, self._redactor)
            if role is _IS_FIELDS:
                return self._mapping(content, depth + 1)
            if role is _IS_ITEMS:
                return self._sequence(content, depth + 1)
            if type(content) is bytes:
                return f"[{len(content):,} bytes]"
            return self._of(content, depth + 1, reader if role is _IS_FILE else None)
        except Exception as exception:
            return _unreadable(kind, exception)
        finally:
            self._open.discard(identity)

    # Nearly all of the time is spent in the next two, on texts and numbers; so these are taken there, without a call.

    def _mapping(self, fields: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        redactor, plain_names = self._redactor, self._redactor.plain_names
        for key, value in fields:
            if self._left < self._look and (stop := self._stop()):
                tree[f"[{_CUT}]"] = stop
                break
            name = key
            if type(key) is not str or key not in plain_names:
                text = key if type(key) is str else _key_text(key, redactor)
                secret, name = redactor.names[text if len(text) < _LONGEST_KEY else text[:_LONGEST_KEY] + _OVER_SIZE]
                recorded: Any = MASK if secret else redactor.value(text, value)
                value = recorded  # noqa: PLW2901  # what is recorded of it
            if name in tree:
                name = _unique(name, tree)
            kind = type(value)
            size = 12 + depth + len(name)
            if kind is str and value.isascii() and (size := size + len(value)) < self._left:
                self.texts.append(value)
                tree[name] = value
            elif (kind is float or kind is int) and _SMALLEST <= value <= _LARGEST:
                tree[name] = value
            else:
                tree[name] = self._of(value, depth)
            self._left -= size
        return tree

    def _sequence(self, items: Iterable[Any], depth: int) -> list[Any]:
        tree: list[Any] = []
        for item in items:
            if self._left < self._look and (stop := self._stop()):
                tree.append(stop)
                break
            kind = type(item)
            size = 8 + depth
            if (kind is float or kind is int) and _SMALLEST <= item <= _LARGEST:
                tree.append(item)
            elif kind is str and item.isascii() and (size := size + len(item)) < self._left:
                self.texts.append(item)
                tree.append(item)
            else:
                tree.append(self._of(item, depth))
            self._left -= size
        return tree

    def _stop(self) -> str | None:
        """Why nothing more can be written, where that is so."""
        if self._left < 0:
            return _OVER_SIZE
        if time.monotonic() > self._deadline:
            return _OVER_TIME
        if self._left < self._look:
            self._look = max(0, self._left - _LOOK)
        return None

    def _text(self, text: str) -> str:
        size = len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
        self._left -= size
        if self._left >= 0:
            self.texts.append(text)
            return text
        room = max(0, size + self._left)
        text = self._redactor.text(text[: room + _MARGIN])
        return text.encode("utf-8", "replace")[:room].decode("utf-8", "ignore") + _OVER_SIZE


def _unique(name: str, tree: Mapping[str, Any]) -> str:
    number = 2
    while f"{name} ({number})" in tree:
        number += 1
    return f"{name} ({number})"


def masked(tree: Any, redactor: Redactor) -> Any:
    """A tree with the credentials in its texts masked."""
    if type(tree) is str:
        return redactor.text(tree)
    if type(tree) is dict:
        return {name: masked(value, redactor) for name, value in tree.items()}
    if type(tree) is list:
        return [masked(value, redactor) for value in tree]
    return tree


# --- the types of other packages, found by the package and name of a class: none is imported here --------------------


def _data_frame_csv(frame: Any, redactor: Redactor) -> str:
    secrets = [column for column in frame.columns if redactor.secret(str(column))]
    rows = max(1, _MAX_CELLS // max(1, len(frame.columns)))
    cut = frame.head(rows)
    text: str
    if hasattr(cut, "to_csv"):  # pandas
        index = cut.index
        named = any(name is not None for name in index.names) or getattr(index.dtype, "kind", "O") not in "iu"
        text = cut.drop(columns=secrets).to_csv(index=named)
    else:  # polars
        text = cut.drop(secrets).write_csv()
    return text if len(cut) == len(frame) else f"{text}# {_CUT}: {len(cut):,} of {len(frame):,} rows\n"


def _pyplot_png(figure: Any, _: Redactor) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return buffer.getvalue()


def _plotly_html(figure: Any, _: Redactor) -> str:
    html: str = figure.to_html(include_plotlyjs="cdn")
    return html


def _pillow_png(image: Any, _: Redactor) -> bytes:
    buffer = io.BytesIO()
    known = image.mode in {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"}
    (image if known else image.convert("RGB")).save(buffer, "PNG")
    return buffer.getvalue()


def _module_state(module: Any, _: Redactor) -> Any:
    return _without_api_settings(module.dump_state())


def _without_api_settings(state: Any) -> Any:
    """A module's state without its LMs' `api_key`, `api_base` and so on, so that it still can be loaded."""
    if not isinstance(state, dict):
        return state
    lm = state.get("lm")
    kept = {name: _without_api_settings(part) for name, part in state.items()}
    if isinstance(lm, dict):
        kept["lm"] = {name: value for name, value in lm.items() if not name.startswith("api_")}
    return kept


def _short_repr(value: Any, _: Redactor) -> str:
    return repr(value)[:LONG_TEXT]


_FOREIGN: dict[tuple[str, str], _Reader] = {
    ("pandas", "DataFrame"): _Reader(_IS_FILE, _data_frame_csv, ".csv"),
    ("polars", "DataFrame"): _Reader(_IS_FILE, _data_frame_csv, ".csv"),
    ("matplotlib", "Figure"): _Reader(_IS_FILE, _pyplot_png, ".png"),
    ("plotly", "BaseFigure"): _Reader(_IS_FILE, _plotly_html, ".html"),
    ("PIL", "Image"): _Reader(_IS_FILE, _pillow_png, ".png"),
    ("dspy", "Module"): _Reader(_IS_FILE, _module_state, ".json"),
    # Their own dumps hold a whole file as base64; the repr says what it was.
    ("dspy", "Image"): _Reader(_IS_FILE, _short_repr, ".txt"),
    ("dspy", "Audio"): _Reader(_IS_FILE, _short_repr, ".txt"),
}
