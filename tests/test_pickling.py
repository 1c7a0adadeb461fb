"""Copies and pickles of what is decorated: what Python would make of the plain thing, and tracked as before."""

import asyncio
import copy
import functools
import inspect
import pickle
import threading
import types
from pathlib import Path

import cloudpickle
import dspy
import pytest
from dspy.teleprompt.bootstrap_trace import bootstrap_trace_data

import skilltrace
from skilltrace import current_run, delivery, pickling, tracked_job, tracked_phase

BOTH = pytest.mark.parametrize("pickler", [pickle, cloudpickle])


@tracked_phase("module level")
def module_level(x: int, y: str = "b") -> str:
    """The docstring."""
    return y * x


def plain(x):
    return x


renamed = tracked_phase("renamed")(plain)


class Service:
    region = "eu"

    @tracked_phase("method_{self.region}_{x}")
    def method(self, x):
        return x

    @tracked_phase
    @classmethod
    def outer_class_method(cls, x):
        return cls.__name__, x

    @classmethod
    @tracked_phase
    def inner_class_method(cls, x):
        return cls.__name__, x

    @tracked_phase
    @staticmethod
    def outer_static_method(x):
        return x

    @staticmethod
    @tracked_phase
    def inner_static_method(x):
        return x

    class Inner:
        @tracked_phase("inner")
        def method(self, x):
            return x


class Special(Service):
    """Inherits all of it."""


def made_class():
    class Made:
        @tracked_phase("made")
        def method(self, x):
            return x

    Made.__qualname__ = "Made"
    return Made


Made = made_class()


class Adder:
    def __init__(self):
        self.total = 0

    def __call__(self, n):
        self.total += n
        return self.total


class Forwarded(dspy.Module):
    """A module of which only `forward` is decorated."""

    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict("question -> answer")

    @tracked_phase("forwarded")
    def forward(self, question):
        return self.predict(question=question)


def names(store):
    return [run.info.run_name for run in store.runs()]


def by_value(function):
    """What cloudpickle makes of something, through bytes."""
    return pickle.loads(cloudpickle.dumps(function))


def recorded(store):
    """The runs that other processes left in this test's journals, delivered."""
    delivery.sync(Path("spool").resolve())
    return store.client.search_runs([store.experiment_id])


def environment(store):
    """For processes that record into the store, quickly: the test delivers for them."""
    return {
        "MLFLOW_TRACKING_URI": store.uri,
        "MLFLOW_EXPERIMENT_NAME": store.experiment,
        "SKILLTRACE_AUTOLOG": "false",
        "SKILLTRACE_DELIVERY": "external",
    }


# --- by reference ----------------------------------------------------------------------------------------------------


@BOTH
def test_functions_pickle_by_name_and_copy_as_themselves(pickler):
    """As plain functions do."""
    assert pickle.loads(pickler.dumps(module_level)) is module_level
    assert copy.copy(module_level) is module_level
    assert copy.deepcopy(module_level) is module_level


@BOTH
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_takes_them(store, pickler, protocol):
    """From the oldest on."""
    assert pickle.loads(pickler.dumps(module_level, protocol)) is module_level
    assert pickle.loads(pickler.dumps(Service().method, protocol))(1) == 1
    assert names(store) == ["method_eu_1"]


@BOTH
def test_bound_methods_pickle_and_deepcopy_with_their_owner(store, pickler):
    """The copy is bound to the copied owner, and still tracked."""
    service = Service()
    service.region = "us"
    copied = copy.deepcopy(service.method)
    assert copied.__self__ is not service
    assert copied.__self__.region == "us"
    assert copy.copy(service.method) == service.method
    loaded = pickle.loads(pickler.dumps(service.method))
    assert loaded(1) == copied(1) == 1
    assert names(store) == ["method_us_1"] * 2


@BOTH
@pytest.mark.parametrize("owner", [Service, Special, Service(), Special()])
@pytest.mark.parametrize(
    "name", ["outer_class_method", "inner_class_method", "outer_static_method", "inner_static_method"]
)
def test_class_and_static_methods_pickle_and_copy(store, pickler, owner, name):
    """By class, subclass and instance, with the decorator on either side; a class method keeps its class."""
    method = getattr(owner, name)
    expected = method(1)
    for made in (pickle.loads(pickler.dumps(method)), copy.copy(method), copy.deepcopy(method)):
        assert made(1) == expected
        assert made.__code__ is method.__code__  # by reference
    assert names(store) == [name] * 4


@BOTH
@pytest.mark.parametrize("cls", [Service, Special, Service.Inner])
def test_methods_reached_by_their_class_pickle(store, pickler, cls):
    """`Service.method`, to be called with an instance."""
    loaded = pickle.loads(pickler.dumps(cls.method))
    assert loaded.__code__ is cls.method.__code__
    assert loaded(cls(), 1) == copy.deepcopy(cls.method)(cls(), 1) == 1
    assert len(names(store)) == 2


@BOTH
def test_a_static_method_takes_no_instance_along(store, pickler):
    """It is reached by one that can be neither pickled nor copied."""
    service = Service()
    service.lock = threading.Lock()
    assert pickle.loads(pickler.dumps(service.outer_static_method))(1) == 1
    assert copy.deepcopy(service.outer_static_method)(1) == 1
    assert len(names(store)) == 2


@BOTH
def test_partials_pickle(store, pickler):
    """`functools.partial` of a function and of a method, and a decorated partial."""
    service = Service()
    service.region = "us"
    for function in (
        functools.partial(module_level, y="c"),
        functools.partial(service.method),
        tracked_phase("partial")(functools.partial(module_level, y="c")),
    ):
        assert pickle.loads(pickler.dumps(function))(1) == function(1)
    assert names(store) == ["module level"] * 2 + ["method_us_1"] * 2 + ["partial", "module level"] * 2


@BOTH
def test_a_decorated_function_under_another_name_pickles(store, pickler):
    """`renamed = tracked_phase(plain)`: the name of the function is that of the plain one."""
    loaded = pickle.loads(pickler.dumps(renamed))
    assert loaded(1) == 1
    assert loaded.__wrapped__ is plain
    assert names(store) == ["renamed"]


@BOTH
def test_decorated_objects_pickle_and_copy_with_what_they_hold(store, pickler):
    """An object that is called has a state, and a copy has its own."""
    adder = tracked_phase("add")(Adder())
    adder(1)
    for made in (pickle.loads(pickler.dumps(adder)), copy.copy(adder), copy.deepcopy(adder)):
        assert made(2) == 3
    assert adder.total == 1
    assert names(store) == ["add"] * 4


@BOTH
def test_an_object_that_holds_a_method_of_its_own(store, pickler):
    """The copy holds its own method, not the original's."""
    service = Service()
    service.callback = service.method
    service.region = "us"
    for made in (copy.deepcopy(service), pickle.loads(pickler.dumps(service))):
        assert made.callback.__self__ is made
        assert made.callback(1) == 1
    assert names(store) == ["method_us_1"] * 2


@BOTH
def test_a_method_that_its_object_hides_is_the_one_that_is_pickled(store, pickler):
    """Under the method's name the object has something else, which calls the method in its turn."""
    service = Service()
    method = service.method
    service.method = functools.partial(method)
    loaded = pickle.loads(pickler.dumps(service))
    assert loaded.method(1) == copy.deepcopy(service).method(1) == 1
    assert loaded.method.func.__self__ is loaded
    service.method = str
    assert pickle.loads(pickler.dumps(method))(1) == copy.deepcopy(method)(1) == 1
    assert names(store) == ["method_eu_1"] * 4


def test_methods_of_a_class_made_by_a_function_pickle(store):
    """The class is found by its name, and its methods are not: Python asks the instance for them."""
    assert "<locals>" in Made.method.__qualname__
    assert pickle.loads(pickle.dumps(Made().method))(1) == 1
    assert names(store) == ["made"]


def test_a_local_function_is_refused_as_python_refuses_it():
    """By plain pickle, which knows names only."""

    def local():
        pass

    for function in (local, tracked_phase(local), tracked_phase(lambda: None)):
        with pytest.raises((pickle.PicklingError, AttributeError), match="local object"):
            pickle.dumps(function)


# --- by value --------------------------------------------------------------------------------------------------------


def test_a_function_by_value_is_the_same_function(store):
    """Signature, hints, docs, attributes; and its options: templates, and functions of the result."""
    factor = 2

    @tracked_job(
        "local_{x}_{job_id}",
        tags={"size": "{y}"},
        metrics={"double": lambda made: made * factor},
        artifacts={"a.txt": str},
    )
    def local(x: int, y: str = "b", *, job_id: str = "job_1") -> int:
        """The docstring."""
        return x * factor

    local.attribute = "kept"
    made = by_value(local)
    assert made is not local
    assert made(3) == 6
    assert str(inspect.signature(made)) == str(inspect.signature(local))
    assert (made.__doc__, made.__qualname__, made.attribute) == (local.__doc__, local.__qualname__, "kept")
    run = store.run("local_3_job_1")
    assert (run.data.tags["size"], run.data.metrics["double"], run.data.params["y"]) == ("b", 12, "b")
    assert store.text(run, "a.txt") == "6"
    assert by_value(made)(3) == 6
    assert len(store.runs()) == 2


def test_each_kind_of_function_goes_by_value(store):
    """Lambdas, generators, async functions, twice decorated ones, and plain ones that use a decorated one."""

    @tracked_phase("generator")
    def generator(n):
        yield from range(n)

    @tracked_phase("coroutine")
    async def coroutine(n):
        return n

    @tracked_phase("async generator")
    async def agenerator(n):
        yield await by_value(coroutine)(n)

    @tracked_job("outer")
    @tracked_phase("inner")
    def twice():
        return sum(generator(3))

    async def items():
        return [item async for item in by_value(agenerator)(2)]

    assert by_value(tracked_phase("lambda")(lambda: 1))() == 1
    assert list(by_value(generator)(3)) == [0, 1, 2]
    assert inspect.isgeneratorfunction(by_value(generator))
    assert inspect.iscoroutinefunction(by_value(coroutine))
    assert asyncio.run(items()) == [2]
    assert by_value(lambda: twice())() == 3
    expected = ["lambda", "generator", "async generator", "coroutine", "outer", "inner", "generator"]
    assert names(store) == expected
    job, phase, step = store.runs()[-3:]
    assert (store.parent(phase), store.parent(step)) == (job.info.run_id, phase.info.run_id)


def test_a_function_by_value_still_refers_to_itself(store):
    """By a closure: what it calls is the decorated function that was loaded, also where its options refer to it."""
    known = {}

    @tracked_phase("level {n}", tags={"step": "{step}"}, metrics={"known": lambda made: len(known)})
    def countdown(n, step=1):
        return countdown(n - step) if n > 0 else known[countdown]

    known[countdown] = "the very same"
    made = by_value(countdown)
    cells = dict(zip(made.__code__.co_freevars, made.__closure__, strict=True))
    assert cells["countdown"].cell_contents is made
    assert list(cells["known"].cell_contents) == [made]
    assert made(2) == "the very same"
    runs = store.runs()
    assert [run.info.run_name for run in runs] == ["level 2", "level 1", "level 0"]
    assert [run.data.metrics["known"] for run in runs] == [1.0] * 3
    assert [run.data.tags["step"] for run in runs] == ["1"] * 3  # a default
    assert store.parent(runs[2]) == runs[1].info.run_id
    assert len({run.data.tags["service"] for run in runs}) == 1


def test_several_by_value_stay_one(store):
    """The same function twice in one pickle, and two that call each other."""

    @tracked_phase("even")
    def even(n):
        return n == 0 or odd(n - 1)

    @tracked_phase("odd")
    def odd(n):
        return n > 0 and even(n - 1)

    first, second, third = by_value([even, odd, even])
    assert first is third
    assert first(2)
    assert second(1)
    assert names(store) == ["even", "odd", "even", "odd", "even"]


def test_a_class_by_value_keeps_its_tracked_methods(store):
    """Methods of every kind, an inherited one and one that calls `super()`."""

    class Base:
        @tracked_phase("inherited")
        def inherited(self):
            return type(self).__name__

        @tracked_phase("base")
        def overridden(self):
            return 1

    class Local(Base):
        @tracked_phase("over")
        def overridden(self):
            return super().overridden() + 1

        @tracked_phase("generator")
        def generator(self):
            yield 1

        @tracked_phase("coroutine")
        async def coroutine(self):
            return 1

        @tracked_phase("outer class")
        @classmethod
        def outer_class(cls):
            return cls.__name__

        @classmethod
        @tracked_phase("inner class")
        def inner_class(cls):
            return cls.__name__

        @tracked_phase("outer static")
        @staticmethod
        def outer_static():
            return 1

        @staticmethod
        @tracked_phase("inner static")
        def inner_static():
            return 1

    for made in (by_value(Local)(), by_value(Local())):
        assert made.inherited() == made.outer_class() == made.inner_class() == "Local"
        assert made.overridden() == 2
        assert list(made.generator()) == [1]
        assert asyncio.run(made.coroutine()) == made.outer_static() == made.inner_static() == 1
    for method in (Local.outer_static, Local.inner_static, Local().outer_static, Local().inner_static):
        assert by_value(method)() == 1
    for method in (Local.outer_class, Local.inner_class, Local().outer_class, Local().inner_class):
        assert by_value(method)() == "Local"
    assert by_value(Local().overridden)() == by_value(Local.overridden)(Local()) == 2
    once = ["inherited", "outer class", "inner class", "over", "base", "generator", "coroutine"]
    once += ["outer static", "inner static"]
    ways = ["outer static", "inner static"] * 2 + ["outer class", "inner class"] * 2 + ["over", "base"] * 2
    assert names(store) == once * 2 + ways


def test_a_class_that_holds_a_method_of_an_instance(store):
    """A circle: the class, its method, the instance, the class."""

    class Local:
        @tracked_phase("method")
        def method(self):
            return type(self)

    Local.handler = Local().method
    Local.handlers = {Local.method: 1}
    made = pickle.loads(cloudpickle.dumps(Local.handler.__self__))
    assert type(made).handler() is type(made)
    assert names(store) == ["method"]


def test_a_module_registered_for_it_goes_by_value(store):
    """Functions, methods and classes of it: none is taken by its name."""
    module = inspect.getmodule(module_level)
    cloudpickle.register_pickle_by_value(module)
    try:
        things = (
            module_level,
            Service().method,
            Service.method,
            Service.outer_static_method,
            Service.inner_class_method,
        )
        made = [(thing, by_value(thing)) for thing in things]
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    for thing, copied in made:
        assert copied.__code__ is not thing.__code__
    assert made[0][1](2) == "bb"
    assert made[1][1](1) == made[3][1](1) == 1
    assert made[4][1](1) == ("Service", 1)
    assert names(store) == ["module level", "method_eu_1", "outer_static_method", "inner_class_method"]


DUMP = """
import asyncio, functools, pathlib
import cloudpickle
from skilltrace import tracked_job, tracked_phase

@tracked_job("countdown {n}", metrics={"double": lambda made: made * 2}, tags={"size": "{step}"})
def countdown(n, step=1):
    return n and countdown(n - step)

class Service:
    region = "eu"

    @tracked_phase("method {self.region}")
    def method(self):
        return countdown(0)

    @tracked_phase("class method")
    @classmethod
    def class_method(cls):
        return cls.region

    @tracked_phase("items")
    def items(self):
        yield 1

    @tracked_phase("coroutine")
    async def coroutine(self):
        return 1

def plain():
    service = Service()
    return service.method(), Service.class_method(), list(service.items()), asyncio.run(service.coroutine())

service = Service()
service.region = "us"
things = [plain, countdown, service.method, Service.class_method, functools.partial(countdown, 0)]
pathlib.Path("things.pkl").write_bytes(cloudpickle.dumps(things))
"""

LOAD = """
import pathlib, pickle, sys

assert "skilltrace" not in sys.modules
plain, countdown, method, class_method, partial = pickle.loads(pathlib.Path("things.pkl").read_bytes())
assert plain() == (0, "eu", [1], 1)
assert countdown.__globals__["countdown"] is countdown
assert [countdown(1), method(), class_method(), partial()] == [0, 0, "eu", 0]
"""


def test_what_main_defines_is_tracked_in_another_process(store, python):
    """One that imports no skilltrace by itself, as the workers of a cluster."""
    python(DUMP)
    python(LOAD, env=environment(store))
    runs = recorded(store)
    expected = ["method eu", "countdown 0", "class method", "items", "coroutine"]
    expected += ["countdown 1", "countdown 0", "method us", "countdown 0", "class method", "countdown 0"]
    assert sorted(run.info.run_name for run in runs) == sorted(expected)
    jobs = [run for run in runs if run.info.run_name.startswith("countdown")]
    assert [(run.data.metrics["double"], run.data.tags["size"]) for run in jobs] == [(0.0, "1")] * 5
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_copy_of_cloudpickle_in_another_package_tracks_too(python):
    """As older joblib, PySpark and Ray have one."""
    python(
        """
import pathlib, pickle, shutil
import cloudpickle

folder = pathlib.Path("ray")
shutil.copytree(pathlib.Path(cloudpickle.__file__).parent, folder / "cloudpickle")
(folder / "__init__.py").touch()

import skilltrace
import ray.cloudpickle

@skilltrace.tracked_phase("phase")
def work():
    return skilltrace.current_run() is not None

skilltrace.configure(delivery="external", autolog=False)
assert ray.cloudpickle.CloudPickler is not cloudpickle.CloudPickler
made = pickle.loads(ray.cloudpickle.dumps(work))
assert made is not work and made()
"""
    )


def test_a_cloudpickle_that_has_changed_is_said_once(caplog):
    """One whose pickler is none of C's has no hook: the warning says what is lost, and what to do."""
    changed = types.ModuleType("cloudpickle")
    changed.CloudPickler, changed.__version__ = pickle._Pickler, "9.0"
    pickling._hook(changed)
    pickling._hook(changed)
    said = [record.getMessage() for record in caplog.records if record.name == "skilltrace"]
    assert len(said) == 1
    assert "cloudpickle 9.0" in said[0]
    assert "Put them into a module" in said[0]


def test_cloudpickle_does_with_everything_else_what_it_did():
    """Undecorated functions, classes and modules; and methods that nobody tracks."""

    class Local:
        def method(self):
            return 1

    assert by_value(lambda: 2)() == 2
    assert by_value(Local)().method() == by_value(Local().method)() == 1
    assert by_value(plain) is plain
    assert by_value(types) is types


# --- other processes -------------------------------------------------------------------------------------------------

WORKERS = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from skilltrace import current_run, tracked_job, tracked_phase

@tracked_phase("function {n}")
def function(n):
    return n

class Service:
    region = "eu"

    @tracked_phase("method {self.region}")
    def method(self, n):
        return n

    @tracked_phase("class method")
    @classmethod
    def class_method(cls, n):
        return n

    @tracked_phase("static method")
    @staticmethod
    def static_method(n):
        return n

renamed = tracked_phase("lambda", metrics={"result": lambda made: made})(lambda n: n)

if __name__ == "__main__":
    service = Service()
    service.region = "us"
    works = [function, service.method, Service.class_method, service.static_method]
    START
    with tracked_job("job"):
        function(2)
"""

POOL = """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("METHOD")) as pool:
        for work in works:
            assert pool.submit(work, 1).result(60) == 1
"""

PROCESSES = """
    context = multiprocessing.get_context("METHOD")
    for work in works:
        child = context.Process(target=work, args=(1,))
        child.start()
        child.join(60)
        assert child.exitcode == 0
"""

JOBLIB = """
    import joblib
    parallel = joblib.Parallel(n_jobs=2)  # of one, it calls them itself
    assert parallel(joblib.delayed(work)(1) for work in [*works, renamed]) == [1] * 5
"""


@pytest.mark.parametrize(
    "start",
    [
        *(pytest.param(POOL.replace("METHOD", method), id=f"pool-{method}") for method in ("spawn", "fork")),
        *(pytest.param(PROCESSES.replace("METHOD", method), id=f"process-{method}") for method in ("spawn", "fork")),
        pytest.param(JOBLIB, id="joblib"),
    ],
)
def test_work_in_other_processes_is_tracked(store, python, tmp_path, start):
    """Functions and methods of a script as work of its child processes: their runs, and the parent's."""
    (tmp_path / "script.py").write_text(WORKERS.replace("    START", start))
    python("import runpy; runpy.run_path('script.py', run_name='__main__')", env=environment(store))
    runs = {run.info.run_name: run for run in recorded(store)}
    expected = {"function 1", "method us", "class method", "static method", "job", "function 2"}
    assert set(runs) == expected | ({"lambda"} if start == JOBLIB else set())
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert store.parent(runs["function 2"]) == runs["job"].info.run_id
    assert store.parent(runs["function 1"]) is None


# --- modules with decorated methods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda m: m.deepcopy(), lambda m: m.reset_copy(), by_value])
def test_copies_of_a_module_with_a_decorated_forward(store, lm, way):
    """Each copy is tracked; but for a shallow one, its predictors are its own."""
    module = Forwarded()
    copied = way(module)
    assert copied is not module
    if way is not copy.copy:
        assert copied.predict is not module.predict
    copied(question="hello")
    assert names(store) == ["forwarded"]


def test_a_compiled_module_with_a_decorated_forward(store, lm):
    """BootstrapFewShot copies it, and gives back one that is tracked, with its demonstrations."""
    examples = [dspy.Example(question=f"{n}", answer="any").with_inputs("question") for n in range(2)]
    optimizer = dspy.BootstrapFewShot(metric=lambda example, made, trace=None: True, max_bootstrapped_demos=2)
    module = Forwarded()
    compiled = optimizer.compile(module, trainset=examples)
    before = len(store.runs())
    compiled(question="hello")
    assert names(store)[before:] == ["forwarded"]
    assert (len(compiled.predict.demos), len(module.predict.demos)) == (2, 0)


def test_a_forward_that_was_patched_is_pickled_with_the_one_behind_it(store, lm):
    """GEPA's patch stays in the instance under the name of the method that it calls."""
    module = Forwarded()
    examples = [dspy.Example(question="?", answer="any").with_inputs("question")]
    bootstrap_trace_data(module, examples, metric=lambda *_: 1.0, num_threads=1)
    for made in (by_value(module.forward), by_value(module).forward, copy.deepcopy(module).forward):
        made(question="hello")
    assert names(store) == ["forwarded"] * 4


PROGRAM = """
import dspy
from skilltrace import tracked_job, tracked_phase

@tracked_phase("clean", tags={"length": "{question}"})
def clean(question):
    return question.strip()

class Program(dspy.Module):
    def __init__(self):
        super().__init__()
        self.predict = dspy.Predict("question -> answer")
        self.clean = clean

    @tracked_job("program", metrics={"length": lambda made: len(made.answer)})
    def forward(self, question):
        return self.ask(question=self.clean(question))

    @tracked_phase("ask")
    def ask(self, question):
        return self.predict(question=question)
"""

LOAD_PROGRAM = """
import inspect
import dspy
from dspy.utils import DummyLM

allow = {"allow_pickle": True} if "allow_pickle" in inspect.signature(dspy.load).parameters else {}
program = dspy.load("saved", **allow)
with dspy.context(lm=DummyLM([{"answer": "red"}])):
    assert program(question="?").answer == "red"
"""


@pytest.mark.parametrize("way", ["main", "imported", "serialized"])
def test_a_program_with_decorated_methods_saved_whole(store, python, tmp_path, way):
    """Of `__main__`; of a module by its name; of a module that goes along (`modules_to_serialize`)."""
    (tmp_path / "program.py").write_text(PROGRAM)
    first = PROGRAM if way == "main" else "import program\nfrom program import Program\n"
    options = ", modules_to_serialize=[program]" if way == "serialized" else ""
    python(f"{first}\nProgram().save('saved', save_program=True{options})", env={"SKILLTRACE_AUTOLOG": "false"})
    if way != "imported":
        (tmp_path / "program.py").unlink()
    python(LOAD_PROGRAM, env=environment(store))
    runs = {run.info.run_name: run for run in recorded(store)}
    assert set(runs) == {"program", "clean", "ask"}
    assert {store.parent(runs[name]) for name in ("clean", "ask")} == {runs["program"].info.run_id}
    assert runs["program"].data.metrics["length"] == 3
    assert runs["ask"].data.metrics["lm_calls"] == 1


def test_a_pickled_function_that_knows_a_run_of_this_process(store):
    """A run cannot be in two processes: in the copy it is nothing, and the function is tracked by itself."""
    with tracked_job("job") as run:

        @tracked_phase("local")
        def local():
            return run, current_run().parent

        assert by_value(local)() == (None, run)
    assert skilltrace.current_run() is None
    assert names(store) == ["job", "local"]
