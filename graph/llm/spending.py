"""What the agents of a run say and spend, and the caps on it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage
from pydantic import BaseModel

from graph.checks import check_prices
from graph.config import Agent, RunConfig
from graph.llm.ask import CallRecord, Reply
from graph.llm.attempts import FailedRequest
from graph.llm.ladder import AgentError, DeadEnd
from graph.runs.session import Session, do_once
from tools.base.rundir import scan_events
from tools.results.schema import Usage

T = TypeVar("T")


class CapReached(AgentError):
    """The agents may spend no more; no fallback makes up for it."""


class Prompt(BaseModel):
    """The first messages of a conversation."""

    instructions: str
    question: str


class Paid(BaseModel):
    """A reply, and what all agents have spent with it."""

    reply: Reply
    usage: Usage


class GivenUp(BaseModel):
    """A conversation that led nowhere."""

    problem: str


class Account:
    """The calls of one agent in one round: done once each, logged, counted, and held to the caps."""

    def __init__(
        self, agent: Agent, session: Session, usage: Usage, config: RunConfig, caps: RunConfig, iteration: int
    ) -> None:
        """Raises UserError where there is a cap on a cost that nobody can reckon."""
        self.usage = usage
        self._agent, self._session, self._config, self._caps = agent, session, config, caps
        self._model = config.planner if agent == "planner" else config.reflector
        self._iteration = iteration
        check_prices(config.model_copy(update={"max_agent_cost": caps.max_agent_cost}))

    def keep_prompt(self, make: Callable[[], Sequence[AnyMessage]]) -> list[AnyMessage]:
        """What the agent is asked, logged: what was kept of it, or else what `make` gives."""

        def write() -> Prompt:
            instructions, question = make()
            return Prompt(instructions=instructions.text, question=question.text)

        kept = do_once("prompt", write, Prompt)
        messages: list[AnyMessage] = [SystemMessage(kept.instructions), HumanMessage(kept.question)]
        prompt = [{"role": message.type, "text": message.text} for message in messages]
        self._session.record("prompt", **{self._agent: self._model}, iteration=self._iteration, messages=prompt)
        return messages

    def carry_out(self, call: Callable[[], Reply]) -> Reply:
        """Do a call and count it, or have what was kept of it, which counts once. Raises CapReached."""

        def pay() -> Paid:
            self.usage = read_spent(self._session.directory, self.usage)
            reply = call()  # in which `admit` and `keep_failure` are called
            return Paid(reply=reply, usage=add_calls(self.usage, [reply], self._config, self._agent))

        paid = do_once("reply", pay, Paid)
        self.usage = paid.usage
        return paid.reply

    def admit(self, prompt: int, answer: int) -> None:
        """Before a request of that many tokens, and an answer of as many at most. Raises CapReached."""
        check_cap(self.usage, _add(self.usage, prompt, answer, 0, self._config, self._agent), self._caps)

    def keep_failure(self, failed: FailedRequest) -> None:
        """Log a request that brought no answer, and count what it may have cost."""
        whose = {"agent": self._agent, "iteration": self._iteration}
        self.usage = add_failure(self.usage, failed, self._config, self._agent)
        self._session.emit("request", planner=self._model, **whose, **failed.model_dump())
        self._session.emit("usage", **whose, **self.usage.model_dump())

    def keep_call(self, call: CallRecord) -> None:
        """Log a reply and what is spent."""
        whose = {"agent": self._agent, "iteration": self._iteration}
        said = call.model_dump(include=set(CallRecord.model_fields))
        self._session.emit("reply", planner=self._model, **whose, **said)
        self._session.emit("usage", **whose, **self.usage.model_dump())

    def converse(self, ask: Callable[[], T]) -> T:
        """What a conversation brings; another one, where an earlier one led nowhere and the run was resumed since.

        Raises AgentError, and CapReached as `carry_out` does.
        """
        while True:
            try:
                return ask()
            except DeadEnd as error:
                stands_in = self._config.planner_fallback != "none" or self._config.planner_unaided
                if stands_in or self._is_first(str(error)):
                    raise

    def _is_first(self, problem: str) -> bool:
        """Whether it has not come to this before."""
        known = True

        def give_up() -> GivenUp:
            nonlocal known
            known = False
            return GivenUp(problem=problem)

        do_once("give_up", give_up, GivenUp)
        return not known


def read_spent(directory: Path, usage: Usage) -> Usage:
    """What the run in `directory` has spent: `usage`, or what its log says where that is more.

    A node that failed has paid for calls that nothing was kept of.
    """
    events = scan_events(directory, "usage")
    logged = Usage.model_validate(events[-1][1]) if events else usage
    return logged if _count_requests(logged) > _count_requests(usage) else usage


def _count_requests(usage: Usage) -> int:
    return usage.calls + usage.failed_requests


def add_calls(usage: Usage, calls: Sequence[CallRecord], config: RunConfig, agent: Agent) -> Usage:
    """What is spent after these calls, at the agent's prices."""
    for call in calls:
        usage = _add(usage, call.input_tokens, call.output_tokens, call.own_count, config, agent)
    return usage.model_copy(update={"calls": usage.calls + len(calls)})


def add_failure(usage: Usage, failed: FailedRequest, config: RunConfig, agent: Agent) -> Usage:
    """What is spent after a request that brought nothing, at the agent's prices."""
    own = failed.input_tokens + failed.output_tokens
    usage = _add(usage, failed.input_tokens, failed.output_tokens, own, config, agent)
    return usage.model_copy(update={"failed_requests": usage.failed_requests + 1})


def _add(usage: Usage, sent: int, written: int, own: int, config: RunConfig, agent: Agent) -> Usage:
    price_sent, price_written = config.find_prices(agent)
    more = {
        "input_tokens": usage.input_tokens + sent,
        "output_tokens": usage.output_tokens + written,
        "own_count": usage.own_count + own,
        "cost": usage.cost + (sent * price_sent + written * price_written) / 1e6,
    }
    return usage.model_copy(update=more)


def check_cap(usage: Usage, most: Usage, config: RunConfig) -> None:
    """Before a request: raises CapReached when the config allows no more, or less than that request may take.

    `most` is what will then have been spent at most, in all. The config is the present one, the runtime's context: a
    run that was stopped here goes on with a higher cap.
    """
    sent, written = most.input_tokens - usage.input_tokens, most.output_tokens - usage.output_tokens
    tokens, cap = usage.input_tokens + usage.output_tokens, config.max_agent_tokens
    if cap and (tokens >= cap or tokens + sent + written > cap):
        ahead = f"; a request may take {sent:,} more (our count) and its answer {written:,}" if tokens < cap else ""
        raise CapReached(
            f"the agents have spent {tokens:,} tokens, and max_agent_tokens is {cap:,}{ahead}; "
            "go on with --resume NAME --max-agent-tokens N, where 0 is no cap"
        )
    if config.max_agent_cost and (usage.cost >= config.max_agent_cost or most.cost > config.max_agent_cost):
        left = usage.cost < config.max_agent_cost
        ahead = f"; a request and its answer may take ${most.cost - usage.cost:.4g} more" if left else ""
        raise CapReached(
            f"the agents have spent ${usage.cost:.4g}, and max_agent_cost is ${config.max_agent_cost:.4g}{ahead}; "
            "go on with --resume NAME --max-agent-cost N, where 0 is no cap"
        )
