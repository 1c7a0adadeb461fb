"""Attribution under concurrency: whatever way a call takes, it counts for the runs that it was made in, and no others.

Each test is one form of calling. Two jobs with two phases each take it at once, and each run of theirs has an API key
of its own: the run's name, which is a path (`job-0/left/child`). So the model server's tally by key is the truth about
each run, and a path says which run is whose parent. The server holds each phase's first answer back until all phases
have asked: they do run at the same time.
"""

import asyncio
import inspect
import sys
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import dspy
import pytest
import tqdm

import skilltrace
from skilltrace import current_run, propagate, tracked_job, tracked_phase
from skilltrace.demo.model_server import ModelServer, Reply, Tally, write_answer

QA = "question -> answer"
PHASES = [f"job-{n}/{side}" for n in range(2) for side in ("left", "right")]


# --- the table of forms ----------------------------------------------------------------------------------------------


@dataclass
class Calls:
    """The LM calls that one run makes itself; `requests` are those that come to the server for them."""

    made: int = 1
    cached: int = 0
    failed: int = 0
    requests: int | None = None


@dataclass
class Form:
    """A way to make LM calls: what it does inside a phase, and which runs and calls come of it.

    `calls` has the path of each run below the phase (`""` is the phase itself), `times` how often there is a run of
    that path where it is not once, `statuses` how it ends where it is not FINISHED.
    """

    function: Any
    calls: dict[str, Calls]
    times: dict[str, int] = field(default_factory=dict)
    statuses: dict[str, str] = field(default_factory=dict)
    prepare: Any = None
    lm: dict[str, Any] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    tokens: bool = True
    models: str = "openai/demo"


FORMS: dict[str, Form] = {}


def form(calls, **options):
    """Put a function into the table. It is called inside each phase with the phase's path."""

    def add(function):
        every = {path: made if isinstance(made, Calls) else Calls(made) for path, made in calls.items()}
        FORMS[function.__name__] = Form(function, every, **options)
        return function

    return add


def lm_of(path, **options):
    """The LM of one run: as the one that is configured, but with the run's own key."""
    kwargs = {"num_retries": 0, "cache": False, **options}
    model = kwargs.pop("model", "openai/demo")
    return dspy.LM(model, api_base=dspy.settings.lm.kwargs["api_base"], api_key=path, **kwargs)


def using(path, **options):
    return dspy.context(lm=lm_of(path, **options))


def question(path, n=0):
    """Another question for each run, number and server, and another number of tokens too."""
    return f"{path} asks {n} of {dspy.settings.lm.kwargs['api_base']}{' more' * (sum(path.encode()) % 23 + n)}"


def ask(path, n=0):
    return dspy.Predict(QA)(question=question(path, n))


async def aask(path, n=0):
    return await dspy.Predict(QA).acall(question=question(path, n))


@tracked_phase("{path}")
def step(path):
    with using(path):
        return ask(path)


@tracked_phase("{path}")
async def astep(path):
    with using(path):
        return await aask(path)


@tracked_phase("{path}")
class Step(dspy.Module):
    """A tracked module with a tracked part, each with one call."""

    def forward(self, path):
        with using(path):
            ask(path)
        return Part()(path=f"{path}/part")

    async def aforward(self, path):
        with using(path):
            await aask(path)
        return await Part().acall(path=f"{path}/part")


@tracked_phase("{path}")
class Part(dspy.Module):
    def forward(self, path):
        with using(path):
            return ask(path)

    async def aforward(self, path):
        with using(path):
            return await aask(path)


def in_threads(pairs):
    return dspy.Parallel(num_threads=3, disable_progress_bar=True)(pairs)


# --- asyncio ---------------------------------------------------------------------------------------------------------


@form({"": 2, "function": 1, "module": 1, "module/part": 1})
async def awaited(path):
    await aask(path)
    await astep(f"{path}/function")
    await Step().acall(path=f"{path}/module")
    await aask(path, 1)


@form({"": 2, "first": 1, "second": 1, "module": 1})
async def tasks(path):
    """Tasks that are awaited in another order than they were made in."""
    made = [
        asyncio.create_task(made)
        for made in (
            aask(path),
            astep(f"{path}/first"),
            astep(f"{path}/second"),
            Part().acall(path=f"{path}/module"),
            aask(path, 1),
        )
    ]
    for task in reversed(made):
        await task


@form({"": 3, "first": 1, "second": 1, "module": 1})
async def gathered(path):
    await asyncio.gather(*(aask(path, n) for n in range(3)), astep(f"{path}/first"), astep(f"{path}/second"),
                         Part().acall(path=f"{path}/module"))  # fmt: skip


@form({"": 1, "outer": 1, "outer/inner": 2, "outer/inner/leaf": 1})
async def nested_tasks(path):
    """A phase in a task in a phase in a task."""

    @tracked_phase("{path}")
    async def outer(path):
        with using(path):
            await asyncio.gather(aask(path), inner(f"{path}/inner"))

    @tracked_phase("{path}")
    async def inner(path):
        with using(path):
            await asyncio.gather(aask(path), aask(path, 1), astep(f"{path}/leaf"))

    await asyncio.gather(aask(path), outer(f"{path}/outer"))


@form({"": 1, "first": 1, "second": 1})
async def waited_for(path):
    await asyncio.wait_for(aask(path), 60)
    await asyncio.wait_for(astep(f"{path}/first"), 60)
    await asyncio.wait({asyncio.ensure_future(astep(f"{path}/second"))}, timeout=60)


@form({"": 1, "task": 1})
async def the_same_task(path):
    """A tracked coroutine runs in its caller's task."""

    @tracked_phase("{path}")
    async def task(path):
        with using(path):
            await aask(path)
        return asyncio.current_task()

    await aask(path)
    assert await task(f"{path}/task") is asyncio.current_task()


if sys.version_info >= (3, 11):

    @form({"": 2, "first": 1, "second": 1, "module": 1})
    async def task_group(path):
        async with asyncio.TaskGroup() as group:
            for coroutine in (
                aask(path),
                astep(f"{path}/first"),
                astep(f"{path}/second"),
                Part().acall(path=f"{path}/module"),
            ):
                group.create_task(coroutine)
        await aask(path, 1)

    @form({"": 2, "inside": 1})
    async def in_a_timeout(path):
        async with asyncio.timeout(60):
            await aask(path)
            await astep(f"{path}/inside")
        await aask(path, 1)

    @form({"": 2, "slow": Calls(2, failed=1)}, statuses={"slow": "KILLED"})
    async def timed_out(path):
        """The time is over when the server has got the request and does not answer: the rest of the phase goes on."""

        @tracked_phase("{path}")
        async def slow(path):
            with using(path):
                await aask(path)
                await dspy.settings.lm.acall("hang")

        async def end(limit):
            await asyncio.to_thread(HANGING[f"{path}/slow"].wait, 60)
            limit.reschedule(asyncio.get_running_loop().time())

        await aask(path)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit:
                ending = asyncio.create_task(end(limit))
                await slow(f"{path}/slow")
        await ending
        await aask(path, 1)

    @form({"": 2, "good": 1, "bad": Calls(1, failed=1)}, statuses={"bad": "FAILED"})
    async def a_failed_task_of_a_group(path):
        """One task fails when the other is done: the group raises, the phase goes on."""
        done = asyncio.Event()

        async def good():
            await astep(f"{path}/good")
            done.set()

        async def bad():
            await done.wait()
            await refused(f"{path}/bad")

        await aask(path)
        with pytest.raises(Exception, match="unhandled errors in a TaskGroup"):
            async with asyncio.TaskGroup() as group:
                group.create_task(good())
                group.create_task(bad())
        await aask(path, 1)


@form({"": 2, "function": 1, "module": 1})
async def to_thread(path):
    await asyncio.gather(
        asyncio.to_thread(ask, path),
        asyncio.to_thread(ask, path, 1),
        asyncio.to_thread(step, f"{path}/function"),
        asyncio.to_thread(Part(), path=f"{path}/module"),
    )


@form({"": 3, "module": 1, "module/part": 1})
async def asyncified(path):
    """One made inside the phase, one before."""
    inside = dspy.asyncify(dspy.Predict(QA))
    await asyncio.gather(
        *(inside(question=question(path, n)) for n in range(2)),
        ASYNCIFIED_PREDICT(question=question(path, 2)),
        ASYNCIFIED_STEP(path=f"{path}/module"),
    )


ASYNCIFIED_PREDICT = dspy.asyncify(dspy.Predict(QA))
ASYNCIFIED_STEP = dspy.asyncify(Step())


@form({"": 0, "first": 0, "first/0": 1, "first/0/part": 1, "first/1": 1, "first/1/part": 1,
       "second": 1, "second/0": 1, "second/0/part": 1})  # fmt: skip
async def batches_in_a_gather(path):
    @tracked_phase("{path}")
    def batch(path, many, own):
        with using(path):
            for n in range(own):
                ask(path, n)
            examples = [dspy.Example(path=f"{path}/{n}").with_inputs("path") for n in range(many)]
            return Step().batch(examples, num_threads=2, disable_progress_bar=True)

    await asyncio.gather(
        asyncio.to_thread(batch, f"{path}/first", 2, 0), asyncio.to_thread(batch, f"{path}/second", 1, 1)
    )


@form(
    {"": 4, "a": 1, "b": 1, "b/part": 1, "c": 1, "d": 1, "e": 1, "e/part": 1},
    context={"track_usage": True},
)
async def all_at_once(path):
    """A task, a thread, `Parallel`, `asyncify` and a stream in one gather."""
    pairs = [(dspy.Predict(QA), {"question": question(path, n)}) for n in range(2)]
    await asyncio.gather(
        aask(path, 2),
        aask(path, 3),
        Part().acall(path=f"{path}/a"),
        asyncio.to_thread(in_threads, [*pairs, (Step(), {"path": f"{path}/b"}), (step, {"path": f"{path}/c"})]),
        dspy.asyncify(Part())(path=f"{path}/d"),
        consumed(dspy.streamify(Step())(path=f"{path}/e")),
    )


# --- DSPy's threads --------------------------------------------------------------------------------------------------


@form({"": 3, "function": 1, "module": 1, "module/part": 1})
def parallel(path):
    pairs = [(dspy.Predict(QA), {"question": question(path, n)}) for n in range(3)]
    in_threads([*pairs, (step, {"path": f"{path}/function"}), (Step(), {"path": f"{path}/module"})])


@form({"": 0, "0": 1, "0/0": 1, "0/0/part": 1, "0/1": 1, "0/1/part": 1, "1": 1, "1/0": 1, "1/0/part": 1})
def parallel_in_parallel(path):
    @tracked_phase("{path}")
    def outer(path, many):
        with using(path):
            pairs = [(Step(), {"path": f"{path}/{n}"}) for n in range(many)]
            return in_threads([*pairs, (dspy.Predict(QA), {"question": question(path)})])

    in_threads([(outer, {"path": f"{path}/0", "many": 2}), (outer, {"path": f"{path}/1", "many": 1})])


@form({"": 1, "0": 1, "0/part": 1, "1": 1, "1/part": 1})
def batch(path):
    ask(path)
    examples = [dspy.Example(path=f"{path}/{n}").with_inputs("path") for n in range(2)]
    Step().batch(examples, num_threads=2, disable_progress_bar=True)


@form({"": 2, "0": 1, "0/part": 1, "1": 1, "1/part": 1})
def evaluate(path):
    """The program is a tracked module, and the metric asks the LM too."""

    def judge(example, prediction, trace=None):
        ask(path, example.n)
        return 1.0

    examples = [dspy.Example(path=f"{path}/{n}", n=n).with_inputs("path") for n in range(2)]
    dspy.Evaluate(devset=examples, metric=judge, num_threads=2, display_progress=False)(Step())


@form({"": 1, "good": 1, "bad": Calls(1, failed=1)}, statuses={"bad": "FAILED"})
def a_failure_in_parallel(path):
    """One of the threads fails: its run does, and the others are as they were."""

    @tracked_phase("{path}")
    def bad(path):
        with using(path):
            dspy.settings.lm("refuse")

    ask(path)
    dspy.Parallel(num_threads=2, max_errors=5, disable_progress_bar=True)(
        [(step, {"path": f"{path}/good"}), (bad, {"path": f"{path}/bad"})]
    )


# --- programs that call programs -------------------------------------------------------------------------------------


@tracked_phase("{path}")
class Attempt(dspy.Module):
    """A program with an LM of its own, of which `BestOfN` and `Refine` make copies."""

    def __init__(self, path):
        super().__init__()
        self.answer = dspy.Predict(QA)
        self.set_lm(lm_of(path))

    def forward(self, path, question):
        return self.answer(question=question)


def never_enough(arguments, prediction):
    """A reward that asks an LM; in the context of the phase, with its key."""
    ask(arguments["path"].rpartition("/")[0], len(prediction.answer) % 5)
    return 0.5


@form({"": 3, "attempt": 3}, times={"attempt": 3})
def best_of_n(path):
    program = dspy.BestOfN(module=Attempt(f"{path}/attempt"), N=3, reward_fn=never_enough, threshold=1.0)
    program(path=f"{path}/attempt", question=question(path))


@form({"": 3, "attempt": 2}, times={"attempt": 2})
def refine(path):
    """Two attempts, each with a reward, and the advice after the first."""
    with ONE_PARSER:
        program = dspy.Refine(module=Attempt(f"{path}/attempt"), N=2, reward_fn=never_enough, threshold=1.0)
    program(path=f"{path}/attempt", question=question(path))


ONE_PARSER = threading.Lock()  # Refine reads its program's source, and Python 3.11 may fail to parse in two threads


def use_tools(request):
    """The answers that make a ReAct agent call `search`, then `check`, then finish."""
    tool = ("search", "check", "finish")[min(request.messages[-1]["content"].count("[[ ## observation_"), 2)]
    arguments = "{}" if tool == "finish" else f'{{"path": "{request.api_key}"}}'
    fields = {"next_thought": "Go on.", "next_tool_name": tool, "next_tool_args": arguments, "completed": ""}
    return "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in fields.items())


def search(path: str) -> str:
    """Search."""
    return step(f"{path}/search").answer


def check(path: str) -> str:
    """Check."""
    return ask(path).answer


async def asearch(path: str) -> str:
    """Search."""
    return (await astep(f"{path}/search")).answer


async def acheck(path: str) -> str:
    """Check."""
    return (await aask(path)).answer


# An agent calls its LM for each tool, for the end and for the answer: 4 times; the tool `check` makes the fifth call.
AGENT = {"": 5, "search": 1}


@form(AGENT)
def agent(path):
    dspy.ReAct(QA, tools=[search, check])(question=path)


@form(AGENT)
async def agent_with_sync_tools_awaited(path):
    await dspy.ReAct(QA, tools=[search, check]).acall(question=path)


@form(AGENT)
async def agent_with_async_tools(path):
    tools = [dspy.Tool(asearch, name="search"), dspy.Tool(acheck, name="check")]
    await dspy.ReAct(QA, tools=tools).acall(question=path)


@form({"": 4, "search": 1, "check": 1})
def agent_with_tracked_tools(path):
    """The tools are tracked functions themselves."""

    @tracked_phase("{path}/search")
    def search(path: str) -> str:
        """Search."""
        with using(f"{path}/search"):
            return ask(path).answer

    @tracked_phase("{path}/check")
    def check(path: str) -> str:
        """Check."""
        with using(f"{path}/check"):
            return ask(path).answer

    dspy.ReAct(QA, tools=[search, check])(question=path)


@form({"": 4, "search": 1, "check": 1})
async def agent_with_async_tracked_tools(path):
    @tracked_phase("{path}/search")
    async def search(path: str) -> str:
        """Search."""
        with using(f"{path}/search"):
            return (await aask(path)).answer

    @tracked_phase("{path}/check")
    async def check(path: str) -> str:
        """Check."""
        with using(f"{path}/check"):
            return (await aask(path)).answer

    await dspy.ReAct(QA, tools=[search, check]).acall(question=path)


# --- streams ---------------------------------------------------------------------------------------------------------

# Providers tell a stream's usage where they are asked to, and DSPy before 3.4 asks where `track_usage` is on.
STREAMS = {"context": {"track_usage": True}}


def listeners():
    return [dspy.streaming.StreamListener(signature_field_name="answer")]


async def consumed(stream):
    items = [item async for item in stream]
    assert isinstance(items[-1], dspy.Prediction)
    return items


@form({"": 2, "module": 1, "module/part": 1}, **STREAMS)
async def streams_made_inside(path):
    predict = dspy.streamify(dspy.Predict(QA))
    await asyncio.gather(consumed(predict(question=question(path))), consumed(predict(question=question(path, 1))))
    await consumed(dspy.streamify(Step())(path=f"{path}/module"))


def make_streams():
    """As they are where they were made before the process's first run: without a callback of ours."""
    with dspy.context(callbacks=[]):
        return dspy.streamify(dspy.Predict(QA)), dspy.streamify(Step())


@form({"": 2, "module": 1, "module/part": 1}, prepare=make_streams, **STREAMS)
async def streams_made_before(path, made):
    predict, module = made
    await asyncio.gather(
        consumed(predict(question=question(path))),
        consumed(predict(question=question(path, 1))),
        consumed(module(path=f"{path}/module")),
    )


@form({"": 2}, **STREAMS)
async def streams_with_listeners(path):
    predict = dspy.streamify(dspy.Predict(QA), stream_listeners=listeners())
    items = [*await consumed(predict(question=question(path))), *await consumed(predict(question=question(path, 1)))]
    assert any(isinstance(item, dspy.streaming.StreamResponse) for item in items)


@form({"": 1, "module": 1, "module/part": 1}, **STREAMS)
async def streams_of_async_programs(path):
    await consumed(dspy.streamify(dspy.Predict(QA), is_async_program=True)(question=question(path)))
    await consumed(dspy.streamify(Step(), is_async_program=True)(path=f"{path}/module"))


@form({"": 2, "module": 1, "module/part": 1}, **STREAMS)
def sync_streams_made_inside(path):
    for n in range(2):
        predict = dspy.streamify(dspy.Predict(QA), async_streaming=False, stream_listeners=listeners())
        items = list(predict(question=question(path, n)))
        assert any(isinstance(item, dspy.streaming.StreamResponse) for item in items)
    module = dspy.streamify(Step(), async_streaming=False)
    assert isinstance(list(module(path=f"{path}/module"))[-1], dspy.Prediction)


@form(
    {"": 2, "module": 1, "module/part": 1},
    prepare=lambda: tuple(
        dspy.streamify(program, async_streaming=False) for program in (dspy.Predict(QA), dspy.Predict(QA), Step())
    ),
    **STREAMS,
)
def sync_streams_made_before(path, made):
    """All three are open at once: one is read while the others wait."""
    first, second, module = made
    streams = [first(question=question(path)), second(question=question(path, 1)), module(path=f"{path}/module")]
    while streams:
        streams = [stream for stream in streams if next(stream, None) is not None]


@form({"": 2, "bad": Calls(1, failed=1)}, statuses={"bad": "FAILED"}, **STREAMS)
async def a_failed_stream(path):
    class Refused(dspy.Module):
        def forward(self):
            return dspy.settings.lm("refuse")

    @tracked_phase("{path}")
    async def bad(path):
        with using(path):
            await consumed(dspy.streamify(Refused())())

    await consumed(dspy.streamify(dspy.Predict(QA))(question=question(path)))
    with pytest.raises(Exception, match="refused|TaskGroup"):
        await bad(f"{path}/bad")
    await aask(path, 1)


# --- generators, and threads of one's own ----------------------------------------------------------------------------


@form({"": 2, "a": 2, "b": 2})
def generators_in_turns(path):
    """Two phases that are generators, consumed in turns: between the steps a call is the consumer's."""

    @tracked_phase("{path}")
    def answers(path, lm):
        for n in range(2):
            yield lm(question(path, n))

    streams = [answers(f"{path}/{name}", lm_of(f"{path}/{name}")) for name in "ab"]
    for n, _ in enumerate(zip(*streams, strict=True)):
        ask(path, n)
    assert [next(stream, None) for stream in streams] == [None, None]


@form({"": 2, "a": 2, "b": 2})
async def async_generators_in_turns(path):
    @tracked_phase("{path}")
    async def answers(path, lm):
        for n in range(2):
            yield await lm.acall(question(path, n))

    first, second = (answers(f"{path}/{name}", lm_of(f"{path}/{name}")) for name in "ab")
    n = 0
    async for _ in first:
        await second.__anext__()
        await aask(path, n)
        n += 1
    assert [item async for item in second] == []


@form({"": 1, "function": 1, "module": 1})
def bare_threads(path):
    threads = [
        threading.Thread(target=propagate(ask), args=(path,)),
        threading.Thread(target=propagate(step), args=(f"{path}/function",)),
        threading.Thread(target=propagate(Part()), kwargs={"path": f"{path}/module"}),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@form({"": 2, "function": 1, "module": 1})
def a_pool_of_threads(path):
    """The pool's threads are there before the phase, and all phases share them."""
    futures = [
        POOL.submit(propagate(ask), path),
        POOL.submit(propagate(ask), path, 1),
        POOL.submit(propagate(step), f"{path}/function"),
        POOL.submit(propagate(Part()), path=f"{path}/module"),
    ]
    for future in futures:
        future.result()


POOL = ThreadPoolExecutor(24)


@form({"": 2, "function": 1, "module": 1})
async def run_in_executor(path):
    loop = asyncio.get_running_loop()
    await asyncio.gather(
        *(loop.run_in_executor(None, propagate(ask), path, n) for n in range(2)),
        loop.run_in_executor(None, propagate(step), f"{path}/function"),
        loop.run_in_executor(POOL, propagate(Part().forward), f"{path}/module"),
    )


# --- kinds of calls --------------------------------------------------------------------------------------------------


@form({"": Calls(4, cached=2), "child": Calls(2, cached=1)}, lm={"cache": True})
def cached_calls(path):
    """The second answer to a question comes from the cache: a call that nobody bills."""

    @tracked_phase("{path}")
    def child(path):
        with using(path, cache=True):
            in_threads([(dspy.Predict(QA), {"question": question(path)})])
            ask(path)

    for n in (0, 1, 0, 1):
        ask(path, n)
    child(f"{path}/child")


@form({"": Calls(4, cached=2), "child": Calls(2, cached=1)}, lm={"cache": True})
async def cached_calls_awaited(path):
    @tracked_phase("{path}")
    async def child(path):
        with using(path, cache=True):
            await aask(path)
            await aask(path)

    for n in (0, 1):
        await aask(path, n)
    await asyncio.gather(*(aask(path, n) for n in (0, 1)), child(f"{path}/child"))


def fill_the_cache():
    # Without callbacks, so that nobody counts the call for one that lacks its run.
    with using("outside", cache=True), dspy.context(callbacks=[]):
        ask("shared")


@form({"": Calls(2, cached=1), "child": Calls(1, cached=1)}, lm={"cache": True}, prepare=fill_the_cache)
def a_cache_that_others_filled(path, _):
    """What another has paid for costs these jobs nothing, and is a call all the same."""

    @tracked_phase("{path}")
    def child(path):
        with using(path, cache=True):
            ask("shared")

    ask(path)
    in_threads([(ask, {"path": "shared"}), (child, {"path": f"{path}/child"})])


@form({"": 3, "child": 2})
def copies_of_an_lm(path):
    @tracked_phase("{path}")
    def child(path):
        lm = lm_of(path)
        in_threads([(lambda n: lm.copy(temperature=0.1 * n)(question(path, n)), {"n": n}) for n in range(2)])

    for n in range(3):
        with dspy.context(lm=dspy.settings.lm.copy(rollout_id=n, temperature=1.0)):
            ask(path, n)
    child(f"{path}/child")


@form({"": 4, "child": 2}, models="openai/demo,openai/demo-large")
async def several_lms(path):
    """Two models in one phase, at the same time; the phase's child has both too."""

    @tracked_phase("{path}")
    async def child(path):
        await lm_of(path).acall(question(path))
        await lm_of(path, model="openai/demo-large").acall(question(path, 1))

    small, large = dspy.settings.lm, lm_of(path, model="openai/demo-large")
    await small.acall(question(path))
    await large.acall(question(path, 1))
    await asyncio.gather(small.acall(question(path, 2)), large.acall(question(path, 3)), child(f"{path}/child"))


@tracked_phase("{path}")
async def refused(path):
    with using(path):
        await dspy.settings.lm.acall("refuse")


@form({"": Calls(3, failed=1), "good": 1, "bad": Calls(1, failed=1)}, statuses={"bad": "FAILED"})
async def failed_calls(path):
    """A call of the phase itself fails, and a child does; the phase gets over both."""
    await aask(path)
    with pytest.raises(Exception, match="refused"):
        await dspy.settings.lm.acall("refuse")
    outcomes = await asyncio.gather(refused(f"{path}/bad"), astep(f"{path}/good"), return_exceptions=True)
    assert isinstance(outcomes[0], Exception)
    await aask(path, 1)


@form({"": Calls(2, requests=3), "child": Calls(1, requests=2)}, lm={"num_retries": 3})
def retried_calls(path):
    """The LM tries again where the server fails once: that is one call, which succeeded."""

    @tracked_phase("{path}")
    def child(path):
        with using(path, num_retries=3):
            dspy.settings.lm("fail once")

    ask(path)
    dspy.settings.lm("fail once")
    child(f"{path}/child")


SEVERAL = 3 if dspy.__version__ >= "3.4" else 1  # the requests for n=3


@form({"": Calls(2, requests=2 * SEVERAL), "child": Calls(1, requests=SEVERAL)})
def several_answers(path):
    """`n=3` is one call, in however many requests DSPy makes it."""

    @tracked_phase("{path}")
    def child(path):
        lm_of(path)(question(path), n=3, temperature=1.0)

    for n in range(2):
        assert len(dspy.settings.lm(question(path, n), n=3, temperature=1.0)) == 3
    child(f"{path}/child")


@form({"": 4, "0": 1, "1": 1}, context={"max_history_size": 1})
async def a_small_history(path):
    for n in range(4):
        await aask(path, n)
    pairs = [(Part(), {"path": f"{path}/{n}"}) for n in range(2)]
    await asyncio.to_thread(in_threads, pairs)


@form({"": 2, "0": 1, "1": 1}, context={"disable_history": True}, tokens=False)
async def no_history(path):
    for n in range(2):
        await aask(path, n)
    pairs = [(Part(), {"path": f"{path}/{n}"}) for n in range(2)]
    await asyncio.to_thread(in_threads, pairs)


# --- the jobs --------------------------------------------------------------------------------------------------------


class Provider:
    """What the model server answers: it lets the phases meet, and fails, hangs and uses tools where a prompt says so."""

    def __init__(self):
        self.meeting = threading.Barrier(len(PHASES))
        self.over = threading.Event()
        self.lock = threading.Lock()
        self.met, self.failed = set(), set()

    def first(self, seen, what):
        with self.lock:
            new = what not in seen
            seen.add(what)
            return new

    def answer(self, request):
        key = request.api_key
        phase = "/".join(key.split("/")[:2])
        if phase in PHASES and self.first(self.met, phase):
            self.meeting.wait(60)
        if "hang" in request.text:
            HANGING[key].set()
            self.over.wait(60)
            return Reply("Nobody waits for this any more.", status=503)
        if "refuse" in request.text:
            return Reply("This is refused.", status=400)
        if "fail once" in request.text and self.first(self.failed, key):
            return Reply("Try again.", status=500)
        if "next_tool_name" in request.messages[-1]["content"].rpartition("Respond with")[2]:
            return use_tools(request)
        return write_answer(request)


HANGING: dict[str, threading.Event] = {}


# The phases must all meet. And the threads of `asyncify` and `streamify` are limited for all event loops together, which
# DSPy does in a way that can wait for ever.
ENOUGH_THREADS = {"async_max_workers": 64}


def run_in_tasks(server, form, arguments):
    """The jobs are tasks of one event loop, and so are their phases."""

    @tracked_phase("{path}")
    async def phase(path):
        with using(path, **form.lm), dspy.context(**form.context):
            await form.function(path, *arguments)
            assert current_run().name == path

    @tracked_job("{path}")
    async def job(path):
        with dspy.context(lm=dspy.LM("openai/demo", api_base=server.base_url, api_key=path), **ENOUGH_THREADS):
            await asyncio.gather(*(phase(name) for name in PHASES if name.startswith(path)))

    async def main():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(64))
        await asyncio.gather(*(job(path) for path in JOBS))

    asyncio.run(main())


def run_in_threads(server, form, arguments):
    """The jobs are threads, and so are their phases."""

    @tracked_phase("{path}")
    def phase(path):
        with using(path, **form.lm), dspy.context(**form.context):
            form.function(path, *arguments)
            assert current_run().name == path

    @tracked_job("{path}")
    def job(path):
        with dspy.context(lm=dspy.LM("openai/demo", api_base=server.base_url, api_key=path), **ENOUGH_THREADS):
            run_all(propagate(phase), [name for name in PHASES if name.startswith(path)])

    run_all(job, JOBS)


def run_all(function, paths):
    with ThreadPoolExecutor(len(paths)) as pool:
        for future in [pool.submit(function, path) for path in paths]:
            future.result()


JOBS = sorted({path.partition("/")[0] for path in PHASES})


# --- the proof -------------------------------------------------------------------------------------------------------


class Bars(weakref.WeakSet):
    """DSPy forgets all progress bars when a `Parallel` starts, and tqdm raises if one of another thread was among them."""

    remove = weakref.WeakSet.discard


@pytest.fixture
def concurrent_bars(monkeypatch):
    monkeypatch.setattr(tqdm.tqdm, "_instances", Bars())


@pytest.mark.usefixtures("concurrent_bars")
@pytest.mark.parametrize("name", FORMS)
def test_each_run_has_what_the_server_saw_of_it(store, name):
    """Every run has the right parent, status, number of calls and tokens: those of its own key and of its children's."""
    form, provider = FORMS[name], Provider()
    HANGING.update({f"{path}/slow": threading.Event() for path in PHASES})
    with ModelServer(answer=provider.answer) as server:
        with dspy.context(lm=dspy.LM("openai/demo", api_base=server.base_url, api_key="outside")):
            arguments = () if form.prepare is None else (form.prepare(),)
        try:
            (run_in_tasks if inspect.iscoroutinefunction(form.function) else run_in_threads)(server, form, arguments)
        finally:
            provider.over.set()

    planned = {path: Calls(0) for path in JOBS}
    for phase in PHASES:
        planned.update({f"{phase}/{below}".rstrip("/"): calls for below, calls in form.calls.items()})
    below_phase = {path: "/".join(path.split("/")[2:]) for path in planned}
    runs = {}
    for run in store.runs():
        runs.setdefault(run.info.run_name, []).append(run)
    assert {path: len(found) for path, found in runs.items()} == {
        path: form.times.get(below_phase[path], 1) if path in below_phase else 0 for path in planned
    }
    requested = Counter(request.api_key for request in server.requests)
    for path, calls in planned.items():
        requests = calls.made - calls.cached if calls.requests is None else calls.requests
        assert requested[path] == requests, path

    for path, found in runs.items():
        tree = [other for other in planned if f"{other}/".startswith(f"{path}/")]
        truth = Tally.of(request for request in server.requests if request.api_key in tree)
        tokens = (truth.prompt_tokens, truth.completion_tokens, truth.total_tokens) if form.tokens else (0, 0, 0)
        total = Counter()
        for run in found:
            total.update(run.data.metrics)
            assert run.info.status == form.statuses.get(below_phase[path], "FINISHED"), path
            around = path.rpartition("/")[0]
            assert store.parent(run) == (runs[around][0].info.run_id if around else None), path
            assert run.data.metrics["lm_calls"] == sum(planned[other].made for other in tree) / len(found), path
            assert run.data.tags["skilltrace.kind"] == ("phase" if around else "job")
        assert (total["lm_tokens_input"], total["lm_tokens_output"], total["lm_tokens_total"]) == tokens, path
        assert total["lm_calls"] == sum(planned[other].made for other in tree), path
        assert total["lm_calls_cached"] == sum(planned[other].cached for other in tree), path
        assert total["lm_calls_failed"] == sum(planned[other].failed for other in tree), path
    for path in JOBS:
        assert set(runs[path][0].data.tags["model"].split(",")) == set(form.models.split(","))
    jobs = [runs[path][0].data.metrics for path in JOBS]
    seen = server.tally.total_tokens - server.tally_for("outside").total_tokens
    assert sum(job["lm_tokens_total"] for job in jobs) == (seen if form.tokens else 0)
    assert (skilltrace.status().lm_calls_late, skilltrace.status().lm_calls_unattributed) == (0, 0)
