"""Secrets stay out of the journal and of MLflow, by their names and by their shapes."""

import dataclasses
import re
import sqlite3
import time

import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import skilltrace
from skilltrace import tracked_job, tracked_phase
from skilltrace.errors import ConfigurationError
from skilltrace.redaction import _SHAPES, MASK, Redactor, without_credentials

SECRET_NAMES = [
    "api_key", "apiKey", "API_KEY", "APIKey", "openai_api_key", "OPENAI_API_KEY", "x-api-key", "apikey", "api_keys",
    "token",
    "auth_token", "X-Auth-Token", "access_token", "accessToken", "refreshTokens", "hf_token", "password", "Password",
    "db_password", "dbPassword", "passwd", "pwd", "passphrase", "secret", "secrets", "client_secret", "clientSecret",
    "aws_secret_access_key", "private_key", "ssh_key", "authorization", "Authorization", "proxy-authorization", "auth",
    "basic_auth", "credential", "credentials", "google_application_credentials", "cookie", "Set-Cookie", "bearer",
    "jwt",
    "connection_string", "sentry_dsn", "api_base", "api_version", "api_type", "account_key", "signing-key",
    "bearer_token",
]  # fmt: skip
PLAIN_NAMES = [
    "max_tokens", "tokens", "token_count", "tokenizer", "total_tokens", "lm_tokens_total", "keyboard", "key", "keys",
    "author",
    "authors", "api", "api_calls", "apis", "secretary", "passed", "pass_rate", "cookiecutter", "monkey", "access",
    "skill_key",
    "content", "", "ключ", "123", "prompt_tokens", "reset", "connection", "string",
]  # fmt: skip

KEYS = {
    "openai": "sk-abcdEFGH1234567890ab",
    "openai project": "sk-proj-abc_DEF-1234567890abcdef",
    "anthropic": "sk-ant-api03-abcdef123456_-XYZ",
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "github": "ghp_abcdefghijklmnopqrstuv012345",
    "github fine": "github_pat_11ABCDEFG0abcdefghij_klm",
    "gitlab": "glpat-abcdefghij0123456789",
    "hugging face": "hf_abcdefghijklmnopqrstuvwxyz",
    "groq": "gsk_abcdefghijklmnopqrstuvwxyz",
    "google": "AIzaSyA1234567890abcdefghijklmnopqrstu",
    "slack": "xoxb-1234567890-abcdef",
    "stripe": "sk_live_abcdefghij0123456789",
    "databricks": "dapi0123456789abcdef0123456789abcdef",
    "langsmith": "lsv2_pt_0123456789abcdef0123456789abcdef",
    "nvidia": "nvapi-abcdefghij0123456789_abc",
    "pypi": "pypi-AgEIcHlwaS5vcmcCJDAwMDAw",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.dozjgNryP4J3jVmNHl0w5N",
}
IN_CONTEXT = {
    "bearer": ("Authorization: Bearer abcdef123456", "abcdef123456"),
    "bearer lower": ("authorization: bearer abcdef123456", "abcdef123456"),
    "basic": ("Authorization: Basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
    "basic header": ("{'Authorization': 'Basic dXNlcjpwYXNz'}", "dXNlcjpwYXNz"),
    "url": ("postgresql://ada:hunter2@db:5432/x", "hunter2"),
    "url of a token": ("https://x-access-token:hunter2@github.com/a/b", "hunter2"),
    "pem": ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----", "MIIEow"),
    "pem cut": ("-----BEGIN PRIVATE KEY-----\nMIIEow\nIBAAKC", "IBAAKC"),
}


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_name_is_known(name):
    """In each spelling: snake, camel, kebab, screaming, and as a part of a longer name."""
    assert Redactor().secret(name)
    assert Redactor().value(name, "x") == MASK


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_a_plain_name_is_not_taken_for_a_secret(name):
    """Counting tokens, an author or a keyboard is no secret."""
    assert not Redactor().secret(name)
    assert Redactor().value(name, "x") == "x"


def test_a_very_long_key_is_no_name():
    """Thousands of characters are not searched for words, nor kept."""
    redactor = Redactor()
    assert not redactor.secret("password " * 1000)
    assert len(redactor.names) == 0


def test_the_memory_of_names_is_bounded():
    """A service whose results have ever new keys does not grow."""
    redactor = Redactor()
    for number in range(10_000):
        redactor.secret(f"name{number}")
    assert len(redactor.names) <= 4096
    assert len(redactor.plain_names) <= 4096


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_key_of_a_known_shape_is_masked(key):
    """Alone, in a sentence, in quotes, in JSON and twice."""
    text = Redactor().text
    assert text(key) == MASK
    assert text(f"use {key}, please") == f"use {MASK}, please"
    assert key not in text(f'{{"k": "{key}"}}')
    assert key not in text(f"k='{key}'\n{key}\n")


@pytest.mark.parametrize(("text", "secret"), IN_CONTEXT.values(), ids=IN_CONTEXT)
def test_a_secret_is_known_by_what_stands_round_it(text, secret):
    """Headers, URLs and PEM blocks hold secrets that have no shape of their own."""
    masked = Redactor().text(f"before {text} after")
    assert secret not in masked
    assert MASK in masked
    assert masked.startswith("before ")


@pytest.mark.parametrize(
    "text",
    [
        "a risk-assessment-and-mitigation-plan", "task-abcdefghijklmnopqrstuvwxyz", "the bearer of news",
        "eyJ is not a token",
        "https://example.com/a:b@c", "mailto:ada@example.com", "ssh://git@github.com/a/b",
        "0123456789abcdef0123456789abcdef",
        "conversation_history_of_the_last_session", str(2**200), "AKIA", "Basic training",
        "-----BEGIN CERTIFICATE-----\nMII",
    ],
)  # fmt: skip
def test_plain_text_is_left_alone(text):
    """Words, hashes, links and addresses are no credentials."""
    assert Redactor().text(text) == text


planted = st.sampled_from([*KEYS.values()])
around = st.text(alphabet=st.characters(blacklist_categories=("L", "N", "Pc", "Pd")), max_size=20)


@settings(deadline=None)
@given(st.lists(st.tuples(around, planted), max_size=4), around)
def test_no_planted_key_is_left(parts, end):
    """Wherever keys stand, between whatever marks, none is left."""
    text = "".join(before + " " + key + " " for before, key in parts) + end
    masked = Redactor().text(text)
    assert not any(key in masked for _, key in parts)


fragments = st.sampled_from(
    [*KEYS.values(), *(text for text, _ in IN_CONTEXT.values()), " ", "\n", "a", "-", "é", '"', "://", "@"]
)


@settings(deadline=None)
@given(st.lists(fragments | st.text(max_size=5), max_size=12).map("".join))
def test_the_quick_look_misses_nothing(text):
    """A text that is found free of credentials at a glance is so when each pattern is tried."""
    slowly = text
    for _, pattern, replacement in _SHAPES:
        slowly = pattern.sub(replacement, slowly)
    assert Redactor().text(text) == slowly
    assert Redactor().texts({"a": text, "b": ""}) == {"a": slowly, "b": ""}


@pytest.mark.parametrize(
    "text",
    [
        "-eyJ" * 250_000, "://a:" + "a:" * 500_000, "-----BEGIN " + "A " * 500_000 + "PRIVATE KEY",
        "bearer" + " " * 1_000_000,
        "sk-" * 300_000, "eyJ" + ("a" * 20 + ".") * 50_000, "a" * 1_000_000, "password=" * 100_000, "a='" * 300_000,
        "(" * 500_000 + "token=", "token=" + "(" * 500_000,
    ],
    ids=range(11),
)  # fmt: skip
def test_no_text_takes_long(text):
    """A megabyte made to have patterns go over it again and again costs less than seconds."""
    begin = time.perf_counter()
    Redactor().printed(text)
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Client(region='eu', api_key='hunter2')", "Client(region='eu', api_key=[redacted])"),
        ("Client(password=Secret('a, b'), n=1)", "Client(password=[redacted], n=1)"),
        ("{'password': 'it\\'s, me', 'n': 1}", "{'password': [redacted], 'n': 1}"),
        ('{"token": "a b", "n": 1}', '{"token": [redacted], "n": 1}'),
        ("{'api_keys': ['a', {'b': 'c'}], 'n': 1}", "{'api_keys': [redacted], 'n': 1}"),
        ("connect(self.password=hunter2)", "connect(self.password=[redacted])"),
        ("GET https://x/?api_key=hunter2&n=1", "GET https://x/?api_key=[redacted]&n=1"),
        ("password: hunter2\nuser: ada", "password: [redacted]\nuser: ada"),
        ("token == other", "token == other"),
        ("max_tokens=5", "max_tokens=5"),
        ("password='unclosed", "password=[redacted]"),
        ("Authorization: Bearer abcdef123456 x", "Authorization: [redacted] [redacted] x"),
    ],
)
def test_what_stands_behind_a_secret_name_is_masked_in_reprs(text, masked):
    """In a repr, a message or a traceback the name says that a value is secret, whatever its shape."""
    assert Redactor().printed(text) == masked
    assert Redactor().printed(masked) == masked


# --- redact= ---------------------------------------------------------------------------------------------------------


def test_more_names_are_secret():
    """Names are compared without regard to case, and as a whole."""
    redactor = Redactor(["ssn", "IBAN"])
    assert redactor.secret("SSN")
    assert redactor.secret("iban")
    assert not redactor.secret("ssn_count")


def test_more_patterns_are_masked(store):
    """A pattern masks what it matches in texts, names, keys and tags."""
    store.configure(redact=[re.compile(r"EMP-\d+")])

    @tracked_phase("of {who}", tags={"who": "{who}"})
    def phase(who):
        return {"text": "EMP-123\nand EMP-456", "EMP-7": ["EMP-8"], "note": "EMP-9"}

    phase("EMP-1")
    run = store.run()
    assert run.info.run_name == "of [redacted]"
    assert run.data.tags["who"] == run.data.params["who"] == "[redacted]"
    assert store.text(run, "text.md") == "[redacted]\nand [redacted]"
    assert store.json(run, "result.json") == {"note": "[redacted]"}
    assert "EMP-8" not in str([store.text(run, path) for path in store.files(run)])


def test_a_function_decides_what_is_recorded(store):
    """It sees each name and value once, and what it returns is recorded in their place."""
    store.configure(redact=lambda name, value: f"<{value}>" if name == "email" else value)

    @tracked_phase("of {email}")
    def phase(email, user):
        return {"email": "c@d", "nested": {"email": "e@f", "list": [{"email": "g@h"}]}}

    phase("a@b", {"email": "x@y"})
    run = store.run()
    assert run.info.run_name == "of <a@b>"
    assert run.data.params == {"email": "<a@b>"}
    assert store.json(run, "result.json") == {"email": "<c@d>"}
    assert store.json(run, "nested.json") == {"email": "<e@f>", "list": [{"email": "<g@h>"}]}


def test_a_function_may_change_the_kind_of_a_value(store):
    """A picture may become a text, a structure a number: the file follows."""
    store.configure(redact=lambda name, value: {"raw": "left out\n", "list": 5}.get(name, value))

    @tracked_phase("phase")
    def phase():
        return {"raw": b"\x00", "list": [1]}

    phase()
    run = store.run()
    assert store.text(run, "raw.md") == "left out\n"
    assert store.json(run, "list.json") == 5


def test_secret_names_stay_secret_with_a_function():
    """A function adds to what is known; it is not asked about secrets."""
    asked = []
    redactor = Redactor(lambda name, value: asked.append(name) or value)
    assert redactor.value("password", "x") == MASK
    assert asked == []


def test_a_function_that_raises_leaves_the_value_out(store, caplog):
    """In doubt nothing is recorded: the value is masked, with one warning, and the call goes on."""

    def redact(name, value):
        raise RuntimeError("no")

    store.configure(redact=redact)

    @tracked_phase("phase")
    def phase(a):
        return {"b": "c", "long": "d\ne"}

    assert phase("x") == {"b": "c", "long": "d\ne"}
    run = store.run()
    assert run.data.params == {"a": MASK}
    assert store.json(run, "result.json") == {"b": MASK}
    assert store.text(run, "long.md") == MASK
    assert len([record for record in caplog.records if record.name == "skilltrace"]) == 1


@pytest.mark.parametrize("redact", ["ssn", b"ssn", 5, [5], [b"ssn"], [None], [re.compile(b"x")], [["a"]]])
def test_bad_redact_values_are_refused(redact):
    """What would protect nothing is an error at once."""
    with pytest.raises(ConfigurationError, match="redact"):
        Redactor(redact)
    with pytest.raises(ConfigurationError, match="redact"):
        skilltrace.configure(redact=redact)


def test_names_may_come_from_a_generator():
    """It is read once, and what it gave holds for all runs."""
    settings = skilltrace.configure(redact=(name for name in ["ssn"]), autolog=False)
    assert settings.redactor.secret("ssn")
    assert settings.redact == ("ssn",)


def test_numbers_under_more_secret_names_are_no_metrics(store):
    """`redact=["salary"]` holds for numbers too."""
    store.configure(redact=["salary"])

    @tracked_phase("phase")
    def phase():
        return {"salary": 12345, "score": 1}

    phase()
    assert "salary" not in store.run().data.metrics


# --- URIs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "clean"),
    [
        ("http://ada:hunter2@host:5000/path", "http://host:5000/path"),
        ("http://host:5000/a:b@c", "http://host:5000/a:b@c"),
        ("http://host?x=a@b", "http://host?x=a@b"),
        ("postgresql://ada:hun/ter2@host/db", "postgresql://host/db"),
        ("postgresql+psycopg2://ada@host/db", "postgresql+psycopg2://host/db"),
        ("postgresql://host/db?user=ada&password=hunter2", "postgresql://host/db?user=ada"),
        ("postgresql://host/db?password=hunter2", "postgresql://host/db"),
        ("postgresql://host/db?sslmode=require", "postgresql://host/db?sslmode=require"),
        ("mysql://ada:hunter@2@host/db", "mysql://host/db"),
        ("sqlite:////home/ada@corp/x.db", "sqlite:////home/ada@corp/x.db"),
        ("databricks://profile", "databricks://profile"),
        ("/home/ada/mlruns", "/home/ada/mlruns"),
    ],
)
def test_credentials_are_taken_out_of_uris(uri, clean):
    """User and password go; the place stays what it was."""
    assert without_credentials(uri) == clean


# --- all together ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    url: str
    db_password: str
    nested: dict


class Model(pydantic.BaseModel):
    name: str
    client_secret: str
    more: list[dict]


class Client:
    def __init__(self):
        self.api_key = "planted-00"

    def __repr__(self):
        return f"Client(api_key={self.api_key!r})"


def planted_everywhere(lm=None):
    """One job with a secret in each place that a user may put one; returns what must be found nowhere."""
    key = KEYS["openai"]
    secrets = [f"planted-{number:02}" for number in range(40)] + [key, KEYS["github"]]

    @tracked_phase(
        "of {password} {text}", tags={"k": "{config.api_key}", "t": "{text}", "c": "{config}", "token": "{text}"}
    )
    def phase(text, api_key, password, config, *, token="planted-01", request_auth=None):
        run = skilltrace.current_run()
        run.set_tag("api_key", "planted-02")
        run.set_tag("note", f"with {key}")
        run.set_tag("config", {"password": "planted-03"})
        run.log_param("password", "planted-04")
        run.log_param("note", f"with {key}")
        run.log_text(f"a {key} b", "notes/plain.txt")
        run.log_text("planted-05", "password.txt")
        run.log_dict({"secret": "planted-06", "deep": [{"authorization": "planted-07", "k": key}]}, "config.json")
        run.log_dict({"secret": "planted-08"}, "config.yaml")
        run.log_turn("user", f"my key is {key}")
        run.log_turn("user", {"token": "planted-09", "text": key})
        if lm is not None:
            lm("What?")
        return {
            "password": "planted-10",
            "api_keys": ["planted-11", {"a": "planted-12"}],
            "text": f"long\n{key}\n",
            "short": key,
            "nested": {"deep": [{"access_token": "planted-13"}, Config("u", "planted-14", {"secret": "planted-15"})]},
            "model": Model(name="m", client_secret="planted-16", more=[{"jwt": "planted-17"}]),
            "client": Client(),
            "clients": [Client()],
            "error": ValueError("password='planted-18'"),
            key: 1,
            KEYS["github"]: {"n": 1},
            "by_key": {key: {"n": 1}, "headers": {"Authorization": "planted-19", "x": f"Bearer {'planted-20'}"}},
            "large": f"{key} " * 30_000,
            "url": "postgresql://ada:planted-21@db/x",
        }

    @tracked_job("job")
    def job(job_id, request, **more):
        phase(f"text {key}", "planted-22", "planted-23", {"api_key": "planted-24"}, request_auth="planted-25")
        raise RuntimeError(f"refused {KEYS['github']} for postgresql://ada:planted-26@db/x")

    with pytest.raises(RuntimeError):
        job("j-1", {"password": "planted-27"}, db_password="planted-28")
    return secrets


def test_no_secret_is_in_the_journal(store, tmp_path):
    """The bytes of the spool hold none of the planted secrets, the files beside the journal included."""
    store.configure(delivery="external")
    secrets = planted_everywhere()
    files = [path for path in (tmp_path / "spool").rglob("*") if path.is_file()]
    data = b"\0".join(path.read_bytes() for path in files)
    assert b"notes/plain.txt" in data
    assert any(path.parent.name == "blobs" for path in files)
    assert [secret for secret in secrets if secret.encode() in data] == []


def test_no_secret_is_in_mlflow(store, tmp_path, sqlite_uri, lm):
    """Neither the database nor the artifacts hold any, nor the settings of the LM that was called."""
    secrets = [*planted_everywhere(lm), "sk-test-key-of-the-tests", lm.kwargs["api_base"]]
    runs = store.runs()
    assert len(runs) == 2
    artifacts = [path for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
    assert len(artifacts) > 10
    data = b"\0".join(path.read_bytes() for path in artifacts)
    with sqlite3.connect(sqlite_uri.removeprefix("sqlite:///")) as database:
        dump = "\n".join(database.iterdump()).encode()
    assert runs[0].info.run_id.encode() in dump
    assert [secret for secret in secrets if secret.encode() in data + dump] == []
    assert [secret for secret in secrets if any(secret in path.name for path in artifacts)] == []


def test_the_traceback_is_masked(store):
    """error.txt and the tag error.message have the message without the key in it."""

    @tracked_phase("phase")
    def phase():
        raise RuntimeError(f"refused: {KEYS['openai']}")

    with pytest.raises(RuntimeError, match="sk-"):
        phase()
    run = store.run()
    assert run.data.tags["error.message"] == "refused: [redacted]"
    assert "RuntimeError: refused: [redacted]" in store.text(run, "error.txt")


def test_named_secrets_in_a_traceback_are_masked(store):
    """What stands behind a secret name in a message has no shape, and is a secret all the same."""

    @tracked_phase("phase")
    def phase():
        raise RuntimeError(str({"user": "ada", "password": "planted"}))

    with pytest.raises(RuntimeError):
        phase()
    run = store.run()
    assert "planted" not in run.data.tags["error.message"]
    assert "planted'" not in store.text(run, "error.txt").split("RuntimeError:")[1]


def test_a_secret_in_a_structure_that_is_a_param_is_masked(store):
    """As for tags: the text of a dict shows its fields."""
    with tracked_phase("phase") as run:
        run.log_param("config", {"url": "u", "password": "planted"})
    assert "planted" not in store.run().data.params["config"]


def test_a_key_across_the_cut_of_a_file_is_masked(store):
    """Texts are masked before they are cut: half of a key is a secret too."""
    store.configure(max_artifact_bytes=1024)

    @tracked_phase("phase")
    def phase():
        filler = "x " * 440
        return {"text": "\n" + filler + KEYS["jwt"] + " y" * 1000, "list": [filler * 2 + KEYS["jwt"] + " y" * 1000]}

    phase()
    run = store.run()
    for path in ("text.md", "list.json"):
        assert "cut by skilltrace" in store.text(run, path)
        assert "eyJ" not in store.text(run, path)


def test_a_masked_result_is_not_changed():
    """The caller's own objects keep their values."""
    result = {"password": "mine", "nested": {"token": "mine", "text": KEYS["openai"]}}

    @tracked_phase("phase")
    def phase():
        return result

    skilltrace.configure(delivery="external", autolog=False)
    assert phase() == {"password": "mine", "nested": {"token": "mine", "text": KEYS["openai"]}}


def test_masks_are_json():
    """What is written in a secret's place is a text, as any reader takes it."""
    assert msgspec.json.decode(msgspec.json.encode(MASK)) == MASK
