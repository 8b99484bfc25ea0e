"""What the agents of a run say and spend, and the caps on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from langchain_core.messages import AnyMessage

from graph.config import RunConfig
from graph.llm.ask import CallRecord
from graph.llm.ladder import AgentError
from graph.runs.session import Session
from tools.base.rundir import scan_events
from tools.results.schema import Usage

Agent = Literal["planner", "reflector"]


class CapReached(AgentError):
    """The agents may spend no more; no fallback makes up for it."""


class Account:
    """The calls of one agent in one round: they go into the run's log, are counted, and are held to the caps."""

    def __init__(
        self, agent: Agent, session: Session, usage: Usage, config: RunConfig, caps: RunConfig, iteration: int
    ) -> None:
        """Raises CapReached when no call may be made at all."""
        self.usage = read_spent(session.directory, usage)
        self._agent, self._session, self._config, self._caps = agent, session, config, caps
        self._model = config.planner if agent == "planner" else config.reflector
        self._iteration = iteration
        check_cap(self.usage, caps)

    def keep_prompt(self, messages: Sequence[AnyMessage]) -> None:
        """Log what the agent is asked."""
        prompt = [{"role": message.type, "text": message.text} for message in messages]
        self._session.record("prompt", **{self._agent: self._model}, iteration=self._iteration, messages=prompt)

    def keep_call(self, call: CallRecord) -> None:
        """Log and count a reply. Raises CapReached when another call would follow, and may not."""
        whose = {"agent": self._agent, "iteration": self._iteration}
        self._session.emit("reply", planner=self._model, **whose, **call.model_dump())
        self.usage = add_calls(self.usage, [call], self._config, self._agent)
        self._session.emit("usage", **whose, **self.usage.model_dump())
        if call.problem or call.tools:
            check_cap(self.usage, self._caps)


def read_spent(directory: Path, usage: Usage) -> Usage:
    """What the run in `directory` has spent: `usage`, or what its log says where that is more.

    A node that a failure or a kill ended has paid for its calls, but left nothing in the state.
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
