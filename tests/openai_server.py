"""A real OpenAI-compatible chat server on this machine that behaves, or misbehaves, as the model's name says.

    python -m tests.openai_server --port 8000

serves sensible plans, after calls of every tool where the client offers tools, so that a run
can be planned over HTTP without a key:

    python -m graph.run --planner openai:demo@http://127.0.0.1:8000/v1

Any model name that is not in `BEHAVIOURS` gets a good answer. In tests, `OpenAIServer` is
a context manager; it records every request, and what it answers with can be scripted: plans,
and `{"tool": NAME, "arguments": {...}}` for a call of a tool, or a list of several.
"""

import argparse
import contextlib
import itertools
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from graph.doors import judge

Body = dict[str, Any]
Answer = Body | list[Body]
PlanSource = Sequence[Answer] | Callable[[Body], Answer]

DEFAULT_PLAN: Body = {
    "sparsity": 0.3,
    "recipe": {"method": "two-sided", "refit": True, "allocation": "kappa", "strength": 1.0},
    "adjustments": [{"selector": "*.v_proj", "action": "factor", "factor": 2, "reason": "values are precious"}],
    "reason": "a careful first step",
}
DEMO_PLANS: tuple[Body, ...] = (
    {"sparsity": 0.3, "reason": "A first step well below the target shows how far the predictions can be trusted."},
    {"sparsity": 0.45, "reason": "The first step held, so this one goes to the target."},
    {
        "sparsity": 0.45,
        "adjustments": [{"selector": "*.v_proj", "action": "factor", "factor": 1.5, "reason": "values seem precious"}],
        "reason": "At the target only a better allocation is kept; v_proj may be dearer than predicted.",
    },
    {
        "sparsity": 0.45,
        "recipe": {"strength": 0.8},
        "reason": "The KL curves are measured per layer; leaning a little towards uniform hedges against that.",
    },
)
_DEMO_PROBE: Body = {"sparsity": 0.45, "recipe": {"method": "wanda", "refit": False}}
DEMO_CALLS: tuple[list[Answer], ...] = (
    [{"tool": "inspect_layers", "arguments": {"selector": "*.v_proj"}}, {"tool": "recall", "arguments": {"query": ""}}],
    [{"tool": "predict", "arguments": {"plan": {"sparsity": 0.45}}}],
    [
        [
            {"tool": "probe", "arguments": {"plans": [_DEMO_PROBE, {"sparsity": 0.45}], "tokens": 128}},
            {"tool": "history", "arguments": {"n": 3}},
        ]
    ],
    [{"tool": "predict", "arguments": {"plan": _DEMO_PROBE}}, {"tool": "candidates", "arguments": {"n": 1}}],
)
"""The tools called before each of `DEMO_PLANS`, the third time two in one message."""


@dataclass
class Request:
    """One request that arrived, and how it was answered."""

    path: str
    body: Body
    key: str
    """What came as the bearer's; "" where no key did."""
    headers: dict[str, str] = field(default_factory=dict)
    """By their names in lower case."""
    status: int = 0
    """HTTP status of the answer; 0 when there was none."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def method(self) -> str:
        """How the client asked for structure: json_schema, function_calling, json_mode or text."""
        kind = self.body.get("response_format", {}).get("type")
        if kind:
            return "json_mode" if kind == "json_object" else str(kind)
        return "function_calling" if self.body.get("tools") else "text"

    @property
    def messages(self) -> list[Body]:
        """What the client said."""
        messages: list[Body] = self.body["messages"]
        return messages


@dataclass
class Reply:
    """What goes back; with no status the connection is closed instead."""

    status: int = 200
    content: str | None = None
    """The assistant's text."""
    as_tool_call: bool = False
    """Whether `content` is sent as calls of functions, if the request brings some."""
    finish: str = "stop"
    refusal: str | None = None
    usage: bool = True
    error: str = ""
    """Message of an HTTP error."""
    raw: bytes | None = None
    """A whole body that is not an OpenAI answer."""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds before the answer."""


@dataclass
class Call:
    """What a behaviour may look at."""

    request: Request
    count: int
    """How often this model name was asked, this time included."""
    plan: Callable[[], str]
    """The next scripted plan, as JSON; each call takes one."""

    def good(self) -> Reply:
        return Reply(content=self.plan(), as_tool_call=True)

    def asks(self, *methods: str) -> bool:
        return self.request.method in methods


def _refuse_methods(status: int, *methods: str, error: str) -> Callable[[Call], Reply]:
    return lambda call: Reply(status, error=error) if call.asks(*methods) else call.good()


def _fail(status: int, error: str) -> Callable[[Call], Reply]:
    # The SDK obeys this header of Azure's; without it every repeat would wait half a second and more.
    return lambda call: Reply(status, error=error, headers={"retry-after-ms": "5"})


def _say(content: str, **more: Any) -> Callable[[Call], Reply]:
    return lambda call: Reply(content=content, **more)


def _say_as_tool_call(content: str) -> Callable[[Call], Reply]:
    """Refuses json_schema, to be asked for a tool call."""
    return lambda call: (
        Reply(400, error=UNSUPPORTED) if call.asks("json_schema") else Reply(content=content, as_tool_call=True)
    )


def _second_time(first: Callable[[Call], Reply], failures: int = 1) -> Callable[[Call], Reply]:
    return lambda call: first(call) if call.count <= failures else call.good()


def _flood(call: Call) -> Reply:
    bad = [{"selector": f"layer {i}", "action": "factor", "factor": -i} for i in range(10_000)]
    return Reply(content=json.dumps({"sparsity": 0.3, "adjustments": bad}), as_tool_call=True)


def _quote_key(call: Call) -> Reply:
    key = call.request.key
    return Reply(401, error=f"Incorrect API key provided: {key} ({key[:5]}***{key[-2:]}).")


def _refuse_answers_of_tools(call: Call, status: int) -> Reply:
    """As llama.cpp does where the model's chat template knows no messages of the role `tool`."""
    answers = any(message["role"] == "tool" for message in call.request.messages)
    return Reply(status, error="the template takes no role tool") if answers else call.good()


def _write_as_template(answer: str) -> str:
    """Calls as the chat templates of Hermes and Qwen write them, which not every server reads."""
    said = json.loads(answer)
    if "tool" not in said:
        return answer
    call = {"name": said["tool"], "arguments": said["arguments"]}
    return f"Let me see.\n<tool_call>\n{json.dumps(call)}\n</tool_call>"


def _rename_bound(call: Call) -> Reply:
    """As OpenAI's reasoning models do, wherever they run."""
    return Reply(400, error=RENAMED) if "max_tokens" in call.request.body else call.good()


RENAMED = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
UNSUPPORTED = "'response_format' of type 'json_schema' is not supported with this model"  # OpenAI's words
LLAMA_CPP = "Unsupported param: response_format"
PROSE = "I would prune the early blocks gently and the late ones hard."
WRONG = '{"sparsity": "lots", "target": 0.45, "recipe": {"method": "magic"}, "adjustments": [{"action": "factor"}]}'


def _think_aloud(call: "Call") -> Reply:
    return Reply(content=f"<think>Early ones?</think>\nI look first.\n{call.plan()}")


BEHAVIOURS: dict[str, Callable[[Call], Reply]] = {
    # answers that have to be dug out
    "fenced": lambda call: Reply(content=f"Here it is:\n```json\n{call.plan()}\n```\nGood luck!"),
    "think": lambda call: Reply(content=f'<think>Perhaps {{"sparsity": 0.9}}? No.</think>\n{call.plan()}'),
    "think-unopened": lambda call: Reply(content=f'Perhaps {{"sparsity": 0.9}}? No.</think>\n{call.plan()}'),
    "braces": lambda call: Reply(
        content=f'Of {{factor, bounds}} I take {{"action": "factor"}}; not {{"sparsity": 1, so: {call.plan()} {{done}}'
    ),
    "aloud": _think_aloud,
    "no-usage": lambda call: Reply(content=call.plan(), usage=False),
    # answers that do not fit
    "prose": _say(PROSE),
    "empty": _say(""),
    "wrong-schema": _say(WRONG, as_tool_call=True),
    "percent": _say('{"sparsity": 45}', as_tool_call=True),
    "percent-sign": _say('{"sparsity": "45%"}', as_tool_call=True),
    "nan": _say('{"sparsity": NaN}', as_tool_call=True),
    "infinity": _say('{"sparsity": 0.3, "recipe": {"strength": 1e999}}', as_tool_call=True),
    "flood": _flood,
    "long-prose": _say("word " * 20_000),
    "list-arguments": _say_as_tool_call("[0.3]"),
    "broken-arguments": _say_as_tool_call('{"sparsity": 0.3'),
    "nan-arguments": _say_as_tool_call('{"sparsity": NaN}'),
    "surrogates": _say('{"sparsity": 0.3, "\ud800": "\\ud800"}', as_tool_call=True),
    "truncated": _say('{"sparsity": 0.3, "reason": "bec', finish="length"),
    "truncated-once": _second_time(_say('{"sparsity": 0.3, "reason": "bec', finish="length")),
    "prose-once": _second_time(_say(PROSE)),
    "percent-once": _second_time(_say('{"sparsity": 45}', as_tool_call=True)),
    "nan-once": _second_time(_say('{"sparsity": NaN}', as_tool_call=True)),
    "echo-key": lambda call: Reply(content=json.dumps({"sparsity": 0.3, "reason": f"your key is {call.request.key}"})),
    # answers that are none
    "refusal": _say("", refusal="I cannot help with weapons."),
    "filtered": _say("I", finish="content_filter"),
    "html": lambda call: Reply(raw=b"<html>It works!</html>", headers={"content-type": "text/html"}),
    "error-body": lambda call: Reply(raw=b'{"error": {"message": "out of memory"}}'),
    "null-choices": lambda call: Reply(raw=b'{"id": "x", "object": "chat.completion", "model": "m", "choices": null}'),
    "no-choices": lambda call: Reply(raw=b'{"id": "x", "object": "chat.completion", "model": "m", "choices": []}'),
    # endpoints that lack a method
    "no-response-format": _refuse_methods(400, "json_schema", "json_mode", error=UNSUPPORTED),
    "no-response-format-500": _refuse_methods(500, "json_schema", "json_mode", error=LLAMA_CPP),
    "json-mode-only": _refuse_methods(400, "json_schema", "function_calling", error="tools are not supported"),
    "no-tools": _refuse_methods(400, "function_calling", error="tools are not supported"),
    "bare": _refuse_methods(400, "json_schema", "json_mode", "function_calling", error="extra fields"),
    "bare-aloud": lambda call: (
        Reply(400, error="extra fields") if call.request.method != "text" else _think_aloud(call)
    ),
    "bare-422": _refuse_methods(422, "json_schema", "json_mode", "function_calling", error="extra fields"),
    "bare-500": _refuse_methods(500, "json_schema", "json_mode", "function_calling", error=LLAMA_CPP),
    "no-answers-of-tools": lambda call: _refuse_answers_of_tools(call, 400),
    "no-answers-of-tools-500": lambda call: _refuse_answers_of_tools(call, 500),
    "renamed-bound": _rename_bound,
    "hermes": lambda call: Reply(content=_write_as_template(call.plan())),
    "ignores-tools": lambda call: (
        Reply(400, error=UNSUPPORTED) if call.asks("json_schema") else Reply(content=f"Sure! {call.plan()}")
    ),
    # endpoints in trouble
    "rate-twice": _second_time(_fail(429, "slow down"), failures=2),
    "rate-forever": _fail(429, "slow down"),
    "unavailable": _fail(503, "overloaded"),
    "busy-for-long": lambda call: Reply(429, error="come back tomorrow", headers={"retry-after": "86400"}),
    "broken": _fail(500, "boom"),
    "broken-later": lambda call: call.good() if call.count == 1 else _fail(500, "boom")(call),
    "bad-request": _fail(400, "no"),
    "slow": lambda call: Reply(content=call.plan(), delay=30.0),
    "slow-once": lambda call: Reply(content=call.plan(), delay=30.0 if call.count == 1 else 0.0),
    "hang-up": lambda call: Reply(0),
    "unauthorized": _quote_key,
    "forbidden": lambda call: Reply(403, error=f"key {call.request.key} may not"),
    "not-found": _fail(404, "no such model"),
    "short-memory": lambda call: (
        Reply(400, error="context_length_exceeded: too long") if len(call.request.messages) > 2 else call.good()
    ),
    "too-long": lambda call: Reply(400, error="context_length_exceeded: prompt is too long"),
}


class OpenAIServer:
    """Serves `POST /v1/chat/completions` on 127.0.0.1 inside a `with` block, in threads of its own.

    `plans` are answered in turn, the last one again and again; or a function makes each
    plan from the request's body. `port` 0 takes a free one.
    """

    def __init__(self, plans: PlanSource = (DEFAULT_PLAN,), *, port: int = 0) -> None:
        self.requests: list[Request] = []
        self._plans = plans
        self._served = 0
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        """The base URL to put behind `@` in a planner string."""
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def planner(self, model: str) -> str:
        """The planner string for a model of this server."""
        return f"openai:{model}@{self.url}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def wait(self) -> None:
        """Serve until the program is interrupted."""
        self._thread.join()

    def answer(self, request: Request) -> Reply:
        """Record a request and decide on its reply."""
        model = str(request.body.get("model"))
        with self._lock:
            self.requests.append(request)
            self._counts[model] += 1
            call = Call(request, self._counts[model], lambda: self._next_plan(request.body))
            reply = BEHAVIOURS.get(model, Call.good)(call)
        self._closing.wait(reply.delay)
        return reply

    def _next_plan(self, body: Body) -> str:
        if callable(self._plans):
            answer = self._plans(body)
        else:
            answer = self._plans[min(self._served, len(self._plans) - 1)]
            self._served += 1
        return "\n".join(map(json.dumps, answer)) if isinstance(answer, list) else json.dumps(answer)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_POST(self) -> None:
                if refuse_foreign(self):
                    return
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                key = self.headers.get("authorization", "").removeprefix("Bearer ")
                request = Request(self.path, body, key, {name.lower(): value for name, value in self.headers.items()})
                _respond(self, request, server.answer(request))

        return Handler


def refuse_foreign(handler: BaseHTTPRequestHandler) -> bool:
    """Whether a request is of a foreign page or by a foreign name, and was refused: what is here is for tests alone."""
    status, reason = judge(handler.headers.get_all("host", []), handler.headers.get_all("origin", []))
    if status:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(reason)))
        handler.end_headers()
        handler.wfile.write(reason.encode())
        handler.close_connection = True
    return bool(status)


def _respond(handler: BaseHTTPRequestHandler, request: Request, reply: Reply) -> None:
    """Send a reply; a client that gave up waiting is none of our business."""
    if not reply.status:
        handler.connection.shutdown(socket.SHUT_RDWR)
        return
    data = reply.raw if reply.raw is not None else json.dumps(_body(request, reply)).encode()
    request.status = reply.status
    headers = {"content-type": "application/json", "content-length": str(len(data))} | reply.headers
    try:
        handler.send_response(reply.status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)
    except OSError:
        handler.close_connection = True


def _body(request: Request, reply: Reply) -> Body:
    """The JSON of a reply; tokens are counted as four characters each."""
    if reply.status != 200:
        return {"error": {"message": reply.error, "type": "error", "code": None}}
    message: Body = {"role": "assistant", "content": reply.content, "refusal": reply.refusal}
    finish = reply.finish
    if reply.as_tool_call and request.method == "function_calling":
        calls = [
            {"id": f"call_{i}", "type": "function", "function": function}
            for i, function in enumerate(_read_functions(request, reply.content or ""))
        ]
        message |= {"content": None, "tool_calls": calls}
        finish = "tool_calls"
    body: Body = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": request.body["model"],
        "choices": [{"index": 0, "finish_reason": finish, "message": message}],
    }
    if reply.usage:
        request.prompt_tokens = len(json.dumps(request.messages)) // 4
        request.completion_tokens = len(reply.content or "") // 4
        body["usage"] = {
            "prompt_tokens": request.prompt_tokens,
            "completion_tokens": request.completion_tokens,
            "total_tokens": request.prompt_tokens + request.completion_tokens,
        }
    return body


def _read_functions(request: Request, content: str) -> list[Body]:
    """The calls in a scripted answer; what names no tool goes to the first function there is, broken or not."""
    first = request.body["tools"][0]["function"]["name"]
    functions = []
    for line in content.split("\n"):
        said = json.loads(line) if line.startswith('{"tool"') else {}
        name, arguments = said.get("tool", first), json.dumps(said["arguments"]) if said else line
        functions.append({"name": name, "arguments": arguments})
    return functions


def play_demo() -> Callable[[Body], Answer]:
    """`DEMO_PLANS` in a cycle, each after its calls of tools where the client's instructions speak of any."""
    cycle = itertools.cycle(zip(DEMO_CALLS, DEMO_PLANS, strict=True))
    waiting: list[Answer] = []

    def answer(body: Body) -> Answer:
        if not waiting:
            calls, plan = next(cycle)
            offered = "inspect_layers" in str(body["messages"][0]["content"])
            waiting.extend([*(calls if offered else []), plan])
        return waiting.pop(0)

    return answer


def main() -> None:
    """Serve the demo until interrupted."""
    parser = argparse.ArgumentParser(description="A local OpenAI-compatible server that answers with pruning plans.")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one")
    with OpenAIServer(play_demo(), port=parser.parse_args().port) as server:
        print(server.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()


if __name__ == "__main__":
    main()
