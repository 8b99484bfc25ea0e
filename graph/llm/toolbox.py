"""The tools that a model may call before it answers, within a budget of calls and seconds."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, Field, ValidationError

from graph.llm.quoting import data_block, quote_data
from tools.base.errors import UserError
from tools.base.words import round_seconds

Result = TypeVar("Result")

RESULT_LIMIT = 6_000
"""Characters of one tool's answer."""
ARGUMENTS_LIMIT = 2_000
"""Characters of its arguments that are recorded."""


@dataclass(frozen=True)
class ToolCall:
    """A tool that a model asks for, as it says it: neither name nor arguments are to be trusted."""

    name: str
    arguments: Any


class ToolRecord(BaseModel):
    """One call of a tool."""

    tool: str = Field(description="As the model named it.")
    arguments: str = Field(description=f"In JSON; at most {ARGUMENTS_LIMIT} characters.")
    answer: str = Field(description=f"What the model was told; at most {RESULT_LIMIT} characters.")
    shown: str = Field(description="What came of it, in a few words for people.")
    seconds: float
    calls_left: int
    seconds_left: float


class ToolAnswer(BaseModel):
    """What came of one call of a tool."""

    answer: str = Field(description=f"For the model; at most {RESULT_LIMIT} characters.")
    shown: str = Field(description="The same in a few words for people.")
    seconds: float


Offer = Callable[[], AbstractContextManager[Sequence[BaseTool]]]
"""Brings the tools, the same ones each time."""


def do_now(work: Callable[[], Result]) -> Result:
    """What a piece of work gives, where nothing is kept of it."""
    return work()


class Toolbox:
    """Tools and what is left of their budget. They run one after another.

    They are had by `offer`, for as long as one runs. `carry_out` runs one, or has its answer from where that was kept;
    `on_tool` hears of every answer. `prices` are words for what calls take, the same for all of them, and `list_left`
    names what is left beside calls and seconds. What a model answers with may be an argument, too, and then have fields
    `beside` its own, by their JSON schemas.
    """

    def __init__(
        self,
        offer: Offer,
        *,
        calls: int,
        seconds: float,
        on_tool: Callable[[ToolRecord], None] | None = None,
        carry_out: Callable[[Callable[[], ToolAnswer]], ToolAnswer] = do_now,
        prices: str = "",
        list_left: Callable[[], Mapping[str, float]] = dict,
        beside: Mapping[str, Any] | None = None,
    ) -> None:
        with offer() as tools:
            self.names = [tool.name for tool in tools]
            self.functions = [convert_to_openai_tool(tool) for tool in tools]
        self.prices, self.beside = prices, beside or {}
        self._offer, self._list_left = offer, list_left
        self.calls_left, self.seconds_left = calls, seconds
        self._on_tool, self._carry_out = on_tool, carry_out
        self._began: float | None = None

    @property
    def spent(self) -> bool:
        """Whether no call can be made any more."""
        return self.calls_left <= 0 or self.seconds_left <= 0

    @property
    def time_left(self) -> float:
        """Seconds that are left, less those of the call in hand; below 0 once it has taken more."""
        return self.seconds_left - (time.monotonic() - self._began if self._began is not None else 0.0)

    def describe_budget(self) -> str:
        """What is left, for the model."""
        if self.spent:
            what = "calls" if self.calls_left <= 0 else "seconds"
            return f"No {what} of tools are left in this round: give the plan now."
        left = {"calls_left": self.calls_left, "seconds_left": round_seconds(self.seconds_left), **self._list_left()}
        return ", ".join(f'"{name}": {amount:.0f}' for name, amount in left.items())

    def run(self, call: ToolCall, explain: Callable[[ValidationError], str]) -> str:
        """Run one tool; its answer as the model is to read it, which may be that the tool cannot be had.

        `explain` says what is wrong with arguments that do not fit the tool's schema.
        """
        if self.spent:
            return self.describe_budget()
        done = self._carry_out(lambda: self._answer(call, explain))
        self.calls_left -= 1
        self.seconds_left = max(0.0, self.seconds_left - done.seconds)
        if self._on_tool:
            self._on_tool(
                ToolRecord(
                    tool=quote_data(call.name, 80),
                    arguments=quote_data(dump(call.arguments), ARGUMENTS_LIMIT),
                    answer=done.answer,
                    shown=done.shown,
                    seconds=round(done.seconds, 3),
                    calls_left=self.calls_left,
                    seconds_left=round(self.seconds_left, 3),
                )
            )
        return f"{data_block(f'tool {quote_data(call.name, 40)}', [done.answer])}\n{self.describe_budget()}"

    def _answer(self, call: ToolCall, explain: Callable[[ValidationError], str]) -> ToolAnswer:
        with self._offer() as tools:
            began = self._began = time.monotonic()
            try:
                answer, shown = self._try({tool.name: tool for tool in tools}, call, explain)
            finally:
                self._began = None
            seconds = time.monotonic() - began
        return ToolAnswer(answer=quote_data(answer, RESULT_LIMIT), shown=quote_data(shown, 200), seconds=seconds)

    def _try(
        self, tools: Mapping[str, BaseTool], call: ToolCall, explain: Callable[[ValidationError], str]
    ) -> tuple[str, str]:
        """(answer in JSON, the same for people)."""
        try:
            if call.name not in tools:
                raise ValueError(f"there is no such tool; there are: {', '.join(tools)}")
            if not isinstance(call.arguments, dict):
                raise ValueError("the arguments are no JSON object")
            request = {"type": "tool_call", "id": "call", "name": call.name, "args": call.arguments}
            message = tools[call.name].invoke(request)
            return message.text, str(message.artifact)
        except UserError:  # a full disk, say: nothing that the model could do better
            raise
        except ValidationError as error:
            problem = explain(error)
        except ValueError as error:  # ImpossiblePlan among them: what the model asked for cannot be
            problem = str(error)
        except RecursionError:
            problem = "the arguments are nested too deeply"
        return json.dumps({"error": problem}, ensure_ascii=False), problem


def dump(arguments: Any) -> str:
    """A tool's arguments in JSON."""
    try:
        return json.dumps(arguments, ensure_ascii=False)
    except RecursionError:
        return "(nested too deeply)"
