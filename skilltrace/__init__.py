"""Instrumentation for DSPy programs, on MLflow: decorate, call as before, and the runs stand in MLflow.

Importing this imports neither MLflow nor DSPy: they load when they are first needed.
"""

from skilltrace import artifact
from skilltrace.config import Settings, configure
from skilltrace.delivery import DeliveryStatus
from skilltrace.errors import ArtifactError, ConfigurationError, DeliveryError, JournalError, SkilltraceError
from skilltrace.journal import flush, shutdown, status
from skilltrace.monitoring import MLflowContext, get_current_run_id, setup_dspy_autologging
from skilltrace.propagation import propagate
from skilltrace.run import (
    Run,
    current_run,
    log_artifact,
    log_dict,
    log_metric,
    log_metrics,
    log_param,
    log_params,
    log_text,
    log_turn,
    set_tag,
    set_tags,
)
from skilltrace.tracked import tracked_job, tracked_phase
from skilltrace.usage import LMUsage

__all__ = [
    "ArtifactError",
    "ConfigurationError",
    "DeliveryError",
    "DeliveryStatus",
    "JournalError",
    "LMUsage",
    "MLflowContext",
    "Run",
    "Settings",
    "SkilltraceError",
    "artifact",
    "configure",
    "current_run",
    "flush",
    "get_current_run_id",
    "log_artifact",
    "log_dict",
    "log_metric",
    "log_metrics",
    "log_param",
    "log_params",
    "log_text",
    "log_turn",
    "propagate",
    "set_tag",
    "set_tags",
    "setup_dspy_autologging",
    "shutdown",
    "status",
    "tracked_job",
    "tracked_phase",
]
