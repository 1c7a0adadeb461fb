"""The errors that skilltrace raises, and only from calls that the user makes to skilltrace itself.

SkilltraceError
├── ConfigurationError   a setting or a decorator's option has a bad value
├── JournalError         the journal cannot be opened or read
├── DeliveryError        something that waits for MLflow did not get its answer
└── ArtifactError        an artifact cannot be logged as asked
"""

from __future__ import annotations


class SkilltraceError(Exception):
    """Base of all errors of skilltrace."""


class ConfigurationError(SkilltraceError, ValueError):
    """A setting or an option has a bad value; the message names it and says what is accepted."""


class JournalError(SkilltraceError):
    """The journal of this process cannot be opened or read."""


class DeliveryError(SkilltraceError):
    """MLflow did not give what was waited for, within the time or at all."""


class ArtifactError(SkilltraceError):
    """An artifact cannot be logged as asked."""
