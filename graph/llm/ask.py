"""Ask a chat model for one answer that fits a schema, whatever its endpoint can and cannot do.

Endpoints differ in how an answer can be held to a schema, so `ask` climbs down a ladder
of methods until the endpoint takes one, and remembers that rung. Whatever comes back is
text from outside: it is searched for JSON, validated here, and handed back with the
reason when it does not fit. A model may be given tools to call before it answers; where
an endpoint knows no tools, it asks for them in words.
"""

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from langchain_core.exceptions import ContextOverflowError, ModelConnectionError, ModelTimeoutError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage
from langchain_core.runnables import Runnable
from pydantic import BaseModel, Field, ValidationError

from graph.llm.quoting import quote_data
from graph.llm.toolbox import Toolbox, ToolCall, dump
from tools.base.secrets import redact
from tools.base.words import count

T = TypeVar("T", bound=BaseModel)
Method = Literal["grammar", "json_schema", "function_calling", "json_mode", "text"]

METHODS: tuple[Method, ...] = ("json_schema", "function_calling", "json_mode", "text")
"""How OpenAI's protocol holds an answer to the schema, strictest first; `text` only asks for it in the prompt."""
OTHER_METHODS: tuple[Method, ...] = ("function_calling", "text")
"""What LangChain does in the same way for every other provider."""
STEP_DOWN = frozenset({400, 422, 500, 501})
"""HTTP statuses that mean 'I do not know this method': llama.cpp says 500, FastAPI servers 422."""
ANSWER_LIMIT = 4_000
"""Characters of an answer that are handed back and recorded."""
REASON_LIMIT = 1_000
"""Characters of the reason that goes with it."""
PROBLEM_LIMIT = 10
"""Problems named in one reason."""
READ_LIMIT = 1_000_000
"""Characters of an answer that are read at all; no sensible one is a hundredth of it."""
MAX_WRITTEN = {"array": ("maxItems", 16), "string": ("maxLength", 400)}
"""What a schema that holds an answer lets a list and a string grow to: a weak model repeats itself without end."""
CALL_LIMIT = 20
"""Tools that one reply may ask for; what follows is not heard."""

_rungs: dict[tuple[str, bool, bool], Method] = {}
"""The method that a model at its endpoint last took, for the life of the process: apart where tools are offered, and
again where answers of tools are sent, on which some endpoints choke."""


class AgentError(RuntimeError):
    """An agent gave no usable answer; the message is one line and holds no secret."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(redact(message), 600))


class CallRecord(BaseModel):
    """One reply of a chat model, used or not."""

    method: Method = Field(description="The method that held the reply to the schema.")
    reply: str = Field(description=f"What the model said; at most {ANSWER_LIMIT} characters.")
    input_tokens: int = Field(description="As the endpoint counts them; 0 when it does not say.")
    output_tokens: int = Field(description="As the endpoint counts them; 0 when it does not say.")
    problem: str = Field("", description="Why the reply was not used; empty when it was.")
    tools: int = Field(0, description="Tools that it asks for, in place of an answer.")
    seconds: float = Field(description="Wall-clock time of the call, waits and repeats included.")


# Asking


def ask(
    model: BaseChatModel,
    schema: type[T],
    messages: Sequence[AnyMessage],
    *,
    check: Callable[[T], None] | None = None,
    advise: Callable[[T], str] | None = None,
    hand_backs: int = 3,
    on_call: Callable[[CallRecord], None] | None = None,
    toolbox: Toolbox | None = None,
) -> T:
    """Ask for one `schema` and return it, validated.

    `messages` must show the schema and ask for JSON, as not every endpoint can be told in
    another way. An answer that does not fit, or for which `check` raises ValueError, is
    handed back with the reason, at most `hand_backs` times. An answer that could be used, but
    for which `advise` has words, is handed back with them too: once, as a model that insists
    shall have its way, and not where it was the last. `on_call` hears of every reply, good or
    bad, so that all tokens are counted.

    Until its budget is spent, the model may call the tools of the `toolbox` instead of
    answering, several in one message too; they run one after another. The `messages` must
    describe them, and how to ask for one in JSON: `{"tool": NAME, "arguments": {...}}`.

    Raises AgentError when the endpoint cannot be used, refuses, or gave no answer that fits.
    """
    conversation: list[AnyMessage | _Exchange] = list(messages)
    reason, left = "", hand_backs + 1
    while left:
        start = time.perf_counter()
        method, message = _send(model, schema, conversation, toolbox)
        said = _reply_text(message, schema) if toolbox else _first_text(message)
        text = redact(_clean(said[: READ_LIMIT + 1]))
        answer, calls, reason = _read_reply(message, text, schema, check, toolbox)
        if answer is not None and advise and left > 1 and (reason := advise(answer)):
            answer, advise = None, None
        if on_call is not None:
            on_call(_record(method, message, text, reason, len(calls), time.perf_counter() - start))
        if answer is not None:
            return answer
        if refusal := _refusal(message):
            raise AgentError(f"{_where(model)} refused to answer: {one_line(refusal, 300)}")
        if toolbox and calls:
            conversation.append(_Exchange(calls, [toolbox.run(call, explain) for call in calls]))
            continue
        left -= 1
        conversation += _hand_back(text, reason)
    problem = one_line(reason.replace("\n", "; "), 300)
    answers = count(hand_backs + 1, "answer")
    raise AgentError(f"{_where(model)} gave no usable {schema.__name__} in {answers}; the last one: {problem}")


def _read_reply(
    message: AIMessage, text: str, schema: type[T], check: Callable[[T], None] | None, toolbox: Toolbox | None
) -> tuple[T | None, list[ToolCall], str]:
    """The answer in a reply; or None and the tools it asks for, or what is wrong with it."""
    if refusal := _refusal(message):
        return None, [], f"refused: {one_line(refusal, 300)}"
    if _is_truncated(message):
        reason = "The answer was cut off at the length limit. Give a shorter one: fewer adjustments, short reasons."
        return None, [], reason
    try:
        answer = _parse(text, schema, tools=toolbox is not None)
        if not isinstance(answer, list):
            if check is not None:
                check(answer)
            return answer, [], ""
    except ValueError as error:
        return None, [], _shorten(redact(_clean(str(error))), REASON_LIMIT)
    assert toolbox is not None, "calls are heard only where there are tools"
    return (None, [], toolbox.describe_budget()) if toolbox.spent else (None, answer, "")


def _hand_back(text: str, reason: str) -> list[AnyMessage]:
    # The reason may quote a layer's name, or the answer itself.
    reason = "\n".join(quote_data(line, REASON_LIMIT) for line in reason.split("\n"))
    return [
        AIMessage(_shorten(_drop_thinking(text), ANSWER_LIMIT) or "(empty answer)"),
        HumanMessage(
            f"That answer cannot be used:\n{reason}\n"
            "Answer again with one JSON object that fits the schema, and nothing else."
        ),
    ]


@dataclass
class _Exchange:
    """The tools that one reply asked for, and what they answered."""

    calls: list[ToolCall]
    answers: list[str]


def _render(
    conversation: Sequence[AnyMessage | _Exchange], method: Method, toolbox: Toolbox | None
) -> list[AnyMessage]:
    """The conversation as messages: calls of tools as such where the method knows them, else in words.

    They are made anew, as what the model sent may be nothing that the endpoint takes back.
    """
    messages: list[AnyMessage] = []
    for i, part in enumerate(conversation):
        if not isinstance(part, _Exchange):
            messages.append(part)
        elif method == "function_calling" and toolbox and all(_is_plain(call, toolbox) for call in part.calls):
            ids = [f"call_{i}_{j}" for j in range(len(part.calls))]
            calls = [
                {"type": "tool_call", "id": key, "name": call.name, "args": call.arguments}
                for key, call in zip(ids, part.calls, strict=True)
            ]
            messages.append(AIMessage("", tool_calls=calls))
            messages += [ToolMessage(text, tool_call_id=key) for key, text in zip(ids, part.answers, strict=True)]
        else:
            said = "\n".join(_in_words(call.name, dump(call.arguments)) for call in part.calls)
            messages += [AIMessage(_shorten(said, ANSWER_LIMIT)), HumanMessage("\n\n".join(part.answers))]
    return messages


def _is_plain(call: ToolCall, toolbox: Toolbox) -> bool:
    """Whether a call is one that any endpoint takes back."""
    known = call.name in toolbox.tools and isinstance(call.arguments, dict)
    return known and len(dump(call.arguments)) <= ANSWER_LIMIT


def _in_words(name: str, arguments: str) -> str:
    """A call as a model that knows no tools would write it; the arguments are in JSON."""
    return f'{{"tool": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}'


def _record(method: Method, message: AIMessage, text: str, problem: str, tools: int, seconds: float) -> CallRecord:
    usage: Any = message.usage_metadata or {}
    return CallRecord(
        method=method,
        reply=_shorten(text, ANSWER_LIMIT),
        input_tokens=_whole(usage.get("input_tokens")),
        output_tokens=_whole(usage.get("output_tokens")),
        problem=problem,
        tools=tools,
        seconds=seconds,
    )


def _whole(value: object) -> int:
    """A token count as endpoints send it, which may be anything."""
    return value if isinstance(value, int) and value > 0 else 0


def _reply_text(message: AIMessage, schema: type[BaseModel]) -> str:
    """What the model said: its calls of functions in words, a line each, or else its text."""
    calls: list[str] = []
    for call in message.tool_calls:
        given = dump(call["args"])
        calls.append(given if call["name"] == schema.__name__ else _in_words(call["name"], given))
    for broken in message.invalid_tool_calls:  # its arguments are no JSON object, and go as the text that they are
        name, given = broken["name"] or "", broken["args"] or ""
        calls.append(given if name == schema.__name__ else _in_words(name, json.dumps(given)))
    return "\n".join(calls) if calls else str(message.text)


def _first_text(message: AIMessage) -> str:
    """What the model said: the arguments of its first tool call, or else its text."""
    if message.tool_calls:
        try:
            return json.dumps(message.tool_calls[0]["args"], ensure_ascii=False)
        except RecursionError:
            return ""
    if message.invalid_tool_calls:
        return message.invalid_tool_calls[0]["args"] or ""
    return str(message.text)


def _refusal(message: AIMessage) -> str:
    """Why the model declines to answer; empty when it does not."""
    if refusal := message.additional_kwargs.get("refusal"):
        return str(refusal)
    return "stopped by a content filter" if _end(message) in ("content_filter", "refusal") else ""


def _is_truncated(message: AIMessage) -> bool:
    details = message.response_metadata.get("incomplete_details")  # of the Responses API
    return _end(message) in ("length", "max_tokens") or (
        isinstance(details, dict) and details.get("reason") == "max_output_tokens"
    )


def _end(message: AIMessage) -> str:
    """Why the answer ends, in the provider's word; empty when it does not say."""
    found = message.response_metadata
    return str(found.get("finish_reason") or found.get("stop_reason") or found.get("done_reason") or "").lower()


# One call, down the ladder


@dataclass
class _Wire:
    """What passes between one call and the endpoint."""

    requests: int = 0
    repeat_500: bool = True


_wire: ContextVar[_Wire | None] = ContextVar("_wire", default=None)


def count_request(request: object) -> None:
    """A hook of the HTTP client: the SDK repeats requests by itself and does not tell how often."""
    if wire := _wire.get():
        wire.requests += 1


def judge_retry(response: Any) -> None:
    """A hook of the HTTP client: keep the SDK from repeating what only says that a method is unknown."""
    wire = _wire.get()
    if wire and not wire.repeat_500 and response.status_code in STEP_DOWN:
        response.headers["x-should-retry"] = "false"  # a header that the SDK obeys


def _send(
    model: BaseChatModel,
    schema: type[BaseModel],
    conversation: Sequence[AnyMessage | _Exchange],
    toolbox: Toolbox | None,
) -> tuple[Method, AIMessage]:
    """Get one reply by the best method that the endpoint takes; AgentError when it takes none."""
    methods = _ladder(model)
    if toolbox and "function_calling" in methods and not _is_elsewhere(model):
        # The one in which models were taught to call tools.
        methods = ("function_calling", *(method for method in methods if method != "function_calling"))
    place = _where(model), toolbox is not None, any(isinstance(part, _Exchange) for part in conversation)
    known = _rungs.get(place)
    start = known or _rungs.get((*place[:2], False))
    wire = _Wire()
    token = _wire.set(wire)
    try:
        for method in methods[methods.index(start) if start else 0 :]:
            # A 500 is worth repeating only where the method cannot be to blame for it.
            wire.repeat_500 = method in (known, methods[-1])
            messages = _render(conversation, method, toolbox)
            reply = _try_method(model, schema, messages, method, toolbox)
            if isinstance(reply, AIMessage):
                _rungs[place] = method
                return method, reply
            if not reply.by_method or (method == known and reply.status >= 500):
                break
    finally:
        _wire.reset(token)
    _rungs.pop(place, None)
    after = f", after {count(wire.requests, 'request')}" if wire.requests else ""
    raise AgentError(f"{_where(model)} {reply.text}{after}")


@dataclass
class _Failure:
    """A call that got no reply."""

    status: int
    """The HTTP status, or 0."""
    text: str
    """What happened, to be read after the endpoint's name."""
    by_method: bool = False
    """Whether the method may be to blame, so that another is worth trying."""


def _try_method(
    model: BaseChatModel,
    schema: type[BaseModel],
    messages: list[AnyMessage],
    method: Method,
    toolbox: Toolbox | None,
) -> AIMessage | _Failure:
    with warnings.catch_warnings():
        # It advises on its own `with_structured_output` when an endpoint refuses json_schema.
        warnings.filterwarnings("ignore", module="langchain_openai")
        try:
            reply = _bind(model, schema, method, toolbox).invoke(messages)
        except Exception as error:  # any kind: langchain raises even TypeError over what endpoints send
            # Not raised from here: a chained exception would carry the endpoint's text, key and all.
            return _describe_failure(error, model)
    if not isinstance(reply, AIMessage):
        return _Failure(0, "answers in the role of someone else than the assistant")
    return reply


def _bind(model: BaseChatModel, schema: type[BaseModel], method: Method, toolbox: Toolbox | None) -> Runnable[Any, Any]:
    """The model, told to answer by `method`, or to call a tool while the toolbox lets it.

    Not langchain's `with_structured_output`: it raises on an answer that was cut off before
    its text and tokens can be seen, and its JSON parser completes half an answer in silence.
    As `extra_body`, because langchain hands a plain `response_format` to the same code.
    """
    name, described = schema.__name__, schema.model_json_schema()
    tools = toolbox.functions if toolbox else []
    offered = tools if toolbox and not toolbox.spent else []
    if method == "grammar":
        return model.bind(schema=_schema_or_call(described, offered))
    if method == "json_schema":
        wanted = {"name": name, "schema": _bound_lengths(_schema_or_call(described, offered), MAX_WRITTEN)}
        return model.bind(extra_body={"response_format": {"type": "json_schema", "json_schema": wanted}})
    if method == "function_calling":
        function = {"name": name, "description": described.get("description", ""), "parameters": described}
        functions = _bound_lengths([{"type": "function", "function": function}, *tools], {})
        return model.bind_tools(functions, tool_choice="any" if offered else name)
    if method == "json_mode":
        return model.bind(extra_body={"response_format": {"type": "json_object"}})
    return model


def _schema_or_call(described: dict[str, Any], tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A JSON schema, or one that takes a call of a tool in words as well.

    An argument that is called like the schema (`plan` for Plan) is held to it.
    """
    if not tools:
        return described
    title = str(described["title"])
    answer = {"$ref": f"#/$defs/{title}"}
    calls = []
    for tool in tools:
        function = tool["function"]
        parameters = function["parameters"]
        given = {name: answer if name == title.lower() else kind for name, kind in parameters["properties"].items()}
        properties = {
            "tool": {"type": "string", "enum": [function["name"]]},
            "arguments": parameters | {"properties": given},
        }
        calls.append({"type": "object", "properties": properties, "required": ["tool", "arguments"]})
    parts = {key: value for key, value in described.items() if key != "$defs"}
    return {"anyOf": [answer, *calls], "$defs": {**described.get("$defs", {}), title: parts}}


def _bound_lengths(node: Any, limits: dict[str, tuple[str, int]]) -> Any:
    """A JSON schema whose bounds on lengths are these alone, or narrower: of a type, the keyword and the greatest.

    llama.cpp unrolls such bounds into a grammar, and refuses 2,000 characters (its issue 25746). The schema's own are
    checked here anyway.
    """
    if isinstance(node, list):
        return [_bound_lengths(item, limits) for item in node]
    if not isinstance(node, dict):
        return node
    # A field that happens to be called maxLength is a schema, so a dict, and stays.
    lengths = ("minLength", "maxLength", "minItems", "maxItems")
    bounded = {
        key: _bound_lengths(value, limits)
        for key, value in node.items()
        if key not in lengths or isinstance(value, dict)
    }
    kind = node.get("type")
    if isinstance(kind, str) and kind in limits and "enum" not in node:
        keyword, most = limits[kind]
        bounded[keyword] = min(most, node.get(keyword, most))
    return bounded


def _where(model: BaseChatModel) -> str:
    """The model, and where it is, as messages call it: the name that `graph.llm.models` gave it."""
    return model.name or type(model).__name__


def _is_elsewhere(model: BaseChatModel) -> bool:
    """Whether it speaks OpenAI's protocol at another address than OpenAI's.

    There the schema takes calls of tools in words: llama.cpp that must have a function called lets a model write its
    plan as text first, and then nothing that would end the answer; and functions double what a prompt says of plans.
    """
    return bool(getattr(model, "openai_api_base", None))


def _ladder(model: BaseChatModel) -> tuple[Method, ...]:
    """The methods that a model may take, strictest first."""
    own: tuple[Method, ...] | None = getattr(model, "methods", None)
    return own or (METHODS if hasattr(model, "openai_api_base") else OTHER_METHODS)


def _describe_failure(error: Exception, model: BaseChatModel) -> _Failure:
    """What happened, in words that follow the endpoint's name."""
    if isinstance(error, ContextOverflowError):
        return _Failure(400, f"cannot take so long a prompt ({one_line(_endpoint_words(error), 150)})")
    if isinstance(error, ModelTimeoutError):
        timeout = getattr(model, "request_timeout", None)
        return _Failure(0, f"gave no answer within {timeout} s" if timeout else "gave no answer in time")
    if isinstance(error, ModelConnectionError):
        return _Failure(0, f"cannot be reached or hung up ({one_line(_root_cause(error), 150)})")
    status = getattr(error, "status_code", 0)
    if not isinstance(status, int) or not status:
        # Arguments of a tool call that are no object end in langchain's ValidationError, and the reply is lost.
        by_method = isinstance(error, ValidationError | NotImplementedError)  # the latter where it has no tools
        return _Failure(0, f"sent no chat completion ({type(error).__name__}: {one_line(str(error), 150)})", by_method)
    if status == 401:  # without the endpoint's words: they quote the key
        keys = " or ".join(sorted({name for name in model.lc_secrets.values() if name.endswith("_API_KEY")}))
        return _Failure(status, f"wants another API key{f' than {keys} holds' if keys else ''} (HTTP 401)")
    known = {403: "denies access", 404: "knows no such model or address", 429: "limits the rate or the quota"}
    what = known.get(status, "failed" if status >= 500 else "rejected the request")
    words = one_line(_endpoint_words(error), 150)
    return _Failure(status, f"{what} (HTTP {status}: {words})", status in STEP_DOWN)


def _endpoint_words(error: Exception) -> str:
    body = getattr(error, "body", str(error))
    body = body.get("error", body) if isinstance(body, dict) else body  # Anthropic's is one level further down
    said = body.get("message") or body.get("detail") if isinstance(body, dict) else body  # FastAPI's is the latter
    return str(said or "no reason given")


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


# Reading an answer

_OBJECT = re.compile(r"""\{\s*["'}]""")
"""Where JSON begins, or what a model takes for it; any other brace is prose."""


def parse_answer(text: str, schema: type[T]) -> T:
    """The `schema` in a model's answer: bare, fenced, after thoughts, or amid prose.

    Of several objects that fit, the last counts, as models end with their conclusion.
    Raises ValueError with a reason that the model can act on, of at most about 1,000
    characters.
    """
    answer = _parse(text, schema, tools=False)
    assert not isinstance(answer, list)
    return answer


def _parse(text: str, schema: type[T], *, tools: bool) -> T | list[ToolCall]:
    """As `parse_answer`; or, if the last object that means anything asks for a tool, all the calls in the text."""
    if not text.strip():
        raise ValueError("The answer is empty.")
    if len(text) > READ_LIMIT:
        raise ValueError(f"The answer is longer than {READ_LIMIT:,} characters.")
    objects, broken = _find_objects(_drop_thinking(text))
    reasons = []
    for found in reversed(objects[-CALL_LIMIT:]):
        call = _as_call(found) if tools else None
        if call and call.name != schema.__name__:
            calls = [call for found in objects if (call := _as_call(found)) and call.name != schema.__name__]
            return calls[:CALL_LIMIT]
        try:
            return _validate(call.arguments if call and isinstance(call.arguments, dict) else found, schema)
        except ValueError as error:
            reasons.append(str(error))
    reasons = [f"The JSON is broken: {broken}."] if broken else reasons or ["There is no JSON object in the answer."]
    raise ValueError(_shorten(_clean(reasons[0]), REASON_LIMIT))


def _as_call(found: dict[str, Any]) -> ToolCall | None:
    """The call of a tool that an object means: as told, or `{"name": …, "arguments": …}` as in many chat templates."""
    key = "tool" if "tool" in found else "name"
    name = found.get(key)
    if not isinstance(name, str) or (key == "name" and "arguments" not in found):
        return None
    arguments = found.get("arguments", {other: value for other, value in found.items() if other != key})
    if isinstance(arguments, str):
        arguments = _load(arguments)
    return ToolCall(_clean(name), _load(_clean(dump(arguments))))


def _load(text: str) -> Any:
    """A JSON value; where there is none the text, of which the toolbox will say that it is no object."""
    try:
        return json.loads(text, parse_int=_parse_int)
    except (ValueError, RecursionError):
        return text


def _drop_thinking(text: str) -> str:
    """What follows the thoughts; templates often open them in the prompt, so only the closing tag shows."""
    if text.lstrip().startswith("{"):
        return text
    spoken = re.split(r"</think(?:ing)?>", text)[-1]
    return re.split(r"<think(?:ing)?>", spoken)[0].strip()


def _find_objects(text: str) -> tuple[list[dict[str, Any]], str]:
    """All outermost JSON objects in a text, and what is wrong with the first that is broken, or ""."""
    decoder = json.JSONDecoder(strict=False, parse_int=_parse_int)
    objects: list[dict[str, Any]] = []
    broken: list[str] = []
    end = 0
    # Each broken object costs a walk over the text (to count lines for its error), so not too many of them.
    while len(broken) < 100 and (opening := _OBJECT.search(text, end)):
        try:
            found, end = decoder.raw_decode(text, opening.start())
            objects.append(found)
        except json.JSONDecodeError as error:
            broken.append(f"{error.msg} at {_excerpt(text, error.pos)}")
            # Going on from where it broke keeps parts of a broken object from passing for answers.
            end = max(opening.start() + 1, error.pos)
        except RecursionError:
            broken.append("it is nested too deeply")
            break
    return objects, broken[0] if broken else ""


def _excerpt(text: str, position: int) -> str:
    return repr(one_line(text[max(0, position - 20) : position + 20], 40))


def _parse_int(digits: str) -> int | float:
    """A whole number; one too long for any field becomes infinite, and is refused as such."""
    return int(digits) if len(digits) < 300 else math.inf


def _validate(found: dict[str, Any], schema: type[T]) -> T:
    odd = [f"{path}: {value} is no number; write a finite one" for path, value in _non_finite(found)]
    if odd:
        raise ValueError(_list_problems(odd))
    try:
        return schema.model_validate(found)
    except ValidationError as error:
        reason = explain(error)
    raise ValueError(reason)


def explain(error: ValidationError) -> str:
    """What is wrong with an object, in words that a model can act on, at most about 1,000 characters."""
    details: Any = error.errors(include_url=False)
    return _list_problems([_describe_problem(detail) for detail in details])


def _non_finite(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Path and spelling of every NaN and infinity, without recursion."""
    stack: list[tuple[str, Any]] = [("", found)]
    while stack:
        path, value = stack.pop()
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        stack += [(f"{path}.{one_line(str(key), 40)}".lstrip("."), item) for key, item in items]
        if isinstance(value, float) and not math.isfinite(value):
            yield _shorten(path, 100), json.dumps(value)


def _describe_problem(detail: dict[str, Any]) -> str:
    """One of pydantic's errors as `path: what is wrong`, with advice where a number looks like a percentage."""
    path = ".".join(one_line(str(part), 40) for part in detail["loc"]) or "the answer"
    what = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"{path}: there is no such field; leave it out"
    if detail["type"] == "missing":
        return f"{path}: is missing"
    given = detail["input"]
    if isinstance(given, dict | list):
        return f"{path}: {what}"
    return f"{path}: {what}, not {one_line(json.dumps(given, default=str), 40)}{_advise_fraction(detail)}"


def _advise_fraction(detail: dict[str, Any]) -> str:
    """Advice for 45 or "45%" where a share was wanted."""
    given, limits = detail["input"], detail.get("ctx", {})
    percent = re.fullmatch(r"\s*(\d{1,3}(?:\.\d+)?)\s*%\s*", given) if isinstance(given, str) else None
    above_one = 1 in (limits.get("lt"), limits.get("le")) and isinstance(given, int | float) and 1 < given <= 100
    if not percent and not above_one:
        return ""
    share = float(percent[1] if percent else given) / 100
    return f"; that looks like a percentage: write {share:.6g}"


def _list_problems(problems: Sequence[str]) -> str:
    """At most `PROBLEM_LIMIT` problems, one a line, within `REASON_LIMIT` characters."""
    lines = [one_line(problem, 200) for problem in problems[:PROBLEM_LIMIT]]
    more = len(problems) - len(lines)
    text = _shorten("\n".join(lines), REASON_LIMIT - 30)
    return f"{text}\nand {more:,} more" if more else text


# Text


def _clean(text: str) -> str:
    """Text that can be sent and stored: JSON may smuggle in halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def one_line(text: str, limit: int) -> str:
    """Text as one line of at most `limit` characters."""
    return _shorten(" ".join(text[: 4 * limit].split()), limit)
