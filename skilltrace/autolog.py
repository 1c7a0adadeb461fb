"""Turning on `mlflow.dspy.autolog`: once for each store and experiment, when DSPy is there and MLflow answers.

Not before it answers: with autologging on, MLflow asks the store for the experiment on the thread of the user's call,
and with a server that is down that call would hang for minutes. Then it is turned on when delivery first succeeds.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from skilltrace import config, delivery, dspy_bridge, mlflow_bridge
from skilltrace.config import Settings
from skilltrace.faults import report, warn_once
from skilltrace.mlflow_bridge import Refused, Store, Unavailable
from skilltrace.records import Target

_LOCAL_PATIENCE = 60.0  # seconds to wait for a local database: its first use creates the schema
_REMOTE_PATIENCE = 3.0  # seconds to wait for a server, once

_done: tuple[Target, Mapping[str, bool]] | None = None
_wanted: tuple[Settings, Mapping[str, bool]] | None = None
_lock = threading.Lock()


def ensure(settings: Settings, options: Mapping[str, bool] | None = None) -> bool:
    """Have autologging on for these settings, as far as that can be now. Never raises.

    Args:
        settings: Where traces go.
        options: Arguments of `mlflow.dspy.autolog` other than its defaults here.

    Returns:
        Whether it is on.
    """
    global _wanted
    if not settings.autolog or not settings.enabled:
        return False
    wanted = _wanted
    if options is None and wanted is not None and wanted[0] is settings:
        return _done is not None  # asked for already: it is on, or waits for MLflow
    with _lock:
        if not dspy_bridge.loaded():
            return False
        _wanted = (settings, options or {})
    # In a thread of its own, which may go on when the wait is over: the import alone takes more than a second.
    thread = threading.Thread(target=_turn_on, name="skilltrace-autolog", daemon=True)
    thread.start()
    thread.join(_REMOTE_PATIENCE if settings.tracking_uri.startswith("http") else _LOCAL_PATIENCE)
    return _done is not None and _done[0] == settings.target


def disable() -> None:
    """Turn autologging off where it was turned on here."""
    global _done, _wanted
    with _lock:
        done, _done, _wanted = _done, None, None
        if done is not None:
            mlflow_bridge.disable_autolog(dspy_bridge.without_owning)


def _turn_on() -> None:
    global _done
    with _lock:
        if _wanted is None:
            return
        settings, options = _wanted
        if _done == (settings.target, options):
            return
        try:
            mlflow_bridge.know(settings.tracking_uri)
            store = Store(settings.target.uri, delivery.opening(settings.tracking_uri, settings.spool_dir))
            mlflow_bridge.autolog(store, settings.target, allowed=dspy_bridge.without_owning, options=options)
            _done = (settings.target, options)
        except (Unavailable, Refused) as error:
            warn_once(
                ("autolog", settings.target.uri),
                "mlflow.dspy.autolog is off until MLflow answers, so traces are not made: %s",
                error,
            )
        except Exception:
            report("turn on mlflow.dspy.autolog")


def _configured(settings: Settings) -> None:
    ensure(settings)


config.on_change(_configured)
delivery.on_available.append(_turn_on)
