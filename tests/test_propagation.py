"""`propagate`: the current run in threads that start with no context."""

import asyncio
import contextvars
import functools
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import dspy
import pytest

import skilltrace
from skilltrace import propagate, tracked_job, tracked_phase

variable = contextvars.ContextVar("variable", default="default")


def in_thread(function, *args):
    """What a function returns when a bare thread calls it."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    thread.join()
    return results[0]


def current_name():
    run = skilltrace.current_run()
    return run.name if run is not None else None


def test_a_bare_thread_has_the_run_it_was_started_in(store):
    """With `propagate`, and not without; what is opened there is a child."""
    with tracked_job("job"):
        assert in_thread(current_name) is None
        assert in_thread(propagate(current_name)) == "job"
        in_thread(propagate(tracked_phase("phase")(lambda: None)))
    assert store.parent(store.run("phase")) == store.run("job").info.run_id


def test_the_threads_of_pools_have_it(store):
    """A ThreadPoolExecutor, also one that was made before, and `run_in_executor`; concurrent jobs are kept apart."""
    with ThreadPoolExecutor(2) as pool:

        @tracked_job("job_{n}")
        async def job(n):
            loop = asyncio.get_running_loop()
            phase = propagate(tracked_phase("phase_{n}_{m}")(lambda n, m: current_name()))
            names = await asyncio.gather(*(loop.run_in_executor(pool, phase, n, m) for m in range(3)))
            assert names == [f"phase_{n}_{m}" for m in range(3)]
            return [future.result() for future in [pool.submit(phase, n, m) for m in range(3, 6)]]

        async def main():
            await asyncio.gather(*(job(n) for n in range(8)))

        asyncio.run(main())
    runs = store.runs()
    by_id = {run.info.run_id: run.info.run_name for run in runs}
    phases = [run for run in runs if run.info.run_name.startswith("phase")]
    assert len(phases) == 48
    for phase in phases:
        assert by_id[store.parent(phase)] == f"job_{phase.data.params['n']}"


def test_lm_calls_are_counted_there(store, lm, model_server):
    """A bare thread with `propagate` also has the LM of `dspy.context`."""
    with tracked_job("job") as job:
        in_thread(propagate(lambda: dspy.Predict("question -> answer")(question="?")))
    assert job.usage.calls == model_server.tally.calls == 1
    assert skilltrace.status().lm_calls_unattributed == 0


def test_the_whole_context_is_carried_and_nothing_comes_back(store):
    """The variables of others are as they were where `propagate` was called; each call has its own copy."""
    variable.set("outer")

    def change():
        before = variable.get()
        variable.set("inner")
        return before

    carried = propagate(change)
    variable.set("later")
    assert [in_thread(carried), in_thread(carried)] == ["outer", "outer"]
    assert variable.get() == "later"


def test_a_function_may_run_many_times_at_once(store):
    """One propagated function in several threads that are inside it at the same time."""
    barrier = threading.Barrier(4)

    def meet():
        barrier.wait(30)
        return current_name()

    with tracked_job("job"), ThreadPoolExecutor(4) as pool:
        carried = propagate(meet)
        assert [future.result() for future in [pool.submit(carried) for _ in range(4)]] == ["job"] * 4


def test_a_coroutine_function_runs_in_the_context_and_in_its_task(store):
    """In another thread's event loop: the run is there, `current_task` is the caller's, and the loop's is restored."""

    async def work():
        await asyncio.sleep(0)
        return current_name(), asyncio.current_task()

    async def elsewhere(carried):
        name, task = await carried()
        assert task is asyncio.current_task()
        return name, current_name()

    with tracked_job("job"):
        carried = propagate(work)
    with tracked_job("other"):
        other = propagate(work)
        assert inspect.iscoroutinefunction(other)
        assert in_thread(lambda: asyncio.run(elsewhere(other))) == ("other", None)
    assert in_thread(lambda: asyncio.run(elsewhere(carried))) == (None, None)  # that job is over


def test_a_run_that_has_ended_gives_way_to_the_one_around_it(store):
    """A thread that outlives its phase works for the job."""
    over = threading.Event()

    def work():
        over.wait(30)
        return current_name()

    with tracked_job("job"), ThreadPoolExecutor(1) as pool:
        with tracked_phase("phase"):
            future = pool.submit(propagate(work))
        over.set()
        assert future.result() == "job"


def test_the_function_stays_what_it_was():
    """Name, signature, exceptions; partials, methods and callable objects too."""

    def function(a: int, *, b: str = "x") -> str:
        """Says it."""
        return f"{a}{b}"

    class Callable:
        def __call__(self, a):
            return a

        def method(self, a):
            return a

    carried = propagate(function)
    assert (carried.__name__, carried.__doc__) == ("function", "Says it.")
    assert inspect.signature(carried) == inspect.signature(function)
    assert carried(1, b="y") == "1y"
    assert [propagate(each)(2) for each in (functools.partial(function, b="z"), Callable(), Callable().method)] == [
        "2z", 2, 2,
    ]  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        propagate(lambda: 1 / 0)()


def generator():
    yield 1


async def async_generator():
    yield 1


@pytest.mark.parametrize("bad", [generator, async_generator, 5, None])
def test_what_cannot_be_propagated_is_refused(bad):
    """The body of a generator runs in the context of its consumer: that is what must be propagated."""
    with pytest.raises(skilltrace.ConfigurationError, match="propagate takes"):
        propagate(bad)
