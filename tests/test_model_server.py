"""The model server that skilltrace ships: what real DSPy and raw HTTP clients get from it, and what it counts."""

from __future__ import annotations

import asyncio
import enum
import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from skilltrace.demo.model_server import ModelRequest, ModelServer, Reply, Tally, Usage, count_tokens, write_answer

# Before DSPy is imported: it asks the internet for a price list otherwise, and waits for it.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
import dspy


class Level(enum.Enum):
    LOW = "low"
    HIGH = "high"


class Entry(BaseModel):
    name: str
    tags: list[str]
    level: Level
    kind: Literal["guide", "reference"]
    rating: float = Field(ge=1, le=5)


class Metadata(Entry):
    parent: Metadata | None = None


class Describe(dspy.Signature):
    """Describe a skill."""

    topic: str = dspy.InputField()
    notes: list[str] = dspy.InputField()
    skill_content: str = dspy.OutputField()
    requirements: list[str] = dspy.OutputField()
    skill_type: Literal["guide", "it's else"] = dspy.OutputField()
    level: Level = dspy.OutputField()
    metadata: Metadata = dspy.OutputField()
    others: list[Metadata] = dspy.OutputField()
    score: float = dspy.OutputField()
    count: int = dspy.OutputField()
    passed: bool = dspy.OutputField()
    remark: str | None = dspy.OutputField()


class DescribeFreely(Describe):
    """Describe a skill, also by a mapping that has no fixed keys, which rules structured outputs out."""

    extra: dict[str, Any] = dspy.OutputField()


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer() as server:
        yield server


def lm_for(server: ModelServer, model: str = "openai/demo", api_key: str = "key", **options: Any) -> Any:
    return dspy.LM(model, api_base=server.base_url, api_key=api_key, cache=False, num_retries=0, **options)


class Client:
    """A raw HTTP client with one connection, which sees what SDKs hide."""

    def __init__(self, server: ModelServer) -> None:
        self.connection = http.client.HTTPConnection(server.base_url.split("/")[2])

    def send(self, method: str, path: str, body: str | None = None) -> tuple[int, str]:
        self.connection.request(method, path, body, {"Authorization": "Bearer raw"})
        response = self.connection.getresponse()
        return response.status, response.read().decode()

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        status, text = self.send("POST", path, json.dumps(body))
        return status, json.loads(text)

    def stream(self, **body: Any) -> list[Any]:
        _, text = self.send("POST", "/v1/chat/completions", json.dumps({**body, "stream": True}))
        events = [event.removeprefix("data: ") for event in text.strip().split("\n\n")]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]


@pytest.fixture
def client(server: ModelServer) -> Iterator[Client]:
    client = Client(server)
    yield client
    client.connection.close()


HELLO = {"model": "demo", "messages": [{"role": "user", "content": "Say hello, please."}]}


def server_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("model-server")]


# --- answers that DSPy can parse -------------------------------------------------------------------------------------


@pytest.mark.parametrize("signature", [Describe, DescribeFreely])
@pytest.mark.parametrize("adapter", [dspy.ChatAdapter, dspy.JSONAdapter])
@pytest.mark.parametrize("model_type", ["chat", "responses"])
@pytest.mark.parametrize("model", ["openai/demo", "openai/gpt-4o-mini"])  # the latter gets structured outputs
def test_typed_outputs_parse_at_the_first_try(
    server: ModelServer, signature: Any, adapter: Any, model_type: str, model: str
) -> None:
    """Each adapter gets a value of each field's type from one call."""
    with dspy.context(lm=lm_for(server, model, model_type=model_type), adapter=adapter()):
        answer = dspy.ChainOfThought(signature)(topic="naming\nthings", notes=["short", "clear"])
    assert server.tally.calls == 1
    types = {"level": Level, "metadata": Metadata, "requirements": list, "others": list, "score": float, "passed": bool}
    assert {name: type(answer[name]) for name in types} == types
    assert all(isinstance(other, Metadata) for other in answer.others)


def test_examples_in_the_prompt_do_not_count_as_inputs(server: ModelServer) -> None:
    """With few-shot examples, the answer is about the topic that was asked, not an example's."""
    program = dspy.Predict("topic -> summary")
    program.demos = [dspy.Example(topic="cooking rice", summary="Wash it.")]
    with dspy.context(lm=lm_for(server), adapter=dspy.ChatAdapter()):
        assert "knots" in program(topic="tying knots").summary


def test_an_agent_comes_to_an_end(server: ModelServer) -> None:
    """dspy.ReAct, which chooses its next tool by a literal, chooses to finish."""

    def look_up(word: str) -> str:
        """Look a word up."""
        return word

    signature: Any = "question -> answer"  # DSPy's annotation has the class only
    with dspy.context(lm=lm_for(server)):
        answer = dspy.ReAct(signature, tools=[look_up], max_iters=5)(question="What is a skill?").answer
    assert answer
    assert server.tally.calls == 2


def test_a_skill_is_written_from_its_plan(server: ModelServer) -> None:
    """A skill's text has the headings, requirements and topic that the prompt gives."""
    with dspy.context(lm=lm_for(server)):
        text = dspy.Predict("topic, outline: list[str], requirements: list[str] -> skill_content")(
            topic="tying knots", outline=["Choose a rope"], requirements=["Name the rope"]
        ).skill_content
    assert text.startswith("---\nname: tying-knots\n")
    assert "## Choose a rope" in text
    assert "Name the rope" in text


def test_a_score_depends_on_the_text(server: ModelServer) -> None:
    """A text that lacks what was required gets a lower score, and the issues say why."""
    with dspy.context(lm=lm_for(server)):
        review = dspy.Predict("skill_content, requirements: list[str] -> score: float, issues: list[str]")
        good = review(skill_content="Name the rope. " * 400, requirements=["Name the rope"])
        poor = review(skill_content="Tie it.", requirements=["Name the rope"])
    assert good.score > poor.score
    assert "Not addressed: Name the rope." in poor.issues


def test_the_same_prompt_gets_the_same_answer_everywhere(server: ModelServer) -> None:
    """Another server, with another port and key, gives the same answer, and another prompt another one."""
    with ModelServer() as other:
        assert lm_for(server)("Tie a knot.") == lm_for(other, api_key="other")("Tie a knot.")
    assert lm_for(server)("Tie a knot.") != lm_for(server)("Cook rice.")


def test_a_schema_alone_is_answered_by_it(client: Client) -> None:
    """A request with a JSON schema and a plain prompt gets an object of that schema."""
    wanted = {"type": "json_schema", "json_schema": {"name": "Entry", "schema": Entry.model_json_schema()}}
    _, answer = client.post("/v1/chat/completions", **HELLO, response_format=wanted)
    Entry.model_validate_json(answer["choices"][0]["message"]["content"])


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["chat", "responses"])
def test_the_usage_in_the_history_equals_the_tally(server: ModelServer, model_type: str) -> None:
    """DSPy's history and the server's tally have the same tokens."""
    lm = lm_for(server, model_type=model_type)
    with dspy.context(lm=lm):
        dspy.Predict("topic -> summary")(topic="tying knots")
    usage, tally = lm.history[-1]["usage"], server.tally
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))  # the responses API's names, before DSPy 3.4
    completion = usage.get("completion_tokens", usage.get("output_tokens"))
    assert (prompt, completion) == (tally.prompt_tokens, tally.completion_tokens)
    assert usage["total_tokens"] == tally.total_tokens > 0


def test_tokens_are_counted_from_the_words(client: Client, server: ModelServer) -> None:
    """The prompt's and the answer's tokens are those of the texts that went over the wire."""
    _, answer = client.post("/v1/chat/completions", **HELLO)
    said = answer["choices"][0]["message"]["content"]
    assert server.requests[0].usage == Usage(count_tokens("Say hello, please."), count_tokens(said))
    assert count_tokens("Say hello, please.") == 5


@pytest.mark.parametrize("model_type", ["chat", "responses"])
def test_reasoning_and_cached_tokens_are_reported(model_type: str) -> None:
    """Reasoning is part of the completion's tokens, cached tokens are part of the prompt's."""
    with ModelServer(answer=lambda request: Reply("Done.", reasoning_tokens=7, cached_tokens=3)) as server:
        lm = lm_for(server, model_type=model_type)
        lm("one two three four")
    assert server.tally == Tally(1, 0, prompt_tokens=4, completion_tokens=9, cached_tokens=3, reasoning_tokens=7)
    assert lm.history[-1]["usage"]["total_tokens"] == 13


def test_a_provider_without_usage_can_be_played() -> None:
    """Without a usage in the reply, the client sees no tokens and the tally counts none."""
    with ModelServer(answer=lambda request: Reply("Done.", usage=False)) as server:
        lm = lm_for(server)
        lm("hello")
    assert not lm.history[-1]["usage"].get("total_tokens")
    assert server.tally == Tally(calls=1)


def test_a_known_models_name_gives_the_answers_a_price(server: ModelServer) -> None:
    """Asked as a model that DSPy and LiteLLM have a price for, the server's answers have a cost in the history."""
    lm = lm_for(server, "openai/gpt-4o-mini")
    lm("hello")
    usd_per_token = lm.history[-1]["cost"] / server.tally.total_tokens
    assert 1e-8 < usd_per_token < 1e-5


def test_an_answer_function_sees_the_request() -> None:
    """What stands in for the built-in answering gets the key, the messages and the body, and may call it."""
    seen: list[ModelRequest] = []

    def answer(request: ModelRequest) -> str:
        seen.append(request)
        return write_answer(request)

    with ModelServer(answer) as server:
        lm_for(server, temperature=0.5, api_key="job-7")("hello")
    assert seen[0].api_key == "job-7"
    assert seen[0].messages == ({"role": "user", "content": "hello"},)
    assert seen[0].body["temperature"] == 0.5


# --- several choices, streams, responses -----------------------------------------------------------------------------


def test_an_lm_gets_as_many_answers_as_it_wants(server: ModelServer) -> None:
    """n=3 gives three answers, whether DSPy asks for them in one request or in three."""
    lm = lm_for(server, temperature=1.0)
    assert len(lm("hello", n=3)) == 3
    assert lm.history[-1]["usage"]["total_tokens"] == server.tally.total_tokens


def test_choices_share_one_prompt(client: Client, server: ModelServer) -> None:
    """The tokens of the prompt are counted once for all choices, those of the answers for each."""
    _, answer = client.post("/v1/chat/completions", **HELLO, n=3)
    said = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(said) == 3
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == sum(map(count_tokens, said))


def test_a_stream_gives_the_same_answer_in_pieces(client: Client) -> None:
    """The pieces of a stream make up the answer that is given without a stream."""
    _, whole = client.post("/v1/chat/completions", **HELLO)
    pieces = [choice["delta"].get("content", "") for event in client.stream(**HELLO) for choice in event["choices"]]
    assert len(pieces) > 3
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]


def test_a_stream_ends_with_the_usage_where_asked(client: Client, server: ModelServer) -> None:
    """The last event has the usage and no choices, but only if `stream_options` asks for it."""
    *_, last = client.stream(**HELLO, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == server.tally.total_tokens
    assert not any("usage" in event for event in client.stream(**HELLO))


def test_a_stream_keeps_choices_apart(client: Client) -> None:
    """Each piece of a stream says which choice it belongs to."""
    indices = {choice["index"] for event in client.stream(**HELLO, n=2) for choice in event["choices"]}
    assert indices == {0, 1}


def test_streamify_gets_a_field_in_pieces(server: ModelServer) -> None:
    """DSPy's own streaming finds the field that it listens to."""

    async def listen() -> list[str]:
        with dspy.context(lm=lm_for(server), adapter=dspy.ChatAdapter()):
            listener = dspy.streaming.StreamListener(signature_field_name="answer")
            program: Any = dspy.streamify(dspy.Predict("question -> answer"), stream_listeners=[listener])
            outputs = [output async for output in program(question="What is a skill?")]
        assert isinstance(outputs.pop(), dspy.Prediction)
        return [output.chunk for output in outputs if isinstance(output, dspy.streaming.StreamResponse)]

    pieces = asyncio.run(listen())
    assert len(pieces) > 3
    assert "What is a skill" in "".join(pieces)


def test_the_responses_api_counts_and_answers_as_the_chat_does(client: Client) -> None:
    """The same prompt to both endpoints gives the same text and the same numbers of tokens."""
    _, chat = client.post("/v1/chat/completions", **HELLO)
    _, response = client.post("/v1/responses", model="demo", input="Say hello, please.")
    assert response["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert response["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]


def test_the_models_are_listed(client: Client) -> None:
    """The list of models has the demo's one."""
    status, text = client.send("GET", "/v1/models")
    assert (status, [model["id"] for model in json.loads(text)["data"]]) == (200, ["demo"])


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_an_error_status_reaches_the_caller(status: int) -> None:
    """An LM raises with the error's message; no history and no tokens are left, and the tally has a failure."""
    with ModelServer(answer=lambda request: Reply("Not today.", status=status)) as server:
        lm = lm_for(server)
        with pytest.raises(Exception, match="Not today"):
            lm("hello")
    assert lm.history == []
    assert server.tally == Tally(calls=1, failures=1)
    assert server.requests[0].status == status


def test_what_an_answer_raises_becomes_a_server_error() -> None:
    """An exception in the answer function is a status 500 with the exception in OpenAI's error shape."""

    def answer(request: ModelRequest) -> str:
        raise ValueError("broken")

    with ModelServer(answer) as server:
        client = Client(server)
        status, body = client.post("/v1/chat/completions", **HELLO)
        client.connection.close()
    assert status == 500
    assert body == {"error": {"message": "ValueError: broken", "type": "server_error", "param": None, "code": None}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", "{not json"),
        ("/v1/chat/completions", "[]"),
        ("/v1/chat/completions", '{"model": "demo"}'),
        ("/v1/chat/completions", json.dumps({**HELLO, "n": 0})),
        ("/v1/responses", json.dumps({"model": "demo", "input": "hello", "stream": True})),
        ("/v1/responses", ""),
    ],
)
def test_a_bad_request_is_refused(client: Client, server: ModelServer, path: str, body: str) -> None:
    """What is no JSON, or no such request, gets a 400, and the next request on the connection is fine."""
    status, text = client.send("POST", path, body)
    assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")
    assert client.post("/v1/chat/completions", **HELLO)[0] == 200
    assert server.tally.failures == 1


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/files"), ("POST", "/v1/embeddings"), ("GET", "/")])
def test_an_unknown_path_is_not_found(client: Client, server: ModelServer, method: str, path: str) -> None:
    """Another path gets a 404 in OpenAI's shape, and is no call."""
    status, text = client.send(method, path, "{}")
    assert (status, json.loads(text)["error"]["type"]) == (404, "invalid_request_error")
    assert server.tally.calls == 0


# --- concurrency and the server's life -------------------------------------------------------------------------------


def test_concurrent_clients_are_told_apart_by_their_keys(server: ModelServer) -> None:
    """32 threads at once: each key's tally is what its own LM saw."""

    def work(number: int) -> Any:
        lm = lm_for(server, api_key=f"job-{number}")
        with dspy.context(lm=lm):
            for _ in range(number % 3 + 1):
                dspy.Predict("topic -> summary")(topic=f"subject {'x ' * number}")
        return lm

    with ThreadPoolExecutor(32) as pool:
        lms = list(pool.map(work, range(32)))
    for number, lm in enumerate(lms):
        tally = server.tally_for(f"job-{number}")
        assert tally.calls == len(lm.history) == number % 3 + 1
        assert tally.total_tokens == sum(entry["usage"]["total_tokens"] for entry in lm.history)
    assert server.tally.total_tokens == sum(server.tally_for(f"job-{number}").total_tokens for number in range(32))


def test_a_latency_delays_the_answer() -> None:
    """A server with a latency answers no sooner than that."""
    with ModelServer(answer=lambda request: "Done.", latency=0.1) as server:
        client = Client(server)
        before = time.monotonic()
        client.post("/v1/chat/completions", **HELLO)
        client.connection.close()
    assert time.monotonic() - before >= 0.1


def test_closing_ends_a_hanging_request() -> None:
    """A client that waits for a server that hangs gets a 503 as soon as the server is closed."""
    server = ModelServer(latency=3600)
    client = Client(server)
    client.send("GET", "/v1/models")  # so that the connection is accepted: one that is not would just be reset
    client.connection.request("POST", "/v1/chat/completions", json.dumps(HELLO))
    server.close()
    assert client.connection.getresponse().status == 503
    client.connection.close()
    assert server.tally == Tally(calls=1, failures=1)


def test_closing_leaves_no_thread_and_no_port(server: ModelServer) -> None:
    """After `close`, with a connection still open on the client's side, nothing of the server is left."""
    client = Client(server)
    client.post("/v1/chat/completions", **HELLO)
    assert server_threads()
    server.close()
    assert server_threads() == []
    client.connection.close()
    with pytest.raises(ConnectionRefusedError):
        client.post("/v1/chat/completions", **HELLO)


def test_closing_twice_is_fine(server: ModelServer) -> None:
    """A second `close` does nothing, and the tally can still be read."""
    server.close()
    server.close()
    assert server.tally == Tally()
