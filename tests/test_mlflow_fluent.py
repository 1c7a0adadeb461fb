"""MLflow's own fluent API inside tracked runs, and outside them."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import dspy
import mlflow
import mlflow.tracking.fluent
import pytest
from conftest import new_experiment

import skilltrace
from skilltrace import mlflow_fluent, propagate, tracked_job, tracked_phase


def names(store):
    """The names of all runs by their ids, also of those that the user has started with MLflow."""
    assert skilltrace.flush(60)
    runs = store.client.search_runs([store.experiment_id], max_results=5000)
    return {run.info.run_id: run.info.run_name for run in runs}


def named(store, name):
    """The only run of a name, whoever started it."""
    (run_id,) = (run_id for run_id, other in names(store).items() if other == name)
    return store.client.get_run(run_id)


def parents(store):
    """The name of each run's parent by the run's name."""
    known = names(store)
    runs = store.client.search_runs([store.experiment_id], max_results=5000)
    return {run.info.run_name: known.get(run.data.tags.get("mlflow.parentRunId")) for run in runs}


def test_what_is_logged_lands_on_the_tracked_run(any_store, tmp_path):
    """Each of MLflow's functions that log to the active run."""
    from matplotlib.figure import Figure

    file = tmp_path / "file.txt"
    file.write_text("a file")
    with tracked_phase("phase") as run:
        mlflow.log_metric("metric", 1.5, step=2)
        mlflow.log_metrics({"metrics": 2.0})
        mlflow.log_param("param", "p")
        mlflow.log_params({"params": "ps"})
        mlflow.set_tag("tag", "t")
        mlflow.set_tags({"tags": "ts"})
        mlflow.log_text("text", "text.txt")
        mlflow.log_dict({"a": 1}, "dict.json")
        mlflow.log_artifact(str(file))
        mlflow.log_figure(Figure(), "figure.png")
        mlflow.log_table({"column": [1, 2]}, "table.json")
        mlflow.log_input(mlflow.data.from_numpy(__import__("numpy").zeros(3), name="inputs"), context="training")
        assert mlflow.active_run().info.run_id == run.run_id == skilltrace.get_current_run_id()
        assert mlflow.last_active_run().info.run_id == run.run_id
    assert mlflow.active_run() is None
    stored = any_store.run()
    assert stored.info.status == "FINISHED"
    assert (stored.data.metrics["metric"], stored.data.metrics["metrics"]) == (1.5, 2.0)
    assert (stored.data.params["param"], stored.data.params["params"]) == ("p", "ps")
    assert (stored.data.tags["tag"], stored.data.tags["tags"]) == ("t", "ts")
    assert {"dict.json", "figure.png", "file.txt", "table.json", "text.txt"} <= set(any_store.files(stored))
    assert [entry.dataset.name for entry in stored.inputs.dataset_inputs] == ["inputs"]


def test_a_body_that_does_not_use_mlflow_creates_nothing(store):
    """Being asked for the active run is not using it; reading its id is."""
    store.configure(delivery="external")
    with tracked_phase("phase"):
        active = mlflow.active_run()
        assert isinstance(active, mlflow.ActiveRun)
        assert mlflow.active_run() is active
        assert mlflow.tracking.fluent._get_latest_active_run() is None
        assert not active.exists
    assert store.client.get_experiment_by_name(store.experiment) is None


async def test_concurrent_tasks_keep_their_runs_apart(store):
    """MLflow alone mixes them up: see the next test."""

    @tracked_phase("phase_{name}")
    async def phase(name):
        mlflow.log_metric("before", 1)
        await asyncio.sleep(0)
        mlflow.set_tag("own", name)
        with mlflow.start_run(nested=True, run_name=f"own_{name}"):
            await asyncio.sleep(0)
            mlflow.log_param("name", name)
        await asyncio.sleep(0)
        mlflow.log_metric("after", 1)

    @tracked_job("job_{name}")
    async def job(name):
        await asyncio.gather(*(phase(f"{name}{n}") for n in range(3)))

    await asyncio.gather(*(job(name) for name in "abcd"))
    expected = {f"job_{name}": None for name in "abcd"}
    for name in [f"{job}{n}" for job in "abcd" for n in range(3)]:
        expected |= {f"phase_{name}": f"job_{name[0]}", f"own_{name}": f"phase_{name}"}
    assert parents(store) == expected
    for run in store.client.search_runs([store.experiment_id], max_results=100):
        assert run.info.status == "FINISHED"
        kind, _, name = run.info.run_name.partition("_")
        if kind == "phase":
            assert (run.data.tags["own"], run.data.metrics["before"], run.data.metrics["after"]) == (name, 1, 1)
        elif kind == "own":
            assert run.data.params == {"name": name}


@pytest.fixture
def plain_mlflow(monkeypatch):
    """MLflow without any run of ours; what it is told is forgotten afterwards."""
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    before = mlflow.tracking._tracking_service.utils._tracking_uri
    yield
    while mlflow.active_run() is not None:
        mlflow.end_run()
    mlflow.set_tracking_uri(before)


async def test_the_same_with_mlflow_alone_is_mixed_up(store, plain_mlflow):
    """What the test before would find without the bridge: it is known to be able to fail."""
    mlflow.set_tracking_uri(store.uri)
    mlflow.set_experiment(store.experiment)

    async def job(name):
        with mlflow.start_run(nested=True, run_name=f"job_{name}"):
            await asyncio.sleep(0)
            mlflow.set_tag("own", name)

    await asyncio.gather(job("a"), job("b"))
    runs = {run.info.run_name: run for run in store.client.search_runs([store.experiment_id])}
    assert store.parent(runs["job_b"]) == runs["job_a"].info.run_id
    assert runs["job_b"].data.tags["own"] == "a"  # and b's own tag went to the other run


def test_it_follows_dspys_threads(store, lm):
    """`dspy.Parallel` starts threads that MLflow knows no run for, and a run started around it is the parent there."""

    @tracked_phase("phase_{n}")
    def phase(n):
        mlflow.log_metric("n", n)

    def bare(n):
        mlflow.log_metric(f"bare_{n}", n)

    with tracked_job("job"), mlflow.start_run(nested=True, run_name="own"):
        parallel = dspy.Parallel(num_threads=4, disable_progress_bar=True)
        parallel([(phase, {"n": n}) for n in range(4)])
        parallel([(bare, {"n": n}) for n in range(4)])
    assert parents(store) == {"job": None, "own": "job", **{f"phase_{n}": "own" for n in range(4)}}
    assert set(named(store, "own").data.metrics) == {f"bare_{n}" for n in range(4)}
    for n in range(4):
        assert store.run(f"phase_{n}").data.metrics["n"] == n


async def test_it_follows_to_thread_and_propagate(store):
    """A worker thread logs to the run that it works for."""
    with tracked_job("job"), ThreadPoolExecutor(2) as pool:
        await asyncio.to_thread(mlflow.log_metric, "to_thread", 1)
        pool.submit(propagate(mlflow.log_metric), "pool", 2).result()
    metrics = store.run().data.metrics
    assert (metrics["to_thread"], metrics["pool"]) == (1, 2)


def test_runs_started_inside_nest_like_the_calls(store):
    """Tracked in started in tracked, and started in started; `end_run` ends the innermost started one."""
    with tracked_job("job"):
        mlflow.start_run(nested=True, run_name="one")
        mlflow.start_run(nested=True, run_name="two")
        with tracked_phase("phase"):
            assert mlflow.active_run().info.run_name == "phase"
            mlflow.start_run(nested=True, run_name="three")
            mlflow.end_run()
            assert mlflow.active_run().info.run_name == "phase"
        assert mlflow.active_run().info.run_name == "two"
        mlflow.end_run("FAILED")
        assert mlflow.active_run().info.run_name == "one"
        with pytest.raises(Exception, match="already active"):
            mlflow.start_run()
        mlflow.end_run()
        assert mlflow.active_run().info.run_name == "job"
    assert parents(store) == {"job": None, "one": "job", "two": "one", "phase": "two", "three": "phase"}
    assert named(store, "two").info.status == "FAILED"
    assert named(store, "one").info.status == "FINISHED"


def test_a_function_with_runs_of_its_own_works_when_it_is_decorated(store, caplog):
    """`start_run` without `nested` would raise inside a run; `end_run` would end it: neither does, and both are said."""

    @tracked_phase
    def work():
        with mlflow.start_run(run_name="own"):
            mlflow.log_metric("inner", 1)
        mlflow.end_run()
        mlflow.log_metric("outer", 2)
        return "done"

    assert work() == "done"
    assert parents(store) == {"work": None, "own": "work"}
    assert store.run("work").data.metrics["outer"] == 2
    assert store.run("work").info.status == "FINISHED"
    assert "as with nested=True" in caplog.text
    assert "ends when its call does" in caplog.text


def test_an_error_in_a_started_run_passes_through(store):
    """The started run is FAILED, as in MLflow alone, and so is the tracked one."""
    with pytest.raises(ZeroDivisionError), tracked_phase("phase"), mlflow.start_run(nested=True, run_name="own"):
        1 / 0
    assert named(store, "own").info.status == named(store, "phase").info.status == "FAILED"


def test_outside_of_tracked_runs_mlflow_is_as_it_was(store, plain_mlflow, tmp_path):
    """Its own stack, its own store, before and after tracked runs and while they are open elsewhere."""
    other = f"sqlite:///{tmp_path}/other.db"
    mlflow.set_tracking_uri(other)
    with mlflow.start_run(run_name="plain") as plain:
        with tracked_phase("phase") as run:
            assert mlflow.active_run().info.run_id == run.run_id
            mlflow.log_metric("inside", 1)
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(mlflow.active_run).result() is None
        assert mlflow.active_run() is plain
        assert mlflow.tracking.fluent._get_latest_active_run() is plain
        mlflow.log_metric("outside", 1)
        with pytest.raises(Exception, match="already active"):
            mlflow.start_run()
    assert mlflow.active_run() is None
    assert set(mlflow.get_run(plain.info.run_id).data.metrics) == {"outside"}
    phase = store.run()
    assert store.parent(phase) is None
    assert phase.data.metrics["inside"] == 1


def test_traces_of_other_tracers_are_linked(autologging):
    """`mlflow.trace` knows nothing of DSPy: its traces stand on the run in which their spans end."""

    @mlflow.trace
    def traced(n):
        return n

    @tracked_phase("phase_{n}")
    async def phase(n):
        await asyncio.sleep(0)
        return traced(n)

    async def main():
        await asyncio.gather(*(phase(n) for n in range(4)))

    asyncio.run(main())
    assert skilltrace.flush(60)
    mlflow.flush_trace_async_logging()
    for n in range(4):
        run = autologging.run(f"phase_{n}")
        found = autologging.client.search_traces(locations=[autologging.experiment_id], run_id=run.info.run_id)
        assert [trace.data.spans[0].inputs for trace in found] == [{"n": n}]


def test_an_evaluation_lands_on_the_run_that_it_is_made_in(autologging, lm):
    """`mlflow.dspy.autolog` logs the scores of `dspy.Evaluate` to the active run."""
    examples = [dspy.Example(question="?", answer="!").with_inputs("question")] * 2
    evaluate = dspy.Evaluate(devset=examples, metric=lambda *_: 1.0, num_threads=2, display_progress=False)
    with tracked_job("job"), tracked_phase("evaluation"):
        evaluate(dspy.Predict("question -> answer"))
    assert sorted(names(autologging).values()) == ["evaluation", "job"]
    assert autologging.run("evaluation").data.metrics["eval"] == 100.0


def test_a_store_that_is_down_costs_seconds_not_minutes(lm):
    """MLflow's own call fails, as without skilltrace but soon; the tracked call's run is kept."""
    skilltrace.configure(new_experiment(), tracking_uri="http://127.0.0.1:9", autolog=False, flush_timeout=0.5)
    with tracked_phase("phase"):
        for _ in range(3):
            with pytest.raises(mlflow.MlflowException, match="has not got the run 'phase'"):
                mlflow.log_metric("metric", 1)
    assert skilltrace.status().pending_runs == 1


def test_a_wanted_run_does_not_wait_for_those_before_it(store):
    """A long journal is being delivered: the run that MLflow is asked for comes first, and everything comes once."""
    for n in range(60):
        with tracked_phase("before", artifacts="number.json") as run:
            run.result = n
    with tracked_job("job"), tracked_phase("wanted") as run:
        waits = run._journal.worker._deliverer
        assert run.run_id == waits.run_id(run.key)
        assert skilltrace.status().pending_runs > 2
    runs = store.runs()
    assert len(runs) == 62
    assert store.parent(store.run("wanted")) == store.run("job").info.run_id


def test_many_threads_want_one_run(store):
    """It is created once."""
    with tracked_phase("phase") as run, ThreadPoolExecutor(8) as pool:
        barrier = threading.Barrier(8)

        def ask():
            barrier.wait(30)
            return run.run_id

        assert len({future.result() for future in [pool.submit(ask) for _ in range(8)]}) == 1
    assert len(store.runs()) == 1


def test_an_mlflow_with_other_internals_is_left_alone(store, caplog):
    """One warning, which says what still works; nothing is replaced."""
    unknown = SimpleNamespace(start_run=print, end_run=print, ActiveRun=mlflow.ActiveRun)
    assert not mlflow_fluent.install(unknown)
    assert vars(unknown) == {"start_run": print, "end_run": print, "ActiveRun": mlflow.ActiveRun}
    assert "skilltrace.log_metric" in caplog.text


def test_it_is_installed_whichever_is_imported_first(python):
    """MLflow before skilltrace, after it, and inside the run, by whichever name."""
    for order in ("import mlflow, skilltrace", "import skilltrace, mlflow", "import skilltrace"):
        python(
            f"""
{order}
skilltrace.configure("experiment", autolog=False)
with skilltrace.tracked_phase("phase") as run:
    import mlflow
    from mlflow import log_metric, start_run
    log_metric("metric", 1)
    with start_run(nested=True, run_name="own"):
        pass
    assert mlflow.active_run().info.run_id == run.run_id
assert skilltrace.flush(60)
"""
        )
    import sqlite3

    with sqlite3.connect("mlflow.db") as database:
        assert database.execute("select name, count(*), max(status) from runs group by name order by name").fetchall() == [
            ("own", 3, "FINISHED"), ("phase", 3, "FINISHED"),
        ]  # fmt: skip
