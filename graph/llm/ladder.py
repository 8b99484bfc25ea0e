"""How an answer is held to a schema by whatever endpoint there is: a ladder of methods, strictest first.

Endpoints differ in what they can do, so a call climbs down until the endpoint takes a method, and that rung is
remembered.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import Runnable
from pydantic import BaseModel

from graph.llm.attempts import Answer, Attempts, Failure, Meter
from graph.llm.toolbox import Toolbox, ToolCall, dump
from tools.base.secrets import redact
from tools.base.words import count, one_line, shorten

Method = Literal["grammar", "json_schema", "function_calling", "json_mode", "text"]

METHODS: tuple[Method, ...] = ("json_schema", "function_calling", "json_mode", "text")
"""How OpenAI's protocol holds an answer to the schema, strictest first; `text` only asks for it in the prompt."""
OTHER_METHODS: tuple[Method, ...] = ("function_calling", "text")
"""What LangChain does in the same way for every other provider."""
REJECTIONS = frozenset({400, 413, 422})
"""HTTP statuses that mean 'not this conversation', once no method is left: it may have grown too long."""
ANSWER_LIMIT = 4_000
"""Characters of an answer that are handed back and recorded."""
MAX_WRITTEN = {"array": ("maxItems", 16), "string": ("maxLength", 400)}
"""What a schema that holds an answer lets a list and a string grow to: a weak model repeats itself without end."""


_rungs: dict[tuple[str, bool, bool], Method] = {}
"""The method that a model at its endpoint last took, for the life of the process: apart where tools are offered, and
again where answers of tools are sent, on which some endpoints choke."""


class AgentError(RuntimeError):
    """An agent gave no usable answer; the message is one line and holds no secret."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(redact(message), 600))


class Rejected(AgentError):
    """The endpoint does not take what it was sent, and would not take it again."""


class DeadEnd(AgentError):
    """The conversation leads nowhere: nothing but another one, from its beginning, can bring an answer."""


# What is sent


@dataclass
class Exchange:
    """The tools that one reply asked for, what they answered, and what the model said and thought beside."""

    calls: list[ToolCall]
    answers: list[str]
    words: str = ""


def _render(
    conversation: Sequence[AnyMessage | Exchange], method: Method, toolbox: Toolbox | None, name: str
) -> list[AnyMessage]:
    """The conversation as messages: calls of tools, and the schema of this name, as such where the method knows them,
    else in words.

    They are made anew, as what the model sent may be nothing that the endpoint takes back.
    """
    messages: list[AnyMessage] = []
    for i, part in enumerate(conversation):
        if method == "function_calling" and isinstance(part, SystemMessage):
            messages.append(_leave_out_schema(part, name))
        elif not isinstance(part, Exchange):
            messages.append(part)
        elif method == "function_calling" and toolbox and all(_is_plain(call, toolbox) for call in part.calls):
            ids = [f"call_{i}_{j}" for j in range(len(part.calls))]
            calls = [
                {"type": "tool_call", "id": key, "name": call.name, "args": call.arguments}
                for key, call in zip(ids, part.calls, strict=True)
            ]
            messages.append(AIMessage(part.words, tool_calls=calls))
            messages += [ToolMessage(text, tool_call_id=key) for key, text in zip(ids, part.answers, strict=True)]
        else:
            said = shorten("\n".join(in_words(call.name, dump(call.arguments)) for call in part.calls), ANSWER_LIMIT)
            said = f"{part.words}\n{said}" if part.words else said
            messages += [AIMessage(said), HumanMessage("\n\n".join(part.answers))]
    return messages


def _leave_out_schema(message: AnyMessage, name: str) -> AnyMessage:
    """Instructions without the schema that they show on a line of its own: the function `name` has it."""
    lines = str(message.text).split("\n")
    short = [f"(that of `{name}`)" if x.startswith('{"') and '"properties":' in x else x for x in lines]
    return SystemMessage("\n".join(short))


def _is_plain(call: ToolCall, toolbox: Toolbox) -> bool:
    """Whether a call is one that any endpoint takes back."""
    known = call.name in toolbox.names and isinstance(call.arguments, dict)
    return known and len(dump(call.arguments)) <= ANSWER_LIMIT


def in_words(name: str, arguments: str) -> str:
    """A call as a model that knows no tools would write it; the arguments are in JSON."""
    return f'{{"tool": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}'


# One call, down the ladder


class Received(NamedTuple):
    """A reply, the method that it came by, and our count of what was sent for it."""

    method: Method
    message: AIMessage
    prompt: int


def send(
    model: BaseChatModel,
    schema: type[BaseModel],
    conversation: Sequence[AnyMessage | Exchange],
    toolbox: Toolbox | None,
    meter: Meter,
) -> Received:
    """Get one reply by the best method that the endpoint takes; AgentError, or Rejected, when it takes none.

    The meter admits every request, and hears of those that brought nothing.
    """
    methods = _ladder(model)
    if toolbox and "function_calling" in methods and not _is_elsewhere(model):
        # The one in which models were taught to call tools.
        methods = ("function_calling", *(method for method in methods if method != "function_calling"))
    place = _find_place(model, conversation, toolbox)
    known = _rungs.get(place)
    start = known or _rungs.get((*place[:2], False))
    attempts = Attempts(model, meter)
    for method in methods[methods.index(start) if start else 0 :]:
        try:
            bound = _bind(model, schema, method, toolbox, forced=_was_handed_back(conversation))
        except NotImplementedError:  # LangChain's word for a model without tools
            continue
        messages = _render(conversation, method, toolbox, schema.__name__)
        reply = attempts.send(bound, messages, is_known=method in (known, methods[-1]))
        if isinstance(reply, Answer):
            _rungs[place] = method
            return Received(method, *reply)
        if not reply.by_method or (method == known and reply.status >= 500):
            break
    _rungs.pop(place, None)
    assert isinstance(reply, Failure)
    after = "" if hasattr(model, "methods") else f", after {count(attempts.count, 'request')}"  # none in this process
    text = f"{name_model(model)} {reply.text}{after}"
    raise Rejected(text) if reply.status in REJECTIONS else AgentError(text)


def remember_rung(
    model: BaseChatModel, conversation: Sequence[AnyMessage | Exchange], toolbox: Toolbox | None, method: Method
) -> None:
    """Start at the method that a reply came by, also where another process got it."""
    _rungs[_find_place(model, conversation, toolbox)] = method


def _find_place(
    model: BaseChatModel, conversation: Sequence[AnyMessage | Exchange], toolbox: Toolbox | None
) -> tuple[str, bool, bool]:
    return name_model(model), toolbox is not None, any(isinstance(part, Exchange) for part in conversation)


def _was_handed_back(conversation: Sequence[AnyMessage | Exchange]) -> bool:
    """Whether the last answer could not be used."""
    return any(isinstance(part, AIMessage) for part in conversation[-2:-1])


def _bind(
    model: BaseChatModel, schema: type[BaseModel], method: Method, toolbox: Toolbox | None, *, forced: bool
) -> Runnable[Any, Any]:
    """The model, told to answer by `method`, or to call a tool while the toolbox lets it.

    While it may, no function is `forced` before an answer could not be used: models that think first are not let do
    so by some endpoints where one is, and an answer as text is read all the same.

    Not langchain's `with_structured_output`: it raises on an answer that was cut off before
    its text and tokens can be seen, and its JSON parser completes half an answer in silence.
    As `extra_body`, because langchain hands a plain `response_format` to the same code.
    """
    name, described = schema.__name__, schema.model_json_schema()
    tools, beside = (toolbox.functions, toolbox.beside) if toolbox else ([], {})
    offered = tools if toolbox and not toolbox.spent else []
    if method == "grammar":
        return model.bind(schema=_schema_or_call(described, offered, beside))
    if method == "json_schema":
        wanted = {"name": name, "schema": bound_lengths(_schema_or_call(described, offered, beside), MAX_WRITTEN)}
        return model.bind(extra_body={"response_format": {"type": "json_schema", "json_schema": wanted}})
    if method == "function_calling":
        function = {"name": name, "description": described.get("description", ""), "parameters": described}
        functions = bound_lengths([{"type": "function", "function": function}, *tools], {})
        choice = name if not offered else "any" if forced else "auto"
        return model.bind_tools(functions, tool_choice=choice)
    if method == "json_mode":
        return model.bind(extra_body={"response_format": {"type": "json_object"}})
    return model


def _schema_or_call(
    described: dict[str, Any], tools: Sequence[dict[str, Any]], beside: Mapping[str, Any]
) -> dict[str, Any]:
    """A JSON schema, or one that takes a call of a tool in words as well.

    An argument that is called like the schema (`plan` for Plan) is held to it, and may have fields `beside` its own.
    """
    if not tools:
        return described
    title = str(described["title"])
    answer = {"$ref": f"#/$defs/{title}"}
    argument = {"$ref": f"#/$defs/{title}Argument"} if beside else answer
    calls = []
    for tool in tools:
        function = tool["function"]
        parameters = function["parameters"]
        given = {name: argument if name == title.lower() else kind for name, kind in parameters["properties"].items()}
        properties = {
            "tool": {"type": "string", "enum": [function["name"]]},
            "arguments": parameters | {"properties": given},
        }
        calls.append({"type": "object", "properties": properties, "required": ["tool", "arguments"]})
    parts = {key: value for key, value in described.items() if key != "$defs"}
    known = {**described.get("$defs", {}), title: parts}
    if beside:
        known[f"{title}Argument"] = parts | {"properties": {**parts["properties"], **beside}}
    return {"anyOf": [answer, *calls], "$defs": known}


def bound_lengths(node: Any, limits: dict[str, tuple[str, int]]) -> Any:
    """A JSON schema whose bounds on lengths are these alone, or narrower: of a type, the keyword and the greatest.

    llama.cpp unrolls such bounds into a grammar, and refuses 2,000 characters (its issue 25746). The schema's own are
    checked here anyway.
    """
    if isinstance(node, list):
        return [bound_lengths(item, limits) for item in node]
    if not isinstance(node, dict):
        return node
    # A field that happens to be called maxLength is a schema, so a dict, and stays.
    lengths = ("minLength", "maxLength", "minItems", "maxItems")
    bounded = {
        key: bound_lengths(value, limits)
        for key, value in node.items()
        if key not in lengths or isinstance(value, dict)
    }
    kind = node.get("type")
    if isinstance(kind, str) and kind in limits and "enum" not in node:
        keyword, most = limits[kind]
        bounded[keyword] = min(most, node.get(keyword, most))
    return bounded


def describe_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """A JSON schema for prompts, with the bounds that hold the answer where an endpoint is held to one."""
    described: dict[str, Any] = bound_lengths(schema.model_json_schema(), MAX_WRITTEN)
    return described


def name_model(model: BaseChatModel) -> str:
    """The model, and where it is, as messages call it: the name that `graph.llm.models` gave it."""
    return model.name or type(model).__name__


def _is_elsewhere(model: BaseChatModel) -> bool:
    """Whether it speaks OpenAI's protocol at another address than OpenAI's.

    There the schema takes calls of tools in words: llama.cpp that must have a function called lets a model write its
    plan as text first, and then nothing that would end the answer; and functions double what a prompt says of plans.
    """
    return bool(getattr(model, "elsewhere", False))


def _ladder(model: BaseChatModel) -> tuple[Method, ...]:
    """The methods that a model may take, strictest first."""
    own: tuple[Method, ...] | None = getattr(model, "methods", None)
    return own or (METHODS if hasattr(model, "openai_api_base") else OTHER_METHODS)
