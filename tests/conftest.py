"""What the tests share: real MLflow stores, a real model server, and a process that forgets between tests."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest

# Before anything is imported: no test may touch the user's journals, settings or caches, or talk to the world.
_HOME = tempfile.mkdtemp(prefix="skilltrace-tests-")
os.environ.update(
    SKILLTRACE_SPOOL_DIR=f"{_HOME}/spool",
    DSPY_CACHEDIR=f"{_HOME}/dspy-cache",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="true",
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    GIT_PYTHON_REFRESH="quiet",
)
for _name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_BACKEND_STORE_URI"):
    os.environ.pop(_name, None)

import skilltrace
from skilltrace import autolog, config, faults, journal, usage
from skilltrace.demo.model_server import ModelServer


def forget_process():
    """Bring the process to the state that it has after `import skilltrace`."""
    for opened in list(journal._journals.values()):
        opened.close(10.0)
    journal._journals.clear()
    journal._latest = None
    config.reset()
    faults.forget()
    usage.strays.__init__()


@pytest.fixture(autouse=True)
def clean_process(tmp_path, monkeypatch):
    """Each test begins and ends with nothing configured and nothing open; faults of skilltrace's own raise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SKILLTRACE_SPOOL_DIR", str(tmp_path / "spool"))
    forget_process()
    with faults.strict():
        yield
        forget_process()
    assert skilltrace.current_run() is None


_order = {}


@pytest.fixture(autouse=True, scope="session")
def remember_order():
    """Note the order in which runs are opened: MLflow's start times are milliseconds, and many runs share one."""
    original = skilltrace.Run.__init__

    def opened(run, *args, **kwargs):
        original(run, *args, **kwargs)
        _order[run.key] = len(_order)

    skilltrace.Run.__init__ = opened
    yield
    skilltrace.Run.__init__ = original


class Tracking:
    """A real MLflow store and one experiment in it, as a test reads it."""

    def __init__(self, uri, experiment, artifacts=None):
        self.uri, self.experiment, self.artifacts = uri, experiment, artifacts

    def configure(self, **options):
        """Configure skilltrace to write here; autologging only where it is asked for."""
        options = {"autolog": False, "artifact_location": self.artifacts, **options}
        return skilltrace.configure(self.experiment, tracking_uri=self.uri, **options)

    @property
    def client(self):
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    @property
    def experiment_id(self):
        return self.client.get_experiment_by_name(self.experiment).experiment_id

    def runs(self, *, flush=True):
        """All runs of the experiment, in the order in which they started."""
        if flush:
            assert skilltrace.flush(60), skilltrace.status()
        found = self.client.search_runs([self.experiment_id], order_by=["attributes.start_time ASC"], max_results=5000)
        return sorted(found, key=lambda run: _order.get(run.data.tags.get("skilltrace.key"), run.info.start_time))

    def run(self, name=None):
        """The only run, or the only one of a name."""
        runs = [run for run in self.runs() if name is None or run.info.run_name == name]
        assert len(runs) == 1, [run.info.run_name for run in runs]
        return runs[0]

    def files(self, run, folder=None):
        """The paths of a run's artifacts."""
        paths = []
        for file in self.client.list_artifacts(run.info.run_id, folder):
            paths += self.files(run, file.path) if file.is_dir else [file.path]
        return sorted(paths)

    def read(self, run, path):
        """The bytes of an artifact."""
        from mlflow.artifacts import download_artifacts

        with tempfile.TemporaryDirectory() as folder:
            local = download_artifacts(
                run_id=run.info.run_id, artifact_path=path, dst_path=folder, tracking_uri=self.uri
            )
            return Path(local).read_bytes()

    def text(self, run, path):
        """The text of an artifact."""
        return self.read(run, path).decode()

    def json(self, run, path):
        """The content of a JSON artifact."""
        return json.loads(self.text(run, path))

    def parent(self, run):
        """The id of a run's parent, or None."""
        return run.data.tags.get("mlflow.parentRunId")


@pytest.fixture(scope="session")
def sqlite_uri(tmp_path_factory):
    """One sqlite store for all tests: its schema takes seconds to create."""
    return f"sqlite:///{tmp_path_factory.mktemp('sqlite') / 'mlflow.db'}"


def new_experiment():
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def store(sqlite_uri, tmp_path):
    """A fresh experiment in the sqlite store, and skilltrace configured to write to it."""
    tracking = Tracking(sqlite_uri, new_experiment(), str(tmp_path / "artifacts"))
    tracking.configure()
    return tracking


class MlflowServer:
    """A real `mlflow server` process on loopback."""

    def __init__(self, folder):
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", str(folder / "files"),
        ]  # fmt: skip
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=folder, start_new_session=True,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # no job queue beside it
            )  # fmt: skip

    def wait(self, seconds=120):
        """Wait until it answers: there is no event to wait for in another process but its answer."""
        import threading
        import time
        import urllib.error
        import urllib.request

        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                threading.Event().wait(0.1)
        raise RuntimeError(f"mlflow server did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self):
        """End it and the workers that it started."""
        import signal

        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory):
    """One MLflow server for all tests."""
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    try:
        yield server.wait()
    finally:
        server.stop()


@pytest.fixture(params=["sqlite", "server"])
def any_store(request, tmp_path):
    """As `store`, once on sqlite and once on a server process."""
    if request.param == "sqlite":
        uri = request.getfixturevalue("sqlite_uri")
        tracking = Tracking(uri, new_experiment(), str(tmp_path / "artifacts"))
    else:
        tracking = Tracking(request.getfixturevalue("mlflow_server").uri, new_experiment())
    tracking.configure()
    return tracking


@pytest.fixture
def model_server():
    """A local OpenAI-compatible model server."""
    with ModelServer() as server:
        yield server


@pytest.fixture
def lm(model_server):
    """A real `dspy.LM` that talks to the model server, DSPy's LM for this test; no cache, no retries."""
    import dspy

    made = dspy.LM(
        "openai/demo",
        api_base=model_server.base_url,
        api_key="sk-test-key-of-the-tests-000000",
        cache=False,
        num_retries=0,
    )
    with dspy.context(lm=made):
        yield made


@pytest.fixture
def autologging(store):
    """Autologging on, writing to the store; off again afterwards."""
    import dspy  # noqa: F401  # autologging is turned on where DSPy is imported

    settings = store.configure(autolog=True)
    assert autolog.ensure(settings)
    yield store
    skilltrace.flush(30)
    autolog.disable()


@pytest.fixture
def python(tmp_path):
    """Runs a program in a process of its own, as a user would; returns the finished process."""

    def run(code, *, env=None, timeout=120, check=True):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, cwd=tmp_path,
            # A loaded machine takes its time to import MLflow at the end of a short process.
            env={**os.environ, "SKILLTRACE_FLUSH_TIMEOUT": "60", **(env or {})}, check=False,
        )  # fmt: skip
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run


def pytest_sessionfinish(session, exitstatus):
    """Where nothing may be skipped (CI installs what tests need), a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    if skipped and os.environ.get("SKILLTRACE_TESTS_MAY_SKIP") == "no":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        for report in skipped:
            reporter.write_line(f"skipped, where nothing may be: {report.nodeid}: {report.longrepr[2]}", red=True)
    shutil.rmtree(_HOME, ignore_errors=True)
