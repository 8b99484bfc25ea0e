"""The requests of one call of a chat model: each is admitted before it is sent, and one that fails may be sent again.

Clients of providers repeat requests by themselves and tell nobody. They are told not to (`graph.llm.models`), so that
every request is seen here, by whoever keeps the account.
"""

import json
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from langchain_core.exceptions import ContextOverflowError, ModelConnectionError, ModelTimeoutError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage
from langchain_core.runnables import Runnable, RunnableBinding
from pydantic import BaseModel, Field, ValidationError

from tools.base.errors import UserError
from tools.base.progress import Stopped, heed_stop
from tools.base.secrets import redact
from tools.base.words import one_line


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


STEP_DOWN = frozenset({400, 422, 500, 501})
"""HTTP statuses that mean 'I do not know this method': llama.cpp says 500, FastAPI servers 422."""
TRIED_AGAIN = frozenset({408, 409, 429})
"""HTTP statuses below 500 that pass."""
LONGEST_WAIT = 120.0
"""Seconds that an endpoint may ask for; one that asks for more is not asked again."""
_UNREACHED = ("ConnectError", "ConnectTimeout", "PoolTimeout")
"""What HTTP libraries call it when a request never left."""

Paid = Literal["nothing", "prompt", "all"]


@dataclass
class Failure:
    """A request that got no reply."""

    status: int
    """The HTTP status, or 0."""
    text: str
    """What happened, to be read after the endpoint's name."""
    by_method: bool = False
    """Whether the method may be to blame, so that another is worth trying."""
    passing: bool = False
    """Whether the same request may be answered later."""
    wait: float | None = None
    """Seconds until then, where the endpoint says."""
    paid: Paid = "nothing"
    """What may have been spent: the prompt where a request that passes was read, and the longest answer as well where
    none came back, as it may have been written all the same."""


def describe_failure(error: Exception, model: BaseChatModel) -> Failure:
    """What happened, in words that follow the endpoint's name."""
    if isinstance(error, ContextOverflowError):
        return Failure(400, f"cannot take so long a prompt ({one_line(_endpoint_words(error), 150)})")
    if isinstance(error, ModelTimeoutError | ModelConnectionError):
        paid: Paid = "nothing" if _is_unreached(error) else "all"
        return Failure(0, _describe_silence(error, model), passing=True, paid=paid)
    status = _find_status(error)
    if not status:
        # Arguments of a tool call that are no object end in langchain's ValidationError, and the reply is lost.
        by_method = isinstance(error, ValidationError | NotImplementedError)  # the latter where it has no tools
        text = f"sent no chat completion ({type(error).__name__}: {one_line(str(error), 150)})"
        return Failure(0, text, by_method, paid="all")
    passing, wait = _judge_status(status, error)
    paid = "prompt" if passing else "nothing"
    if status == 401:  # without the endpoint's words: they quote the key
        keys = " or ".join(sorted({name for name in model.lc_secrets.values() if name.endswith("_API_KEY")}))
        wanted = getattr(model, "wanted_key", "") or f"another API key{f' than {keys} holds' if keys else ''}"
        return Failure(status, f"wants {wanted} (HTTP 401)")
    if 300 <= status < 400:
        moved = f"sends calls on to another address (HTTP {status}), which none is sent to; name that one"
        return Failure(status, moved)
    known = {403: "denies access", 404: "knows no such model or address", 429: "limits the rate or the quota"}
    what = known.get(status, "failed" if status >= 500 else "rejected the request")
    text = f"{what} (HTTP {status}: {one_line(_endpoint_words(error), 150)})"
    return Failure(status, text, status in STEP_DOWN, passing, wait, paid)


def _describe_silence(error: Exception, model: BaseChatModel) -> str:
    if isinstance(error, ModelConnectionError):
        return f"cannot be reached or hung up ({one_line(_root_cause(error), 150)})"
    timeout = getattr(model, "request_timeout", None)
    return f"gave no answer within {timeout} s" if timeout else "gave no answer in time"


def _find_status(error: Exception) -> int:
    for name in ("status_code", "code"):  # the latter in Google's errors
        status = getattr(error, name, 0)
        if isinstance(status, int) and not isinstance(status, bool) and status:
            return int(status)
    return 0


def _judge_status(status: int, error: Exception) -> tuple[bool, float | None]:
    """(whether the same request may be answered later, after how many seconds), as OpenAI's client judges it."""
    headers: Any = getattr(getattr(error, "response", None), "headers", None) or {}
    wait = None
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            wait = float(headers.get(name, "")) * unit
        except ValueError:  # none, or a date
            continue
        break
    wait = wait if wait is not None and wait >= 0 else None
    if (wait or 0.0) > LONGEST_WAIT:
        return False, None
    said = headers.get("x-should-retry")
    return said == "true" or (said != "false" and (status in TRIED_AGAIN or status >= 500)), wait


def _is_unreached(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in _UNREACHED:
            return True
        cause = cause.__cause__
    return False


def _endpoint_words(error: Exception) -> str:
    body = getattr(error, "body", str(error))
    body = body.get("error", body) if isinstance(body, dict) else body  # Anthropic's is one level further down
    said = body.get("message") or body.get("detail") if isinstance(body, dict) else body  # FastAPI's is the latter
    return str(said or "no reason given")


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


FIRST_WAIT, LONGEST_BACKOFF = 0.5, 8.0
"""Seconds before the first repetition, and before any later one, each twice as long as the one before; a quarter of it
at most is left off at random. As OpenAI's client has it."""
STEP = 0.1
"""Seconds between two looks at whether the run is to end."""


class Answer(NamedTuple):
    """A model's message, and our count of what it was sent for it."""

    message: AIMessage
    prompt: int


class Attempts:
    """The requests of one call."""

    def __init__(self, model: BaseChatModel, meter: Meter) -> None:
        self.count = 0
        self._model, self._meter, self._terms = model, meter, read_terms(model)

    def send(self, bound: Runnable[Any, Any], messages: list[AnyMessage], *, is_known: bool) -> Answer | Failure:
        """An answer by one method, or what went wrong the last time.

        Raises what `Meter.admit` raises, Stopped, and UserError where a prompt cannot be written as a file.

        What may only mean that the method is unknown is worth repeating only where it `is_known`.
        """
        prompt, tries = count_prompt(messages, bound), 0
        while True:
            self._meter.admit(prompt, self._terms.answer)
            self.count += 1
            reply = self._invoke(bound, messages)
            if isinstance(reply, AIMessage):
                return Answer(reply, prompt)
            if self._respell(reply):
                continue
            tries += 1
            passing = reply.passing and (is_known or reply.status not in STEP_DOWN)
            again = passing and tries <= self._terms.retries
            self._keep(reply, prompt, again)
            if not again:
                return reply
            _wait(reply.wait, tries)

    def _invoke(self, bound: Runnable[Any, Any], messages: list[AnyMessage]) -> AIMessage | Failure:
        with warnings.catch_warnings():
            # It advises on its own `with_structured_output` when an endpoint refuses json_schema.
            warnings.filterwarnings("ignore", module="langchain_openai")
            try:
                reply = bound.invoke(messages)
            except (Stopped, UserError):  # of answers that come in files
                raise
            except Exception as error:  # any kind: langchain raises even TypeError over what endpoints send
                # Not raised from here: a chained exception would carry the endpoint's text, key and all.
                return describe_failure(error, self._model)
        if not isinstance(reply, AIMessage):
            return Failure(0, "answers in the role of someone else than the assistant", paid="all")
        return reply

    def _respell(self, failure: Failure) -> bool:
        """Whether the endpoint only wants the bound on its answer called otherwise, which it is from now on."""
        respell = getattr(self._model, "respell_bound", None)
        return failure.status in (400, 422) and respell is not None and bool(respell(failure.text))

    def _keep(self, failure: Failure, prompt: int, again: bool) -> None:
        if failure.paid == "nothing" and not again:
            return
        self._meter.keep_failure(
            FailedRequest(
                problem=redact(failure.text),
                again=again,
                input_tokens=0 if failure.paid == "nothing" else prompt,
                output_tokens=self._terms.answer if failure.paid == "all" else 0,
            )
        )


def _wait(asked: float | None, tries: int) -> None:
    """Wait before the next try, as long as the endpoint asks for or ever longer. Raises Stopped."""
    backoff = min(LONGEST_BACKOFF, FIRST_WAIT * 2 ** (tries - 1)) * (1 - random.random() / 4)
    end = time.monotonic() + (backoff if asked is None else asked)
    while (left := end - time.monotonic()) > 0:
        heed_stop()
        time.sleep(min(STEP, left))
