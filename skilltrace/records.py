"""What stands in a journal: one frozen record for each thing that happened to a run, one JSON line each.

These types cross every boundary of skilltrace: a decorated call writes them, delivery reads nothing else. All times are
nanoseconds since the epoch (`ns`), except a metric's timestamp, which is MLflow's milliseconds.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import msgspec


class Target(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a run goes: the store (without credentials) and the experiment in it, by id or by name."""

    uri: str
    experiment: str | None = None
    experiment_id: str | None = None
    artifact_location: str | None = None


class Metric(msgspec.Struct, frozen=True, array_like=True):
    """One metric point. JSON has no NaN or inf, so `value` is then the text of the float."""

    key: str
    value: float | str
    timestamp: int
    step: int = 0

    @classmethod
    def of(cls, key: str, value: float, timestamp: int, step: int = 0) -> Metric:
        """A point whose value survives JSON."""
        return cls(key, value if math.isfinite(value) else str(value), timestamp, step)


class Artifact(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file of a run: `path` is its place in MLflow; one of the other fields has its content.

    `json` is kept as a tree, so that it is encoded once, with the record; `blob` names a file in the journal's folder.
    """

    path: str
    text: str | None = None
    json: Any = msgspec.UNSET
    data: bytes | None = None
    blob: str | None = None


class Turn(msgspec.Struct, frozen=True):
    """One turn of a conversation, as `log_turn` takes it."""

    role: str
    content: Any
    ns: int


class ProcessStarted(msgspec.Struct, frozen=True, tag="process"):
    """The first line of each journal: who writes it, and the tags that MLflow puts on each run (user and source)."""

    ns: int
    version: str
    pid: int
    tags: dict[str, str]


class RunStarted(msgspec.Struct, frozen=True, tag="start", omit_defaults=True):
    """A call of something tracked began."""

    key: str
    ns: int
    name: str
    kind: str
    target: Target
    parent: str | None = None
    tags: dict[str, str] = {}
    params: dict[str, str] = {}


class Logged(msgspec.Struct, frozen=True, tag="log", omit_defaults=True):
    """Something was logged to a run. After its end `target` says where the run is to be found."""

    key: str
    ns: int
    target: Target | None = None
    metrics: list[Metric] = []
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    artifacts: list[Artifact] = []
    turns: list[Turn] = []


class RunEnded(msgspec.Struct, frozen=True, tag="end", omit_defaults=True):
    """The call returned or raised: `status` is MLflow's FINISHED, FAILED or KILLED."""

    key: str
    ns: int
    status: str
    metrics: list[Metric] = []
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    artifacts: list[Artifact] = []
    traces: list[str] = []


Record: TypeAlias = ProcessStarted | RunStarted | Logged | RunEnded

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def encode(record: Record) -> bytes:
    """One line of a journal, its newline included."""
    try:
        return _encoder.encode(record) + b"\n"
    except UnicodeEncodeError:
        # Half of a surrogate pair: text that no UTF-8 file can hold. It is rare, so only then is it looked for.
        return _encoder.encode(_without_surrogates(msgspec.to_builtins(record))) + b"\n"


def decode(line: bytes) -> Record:
    """The record of one line; `msgspec.DecodeError` (or its subclass for a wrong shape) where it is none."""
    return _decoder.decode(line)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_surrogates(item) for item in value]
    return value
