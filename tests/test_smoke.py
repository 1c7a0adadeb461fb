import asyncio
import dspy, pytest
from skilltrace import *


def test_any(any_store):
    @tracked_phase("p")
    def phase(x):
        return {"text": "a\nb", "score": x}

    @tracked_job
    def job(x):
        current_run().log_turn("user", "hi")
        return phase(x)

    job(1)
    a, b = any_store.runs()
    assert any_store.parent(b) == a.info.run_id
    assert any_store.files(b) == ["result.json", "text.md"]
    assert any_store.files(a) == ["conversation_history.json", "result.json", "text.md"]


def test_mod(store, lm, model_server):
    @tracked_phase("u")
    class M(dspy.Module):
        def __init__(self):
            super().__init__()
            self.p = dspy.Predict("question -> answer")

        def forward(self, question):
            return self.p(question=question)

        async def aforward(self, question):
            return await self.p.acall(question=question)

    m = M()
    m(question="a")
    asyncio.run(m.acall(question="b"))
    m.forward(question="c")
    asyncio.run(m.aforward(question="d"))
    runs = store.runs()
    assert len(runs) == 4
    for r in runs:
        print(r.data.metrics, r.data.params, r.data.tags)
    assert sum(r.data.metrics["lm_tokens_total"] for r in runs) == model_server.tally.total_tokens


def test_traces(autologging, lm):
    store = autologging
    m = tracked_phase("u")(dspy.Predict("question -> answer"))
    m(question="a")
    run = store.run()
    import mlflow

    mlflow.flush_trace_async_logging()
    t = mlflow.search_traces(run_id=run.info.run_id, return_type="list", **({"locations": [store.experiment_id]}))
    assert len(t) == 1
