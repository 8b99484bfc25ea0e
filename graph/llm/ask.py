"""Ask a chat model for one answer that fits a schema, whatever its endpoint can and cannot do.

The ladder (`ladder.py`) finds how the endpoint is held to the schema; what comes back is read as text from outside
(`answers.py`) and handed back with the reason when it does not fit. A model may be given tools to call before it
answers (`toolbox.py`); where an endpoint knows no tools, it asks for them in words.

A conversation can be held again after a kill: it is made of its first messages, replies and answers of tools, each of
which may be had from where it was kept.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage
from pydantic import BaseModel, Field

from graph.llm.answers import READ_LIMIT, REASON_LIMIT, T, clean, drop_thinking, explain, find_prose, parse_reply
from graph.llm.attempts import UNMETERED, Meter, count_answer
from graph.llm.ladder import (
    ANSWER_LIMIT,
    DeadEnd,
    Exchange,
    Method,
    Rejected,
    in_words,
    name_model,
    remember_rung,
    send,
)
from graph.llm.quoting import quote_data
from graph.llm.toolbox import Toolbox, ToolCall, do_now, dump
from tools.base.secrets import redact
from tools.base.words import count, one_line, shorten

WORDS_LIMIT = 2_000
"""Characters of what a model said and thought beside calls of tools that stay in the conversation: the last ones."""


class CallRecord(BaseModel):
    """One reply of a chat model, used or not."""

    method: Method = Field(description="The method that held the reply to the schema.")
    reply: str = Field(description=f"What the model said; at most {ANSWER_LIMIT} characters.")
    input_tokens: int = Field(description="As the endpoint counts them, or as Billhook does where it does not say.")
    output_tokens: int = Field(description="Likewise; of thoughts that are not shown Billhook's count knows nothing.")
    own_count: int = Field(0, description="Of these tokens, those that Billhook counted.")
    problem: str = Field("", description="Why the reply was not used; empty when it was.")
    tools: int = Field(0, description="Tools that it asks for, in place of an answer.")
    seconds: float = Field(description="Wall-clock time of the call, waits and repeats included.")


class Reply(CallRecord):
    """A reply as far as the conversation goes on with it."""

    text: str = Field(description="What the model said, without secrets.")
    words: str = Field("", description="What it said and thought beside calls of tools: it stays in the round.")
    refusal: str = Field("", description="Why it declines to answer; empty when it does not.")
    advised: bool = Field(False, description="Whether the problem is advice, which is given once.")


KeepPrompt = Callable[[Callable[[], list[AnyMessage]]], list[AnyMessage]]
"""Makes a conversation's first messages, or has them from where they were kept."""


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
    carry_out: Callable[[Callable[[], Reply]], Reply] = do_now,
    meter: Meter = UNMETERED,
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

    The `meter` admits every request before it is sent, and hears of each that brought no answer.
    `carry_out` does a call of the model, in which its reply is judged too, or has the reply from where it was kept.

    Raises AgentError when the endpoint cannot be used, and DeadEnd when it refuses, or gave no answer that fits.
    """
    conversation: list[AnyMessage | Exchange] = list(messages)
    reason, left = "", hand_backs + 1
    while left:
        advice = advise if left > 1 else None
        try:
            reply = carry_out(partial(_call, model, schema, conversation, check, advice, toolbox, meter))
        except Rejected as error:
            if len(conversation) > len(messages):
                raise DeadEnd(str(error)) from None
            raise
        remember_rung(model, conversation, toolbox, reply.method)
        if on_call is not None:
            on_call(reply)
        reason = reply.problem
        if reply.refusal:
            raise DeadEnd(f"{name_model(model)} refused to answer: {reply.refusal}")
        said = None if reason else parse_reply(reply.text, schema, tools=toolbox is not None)
        if isinstance(said, list):
            assert toolbox is not None, "calls are heard only where there are tools"
            conversation.append(Exchange(said, [toolbox.run(call, explain) for call in said], reply.words))
            continue
        if said is not None:
            return said
        advise = None if reply.advised else advise
        left -= 1
        conversation += _hand_back(reply.text, reason)
    problem = one_line(reason.replace("\n", "; "), 300)
    answers = count(hand_backs + 1, "answer")
    again = getattr(model, "again", "")  # of one whose answers lie in files
    raise DeadEnd(f"{name_model(model)} gave no usable {schema.__name__} in {answers}; the last one: {problem}{again}")


def _call(
    model: BaseChatModel,
    schema: type[T],
    conversation: Sequence[AnyMessage | Exchange],
    check: Callable[[T], None] | None,
    advise: Callable[[T], str] | None,
    toolbox: Toolbox | None,
    meter: Meter,
) -> Reply:
    """One reply, read and judged."""
    start = time.perf_counter()
    method, message, prompt = send(model, schema, conversation, toolbox, meter)
    said = _reply_text(message, schema) if toolbox else _first_text(message)
    text = redact(clean(said[: READ_LIMIT + 1]))
    answer, calls, problem = _read_reply(message, text, schema, check, toolbox)
    advised = bool(answer is not None and advise and (problem := advise(answer)))
    usage: Any = message.usage_metadata or {}
    sent, written = _whole(usage.get("input_tokens")), _whole(usage.get("output_tokens"))
    our_sent, our_written = (0 if sent else prompt), (0 if written else count_answer(message))
    return Reply(
        method=method,
        reply=shorten(text, ANSWER_LIMIT),
        input_tokens=sent or our_sent,
        output_tokens=written or our_written,
        own_count=our_sent + our_written,
        problem=problem,
        tools=len(calls),
        seconds=time.perf_counter() - start,
        text=text,
        words=_own_words(message) if calls else "",
        refusal=_refusal(message),
        advised=advised,
    )


def _read_reply(
    message: AIMessage, text: str, schema: type[T], check: Callable[[T], None] | None, toolbox: Toolbox | None
) -> tuple[T | None, list[ToolCall], str]:
    """The answer in a reply; or None and the tools it asks for, or what is wrong with it."""
    if refusal := _refusal(message):
        return None, [], f"refused: {refusal}"
    if _is_truncated(message):
        reason = "The answer was cut off at the length limit. Give a shorter one: fewer adjustments, short reasons."
        return None, [], reason
    try:
        answer = parse_reply(text, schema, tools=toolbox is not None)
        if not isinstance(answer, list):
            if check is not None:
                check(answer)
            return answer, [], ""
    except ValueError as error:
        return None, [], shorten(redact(clean(str(error))), REASON_LIMIT)
    assert toolbox is not None, "calls are heard only where there are tools"
    return (None, [], toolbox.describe_budget()) if toolbox.spent else (None, answer, "")


def _hand_back(text: str, reason: str) -> list[AnyMessage]:
    # The reason may quote a layer's name, or the answer itself.
    reason = "\n".join(quote_data(line, REASON_LIMIT) for line in reason.split("\n"))
    return [
        AIMessage(shorten(drop_thinking(text), ANSWER_LIMIT) or "(empty answer)"),
        HumanMessage(
            f"That answer cannot be used:\n{reason}\n"
            "Answer again with one JSON object that fits the schema, and nothing else."
        ),
    ]


# A reply as the endpoint sent it


def _whole(value: object) -> int:
    """A token count as endpoints send it, which may be anything."""
    return value if isinstance(value, int) and value > 0 else 0


def _reply_text(message: AIMessage, schema: type[BaseModel]) -> str:
    """What the model said: its calls of functions in words, a line each, or else its text."""
    calls: list[str] = []
    for call in message.tool_calls:
        given = dump(call["args"])
        calls.append(given if call["name"] == schema.__name__ else in_words(call["name"], given))
    for broken in message.invalid_tool_calls:  # its arguments are no JSON object, and go as the text that they are
        name, given = broken["name"] or "", broken["args"] or ""
        calls.append(given if name == schema.__name__ else in_words(name, json.dumps(given)))
    return "\n".join(calls) if calls else str(message.text)


def _own_words(message: AIMessage) -> str:
    """The end of what the model thought, where it is shown, and said before it called tools; without secrets."""
    blocks = message.content if isinstance(message.content, list) else []
    thoughts = [message.additional_kwargs.get("reasoning_content"), *map(_read_thought, blocks)]
    said = re.sub(r"</?think(?:ing)?>", "\n", find_prose(str(message.text)))
    words = "\n".join(part.strip() for part in [*thoughts, said] if isinstance(part, str) and part.strip())
    words = redact(clean(words[-READ_LIMIT:]))
    return words if len(words) <= WORDS_LIMIT else f"…{words[-WORDS_LIMIT:]}"


def _read_thought(block: Any) -> str:
    """The text of a block of thoughts, as Anthropic and others send it; empty of any other."""
    if not isinstance(block, dict) or block.get("type") not in ("thinking", "reasoning"):
        return ""
    return next((block[key] for key in ("thinking", "reasoning") if isinstance(block.get(key), str)), "")


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
    """Why the model declines to answer, in a line; empty when it does not."""
    if refusal := message.additional_kwargs.get("refusal"):
        return one_line(redact(clean(str(refusal))), 300)
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
