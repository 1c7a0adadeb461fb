"""Decorated generators: step by step what they were, in one run from the first step to the last."""

import asyncio
import contextlib
import gc
import inspect

import pytest

from skilltrace import current_run, tracked_phase


def test_the_items_are_the_result(any_store):
    """Strings are joined, other items are a list."""

    @tracked_phase
    def words():
        yield "one\n"
        yield "two\n"

    @tracked_phase
    def numbers():
        yield 1
        yield 2

    assert list(words()) == ["one\n", "two\n"]
    assert list(numbers()) == [1, 2]
    first, second = any_store.runs()
    assert any_store.text(first, "words.md") == "one\ntwo\n"
    assert any_store.json(second, "numbers.json") == [1, 2]


def test_the_run_lasts_from_the_first_step(store):
    """Making a generator opens no run; the first `next` does."""

    @tracked_phase
    def numbers():
        yield current_run().name

    made = numbers()
    assert store_is_empty(store)
    assert next(made) == "numbers"
    assert current_run() is None
    made.close()
    assert store.run().info.status == "KILLED"


def store_is_empty(store):
    import skilltrace

    assert skilltrace.flush(30)
    return store.client.get_experiment_by_name(store.experiment) is None


def test_send_throw_and_return_value_pass_through(store):
    """As the undecorated function would: the same values in and out, at the same places."""

    def conversation():
        heard = []
        try:
            heard.append((yield "hello"))
            heard.append((yield "and?"))
        except ValueError as error:
            heard.append(str(error))
            yield "caught"
        return heard

    def play(function):
        generator, log = function(), []
        log.extend((next(generator), generator.send("hi"), generator.throw(ValueError("bad"))))
        with pytest.raises(StopIteration) as stop:
            next(generator)
        return log, stop.value.value

    assert play(tracked_phase(conversation)) == play(conversation) == (["hello", "and?", "caught"], ["hi", "bad"])
    assert store.run().info.status == "FINISHED"


def test_an_error_inside_fails_the_run(store):
    """The error reaches the consumer; what was yielded before is recorded."""

    @tracked_phase
    def broken():
        yield "a\n"
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(broken())
    run = store.run()
    assert run.info.status == "FAILED"
    assert store.text(run, "broken.md") == "a\n"


def test_leaving_early_kills_the_run_and_runs_the_cleanup(store):
    """`break` closes the generator: its `finally` runs inside the run, which is KILLED with what it yielded."""
    cleaned = []

    @tracked_phase
    def endless():
        try:
            while True:
                yield "x"
        finally:
            cleaned.append(current_run().name)

    generator = endless()
    for _ in generator:
        break
    generator.close()
    assert cleaned == ["endless"]
    run = store.run()
    assert run.info.status == "KILLED"
    assert store.text(run, "endless.md") == "x"


def test_a_generator_that_is_dropped_ends_its_run(store):
    """Garbage collection closes it."""

    @tracked_phase
    def endless():
        while True:
            yield 1

    generator = endless()
    next(generator)
    del generator
    gc.collect()
    assert store.run().info.status == "KILLED"


def test_between_steps_the_consumers_context_is_its_own(store):
    """Two interleaved generators and the consumer's own phases are siblings, not nested in one another."""

    @tracked_phase
    def numbers(name):
        yield inner(name)
        yield inner(name)

    @tracked_phase("inner")
    def inner(name):
        return name

    @tracked_phase
    def between():
        return None

    for _ in zip(numbers("a"), numbers("b"), strict=True):
        assert current_run() is None
        between()
    runs = store.runs()
    names = {run.info.run_id: (run.info.run_name, run.data.params.get("name")) for run in runs}
    for run in runs:
        parent = names.get(store.parent(run))
        if run.info.run_name == "inner":
            assert parent == ("numbers", run.data.params["name"])
        else:
            assert parent is None


def test_generator_functions_stay_generator_functions():
    """For `inspect`, and by the name of what they make."""

    @tracked_phase
    def numbers():
        yield 1

    @tracked_phase
    async def anumbers():
        yield 1

    assert inspect.isgeneratorfunction(numbers)
    assert inspect.isasyncgenfunction(anumbers)
    made, amade = numbers(), anumbers()
    assert inspect.isgenerator(made)
    assert inspect.isasyncgen(amade)
    assert made.__name__ == "numbers"
    assert made.__qualname__.endswith("numbers")


def test_a_bad_call_of_a_generator_function_fails_where_it_is_made():
    """Not at the first step."""

    @tracked_phase
    def numbers(x):
        yield x

    with pytest.raises(TypeError):
        numbers()


async def test_async_generators(any_store):
    """Items, nested runs, and the consumer's context between steps."""

    @tracked_phase
    async def leaf():
        return None

    @tracked_phase
    async def words():
        for word in ("one\n", "two\n"):
            await leaf()
            yield word

    seen = []
    async for word in words():
        assert current_run() is None
        seen.append(word)
    assert seen == ["one\n", "two\n"]
    runs = any_store.runs()
    root = next(run for run in runs if run.info.run_name == "words")
    assert [any_store.parent(run) for run in runs if run.info.run_name == "leaf"] == [root.info.run_id] * 2
    assert any_store.text(root, "words.md") == "one\ntwo\n"


async def test_asend_athrow_and_aclose_pass_through(store):
    """As the undecorated function would."""

    async def conversation():
        heard = []
        try:
            heard.append((yield "hello"))
        except ValueError as error:
            heard.append(str(error))
        yield heard
        try:
            yield "last"
        finally:
            heard.append("closed")
            await asyncio.sleep(0)

    async def play(function):
        first = function()
        log = [await first.asend(None), await first.asend("hi"), await anext(first)]
        await first.aclose()
        second = function()
        log += [await anext(second), await second.athrow(ValueError("bad"))]
        await second.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(second)
        return log

    expected = ["hello", ["hi", "closed"], "last", "hello", ["bad"]]
    assert await play(tracked_phase(conversation)) == await play(conversation) == expected
    assert [run.info.status for run in store.runs()] == ["KILLED", "KILLED"]


async def test_cancelling_the_consumer_of_an_async_generator_kills_its_run(store):
    """The cancellation arrives inside the generator, and passes out again."""
    inside = asyncio.Event()

    @tracked_phase
    async def stream():
        yield 1
        inside.set()
        await asyncio.Event().wait()

    async def consume():
        async for _ in stream():
            pass

    task = asyncio.create_task(consume())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.run().info.status == "KILLED"


async def test_an_async_generator_closed_by_another_task(store):
    """`aclose` from elsewhere finds the run; the context of the closing task is untouched."""

    @tracked_phase
    async def stream():
        while True:
            yield 1

    generator = stream()
    await anext(generator)
    await asyncio.create_task(generator.aclose())
    assert current_run() is None
    assert store.run().info.status == "KILLED"


async def test_timeouts_work_inside_async_generators(store):
    """All steps run in the consumer's task, so `asyncio.timeout`-like scopes hold their task."""

    @tracked_phase
    async def stream():
        task = asyncio.current_task()
        for _ in range(3):
            assert asyncio.current_task() is task
            yield 1

    assert [item async for item in stream()] == [1, 1, 1]
    assert store.run().info.status == "FINISHED"


async def test_methods_that_generate(store):
    """Generator methods bind as methods."""

    class Service:
        @tracked_phase
        def numbers(self, n):
            yield from range(n)

        @tracked_phase
        async def anumbers(self, n):
            for number in range(n):
                yield number

    assert list(Service().numbers(2)) == [0, 1]
    assert [number async for number in Service().anumbers(2)] == [0, 1]
    assert {run.data.tags["service"] for run in store.runs()} == {"Service"}


def test_contextmanagers_made_of_tracked_generators(store):
    """`@contextlib.contextmanager` over a tracked generator keeps its meaning."""

    @contextlib.contextmanager
    @tracked_phase
    def session(name):
        yield name.upper()

    with session("a") as value:
        assert value == "A"
    with pytest.raises(ValueError, match="x"), session("b"):
        raise ValueError("x")
    assert [run.info.status for run in store.runs()] == ["FINISHED", "FAILED"]
