"""The requests of one call of a chat model: each is admitted before it is sent, and one that fails may be sent again.

Clients of providers repeat requests by themselves and tell nobody. They are told not to (`graph.llm.models`), so that
every request is seen here, by whoever keeps the account.
"""

import random
import time
import warnings
from typing import Any, NamedTuple

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AnyMessage
from langchain_core.runnables import Runnable

from graph.llm.failures import STEP_DOWN, Failure, describe_failure
from graph.llm.metering import FailedRequest, Meter, count_prompt, read_terms
from tools.base.errors import UserError
from tools.base.progress import Stopped, heed_stop
from tools.base.secrets import redact

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
