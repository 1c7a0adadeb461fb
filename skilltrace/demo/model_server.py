"""A small OpenAI-compatible model server, for the demo and for tests: no key, no network, true token counts.

It is the reference that skilltrace's own figures are compared with: it counts the tokens of what it really received
and really answered, and keeps a record of each request with its API key, so that concurrent jobs can be told apart by
giving each its own key.

Two parts, one below the other: the server, and the answering, which reads the prompts of DSPy's ChatAdapter and
JSONAdapter and writes an answer that they can parse. It needs the standard library only.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, cast

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
    return f"{prefix}-{_digest(request.api_key, request.text):024x}"


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


# --- The answering: from a prompt to the fields that it asks for -----------------------------------------------------

_Schema = Mapping[str, Any]
_DEEP = 3  # below this, lists are empty and what may be None is None, so that a type that contains itself ends

# DSPy ends its last message with one of these lines; it names the output fields in order, and their Python types.
_ASKS_FOR_MARKERS = "Respond with the corresponding output fields, starting with the field "
_ASKS_FOR_JSON = "Respond with a JSON object in the following order of fields: "
_ASKED_FIELD = re.compile(
    r"`(?:\[\[ ## )?(?P<name>\w+)(?: ## \]\])?`"
    r"(?: \((?:must be formatted as a valid Python )?(?P<type>.*?)\))?(?=, then |, and then |\.)"
)
# Before that, in the system message: what each field's value must look like (in JSON, so escaped, for the JSONAdapter).
_NOTE = re.compile(
    r'^(?P<json> *"\w+": ")?\{(?P<name>\w+)\} +# note: the value you produce (?P<note>.*)$', re.MULTILINE
)
# And the input fields with their values.
_SECTION = re.compile(r"^\[\[ ## (\w+) ## \]\][ \t]*\n?", re.MULTILINE)

_END = "completed"  # the field that ends an answer for the ChatAdapter

_SIMPLE_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


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
    text = request.text
    start = max(text.rfind(_ASKS_FOR_MARKERS), text.rfind(_ASKS_FOR_JSON))
    asked = _asked_fields(text, start)
    inputs = {name: value for name, value in _input_fields(text[: max(start, 0)]).items() if name not in asked}
    brief = _Brief(inputs, request.messages[-1]["content"] if request.messages else "")
    if request.schema is not None and "properties" in request.schema:
        return json.dumps(_write("", request.schema, brief, request.schema), ensure_ascii=False)
    values = {name: _write(name, schema, brief, schema) for name, schema in asked.items()}
    if values and text.startswith(_ASKS_FOR_MARKERS, start):
        sections = [f"[[ ## {name} ## ]]\n{_as_text(asked[name], value)}" for name, value in values.items()]
        return "\n\n".join([*sections, f"[[ ## {_END} ## ]]"])
    if values or request.schema is not None:
        return json.dumps(values or {"answer": _answer(brief)}, ensure_ascii=False)
    return _answer(brief)


def _asked_fields(text: str, start: int) -> dict[str, _Schema]:
    """The output fields asked for by the line at `start`, each with a JSON schema of its value."""
    if start < 0:
        return {}
    notes = {}
    for match in _NOTE.finditer(text):
        note = match["note"]
        notes[match["name"]] = json.loads('"' + note.rstrip(",")) if match["json"] else note
    line = text[start:].partition("\n")[0]
    asked = {
        match["name"]: _schema(match["type"], notes.get(match["name"], "")) for match in _ASKED_FIELD.finditer(line)
    }
    asked.pop(_END, None)
    return asked


def _schema(python_type: str | None, note: str) -> _Schema:
    """The JSON schema of a field, from its Python type's name and from the note, which has what the name lacks."""
    if python_type is None or python_type in _SIMPLE_TYPES:
        return {"type": _SIMPLE_TYPES[python_type or "str"]}
    if python_type.startswith("Literal["):
        with suppress(ValueError, SyntaxError):  # a Literal of enum members is no literal
            return {"enum": list(ast.literal_eval(f"({python_type[len('Literal[') : -1]},)"))}
    _, has_options, options = note.partition("one of: ")
    if has_options and not note.startswith("must adhere"):
        return {"enum": options.split("; ")}
    _, has_schema, schema = note.partition("JSON schema: ")
    parsed: _Schema = json.loads(schema) if has_schema else {"type": "string"}
    return parsed


def _input_fields(text: str) -> dict[str, Any]:
    """The input fields' values, lists and objects decoded. The last value wins: examples come first."""
    _, *pieces = _SECTION.split(text)
    fields: dict[str, Any] = {}
    for name, section in zip(pieces[::2], pieces[1::2], strict=True):
        value = section.strip()
        if name == _END or value.startswith(f"{{{name}}}"):  # the system message's pattern
            continue
        fields[name] = value
        if value.startswith(("[", "{")):
            with suppress(ValueError):
                fields[name] = json.loads(value)
    return fields


def _as_text(schema: _Schema, value: Any) -> str:
    """A value as DSPy reads it between markers: text as it is, all else as JSON."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and not ({"format", "pattern"} & schema.keys()):
        return value
    return json.dumps(value, ensure_ascii=False)


# --- The answering: from a field's name and type to a value ----------------------------------------------------------


def _digest(*parts: object) -> int:
    """A number that depends on nothing but its arguments (`hash` differs between processes)."""
    data = json.dumps(parts, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:12], "big")


@dataclass(frozen=True)
class _Brief:
    """What the writers know: the prompt's input fields, or the plain prompt."""

    inputs: Mapping[str, Any]
    prompt: str

    @cached_property
    def topic(self) -> str:
        """What it is all about, on one line."""
        named = [self.inputs[name] for name in ("topic", "question", "query", "task", "request") if name in self.inputs]
        texts = [value for value in (*named, *self.inputs.values(), self.prompt) if isinstance(value, str) and value]
        line = texts[0].strip().partition("\n")[0] if texts else ""
        return (line if len(line) <= 100 else line[:100].rpartition(" ")[0]).rstrip(" .?!:") or "the task"

    @cached_property
    def slug(self) -> str:
        """The topic as a file's name."""
        return "-".join(re.findall(r"[a-z0-9]+", self.topic.lower()))[:60].strip("-") or "skill"

    def text(self, name: str) -> str:
        """An input field's text, or what would be written for a field of that name."""
        value = self.inputs.get(name)
        return value if isinstance(value, str) and value else str(_WRITERS[name](self))

    def items(self, name: str) -> list[str]:
        """An input field's items, or what would be written for a field of that name."""
        value = self.inputs.get(name)
        return [str(item) for item in (value if isinstance(value, list) and value else _WRITERS[name](self))]

    def number(self, salt: str) -> int:
        """A large number that depends on the inputs."""
        return _digest(salt, self.inputs, "" if self.inputs else self.prompt)

    def pick(self, salt: str, options: Sequence[Any]) -> Any:
        """One of the options: the one that an input of that name has, or the one that the topic names, or any."""
        given = str(self.inputs.get(salt, ""))
        mentioned = [option for option in options if str(option) == given] or [
            option for option in options if re.search(rf"\b{re.escape(str(option))}\b", self.topic, re.IGNORECASE)
        ]
        return mentioned[0] if mentioned else options[self.number(salt) % len(options)]


def _write(name: str, schema: _Schema, brief: _Brief, root: _Schema, depth: int = 0) -> Any:
    """A value for a field: by its name where a writer knows it, else by its type; it always adheres to the schema."""
    if "$ref" in schema:
        target: Any = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    for choices in (schema.get("anyOf"), schema.get("oneOf"), schema.get("allOf")):
        if choices:
            wanted = [choice for choice in choices if (choice.get("type") == "null") == (depth > _DEEP)]
            return _write(name, (wanted or choices)[0], brief, root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return "finish" if "finish" in schema["enum"] else brief.pick(name, schema["enum"])  # how a dspy.ReAct ends
    kind = schema.get("type", "string")
    if kind == "object":
        properties = schema.get("properties", {})
        return {key: _write(key, value, brief, root, depth + 1) for key, value in properties.items()}
    known = _WRITERS[name](brief) if name in _WRITERS else None
    if kind == "array":
        return _write_list(name, known, schema, brief, root, depth)
    if kind == "boolean":
        return known if isinstance(known, bool) else brief.number(name) % 2 == 0
    if kind in ("number", "integer"):
        share = known if isinstance(known, float) else (brief.number(name) % 99 + 1) / 100
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        high = schema.get("maximum", schema.get("exclusiveMaximum", low + (1 if kind == "number" else 100)))
        value = low + share * (high - low)
        return round(value, 4) if kind == "number" else round(value)
    if kind == "null":
        return None
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    if isinstance(known, list):
        known = "\n".join(f"- {item}" for item in known)
    text = known if isinstance(known, str) else f"{_words(name).capitalize() or 'Answer'}: {brief.topic}."
    return text[: schema.get("maxLength", len(text))]


def _write_list(name: str, known: Any, schema: _Schema, brief: _Brief, root: _Schema, depth: int) -> list[Any]:
    if "prefixItems" in schema:  # a tuple
        return [
            _write(f"{name}_{place}", item, brief, root, depth + 1) for place, item in enumerate(schema["prefixItems"])
        ]
    items = schema.get("items") or {"type": "string"}
    if items.get("type") == "string" and not ({"enum", "format"} & items.keys()):
        if isinstance(known, str):
            known = [line.strip("- ") for line in known.splitlines() if line.strip("- ")]
        if not isinstance(known, list):
            known = [f"{place} {_words(name)} point on {brief.topic}." for place in ("First", "Second", "Third")]
        values: list[Any] = known
    else:
        many = 0 if depth > _DEEP else max(2, schema.get("minItems", 0))
        singular = name.removesuffix("s")
        values = [_write(singular, items, brief, root, depth + 1) for _ in range(many)]
    return values[: schema.get("maxItems", len(values))]


def _words(name: str) -> str:
    return name.replace("_", " ").strip()


_FORMATS = {
    "date": "2025-01-31",
    "date-time": "2025-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "PT1H",
    "uuid": "12345678-1234-4678-9234-567812345678",
    "email": "reader@example.com",
    "uri": "https://example.com/",
}


# --- The answering: what is known about some fields ------------------------------------------------------------------


def _reasoning(brief: _Brief) -> str:
    given = ", ".join(_words(name) for name in brief.inputs) or "prompt"
    return (
        f"The subject is: {brief.topic}. I have the {given} to go by. What matters is what a reader has to decide and "
        "do, in the order in which it comes up, and how to see that it was done well. The rest is left out."
    )


def _intent(brief: _Brief) -> str:
    return f"Let the reader do this without help, and know when it is done: {brief.topic}."


def _audience(brief: _Brief) -> str:
    return str(
        brief.pick(
            "audience",
            (
                "engineers who do it for the first time",
                "a team that wants to do it the same way each time",
                "reviewers who check the work of others",
                "maintainers who come back to it after months",
            ),
        )
    )


def _requirements(brief: _Brief) -> list[str]:
    every = [
        "Say when the skill applies and when it does not",
        "Give the steps in order, one action each",
        "Show one worked example from start to end",
        "Name the common mistakes and their symptoms",
        "End with a checklist that a reader can tick off",
        "List the tools and access needed before the first step",
        "State how long each step takes on a normal day",
        "Tell whom to ask when a step fails",
    ]
    start = brief.number("requirements") % len(every)
    return [every[(start + place) % len(every)] for place in range(5)]


def _outline(brief: _Brief) -> list[str]:
    middle = ["Choose an approach", "Set the scope", "Common mistakes"][: brief.number("outline") % 4]
    return ["When to use this skill", "Before you start", *middle, "Step by step", "Checklist"]


def _examples(brief: _Brief) -> list[str]:
    return [
        f"A first try: take the smallest real case of {brief.topic}, follow the steps, and note what was unclear.",
        f"A hard case: two people work on {brief.topic} at once; the scope is written down before either starts.",
        "A failure: the check at the end does not pass, the last step is undone, and its cause is written down.",
    ]


def _description(brief: _Brief) -> str:
    return f"{_title(brief)}, step by step, for {brief.text('audience')}."


def _title(brief: _Brief) -> str:
    return brief.topic[:1].upper() + brief.topic[1:]


def _tags(brief: _Brief) -> list[str]:
    words = [word for word in brief.slug.split("-") if len(word) > 3]
    return list(dict.fromkeys([*words[:4], str(brief.inputs.get("skill_type", "guide"))]))


_PARAGRAPHS = (
    "Start from the result and go back to what it needs. Write down in one sentence what this section settles.",
    "Keep it short. What a machine can check should be checked by a machine; what is left is judgement, for people.",
    "Do one thing at a time and look at the outcome before going on. A step that cannot be looked at is two steps.",
    "Ask what would show that this is wrong, and look for that first. It costs minutes here and days later.",
    "Write for a reader who has never seen it: name each file, each command and each person, and no more than that.",
)
_CHECKS = (
    "Check: a second person who has only this section comes to the same result.",
    "Check: the outcome can be shown in one screen, and it is linked here.",
    "Check: undo it once, on purpose, and see that nothing else has changed.",
)


def _skill_content(brief: _Brief) -> str:
    """A whole SKILL.md, from what the earlier steps found out."""
    requirements, start = brief.items("requirements"), brief.number("skill_content")
    # A JSON string is a YAML string too, whatever stands in it.
    lines = ["---", f"name: {brief.slug}", f"description: {json.dumps(_description(brief))}", "---", ""]
    lines += [f"# {_title(brief)}", "", brief.text("intent"), ""]
    for place, heading in enumerate(brief.items("outline")):
        lines += [f"## {heading}", "", _PARAGRAPHS[(start + place) % len(_PARAGRAPHS)], ""]
        if place < len(requirements):
            lines += [f"- {requirements[place]}.", f"- {_CHECKS[(start + place) % len(_CHECKS)]}", ""]
    lines += ["## Examples", "", *(f"- {example}" for example in brief.items("examples")), ""]
    lines += ["```text", f"$ skill run {brief.slug} --dry-run", "all checks passed", "```"]
    return "\n".join(lines)


def _review(brief: _Brief) -> tuple[float, list[str]]:
    """Judge the longest text among the inputs: its score from 0 to 1 and what is wrong with it."""
    text = max((value for value in brief.inputs.values() if isinstance(value, str)), key=len, default="")
    words, known = len(text.split()), set(re.findall(r"\w+", text.lower()))
    sections = len(re.findall(r"^## ", text, re.MULTILINE))
    requirements = brief.items("requirements")
    open_ones = [item for item in requirements if not _significant(item) <= known]
    checks = {
        "The front matter lacks a name or a description.": {"name", "description"} <= known and text.startswith("---"),
        f"It has {sections} sections; a skill of this kind needs four or more.": min(1.0, sections / 4),
        f"It has {words} words; 500 would leave room for detail.": min(1.0, words / 500),
        "It shows no example as code.": "```" in text,
        f"Not addressed: {'; '.join(open_ones)}.": 1 - len(open_ones) / len(requirements),
        "It has no links to further reading.": min(1.0, 0.5 + text.count("](") / 2),
    }
    score = round(sum(float(share) for share in checks.values()) / len(checks), 2)
    return score, [issue for issue, share in checks.items() if share < 1]


def _significant(sentence: str) -> set[str]:
    return {word for word in re.findall(r"\w+", sentence.lower()) if len(word) > 3}


def _answer(brief: _Brief) -> str:
    return f"In short, on {brief.topic}: begin with the smallest case that is real, check it, and build on that."


_WRITERS: Mapping[str, Callable[[_Brief], Any]] = {
    "reasoning": _reasoning,
    "rationale": _reasoning,
    "answer": _answer,
    "intent": _intent,
    "audience": _audience,
    "requirements": _requirements,
    "outline": _outline,
    "examples": _examples,
    "skill_content": _skill_content,
    "content": _skill_content,
    "name": lambda brief: brief.slug,
    "title": _title,
    "description": _description,
    "summary": _description,
    "tags": _tags,
    "version": lambda _: "1.0.0",
    "issues": lambda brief: _review(brief)[1],
    "score": lambda brief: _review(brief)[0],
    "quality_score": lambda brief: _review(brief)[0],
    "passed": lambda brief: _review(brief)[0] >= 0.7,
}
