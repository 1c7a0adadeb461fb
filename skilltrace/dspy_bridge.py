"""The one module that knows DSPy: counting LM calls, carrying the current run into DSPy's threads, hooking modules.

Importing it imports no DSPy; it acts once DSPy is imported, by whomever. Three places of DSPy are used:

- `caller_modules`, in DSPy's context: the meter of each open run stands there as if it were a module, and gets the
  history entries of the calls made inside, in whichever of DSPy's threads they are made;
- a global callback, which tells how long each LM call took and which of them failed;
- `dspy.Module.__call__` and `acall`, wrapped once, which look for a mark on the module.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import wrapt

from skilltrace import mlflow_bridge
from skilltrace.faults import report, warn_once
from skilltrace.usage import LMCall, Meter, read_entry, strays

if TYPE_CHECKING:
    from skilltrace.run import Run

T = TypeVar("T")

_RUN = "_skilltrace_run"  # our key in DSPy's context

open_runs: set[str] = set()
"""The keys of the runs of this process that are open."""

_settings: Any = None  # dspy.dsp.utils.settings, once DSPy is imported
_callback: Any = None
_on_import: list[Callable[[], None]] = []


class _Collector:
    """A run's meter, as DSPy sees it: a module whose history takes entries and is always empty."""

    __slots__ = ("meter", "run")

    def __init__(self, run: Run, meter: Meter) -> None:
        self.run = run
        self.meter = meter

    @property
    def history(self) -> _Collector:
        return self

    def __len__(self) -> int:
        return 0

    def append(self, entry: Any) -> None:
        # DSPy calls this in the middle of the user's LM call: nothing may come out of here.
        try:
            call = _calls.get(_active_call_id.get())
            if call is None:  # our callback was not there when it began: `dspy.context(callbacks=[…])` inside a run
                figures, settings = read_entry(entry), _lm_settings(entry.get("kwargs") or {})
            elif call.made_of_others:
                return
            else:
                call.recorded = True
                figures, settings = read_entry(entry, duration=call.seconds()), call.settings
            self.add(figures, {"lm.model": figures.model, **settings}, call.collectors if call is not None else None)
        except Exception:
            report("count an LM call")

    def add(self, call: LMCall, settings: Mapping[str, Any], collectors: list[_Collector] | None) -> None:
        """Count a call that was made inside the runs of `collectors` (None: those of this context), this one's too."""
        if self.meter.add(call, settings):
            return
        # The run has ended. The nearest open one around it counts the call by itself; the outermost, where none is.
        if (collectors or _collectors())[-1] is self:  # once for each call, not for each run around it
            strays.add(late=1)
            warn_once(
                ("late", self.run.kind, self.run.name),
                "An LM call made in the %s %r came after its end: it counts for the nearest open run around it. "
                "skilltrace.status().lm_calls_late counts such calls. (Said once for each name.)",
                self.run.kind,
                self.run.name,
            )
        if self.run.parent is None:
            self.run.add_late(call, settings)

    # DSPy copies and pickles its context in places; a copy that counted would count twice.
    def __deepcopy__(self, memo: dict[int, Any]) -> _Collector:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (list, ())


class _Pending:
    """One LM call between its start and its end."""

    __slots__ = ("collectors", "made_of_others", "model", "recorded", "settings", "started")

    def __init__(self, instance: Any, inputs: dict[str, Any], collectors: list[_Collector]) -> None:
        self.started = time.perf_counter()
        self.collectors = collectors
        # An LM that asks other LMs (a router, a subclass that calls its base) is not counted itself: they are.
        self.made_of_others = False
        self.recorded = False
        self.model = str(getattr(instance, "model", "unknown"))
        self.settings = _lm_settings({**(getattr(instance, "kwargs", None) or {}), **(inputs.get("kwargs") or {})})

    def seconds(self) -> float:
        return time.perf_counter() - self.started


def _lm_settings(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    most = kwargs.get("max_tokens")
    return {
        "lm.temperature": kwargs.get("temperature"),
        "lm.max_tokens": kwargs.get("max_completion_tokens") if most is None else most,  # reasoning models
    }


_calls: dict[str | None, _Pending] = {}
_active_call_id: Any = None


def loaded() -> bool:
    """Whether DSPy is imported (and all of it, not just begun)."""
    return _settings is not None


def load() -> None:
    """Import DSPy, which connects it."""
    import dspy  # noqa: F401


def is_module(value: Any) -> bool:
    """Whether the value is a `dspy.Module`, or a subclass of it."""
    if _settings is None:
        return False
    base = sys.modules["dspy"].Module
    return issubclass(value, base) if isinstance(value, type) else isinstance(value, base)


def on_import(action: Callable[[], None]) -> None:
    """Have a function called when DSPy has been imported, in the thread that did it; at once where it has been."""
    if _settings is not None:
        action()
    else:
        _on_import.append(action)


# --- the context of a run --------------------------------------------------------------------------------------------


def enter(run: Run) -> Any:
    """Make `run` the current one in DSPy's context; returns what `leave` needs."""
    if _settings is None:
        return None
    try:
        overrides = _settings.thread_local_overrides
        before = overrides.get()
        callers = before.get("caller_modules") or _settings.main_thread_config.get("caller_modules") or ()
        after = type(before)(before)
        after["caller_modules"] = [*callers, run.collector]
        after[_RUN] = run
        # Not dspy.context: it copies the whole global configuration into the context, so that a dspy.configure inside
        # the run would have no effect there.
        overrides.set(after)
        _ensure_callbacks()
        return before, after
    except Exception:
        report("enter a run in DSPy's context")
        return None


def leave(run: Run, token: Any) -> None:
    """Undo `enter`; in whatever context and order."""
    if _settings is None:
        return
    overrides = _settings.thread_local_overrides
    now = overrides.get()
    if token is not None and now is token[1]:
        overrides.set(token[0])
        return
    callers = now.get("caller_modules")
    if not callers or run.collector not in callers:
        return
    without = type(now)(now)
    without["caller_modules"] = [caller for caller in callers if caller is not run.collector] or None
    if without.get(_RUN) is run:
        without[_RUN] = run.parent
    overrides.set(without)


def current_run() -> Run | None:
    """The run of DSPy's context: its threads have that, and no other context variable of their parent."""
    return _settings.thread_local_overrides.get().get(_RUN) if _settings is not None else None


def recall(key: str) -> Any:
    """What `remember` has put into DSPy's context, or None."""
    return _settings.thread_local_overrides.get().get(key) if _settings is not None else None


def remember(key: str, value: Any) -> None:
    """Put something into DSPy's context, which its threads carry on."""
    if _settings is not None:
        overrides = _settings.thread_local_overrides
        now = overrides.get()
        overrides.set(type(now)({**now, key: value}))


def _collectors() -> list[_Collector]:
    callers = _settings.settings.caller_modules or ()
    return [caller for caller in callers if type(caller) is _Collector]


def collector(run: Run, meter: Meter) -> Any:
    """The object that stands for a run in `caller_modules`."""
    return _Collector(run, meter)


# --- the callback ----------------------------------------------------------------------------------------------------


def _ensure_callbacks() -> None:
    """Have MLflow's callback, where autologging is on, and behind it ours in the list that applies here.

    They are put into the list in place: `dspy.configure` would make this thread the only one allowed to configure DSPy.
    """
    callbacks, everywhere = _settings.settings.callbacks, _settings.main_thread_config["callbacks"]
    if callbacks is everywhere and callbacks and callbacks[-1] is _callback:
        return
    with _callbacks_lock:
        if callbacks is not everywhere:
            _follow_autologging(callbacks, everywhere)
        if _callback in callbacks:
            if not _of_mlflow(callbacks[callbacks.index(_callback) + 1 :]):
                return
            # A trace must have been started when we ask for its id.
            callbacks.remove(_callback)
        callbacks.append(_callback)


def _follow_autologging(callbacks: list[Any], everywhere: list[Any]) -> None:
    """A `dspy.context` has the callbacks of the time when it was entered; autologging goes on and off later."""
    there = _of_mlflow(everywhere)
    for callback in _of_mlflow(callbacks):
        if callback in _followed and callback not in there:
            callbacks.remove(callback)
    if there and not _of_mlflow(callbacks):
        callbacks.append(there[0])
        _followed.add(there[0])


def _of_mlflow(callbacks: list[Any]) -> list[Any]:
    return [callback for callback in callbacks if type(callback).__name__ == "MlflowCallback"]


_callbacks_lock = threading.Lock()
_followed: weakref.WeakSet[Any] = weakref.WeakSet()  # MLflow's callbacks that were put into a context


def _make_callback(base: type, lm_base: type) -> Any:
    class SkilltraceCallback(base):  # type: ignore[misc]  # its base is known only once DSPy is imported
        """Notes how long LM calls take, which fail, and which traces are made in which run."""

        def on_module_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            if isinstance(instance, lm_base):  # DSPy 3.1 announces an LM that is no dspy.LM as a module
                self.on_lm_start(call_id, instance, inputs)
            else:
                _note_trace()

        def on_module_end(self, call_id: str, outputs: Any | None, exception: BaseException | None = None) -> None:
            self.on_lm_end(call_id, outputs, exception)

        def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            collectors = _collectors()
            if collectors:
                _note_trace()
                around = _calls.get(_active_call_id.get())
                if around is not None:
                    around.made_of_others = True
                _calls[call_id] = _Pending(instance, inputs, collectors)
            else:
                _stray()

        def on_lm_end(self, call_id: str, outputs: Any | None, exception: BaseException | None = None) -> None:
            call = _calls.pop(call_id, None)
            if call is None or call.recorded or call.made_of_others:
                return
            # No entry came: it failed or was cancelled (then there are no outputs), or DSPy keeps no history.
            failed = exception is not None or outputs is None
            if not failed:
                warn_once(
                    "history",
                    "DSPy's history is off (disable_history or max_history_size=0): calls, failures and durations of "
                    "LM calls are counted, tokens and cost cannot be.",
                )
            figures = LMCall(call.model, call.seconds(), failed=failed)
            for collector in call.collectors:
                collector.add(figures, {"lm.model": call.model, **call.settings}, call.collectors)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return self

    return SkilltraceCallback()


def _stray() -> None:
    strays.add(unattributed=1)
    if open_runs:
        warn_once(
            "stray",
            "An LM call was made outside any run while runs were open: if it belongs to one, the thread that made it "
            "was started without the run's context. Start such threads with skilltrace.propagate(function). "
            "skilltrace.status().lm_calls_unattributed counts such calls. (Said once.)",
        )


def _note_trace() -> None:
    run = current_run()
    run = run.innermost_open() if run is not None else None
    if run is not None:
        trace_id = mlflow_bridge.active_trace_id()
        if trace_id is not None:
            run.note_trace(trace_id)


# --- dspy.configure belongs to the user ------------------------------------------------------------------------------


def without_owning(function: Callable[[], T]) -> T:
    """Run a function that calls `dspy.configure` so that it neither needs nor takes the right to do so.

    DSPy lets only the first thread (and task) that configures it do so again. `mlflow.dspy.autolog` configures it.
    """
    settings = _settings.settings
    cls = type(settings)
    original = cls._ensure_configure_allowed
    if not hasattr(original, "skilltrace"):

        @functools.wraps(original)
        def ensure_configure_allowed(self: Any) -> None:
            if not _exempt.get():
                original(self)

        ensure_configure_allowed.skilltrace = True  # type: ignore[attr-defined]
        cls._ensure_configure_allowed = ensure_configure_allowed
    exempt = _exempt.set(True)
    # In an empty DSPy context: configure would else copy what `dspy.context` set here into the global configuration.
    overrides = _settings.thread_local_overrides
    context = overrides.set(type(overrides.get())())
    try:
        return function()
    finally:
        overrides.reset(context)
        _exempt.reset(exempt)


_exempt: contextvars.ContextVar[bool] = contextvars.ContextVar("skilltrace_exempt", default=False)


def turn_autologging_on(function: Callable[[], Any]) -> None:
    """Run `mlflow.dspy.autolog`, without its side effects on the user: see `without_owning`, and `_NoUsageWarnings`."""
    tracked = _settings.main_thread_config["track_usage"]
    without_owning(function)
    if not tracked:
        _no_usage_warnings.active = True


def turn_autologging_off(function: Callable[[], Any]) -> None:
    """Undo `turn_autologging_on`; `function` turns off the rest."""
    without_owning(function)
    if _no_usage_warnings.active:
        _no_usage_warnings.active = False
        _settings.main_thread_config["track_usage"] = False


class _NoUsageWarnings(logging.Filter):
    """MLflow has DSPy track usage, which then warns at each call of a module that does not return a Prediction. Who has
    not asked for that tracking need not hear of it.
    """

    active = False

    def filter(self, record: logging.LogRecord) -> bool:
        return not (self.active and record.getMessage().startswith("Failed to set LM usage"))


_no_usage_warnings = _NoUsageWarnings()
logging.getLogger("dspy.primitives.module").addFilter(_no_usage_warnings)


# --- modules ---------------------------------------------------------------------------------------------------------


def hook_modules(
    marked: Callable[[Any], bool],
    call: Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
    acall: Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
) -> None:
    """Wrap `dspy.Module.__call__` and `acall`, once.

    Args:
        marked: Whether a module is tracked; asked at each call of any module, so it must be quick.
        call: Runs a tracked module: (module, the original method, unbound, args, kwargs).
        acall: The same, returning an awaitable.
    """
    base = sys.modules["dspy"].Module
    if hasattr(base.__call__, "skilltrace"):
        return
    original, aoriginal = base.__call__, base.acall

    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807  # DSPy looks at its caller's name
        return call(self, original, args, kwargs) if marked(self) else original(self, *args, **kwargs)

    @functools.wraps(aoriginal)
    async def tracked_acall(self: Any, *args: Any, **kwargs: Any) -> Any:
        if marked(self):
            return await acall(self, aoriginal, args, kwargs)
        return await aoriginal(self, *args, **kwargs)

    __call__.skilltrace = True  # type: ignore[attr-defined]
    base.__call__, base.acall = __call__, tracked_acall


def prediction_of(module: Any, result: Any) -> Any:
    """What a module's call amounts to: under GEPA's bootstrap tracing it returns a pair of that and the trace."""
    forward = module.__dict__.get("forward")
    if type(result) is tuple and getattr(forward, "__module__", None) == "dspy.teleprompt.bootstrap_trace":
        return result[0]
    return result


# --- at DSPy's import ------------------------------------------------------------------------------------------------


def _imported(_: Any) -> None:
    global _settings, _callback, _active_call_id
    try:
        import dspy.dsp.utils.settings
        from dspy.utils import callback

        _active_call_id = callback.ACTIVE_CALL_ID
        _callback = _make_callback(callback.BaseCallback, dspy.BaseLM)
        _settings = sys.modules["dspy.dsp.utils.settings"]
        for action in _on_import:
            action()
        _on_import.clear()
    except Exception:
        report("connect to DSPy")


wrapt.register_post_import_hook(_imported, "dspy")
