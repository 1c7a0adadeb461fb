"""The settings: argument, else environment, else default; and what bad values do."""

import asyncio
import os
import pathlib
import re
import threading

import platformdirs
import pytest

import skilltrace
from skilltrace import config, tracked_job, tracked_phase
from skilltrace.errors import ConfigurationError
from skilltrace.redaction import MASK


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    """No setting comes from the environment but what a test puts there."""
    for name in [name for name in os.environ if name.startswith(("SKILLTRACE_", "MLFLOW_"))]:
        if name != "SKILLTRACE_SPOOL_DIR":
            monkeypatch.delenv(name)


@pytest.fixture
def warned(caplog):
    """The warnings that skilltrace has given in this test."""

    def messages():
        return [record.getMessage() for record in caplog.records if record.name == "skilltrace"]

    return messages


def configure(*args, **options):
    """Configure without turning autologging on, which would import MLflow."""
    return skilltrace.configure(*args, **{"autolog": False, **options})


# Each setting: what is given, what it resolves to; the variable, its text, what that resolves to.
SETTINGS = {
    "experiment": ("argument", "argument", "MLFLOW_EXPERIMENT_NAME", "variable", "variable"),
    "tracking_uri": ("http://a:5000/", "http://a:5000", "MLFLOW_TRACKING_URI", "http://b:5000", "http://b:5000"),
    "artifact_location": ("s3://a/b", "s3://a/b", "SKILLTRACE_ARTIFACT_LOCATION", "s3://c", "s3://c"),
    "tags": ({"a": 1}, {"a": "1"}, "SKILLTRACE_TAGS", "b=2, c = x=y ", {"b": "2", "c": "x=y"}),
    "autolog": (False, False, "SKILLTRACE_AUTOLOG", "off", False),
    "enabled": (True, True, "SKILLTRACE_ENABLED", "No", False),
    "redact": (["a"], ("a",), "SKILLTRACE_REDACT", "b, c,", ("b", "c")),
    "spool_dir": ("/a", pathlib.Path("/a"), "SKILLTRACE_SPOOL_DIR", "/b", pathlib.Path("/b")),
    "max_artifact_bytes": (5000, 5000, "SKILLTRACE_MAX_ARTIFACT_BYTES", "6000", 6000),
    "delivery": ("external", "external", "SKILLTRACE_DELIVERY", "external", "external"),
    "flush_timeout": (1, 1.0, "SKILLTRACE_FLUSH_TIMEOUT", "2.5", 2.5),
}

BAD = [
    ("experiment", ""), ("experiment", " "), ("experiment", 5), ("experiment", "x" * 501), ("tracking_uri", ""),
    ("tracking_uri", 5), ("tracking_uri", "ftp://host"), ("tracking_uri", "localhost:5000"), ("tracking_uri", "http://"),
    ("tracking_uri", "http://host:port"), ("artifact_location", ""), ("artifact_location", 5), ("tags", ["a"]),
    ("tags", "a=b"),
    ("tags", {1: "a"}), ("tags", {"": "a"}), ("autolog", 1), ("autolog", "yes"), ("enabled", 0), ("enabled", "false"),
    ("redact", "a"), ("redact", 5), ("redact", [5]), ("spool_dir", ""), ("spool_dir", 5),
    ("spool_dir", "~nobody-of-that-name/x"),
    ("max_artifact_bytes", 0), ("max_artifact_bytes", 1023), ("max_artifact_bytes", "5000"),
    ("max_artifact_bytes", True),
    ("max_artifact_bytes", 5000.0), ("delivery", "later"), ("delivery", True), ("delivery", []), ("flush_timeout", -1),
    ("flush_timeout", "1"), ("flush_timeout", float("nan")), ("flush_timeout", float("inf")), ("flush_timeout", True),
]  # fmt: skip

BAD_VARIABLES = [
    ("tracking_uri", "MLFLOW_TRACKING_URI", "ftp://host"), ("tags", "SKILLTRACE_TAGS", "a"),
    ("tags", "SKILLTRACE_TAGS", "=a"),
    ("autolog", "SKILLTRACE_AUTOLOG", "maybe"), ("enabled", "SKILLTRACE_ENABLED", "2"),
    ("max_artifact_bytes", "SKILLTRACE_MAX_ARTIFACT_BYTES", "ten"),
    ("max_artifact_bytes", "SKILLTRACE_MAX_ARTIFACT_BYTES", "5"),
    ("delivery", "SKILLTRACE_DELIVERY", "later"), ("flush_timeout", "SKILLTRACE_FLUSH_TIMEOUT", "soon"),
    ("experiment", "MLFLOW_EXPERIMENT_NAME", " "), ("spool_dir", "SKILLTRACE_SPOOL_DIR", "~nobody-of-that-name/x"),
]  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_the_argument_goes_first(name, monkeypatch):
    """What is given to `configure` holds, whatever the environment says."""
    given, resolved, variable, text, _ = SETTINGS[name]
    monkeypatch.setenv(variable, text)
    assert getattr(configure(**{name: given}), name) == resolved


@pytest.mark.parametrize("name", SETTINGS)
def test_the_environment_goes_before_the_default(name, monkeypatch):
    """What is not given is taken from its variable, whether `configure` is called or not."""
    *_, variable, text, resolved = SETTINGS[name]
    monkeypatch.setenv(variable, text)
    assert getattr(config.current(), name) == resolved
    config.reset()
    options = {} if name == "autolog" else {"autolog": False}
    assert getattr(skilltrace.configure(**options), name) == resolved


def test_the_defaults(monkeypatch, tmp_path):
    """Without arguments and variables runs go to an embedded store in the working folder."""
    monkeypatch.delenv("SKILLTRACE_SPOOL_DIR")
    settings = config.current()
    assert settings.experiment is None
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert settings.artifact_location == f"{tmp_path}/mlartifacts"
    assert (settings.tags, settings.redact) == ({}, None)
    assert (settings.autolog, settings.enabled) == (True, True)
    assert settings.spool_dir == platformdirs.user_state_path("skilltrace") / "spool"
    assert (settings.max_artifact_bytes, settings.delivery, settings.flush_timeout) == (10 * 2**20, "thread", 10.0)
    assert settings.target.experiment == "skilltrace"


@pytest.mark.parametrize("name", SETTINGS)
def test_an_empty_variable_is_none(name, monkeypatch):
    """`VARIABLE=` in a shell or a compose file means that it is not set."""
    variable = SETTINGS[name][2]
    monkeypatch.delenv(variable, raising=False)
    before = getattr(config.current(), name)
    config.reset()
    monkeypatch.setenv(variable, "")
    assert getattr(config.current(), name) == before


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_a_bad_argument_is_refused_by_name(name, value):
    """The error names the setting, is a ValueError too, and nothing is changed."""
    before = configure("before")
    with pytest.raises(ConfigurationError, match=f"^{name}") as caught:
        configure(**{name: value})
    assert isinstance(caught.value, ValueError)
    assert config.current() is before


@pytest.mark.parametrize(("name", "variable", "text"), BAD_VARIABLES, ids=str)
def test_a_bad_variable_is_an_error_in_configure(name, variable, text, monkeypatch):
    """Called by the user, `configure` says at once which variable is wrong."""
    monkeypatch.setenv(variable, text)
    options = {} if name == "autolog" else {"autolog": False}
    with pytest.raises(ConfigurationError, match=f"^{name}.*{variable}"):
        skilltrace.configure(**options)


@pytest.mark.parametrize(("name", "variable", "text"), BAD_VARIABLES, ids=str)
def test_a_bad_variable_gives_way_to_the_default(name, variable, text, monkeypatch, warned):
    """Where the settings are first needed inside somebody's call it is said once, and the default stands in."""
    monkeypatch.delenv(variable, raising=False)
    default = getattr(config.current(), name)
    config.reset()
    monkeypatch.setenv(variable, text)
    assert getattr(config.current(), name) == default
    (warning,) = warned()
    assert variable in warning
    assert name in warning


def test_a_program_with_bad_variables_goes_on(python):
    """A tracked call in a process whose environment is wrong returns what it would without skilltrace."""
    done = python(
        "import skilltrace\n"
        "@skilltrace.tracked_phase\n"
        "def phase(): return 5\n"
        "print(phase())\n",
        env={"SKILLTRACE_MAX_ARTIFACT_BYTES": "ten", "SKILLTRACE_TAGS": "x", "SKILLTRACE_DELIVERY": "external"},
    )  # fmt: skip
    assert done.stdout.split() == ["5"]
    assert done.stderr.count("SKILLTRACE_MAX_ARTIFACT_BYTES") == 1
    assert done.stderr.count("SKILLTRACE_TAGS") == 1


# --- the tracking URI and the artifacts' place -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ("sqlite:///x.db", "sqlite:///{cwd}/x.db"),
        ("sqlite:///a/../x.db?timeout=5", "sqlite:///{cwd}/a/../x.db?timeout=5"),
        ("sqlite:////abs/x.db", "sqlite:////abs/x.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("./mlruns", "{cwd}/mlruns"),
        ("mlruns", "{cwd}/mlruns"),
        (pathlib.Path("mlruns"), "{cwd}/mlruns"),
        ("/abs/mlruns", "/abs/mlruns"),
        ("~/mlruns", "{home}/mlruns"),
        ("file:///abs", "file:///abs"),
        ("http://host:5000/", "http://host:5000"),
        ("HTTPS://host", "HTTPS://host"),
        ("databricks", "databricks"),
        ("databricks://profile", "databricks://profile"),
        ("postgresql+psycopg2://u:p@h/db", "postgresql+psycopg2://u:p@h/db"),
    ],
    ids=str,
)
def test_a_tracking_uri_is_made_absolute(given, resolved, tmp_path):
    """A relative path means the folder at `configure`, wherever delivery runs later."""
    uri = configure(tracking_uri=given).tracking_uri
    assert uri == resolved.format(cwd=tmp_path, home=pathlib.Path.home())


def test_a_later_change_of_folder_does_not_move_the_store(tmp_path, monkeypatch):
    """What was relative when it was resolved stays where that was."""
    settings = configure(tracking_uri="sqlite:///x.db", artifact_location="files", spool_dir="spooled")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert config.current() is settings
    assert settings.target.uri == f"sqlite:///{tmp_path}/x.db"
    assert settings.target.artifact_location == f"{tmp_path}/files"
    assert settings.spool_dir == tmp_path / "spooled"


def test_the_backend_store_is_the_second_choice(monkeypatch):
    """`MLFLOW_BACKEND_STORE_URI` is used where there is no `MLFLOW_TRACKING_URI`."""
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "sqlite:////b.db")
    assert config.current().tracking_uri == "sqlite:////b.db"
    config.reset()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://a")
    assert config.current().tracking_uri == "http://a"


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("sqlite:////x.db", "mlartifacts"),
        ("postgresql://h/db", "mlartifacts"),
        ("http://h", None),
        ("/abs/mlruns", None),
    ],
)
def test_a_database_has_its_artifacts_beside_it(uri, location, tmp_path):
    """A database holds no files: they go to ./mlartifacts; a server decides for itself."""
    expected = str(tmp_path / location) if location else None
    assert configure(tracking_uri=uri).artifact_location == expected


def test_credentials_are_not_shown():
    """Neither the target, which is journaled, nor the repr in a notebook has the password; nor does an error."""
    settings = configure(tracking_uri="postgresql://ada:hunter2@h/db")
    assert settings.target.uri == "postgresql://h/db"
    assert "hunter2" not in repr(settings)
    for uri in ("http://ada:hunter2@h:port", "http://ada:hunter2@", "gopher://ada:hunter2@h"):
        with pytest.raises(ConfigurationError) as caught:
            configure(tracking_uri=uri)
        assert "hunter2" not in str(caught.value)


# --- the experiment --------------------------------------------------------------------------------------------------


def test_the_experiment_of_mlflow_is_followed(monkeypatch):
    """`mlflow.set_experiment` leaves its choice in `MLFLOW_EXPERIMENT_ID`; that holds where nothing is configured."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    target = config.current().target
    assert (target.experiment_id, target.experiment) == ("7", None)


def test_a_configured_experiment_goes_before_mlflows(monkeypatch):
    """A name that is given to skilltrace is meant."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    target = configure("mine").target
    assert (target.experiment_id, target.experiment) == (None, "mine")
    assert config.current().target_for("other").experiment == "other"


def test_runs_go_to_the_experiment_of_the_id(store, monkeypatch):
    """The id alone is enough for a run to be written."""
    experiment_id = store.client.create_experiment("by-id-" + store.experiment, artifact_location=store.artifacts)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment_id)
    configure(tracking_uri=store.uri)
    with tracked_phase("phase"):
        pass
    assert skilltrace.flush(60)
    assert [run.info.run_name for run in store.client.search_runs([experiment_id])] == ["phase"]


# --- again -----------------------------------------------------------------------------------------------------------


def test_each_call_stands_for_itself():
    """A second `configure` does not keep what the first one was given."""
    configure("first", tags={"a": "b"})
    second = configure(flush_timeout=3)
    assert (second.experiment, second.tags, second.flush_timeout) == (None, {}, 3.0)
    assert config.current() is second


def test_an_open_run_keeps_its_settings(store):
    """A run, and the phases inside it, go where they were opened to go."""

    @tracked_phase("inner")
    def inner():
        pass

    @tracked_job("outer")
    def outer():
        configure("another", tracking_uri=store.uri, tags={"later": "yes"})
        inner()

    outer()
    assert [run.info.run_name for run in store.runs()] == ["outer", "inner"]
    assert "later" not in store.run("inner").data.tags


def test_listeners_hear_of_each_configure():
    """Other parts of skilltrace are told of new settings."""
    heard = []
    config.on_change(heard.append)
    try:
        settings = configure("heard")
    finally:
        config._on_change.pop()
    assert heard == [settings]


def test_threads_resolve_the_settings_once():
    """Calls that start at once share one object, and so one journal."""
    barrier, seen = threading.Barrier(8), []

    def look():
        barrier.wait()
        seen.append(config.current())

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(settings) for settings in seen}) == 1


def test_reset_forgets(monkeypatch):
    """After `reset` the environment is read anew."""
    configure("first")
    config.reset()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "second")
    assert config.current().experiment == "second"


def test_redact_is_in_force():
    """What `redact=` was given decides from then on."""
    settings = configure(redact=["ssn", re.compile("EMP-[0-9]+")])
    assert settings.redactor.value("SSN", "1") == MASK
    assert settings.redactor.text("EMP-12") == MASK


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    """Journals need a folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="spool_dir"):
        configure(spool_dir=tmp_path / "file")


# --- switched off ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["argument", "variable"])
def switched_off(request, store, monkeypatch):
    """The tracking is off, in each way."""
    if request.param == "argument":
        store.configure(enabled=False)
    else:
        monkeypatch.setenv("SKILLTRACE_ENABLED", "false")
        store.configure()
    return store


@pytest.fixture
def nothing_written(switched_off, tmp_path):
    """Checks at the end of the test that there is neither a journal nor an experiment."""
    yield
    assert skilltrace.flush()
    assert not (tmp_path / "spool").exists()
    assert switched_off.client.get_experiment_by_name(switched_off.experiment) is None


def test_switched_off_functions_are_called_as_they_are(nothing_written):
    """A function has its result, and no run round it."""

    @tracked_job
    def function(a):
        return skilltrace.current_run(), a

    assert function(1) == (None, 1)


def test_switched_off_coroutines_are_awaited_as_they_are(nothing_written):
    """A coroutine too."""

    @tracked_phase
    async def coroutine(a):
        return skilltrace.current_run(), a

    assert asyncio.run(coroutine(2)) == (None, 2)


def test_switched_off_generators_are_driven_as_they_are(nothing_written):
    """Generators, plain and async, give what they yield."""

    @tracked_phase
    def generator(a):
        yield skilltrace.current_run()
        yield a

    @tracked_phase
    async def async_generator(a):
        yield skilltrace.current_run()
        yield a

    async def collect():
        return [item async for item in async_generator(4)]

    assert list(generator(3)) == [None, 3]
    assert asyncio.run(collect()) == [None, 4]


def test_switched_off_modules_are_called_as_they_are(nothing_written, lm):
    """A tracked DSPy module gives its prediction."""
    import dspy

    module = tracked_phase("phase")(dspy.Predict("question -> answer"))
    assert module(question="?").answer


def test_a_switched_off_block_gives_a_run(nothing_written, tmp_path):
    """What is done to the run of a `with` block does nothing, and raises nothing."""
    file = tmp_path / "file.txt"
    file.write_text("content")
    with tracked_job("job_{job_id}") as job, tracked_phase("phase") as run:
        run.log_metric("a", 1)
        run.log_metrics({"a": 1})
        assert run.log_param("a", 1) == 1
        run.log_params({"b": 1})
        run.set_tag("a", 1)
        run.set_tags({"a": 1})
        run.log_text("a", "a.txt")
        run.log_dict({}, "a.json")
        run.log_artifact(file)
        run.log_turn("user", "hi")
        run.result = {"score": 1}
        assert run.name
        assert run.usage.calls == 0
        assert job.kind == "job"


def test_switched_off_exceptions_pass(nothing_written):
    """Errors come as they are, from functions and blocks."""

    @tracked_phase
    def phase():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        phase()
    with pytest.raises(KeyError, match="mine"), tracked_phase("block"):
        raise KeyError("mine")


def test_it_can_be_switched_on_again(switched_off):
    """What was decorated meanwhile is tracked from then on."""

    @tracked_phase
    def phase():
        pass

    phase()
    switched_off.configure(enabled=True)
    phase()
    assert switched_off.run().info.run_name == "phase"
