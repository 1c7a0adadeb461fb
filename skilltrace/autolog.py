"""Turning on `mlflow.dspy.autolog`: once for each store and experiment, when DSPy is there and MLflow answers.

Not before it answers: with autologging on, MLflow asks the store for things on the thread of the user's call, and with
a server that is down that call would hang for minutes. Then it is turned on when delivery first succeeds.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from skilltrace import config, delivery, dspy_bridge, mlflow_bridge, spool
from skilltrace.artifact import JsonTree
from skilltrace.config import Settings
from skilltrace.faults import report, warn_once
from skilltrace.mlflow_bridge import Refused, Store, Unavailable
from skilltrace.records import Target

_PROBE = 1.0  # seconds within which a server must have answered to be waited for
_PATIENCE = 15.0  # seconds to wait for a server that has answered: MLflow is imported, and asked for the experiment
_PATIENCE_LOCAL = 60.0  # seconds to wait for a database file: a new one gets its schema

options: Mapping[str, bool] = {}
"""Arguments of `mlflow.dspy.autolog`, other than its defaults here; they hold until it is turned off."""

_attempt: _Attempt | None = None  # the latest: what is wanted
_done: tuple[Target, Mapping[str, bool]] | None = None  # what is on
_lock = threading.Lock()  # for replacing the attempt
_turning = threading.Lock()  # for changing what is on; held only after MLflow has answered


class _Attempt:
    """Turns autologging on in a thread of its own, which may go on when nobody waits for it any longer.

    Args:
        settings: Where traces go.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.goal = (settings.target, options)
        self._began = time.monotonic()
        self._waited = False
        self._answers = False
        self._probed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="skilltrace-autolog", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wait(self) -> None:
        """Wait until autologging is on; not for a server that is down."""
        if self._waited:
            return
        waited = time.monotonic() - self._began
        if self._probed.wait(max(0.0, _PROBE - waited)) and self._answers:
            patience = _PATIENCE if self.settings.tracking_uri.startswith("http") else _PATIENCE_LOCAL
            self._thread.join(max(0.0, patience - waited))
        self._waited = True

    def _run(self) -> None:
        try:
            self._answers = mlflow_bridge.answers(self.settings.tracking_uri, _PROBE)
        finally:
            self._probed.set()
        self.turn_on()

    def turn_on(self) -> bool:
        """Turn autologging on, if MLflow answers and it is still wanted; False where it is worth another try."""
        global _done
        settings, (target, arguments) = self.settings, self.goal
        try:
            with _turning:
                if _done == self.goal:
                    _done = self.goal
                    return True
                _turn_off()  # traces for this store must not go to the one before
            mlflow_bridge.know(settings.tracking_uri)
            store = Store(target.uri, spool.opening(settings.tracking_uri, settings.spool_dir))
            store.experiment_id(target)
            with _turning:
                if _attempt is self and _done != self.goal:
                    mlflow_bridge.autolog(
                        store, target, run=dspy_bridge.turn_autologging_on, redact=_redact, options=arguments
                    )
                    _done = self.goal
                if _attempt is not self:
                    _turn_off()  # it was called off meanwhile
        except (Unavailable, Refused) as error:
            warn_once(
                ("autolog", target.uri),
                "mlflow.dspy.autolog is off until MLflow answers, so traces are not made: %s",
                error,
            )
            return isinstance(error, Refused)
        except Exception:
            report("turn on mlflow.dspy.autolog")
        return True


def _redact(values: dict[str, Any]) -> dict[str, Any]:
    settings = config.current()
    redacted: dict[str, Any] = JsonTree(settings.redactor, settings.max_artifact_bytes).of(values)
    return redacted


def ensure(settings: Settings) -> bool:
    """Have autologging on for these settings, as far as that can be now. Never raises.

    The first call for new settings waits for MLflow, if that answers at all; later ones do not wait.

    Returns:
        Whether it is on.
    """
    global _attempt
    if not (settings.autolog and settings.enabled and dspy_bridge.loaded()):
        return False
    attempt = _attempt
    if attempt is None or attempt.settings is not settings:
        try:
            with _lock:
                attempt = _attempt
                if attempt is None or attempt.settings is not settings:
                    attempt = _attempt = _Attempt(settings)
                    attempt.start()
        except RuntimeError:
            return False  # no thread can be started while the interpreter ends
    attempt.wait()
    return _done is attempt.goal


def disable() -> None:
    """Turn autologging off where it was turned on here. Never raises."""
    global _attempt, options
    with _lock:
        _attempt, options = None, {}
    if not _turning.acquire(timeout=_PROBE):
        return  # the attempt that is under way will see that it is no longer wanted
    try:
        _turn_off()
    except Exception:
        report("turn off mlflow.dspy.autolog")
    finally:
        _turning.release()


def _turn_off() -> None:
    global _done
    if _done is not None:
        _done = None
        mlflow_bridge.disable_autolog(dspy_bridge.turn_autologging_off)


def _configured(settings: Settings) -> None:
    if settings.autolog and settings.enabled:
        ensure(settings)
    else:
        disable()


def _mlflow_answered() -> bool:
    attempt = _attempt
    return attempt is None or _done is attempt.goal or attempt.turn_on()


def _after_fork_in_child() -> None:
    global _attempt, _lock, _turning
    _attempt, _lock, _turning = None, threading.Lock(), threading.Lock()  # the thread of the attempt is the parent's


config.on_change(_configured)
delivery.on_available.append(_mlflow_answered)
os.register_at_fork(after_in_child=_after_fork_in_child)
