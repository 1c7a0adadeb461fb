"""DSPy modules: one call is one run, by whichever entry point, and a tracked module stays what it was."""

import asyncio
import copy
import inspect
import json
import logging
import pickle

import cloudpickle
import dspy
import pytest
from dspy.teleprompt.bootstrap_trace import bootstrap_trace_data

from skilltrace import current_run, tracked_job, tracked_phase

QA = "question -> answer"


class Plain(dspy.Module):
    """A module that nobody tracks."""

    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict(QA)

    def forward(self, question, language="en"):
        return self.predict(question=question)

    async def aforward(self, question, language="en"):
        return await self.predict.acall(question=question)


@tracked_phase("understand")
class Understand(Plain):
    """A module whose class is tracked."""


class Forwarded(dspy.Module):
    """A module of which only `forward` is decorated."""

    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict(QA)

    @tracked_phase("forwarded")
    def forward(self, question):
        return self.predict(question=question)


class Echo(dspy.Module):
    """A module without predictors: pickle, unlike cloudpickle, cannot take DSPy's signatures made of strings."""

    def forward(self, question):
        return dspy.Prediction(answer=question)

    async def aforward(self, question):
        return self.forward(question)


@tracked_phase("echo")
class TrackedEcho(Echo):
    """The same, tracked."""


def names(store):
    return [run.info.run_name for run in store.runs()]


def chain(store):
    """The names of the runs from the outermost in, each one being the only child of the one before it."""
    runs, parent, found = store.runs(), None, []
    while children := [run for run in runs if store.parent(run) == parent]:
        assert len(children) == 1
        found += [child.info.run_name for child in children]
        parent = children[0].info.run_id
    return found


def call_by(module, entry_point, **arguments):
    """Call a module by one of its four entry points."""
    if entry_point == "__call__":
        return module(**arguments)
    made = getattr(module, entry_point)(**arguments)
    return asyncio.run(made) if inspect.isawaitable(made) else made


ENTRY_POINTS = ("__call__", "acall", "forward", "aforward")


# --- one call, one run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_each_entry_point_of_a_tracked_class_is_one_run(store, lm, model_server, entry_point):
    """A class decorator: `module(…)`, `acall`, `forward` and `aforward` are each one run with the call's usage."""
    made = call_by(Understand(), entry_point, question="hello")
    assert isinstance(made, dspy.Prediction)
    run = store.run()
    assert run.info.run_name == run.data.tags["phase"] == "understand"
    assert run.info.status == "FINISHED"
    assert run.data.metrics["lm_calls"] == 1
    assert run.data.metrics["lm_tokens_total"] == model_server.tally.total_tokens


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_each_entry_point_of_a_tracked_instance_is_one_run(store, lm, entry_point):
    """An instance of the user's class, decorated: the same."""
    module = Plain()
    assert tracked_phase("one")(module) is module
    call_by(module, entry_point, question="hello")
    assert names(store) == ["one"]


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_each_entry_point_of_a_built_in_module_is_one_run(store, lm, entry_point):
    """An instance of DSPy's own Predict: the same."""
    call_by(tracked_phase("predict")(dspy.Predict(QA)), entry_point, question="hello")
    assert names(store) == ["predict"]


@pytest.mark.parametrize("make", [lambda: dspy.Predict(QA), lambda: dspy.ChainOfThought(QA)])
def test_built_in_modules_are_tracked(store, lm, make):
    """Predict and ChainOfThought, named by their class where no name is given."""
    module = tracked_phase(make())
    module(question="hello")
    run = store.run()
    assert run.info.run_name == type(module).__name__
    assert "answer" in store.json(run, "result.json") or "answer.md" in store.files(run)


def test_an_agent_is_tracked(store, lm, model_server):
    """ReAct: one run over all of its steps."""

    def look_up(word: str) -> str:
        """Look a word up."""
        return word

    tracked_phase("agent")(dspy.ReAct("question -> answer", tools=[look_up], max_iters=3))(question="What?")
    run = store.run()
    assert run.data.metrics["lm_calls"] == model_server.tally.calls >= 2


def test_acall_that_delegates_to_forward_is_one_run(store, lm):
    """An asynchronous entry point that calls the synchronous one is the same call."""

    @tracked_phase("delegating")
    class Delegating(Plain):
        async def aforward(self, question):
            return self.forward(question=question)

    asyncio.run(Delegating().acall(question="hello"))
    assert names(store) == ["delegating"]


def test_forward_that_delegates_to_aforward_is_one_run(store, lm):
    """A synchronous entry point that runs the asynchronous one is the same call."""

    @tracked_phase("delegating")
    class Delegating(Plain):
        def forward(self, question):
            return asyncio.run(self.aforward(question=question))

    Delegating()(question="hello")
    assert names(store) == ["delegating"]


def test_acall_that_asyncifies_the_module_is_one_run(store, lm):
    """An `acall` that runs the module in a thread, by `dspy.asyncify`, is the same call."""

    @tracked_phase("delegating")
    class Delegating(Plain):
        async def acall(self, **arguments):
            return await dspy.asyncify(self)(**arguments)

    asyncio.run(Delegating().acall(question="hello"))
    assert names(store) == ["delegating"]


def test_syncify_in_place_is_one_run(store, lm):
    """`dspy.syncify` puts a `forward` into the instance that runs `aforward`."""

    @tracked_phase("async only")
    class AsyncOnly(dspy.Module):
        async def aforward(self, question):
            return dspy.Prediction(answer=question)

    module = dspy.syncify(AsyncOnly())
    assert module(question="hello").answer == "hello"
    assert module.forward(question="hello").answer == "hello"
    assert names(store) == ["async only", "async only"]


def test_syncify_by_a_wrapper_is_one_run(store, lm):
    """`dspy.syncify(in_place=False)` gives another module, which calls the tracked one."""

    @tracked_phase("async only")
    class AsyncOnly(dspy.Module):
        async def aforward(self, question):
            return dspy.Prediction(answer=question)

    assert dspy.syncify(AsyncOnly(), in_place=False)(question="hello").answer == "hello"
    assert names(store) == ["async only"]


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_a_recursion_is_a_run_each_time(store, entry_point):
    """A module that calls itself: as many nested runs as calls."""

    @tracked_phase("level {n}")
    class Recursive(dspy.Module):
        def forward(self, n):
            return dspy.Prediction(depth=self(n=n - 1).depth + 1 if n else 0)

        async def aforward(self, n):
            return dspy.Prediction(depth=(await self.acall(n=n - 1)).depth + 1 if n else 0)

    assert call_by(Recursive(), entry_point, n=3).depth == 3
    assert chain(store) == ["level 3", "level 2", "level 1", "level 0"]


def test_modules_that_call_each_other_are_nested(store):
    """A calls B, which calls A again: three runs."""

    @tracked_phase("ping {n}")
    class Ping(dspy.Module):
        def forward(self, n, other):
            return other(n=n - 1, other=self) if n else dspy.Prediction(done=True)

    @tracked_phase("pong {n}")
    class Pong(Ping):
        pass

    Ping()(n=2, other=Pong())
    assert chain(store) == ["ping 2", "pong 1", "ping 0"]


def test_one_module_called_twice_at_once_is_two_runs(store, lm):
    """Two tasks that call the same instance do not take each other for a delegation."""
    module = Understand()

    async def main():
        await asyncio.gather(module.acall(question="one"), module.acall(question="two"))

    with tracked_job("job"):
        asyncio.run(main())
    phases = [run for run in store.runs() if run.info.run_name == "understand"]
    assert [store.parent(phase) for phase in phases] == [store.run("job").info.run_id] * 2
    assert [phase.data.metrics["lm_calls"] for phase in phases] == [1, 1]


def test_tracked_parts_of_a_tracked_module_are_its_children(store, lm):
    """A tracked module inside a tracked module inside a job."""

    @tracked_phase("outer")
    class Outer(dspy.Module):
        def __init__(self):
            super().__init__()
            self.inner = Understand()

        def forward(self, question):
            return self.inner(question=question)

    with tracked_job("job"):
        Outer()(question="hello")
    assert chain(store) == ["job", "outer", "understand"]


def test_a_module_can_be_a_job(store, lm):
    """`tracked_job` on a class: the run is a job, and its id is the call's argument."""

    @tracked_job("answer_{job_id}")
    class Answer(Plain):
        def forward(self, question, job_id):
            return super().forward(question)

    Answer()(question="hello", job_id="job_7")
    run = store.run()
    assert run.info.run_name == "answer_job_7"
    assert (run.data.tags["job_id"], run.data.tags["skilltrace.kind"]) == ("job_7", "job")


def test_asyncify_and_streamify_of_a_tracked_module_are_one_run_each(store, lm):
    """DSPy's wrappers round a tracked module call it once."""
    module = Understand()

    async def main():
        await dspy.asyncify(module)(question="hello")
        return [output async for output in dspy.streamify(module)(question="hello")]

    assert isinstance(asyncio.run(main())[-1], dspy.Prediction)
    assert names(store) == ["understand", "understand"]


# --- decorated more than once ----------------------------------------------------------------------------------------


def test_a_class_and_its_instance_under_one_name_are_one_run(store, lm):
    """The same kind and name twice: one run, with the instance's options."""
    tracked_phase("understand", tags={"by": "instance"})(module := Understand())
    module(question="hello")
    assert store.run().data.tags["by"] == "instance"


def test_a_class_and_its_instance_under_two_names_are_nested(store, lm):
    """Another name for the instance: its run is around the class's."""
    tracked_phase("mine")(module := Understand())
    module(question="hello")
    assert chain(store) == ["mine", "understand"]


def test_an_instance_decorated_twice_under_one_name_is_one_run(store, lm):
    """Twice the same."""
    module = tracked_phase("twice")(tracked_phase("twice")(dspy.Predict(QA)))
    module(question="hello")
    assert names(store) == ["twice"]


def test_a_decorated_forward_in_a_class_decorated_alike_is_one_run(store, lm):
    """Kind and name of the method and of the class are the same."""

    @tracked_phase("both")
    class Both(Plain):
        @tracked_phase("both")
        def forward(self, question):
            return super().forward(question)

    module = Both()
    module(question="hello")
    module.forward(question="hello")
    assert names(store) == ["both", "both"]


def test_an_inherited_decorated_forward_in_a_class_decorated_alike_is_one_run(store, lm):
    """The same, where the decorated method is the base class's; the base stays tracked by itself."""

    @tracked_phase("forwarded")
    class Child(Forwarded):
        pass

    Child()(question="hello")
    assert names(store) == ["forwarded"]
    Forwarded()(question="hello")
    assert names(store) == ["forwarded", "forwarded"]


def test_a_decorated_forward_under_another_name_is_nested(store, lm):
    """A class and a method under two names: two runs."""

    @tracked_phase("around")
    class Around(Plain):
        @tracked_phase("inside")
        def forward(self, question):
            return super().forward(question)

    Around()(question="hello")
    assert chain(store) == ["around", "inside"]


# --- subclasses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_a_subclass_that_overrides_forward_is_tracked_as_its_base(store, lm, entry_point):
    """A subclass of a tracked class is tracked, by the methods that it overrides too, and `super()` is no second run."""

    class Child(Understand):
        def forward(self, question):
            return super().forward(question)

        async def aforward(self, question):
            return await super().aforward(question)

    call_by(Child(), entry_point, question="hello")
    assert names(store) == ["understand"]


@pytest.mark.parametrize("entry_point", ["__call__", "acall"])
def test_a_subclass_that_overrides_call_is_tracked_as_its_base(store, lm, entry_point):
    """An override of `__call__` or `acall` that calls its base's is the same call."""

    class Child(Understand):
        def __call__(self, question):
            return super().__call__(question=question.upper())

        async def acall(self, question):
            return await super().acall(question=question.upper())

    call_by(Child(), entry_point, question="hello")
    assert names(store) == ["understand"]


def test_a_call_that_does_not_reach_the_base_is_tracked(store):
    """An override of `__call__` that does all by itself is tracked all the same."""

    class Child(Understand):
        def __call__(self, question):
            return dspy.Prediction(answer=question)

    Child()(question="hello")
    assert names(store) == ["understand"]


def test_a_subclass_decorated_under_another_name_is_one_run_of_that(store, lm):
    """The nearest decorator names the run."""

    @tracked_phase("child")
    class Child(Understand):
        pass

    Child()(question="hello")
    assert names(store) == ["child"]


def test_the_base_of_a_tracked_class_is_not_tracked(store, lm):
    """Decorating a subclass leaves its base and its siblings alone."""
    Understand()(question="hello")
    Plain()(question="hello")
    assert names(store) == ["understand"]


def test_a_mixin_that_gives_forward_is_tracked(store):
    """`forward` may come from a class that is no module, on either side of dspy.Module."""

    class Mixin:
        def forward(self, question):
            return dspy.Prediction(answer=question)

    @tracked_phase("before")
    class Before(Mixin, dspy.Module):
        pass

    @tracked_phase("behind")
    class Behind(dspy.Module, Mixin):
        pass

    Before().forward(question="hello")
    Behind().forward(question="hello")
    assert sorted(names(store)) == ["before", "behind"]
    assert Mixin().forward("free").answer == "free"


def test_an_own_init_subclass_hook_is_kept(store):
    """A class that has its own `__init_subclass__` keeps it, with its arguments."""
    seen = []

    @tracked_phase("registry")
    class Registry(dspy.Module):
        def __init_subclass__(cls, /, key=None, **kwargs):
            super().__init_subclass__(**kwargs)
            seen.append((cls.__name__, key))

    class Entry(Registry, key="a"):
        def forward(self, question):
            return dspy.Prediction(answer=question)

    assert seen == [("Entry", "a")]
    Entry()(question="hello")
    assert names(store) == ["registry"]


# --- it stays what it was --------------------------------------------------------------------------------------------


def test_a_tracked_class_stays_the_class():
    """Identity, name, bases, documentation and signatures."""

    class Before(Plain):
        """What it is for."""

        def forward(self, question: str, n: int = 1) -> dspy.Prediction:
            """What it does."""

    after = tracked_phase("same")(Before)
    assert after is Before
    assert (after.__name__, after.__doc__, after.__mro__[1]) == ("Before", "What it is for.", Plain)
    assert (
        str(inspect.signature(after.forward))
        == "(self, question: str, n: int = 1) -> dspy.primitives.prediction.Prediction"
    )
    assert after.forward.__doc__ == "What it does."
    assert inspect.iscoroutinefunction(after.aforward)
    assert inspect.iscoroutinefunction(after.acall)
    assert isinstance(after(), Before)
    assert type(after()) is Before


def test_a_tracked_instance_stays_the_instance():
    """Its identity and class, so that `isinstance` checks of DSPy's hold."""
    module = dspy.Predict(QA)
    assert tracked_phase("same")(module) is module
    assert type(module) is dspy.Predict


def test_predictors_and_state_are_as_untracked(tmp_path):
    """`named_predictors`, `named_parameters` and `dump_state` know nothing of the tracking."""
    plain, tracked = Plain(), Understand()
    instance = tracked_phase("instance")(Plain())
    for module in (tracked, instance):
        assert [name for name, _ in module.named_predictors()] == [name for name, _ in plain.named_predictors()]
        assert [name for name, _ in module.named_parameters()] == [name for name, _ in plain.named_parameters()]
        assert module.dump_state() == plain.dump_state()
        assert repr(module) == repr(plain)
    assert tracked_phase("predict")(dspy.Predict(QA)).dump_state() == dspy.Predict(QA).dump_state()


def test_state_moves_between_tracked_and_untracked(store, lm, tmp_path):
    """A state saved by an untracked module loads into a tracked one, and the reverse; tracking is not part of it."""
    plain = Plain()
    plain.predict.demos = [dspy.Example(question="1 + 1?", answer="2")]
    plain.save(tmp_path / "state.json")
    tracked = Understand()
    tracked.load(tmp_path / "state.json")
    assert [demo["answer"] for demo in tracked.predict.demos] == ["2"]
    tracked.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((tmp_path / "state.json").read_text())
    tracked(question="hello")
    assert names(store) == ["understand"]


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda m: m.deepcopy(), lambda m: m.reset_copy()])
@pytest.mark.parametrize("make", [Understand, lambda: tracked_phase("understand")(Plain())])
def test_copies_are_tracked_and_independent(store, lm, way, make):
    """`deepcopy`, `copy`, `module.deepcopy()` and `reset_copy()` of tracked classes' and tracked instances."""
    original = make()
    copied = way(original)
    assert type(copied) is type(original)
    assert copied is not original
    if way is not copy.copy:
        assert copied.predict is not original.predict
    copied(question="hello")
    assert names(store) == ["understand"]


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
@pytest.mark.parametrize("make", [lambda: tracked_phase("echo")(Echo()), TrackedEcho])
def test_pickled_modules_are_tracked(store, pickler, make):
    """A module that went through pickle or cloudpickle, as to another process."""
    restored = pickle.loads(pickler.dumps(make()))
    restored(question="hello")
    asyncio.run(restored.acall(question="hello"))
    assert names(store) == ["echo", "echo"]


def test_a_class_pickled_by_value_is_tracked(store, lm):
    """Cloudpickle takes a class that it cannot import by value, with its mark."""

    @tracked_phase("local", metrics={"length": lambda made: len(made.answer)})
    class Local(Plain):
        def forward(self, question):
            return super().forward(question)

    restored = pickle.loads(cloudpickle.dumps(Local()))
    assert type(restored) is not None
    restored(question="hello")
    restored.forward(question="hello")
    runs = store.runs()
    assert [run.info.run_name for run in runs] == ["local", "local"]
    assert runs[0].data.metrics["length"] > 0


SAVE = """
import dspy, skilltrace

@skilltrace.tracked_phase("by class")
class Program(dspy.Module):
    def __init__(self):
        super().__init__()
        self.predict = skilltrace.tracked_phase("by instance")(dspy.Predict("question -> answer"))

    def forward(self, question):
        return self.predict(question=question)

Program().save("program", save_program=True)
"""

LOAD = """
import inspect, sys
import dspy
from dspy.utils import DummyLM

allow = {"allow_pickle": True} if "allow_pickle" in inspect.signature(dspy.load).parameters else {}
program = dspy.load("program", **allow)
with dspy.context(lm=DummyLM([{"answer": "red"}])):
    assert program(question="?").answer == "red"
"""


def test_a_program_saved_whole_is_tracked_where_it_is_loaded(store, python):
    """`save(save_program=True)`, then `dspy.load` in a process that imports no skilltrace by itself."""
    python(SAVE, env={"SKILLTRACE_AUTOLOG": "false"})
    env = {"SKILLTRACE_AUTOLOG": "false", "MLFLOW_TRACKING_URI": store.uri, "MLFLOW_EXPERIMENT_NAME": store.experiment}
    python(LOAD, env=env)
    assert chain(store) == ["by class", "by instance"]


def test_an_undecorated_module_makes_no_run(store, lm):
    """Other modules and other instances of the same class go on as ever, also inside a run."""
    tracked_phase("one")(Plain())
    with tracked_job("job"):
        Plain()(question="hello")
        asyncio.run(Plain().acall(question="hello"))
        dspy.ChainOfThought(QA)(question="hello")
    assert names(store) == ["job"]


def test_no_call_is_reported_as_a_direct_call_of_forward(store, lm, caplog):
    """DSPy warns of direct calls of `forward` by looking at its caller; a tracked `module(…)` is none."""
    with caplog.at_level(logging.WARNING, logger="dspy"):
        dspy_logger = logging.getLogger("dspy")
        propagate, dspy_logger.propagate = dspy_logger.propagate, True
        try:
            Understand()(question="hello")
            tracked_phase("one")(Plain())(question="hello")
        finally:
            dspy_logger.propagate = propagate
    assert not [record for record in caplog.records if "discouraged" in record.getMessage()]


# --- DSPy's threads and optimizers -----------------------------------------------------------------------------------


def test_parallel_over_a_tracked_module(store, lm, model_server):
    """`dspy.Parallel`: a child run for each item."""
    module = Understand()
    with tracked_job("job"):
        dspy.Parallel(num_threads=3, disable_progress_bar=True)([(module, {"question": f"{n}"}) for n in range(4)])
    phases = [run for run in store.runs() if run.info.run_name == "understand"]
    assert [store.parent(phase) for phase in phases] == [store.run("job").info.run_id] * 4
    assert [phase.data.metrics["lm_calls"] for phase in phases] == [1] * 4
    assert sum(phase.data.metrics["lm_tokens_total"] for phase in phases) == model_server.tally.total_tokens


def test_batch_over_a_tracked_module(store, lm):
    """`module.batch`: a run for each example."""
    examples = [dspy.Example(question=f"{n}").with_inputs("question") for n in range(4)]
    results = Understand().batch(examples, num_threads=2, disable_progress_bar=True)
    assert len(results) == 4
    assert names(store) == ["understand"] * 4


def trainset(n):
    return [dspy.Example(question=f"{n}", answer="any").with_inputs("question") for n in range(n)]


def test_a_compiled_program_is_still_tracked(store, lm):
    """BootstrapFewShot copies the program; what it gives back is tracked, with its demonstrations."""
    optimizer = dspy.BootstrapFewShot(metric=lambda example, made, trace=None: True, max_bootstrapped_demos=2)
    compiled = optimizer.compile(Understand(), trainset=trainset(2))
    before = len(store.runs())
    compiled(question="hello")
    assert len(store.runs()) == before + 1
    assert len(compiled.predict.demos) == 2


@pytest.mark.parametrize(
    ("make", "name"),
    [(Understand, "understand"), (lambda: tracked_phase("instance")(Plain()), "instance"), (Forwarded, "forwarded")],
)
def test_a_module_survives_bootstrap_tracing(store, lm, make, name):
    """GEPA's `bootstrap_trace_data` patches `forward` and leaves it in the instance; copies and pickles still work."""
    module = make()
    data = bootstrap_trace_data(module, trainset(2), metric=lambda *_: 1.0, num_threads=2)
    assert [type(item["prediction"]) for item in data] == [dspy.Prediction] * 2
    assert len(data[0]["trace"]) == 1
    before = len(store.runs())
    assert before == 2

    copied = module.deepcopy()
    copied.predict.demos = [dspy.Example(question="1 + 1?", answer="2")]
    assert module.predict.demos == []
    copied(question="hello")
    assert len(copied.predict.history) == 1
    restored = pickle.loads(cloudpickle.dumps(module))
    restored(question="hello")
    assert names(store) == [name] * 4


def test_bootstrap_tracing_records_the_prediction_not_the_trace(store, lm):
    """While it is traced, a module returns a pair; the run's result is the prediction."""
    bootstrap_trace_data(Understand(), trainset(1), metric=lambda *_: 1.0)
    run = store.run()
    assert set(store.files(run)) <= {"answer.md", "lm_usage.json", "result.json"}


def test_a_module_that_returns_a_pair_of_its_own_keeps_it(store):
    """A pair with a list is the module's own result where nobody traces it."""

    @tracked_phase("pair")
    class Pair(dspy.Module):
        def forward(self):
            return dspy.Prediction(answer="a"), [1, 2]

    made, numbers = Pair()()
    assert (made.answer, numbers) == ("a", [1, 2])
    assert store.json(store.run(), "pair.json") == [{"answer": "a"}, [1, 2]]


# --- what a module's run carries -------------------------------------------------------------------------------------


def test_the_fields_of_a_prediction_are_artifacts_and_metrics(store):
    """Text of several lines, nested values and numbers, each in its place."""

    @tracked_phase("write")
    class Write(dspy.Module):
        def forward(self):
            return dspy.Prediction(content="# A\n\nText.", outline=["a", "b"], score=0.5, passed=True, title="A")

    Write()()
    run = store.run()
    assert store.files(run) == ["content.md", "outline.json", "result.json"]
    assert store.text(run, "content.md") == "# A\n\nText."
    assert store.json(run, "outline.json") == ["a", "b"]
    assert store.json(run, "result.json") == {"score": 0.5, "passed": True, "title": "A"}
    assert (run.data.metrics["score"], run.data.metrics["passed"]) == (0.5, 1.0)


def test_the_arguments_of_a_module_are_params(store, lm):
    """By name, positional ones and defaults included, as `forward` calls them."""
    module = Understand()
    module("hello")
    module(question="hello", language="de")
    first, second = (run.data.params for run in store.runs())
    assert (first["question"], first["language"]) == ("hello", "en")
    assert (second["question"], second["language"]) == ("hello", "de")


def test_the_service_of_a_module_is_that_of_its_job(store, lm):
    """Inside a job a module works for the job's service; by itself it is its own."""

    class Service:
        @tracked_job("job")
        def run(self):
            Understand()(question="hello")

    Service().run()
    Understand()(question="hello")
    assert [run.data.tags["service"] for run in store.runs()] == ["Service", "Service", "Understand"]


def test_an_exception_passes_through_unchanged(store):
    """The very exception reaches the caller; the run is FAILED, with the traceback from the user's frame on."""
    error = LookupError("no such skill")

    @tracked_phase("broken")
    class Broken(dspy.Module):
        def forward(self):
            raise error

        async def aforward(self):
            raise error

    for entry_point in ENTRY_POINTS:
        with pytest.raises(LookupError) as caught:
            call_by(Broken(), entry_point)
        assert caught.value is error
    for run in store.runs():
        assert run.info.status == "FAILED"
        assert (run.data.tags["error.type"], run.data.tags["error.message"]) == ("LookupError", "no such skill")
        assert "raise error" in store.text(run, "error.txt")
    assert len(store.runs()) == 4
    assert current_run() is None


def test_switched_off_a_tracked_module_is_the_plain_module(store, lm):
    """`enabled=False`: the calls go on, and no run is made."""
    store.configure(enabled=False)
    for entry_point in ENTRY_POINTS:
        assert isinstance(call_by(Understand(), entry_point, question="hello"), dspy.Prediction)
    store.configure()
    Understand()(question="hello")
    assert names(store) == ["understand"]
