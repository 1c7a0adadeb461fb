"""LM usage: each run's figures are those of the model server that was really asked, once per level."""

import asyncio
import contextvars
import math
import threading
from types import SimpleNamespace

import dspy
import pytest
from dspy.utils import DummyLM

import skilltrace
from skilltrace import current_run, tracked_job, tracked_phase
from skilltrace.demo.model_server import ModelServer, Reply

QA = "question -> answer"


def make_lm(server, key="sk-test-key-of-the-tests-000000", model="openai/demo", **options):
    options = {"cache": False, "num_retries": 0, **options}
    return dspy.LM(model, api_base=server.base_url, api_key=key, **options)


def lm_metrics(run):
    """The `lm_*` metrics of a run, but for the duration and the cost."""
    metrics = {name: value for name, value in run.data.metrics.items() if name.startswith("lm_")}
    return {name: value for name, value in metrics.items() if name not in ("lm_duration", "lm_cost")}


def figures(tally, *, cached=0):
    """The metrics that a run must have whose calls the server has counted so."""
    return {
        "lm_calls": tally.calls + cached,
        "lm_calls_cached": cached,
        "lm_calls_failed": tally.failures,
        "lm_tokens_input": tally.prompt_tokens,
        "lm_tokens_output": tally.completion_tokens,
        "lm_tokens_total": tally.total_tokens,
        "lm_tokens_reasoning": tally.reasoning_tokens,
        "lm_tokens_cached": tally.cached_tokens,
    }


# --- each way to call an LM ------------------------------------------------------------------------------------------


def test_sequential_calls_are_added_up(store, lm, model_server):
    """Three calls after each other: the run's tokens and calls are the server's."""

    @tracked_phase
    def phase():
        predict = dspy.Predict(QA)
        for question in ("one", "two two", "three three three"):
            predict(question=question)

    phase()
    assert model_server.tally.calls == 3
    assert lm_metrics(store.run()) == figures(model_server.tally)


def test_an_lm_called_by_itself_is_counted(store, lm, model_server):
    """A bare `lm("…")`, without any module, is a call too."""
    with tracked_phase("bare"):
        lm("hello there")
    assert model_server.tally.calls == 1
    assert lm_metrics(store.run()) == figures(model_server.tally)


def test_calls_outside_any_run_are_not_counted(store, lm, caplog):
    """What happened before and after a run is not in its figures; from the first run on, such calls are counted apart."""
    lm("before")
    with tracked_phase("empty"):
        pass
    lm("after")
    assert lm_metrics(store.run())["lm_calls"] == 0
    assert skilltrace.status().lm_calls_unattributed in (1, 2)  # an earlier test may have had the process's first run
    assert "propagate" not in caplog.text


def test_a_parent_includes_its_children_once(store, model_server):
    """Each level has its own calls and those inside it; the siblings do not share."""
    with tracked_job("job"), dspy.context(lm=make_lm(model_server, "in the job")):
        dspy.Predict(QA)(question="own")
        with tracked_phase("first"), dspy.context(lm=make_lm(model_server, "in the first")):
            dspy.Predict(QA)(question="first")
            with tracked_phase("inner"), dspy.context(lm=make_lm(model_server, "in the inner")):
                dspy.Predict(QA)(question="inner inner")
        with tracked_phase("second"), dspy.context(lm=make_lm(model_server, "in the second")):
            dspy.Predict(QA)(question="second second second")
    tally = model_server.tally_for
    assert lm_metrics(store.run("job")) == figures(model_server.tally)
    assert lm_metrics(store.run("inner")) == figures(tally("in the inner"))
    assert lm_metrics(store.run("second")) == figures(tally("in the second"))
    first = lm_metrics(store.run("first"))
    assert first["lm_calls"] == 2
    assert first["lm_tokens_total"] == tally("in the first").total_tokens + tally("in the inner").total_tokens


def test_an_async_gather_is_counted(store, lm, model_server):
    """Calls awaited at once, in one run, are all in it."""

    @tracked_phase
    async def phase():
        await asyncio.gather(*(dspy.Predict(QA).acall(question=f"number {n}") for n in range(5)))

    asyncio.run(phase())
    assert model_server.tally.calls == 5
    assert lm_metrics(store.run()) == figures(model_server.tally)


def test_concurrent_phases_keep_their_calls_apart(store, model_server):
    """Two phases that run interleaved in one job have each their own; the job has both."""

    @tracked_phase("{name}")
    async def phase(name, calls):
        with dspy.context(lm=make_lm(model_server, name)):
            for n in range(calls):
                await dspy.Predict(QA).acall(question=f"{name} {n}")

    @tracked_job("job")
    async def job():
        await asyncio.gather(phase("left", 2), phase("right", 3))

    asyncio.run(job())
    for name in ("left", "right"):
        assert lm_metrics(store.run(name)) == figures(model_server.tally_for(name))
    assert lm_metrics(store.run("job")) == figures(model_server.tally)


def test_parallel_is_counted(store, lm, model_server):
    """`dspy.Parallel` works in threads of its own; its calls belong to the run around it."""
    program = dspy.Predict(QA)
    with tracked_phase("parallel"):
        dspy.Parallel(num_threads=3, disable_progress_bar=True)(
            [(program, {"question": f"number {n}"}) for n in range(6)]
        )
    assert model_server.tally.calls == 6
    assert lm_metrics(store.run()) == figures(model_server.tally)


def test_phases_in_the_threads_of_parallel_are_children(store, lm, model_server):
    """A tracked function that `dspy.Parallel` runs is a child of the run around it, with its own figures."""

    @tracked_phase("one")
    def one(question):
        return dspy.Predict(QA)(question=question)

    with tracked_job("job"):
        dspy.Parallel(num_threads=3, disable_progress_bar=True)([(one, {"question": f"number {n}"}) for n in range(4)])
    job, phases = store.run("job"), [run for run in store.runs() if run.info.run_name == "one"]
    assert [store.parent(phase) for phase in phases] == [job.info.run_id] * 4
    assert [lm_metrics(phase)["lm_calls"] for phase in phases] == [1, 1, 1, 1]
    assert sum(lm_metrics(phase)["lm_tokens_total"] for phase in phases) == model_server.tally.total_tokens
    assert lm_metrics(job) == figures(model_server.tally)


def test_batch_is_counted(store, lm, model_server):
    """`Module.batch` is counted as a whole."""
    examples = [dspy.Example(question=f"number {n}").with_inputs("question") for n in range(5)]
    with tracked_phase("batch"):
        dspy.Predict(QA).batch(examples, num_threads=3, disable_progress_bar=True)
    assert model_server.tally.calls == 5
    assert lm_metrics(store.run()) == figures(model_server.tally)


def test_evaluate_with_threads_is_counted(store, lm, model_server):
    """`dspy.Evaluate` with several threads: all calls of the program are in the run."""
    examples = [dspy.Example(question=f"number {n}", answer="no").with_inputs("question") for n in range(5)]
    evaluate = dspy.Evaluate(devset=examples, metric=lambda example, made, trace=None: 1.0, num_threads=3)
    with tracked_phase("evaluation"):
        evaluate(dspy.Predict(QA))
    assert model_server.tally.calls == 5
    assert lm_metrics(store.run()) == figures(model_server.tally)


def test_asyncify_is_counted(store, lm, model_server):
    """A program made asynchronous by `dspy.asyncify` works in a thread; its calls are counted."""

    @tracked_phase
    async def phase():
        program = dspy.asyncify(dspy.Predict(QA))
        await asyncio.gather(*(program(question=f"number {n}") for n in range(3)))

    asyncio.run(phase())
    assert model_server.tally.calls == 3
    assert lm_metrics(store.run()) == figures(model_server.tally)


def test_to_thread_is_counted(store, lm, model_server):
    """`asyncio.to_thread` carries the run along."""

    @tracked_phase
    async def phase():
        await asyncio.gather(*(asyncio.to_thread(dspy.Predict(QA), question=f"number {n}") for n in range(3)))

    asyncio.run(phase())
    assert model_server.tally.calls == 3
    assert lm_metrics(store.run()) == figures(model_server.tally)


def test_streamify_is_counted(store, lm, model_server):
    """A streamed answer that is consumed inside the run is a call of it, with the tokens that DSPy's history has."""

    @tracked_phase
    async def phase():
        program = dspy.streamify(
            dspy.Predict(QA), stream_listeners=[dspy.streaming.StreamListener(signature_field_name="answer")]
        )
        return [output async for output in program(question="stream")]

    with dspy.context(adapter=dspy.ChatAdapter()):
        outputs = asyncio.run(phase())
    assert isinstance(outputs[-1], dspy.Prediction)
    recorded = lm_metrics(store.run())
    assert recorded["lm_calls"] == model_server.tally.calls == 1
    assert recorded["lm_calls_failed"] == 0
    assert recorded["lm_tokens_total"] == lm.history[-1]["usage"].get("total_tokens", 0)


def test_a_copied_lm_is_counted(store, lm, model_server):
    """`LM.copy` has a history of its own, and is counted all the same."""
    with tracked_phase("copy"), dspy.context(lm=lm.copy(temperature=0.7)):
        dspy.Predict(QA)(question="copied")
    assert model_server.tally.calls == 1
    assert lm_metrics(store.run()) == figures(model_server.tally)


def test_several_answers_to_one_call_are_one_call(store, lm, model_server):
    """n=3 is one call of the user's, with all tokens, in however many requests DSPy makes it."""
    with tracked_phase("three"):
        assert len(lm("hello", n=3, temperature=1.0)) == 3
    recorded = lm_metrics(store.run())
    assert recorded["lm_calls"] == 1
    assert recorded["lm_tokens_input"] == model_server.tally.prompt_tokens
    assert recorded["lm_tokens_output"] == model_server.tally.completion_tokens
    assert recorded["lm_calls_cached"] == 0


def test_the_responses_api_is_counted(store, model_server):
    """`model_type="responses"` reports its usage under other names in some versions of DSPy."""
    with tracked_phase("responses"), dspy.context(lm=make_lm(model_server, model_type="responses")):
        dspy.Predict(QA)(question="responses")
    assert model_server.requests[0].path == "/v1/responses"
    assert lm_metrics(store.run()) == figures(model_server.tally)


@pytest.mark.parametrize("model_type", ["chat", "responses"])
def test_reasoning_and_cached_tokens_are_counted(store, model_type):
    """The details that a provider reports: tokens spent on reasoning, and read from its prompt cache."""
    with ModelServer(answer=lambda request: Reply("Done.", reasoning_tokens=7, cached_tokens=3)) as server:
        with tracked_phase("details"):
            make_lm(server, model_type=model_type)("one two three four")
        assert server.tally.reasoning_tokens == 7
        assert lm_metrics(store.run()) == figures(server.tally)


def test_a_provider_without_usage_is_counted_with_no_tokens(store):
    """Calls are counted where a provider reports no tokens, and are not taken for cached ones."""
    with ModelServer(answer=lambda request: Reply("Done.", usage=False)) as server:
        with tracked_phase("silent"):
            make_lm(server)("hello")
        assert lm_metrics(store.run()) == figures(server.tally)


def test_a_dummy_lm_is_counted(store):
    """DSPy's own test double makes calls without tokens: none of them is taken for cached or failed."""
    with tracked_phase("dummy"), dspy.context(lm=DummyLM([{"answer": "red"}, {"answer": "blue"}])):
        dspy.Predict(QA)(question="one")
        dspy.Predict(QA)(question="two")
    recorded = lm_metrics(store.run())
    assert (recorded["lm_calls"], recorded["lm_calls_cached"], recorded["lm_calls_failed"]) == (2, 0, 0)
    assert recorded["lm_tokens_total"] == 0


# --- several models --------------------------------------------------------------------------------------------------


def test_two_models_in_one_job_are_told_apart(store, model_server):
    """The tag `model`, the params and `lm_usage.json` name both, and the file has each one's figures."""
    small = make_lm(model_server, "small", "openai/demo-small", temperature=0.1, max_tokens=100)
    large = make_lm(model_server, "large", "openai/demo-large", temperature=0.9, max_tokens=200)
    with tracked_job("job"):
        small("hello")
        large("hello hello")
        large("hello hello hello")
    run = store.run()
    assert run.data.tags["model"] == "openai/demo-small,openai/demo-large"
    assert run.data.params["lm.model"] == "openai/demo-small,openai/demo-large"
    assert run.data.params["lm.temperature"] == "0.1,0.9"
    assert run.data.params["lm.max_tokens"] == "100,200"
    by_model = store.json(run, "lm_usage.json")
    assert by_model["openai/demo-small"]["calls"] == 1
    assert by_model["openai/demo-large"]["calls"] == 2
    for key, name in (("small", "openai/demo-small"), ("large", "openai/demo-large")):
        assert by_model[name]["tokens_total"] == model_server.tally_for(key).total_tokens


def test_the_settings_of_the_call_win_over_those_of_the_lm(store, lm):
    """`lm.temperature` and `lm.max_tokens` are those that the call was made with."""
    with tracked_phase("settings"):
        lm("hello", temperature=0.25, max_tokens=50)
    params = store.run().data.params
    assert (params["lm.temperature"], params["lm.max_tokens"]) == ("0.25", "50")


def test_no_key_of_the_lm_is_recorded(store, model_server, tmp_path):
    """An LM's API key stands neither in the journal nor in MLflow."""
    secret = "sk-live-0123456789abcdefghijklmnop"
    with tracked_job("job"):
        make_lm(model_server, secret)("hello")
    journals = b"".join(path.read_bytes() for path in (tmp_path / "spool").rglob("*") if path.is_file())
    run = store.run()
    assert secret.encode() not in journals
    assert secret not in str(run.to_dictionary())
    assert secret not in store.text(run, "lm_usage.json")


# --- cache, cost, duration -------------------------------------------------------------------------------------------


def test_cached_calls_are_counted_but_not_billed(store, model_server):
    """An answer from DSPy's cache is a call with no tokens and no cost."""
    lm = make_lm(model_server, model="openai/gpt-4o-mini", cache=True)
    question = f"a question that nobody has asked: {model_server.base_url}"
    with tracked_phase("first"):
        lm(question)
    with tracked_phase("again"):
        lm(question)
        lm(question)
    assert model_server.tally.calls == 1
    first, again = store.runs()
    assert lm_metrics(first) == figures(model_server.tally)
    assert first.data.metrics["lm_cost"] > 0
    assert lm_metrics(again) == {**dict.fromkeys(lm_metrics(again), 0), "lm_calls": 2, "lm_calls_cached": 2}
    assert again.data.metrics["lm_cost"] == 0


def test_the_cost_is_the_sum_of_what_was_billed(store, model_server):
    """`lm_cost` adds up what DSPy's history says, cached calls excepted."""
    lm = make_lm(model_server, model="openai/gpt-4o-mini", cache=True)
    with tracked_phase("priced"):
        lm(f"one {model_server.base_url}")
        lm(f"two two {model_server.base_url}")
        lm(f"two two {model_server.base_url}")
    assert model_server.tally.calls == 2
    billed = lm.history[0]["cost"] + lm.history[1]["cost"]
    assert store.run().data.metrics["lm_cost"] == pytest.approx(billed)


def test_a_model_without_a_price_has_no_cost(store, lm):
    """Where no price is known there is no `lm_cost`: 0 would be a claim."""
    with tracked_phase("unpriced"):
        lm("hello")
    assert "lm_cost" not in store.run().data.metrics


class PricedLM(dspy.BaseLM):
    """An LM of the user's own, which knows its price."""

    def __init__(self, price):
        super().__init__("mine/priced", cache=False)
        self.price = price

    def forward(self, prompt=None, messages=None, **kwargs):
        if self.price == "broken":
            raise ConnectionError("no line")
        return SimpleNamespace(
            choices=[SimpleNamespace(message=SimpleNamespace(content="Done."), finish_reason="stop")],
            usage={"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
            model="priced",
            _hidden_params={"response_cost": self.price},
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_cost_of_a_custom_lm_is_added_up(store):
    """A `BaseLM` of the user's own is counted like DSPy's."""
    lm = PricedLM(0.25)
    with tracked_phase("custom"):
        lm("one")
        lm("two")
    run = store.run()
    assert run.data.metrics["lm_cost"] == 0.5
    assert run.data.metrics["lm_tokens_total"] == 24
    assert run.data.metrics["lm_duration"] > 0
    assert run.data.tags["model"] == "mine/priced"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("price", [math.nan, math.inf, "free", None])
def test_a_cost_that_is_no_number_is_left_out(store, price):
    """One bad price does not spoil the sum of the good ones."""
    with tracked_phase("custom"):
        PricedLM(price)("one")
        PricedLM(0.25)("two")
    run = store.run()
    assert run.data.metrics["lm_cost"] == 0.25
    assert run.data.metrics["lm_calls"] == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_failure_of_a_custom_lm_is_counted(store):
    """A `BaseLM` that raises is a failed call, in the versions of DSPy too that take it for a module."""
    with tracked_phase("custom"), pytest.raises(ConnectionError):
        PricedLM("broken")("one")
    recorded = lm_metrics(store.run())
    assert (recorded["lm_calls"], recorded["lm_calls_failed"]) == (1, 1)


def test_an_lm_made_of_others_is_not_counted_itself(store, model_server):
    """An LM that asks another one (a router, a fallback) makes the calls that the server saw, and no more."""
    inner = make_lm(model_server)

    class Router(dspy.LM):
        def __call__(self, prompt=None, *, messages=None, **kwargs):
            return inner(prompt, messages=messages, **kwargs)

    class Subclass(dspy.LM):
        @dspy.utils.callback.with_callbacks
        def __call__(self, prompt=None, messages=None, **kwargs):
            return super().__call__(prompt, messages=messages, **kwargs)

    with tracked_phase("router"):
        Router("openai/router")("hello")
        Subclass("openai/demo", api_base=model_server.base_url, api_key="k", cache=False, num_retries=0)("hello hello")
    assert model_server.tally.calls == 2
    assert lm_metrics(store.run()) == figures(model_server.tally)


def test_a_failed_lm_of_a_fallback_is_counted_once(store, model_server):
    """A fallback LM whose first choice fails: one failed call and one good one, as the servers saw them."""
    with ModelServer(answer=lambda request: Reply("Not today.", status=400)) as broken:
        first, second = make_lm(broken), make_lm(model_server)

        class Fallback(dspy.LM):
            @dspy.utils.callback.with_callbacks
            def __call__(self, prompt=None, messages=None, **kwargs):
                try:
                    return first(prompt, messages=messages, **kwargs)
                except Exception:
                    return second(prompt, messages=messages, **kwargs)

        with tracked_phase("fallback"):
            Fallback("openai/fallback")("hello")
        assert (broken.tally.calls, model_server.tally.calls) == (1, 1)
    recorded = lm_metrics(store.run())
    assert (recorded["lm_calls"], recorded["lm_calls_failed"]) == (2, 1)
    assert recorded["lm_tokens_total"] == model_server.tally.total_tokens


def test_the_duration_is_at_least_the_servers(store):
    """`lm_duration` adds up the seconds of the calls, those that fail included."""
    answers = iter([Reply("Done."), Reply("Not today.", status=400)])
    with ModelServer(answer=lambda request: next(answers), latency=0.15) as server:
        lm = make_lm(server)
        with tracked_phase("slow"):
            lm("hello")
            with pytest.raises(Exception, match="Not today"):
                lm("hello")
    metrics = store.run().data.metrics
    assert 0.3 <= metrics["lm_duration"] <= metrics["duration"]


def test_concurrent_calls_may_last_longer_together_than_the_run(store):
    """`lm_duration` is a sum over the calls; `duration` is the wall's."""
    with ModelServer(answer=lambda request: "Done.", latency=0.5) as server:
        lm = make_lm(server)

        @tracked_phase
        async def phase():
            await lm.acall("warm up")
            await asyncio.gather(*(lm.acall(f"number {n}") for n in range(8)))

        asyncio.run(phase())
    metrics = store.run().data.metrics
    assert metrics["lm_calls"] == 9
    assert metrics["lm_duration"] >= 4.5
    assert metrics["lm_duration"] > metrics["duration"]


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_call_that_the_server_refuses_is_a_failed_call(store, status, way):
    """A provider's error is a failed call without tokens, in the run and in its parent; it reaches the caller."""
    with ModelServer(answer=lambda request: Reply("Not today.", status=status)) as server:
        lm = make_lm(server)
        with tracked_job("job"), pytest.raises(Exception, match="Not today"), tracked_phase("phase"):
            if way == "sync":
                lm("hello")
            else:
                asyncio.run(lm.acall("hello"))
        assert server.tally.failures == 1
        for run in store.runs():
            assert lm_metrics(run) == figures(server.tally)
            assert run.data.tags["model"] == "openai/demo"
        assert store.run("phase").info.status == "FAILED"


def test_an_answer_that_cannot_be_parsed_is_a_call_that_succeeded(store):
    """The LM answered, and was billed, each time that DSPy asked it; the failure is the program's."""
    with ModelServer(answer=lambda request: "no fields here") as server:
        with (
            dspy.context(lm=make_lm(server), adapter=dspy.ChatAdapter()),
            pytest.raises(Exception, match=r"(?i)adapter|parse"),
            tracked_phase("unparsable"),
        ):
            dspy.Predict("question -> answer, score: float")(question="hello")
        assert server.tally.calls >= 2
        assert server.tally.failures == 0
        run = store.run()
        assert run.info.status == "FAILED"
        assert lm_metrics(run) == figures(server.tally)


def test_a_cancelled_call_is_a_failed_call(store):
    """A call that is cancelled while the server thinks: counted as failed, and the run is KILLED."""

    async def main(server):
        lm = make_lm(server)

        @tracked_phase
        async def phase():
            await lm.acall("hello")

        task = asyncio.create_task(phase())
        await asyncio.to_thread(asked.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asked, over = threading.Event(), threading.Event()

    def answer(request):
        asked.set()
        over.wait(30)
        return "Done."

    with ModelServer(answer=answer) as server:
        asyncio.run(main(server))
        over.set()
    run = store.run()
    assert run.info.status == "KILLED"
    assert (run.data.metrics["lm_calls"], run.data.metrics["lm_calls_failed"]) == (1, 1)


# --- DSPy's history, which the figures come from ---------------------------------------------------------------------


def test_a_full_history_loses_nothing(store, lm, model_server):
    """With `max_history_size=2` DSPy forgets old entries; the run has counted them."""
    with tracked_phase("many"), dspy.context(max_history_size=2):
        for n in range(6):
            lm(f"number {n}")
    assert len(lm.history) == 2
    assert lm_metrics(store.run()) == figures(model_server.tally)


@pytest.mark.parametrize("off", [{"disable_history": True}, {"max_history_size": 0}])
def test_without_history_calls_are_counted_and_the_rest_is_said_once(store, lm, caplog, off):
    """Where DSPy keeps no history, calls, failures and durations are known, and one warning says what is not."""
    with tracked_phase("no history"), dspy.context(**off):
        lm("one")
        lm("two")
    metrics = store.run().data.metrics
    assert (metrics["lm_calls"], metrics["lm_tokens_total"]) == (2, 0)
    assert metrics["lm_duration"] > 0
    said = [record for record in caplog.records if record.name == "skilltrace"]
    assert [record.getMessage()[:23] for record in said] == ["DSPy's history is off ("]


def test_dspys_own_histories_are_as_without_tracking(store, lm):
    """The LM's and the modules' histories get their entries as ever."""
    program = dspy.Predict(QA)
    with tracked_job("job"), tracked_phase("phase"):
        program(question="hello")
    assert len(lm.history) == len(program.history) == 1


# --- callbacks and context -------------------------------------------------------------------------------------------


def test_callbacks_of_the_users_are_kept(store, lm):
    """A callback in `dspy.context` is called, and ours beside it: durations and failures are known."""

    class Mine(dspy.utils.callback.BaseCallback):
        starts = 0

        def on_lm_start(self, call_id, instance, inputs):
            Mine.starts += 1

    with dspy.context(callbacks=[Mine()]), tracked_phase("phase"):
        lm("hello")
    assert Mine.starts == 1
    assert store.run().data.metrics["lm_duration"] > 0


def test_a_context_without_our_callback_still_counts(store, lm, model_server):
    """A `dspy.context(callbacks=[])` opened inside a run takes our callback away, but not the tokens."""
    with tracked_phase("phase"), dspy.context(callbacks=[]):
        lm("hello")
    assert lm_metrics(store.run()) == figures(model_server.tally)


def test_dspys_context_is_as_before_after_a_run(store, lm):
    """Nothing of ours is left in DSPy's settings when the outermost run is over."""
    from dspy.dsp.utils.settings import thread_local_overrides

    before = thread_local_overrides.get()
    with tracked_job("job"), tracked_phase("phase"):
        lm("hello")
    assert thread_local_overrides.get() is before
    assert not dspy.settings.caller_modules


def test_configure_inside_a_run_takes_effect_there(python):
    """`dspy.configure` inside a tracked function is not hidden by the run's own DSPy context."""
    python(
        """
import dspy, skilltrace
from dspy.utils import DummyLM
skilltrace.configure(autolog=False, delivery="external")
with skilltrace.tracked_job("job") as run:
    dspy.configure(lm=DummyLM([{"answer": "red"}]))
    assert dspy.Predict("question -> answer")(question="?").answer == "red"
assert run.usage.calls == 1
"""
    )


# --- live figures, late calls ----------------------------------------------------------------------------------------


def test_usage_is_live_inside_a_run(store, lm, model_server):
    """`run.usage` says at any time what has been counted so far, on each level."""
    with tracked_job("job") as job:
        assert job.usage.calls == 0
        lm("one")
        assert (job.usage.calls, job.usage.tokens_total) == (1, model_server.tally.total_tokens)
        with tracked_phase("phase") as phase:
            lm("two two")
            assert (phase.usage.calls, current_run().parent.usage.calls) == (1, 2)
        assert job.usage.tokens_total == model_server.tally.total_tokens
        assert job.usage.by_model["openai/demo"].calls == 2


def test_usage_can_be_read_after_the_run(store, lm):
    """The figures stay readable when the run is over."""
    with tracked_phase("phase") as run:
        lm("one")
    assert run.usage.calls == 1
    assert run.usage.metrics()["lm_tokens_total"] == run.usage.tokens_total > 0


def test_a_call_that_outlives_its_phase_counts_for_the_job_only(store, lm, model_server, caplog):
    """A thread that still works when its phase is over raises nothing and changes no figures that are written."""
    over, answers = threading.Event(), []

    def work():
        over.wait(30)
        answers.append(lm("late"))

    with tracked_job("job"):
        with tracked_phase("phase") as phase:
            thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
            thread.start()
        over.set()
        thread.join()
    assert len(answers) == 1
    assert phase.usage.calls == 0
    assert lm_metrics(store.run("phase"))["lm_calls"] == 0
    assert lm_metrics(store.run("job")) == figures(model_server.tally)
    assert skilltrace.status().lm_calls_late == 1
    assert "An LM call made in the phase 'phase' came after its end" in caplog.text


@pytest.mark.parametrize("disable_history", [False, True])
def test_a_call_after_all_its_runs_are_over_corrects_the_outermost(store, lm, model_server, disable_history):
    """A thread that outlives the job too gets its answer, and the job's figures are written once more with its call."""
    over, answers = threading.Event(), []

    def work():
        over.wait(30)
        answers.append(lm("late"))

    with dspy.context(disable_history=disable_history), tracked_job("job"), tracked_phase("phase"):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
        thread.start()
    store.runs()  # the figures of the end are delivered
    over.set()
    thread.join()
    assert len(answers) == 1
    assert lm_metrics(store.run("phase"))["lm_calls"] == 0
    job = store.run("job")
    expected = figures(model_server.tally)
    assert lm_metrics(job) == (expected if not disable_history else {**dict.fromkeys(expected, 0), "lm_calls": 1})
    assert store.json(job, "lm_usage.json")["openai/demo"]["calls"] == 1
    assert skilltrace.status().lm_calls_late == 1


def test_a_call_of_a_bare_thread_is_counted_apart_with_a_hint(store, lm, caplog):
    """No run can be found for it: `status()` counts it, and the log says what is missing."""
    with tracked_job("job"):
        thread = threading.Thread(target=lm, args=("lost",))
        thread.start()
        thread.join()
    assert lm_metrics(store.run())["lm_calls"] == 0
    assert skilltrace.status().lm_calls_unattributed == 1
    assert caplog.text.count("skilltrace.propagate") == 1


# --- many at once ----------------------------------------------------------------------------------------------------


def test_concurrent_async_jobs_are_attributed_exactly(store, model_server):
    """16 jobs at once, each with its own key, with tasks, threads and `dspy.Parallel` inside: each has its own calls."""
    jobs = 16

    @tracked_phase("awaited")
    async def awaited(n):
        await asyncio.gather(*(dspy.Predict(QA).acall(question=f"{n} {'x ' * i}") for i in range(n % 3 + 1)))

    @tracked_phase("threaded")
    def threaded(n):
        return dspy.Predict(QA)(question=f"{n} in a thread")

    @tracked_phase("parallel")
    def parallel(n):
        items = [(dspy.Predict(QA), {"question": f"{n} {'y ' * i}"}) for i in range(2)]
        dspy.Parallel(num_threads=2, disable_progress_bar=True)(items)

    @tracked_job("job {n}")
    async def job(n):
        with dspy.context(lm=make_lm(model_server, f"key-{n}")):
            await asyncio.gather(awaited(n), asyncio.to_thread(threaded, n), asyncio.to_thread(parallel, n))

    async def main():
        await asyncio.gather(*(job(n) for n in range(jobs)))

    asyncio.run(main())
    runs = {run.info.run_name: run for run in store.runs() if run.info.run_name.startswith("job ")}
    children = {}
    for run in store.runs():
        children.setdefault(store.parent(run), {})[run.info.run_name] = run
    assert len(runs) == jobs
    for n in range(jobs):
        tally, run = model_server.tally_for(f"key-{n}"), runs[f"job {n}"]
        assert tally.calls == n % 3 + 4
        assert lm_metrics(run) == figures(tally)
        phases = children[run.info.run_id]
        assert {name: phase.data.metrics["lm_calls"] for name, phase in phases.items()} == {
            "awaited": n % 3 + 1,
            "threaded": 1,
            "parallel": 2,
        }
        assert sum(phase.data.metrics["lm_tokens_total"] for phase in phases.values()) == tally.total_tokens


def test_concurrent_threads_are_attributed_exactly(store, model_server):
    """8 threads, each with a job of its own key, at once."""
    start = threading.Barrier(8)

    def work(n):
        start.wait(30)
        with dspy.context(lm=make_lm(model_server, f"key-{n}")), tracked_job(f"job {n}"):
            for i in range(n % 3 + 1):
                dspy.Predict(QA)(question=f"{n} {'x ' * i}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(8):
        assert lm_metrics(store.run(f"job {n}")) == figures(model_server.tally_for(f"key-{n}"))
