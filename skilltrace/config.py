"""The settings: one table, one resolver (argument, then environment, then default), one place that holds the result."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import platformdirs

from skilltrace.errors import ConfigurationError
from skilltrace.faults import warn_once
from skilltrace.records import Target
from skilltrace.redaction import Redact, Redactor, without_credentials

EMBEDDED_URI = "sqlite:///mlflow.db"
EMBEDDED_ARTIFACTS = "mlartifacts"
DEFAULT_EXPERIMENT = "skilltrace"
UI_PORT = 5001


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `configure` resolved. See there for the meaning of each.

    Attributes:
        target: Where runs go unless a job says otherwise.
        redactor: What keeps secrets out, made from `redact`.
    """

    experiment: str | None
    tracking_uri: str = field(repr=False)  # with its credentials; `target` has it without
    artifact_location: str | None
    tags: Mapping[str, str]
    autolog: bool
    enabled: bool
    redact: Redact
    spool_dir: Path
    max_artifact_bytes: int
    delivery: str
    flush_timeout: float
    target: Target = field(init=False)
    redactor: Redactor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "redactor", Redactor(self.redact))
        object.__setattr__(self, "target", self.target_for(None))

    def target_for(self, experiment: str | None) -> Target:
        """Where a job goes: its own experiment if it has one, else the configured one."""
        name, by_id = experiment or self.experiment, None
        if name is None:
            # mlflow.set_experiment leaves the choice there for child processes; so a user's own call is followed.
            by_id = os.environ.get("MLFLOW_EXPERIMENT_ID")
            name = None if by_id else DEFAULT_EXPERIMENT
        return Target(
            uri=without_credentials(self.tracking_uri),
            experiment=name,
            experiment_id=by_id,
            artifact_location=self.artifact_location,
        )


_settings: Settings | None = None
_lock = threading.Lock()
_on_change: list[Callable[[Settings], None]] = []


def configure(
    experiment: str | None = None,
    *,
    tracking_uri: str | os.PathLike[str] | None = None,
    artifact_location: str | None = None,
    tags: Mapping[str, str] | None = None,
    autolog: bool | None = None,
    enabled: bool | None = None,
    redact: Redact = None,
    spool_dir: str | os.PathLike[str] | None = None,
    max_artifact_bytes: int | None = None,
    delivery: str | None = None,
    flush_timeout: float | None = None,
) -> Settings:
    """Set skilltrace up. Calling it is optional; each value is the argument, else the environment's, else a default.

    It may be called again: each call stands for itself, and runs that are open keep what they were opened with.

    Args:
        experiment: MLflow experiment, created when it is first needed. Environment: `MLFLOW_EXPERIMENT_NAME`. Default:
            the one that `mlflow.set_experiment` chose, else `"skilltrace"`.
        tracking_uri: MLflow tracking URI. Environment: `MLFLOW_TRACKING_URI`, then `MLFLOW_BACKEND_STORE_URI`. Default:
            the embedded store `sqlite:///mlflow.db`. A relative path is made absolute now.
        artifact_location: Where a new experiment keeps its artifacts (a path or URI). Environment:
            `SKILLTRACE_ARTIFACT_LOCATION`. Default: `./mlartifacts` for a database, the server's choice for a server.
        tags: Tags for each run. Environment: `SKILLTRACE_TAGS`, as `key=value,key=value`.
        autolog: Turn on `mlflow.dspy.autolog` (traces, compiles, evaluations), so that a run has the traces made inside
            it; this points MLflow's own API at the same store and experiment. It happens here if DSPy is imported, else
            at the first tracked run. Environment: `SKILLTRACE_AUTOLOG`. Default: True.
        enabled: False makes each decorator a plain call. Environment: `SKILLTRACE_ENABLED`. Default: True.
        redact: More secrets: names (str) and compiled patterns, or a function of (name, value) that returns what to
            record. Environment: `SKILLTRACE_REDACT`, names separated by commas.
        spool_dir: Folder of the journals. Environment: `SKILLTRACE_SPOOL_DIR`. Default: the user's state folder.
        max_artifact_bytes: A file made from a result is cut at this size, in bytes. Environment:
            `SKILLTRACE_MAX_ARTIFACT_BYTES`. Default: 10 MiB.
        delivery: `"thread"` delivers from this process in the background; `"external"` only writes the journal, for
            `skilltrace sync`. Environment: `SKILLTRACE_DELIVERY`.
        flush_timeout: Seconds that `flush`, `shutdown` and the end of the process wait for MLflow at most. Environment:
            `SKILLTRACE_FLUSH_TIMEOUT`. Default: 10.

    Returns:
        The settings in force.

    Raises:
        ConfigurationError: where a value is not usable; the message names the setting, and nothing is changed.

    Example:
        >>> import skilltrace
        >>> settings = skilltrace.configure("docs", tracking_uri="http://127.0.0.1:5001", autolog=False)
        >>> settings.target.experiment
        'docs'
    """
    global _settings
    given = {
        "experiment": experiment,
        "tracking_uri": tracking_uri,
        "artifact_location": artifact_location,
        "tags": tags,
        "autolog": autolog,
        "enabled": enabled,
        "redact": redact,
        "spool_dir": spool_dir,
        "max_artifact_bytes": max_artifact_bytes,
        "delivery": delivery,
        "flush_timeout": flush_timeout,
    }
    settings = _resolve({name: value for name, value in given.items() if value is not None})
    with _lock:
        _settings = settings
    for listener in _on_change:
        listener(settings)
    return settings


def current() -> Settings:
    """The settings in force; resolved from the environment where `configure` was not called.

    A bad value in the environment does not raise here, inside somebody's call: it is said, and the default stands in.
    """
    global _settings
    settings = _settings
    if settings is None:
        with _lock:
            if _settings is None:
                _settings = _resolve({}, forgiving=True)
            settings = _settings
    return settings


def reset() -> None:
    """Forget what was configured, so that the next use resolves anew."""
    global _settings
    with _lock:
        _settings = None


def on_change(listener: Callable[[Settings], None]) -> None:
    """Have a function called with the new settings after each `configure`."""
    _on_change.append(listener)


def _resolve(given: Mapping[str, Any], *, forgiving: bool = False) -> Settings:
    values: dict[str, Any] = {}
    for setting in fields(Settings):
        if not setting.init:
            continue
        variables, parse, check, default = _TABLE[setting.name]
        variable = ""
        try:
            if setting.name in given:
                values[setting.name] = check(given[setting.name])
                continue
            text, variable = next(((os.environ[name], name) for name in variables if os.environ.get(name)), (None, ""))
            values[setting.name] = check(default() if text is None else parse(text))
        except (ValueError, TypeError, OSError, RuntimeError) as error:  # also a `~` or a folder that cannot be found
            source = "" if setting.name in given else f" (from {variable})"
            message = f"{setting.name}{source}: {error}"
            if not forgiving:
                raise ConfigurationError(message) from None
            warn_once(("setting", setting.name), "%s. The default is used.", message)
            values[setting.name] = check(default())
    if values["artifact_location"] is None and _is_database(values["tracking_uri"]):
        values["artifact_location"] = str(Path(EMBEDDED_ARTIFACTS).absolute())
    return Settings(**values)


def _is_database(uri: str) -> bool:
    return uri.partition(":")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > 500:
        raise ValueError(f"must be a name of 1 to 500 characters, not {value!r:.100}")
    return value


def _experiment(value: Any) -> str | None:
    return None if value is None else _name(value)


_SCHEMES = frozenset(  # MLflow's own
    {"http", "https", "sqlite", "postgresql", "mysql", "mssql", "file", "databricks", "databricks-uc", "uc"}
    | {"s3", "gs", "wasbs", "abfss", "hdfs", "dbfs"}
)


def _uri(value: Any) -> str:
    """A tracking URI that MLflow can open, with its relative path made absolute."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a tracking URI such as 'http://127.0.0.1:5000' or 'sqlite:///mlflow.db': {value!r}")
    sqlite = re.fullmatch(r"(sqlite(?:\+\w+)?):///(?!/)(.+)", value)
    if sqlite:
        path, question, query = sqlite[2].partition("?")
        return value if path == ":memory:" else f"{sqlite[1]}:///{Path(path).absolute()}{question}{query}"
    scheme, separator, _ = value.partition(":")
    if not separator or "/" in scheme or len(scheme) == 1:
        return str(Path(value).expanduser().absolute()) if value != "databricks" else value
    dialect = scheme.partition("+")[0].lower()
    if dialect not in _SCHEMES and not any(
        entry.name == dialect for entry in entry_points(group="mlflow.tracking_store")
    ):
        raise ValueError(f"MLflow has no tracking store for {scheme!r} URIs; http, https and sqlite are the usual ones")
    try:
        parts = urlsplit(value)
        _ = parts.port  # raises where it is no number
    except ValueError as error:
        raise ValueError(f"{without_credentials(value)!r} is no URI: {error}") from None
    if dialect in ("http", "https") and not parts.hostname:
        raise ValueError(f"{without_credentials(value)!r} names no host")
    return value.rstrip("/") if dialect in ("http", "https") else value


def _location(value: Any) -> str | None:
    if value is None:
        return None
    text = os.fspath(value)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"must be a path or URI, not {value!r}")
    return text if re.match(r"[A-Za-z][\w+.-]+:", text) else str(Path(text).expanduser().absolute())


def _tags(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
        raise ValueError(f"must be a mapping from names to values, not {value!r}")
    return {key: str(item) for key, item in value.items()}


def _parse_tags(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
    if not all(separator and key.strip() for key, separator, _ in pairs):
        raise ValueError(f"must look like key=value,key=value, not {text!r}")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"must be True or False, not {value!r}")
    return value


def _parse_flag(text: str) -> bool:
    flags = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    try:
        return flags[text.strip().lower()]
    except KeyError:
        raise ValueError(f"must be true or false, not {text!r}") from None


def _redact(value: Any) -> Redact:
    readable = isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and not callable(value)
    redact: Any = tuple(value) if readable else value  # a generator can be read once only
    Redactor(redact)  # raises where it cannot be used
    checked: Redact = redact
    return checked


def _folder(value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError(f"must be a folder, not {value!r}")
    path = Path(value).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is no folder")
    return path


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1024:
        raise ValueError(f"must be a number of bytes, 1024 or more, not {value!r}")
    return value


def _delivery(value: Any) -> str:
    if value not in ("thread", "external"):
        raise ValueError(f"must be 'thread' or 'external', not {value!r}")
    return str(value)


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"must be a number of seconds, 0 or more, not {value!r}")
    return float(value)


def _nothing() -> None:
    return None


# Each setting: the environment's variables in order, how their text is read, the check, the default.
_TABLE: dict[str, tuple[tuple[str, ...], Callable[[str], Any], Callable[[Any], Any], Callable[[], Any]]] = {
    "experiment": (("MLFLOW_EXPERIMENT_NAME",), str, _experiment, _nothing),
    "tracking_uri": (("MLFLOW_TRACKING_URI", "MLFLOW_BACKEND_STORE_URI"), str, _uri, lambda: EMBEDDED_URI),
    "artifact_location": (("SKILLTRACE_ARTIFACT_LOCATION",), str, _location, _nothing),
    "tags": (("SKILLTRACE_TAGS",), _parse_tags, _tags, dict),
    "autolog": (("SKILLTRACE_AUTOLOG",), _parse_flag, _flag, lambda: True),
    "enabled": (("SKILLTRACE_ENABLED",), _parse_flag, _flag, lambda: True),
    "redact": (
        ("SKILLTRACE_REDACT",),
        lambda text: [name.strip() for name in text.split(",") if name.strip()],
        _redact,
        _nothing,
    ),
    "spool_dir": (
        ("SKILLTRACE_SPOOL_DIR",),
        str,
        _folder,
        lambda: platformdirs.user_state_path("skilltrace") / "spool",
    ),
    "max_artifact_bytes": (("SKILLTRACE_MAX_ARTIFACT_BYTES",), int, _size, lambda: 10 * 2**20),
    "delivery": (("SKILLTRACE_DELIVERY",), str, _delivery, lambda: "thread"),
    "flush_timeout": (("SKILLTRACE_FLUSH_TIMEOUT",), float, _seconds, lambda: 10.0),
}
