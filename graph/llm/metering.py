"""Tokens of requests, by the count of Billhook where no endpoint tells its own; and whoever keeps the account of them.

A model's tokenizer is not at hand, so a token is counted for every digit and for every two other bytes of UTF-8. That
is on the safe side: beside SmolLM2's tokenizer, which takes every digit for a token, it is 1.25 times as many for a
planner's prompt with 400 rows of figures, and 2.1 times for its instructions alone.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage
from langchain_core.runnables import Runnable, RunnableBinding
from pydantic import BaseModel, Field


def count_tokens(text: str) -> int:
    """Our count of a text's tokens: one for every digit, and one for every two other bytes."""
    size, digits = len(text.encode("utf-8", "replace")), sum(character.isdigit() for character in text)
    return (size + digits + 1) // 2


def count_prompt(messages: Sequence[AnyMessage], bound: Runnable[Any, Any]) -> int:
    """Our count of what a request sends: the messages, and the schemas and tools that the model is bound to."""
    said = [[message.type, message.content, getattr(message, "tool_calls", [])] for message in messages]
    options = bound.kwargs if isinstance(bound, RunnableBinding) else {}
    return count_tokens(json.dumps([said, options], ensure_ascii=False, default=str))


def count_answer(message: AIMessage) -> int:
    """Our count of what is seen of an answer; thoughts that an endpoint keeps to itself are not in it."""
    calls = [[call["name"], call["args"]] for call in (*message.tool_calls, *message.invalid_tool_calls)]
    try:
        called = json.dumps(calls, ensure_ascii=False, default=str) if calls else ""
    except RecursionError:
        called = ""
    return count_tokens(str(message.text) + called)


class Terms(NamedTuple):
    """How a model is asked."""

    retries: int
    """Times that a request is tried again which may be answered later."""
    answer: int
    """Tokens that an answer may have."""


def describe_terms(retries: int, answer: int) -> dict[str, int]:
    """Terms as the metadata of a model, where `read_terms` finds them."""
    return Terms(retries, answer)._asdict()


def read_terms(model: BaseChatModel) -> Terms:
    """The terms that `graph.llm.models` opened a model on."""
    known = model.metadata or {}
    return Terms(known.get("retries", 0), known.get("answer", 0))


class FailedRequest(BaseModel):
    """A request without a usable answer."""

    problem: str = Field(description="What happened, without secrets.")
    again: bool = Field(description="Whether it is tried again, or in another way.")
    input_tokens: int = Field(description="By our count; 0 where nothing was read.")
    output_tokens: int = Field(description="The longest answer allowed, where it may have been written; else 0.")


class Meter(Protocol):
    """Who keeps the account of a conversation's requests."""

    def admit(self, prompt: int, answer: int) -> None:
        """Before a request, of so many tokens, to which the answer may have so many. Raises AgentError to stop it."""

    def keep_failure(self, failed: FailedRequest) -> None:
        """After a request that brought no answer."""


class _NoMeter:
    def admit(self, prompt: int, answer: int) -> None:
        pass

    def keep_failure(self, failed: FailedRequest) -> None:
        pass


UNMETERED: Meter = _NoMeter()
"""Nobody keeps it."""
