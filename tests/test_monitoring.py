"""The names that the seed's users know: `setup_dspy_autologging`, `MLflowContext`, `get_current_run_id`."""

import asyncio
import json
import os
import socket
import sys

import dspy
import pytest
from conftest import Tracking, new_experiment

import skilltrace
from skilltrace import (
    ConfigurationError,
    MLflowContext,
    autolog,
    current_run,
    get_current_run_id,
    setup_dspy_autologging,
    tracked_job,
    tracked_phase,
)

QA = "question -> answer"


def dspy_config(name):
    from mlflow.utils.autologging_utils import get_autologging_config

    return get_autologging_config("dspy", name)


def mlflow_callbacks():
    callbacks = sys.modules["dspy.dsp.utils.settings"].main_thread_config["callbacks"]
    return [callback for callback in callbacks if type(callback).__name__ == "MlflowCallback"]


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


@pytest.fixture
def setup(sqlite_uri):
    """Calls `setup_dspy_autologging` for a fresh experiment; gives that, and what was returned."""

    def call(**options):
        tracking = Tracking(sqlite_uri, new_experiment())
        returned = setup_dspy_autologging(tracking_uri=sqlite_uri, experiment_name=tracking.experiment, **options)
        return tracking, returned

    return call


# --- setup_dspy_autologging ------------------------------------------------------------------------------------------


def test_it_returns_true_where_autologging_is_on(setup):
    """The store answers: True, and MLflow's callback is in DSPy."""
    _, returned = setup()
    assert returned is True
    assert len(mlflow_callbacks()) == 1


def test_runs_go_to_its_experiment(setup):
    """It configures skilltrace as `configure` does."""
    tracking, _ = setup()
    with tracked_job("job"):
        pass
    assert tracking.run().info.run_name == "job"


def test_its_defaults_are_compiles_and_evaluations_without_traces(setup, lm):
    """As its users know it: `log_compiles` and `log_evals`, no `log_traces`."""
    setup()
    assert [dspy_config(name) for name in ("log_compiles", "log_evals", "log_traces")] == [True, True, False]


def test_its_options_reach_mlflow(setup, lm):
    """Each option is `mlflow.dspy.autolog`'s."""
    tracking, _ = setup(log_compiles=False, log_evals=False, log_traces=True)
    assert [dspy_config(name) for name in ("log_compiles", "log_evals", "log_traces")] == [False, False, True]
    tracked_phase("traced")(dspy.Predict(QA))(question="hello")
    run = tracking.run()
    sys.modules["mlflow"].flush_trace_async_logging()
    traces = tracking.client.search_traces(locations=[tracking.experiment_id], run_id=run.info.run_id)
    assert [json.loads(trace.data.request) for trace in traces] == [{"question": "hello"}]


def test_called_again_the_new_options_hold(setup):
    """A second call with other options changes what is logged, and adds no second callback."""
    setup(log_traces=False)
    _, returned = setup(log_traces=True)
    assert returned is True
    assert dspy_config("log_traces") is True
    assert len(mlflow_callbacks()) == 1


def test_disabled_it_returns_false_and_nothing_is_recorded(setup, lm):
    """`disable=True`: the decorated calls are plain calls, and autologging is off."""
    tracking, _ = setup()
    with tracked_job("before"):
        pass
    assert skilltrace.flush(60)
    assert setup(disable=True)[1] is False
    assert mlflow_callbacks() == []
    assert tracked_phase("off")(dspy.Predict(QA))(question="hello").answer
    assert [run.info.run_name for run in tracking.runs()] == ["before"]


def test_enabled_again_it_is_on_again(setup):
    """After `disable=True` another call turns all on again."""
    setup(disable=True)
    tracking, returned = setup()
    with tracked_job("job"):
        pass
    assert returned is True
    assert tracking.run().info.run_name == "job"


def test_a_server_that_is_down_makes_it_false_and_loses_nothing(setup):
    """False says that autologging is not on yet; runs are recorded, and kept until the server answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert setup_dspy_autologging(tracking_uri=uri, experiment_name="down") is False
        with tracked_job("kept"):
            pass
        assert skilltrace.status().pending_runs == 1
        skilltrace.configure(flush_timeout=0, autolog=False)


@pytest.mark.parametrize("bad", [{"experiment_name": " "}, {"tracking_uri": "gopher://x"}, {"experiment_name": 7}])
def test_a_bad_value_is_refused_at_once(bad):
    """A ConfigurationError names the setting, and what was configured stays."""
    before = skilltrace.config.current(), autolog.options
    with pytest.raises(ConfigurationError, match=r"experiment|tracking_uri"):
        setup_dspy_autologging(**bad)
    assert (skilltrace.config.current(), autolog.options) == before
    assert mlflow_callbacks() == []


def test_it_imports_dspy_by_itself(sqlite_uri, python):
    """It may be the first thing that an application does, before DSPy is imported; the default experiment is `dspy`."""
    python(
        f"""
import sys
from skilltrace import setup_dspy_autologging
assert "dspy" not in sys.modules
assert setup_dspy_autologging({sqlite_uri!r}) is True
import dspy
import mlflow
assert "MlflowCallback" in [type(callback).__name__ for callback in dspy.settings.callbacks]
assert mlflow.get_experiment_by_name("dspy").experiment_id == mlflow.tracking.fluent._get_experiment_id()
"""
    )


# --- MLflowContext ---------------------------------------------------------------------------------------------------


def test_a_context_alone_is_a_job(store):
    """By itself it is a run of its own, with its tags and description, and the status of success."""
    with MLflowContext("miprov2-run", tags={"optimizer": "miprov2"}, description="First try.") as context:
        assert context.run is current_run()
        context.run.log_metric("quality_score", 0.85)
    run = store.run()
    assert run.info.run_name == "miprov2-run"
    assert run.info.status == "FINISHED"
    assert run.data.tags["optimizer"] == "miprov2"
    assert run.data.tags["mlflow.note.content"] == "First try."
    assert run.data.tags["skilltrace.kind"] == "job"
    assert run.data.tags["status"] == "success"
    assert run.data.metrics["quality_score"] == 0.85
    assert "error" not in run.data.tags


def test_a_context_in_a_job_is_a_phase_of_it(store):
    """Inside another run it is nested in that."""
    with tracked_job("job"), MLflowContext("inner"):
        pass
    inner = store.run("inner")
    assert store.parent(inner) == store.run("job").info.run_id
    assert inner.data.tags["skilltrace.kind"] == "phase"


def test_contexts_nest(store):
    """One in the other; a decorated function inside is a child of the innermost."""

    @tracked_phase
    def work():
        pass

    with MLflowContext("outer"), MLflowContext("inner"):
        work()
    assert store.parent(store.run("inner")) == store.run("outer").info.run_id
    assert store.parent(store.run("work")) == store.run("inner").info.run_id


def test_the_phases_of_a_context_do_not_inherit_its_status(store):
    """`status` and `error` are said of the run whose block ended, when it ends."""
    with pytest.raises(LookupError), MLflowContext("outer"):
        with tracked_phase("phase"):
            pass
        raise LookupError("no such skill")
    assert "status" not in store.run("phase").data.tags


def test_an_exception_is_tagged_and_passes_through(store):
    """The tags `status` and `error`, as its users query for them, beside those of every failed run."""
    error = LookupError("no such skill")
    with pytest.raises(LookupError) as caught, MLflowContext("broken"):
        raise error
    assert caught.value is error
    run = store.run()
    assert run.info.status == "FAILED"
    assert (run.data.tags["status"], run.data.tags["error"]) == ("failed", "no such skill")
    assert run.data.tags["error.type"] == "LookupError"
    assert "no such skill" in store.text(run, "error.txt")


def test_a_context_counts_lm_calls(store, lm, model_server):
    """It is a run like any other."""
    with MLflowContext("usage"):
        dspy.Predict(QA)(question="hello")
    assert store.run().data.metrics["lm_tokens_total"] == model_server.tally.total_tokens


def test_a_context_without_a_name_has_one(store):
    """All arguments may be left out."""
    with MLflowContext():
        pass
    assert store.run().info.run_name == "run"


def test_braces_in_names_and_tags_stand_for_themselves(store):
    """Here a name is text, no template."""
    with MLflowContext("run {job_id} {{x}}", tags={"note": "{user_id}", "n": 7}):
        pass
    run = store.run()
    assert run.info.run_name == "run {job_id} {{x}}"
    assert (run.data.tags["note"], run.data.tags["n"]) == ("{user_id}", "7")


def test_the_run_of_a_context_begins_when_it_is_entered(store):
    """Before that there is none, and an attribute says so plainly; afterwards it can still be read."""
    context = MLflowContext("later")
    with pytest.raises(RuntimeError, match="entered"):
        context.run
    assert context.run_id is None
    with context:
        pass
    assert context.run_id == store.run().info.run_id
    assert context.run.ended


def test_a_context_can_be_entered_again(store):
    """Each time is another run."""
    context = MLflowContext("again")
    for _ in range(2):
        with context:
            pass
    assert [run.info.run_name for run in store.runs()] == ["again", "again"]
    assert [run.info.status for run in store.runs()] == ["FINISHED", "FINISHED"]


def test_contexts_in_concurrent_tasks_are_kept_apart(store):
    """Each task's context is its own run, a child of the run around them all."""

    async def work(n, barrier):
        with MLflowContext(f"task {n}") as context:
            barrier[n].set()
            await barrier[1 - n].wait()
            assert current_run() is context.run

    async def main():
        barrier = [asyncio.Event(), asyncio.Event()]
        await asyncio.gather(work(0, barrier), work(1, barrier))

    with MLflowContext("outer"):
        asyncio.run(main())
    outer = store.run("outer").info.run_id
    assert [store.parent(store.run(f"task {n}")) for n in range(2)] == [outer, outer]


def test_switched_off_a_context_is_an_empty_block(store):
    """`enabled=False`: the block runs, its run can be logged to, and nothing comes of it."""
    store.configure(enabled=False)
    with MLflowContext("off") as context:
        context.run.log_metric("a", 1)
        assert current_run() is None
    assert get_current_run_id() is None
    store.configure()
    with tracked_job("on"):
        pass
    assert [run.info.run_name for run in store.runs()] == ["on"]


# --- get_current_run_id ----------------------------------------------------------------------------------------------


def test_the_current_run_id_is_mlflows(store):
    """Inside a run it is the id under which MLflow has it, of the innermost."""
    with tracked_job("job"):
        outer = get_current_run_id()
        with tracked_phase("phase"):
            inner = get_current_run_id()
    assert outer == store.run("job").info.run_id
    assert inner == store.run("phase").info.run_id


def test_outside_any_run_there_is_none():
    """No run, no id."""
    assert get_current_run_id() is None


def test_a_run_of_mlflows_own_is_found(store):
    """Outside skilltrace's runs it is that of `mlflow.active_run()`."""
    import mlflow

    mlflow.set_tracking_uri(store.uri)
    mlflow.set_experiment(store.experiment)
    with mlflow.start_run() as run:
        assert get_current_run_id() == run.info.run_id
    assert get_current_run_id() is None


def test_without_mlflows_answer_there_is_none(caplog):
    """A server that is down: None, in the time that `flush_timeout` allows, and a warning says why."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        skilltrace.configure("down", tracking_uri=uri, flush_timeout=0.2, autolog=False)
        with tracked_job("job"):
            assert get_current_run_id() is None
    assert "The run id is not known" in caplog.text
