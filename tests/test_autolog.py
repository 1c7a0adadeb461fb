"""Autologging: on where MLflow answers, never in the way of the user's DSPy, and each trace at its own run."""

import asyncio
import json
import logging
import os
import socket
import sys
import threading
import time
import types

import dspy
import pytest
from conftest import MlflowServer, Tracking, new_experiment

import skilltrace
from skilltrace import autolog, delivery, mlflow_bridge, tracked_job, tracked_phase

QA = "question -> answer"


def kinds(callbacks):
    return [type(callback).__name__ for callback in callbacks]


def global_config():
    return sys.modules["dspy.dsp.utils.settings"].main_thread_config


def questions(store, run):
    """The questions that the traces linked to a run were made for."""
    import mlflow

    mlflow.flush_trace_async_logging()
    traces = store.client.search_traces(locations=[store.experiment_id], run_id=run.info.run_id)
    return sorted(json.loads(trace.data.request)["question"] for trace in traces)


@pytest.fixture(autouse=True)
def mlflow_as_before():
    """What MLflow is told in a test, and leaves in the environment, is forgotten after it."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID")
    before = {name: os.environ.get(name) for name in names}
    yield
    autolog.disable()
    mlflow = sys.modules.get("mlflow")
    if mlflow is not None:
        mlflow.set_tracking_uri(None)
        mlflow.tracking.fluent._active_experiment_id = None
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


# --- traces ----------------------------------------------------------------------------------------------------------


def test_a_trace_is_linked_to_the_run_that_it_was_made_in(autologging, lm):
    """`search_traces(run_id=…)` finds the traces of a run's module calls, and no others."""
    module = tracked_phase("phase")(dspy.Predict(QA))
    module(question="one")
    module(question="two")
    assert [questions(autologging, run) for run in autologging.runs()] == [["one"], ["two"]]


def test_a_trace_made_outside_any_run_is_linked_to_none(autologging, lm):
    """Traces before and after a run are not its own."""
    dspy.Predict(QA)(question="before")
    with tracked_phase("phase"):
        dspy.Predict(QA)(question="inside")
    dspy.Predict(QA)(question="after")
    assert questions(autologging, autologging.run()) == ["inside"]


def test_traces_of_concurrent_phases_are_kept_apart(autologging, lm):
    """Tasks that run interleaved: each phase has the traces made in it, and the job those made in it directly."""

    @tracked_phase("{name}")
    async def phase(name):
        for n in range(2):
            await dspy.Predict(QA).acall(question=f"{name} {n}")

    @tracked_job("job")
    async def job():
        await asyncio.gather(dspy.Predict(QA).acall(question="job"), *(phase(name) for name in "abcd"))

    asyncio.run(job())
    for name in "abcd":
        assert questions(autologging, autologging.run(name)) == [f"{name} 0", f"{name} 1"]
    assert questions(autologging, autologging.run("job")) == ["job"]


def test_traces_in_the_threads_of_parallel_are_linked(autologging, lm):
    """`dspy.Parallel` works in threads of its own; the traces are the run's."""
    program = dspy.Predict(QA)
    with tracked_phase("parallel"):
        dspy.Parallel(num_threads=3, disable_progress_bar=True)([(program, {"question": f"{n}"}) for n in range(4)])
    assert questions(autologging, autologging.run()) == ["0", "1", "2", "3"]


def test_a_phase_inside_a_trace_is_linked_to_it(autologging, lm):
    """A tracked part of an untracked module: the trace is the job's, and shows what the phase did."""

    class Outer(dspy.Module):
        def __init__(self):
            super().__init__()
            self.inner = tracked_phase("inner")(dspy.Predict(QA))

        def forward(self, question):
            return self.inner(question=question)

    with tracked_job("job"):
        Outer()(question="hello")
    assert questions(autologging, autologging.run("job")) == ["hello"]
    assert questions(autologging, autologging.run("inner")) == ["hello"]


def test_the_trace_of_a_call_that_failed_is_linked(autologging, lm):
    """A run that fails has its trace."""

    @tracked_phase("broken")
    class Broken(dspy.Module):
        def forward(self, question):
            raise LookupError(question)

    with pytest.raises(LookupError):
        Broken()(question="why")
    assert questions(autologging, autologging.run()) == ["why"]


def test_a_process_that_ends_at_once_has_its_traces(store, python):
    """A short program, set up by the environment, with its first run in an async task: nothing is lost at its end."""
    python(
        """
import asyncio
import dspy, skilltrace
from dspy.utils import DummyLM

@skilltrace.tracked_phase("short")
async def short():
    with dspy.context(lm=DummyLM([{"answer": "red"}])):
        await dspy.Predict("question -> answer").acall(question="short")

async def main():
    await asyncio.create_task(short())

asyncio.run(main())
""",
        env={"MLFLOW_TRACKING_URI": store.uri, "MLFLOW_EXPERIMENT_NAME": store.experiment},
    )
    assert questions(store, store.run()) == ["short"]


def test_a_forked_process_has_its_traces(store, python):
    """A worker forked after the parent has traced: its traces arrive, and its end is not held up."""
    python(
        """
import multiprocessing, time
import dspy, skilltrace
from dspy.utils import DummyLM

skilltrace.configure()

def work(question):
    with skilltrace.tracked_phase(question), dspy.context(lm=DummyLM([{"answer": "red"}])):
        dspy.Predict("question -> answer")(question=question)

if __name__ == "__main__":
    work("parent")
    assert skilltrace.flush(60)
    child = multiprocessing.get_context("fork").Process(target=work, args=("child",))
    child.start()
    child.join(60)
    assert child.exitcode == 0
""",
        env={"MLFLOW_TRACKING_URI": store.uri, "MLFLOW_EXPERIMENT_NAME": store.experiment},
    )
    for name in ("parent", "child"):
        assert questions(store, store.run(name)) == [name]


def test_first_runs_that_start_at_once_all_have_their_traces(store, lm, monkeypatch):
    """Several threads whose runs are the first of the process: none goes on before autologging is on."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", store.experiment)
    skilltrace.config.reset()
    barrier = threading.Barrier(4)

    def work(n):
        barrier.wait(30)
        with dspy.context(lm=lm), tracked_phase(f"phase {n}"):
            dspy.Predict(QA)(question=f"{n}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [questions(store, store.run(f"phase {n}")) for n in range(4)] == [["0"], ["1"], ["2"], ["3"]]


@tracked_phase("secretive")
class Secretive(dspy.Module):
    """A module that is given a secret, passes a key on in a text, and fails with one."""

    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict(QA)

    def forward(self, question, password, login):
        made = self.predict(question=question)
        raise LookupError(f"{question} {made.answer}")


def test_no_secret_is_in_a_trace(autologging, lm):
    """Arguments with secret names, and keys of known shapes in texts, answers and errors, are masked in traces too."""
    key = "sk-live-0123456789abcdefghijkl"
    with pytest.raises(LookupError):
        Secretive()(question=f"What is {key}?", password="hunter2-hunter2", login={"api_token": "letmein-letmein"})
    run = autologging.run()
    assert len(questions(autologging, run)) == 1
    (trace,) = autologging.client.search_traces(locations=[autologging.experiment_id], run_id=run.info.run_id)
    recorded = trace.to_json() + repr(trace.info)
    assert len(trace.data.spans) > 3
    assert "What is [redacted]?" in recorded
    for secret in (key, "hunter2-hunter2", "letmein-letmein"):
        assert secret not in recorded


def test_span_processors_of_the_users_are_kept(autologging, lm):
    """What the user has told MLflow to do with spans is still done."""
    import mlflow

    seen = []

    def mine(span):
        seen.append(span.name)

    mlflow.tracing.configure(span_processors=[mine])
    try:
        autologging.configure(autolog=False)
        autologging.configure(autolog=True)
        dspy.Predict(QA)(question="hello")
    finally:
        mlflow.tracing.configure(span_processors=[])
    assert "Predict.forward" in seen


# --- on and off ------------------------------------------------------------------------------------------------------


def test_it_is_on_at_configure(store):
    """By default `configure` turns it on, if DSPy is imported, and points MLflow at the same store and experiment."""
    import mlflow

    store.configure(autolog=None)
    assert "MlflowCallback" in kinds(global_config()["callbacks"])
    assert mlflow.get_tracking_uri() == store.uri
    assert mlflow.tracking.fluent._get_experiment_id() == store.experiment_id


def test_it_is_on_at_the_first_run_where_dspy_comes_later(store, python):
    """`configure` before `import dspy`: the first tracked run turns it on."""
    python(
        """
import sys
import skilltrace
skilltrace.configure()
assert "dspy" not in sys.modules
import dspy
with skilltrace.tracked_phase("first"):
    assert "MlflowCallback" in [type(callback).__name__ for callback in dspy.settings.callbacks]
""",
        env={"MLFLOW_TRACKING_URI": store.uri, "MLFLOW_EXPERIMENT_NAME": store.experiment},
    )


def test_switched_off_it_leaves_mlflow_and_dspy_alone(store, python):
    """`autolog=False`: MLflow's own tracking URI, DSPy's callbacks and its usage tracking are as without skilltrace."""
    python(
        """
import os
import dspy, mlflow
before = mlflow.get_tracking_uri(), dict(os.environ), dspy.settings.track_usage
import skilltrace
skilltrace.configure(autolog=False)
with skilltrace.tracked_phase("quiet"):
    assert [type(callback).__name__ for callback in dspy.settings.callbacks] == ["SkilltraceCallback"]
assert skilltrace.flush(60)
assert (mlflow.get_tracking_uri(), dict(os.environ), dspy.settings.track_usage) == before
""",
        env={
            "SKILLTRACE_SPOOL_DIR": os.environ["SKILLTRACE_SPOOL_DIR"],
            "MLFLOW_BACKEND_STORE_URI": store.uri,
            "MLFLOW_EXPERIMENT_NAME": store.experiment,
        },
    )
    assert store.run().info.run_name == "quiet"


def test_configured_off_it_goes_off(autologging):
    """`configure(autolog=False)` after it was on turns it off again, and on again when asked."""
    assert "MlflowCallback" in kinds(global_config()["callbacks"])
    autologging.configure(autolog=False)
    assert "MlflowCallback" not in kinds(global_config()["callbacks"])
    autologging.configure(autolog=True)
    assert kinds(global_config()["callbacks"]).count("MlflowCallback") == 1


def test_a_module_without_a_prediction_is_not_warned_of(autologging):
    """MLflow turns on DSPy's usage tracking, which warns at each call of such a module; the user did not ask for it."""

    class Text(dspy.Module):
        def forward(self):
            return "text"

    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    logger = logging.getLogger("dspy.primitives.module")
    logger.addHandler(handler)
    try:
        tracked_phase("text")(Text())()
    finally:
        logger.removeHandler(handler)
    assert heard == []


def test_switched_off_dspys_usage_tracking_is_as_before(store):
    """MLflow leaves it on; it goes off with autologging, unless it was on before."""
    store.configure(autolog=True)
    assert global_config()["track_usage"] is True
    store.configure(autolog=False)
    assert global_config()["track_usage"] is False
    global_config()["track_usage"] = True
    try:
        store.configure(autolog=True)
        store.configure(autolog=False)
        assert global_config()["track_usage"] is True
    finally:
        global_config()["track_usage"] = False


def test_traces_of_one_store_do_not_go_to_another(autologging, lm):
    """Configured for a store that is down, autologging is off: the traces are not for the store before."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        skilltrace.configure("other", tracking_uri=f"http://127.0.0.1:{taken.getsockname()[1]}", flush_timeout=0)
        assert not autolog.ensure(skilltrace.config.current())
        attempt = autolog._attempt
        attempt._thread.join(60)
        assert "MlflowCallback" not in kinds(global_config()["callbacks"])
    autologging.configure(autolog=False)


def test_the_environment_is_left_alone(store, monkeypatch):
    """MLflow's own functions leave their choice in the environment, where a later `configure` would find it."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "4711")
    before = dict(os.environ)
    store.configure(autolog=True)
    assert autolog.ensure(skilltrace.config.current())
    assert dict(os.environ) == before


def test_the_context_of_dspy_is_not_made_global(store, lm):
    """What `dspy.context` sets where autologging is turned on stays in that context."""
    before = {name: value for name, value in global_config().items() if name not in ("callbacks", "track_usage")}
    with dspy.context(lm=lm, max_errors=77, callbacks=[]):
        store.configure(autolog=True)
        assert autolog.ensure(skilltrace.config.current())
    after = {name: value for name, value in global_config().items() if name not in ("callbacks", "track_usage")}
    assert after == before


# --- our callback and MLflow's ---------------------------------------------------------------------------------------


def test_our_callback_stands_behind_mlflows(autologging, lm):
    """A trace must have been started when we ask for its id."""
    with tracked_phase("phase"):
        assert kinds(dspy.settings.callbacks)[-2:] == ["MlflowCallback", "SkilltraceCallback"]


def test_our_callback_moves_behind_an_mlflow_callback_that_comes_later(store, lm):
    """Where the user turns on autologging by hand after our first run, the next run has its trace all the same."""
    import mlflow
    import mlflow.dspy

    from skilltrace import dspy_bridge

    with tracked_phase("first"):
        pass
    mlflow.set_tracking_uri(store.uri)
    mlflow.set_experiment(store.experiment)
    dspy_bridge.without_owning(mlflow.dspy.autolog)
    try:
        with tracked_phase("second"):
            assert kinds(dspy.settings.callbacks)[-2:] == ["MlflowCallback", "SkilltraceCallback"]
            assert kinds(dspy.settings.callbacks).count("SkilltraceCallback") == 1
            dspy.Predict(QA)(question="by hand")
        assert questions(store, store.run("second")) == ["by hand"]
    finally:
        mlflow_bridge.disable_autolog(dspy_bridge.without_owning)


def test_an_open_context_follows_autologging(store, lm):
    """A `dspy.context` entered before autologging went on has its callback from the next run on, while it is on."""
    with dspy.context(lm=lm):
        store.configure(autolog=True)
        with tracked_phase("on"):
            assert kinds(dspy.settings.callbacks) == ["MlflowCallback", "SkilltraceCallback"]
        store.configure(autolog=False)
        with tracked_phase("off"):
            assert kinds(dspy.settings.callbacks) == ["SkilltraceCallback"]


def test_a_later_configure_of_callbacks_loses_no_usage(python):
    """`dspy.configure(callbacks=[…])` drops our callback; the next run puts it back, beside the user's."""
    python(
        """
import dspy, skilltrace
from dspy.utils import DummyLM
from dspy.utils.callback import BaseCallback

class Mine(BaseCallback):
    pass

skilltrace.configure(autolog=False, delivery="external")
with skilltrace.tracked_phase("first"):
    pass
dspy.configure(lm=DummyLM([{"answer": "red"}] * 2), callbacks=[Mine()])
with skilltrace.tracked_phase("second") as run:
    dspy.Predict("question -> answer")(question="?")
    assert [type(callback).__name__ for callback in dspy.settings.callbacks] == ["Mine", "SkilltraceCallback"]
assert run.usage.calls == 1
assert run.usage.duration > 0
"""
    )


# --- dspy.configure stays the user's ---------------------------------------------------------------------------------

PRELUDE = """
import asyncio, threading
import dspy, skilltrace

def is_on():
    from dspy.dsp.utils.settings import main_thread_config
    return "MlflowCallback" in [type(callback).__name__ for callback in main_thread_config["callbacks"]]

def in_thread(function):
    failure = []
    def run():
        try:
            function()
        except Exception as error:
            failure.append(error)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]

def tracked():
    with skilltrace.tracked_phase("phase"):
        pass
"""

OWNERS = {
    "after ours, in the main thread": """
skilltrace.configure()
dspy.configure(max_errors=1)
dspy.configure(max_errors=2)
""",
    "before and after ours": """
dspy.configure(max_errors=1)
skilltrace.configure()
dspy.configure(max_errors=2)
""",
    "ours in another thread": """
in_thread(skilltrace.configure)
dspy.configure(max_errors=2)
""",
    "ours at the first run, in another thread": """
in_thread(tracked)
dspy.configure(max_errors=2)
""",
    "the user's in another thread, which stays the owner": """
def theirs():
    dspy.configure(max_errors=1)
    in_thread(skilltrace.configure)
    dspy.configure(max_errors=2)
in_thread(theirs)
try:
    dspy.configure(max_errors=3)
except RuntimeError:
    pass
else:
    raise AssertionError("DSPy's rule no longer holds")
""",
    "ours at the first run, in an async task": """
async def phase():
    tracked()

async def main():
    await asyncio.create_task(phase())
    dspy.configure(max_errors=1)
    await asyncio.create_task(phase())
    dspy.configure(max_errors=2)

asyncio.run(main())
""",
    "ours in one async task, the user's in another": """
async def ours():
    skilltrace.configure()

async def theirs():
    dspy.configure(max_errors=2)

async def main():
    await asyncio.create_task(ours())
    await asyncio.create_task(theirs())

asyncio.run(main())
""",
}


@pytest.mark.parametrize("case", OWNERS)
def test_nobody_is_locked_out_of_dspy_configure(store, python, case):
    """Turning autologging on neither takes nor needs the right to call `dspy.configure`."""
    python(
        PRELUDE + OWNERS[case] + "\nassert is_on()\nassert dspy.settings.max_errors == 2\n",
        env={"MLFLOW_TRACKING_URI": store.uri, "MLFLOW_EXPERIMENT_NAME": store.experiment},
    )


# --- a server that is down -------------------------------------------------------------------------------------------


def timed(function, *args, **kwargs):
    began = time.monotonic()
    function(*args, **kwargs)
    return time.monotonic() - began


def test_a_server_that_refuses_is_not_waited_for(lm):
    """Nothing listens: `configure` and the first call go on at once, and autologging is off."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert timed(skilltrace.configure, "down", tracking_uri=uri, flush_timeout=0) < 1
        module = tracked_phase("phase")(dspy.Predict(QA))
        assert timed(module, question="hello") < 1
        assert "MlflowCallback" not in kinds(global_config()["callbacks"])
        assert not autolog.ensure(skilltrace.config.current())
        autolog._attempt._thread.join(60)


def test_a_server_that_never_answers_is_waited_for_a_second_and_once(lm):
    """Something listens and says nothing: the wait is bounded, and the calls that follow do not wait at all."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert timed(skilltrace.configure, "silent", tracking_uri=uri, flush_timeout=0) < 2
        module = tracked_phase("phase")(dspy.Predict(QA))
        assert timed(module, question="hello") < 0.5
        assert timed(autolog.disable) < 2
    # The connections are reset now, so that the threads that wait for an answer end.


def test_it_comes_on_when_the_server_answers(lm, tmp_path):
    """A server that starts later than the program: from then on there are traces."""
    comes_on = threading.Event()

    def listener():
        if autolog.ensure(skilltrace.config.current()):
            comes_on.set()
        return comes_on.is_set()

    delivery.on_available.append(listener)
    server = MlflowServer(tmp_path)
    try:
        skilltrace.configure(experiment := new_experiment(), tracking_uri=server.uri)
        module = tracked_phase("phase")(dspy.Predict(QA))
        module(question="too early")
        server.wait()
        assert comes_on.wait(60)
        module(question="in time")
        store = Tracking(server.uri, experiment)
        assert [questions(store, run) for run in store.runs()] == [[], ["in time"]]
    finally:
        delivery.on_available.remove(listener)
        server.stop()


def test_a_server_that_dies_holds_up_neither_the_calls_nor_the_end_of_the_process(tmp_path, python):
    """MLflow alone tries for minutes to export the traces of a program whose server is gone."""
    server = MlflowServer(tmp_path).wait()
    try:
        done = python(
            f"""
import os, signal, time
import dspy, skilltrace
from dspy.utils import DummyLM

skilltrace.configure("dies", tracking_uri={server.uri!r}, flush_timeout=1)
module = skilltrace.tracked_phase("phase")(dspy.Predict("question -> answer"))
with dspy.context(lm=DummyLM([{{"answer": "red"}}] * 21)):
    module(question="?")
    assert skilltrace.flush(60)
    os.killpg({server.process.pid}, signal.SIGKILL)
    began = time.monotonic()
    for _ in range(20):
        module(question="?")
    assert time.monotonic() - began < 10
print(time.time())
""",
            timeout=100,
        )
        assert time.time() - float(done.stdout.strip().splitlines()[-1]) < 20
    finally:
        server.stop()


def test_a_module_of_mlflow_that_is_half_imported_is_not_asked(monkeypatch):
    """The background thread imports MLflow while the user's calls go on."""
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
        assert mlflow_bridge.active_trace_id() is None
        assert mlflow_bridge.fluent_run_id() is None


@pytest.mark.parametrize(
    ("uri", "there"),
    [("sqlite:////tmp/a.db", True), ("/tmp/mlruns", True), ("file:///tmp/mlruns", True), ("databricks://a", False)],
)
def test_files_are_waited_for_and_unknown_services_are_not(uri, there):
    """Only where an answer is sure to come is autologging worth waiting for."""
    assert mlflow_bridge.answers(uri, 1.0) is there


def test_a_server_that_says_no_is_there(model_server):
    """Any HTTP answer says that a server is up."""
    assert mlflow_bridge.answers(model_server.base_url, 5.0)
