"""Every option of a run in one pydantic model."""

import re
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator
from pydantic.config import JsonDict

from tools.base.errors import ImpossiblePlan
from tools.base.named import path_of, read_weights
from tools.base.options import READS_FILES, check_options, read_options
from tools.base.settings import (
    NO_STREAMED_POLISH,
    TEAM,
    CutSettings,
    PolishSettings,
    TaskSettings,
    TeamSettings,
    count_checkpoints,
)
from tools.plans.costs import count_polish
from tools.plans.pattern import parse_pattern

HEURISTIC = "heuristic"
"""The planner and the reflector that are a rule, and no model."""
MODEL_FORM = r"^(heuristic|[a-z][a-z0-9_]*:\S(.*\S)?)$"
MODEL_WORDS = (
    "write heuristic, openai:NAME, openai:NAME@http://HOST:PORT/v1, local:MODEL, exchange:DIR or PROVIDER:NAME"
)
Agent = Literal["planner", "reflector"]
PRICES = ("planner_price_input", "planner_price_output", "reflector_price_input", "reflector_price_output")
CHANGEABLE = (
    *("max_agent_tokens", "max_agent_cost", "memory", *PRICES, *TEAM),
    *("agent_timeout", "agent_retries", "planner_fallback"),
)
"""Fields that may change while a run goes on: they have no part in what a plan prunes, and mend what ends a run."""

NOT_OF_CUTS = {
    "pattern": "is of zeros",
    "polish_tokens": "fits the survivors of zeros",
    "protect": "names layers that are never touched, while all blocks get the same widths",
    "goal_tokens": "is of texts that plans mix",
    "check_weights": "sets zeros by other weights of texts",
    "reprofile": "profiles for zeros",
}
"""Fields that a run with target_size has no use for, and why."""

PLANNER = (
    "heuristic (no key, deterministic), openai:NAME, openai:NAME@http://HOST:PORT/v1 for a compatible endpoint, "
    "local:MODEL for a model in this process (MODEL as in --model), exchange:DIR for whoever answers the files that "
    "prompts become there, or PROVIDER:NAME for a provider of LangChain's"
)
PROMPTS = {"planner_prompt": ("planner", ("{tools}", "{schema}")), "reflector_prompt": ("reflector", ("{schema}",))}
"""Field to the name of Billhook's own prompt, and what any other must have a place for."""


@cache
def read_prompt(name: str) -> str:
    """The text of `graph/prompts/NAME.md`, as it was when it was first asked for."""
    return Path(__file__).with_name("prompts").joinpath(f"{name}.md").read_text(encoding="utf-8")


def _edit_in_studio(name: str, node: str) -> JsonDict:
    """What makes Studio show the field as a prompt, to edit where its node is, beginning with Billhook's own."""
    return {"langgraph_nodes": [node], "langgraph_type": "prompt", "default": read_prompt(name)}


class TargetSettings(BaseModel):
    """How far the model is pruned, and each layer at most."""

    target_sparsity: float = Field(
        0.45, gt=0, lt=1, description="Share of the prunable weights that are zero at the end, as a fraction."
    )
    max_layer_sparsity: float = Field(
        0.9, gt=0, le=1, description="No layer is pruned further than this, whatever a plan says."
    )

    @field_validator("target_sparsity", "max_layer_sparsity", mode="before")
    @classmethod
    def _refuse_percent(cls, value: Any) -> Any:
        try:
            percent = float(value) > 1
        except (TypeError, ValueError):
            return value
        if percent:
            raise ValueError(f"{value} looks like a percentage; write it as a fraction, such as {float(value) / 100:g}")
        return value


class RunConfig(TargetSettings, TaskSettings, PolishSettings, CutSettings, TeamSettings):
    """Every option of a run: what is pruned, how far, judged by what, planned by whom."""

    target_size: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="In place of target_sparsity: share of the model's bytes that is to stay, such as "
        "0.8, embeddings and head counted. Whole neurons, groups of attention heads and blocks go, and what comes out "
        "is a smaller model of stock shapes; 0: none go.",
    )
    pattern: str = Field(
        "",
        description="N:M, such as 2:4: N zeros in every M consecutive inputs of every layer that is not protected. The "
        "target is then what that comes to (N/M where nothing is protected); empty for zeros anywhere.",
    )
    goal: str = Field(
        "",
        max_length=2000,
        description="What the model is for, in words, such as 'Python and SQL must stay as they are; French may go'. "
        "The planner makes of it what each named text counts and may lose; the rule, which reads no words, weighs them "
        "as text_weights say, or all alike.",
        json_schema_extra={"langgraph_nodes": ["brief"]},
    )
    goal_tokens: int = Field(
        0,
        ge=0,
        le=100_000_000,
        description="Tokens that the dense model may write from prompts of the planner's, as further texts for a goal, "
        "for its brief and for plans together, each with as many windows as any other; 0: none.",
    )
    text_bounds: dict[str, float] = Field(
        {},
        description="Largest rise of a named text's perplexity above the dense model's, such as code=0.2 for 20 %: a "
        "plan that goes beyond is rolled back, whatever it gains on others.",
    )
    check_weights: bool = Field(
        False,
        description="At the end, carry the kept plan out again with all named texts alike, and without the one that "
        "counts most, and report what each text then loses: what the weights, or the goal, were worth. Two rounds of "
        "pruning more.",
    )
    max_iterations: int = Field(8, ge=1, le=200, description="Plans that are tried at most.")
    max_evaluated_tokens: int = Field(
        0,
        ge=0,
        description="Tokens put through the model at most once it is profiled, by trials, probes, KL curves of methods,"
        " statistics behind pruned predecessors and further profiles, a backward pass as two forwards; 0 for no limit.",
    )
    max_seconds: float = Field(
        0.0,
        ge=0,
        description="Seconds after which no further round begins, the first profile included; 0 for no limit.",
    )
    patience: int = Field(
        3, ge=1, le=200, description="Iterations without an improvement, once at the target, before the run finishes."
    )
    reprofile: bool = Field(
        False,
        description="Profile again on the weights just accepted before the next round; costs as much as the first "
        "profile.",
    )
    tau: float = Field(
        0.15,
        gt=0,
        le=10,
        description="A plan is rolled back when validation perplexity exceeds (1 + tau) times the last accepted one.",
    )
    accept_probability: float = Field(
        0.75,
        ge=0.5,
        lt=1,
        description="Probability of a lower KL, by a paired t-test over windows, from which a plan replaces another of "
        "the same sparsity.",
    )
    min_fact_retention: float = Field(
        0.0,
        ge=0,
        le=1,
        description="A plan is rolled back when its answer probability kept (the right answers' probability per token, "
        "as a share of the dense model's) is less, however good its perplexity; 0 for no limit. Needs questions.",
    )
    approve: Literal["none", "plans", "goal", "all"] = Field(
        "none",
        description="plans: every plan waits, before it is carried out, for a person to accept, edit or refuse it. "
        "goal: what is made of the goal does. all: both.",
        json_schema_extra={"langgraph_nodes": ["approve", "brief"]},
    )
    protect: list[str] = Field(
        [],
        description="Layers that are never touched: selectors such as '*.v_proj' or 'blocks 0-1', comma-separated.",
    )
    planner: str = Field(
        "heuristic",
        pattern=MODEL_FORM,
        description=f"Who plans: {PLANNER}.",
        json_schema_extra={"langgraph_nodes": ["plan"]},
    )
    planner_fallback: Literal["none", "heuristic"] = Field(
        "none",
        description="Who plans a round when the planner fails; none stops the run, resumable. heuristic also plans "
        "the third round after two that brought nothing, the last one where the target is not reached, and its "
        "strongest recipe once at the target; the reflector can end the run only when a round since brought nothing.",
        json_schema_extra={"langgraph_nodes": ["plan"]},
    )
    planner_unaided: bool = Field(
        False,
        description="The planner has no instrument that lists what the rule would try next, and where it gives no "
        "usable plan the run ends with what was accepted. For measuring what it can do by itself; not with "
        "planner_fallback.",
        json_schema_extra={"langgraph_nodes": ["plan"]},
    )
    planner_prompt: str = Field(
        "",
        description="The planner's instructions, as text or file:PATH, with {tools} and {schema} where its tools and "
        "the JSON schema of a plan go. Empty: graph/prompts/planner.md, which is the place to start from.",
        json_schema_extra=_edit_in_studio("planner", "plan"),
    )
    planner_calls: int = Field(
        6,
        ge=0,
        le=100,
        description="Tools that a chat planner may call before it gives its plan, in each round; 0 offers none.",
    )
    planner_seconds: float = Field(
        600.0,
        gt=0,
        description="Seconds that these tools may take, in each round; the call that goes beyond is the last.",
    )
    planner_price_input: float = Field(
        0.0, ge=0, description="US dollars per million tokens sent to the planner, for the cost shown and its cap."
    )
    planner_price_output: float = Field(
        0.0, ge=0, description="US dollars per million tokens the planner writes, for the cost shown and its cap."
    )
    reflector: str = Field(
        "heuristic",
        pattern=MODEL_FORM,
        description="Who reflects on a trial: a string as for the planner.",
        json_schema_extra={"langgraph_nodes": ["reflect"]},
    )
    reflector_prompt: str = Field(
        "",
        description="The reflector's instructions, as text or file:PATH, with {schema} where the JSON schema of a "
        "reflection goes. Empty: graph/prompts/reflector.md.",
        json_schema_extra=_edit_in_studio("reflector", "reflect"),
    )
    reflector_price_input: float = Field(
        0.0, ge=0, description="US dollars per million tokens sent to the reflector, for the cost shown and its cap."
    )
    reflector_price_output: float = Field(
        0.0, ge=0, description="US dollars per million tokens the reflector writes, for the cost shown and its cap."
    )
    agent_timeout: float = Field(
        120.0, gt=0, le=3600, description="Seconds to wait for one answer of a planner or reflector over the network."
    )
    agent_retries: int = Field(
        2, ge=0, le=10, description="Times a failed request (429, 5xx, time-out) to a planner or reflector is repeated."
    )
    agent_answer_tokens: int = Field(
        8192,
        ge=256,
        le=1_000_000,
        description="Tokens that one answer of a planner or reflector may have at most, thoughts among them; a local "
        "model's has 1,024 at most.",
    )
    agent_temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="Temperature of planner and reflector. None sends none, as many models refuse any; a local model "
        "then takes the likeliest token.",
    )
    max_agent_tokens: int = Field(
        0,
        ge=0,
        description="Tokens, in and out, that the agents may spend: a call that could pass them, with the longest "
        "answer allowed, does not start, and the run stops, resumable; 0 for no cap.",
    )
    max_agent_cost: float = Field(
        0.0,
        ge=0,
        description="US dollars, by the prices given, that the agents may spend: a call that could pass them does not "
        "start, and the run stops, resumable; 0 for no cap. Needs both prices of every agent behind a network.",
    )

    memory: bool = Field(
        True,
        description="Start with the lessons of earlier runs on this model, and keep this run's for later ones.",
    )

    def find_prices(self, agent: Agent) -> tuple[float, float]:
        """US dollars per million tokens that an agent reads, and that it writes."""
        if agent == "planner":
            return self.planner_price_input, self.planner_price_output
        return self.reflector_price_input, self.reflector_price_output

    @field_validator("planner", "reflector", mode="before")
    @classmethod
    def _explain_models(cls, value: Any) -> Any:
        if isinstance(value, str) and re.match(MODEL_FORM, value) is None:
            raise ValueError(MODEL_WORDS)
        return value

    @field_validator("text_bounds", mode="before")
    @classmethod
    def _read_bounds(cls, value: Any) -> Any:
        return read_weights(value, "bound", "code=0.2,prose=1")

    @model_validator(mode="after")
    def _check_goal(self) -> Self:
        if self.goal and not self.text:
            raise ValueError("a goal weighs named texts, and there are none; name at least one with text")
        if self.goal_tokens and not self.goal:
            raise ValueError("goal_tokens are for texts of a goal; say with goal what the model is for")
        if self.check_weights and len(self.text) < 2 and not self.goal_tokens:
            raise ValueError("check_weights compares weights of several named texts; name two at least with text")
        if unknown := [name for name in self.text_bounds if name not in self.text]:
            raise ValueError(f"text_bounds bound {unknown[0]!r}, which is none of the texts")
        if loose := [name for name, rise in self.text_bounds.items() if rise <= 0]:
            raise ValueError(f"the bound of {loose[0]!r} must be above 0, such as 0.2 for 20 %")
        return self

    @property
    def offers_instruments(self) -> bool:
        """Whether a chat planner may call tools before it answers."""
        return self.planner != HEURISTIC and self.planner_calls > 0

    @property
    def checkpoints(self) -> int:
        """Whose layers lie on disk at once, at most: the rule probes nothing."""
        return count_checkpoints(self, self.max_iterations, probes=self.offers_instruments)

    @property
    def takes_parts(self) -> bool:
        """Whether whole parts go, in place of single weights."""
        return self.target_size > 0

    @property
    def aim(self) -> str:
        """What is left of a model that parts go of, such as `0.8 of its bytes`; empty where none do."""
        return f"{self.target_size:.4g} of its bytes" if self.target_size else ""

    def limit_perplexity(self, last: float) -> float:
        """What a round on the way to the target may come to, where the weights that were accepted last came to that."""
        return (1 + self.tau) * last

    @property
    def approves_plans(self) -> bool:
        """Whether every plan waits for a person."""
        return self.approve in ("plans", "all")

    @property
    def approves_goal(self) -> bool:
        """Whether what is made of the goal waits for a person."""
        return self.approve in ("goal", "all")

    @field_validator(*PROMPTS)
    @classmethod
    def _read_prompt(cls, value: str, info: ValidationInfo) -> str:
        """A file's text, so that a run keeps the prompt that it had; Billhook's own is no other prompt."""
        name, places = PROMPTS[info.field_name or ""]
        if value.startswith("file:"):
            if not (info.context or {}).get(READS_FILES):
                return value  # refused by whoever works with it: an error in here has no single line
            try:
                value = path_of(value).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
                raise ValueError(f"the prompt cannot be read ({reason})") from error
        if not value.strip() or value.strip() == read_prompt(name).strip():
            return ""
        if missing := [place for place in places if place not in value]:
            raise ValueError(
                f"the prompt has no {' and no '.join(missing)}, in whose place the agent is told what it needs to "
                f"answer; start from graph/prompts/{name}.md"
            )
        return value

    @model_validator(mode="after")
    def _follow_pattern(self) -> Self:
        if self.pattern:
            pruned, group = parse_pattern(self.pattern)
            if "target_sparsity" not in self.model_fields_set:
                self.target_sparsity = pruned / group
            elif self.target_sparsity > pruned / group + 1e-9:
                raise ValueError(
                    f"target_sparsity {self.target_sparsity:g} is above the {pruned / group:g} of {self.pattern}"
                )
        return self

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if not self.takes_parts:
            return self
        for field, why in NOT_OF_CUTS.items():
            if getattr(self, field) != type(self).model_fields[field].get_default(call_default_factory=True):
                raise ValueError(f"target_size takes whole parts away, and {field} {why}; leave it out")
        return self

    @model_validator(mode="after")
    def _check_facts(self) -> Self:
        if self.min_fact_retention and not self.questions:
            raise ValueError("min_fact_retention needs questions to ask; name their source with questions")
        return self

    @model_validator(mode="after")
    def _check_polish(self) -> Self:
        try:
            if self.polish_tokens and self.device == "stream":
                raise ImpossiblePlan(f"{NO_STREAMED_POLISH}; leave it out, or use another --device")
            if self.polish_tokens:
                count_polish(self, self.polish_tokens)
        except ImpossiblePlan as error:
            raise ValueError(f"polish_tokens: {error}") from error
        return self

    @model_validator(mode="after")
    def _check_aid(self) -> Self:
        if self.planner_unaided and self.planner_fallback != "none":
            raise ValueError("planner_unaided has no fallback; leave planner_fallback at none")
        return self

    @field_validator("protect", mode="before")
    @classmethod
    def _split_selectors(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def read_config(flags: dict[str, Any], path: Path | None) -> RunConfig:
    """The run's options, as `tools.base.options.read_options` reads them. Raises UserError in one line."""
    return read_options(RunConfig, flags, path)


def check_config(values: dict[str, Any]) -> RunConfig:
    """The options from plain values. Raises UserError in one line."""
    return check_options(RunConfig, values)
