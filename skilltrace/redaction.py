"""Keeping secrets out of the journal: by the names of arguments and fields, and by known shapes in text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, TypeAlias

from skilltrace.errors import ConfigurationError
from skilltrace.faults import warn_once

MASK = "[redacted]"

Redact: TypeAlias = "Iterable[str | re.Pattern[str]] | Callable[[str, Any], Any] | None"
"""What `configure(redact=…)` takes: more names and patterns, or a function of (name, value) that returns the value."""

# A name is secret when one of its words (or two in a row) says so: `openai_api_key`, `X-Auth-Token`, `dbPassword`;
# but not `max_tokens`, `token_count` or `keyboard`.
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = frozenset(
    "password passwd passphrase pwd secret secrets authorization credential credentials apikey cookie cookies "
    "accesskey privatekey secretkey authtoken accesstoken bearer jwt".split()
)
_SECRET_PAIRS = frozenset({("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("auth", "key")})

# The shapes of well-known credentials. A literal beside each pattern says what must stand in a text for the pattern to
# match at all: looking for a few literals costs a microsecond, running the patterns over each text would cost hundreds.
_SHAPES: tuple[tuple[tuple[str, ...], re.Pattern[str], str], ...] = (
    (("sk-",), re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"), MASK),
    (("AKIA", "ASIA"), re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), MASK),
    (("gh", "github_pat_"), re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"), MASK),
    (("glpat-",), re.compile(r"\bglpat-[\w-]{16,}"), MASK),
    (("hf_", "gsk_"), re.compile(r"\b(?:hf|gsk)_[A-Za-z0-9]{20,}"), MASK),
    (("AIza",), re.compile(r"\bAIza[\w-]{30,}"), MASK),
    (("xox",), re.compile(r"\bxox[abeoprs]-[\w-]{10,}"), MASK),
    (("eyJ",), re.compile(r"\beyJ[\w-]{6,}\.[\w-]{6,}\.[\w-]*"), MASK),
    (("earer ", "EARER "), re.compile(r"(?i)(\bbearer )[\w.~+/=-]{8,}"), rf"\1{MASK}"),
    (("uthorization", "UTHORIZATION"), re.compile(r"(?i)(\bauthorization\W{1,4}basic )[\w+/=]{4,}"), rf"\1{MASK}"),
    (("://",), re.compile(r"(://)[^\s/?#@'\"]*:[^\s/?#@'\"]*@"), rf"\1{MASK}@"),
    (
        ("PRIVATE KEY",),
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
        MASK,
    ),
)


@lru_cache(maxsize=4096)
def _named_secret(name: str) -> bool:
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words:
        return False
    return (
        words[-1] == "token"
        or not _SECRET_WORDS.isdisjoint(words)
        or any(pair in _SECRET_PAIRS for pair in zip(words, words[1:], strict=False))
    )


class Redactor:
    """Decides what may be recorded.

    Args:
        extra: What `configure(redact=…)` was given. A string names one more secret argument or field (any case); a
            pattern masks what it matches in text; a function gets each name and value and returns what to record.

    Raises:
        ConfigurationError: where `extra` is none of these.

    Example:
        >>> Redactor(["ssn"]).text("use sk-abcdefghijklmnopqrstuv please")
        'use [redacted] please'
        >>> Redactor(["ssn"]).secret("SSN"), Redactor().secret("max_tokens")
        (True, False)
    """

    def __init__(self, extra: Redact = None) -> None:
        self._names: set[str] = set()
        self._shapes: list[re.Pattern[str]] = []
        self._function: Callable[[str, Any], Any] | None = None
        if extra is None:
            return
        if callable(extra):
            self._function = extra
            return
        if isinstance(extra, (str, bytes)) or not isinstance(extra, Iterable):
            raise ConfigurationError(f"redact must be a list of names and patterns, or a function, not {extra!r}")
        for item in extra:
            if isinstance(item, str):
                self._names.add(item.lower())
            elif isinstance(item, re.Pattern):
                self._shapes.append(item)
            else:
                raise ConfigurationError(f"redact takes names (str) and compiled patterns, not {item!r}")

    def secret(self, name: str) -> bool:
        """Whether a value under this name must never be recorded."""
        return name.lower() in self._names or _named_secret(name)

    def value(self, name: str, value: Any) -> Any:
        """The value to record under a name: masked where the name is secret, else as the user's function returns it."""
        if self.secret(name):
            return MASK
        if self._function is not None:
            try:
                return self._function(name, value)
            except Exception as exception:
                warn_once("redact", "The redact function raised %r; the values it raises for are left out.", exception)
                return MASK
        return value

    def text(self, text: str) -> str:
        """The text with every credential of a known shape masked."""
        for literals, pattern, replacement in _SHAPES:
            for literal in literals:
                if literal in text:
                    text = pattern.sub(replacement, text)
                    break
        for pattern in self._shapes:
            text = pattern.sub(MASK, text)
        return text


def without_credentials(uri: str) -> str:
    """A URI with its user and password taken out, as it may stand in a journal."""
    head, separator, tail = uri.partition("://")
    if not separator:
        return uri
    authority, slash, path = tail.partition("/")
    return f"{head}://{authority.rpartition('@')[2]}{slash}{path}"
