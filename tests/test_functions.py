"""Decorated functions and methods: one call, one run, and otherwise what they were."""

import asyncio
import contextlib
import functools
import inspect
import math
import threading
from dataclasses import dataclass
from typing import get_type_hints

import pytest

import skilltrace
from skilltrace import ConfigurationError, current_run, faults, tracked_job, tracked_phase


@tracked_phase("module level")
def module_level(x: int, y: str = "b") -> str:
    """The docstring."""
    return y * x


class Service:
    region = "eu"

    @tracked_phase("method_{self.region}_{x}")
    def method(self, x):
        return {"x": x}

    @tracked_phase
    async def amethod(self, x):
        return {"x": x}

    @tracked_phase
    @classmethod
    def outer_class_method(cls, x):
        return {"cls": cls.__name__, "x": x}

    @classmethod
    @tracked_phase
    def inner_class_method(cls, x):
        return {"cls": cls.__name__, "x": x}

    @tracked_phase
    @staticmethod
    def outer_static_method(x):
        return {"x": x}

    @staticmethod
    @tracked_phase
    def inner_static_method(x):
        return {"x": x}


def test_a_bare_decorator_makes_each_call_a_run_named_after_the_function(any_store):
    """`@tracked_phase` without options: name and phase are the function's name."""

    @tracked_phase
    def search(query):
        return {"hits": 3}

    assert search("a") == {"hits": 3}
    run = any_store.run()
    assert run.info.run_name == "search"
    assert run.info.status == "FINISHED"
    assert run.data.tags["phase"] == "search"
    assert run.data.params == {"query": "a"}
    assert run.data.metrics["hits"] == 3
    assert run.data.metrics["duration"] > 0
    assert any_store.files(run) == ["result.json"]


def test_a_bare_job_is_named_after_the_function_and_its_job_id(store):
    """A job without a name gets `<function>_<job_id>`."""

    @tracked_job
    def create(job_id):
        return None

    create("job_7")
    run = store.run()
    assert run.info.run_name == "create_job_7"
    assert run.data.tags["job_id"] == "job_7"
    assert run.data.tags["skilltrace.kind"] == "job"
    assert "phase" not in run.data.tags


def test_a_job_without_a_job_id_argument_gets_one(store):
    """`job_` and 12 hex digits, in the tag and in the name."""

    @tracked_job("make_{job_id}")
    def create():
        return None

    create()
    run = store.run()
    assert run.info.run_name == f"make_{run.data.tags['job_id']}"
    prefix, _, digits = run.data.tags["job_id"].partition("_")
    assert (prefix, len(digits)) == ("job", 12)
    int(digits, 16)


def test_recorded_times_are_those_of_the_call(store):
    """MLflow's start and end are when the call happened, not when it was delivered."""
    import time

    before = int(time.time() * 1000)
    module_level(1)
    after = int(time.time() * 1000) + 1
    run = store.run()
    assert before <= run.info.start_time <= run.info.end_time <= after


def test_runs_carry_what_mlflow_itself_would_tag(store):
    """User and source are there, as `mlflow.start_run` sets them."""
    import mlflow

    module_level(1)
    mine = store.run().data.tags
    mlflow.set_tracking_uri(store.uri)
    mlflow.set_experiment(f"{store.experiment}-fluent")
    with mlflow.start_run() as fluent:
        pass
    theirs = store.client.get_run(fluent.info.run_id).data.tags
    for name in set(theirs) - {"mlflow.runName"}:
        assert mine[name] == theirs[name], name
    mlflow.set_tracking_uri(None)


@pytest.mark.parametrize("name", ["outer_class_method", "inner_class_method"])
def test_class_methods_in_either_order_of_decorators(store, name):
    """A classmethod is tracked, called on the class and on an instance, and its service is the class."""
    assert getattr(Service, name)(1) == {"cls": "Service", "x": 1}
    assert getattr(Service(), name)(x=2) == {"cls": "Service", "x": 2}
    runs = store.runs()
    assert [run.data.params for run in runs] == [{"x": "1"}, {"x": "2"}]
    assert {run.data.tags["service"] for run in runs} == {"Service"}


@pytest.mark.parametrize("name", ["outer_static_method", "inner_static_method"])
def test_static_methods_in_either_order_of_decorators(store, name):
    """A staticmethod is tracked, called on the class and on an instance."""
    assert getattr(Service, name)(1) == {"x": 1}
    assert getattr(Service(), name)(2) == {"x": 2}
    runs = store.runs()
    assert [run.data.params for run in runs] == [{"x": "1"}, {"x": "2"}]
    assert {run.data.tags["service"] for run in runs} == {"Service"}


def test_methods_see_their_owner_in_templates_and_not_in_params(store):
    """`{self.region}` is filled, `self` is no param, and the service is the owner's class."""
    assert Service().method(3) == {"x": 3}
    run = store.run()
    assert run.info.run_name == "method_eu_3"
    assert run.data.params == {"x": "3"}
    assert run.data.tags["service"] == "Service"


def test_a_method_called_through_its_class_is_the_same_call(store):
    """`Service.method(service, 1)` binds as Python does."""
    assert Service.method(Service(), 1) == {"x": 1}
    assert store.run().data.params == {"x": "1"}


def test_a_subclass_is_the_service_of_an_inherited_method(store):
    """The service is the class of the method's owner at the call."""

    class Special(Service):
        pass

    Special().method(1)
    assert store.run().data.tags["service"] == "Special"


async def test_coroutine_functions_last_as_long_as_they_are_awaited(store):
    """The run of an `async def` is open while it is suspended, and current only in its own task."""
    inside, go_on = asyncio.Event(), asyncio.Event()

    @tracked_phase
    async def wait():
        inside.set()
        await go_on.wait()
        return {"name": current_run().name}

    task = asyncio.create_task(wait())
    await inside.wait()
    assert current_run() is None
    go_on.set()
    assert await task == {"name": "wait"}
    assert store.run().info.status == "FINISHED"


async def test_async_methods(store):
    """An async method is tracked and awaited as before."""
    assert await Service().amethod(1) == {"x": 1}
    assert store.run().data.tags["service"] == "Service"


def test_options_by_call_form(store):
    """`tracked_phase("name", tags=…)` decorates, and can decorate several functions."""
    decorate = tracked_phase("step", tags={"team": "search", "what": "{x}"})
    first = decorate(lambda x: x)
    second = decorate(lambda x: -x)
    assert (first(1), second(2)) == (1, -2)
    runs = store.runs()
    assert [run.data.tags["what"] for run in runs] == ["1", "2"]
    assert {run.data.tags["team"] for run in runs} == {"search"}


def test_context_manager(any_store):
    """`with tracked_phase(…) as run`: what is set as result is recorded as a decorated function's would be."""

    @dataclass
    class Report:
        score: float
        notes: str

    with tracked_job("outer_{job_id}") as job, tracked_phase("validation", metrics={"quality_score": "score"}) as run:
        assert current_run() is run
        assert run.job is job
        run.result = Report(0.85, "line one\nline two")
    assert current_run() is None
    outer, inner = any_store.runs()
    assert outer.info.run_name == f"outer_{outer.data.tags['job_id']}"
    assert any_store.parent(inner) == outer.info.run_id
    assert inner.data.metrics["quality_score"] == 0.85
    assert any_store.files(inner) == ["notes.md", "result.json"]


def test_one_context_manager_object_entered_by_many_threads(store):
    """A shared `tracked_phase` object keeps the runs of its users apart."""
    shared, barrier = tracked_phase("shared"), threading.Barrier(8)

    def use(number):
        with shared as run:
            barrier.wait()
            assert current_run() is run
            run.log_metric("number", number)
            barrier.wait()

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = store.runs()
    assert sorted(run.data.metrics["number"] for run in runs) == list(range(8))
    assert {run.info.status for run in runs} == {"FINISHED"}


async def test_one_context_manager_object_entered_by_many_tasks(store):
    """A shared object entered by interleaved tasks closes each task's own run."""
    shared, barrier = tracked_phase("shared"), []
    all_in = asyncio.Event()

    async def use(number):
        with contextlib.suppress(ValueError), shared as run:
            barrier.append(number)
            if len(barrier) == 4:
                all_in.set()
            await all_in.wait()
            run.log_metric("number", number)
            if number % 2:
                raise ValueError(number)

    await asyncio.gather(*(use(number) for number in range(4)))
    for run in store.runs():
        odd = run.data.metrics["number"] % 2
        assert run.info.status == ("FAILED" if odd else "FINISHED")


def test_a_context_manager_can_be_entered_again_inside_itself(store):
    """Reentry nests."""
    again = tracked_phase("again")
    with again as outer, again as inner:
        assert inner.parent is outer
    first, second = store.runs()
    assert store.parent(second) == first.info.run_id


def test_decorating_twice_with_the_same_kind_and_name_is_one_run(store):
    """The outer decoration's options count."""

    @tracked_phase("same", tags={"by": "outer"})
    @tracked_phase("same", tags={"by": "inner"})
    def work():
        return 1

    work()
    assert store.run().data.tags["by"] == "outer"


def test_decorating_twice_with_other_names_is_two_runs(store):
    """Another name (or kind) makes a run of its own around the first."""

    @tracked_job("outer")
    @tracked_phase("inner")
    def work():
        return 1

    work()
    outer, inner = store.runs()
    assert (outer.info.run_name, inner.info.run_name) == ("outer", "inner")
    assert store.parent(inner) == outer.info.run_id


# --- nesting ---------------------------------------------------------------------------------------------------------


def test_the_parent_is_the_innermost_open_run(any_store):
    """Phases in phases in a job; a phase outside any job is a run of its own."""

    @tracked_phase
    def leaf():
        return None

    @tracked_phase
    def branch():
        leaf()
        leaf()

    @tracked_job("root")
    def root():
        branch()
        leaf()

    root()
    leaf()
    runs = any_store.runs()
    by_id = {run.info.run_id: run.info.run_name for run in runs}
    tree = [(run.info.run_name, by_id.get(any_store.parent(run))) for run in runs]
    assert sorted(tree, key=str) == sorted(
        [("root", None), ("branch", "root"), ("leaf", "branch"), ("leaf", "branch"), ("leaf", "root"), ("leaf", None)],
        key=str,
    )


def test_a_job_inside_a_job_is_nested_in_it(store):
    """The inner job has its own job_id, the outer job's other tags, and is its phases' job."""

    @tracked_job("inner")
    def inner(job_id):
        assert current_run().job is current_run()

    @tracked_job("outer")
    def outer(job_id, user_id):
        inner(job_id="job_inner")

    outer(job_id="job_outer", user_id="ada")
    first, second = store.runs()
    assert store.parent(second) == first.info.run_id
    assert second.data.tags["job_id"] == "job_inner"
    assert second.data.tags["user_id"] == "ada"


def test_phases_inherit_the_tags_of_their_job(store):
    """Also those that are set while the job runs; not the phase tag of a phase around."""

    @tracked_phase
    def leaf():
        return None

    @tracked_phase("branch", tags={"own": "branch"})
    def branch():
        leaf()

    @tracked_job("root", tags={"team": "search"})
    def root(user_id):
        skilltrace.set_tag("stage", "late")
        branch()

    root("ada")
    _, _, run = store.runs()
    assert run.data.tags["team"] == "search"
    assert run.data.tags["stage"] == "late"
    assert run.data.tags["user_id"] == "ada"
    assert run.data.tags["phase"] == "leaf"
    assert "own" not in run.data.tags


def test_a_jobs_experiment_is_that_of_its_phases(store):
    """`tracked_job(experiment=…)` sends the job and what is inside it elsewhere."""

    @tracked_phase
    def phase():
        return None

    @tracked_job("job", experiment=f"{store.experiment}-other")
    def job():
        phase()

    job()
    assert skilltrace.flush(30)
    client = store.client
    other = client.get_experiment_by_name(f"{store.experiment}-other")
    assert {run.info.run_name for run in client.search_runs([other.experiment_id])} == {"job", "phase"}
    assert client.get_experiment_by_name(store.experiment) is None


def test_runs_that_are_open_keep_what_they_were_opened_with(store):
    """`configure` in the middle of a job changes neither it nor the phases that start in it later."""

    @tracked_phase
    def phase():
        return None

    with tracked_job("job"):
        skilltrace.configure(f"{store.experiment}-new", tracking_uri=store.uri, autolog=False)
        phase()
    assert {run.info.run_name for run in store.runs()} == {"job", "phase"}


async def test_a_phase_started_by_a_task_that_outlives_its_parent_goes_to_the_nearest_open_run(store):
    """A closed run is nobody's parent."""
    closed = asyncio.Event()

    @tracked_phase
    async def late():
        return None

    @tracked_phase
    async def short():
        async def background():
            await closed.wait()
            await late()

        return asyncio.create_task(background())

    @tracked_job("job")
    async def job():
        task = await short()
        closed.set()
        await task

    await job()
    runs = {run.info.run_name: run for run in store.runs()}
    assert store.parent(runs["late"]) == runs["job"].info.run_id


# --- exceptions ------------------------------------------------------------------------------------------------------


class Custom(Exception):
    pass


def test_exceptions_reach_the_caller_unchanged_and_fail_the_run(any_store):
    """The very same object; FAILED, with type, message and traceback from the user's frame on."""
    raised = Custom("no such skill")

    @tracked_phase
    def fail():
        raise raised

    with pytest.raises(Custom) as caught:
        fail()
    assert caught.value is raised
    run = any_store.run()
    assert run.info.status == "FAILED"
    assert run.data.tags["error.type"].endswith("Custom")
    assert run.data.tags["error.message"] == "no such skill"
    trace = any_store.text(run, "error.txt")
    assert "raise raised" in trace
    assert "skilltrace/functions.py" not in trace


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupts_kill_the_run(store, kind):
    """KeyboardInterrupt and SystemExit pass through; the run is KILLED."""

    @tracked_phase
    def stop():
        raise kind

    with pytest.raises(kind):
        stop()
    run = store.run()
    assert run.info.status == "KILLED"
    assert "error.txt" not in store.files(run)


async def test_cancellation_kills_the_run(store):
    """CancelledError passes through; the run is KILLED, and so is the run around it."""
    inside = asyncio.Event()

    @tracked_phase
    async def inner():
        inside.set()
        await asyncio.Event().wait()

    @tracked_job("outer")
    async def outer():
        await inner()

    task = asyncio.create_task(outer())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert {run.info.status for run in store.runs()} == {"KILLED"}


def test_a_run_whose_child_failed_and_was_handled_is_finished(store):
    """The status is that of the call itself."""

    @tracked_phase
    def fail():
        raise Custom

    @tracked_job("job")
    def job():
        with contextlib.suppress(Custom):
            fail()

    job()
    assert [run.info.status for run in store.runs()] == ["FINISHED", "FAILED"]


def test_an_exception_whose_str_raises_is_recorded(store):
    """A hostile exception costs the message, not the run."""

    class Hostile(Exception):
        def __str__(self):
            raise RuntimeError("no")

    @tracked_phase
    def fail():
        raise Hostile

    with pytest.raises(Hostile):
        fail()
    run = store.run()
    assert run.info.status == "FAILED"
    assert "Hostile" in run.data.tags["error.type"]
    assert "error.txt" in store.files(run)


def test_a_bad_call_fails_as_it_would_without_the_decorator(store):
    """Wrong arguments: Python's own TypeError, and a FAILED run."""
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        module_level()
    assert store.run().info.status == "FAILED"


# --- what a decorated function still is ------------------------------------------------------------------------------


def test_wrapped_functions_stay_what_they_were():
    """Signature, hints, names, docs and the predicates of `inspect`."""
    assert str(inspect.signature(module_level)) == "(x: int, y: str = 'b') -> str"
    assert get_type_hints(module_level) == {"x": int, "y": str, "return": str}
    assert module_level.__name__ == "module_level"
    assert module_level.__doc__ == "The docstring."
    assert module_level.__module__ == __name__
    assert inspect.isfunction(module_level)
    assert not inspect.iscoroutinefunction(module_level)
    assert inspect.iscoroutinefunction(Service.amethod)
    assert inspect.iscoroutinefunction(Service().amethod)
    assert inspect.ismethod(Service().method)
    assert "The docstring." in inspect.getdoc(module_level)


def test_partials_and_callable_objects_can_be_decorated(store):
    """`functools.partial` and an object with `__call__`."""

    class Adder:
        def __call__(self, a, b):
            return a + b

    assert tracked_phase("partial")(functools.partial(lambda a, b, c: a + b + c, 1, c=0))(2) == 3
    assert tracked_phase("object")(Adder())(1, b=2) == 3
    assert tracked_phase("built-in")(math.hypot)(3, 4) == 5
    runs = store.runs()
    assert [run.info.run_name for run in runs] == ["partial", "object", "built-in"]
    assert [run.data.params for run in runs] == [{"b": "2", "c": "0"}, {"a": "1", "b": "2"}, {}]


def test_a_sync_wrapper_around_an_async_function_stays_sync(store):
    """What `functools.wraps` says of the inner function does not make the outer one async."""

    async def inner(x):
        return x

    @tracked_phase("outer")
    @functools.wraps(inner)
    def outer(x):
        return asyncio.run(inner(x))

    assert outer(3) == 3
    assert store.run().info.status == "FINISHED"


@pytest.mark.parametrize(
    "make",
    [
        lambda: tracked_phase("{"),
        lambda: tracked_phase("{a.__class__}"),
        lambda: tracked_phase(tags=["a"]),
        lambda: tracked_phase(params="x"),
        lambda: tracked_phase(metrics="score"),
        lambda: tracked_phase(metrics={"score": 3}),
        lambda: tracked_phase(metrics={"score": "_private"}),
        lambda: tracked_phase(artifacts="../up.json"),
        lambda: tracked_phase(artifacts=3),
        lambda: tracked_job(experiment=""),
        lambda: tracked_phase(3),
        lambda: tracked_phase(Service),
    ],
)
def test_bad_options_are_refused_when_something_is_decorated(make):
    """A ConfigurationError with a message, before any call."""
    with pytest.raises(ConfigurationError, match=r"\w"):
        make()


def test_an_internal_fault_is_said_once_and_the_call_goes_on(store, monkeypatch, caplog):
    """Outside of tests skilltrace logs its own faults and never raises them into the user's code."""
    from skilltrace import capture

    def broken(*args):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(capture, "identity_tags", broken)
    monkeypatch.setattr(faults, "_strict", False)
    assert module_level(2) == "bb"
    assert module_level(3) == "bbb"
    said = [record for record in caplog.records if record.name == "skilltrace"]
    assert len(said) == 1
    assert "a fault of ours" in said[0].exc_text
    assert "report it" in said[0].message
