"""Ask an OpenAI-compatible chat model for one answer that fits a schema, whatever its endpoint can and cannot do.

Endpoints differ in how an answer can be held to a schema, so `ask` climbs down a ladder
of methods until the endpoint takes one, and remembers that rung. Whatever comes back is
text from outside: it is searched for JSON, validated here, and handed back with the
reason when it does not fit.
"""

import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from langchain_core.exceptions import ContextOverflowError, ModelConnectionError, ModelTimeoutError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from langchain_core.runnables import Runnable
from pydantic import BaseModel, Field, SecretStr, ValidationError

from tools.errors import UserError
from tools.secrets import redact

T = TypeVar("T", bound=BaseModel)
Method = Literal["json_schema", "function_calling", "json_mode", "text"]

METHODS: tuple[Method, ...] = ("json_schema", "function_calling", "json_mode", "text")
"""How an answer is held to the schema, strictest first; `text` only asks for it in the prompt."""
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

_rungs: dict[tuple[str, str], Method] = {}
"""The method that an endpoint and model last took, for the life of the process."""


class AgentError(RuntimeError):
    """An agent gave no usable answer; the message is one line and holds no secret."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(redact(message), 600))


class CallRecord(BaseModel):
    """One reply of a chat model, used or not."""

    method: Method = Field(description="The method that held the reply to the schema.")
    reply: str = Field(description=f"What the model said; at most {ANSWER_LIMIT} characters.")
    input_tokens: int = Field(description="As the endpoint counts them; 0 when it does not say.")
    output_tokens: int = Field(description="As the endpoint counts them; 0 when it does not say.")
    problem: str = Field("", description="Why the reply was not used; empty when it was.")
    seconds: float = Field(description="Wall-clock time of the call, waits and repeats included.")


# Opening a model


def check_planner(planner: str) -> None:
    """See whether a planner can be asked at all, without asking it.

    Raises UserError when its string makes no sense, or when it needs a key and
    OPENAI_API_KEY is not set.
    """
    if planner == "heuristic":
        return
    _, url = _split_planner(planner)
    if url is None and not os.environ.get("OPENAI_API_KEY", "").strip():
        raise UserError(
            f"the planner {planner} needs an API key: set the environment variable OPENAI_API_KEY, or name an "
            f"endpoint that needs none with {planner}@http://HOST:PORT/v1"
        )


def open_chat(planner: str, *, timeout: float, retries: int) -> BaseChatModel:
    """Make the chat model that `openai:NAME` or `openai:NAME@http://HOST:PORT/v1` stands for.

    `timeout` is in seconds for one request; `retries` is how often a request that met
    429, a 5xx status, a time-out or a hang-up is repeated. The key comes from
    OPENAI_API_KEY. No temperature is sent, because many models refuse any. Nothing is
    sent yet. Raises UserError as `check_planner` does.
    """
    check_planner(planner)
    name, url = _split_planner(planner)
    # Imported here because it takes over a second, and most runs plan without a chat model.
    from langchain_openai import ChatOpenAI
    from openai import DefaultHttpxClient

    return ChatOpenAI(
        model=name,
        base_url=url,
        api_key=SecretStr(os.environ.get("OPENAI_API_KEY", "").strip() or "none"),
        temperature=None,  # said aloud, since langchain fills in a 1 for o1 otherwise
        timeout=timeout,
        max_retries=retries,
        # Compatible endpoints rarely have the Responses API, which langchain picks by the model's name.
        use_responses_api=False if url else None,
        # A graph streamed in mode `messages` would stream the model too, and lose the token counts.
        disable_streaming=True,
        http_client=DefaultHttpxClient(event_hooks={"request": [_count_request], "response": [_judge_retry]}),
        # Minutes of pruning lie between two calls: a kept connection would be stale by then.
        default_headers={"Connection": "close"},
    )


def _split_planner(planner: str) -> tuple[str, str | None]:
    match = re.fullmatch(r"openai:([^\s@]+)(?:@(https?://\S+))?", planner)
    if match is None:
        raise UserError(
            f"no such planner: {_one_line(redact(planner), 100)!r}; write heuristic, openai:NAME or "
            "openai:NAME@http://HOST:PORT/v1"
        )
    name, url = match[1], match[2]
    if url is not None and not _is_address(url):
        raise UserError(f"the planner's address {_one_line(redact(url), 100)!r} is not of the form http://HOST:PORT/v1")
    if url is not None and "@" in urlsplit(url).netloc:  # it would stand in config.yaml and in every checkpoint
        raise UserError("the planner's address holds a password; set the environment variable OPENAI_API_KEY instead")
    return name, url


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


# Asking


def ask(
    model: BaseChatModel,
    schema: type[T],
    messages: Sequence[AnyMessage],
    *,
    check: Callable[[T], None] | None = None,
    hand_backs: int = 3,
    on_call: Callable[[CallRecord], None] | None = None,
) -> T:
    """Ask for one `schema` and return it, validated.

    `messages` must show the schema and ask for JSON, as not every endpoint can be told in
    another way. An answer that does not fit, or for which `check` raises ValueError, is
    handed back with the reason, at most `hand_backs` times. `on_call` hears of every reply,
    good or bad, so that all tokens are counted.

    Raises AgentError when the endpoint cannot be used, refuses, or gave no answer that fits.
    """
    conversation = list(messages)
    reason = ""
    for _ in range(hand_backs + 1):
        start = time.perf_counter()
        method, message = _send(model, schema, conversation)
        text = redact(_clean(_reply_text(message)[: READ_LIMIT + 1]))
        answer, reason = _read_reply(message, text, schema, check)
        if on_call is not None:
            on_call(_record(method, message, text, reason, time.perf_counter() - start))
        if answer is not None:
            return answer
        if refusal := _refusal(message):
            raise AgentError(f"{_where(model)} refused to answer: {_one_line(refusal, 300)}")
        conversation += _hand_back(text, reason)
    problem = _one_line(reason.replace("\n", "; "), 300)
    answers = _count(hand_backs + 1, "answer")
    raise AgentError(f"{_where(model)} gave no usable {schema.__name__} in {answers}; the last one: {problem}")


def _read_reply(
    message: AIMessage, text: str, schema: type[T], check: Callable[[T], None] | None
) -> tuple[T | None, str]:
    """The answer in a reply, or None and what is wrong with it."""
    if refusal := _refusal(message):
        return None, f"refused: {_one_line(refusal, 300)}"
    if _is_truncated(message):
        return None, "The answer was cut off at the length limit. Give a shorter one: fewer adjustments, short reasons."
    try:
        answer = parse_answer(text, schema)
        if check is not None:
            check(answer)
    except ValueError as error:
        return None, _shorten(redact(_clean(str(error))), REASON_LIMIT)
    return answer, ""


def _hand_back(text: str, reason: str) -> list[AnyMessage]:
    return [
        AIMessage(_shorten(_drop_thinking(text), ANSWER_LIMIT) or "(empty answer)"),
        HumanMessage(
            f"That answer cannot be used:\n{reason}\n"
            "Answer again with one JSON object that fits the schema, and nothing else."
        ),
    ]


def _record(method: Method, message: AIMessage, text: str, problem: str, seconds: float) -> CallRecord:
    usage: Any = message.usage_metadata or {}
    return CallRecord(
        method=method,
        reply=_shorten(text, ANSWER_LIMIT),
        input_tokens=_whole(usage.get("input_tokens")),
        output_tokens=_whole(usage.get("output_tokens")),
        problem=problem,
        seconds=seconds,
    )


def _whole(value: object) -> int:
    """A token count as endpoints send it, which may be anything."""
    return value if isinstance(value, int) and value > 0 else 0


def _reply_text(message: AIMessage) -> str:
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
    return "stopped by a content filter" if message.response_metadata.get("finish_reason") == "content_filter" else ""


def _is_truncated(message: AIMessage) -> bool:
    details = message.response_metadata.get("incomplete_details")  # of the Responses API
    return message.response_metadata.get("finish_reason") == "length" or (
        isinstance(details, dict) and details.get("reason") == "max_output_tokens"
    )


# One call, down the ladder


@dataclass
class _Wire:
    """What passes between one call and the endpoint."""

    requests: int = 0
    repeat_500: bool = True


_wire: ContextVar[_Wire | None] = ContextVar("_wire", default=None)


def _count_request(request: object) -> None:
    """A hook of the HTTP client: the SDK repeats requests by itself and does not tell how often."""
    if wire := _wire.get():
        wire.requests += 1


def _judge_retry(response: Any) -> None:
    """A hook of the HTTP client: keep the SDK from repeating what only says that a method is unknown."""
    wire = _wire.get()
    if wire and not wire.repeat_500 and response.status_code in STEP_DOWN:
        response.headers["x-should-retry"] = "false"  # a header that the SDK obeys


def _send(model: BaseChatModel, schema: type[BaseModel], messages: list[AnyMessage]) -> tuple[Method, AIMessage]:
    """Get one reply by the best method that the endpoint takes; AgentError when it takes none."""
    place = _place(model)
    known = _rungs.get(place)
    wire = _Wire()
    token = _wire.set(wire)
    try:
        for method in METHODS[METHODS.index(known) if known else 0 :]:
            # A 500 is worth repeating only where the method cannot be to blame for it.
            wire.repeat_500 = method in (known, METHODS[-1])
            reply = _try_method(model, schema, messages, method)
            if isinstance(reply, AIMessage):
                _rungs[place] = method
                return method, reply
            if not reply.by_method or (method == known and reply.status >= 500):
                break
    finally:
        _wire.reset(token)
    _rungs.pop(place, None)
    after = f", after {_count(wire.requests, 'request')}" if wire.requests else ""
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
    model: BaseChatModel, schema: type[BaseModel], messages: list[AnyMessage], method: Method
) -> AIMessage | _Failure:
    with warnings.catch_warnings():
        # It advises on its own `with_structured_output` when an endpoint refuses json_schema.
        warnings.filterwarnings("ignore", module="langchain_openai")
        try:
            reply = _bind(model, schema, method).invoke(messages)
        except Exception as error:  # any kind: langchain raises even TypeError over what endpoints send
            # Not raised from here: a chained exception would carry the endpoint's text, key and all.
            return _describe_failure(error, getattr(model, "request_timeout", None))
    if not isinstance(reply, AIMessage):
        return _Failure(0, "answers in the role of someone else than the assistant")
    return reply


def _bind(model: BaseChatModel, schema: type[BaseModel], method: Method) -> Runnable[Any, Any]:
    """The model, told to answer by `method`.

    Not langchain's `with_structured_output`: it raises on an answer that was cut off before
    its text and tokens can be seen, and its JSON parser completes half an answer in silence.
    As `extra_body`, because langchain hands a plain `response_format` to the same code.
    """
    name, described = schema.__name__, _schema_to_send(schema)
    if method == "json_schema":
        wanted = {"type": "json_schema", "json_schema": {"name": name, "schema": described}}
        return model.bind(extra_body={"response_format": wanted})
    if method == "function_calling":
        tool = {"name": name, "description": described.get("description", ""), "parameters": described}
        return model.bind_tools([{"type": "function", "function": tool}], tool_choice=name)
    if method == "json_mode":
        return model.bind(extra_body={"response_format": {"type": "json_object"}})
    return model


def _schema_to_send(schema: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema without bounds on lengths.

    llama.cpp unrolls them into a grammar and refuses it at 2,000 characters (its issue
    25746); they are checked here anyway.
    """
    described: dict[str, Any] = _without_lengths(schema.model_json_schema())
    return described


def _without_lengths(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_lengths(item) for item in node]
    if not isinstance(node, dict):
        return node
    # A field that happens to be called maxLength is a schema, so a dict, and stays.
    lengths = ("minLength", "maxLength", "minItems", "maxItems")
    return {
        key: _without_lengths(value) for key, value in node.items() if key not in lengths or isinstance(value, dict)
    }


def _place(model: BaseChatModel) -> tuple[str, str]:
    name = getattr(model, "model_name", type(model).__name__)
    return str(getattr(model, "openai_api_base", None) or ""), str(name)


def _where(model: BaseChatModel) -> str:
    url, name = _place(model)
    return f"openai:{name} at {url}" if url else f"openai:{name}"


def _describe_failure(error: Exception, timeout: object) -> _Failure:
    """What happened, in words that follow the endpoint's name."""
    if isinstance(error, ContextOverflowError):
        return _Failure(400, "cannot take so long a prompt")
    if isinstance(error, ModelTimeoutError):
        return _Failure(0, f"gave no answer within {timeout} s")
    if isinstance(error, ModelConnectionError):
        return _Failure(0, f"cannot be reached or hung up ({_one_line(_root_cause(error), 150)})")
    status = getattr(error, "status_code", 0)
    if not isinstance(status, int) or not status:
        # Arguments of a tool call that are no object end in langchain's ValidationError, and the reply is lost.
        by_method = isinstance(error, ValidationError)
        return _Failure(0, f"sent no chat completion ({type(error).__name__}: {_one_line(str(error), 150)})", by_method)
    if status == 401:  # without the endpoint's words: they quote the key
        return _Failure(status, "wants another API key than OPENAI_API_KEY holds (HTTP 401)")
    known = {403: "denies access", 404: "knows no such model or address", 429: "limits the rate or the quota"}
    what = known.get(status, "failed" if status >= 500 else "rejected the request")
    words = _one_line(_endpoint_words(error), 150)
    return _Failure(status, f"{what} (HTTP {status}: {words})", status in STEP_DOWN)


def _endpoint_words(error: Exception) -> str:
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else body
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
    if not text.strip():
        raise ValueError("The answer is empty.")
    if len(text) > READ_LIMIT:
        raise ValueError(f"The answer is longer than {READ_LIMIT:,} characters.")
    objects, broken = _find_objects(_drop_thinking(text))
    reasons = []
    for found in reversed(objects[-20:]):
        try:
            return _validate(found, schema)
        except ValueError as error:
            reasons.append(str(error))
    reasons = [f"The JSON is broken: {broken}."] if broken else reasons or ["There is no JSON object in the answer."]
    raise ValueError(_shorten(_clean(reasons[0]), REASON_LIMIT))


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
    return repr(_one_line(text[max(0, position - 20) : position + 20], 40))


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
        details: Any = error.errors(include_url=False)
    raise ValueError(_list_problems([_describe_problem(detail) for detail in details]))


def _non_finite(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Path and spelling of every NaN and infinity, without recursion."""
    stack: list[tuple[str, Any]] = [("", found)]
    while stack:
        path, value = stack.pop()
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        stack += [(f"{path}.{_one_line(str(key), 40)}".lstrip("."), item) for key, item in items]
        if isinstance(value, float) and not math.isfinite(value):
            yield _shorten(path, 100), json.dumps(value)


def _describe_problem(detail: dict[str, Any]) -> str:
    """One of pydantic's errors as `path: what is wrong`, with advice where a number looks like a percentage."""
    path = ".".join(_one_line(str(part), 40) for part in detail["loc"]) or "the answer"
    what = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"{path}: there is no such field; leave it out"
    if detail["type"] == "missing":
        return f"{path}: is missing"
    given = detail["input"]
    if isinstance(given, dict | list):
        return f"{path}: {what}"
    return f"{path}: {what}, not {_one_line(json.dumps(given, default=str), 40)}{_advise_fraction(detail)}"


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
    lines = [_one_line(problem, 200) for problem in problems[:PROBLEM_LIMIT]]
    more = len(problems) - len(lines)
    text = _shorten("\n".join(lines), REASON_LIMIT - 30)
    return f"{text}\nand {more:,} more" if more else text


# Text


def _clean(text: str) -> str:
    """Text that can be sent and stored: JSON may smuggle in halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _one_line(text: str, limit: int) -> str:
    return _shorten(" ".join(text[: 4 * limit].split()), limit)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
