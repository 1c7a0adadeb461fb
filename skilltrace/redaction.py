"""Keeping secrets out of the journal: by the names of arguments and fields, and by known shapes in text."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import pairwise
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, urlencode

from skilltrace.errors import ConfigurationError
from skilltrace.faults import warn_once

MASK = "[redacted]"

Redact: TypeAlias = "Iterable[str | re.Pattern[str]] | Callable[[str, Any], Any] | None"
"""What `configure(redact=…)` takes: more names and patterns, or a function of (name, value) that returns the value."""

# A name is secret when one of its words (or two in a row) says so: `openai_api_key`, `X-Auth-Token`, `dbPassword`;
# but not `max_tokens`, `token_count` or `keyboard`.
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORDS = frozenset(
    {"password", "passwd", "passphrase", "passcode", "pwd", "secret", "authorization", "credential", "cookie", "bearer"}
    | {"jwt", "dsn", "apikey", "accesskey", "privatekey", "secretkey", "authtoken", "accesstoken"}
)
_SECRET_LAST_WORDS = frozenset({"token", "auth"})
_KEYS = ("access", "account", "api", "auth", "encryption", "master", "private", "secret", "shared", "signing", "ssh")
_TOKENS = ("access", "api", "auth", "bearer", "refresh", "session")  # `access_tokens` is secret, `max_tokens` is not
_LM_SETTINGS = ("base", "type", "version")  # of `api_…`
_SECRET_PAIRS = frozenset(
    {(word, "key") for word in _KEYS}
    | {(word, "token") for word in _TOKENS}
    | {("api", word) for word in _LM_SETTINGS}
    | {("connection", "string")}
)
_LONGEST_NAME = 256  # characters; a longer key of a mapping is a text, not a name

# The shapes of well-known credentials. A literal beside each pattern says what must stand in a text for the pattern to
# match at all: looking for a few literals costs a microsecond, running the patterns over each text would cost hundreds.
_SHAPES: tuple[tuple[tuple[str, ...], re.Pattern[str], str], ...] = tuple(
    (literals, re.compile(pattern, re.ASCII), replacement)
    for literals, pattern, replacement in (
        (("sk-",), r"\bsk-[A-Za-z0-9_-]{16,}", MASK),
        (("AKIA", "ASIA"), r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", MASK),
        (("gh", "github_pat_"), r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})", MASK),
        (("glpat-", "nvapi-", "pplx-", "pypi-", "tvly-", "xai-"),
         r"\b(?:glpat|nvapi|pplx|pypi|tvly|xai)-[\w-]{16,}", MASK),
        (("hf_", "gsk_", "npm_", "r8_"), r"\b(?:hf|gsk|npm|r8)_[A-Za-z0-9]{20,}", MASK),
        (("_live_", "_test_"), r"\b[prs]k_(?:live|test)_[A-Za-z0-9]{16,}", MASK),
        (("lsv2_",), r"\blsv2_\w{16,}", MASK),
        (("dapi",), r"\bdapi[0-9a-f]{32}", MASK),
        (("AIza",), r"\bAIza[\w-]{30,}", MASK),
        (("xox",), r"\bxox[abeoprs]-[\w-]{10,}", MASK),
        (("eyJ",), r"(?<![\w-])eyJ[\w-]{12,}\.[\w-]{6,}\.[\w-]*", MASK),
        (("earer", "EARER"), r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}", rf"\1{MASK}"),
        (("uthorization", "UTHORIZATION"), r"(?i)(\bauthorization\W{1,4}basic\s+)[\w+/=]{4,}", rf"\1{MASK}"),
        (("://",), r"(://)[^\s/?#@'\":]*:[^\s/?#@'\"]*@", rf"\1{MASK}@"),
        (("PRIVATE KEY",),
         r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", MASK),
    )
)  # fmt: skip

# Most texts hold no credential, and that must be found out quickly. All shapes of tokens have this in common: a run of
# 15 or more letters, digits, `_` and `-`. The other shapes have a word, or an @.
_RUN = b"x" * 15
_LARGE = 1 << 20  # characters; longer texts are not joined, for that takes memory
_AS_RUNS = bytes(ord("x" if chr(code).isalnum() or chr(code) in "_-" else " ") for code in range(128)) + b" " * 128

# In a repr, a message or source code: a name and what parts it from its value, as in `password='…'` and `"token": "…"`;
# and what may end that value.
_NAMED = re.compile(r"(?<![\w.-])([\w.-]{1,256})[\"']?\s{0,4}[=:](?![=:])\s{0,4}(?=\S)")
_BOUNDS = re.compile(r"""'(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*"|[\[({})\],;&\s]""")


class _Names(dict[str, tuple[bool, str]]):
    """Of each name seen: whether it is secret, and the name as it may be written."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self._redactor = redactor

    def __missing__(self, name: str) -> tuple[bool, str]:
        if not isinstance(name, str):
            return self[str(name)]  # users log under numbers too
        redactor = self._redactor
        known = redactor._names_a_secret(name), redactor.text(name)
        if len(name) <= _LONGEST_NAME:
            if len(self) >= 4096:
                self.clear()
                redactor.plain_names.clear()
            self[name] = known
            if known == (False, name) and not redactor.alters:
                redactor.plain_names.add(name)
        return known


class Redactor:
    """Decides what may be recorded.

    Args:
        extra: What `configure(redact=…)` was given. A string names one more secret argument or field (any case); a
            pattern masks what it matches in text; a function gets each name and value and returns what to record.

    Attributes:
        names: Of a name: whether it is secret, and the name as it may be written.
        plain_names: Some of the names whose values are recorded as they are.

    Raises:
        ConfigurationError: where `extra` is none of these.

    Example:
        >>> Redactor(["ssn"]).text("use sk-abcdefghijklmnopqrstuv please")
        'use [redacted] please'
        >>> Redactor(["ssn"]).secret("SSN"), Redactor().secret("max_tokens")
        (True, False)
    """

    def __init__(self, extra: Redact = None) -> None:
        self.alters = callable(extra)
        self.names = _Names(self)
        self.plain_names: set[str] = set()
        self._more_names: set[str] = set()
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
                self._more_names.add(item.lower())
            elif isinstance(item, re.Pattern) and isinstance(item.pattern, str):
                self._shapes.append(item)
            else:
                raise ConfigurationError(f"redact takes names (str) and compiled patterns of text, not {item!r}")

    def secret(self, name: str) -> bool:
        """Whether a value under this name must never be recorded."""
        return self.names[name][0]

    def _names_a_secret(self, name: str) -> bool:
        if len(name) > _LONGEST_NAME:
            return False
        if name.lower() in self._more_names:
            return True
        words = [word.lower() for word in _WORDS.findall(name)]
        singular = [word.removesuffix("s") for word in words]
        return (
            not _SECRET_WORDS.isdisjoint(singular)
            or not _SECRET_LAST_WORDS.isdisjoint(words[-1:])
            or any(pair in _SECRET_PAIRS for pair in pairwise(singular))
        )

    def value(self, name: str, value: Any) -> Any:
        """The value to record under a name: masked where the name is secret, else as the user's function returns it."""
        if self.names[name][0]:
            return MASK
        if self._function is not None:
            try:
                return self._function(name, value)
            except Exception as exception:
                warn_once("redact", "The redact function raised %r; the values it raises for are left out.", exception)
                return MASK
        return value

    def suspects(self, texts: Collection[str]) -> bool:
        """Whether `text` may have something to mask in one of these; quick, and never wrong when it says no."""
        if sum(map(len, texts)) > _LARGE:
            return any(map(self._suspects, texts))
        return self._suspects("\n".join(texts))

    def _suspects(self, text: str) -> bool:
        if self._shapes or _RUN in text.encode("utf-8", "replace").translate(_AS_RUNS):
            return True
        if "@" in text and "://" in text:
            return True
        lowered = text.lower()
        return "bearer" in lowered or "authorization" in lowered or "private key" in lowered

    def text(self, text: str) -> str:
        """The text with every credential of a known shape masked."""
        if not self._suspects(text):
            return text
        for literals, pattern, replacement in _SHAPES:
            for literal in literals:
                if literal in text:
                    text = pattern.sub(replacement, text)
                    break
        for pattern in self._shapes:
            text = pattern.sub(MASK, text)
        return text

    def texts(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Some texts by name, each as `text` gives it: looked through all at once, for most hold nothing to mask."""
        if not self.suspects(texts.values()):
            return dict(texts)
        return {name: self.text(text) for name, text in texts.items()}

    def printed(self, text: str) -> str:
        """A repr, a message or a traceback: as `text`, and what stands behind a secret name is masked too.

        Example:
            >>> Redactor().printed("Client(region='eu', api_key='hunter2')")
            "Client(region='eu', api_key=[redacted])"
        """
        text = self.text(text)
        parts, end = [], 0
        for match in _NAMED.finditer(text):
            if match.start() >= end and self.secret(match[1]):
                parts += [text[end : match.end()], MASK]
                end = _value_end(text, match.end())
        return "".join((*parts, text[end:]))


def _value_end(text: str, start: int) -> int:
    """Where the value ends that begins there: at a comma or space outside of quotes and brackets."""
    depth = 0
    for match in _BOUNDS.finditer(text, start):
        bound = match[0]
        if bound in "[({":
            depth += 1
        elif bound in "])}":
            depth -= 1
            if depth <= 0:
                return match.end() if depth == 0 else match.start()
        elif len(bound) == 1 and depth == 0:
            return match.start()
    return len(text)


# A database's URI may have a password with slashes in it, as SQLAlchemy reads it; a server's may have an @ in its path.
_DATABASE_USER = re.compile(r"([\w+.-]+://)[^:/@]*:[^@]*@(.*)", re.DOTALL)


def without_credentials(uri: str) -> str:
    """A URI with its user and password taken out, as it may stand in a journal.

    Example:
        >>> without_credentials("postgresql://ada:secret@db:5432/mlflow?sslmode=require")
        'postgresql://db:5432/mlflow?sslmode=require'
    """
    head, separator, tail = uri.partition("://")
    if not separator:
        return uri
    if not head.lower().startswith("http") and (match := _DATABASE_USER.fullmatch(uri)):
        tail = match[2]
    authority, rest = tail[: (end := _authority_end(tail))], tail[end:]
    path, question, query = rest.partition("?")
    if question:
        pairs = parse_qsl(query, keep_blank_values=True)
        kept = [(name, value) for name, value in pairs if not _OPEN.secret(name)]
        if len(kept) < len(pairs):
            question, query = ("?", urlencode(kept)) if kept else ("", "")
    return f"{head}://{authority.rpartition('@')[2]}{path}{question}{query}"


def _authority_end(tail: str) -> int:
    return min((at for at in map(tail.find, "/?#") if at >= 0), default=len(tail))


_OPEN = Redactor()
