"""LM usage: what one entry of DSPy's history says, and the sums that a run keeps.

No DSPy is imported here: an entry is a mapping, and its keys differ between versions as noted below.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


@dataclass
class LMUsage:
    """The LM calls made inside a run, its children included.

    Attributes:
        calls: Calls made, cached and failed ones included.
        calls_cached: Calls that DSPy's cache answered.
        calls_failed: Calls that raised.
        tokens_input: Prompt tokens that a provider billed.
        tokens_output: Completion tokens that a provider billed.
        tokens_total: Their sum, as the provider reports it.
        tokens_reasoning: Of the output, those spent on reasoning.
        tokens_cached: Of the input, those that the provider read from its prompt cache.
        duration: Seconds, summed over the calls (so concurrent calls may add up to more than the run took).
        cost: US dollars, or None where no price is known.
        by_model: The same figures for each model, by DSPy's name of it (`"openai/gpt-4o-mini"`).

    Example:
        >>> usage = LMUsage(calls=1, tokens_input=10, tokens_output=2, tokens_total=12)
        >>> usage.metrics()["lm_tokens_total"]
        12
    """

    calls: int = 0
    calls_cached: int = 0
    calls_failed: int = 0
    tokens_input: int = 0
    tokens_output: int = 0
    tokens_total: int = 0
    tokens_reasoning: int = 0
    tokens_cached: int = 0
    duration: float = 0.0
    cost: float | None = None
    by_model: dict[str, LMUsage] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """The figures under the names of their MLflow metrics; `lm_cost` only where it is known."""
        metrics: dict[str, float] = {
            "lm_calls": self.calls,
            "lm_calls_cached": self.calls_cached,
            "lm_calls_failed": self.calls_failed,
            "lm_tokens_input": self.tokens_input,
            "lm_tokens_output": self.tokens_output,
            "lm_tokens_total": self.tokens_total,
            "lm_tokens_reasoning": self.tokens_reasoning,
            "lm_tokens_cached": self.tokens_cached,
            "lm_duration": self.duration,
        }
        if self.cost is not None:
            metrics["lm_cost"] = self.cost
        return metrics

    def _add(self, call: LMCall) -> None:
        self.calls += 1
        self.calls_cached += call.cached
        self.calls_failed += call.failed
        self.tokens_input += call.tokens_input
        self.tokens_output += call.tokens_output
        self.tokens_total += call.tokens_total
        self.tokens_reasoning += call.tokens_reasoning
        self.tokens_cached += call.tokens_cached
        self.duration += call.duration
        if call.cost is not None:
            self.cost = (self.cost or 0.0) + call.cost


class LMCall(NamedTuple):
    """The figures of one LM call."""

    model: str
    duration: float = 0.0
    cached: bool = False
    failed: bool = False
    tokens_input: int = 0
    tokens_output: int = 0
    tokens_total: int = 0
    tokens_reasoning: int = 0
    tokens_cached: int = 0
    cost: float | None = None


def read_entry(entry: Any, *, duration: float = 0.0) -> LMCall:
    """The figures of one entry of DSPy's history, for a call that took `duration` seconds.

    Known shapes (DSPy 3.1.2 to 3.4.1): usage under `prompt_tokens`/`completion_tokens`, or `input_tokens`/
    `output_tokens` (`model_type="responses"` before 3.4), or not a mapping at all (`DummyLM` of 3.1.2 gives 0); the
    details are objects before 3.4 and mappings since. An answer from the cache still carries the original's cost.
    """
    name = str(_get(entry, "model") or "unknown")
    usage = _get(entry, "usage")
    tokens_input = _count(usage, "prompt_tokens", "input_tokens")
    tokens_output = _count(usage, "completion_tokens", "output_tokens")
    tokens_total = _count(usage, "total_tokens") or tokens_input + tokens_output
    if _from_cache(_get(entry, "response"), tokens_total):
        return LMCall(name, duration, cached=True, cost=0.0)
    cost = _get(entry, "cost")
    return LMCall(
        name,
        duration,
        tokens_input=tokens_input,
        tokens_output=tokens_output,
        tokens_total=tokens_total,
        tokens_reasoning=_count(
            _get(usage, "completion_tokens_details") or _get(usage, "output_tokens_details"), "reasoning_tokens"
        ),
        tokens_cached=_count(
            _get(usage, "prompt_tokens_details") or _get(usage, "input_tokens_details"), "cached_tokens"
        ),
        cost=float(cost) if isinstance(cost, (int, float)) and math.isfinite(cost) else None,
    )


def _from_cache(response: Any, tokens: int) -> bool:
    members = response if isinstance(response, (tuple, list)) else (response,)
    if any(_get(member, "cache_hit") is True for member in members):
        return True
    # DSPy 3.4 sets no flag: the entry's usage is empty while the stored response still has its own.
    return not tokens and any(
        _count(_get(member, "usage"), "total_tokens", "completion_tokens", "output_tokens") for member in members
    )


def _get(source: Any, name: str) -> Any:
    return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)


def _count(source: Any, *names: str) -> int:
    for name in names:
        value = _get(source, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return int(value)
    return 0


class Strays:
    """The LM calls of this process that came when no run was open for them, counted.

    Attributes:
        late: Calls that came after the end of the run that they were made in.
        unattributed: Calls made where no run could be found.
    """

    def __init__(self) -> None:
        self.late = 0
        self.unattributed = 0
        self._lock = threading.Lock()

    def add(self, *, late: int = 0, unattributed: int = 0) -> None:
        """Count some more; from any thread."""
        with self._lock:
            self.late += late
            self.unattributed += unattributed


strays = Strays()


class Meter:
    """Adds up the calls of one run; from any thread, at any time."""

    def __init__(self) -> None:
        self.usage = LMUsage()
        self.settings: dict[str, list[str]] = {}  # lm.model, lm.temperature, …: the values used, in order
        self._open = True
        self._lock = threading.Lock()

    def add(self, call: LMCall, settings: Mapping[str, Any]) -> bool:
        """Count a call; False where the run has ended and its figures are written already."""
        with self._lock:
            if self._open:
                self._add(call, settings)
            return self._open

    def add_late(self, call: LMCall, settings: Mapping[str, Any], view: Callable[[LMUsage], T]) -> T:
        """Count a call all the same; returns what `view` makes of the figures then."""
        with self._lock:
            self._add(call, settings)
            return view(self.usage)

    def _add(self, call: LMCall, settings: Mapping[str, Any]) -> None:
        self.usage._add(call)
        by_model = self.usage.by_model.get(call.model)
        if by_model is None:
            by_model = self.usage.by_model[call.model] = LMUsage()
        by_model._add(call)
        for name, value in settings.items():
            if value is not None:
                values = self.settings.setdefault(name, [])
                if (text := str(value)) not in values:
                    values.append(text)

    def close(self) -> LMUsage:
        """The final figures: from now on `add` takes no more."""
        with self._lock:
            self._open = False
            return self.usage
