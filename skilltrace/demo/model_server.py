"""A small OpenAI-compatible model server, for the demo and for tests: no key, no network, true token counts.

It is the reference that skilltrace's own figures are compared with: it counts the tokens of what it really received
and really answered, and keeps a record of each request with its API key, so that concurrent jobs can be told apart by
giving each its own key.

What it answers is the business of `answers`. It needs the standard library only.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, cast

from skilltrace.demo.answers import compose, digest

__all__ = ["ModelRequest", "ModelServer", "RecordedRequest", "Reply", "Tally", "Usage", "count_tokens", "write_answer"]

MODEL_ID = "demo"
CHAT, RESPONSES, MODELS = "/v1/chat/completions", "/v1/responses", "/v1/models"

_TOKEN = re.compile(r"\w+|[^\w\s]")


def count_tokens(text: str) -> int:
    r"""Count the tokens of a text: each word and each punctuation mark is one, by the pattern ``\w+|[^\w\s]``.

    Args:
        text: Any text.

    Returns:
        The number of tokens.

    Example:
        >>> count_tokens("It works, doesn't it?")
        8
    """
    return len(_TOKEN.findall(text))


# --- What crosses the server's boundary ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelRequest:
    """One request as the answering sees it, the same for both endpoints.

    Attributes:
        path: The endpoint, `/v1/chat/completions` or `/v1/responses`.
        model: The model asked for.
        api_key: The bearer token of the Authorization header, or an empty string.
        messages: The conversation as `{"role": ..., "content": ...}`, each content as plain text.
        schema: The JSON schema that the answer must adhere to, where the request gives one.
        body: The request's whole JSON body.
    """

    path: str
    model: str
    api_key: str
    messages: tuple[Mapping[str, str], ...]
    schema: Mapping[str, Any] | None = field(repr=False)
    body: Mapping[str, Any] = field(repr=False)

    @property
    def text(self) -> str:
        """The contents of all messages as one text."""
        return "\n\n".join(message["content"] for message in self.messages)


@dataclass(frozen=True)
class Reply:
    """What an `answer` function returns where a plain string does not say enough.

    Attributes:
        text: The answer, or the error's message where the status is not 200.
        status: The HTTP status.
        reasoning_tokens: Hidden reasoning to report, on top of the tokens of the text.
        cached_tokens: Prompt tokens to report as read from the provider's cache (at most all of them).
        usage: False leaves the usage out, as some providers do; the tally counts no tokens then.

    Example:
        >>> Reply("Slow down.", status=429).status
        429
    """

    text: str = ""
    status: int = 200
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    usage: bool = True


@dataclass(frozen=True)
class Usage:
    """Tokens of one request, as OpenAI counts them.

    Attributes:
        prompt_tokens: Tokens of all messages, the cached ones included.
        completion_tokens: Tokens of all choices, the reasoning included.
        cached_tokens: How many of the prompt tokens came from the provider's prompt cache.
        reasoning_tokens: How many of the completion tokens were hidden reasoning.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class RecordedRequest:
    """One request that came to a model endpoint, with what was answered.

    Attributes:
        path: The endpoint.
        model: The model asked for.
        api_key: The bearer token of the Authorization header, or an empty string.
        messages: The conversation as `{"role": ..., "content": ...}`.
        usage: The tokens reported to the client, or None where none were (errors, `Reply(usage=False)`).
        status: The HTTP status of the reply.
    """

    path: str
    model: str
    api_key: str
    messages: tuple[Mapping[str, str], ...] = field(repr=False)
    usage: Usage | None
    status: int


@dataclass(frozen=True)
class Tally:
    """The sums over some requests: what a client's own figures must equal."""

    calls: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens

    @classmethod
    def of(cls, records: Iterable[RecordedRequest]) -> Tally:
        """Add up requests.

        Args:
            records: Some of `ModelServer.requests`.

        Returns:
            Their tally.
        """
        records = list(records)
        usages = [record.usage for record in records if record.usage is not None]
        return cls(
            calls=len(records),
            failures=sum(record.status != 200 for record in records),
            prompt_tokens=sum(usage.prompt_tokens for usage in usages),
            completion_tokens=sum(usage.completion_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens for usage in usages),
            reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
        )


# --- The server ------------------------------------------------------------------------------------------------------


class ModelServer:
    """An OpenAI-compatible server on a free port of 127.0.0.1, serving from its creation until `close`.

    It knows `POST /v1/chat/completions` (with `n` and `stream`), `POST /v1/responses` and `GET /v1/models`.

    Args:
        answer: Called with each `ModelRequest`, once per choice, on the thread of the client's connection. It returns
            the text or a `Reply`; what it raises becomes a status 500. Default: `write_answer`.
        latency: Seconds to wait before each answer. Closing the server ends the wait at once, with a status 503; so
            a long one stands for a provider that hangs.

    Attributes:
        base_url: The address to give to a client as its API base.

    Example:
        >>> import dspy
        >>> with ModelServer(answer=lambda request: "42") as server:
        ...     lm = dspy.LM("openai/demo", api_base=server.base_url, api_key="job-1", cache=False)
        ...     lm("How many?")
        ['42']
        >>> server.tally_for("job-1").total_tokens
        4
    """

    def __init__(self, answer: Callable[[ModelRequest], str | Reply] | None = None, latency: float = 0.0) -> None:
        self._answer = answer or write_answer
        self._latency = latency
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._records: list[RecordedRequest] = []
        self._http = _HTTPServer(self)
        self.base_url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(
            # The poll interval is the time that close() may have to wait until the loop sees it.
            target=self._http.serve_forever,
            kwargs={"poll_interval": 0.02},
            name="model-server",
            daemon=True,
        )
        self._thread.start()

    def __enter__(self) -> ModelServer:  # noqa: PYI034 - typing.Self is not in Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving, close every connection and join every thread. May be called again."""
        self._closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    @property
    def requests(self) -> list[RecordedRequest]:
        """The requests answered so far, in the order of their answers (a copy)."""
        with self._lock:
            return list(self._records)

    @property
    def tally(self) -> Tally:
        """The sums over all requests so far."""
        return Tally.of(self.requests)

    def tally_for(self, api_key: str) -> Tally:
        """Add up what one client did.

        Args:
            api_key: The API key that this client was given.

        Returns:
            The sums over its requests so far.
        """
        return Tally.of(record for record in self.requests if record.api_key == api_key)

    def reply(self, request: ModelRequest, choices: int) -> tuple[list[Reply], Usage | None]:
        """Answer a request and record it, before the client can see the answer: so nobody has to wait for the tally.

        Args:
            request: What was asked.
            choices: How many answers are wanted.

        Returns:
            The answers, or the one that failed; and the tokens to report, if any.
        """
        if self._closing.wait(self._latency):
            replies = [Reply("The server is closing.", status=503)]
        else:
            replies = [self._ask(request) for _ in range(choices)]
        failed = [reply for reply in replies if reply.status != 200][:1]
        usage = None if failed or not all(reply.usage for reply in replies) else _usage(request, replies)
        status = failed[0].status if failed else 200
        self.record(RecordedRequest(request.path, request.model, request.api_key, request.messages, usage, status))
        return failed or replies, usage

    def record(self, record: RecordedRequest) -> None:
        """Add a request to the records.

        Args:
            record: The request, answered or refused.
        """
        with self._lock:
            self._records.append(record)

    def _ask(self, request: ModelRequest) -> Reply:
        try:
            answer = self._answer(request)
        except Exception as error:  # a test's answer may raise anything, and the client must still get its reply
            return Reply(f"{type(error).__name__}: {error}", status=500)
        return Reply(answer) if isinstance(answer, str) else answer


def _usage(request: ModelRequest, replies: Sequence[Reply]) -> Usage:
    prompt = sum(count_tokens(message["content"]) for message in request.messages)
    reasoning = sum(reply.reasoning_tokens for reply in replies)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=sum(count_tokens(reply.text) for reply in replies) + reasoning,
        cached_tokens=min(prompt, max(reply.cached_tokens for reply in replies)),
        reasoning_tokens=reasoning,
    )


class _HTTPServer(ThreadingHTTPServer):
    """The port and the connections' threads, which it can join: the standard class forgets daemon threads."""

    request_queue_size = 128  # with the default of 5, dozens of clients that connect at once wait for a second or more

    def __init__(self, owner: ModelServer) -> None:
        self.owner = owner
        self._connections: dict[threading.Thread, socket.socket] = {}
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        """Bind without HTTPServer's look-up of the host's name, which may ask a name server."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own. Only the accepting thread comes here, so no lock is needed."""
        self._connections = {thread: conn for thread, conn in self._connections.items() if thread.is_alive()}
        thread = threading.Thread(
            target=self.process_request_thread, args=(request, client_address), name="model-server-client", daemon=True
        )
        self._connections[thread] = request
        thread.start()

    def server_close(self) -> None:
        """Close the port and every connection: for reading at first, so that answers under way still go out."""
        super().server_close()
        for how, patience in ((socket.SHUT_RD, 2.0), (socket.SHUT_RDWR, None)):
            for connection in self._connections.values():
                with suppress(OSError):  # the client may have closed it already
                    connection.shutdown(how)
            for thread in self._connections:
                thread.join(patience)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what goes wrong in here, but not that a client went away."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """The HTTP side of one connection."""

    protocol_version = "HTTP/1.1"  # keeps connections open, as providers do
    disable_nagle_algorithm = True  # headers and body are two writes: without this the second one waits for 40 ms

    def do_GET(self) -> None:
        """List the models."""
        if self._route() != MODELS:
            return self.send_error(404)
        model = {"id": MODEL_ID, "object": "model", "created": 0, "owned_by": "skilltrace"}
        return self._send(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        """Answer a model request."""
        length = self.headers.get("Content-Length", "")
        body = self.rfile.read(int(length)) if length.isdigit() else b""  # read even if refused: it is on the line
        path, api_key = self._route(), (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path not in (CHAT, RESPONSES):
            return self.send_error(404)
        owner = cast("_HTTPServer", self.server).owner
        try:
            request = _read_request(path, api_key, json.loads(body))
            choices, streams, tells_usage = _options(request)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            owner.record(RecordedRequest(path, "", api_key, (), None, 400))
            return self.send_error(400, f"The request cannot be read: {type(error).__name__}: {error}")
        replies, usage = owner.reply(request, choices)
        if replies[0].status != 200:
            return self.send_error(replies[0].status, replies[0].text)
        if streams:
            return self._stream(_chunks(request, replies, usage if tells_usage else None))
        answer = _chat_completion if path == CHAT else _response
        return self._send(200, answer(request, replies, usage))

    def _route(self) -> str:
        return self.path.partition("?")[0]

    def _send(self, status: int, payload: Mapping[str, Any]) -> None:
        data = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, events: Iterable[Mapping[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")  # the end of the connection is the end of the stream
        self.end_headers()
        for event in events:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def send_error(
        self,
        code: int,
        message: str | None = None,
        explain: str | None = None,  # noqa: ARG002 - the standard library's signature
    ) -> None:
        """Send an error in OpenAI's shape; the standard library calls this too, for what is not even HTTP."""
        kind = "rate_limit_error" if code == 429 else "invalid_request_error" if code < 500 else "server_error"
        message = message or f"Unknown request URL: {self.command} {self._route()}"
        self._send(code, {"error": {"message": message, "type": kind, "param": None, "code": None}})

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the standard library's signature
        """Keep the terminal quiet."""


# --- OpenAI's formats ------------------------------------------------------------------------------------------------


def _read_request(path: str, api_key: str, body: Mapping[str, Any]) -> ModelRequest:
    """Bring a body of either endpoint into one form, or raise where it is no such request."""
    if path == CHAT:
        turns = [(message["role"], message.get("content")) for message in body["messages"]]
        wanted = body.get("response_format")
    else:
        items = body["input"]
        turns = [("system", body["instructions"])] if body.get("instructions") else []
        turns += (
            [("user", items)]
            if isinstance(items, str)
            else [(item.get("role", "tool"), item.get("content") or item.get("output")) for item in items]
        )
        wanted = (body.get("text") or {}).get("format")
    schema = None
    if wanted and wanted["type"] == "json_schema":
        schema = wanted.get("json_schema", wanted)["schema"]
    elif wanted and wanted["type"] == "json_object":
        schema = {"type": "object"}
    return ModelRequest(
        path=path,
        model=body["model"],
        api_key=api_key,
        messages=tuple({"role": role, "content": _plain(content)} for role, content in turns),
        schema=schema,
        body=body,
    )


def _plain(content: str | Iterable[Mapping[str, Any]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n\n".join(part.get("text", "") for part in content)


def _options(request: ModelRequest) -> tuple[int, bool, bool]:
    """How many choices are wanted, whether as a stream, and whether a stream tells the usage."""
    choices, streams = request.body.get("n"), bool(request.body.get("stream"))
    choices = 1 if choices is None else choices
    if not isinstance(choices, int) or not 1 <= choices <= 128:
        raise ValueError("n must be a number from 1 to 128")
    if streams and request.path == RESPONSES:
        raise ValueError("this server does not stream responses; it streams chat completions")
    return choices, streams, bool((request.body.get("stream_options") or {}).get("include_usage"))


def _details(usage: Usage, prompt: str, completion: str) -> dict[str, Any]:
    """The usage, under the names that an endpoint has for the two kinds of tokens."""
    return {
        f"{prompt}_tokens": usage.prompt_tokens,
        f"{completion}_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        f"{prompt}_tokens_details": {"cached_tokens": usage.cached_tokens},
        f"{completion}_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _identity(request: ModelRequest, prefix: str) -> str:
    return f"{prefix}-{digest(request.api_key, request.text):024x}"


def _chat_completion(request: ModelRequest, replies: Sequence[Reply], usage: Usage | None) -> dict[str, Any]:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": reply.text},
            "logprobs": None,
            "finish_reason": "stop",
        }
        for index, reply in enumerate(replies)
    ]
    completion = {
        "id": _identity(request, "chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": choices,
    }
    return completion if usage is None else {**completion, "usage": _details(usage, "prompt", "completion")}


def _chunks(request: ModelRequest, replies: Sequence[Reply], usage: Usage | None) -> Iterator[dict[str, Any]]:
    """Stream a chat completion: word by word, the choices one after the other, the usage at the end."""
    frame = {
        "id": _identity(request, "chatcmpl"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": request.model,
    }
    for index, reply in enumerate(replies):
        deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in _WORD.findall(reply.text)), {}]
        for delta in deltas:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None if delta else "stop"}
            yield {**frame, "choices": [choice]}
    if usage is not None:
        yield {**frame, "choices": [], "usage": _details(usage, "prompt", "completion")}


_WORD = re.compile(r"\s*\S+|\s+$")


def _response(request: ModelRequest, replies: Sequence[Reply], usage: Usage | None) -> dict[str, Any]:
    message = {
        "type": "message",
        "id": _identity(request, "msg"),
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": replies[0].text, "annotations": []}],
    }
    response = {
        "id": _identity(request, "resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": request.model,
        "output": [message],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
    }
    return response if usage is None else {**response, "usage": _details(usage, "input", "output")}


def write_answer(request: ModelRequest) -> str:
    """Answer as a model would: sensibly, in the format asked for, and always the same to the same prompt.

    Args:
        request: A request with a prompt of DSPy's ChatAdapter or JSONAdapter, with a JSON schema, or with any other
            prompt, which gets a sentence.

    Returns:
        The answer.

    Example:
        >>> def flaky(request):  # fails for one job, answers the others
        ...     return Reply("Overloaded.", status=503) if request.api_key == "job-1" else write_answer(request)
    """
    last = request.messages[-1]["content"] if request.messages else ""
    return compose(request.text, last, request.schema)
