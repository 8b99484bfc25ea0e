"""What the agents of a run say and spend, and the caps on it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage
from pydantic import BaseModel

from graph.config import RunConfig
from graph.llm.ask import CallRecord, Reply
from graph.llm.ladder import AgentError, DeadEnd
from graph.runs.session import Session
from graph.runs.tasks import do_once
from tools.base.rundir import scan_events
from tools.results.schema import Usage

Agent = Literal["planner", "reflector"]
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
        self.usage = usage
        self._agent, self._session, self._config, self._caps = agent, session, config, caps
        self._model = config.planner if agent == "planner" else config.reflector
        self._iteration = iteration

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
            spent = read_spent(self._session.directory, self.usage)
            check_cap(spent, self._caps)
            reply = call()
            return Paid(reply=reply, usage=add_calls(spent, [reply], self._config, self._agent))

        paid = do_once("reply", pay, Paid)
        self.usage = paid.usage
        return paid.reply

    def keep_call(self, call: CallRecord) -> None:
        """Log a reply and what is spent. Raises CapReached when another call would follow, and may not."""
        whose = {"agent": self._agent, "iteration": self._iteration}
        said = call.model_dump(include=set(CallRecord.model_fields))
        self._session.emit("reply", planner=self._model, **whose, **said)
        self._session.emit("usage", **whose, **self.usage.model_dump())
        if call.problem or call.tools:
            check_cap(self.usage, self._caps)

    def converse(self, ask: Callable[[], T]) -> T:
        """What a conversation brings; another one, where an earlier one led nowhere and the run was resumed since.

        Raises AgentError, and CapReached as `carry_out` does.
        """
        while True:
            try:
                return ask()
            except DeadEnd as error:
                if self._config.planner_fallback != "none" or self._is_first(str(error)):
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
    return logged if logged.calls > usage.calls else usage


def add_calls(usage: Usage, calls: Sequence[CallRecord], config: RunConfig, agent: Agent) -> Usage:
    """Tokens and dollars after these calls, at the agent's prices."""
    sent = sum(call.input_tokens for call in calls)
    written = sum(call.output_tokens for call in calls)
    if agent == "planner":
        cost = sent * config.planner_price_input + written * config.planner_price_output
    else:
        cost = sent * config.reflector_price_input + written * config.reflector_price_output
    return Usage(
        calls=usage.calls + len(calls),
        input_tokens=usage.input_tokens + sent,
        output_tokens=usage.output_tokens + written,
        cost=usage.cost + cost / 1e6,
    )


def check_cap(usage: Usage, config: RunConfig) -> None:
    """Before a call: raises CapReached when as much has been spent as the config allows.

    The config is the present one, the runtime's context: a run that was stopped here goes on with a higher cap.
    """
    tokens, cap = usage.input_tokens + usage.output_tokens, config.max_agent_tokens
    if cap and tokens >= cap:
        raise CapReached(
            f"the agents have spent {tokens:,} tokens, and max_agent_tokens is {cap:,}; "
            "go on with --resume NAME --max-agent-tokens N, where 0 is no cap"
        )
    if config.max_agent_cost and usage.cost >= config.max_agent_cost:
        raise CapReached(
            f"the agents have spent ${usage.cost:.4g}, and max_agent_cost is ${config.max_agent_cost:.4g}; "
            "go on with --resume NAME --max-agent-cost N, where 0 is no cap"
        )
