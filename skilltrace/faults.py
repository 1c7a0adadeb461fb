"""What happens when skilltrace itself goes wrong: it is said once, and the user's code goes on.

Two kinds are told apart. A `warn_once` is about the user's input or machine (a template with no value, a full disk)
and says what to do. A `report` is our own fault: it carries the traceback and asks for a bug report.
"""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("skilltrace")

_ISSUES = "the issue tracker of skilltrace"
_said: set[object] = set()
_strict = False


def warn_once(key: object, message: str, *args: object) -> None:
    """Log a warning the first time that `key` is seen in this process."""
    if key not in _said:
        # Bounded: keys may hold the user's own strings, and a service runs for months.
        if len(_said) > 10_000:
            _said.clear()
        _said.add(key)
        _log(logging.WARNING, message, *args)


def report(doing: str) -> None:
    """Log the exception being handled as a fault of skilltrace's, once per kind; raise it again in strict mode."""
    exception = sys.exc_info()[1]
    if _strict and exception is not None:
        raise exception
    key = (doing, type(exception))
    if key not in _said:
        _said.add(key)
        _log(
            logging.ERROR,
            "skilltrace failed to %s; your code is not affected, but this is not recorded. "
            "Please report it to %s with the traceback below. (Said once per kind of fault.)",
            doing,
            _ISSUES,
            exc_info=True,
        )


def _log(level: int, message: str, *args: object, exc_info: bool = False) -> None:
    # It is called where something went wrong already, at the end of the stack perhaps: it must not raise in its turn.
    with suppress(Exception):
        logger.log(level, message, *args, exc_info=exc_info)


@contextmanager
def strict() -> Iterator[None]:
    """Raise skilltrace's own faults instead of logging them: for tests."""
    global _strict
    before, _strict = _strict, True
    try:
        yield
    finally:
        _strict = before


def forget() -> None:
    """Forget what has been said, so that it is said again: for tests."""
    _said.clear()
