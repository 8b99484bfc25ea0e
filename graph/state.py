"""What is checkpointed between nodes: JSON-sized, ids of artifacts, never a tensor."""

import operator
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from graph.config import RunConfig
from tools.plans.recipe import MAX_ADJUSTMENTS, Adjustment, Recipe
from tools.results.schema import Usage

MAX_LEARNT = 5
"""Lessons that a reflector may draw from one trial."""

MOST = 2.0
"""A lesson corrects a group's KL curves by at most this factor, up or down: one trial is thin evidence."""

SAME_SPARSITY = 5e-4
"""Two sparsities nearer than this are the same budget: the promise is the target within 0.05 %."""


def same_sparsity(one: float, other: float) -> bool:
    """Whether two sparsities are the same budget."""
    return abs(one - other) <= SAME_SPARSITY


class Plan(BaseModel):
    """One round of pruning, as the planner wants it."""

    model_config = ConfigDict(extra="forbid")

    sparsity: float = Field(
        gt=0,
        lt=1,
        description="Share of all prunable weights that are zero after this round, as a fraction: the target, or a "
        "step towards it.",
    )
    recipe: Recipe = Field(
        default_factory=Recipe, description="How the weights are chosen and what becomes of the rest."
    )
    adjustments: list[Adjustment] = Field(
        default_factory=list,
        max_length=MAX_ADJUSTMENTS,
        description="Corrections to the allocation for groups of layers, at no cost. An empty list trusts the KL "
        "curves, and is best until trials show otherwise.",
    )
    reprofile: bool = Field(
        False,
        description="If this round is kept, profile again on its weights before the next; costs as much as the first "
        "profile, and seldom changes the KL curves much. Leave it false unless predictions were far off.",
    )
    reason: str = Field("", max_length=2000, description="Why this plan, in one or two sentences.")
    multipliers: SkipJsonSchema[dict[str, Annotated[float, Field(ge=1 / MOST, le=MOST)]]] = Field(
        {},
        description="Selectors to factors on the KL curves, from the lessons (`graph.planning.orders`): the "
        "planner neither sees nor sets them. Part of the plan, so that whoever carries it out, again or elsewhere, "
        "uses the same.",
    )


class Learnt(BaseModel):
    """What a reflector says that a trial taught of some layers."""

    model_config = ConfigDict(extra="forbid")

    selector: str = Field(
        min_length=1,
        max_length=200,
        description="Which layers: a glob over layer names, optionally after a range of blocks, such as '*.v_proj', "
        "'blocks 0-3' or 'blocks 0-3 · *.v_proj'.",
    )
    direction: Literal["dearer", "cheaper"] = Field(
        description="Whether pruning these layers costs more or less KL than their curves predict."
    )
    multiplier: float = Field(
        ge=1 / MOST,
        le=MOST,
        description="How many times the predicted KL they cost: above 1 when dearer, below 1 when cheaper.",
    )
    confidence: float = Field(ge=0, le=1, description="How sure this is, from 0 to 1.")
    evidence: str = Field(min_length=1, max_length=300, description="The figures that say so, in one sentence.")

    @property
    def contradiction(self) -> str:
        """What is wrong where direction and multiplier contradict each other, in words for the model; else empty."""
        if self.multiplier == 1 or (self.multiplier > 1) == (self.direction == "dearer"):
            return ""
        side, other = ("above", "cheaper") if self.direction == "dearer" else ("below", "dearer")
        return (
            f"{self.direction!r} needs a multiplier {side} 1, not {self.multiplier:g}; write "
            f"{1 / self.multiplier:.3g}, or {other!r} if that is what the figures say"
        )


class Reflection(BaseModel):
    """What a reflector makes of one trial."""

    model_config = ConfigDict(extra="forbid")

    lessons: list[Learnt] = Field(
        default_factory=list,
        max_length=MAX_LEARNT,
        description="What the trial taught of groups of layers; an empty list when it taught nothing.",
    )
    reprofile: bool = Field(
        False,
        description="Profile again on the weights just kept, before the next round; costs as much as the first "
        "profile. Does nothing after a rollback.",
    )
    stop: bool = Field(
        False, description="End the run here, for nothing more is to be won. Does nothing before the target is reached."
    )
    reason: str = Field("", max_length=500, description="Why to stop, to profile again or to go on, in one sentence.")


class Trial(BaseModel):
    """One plan, carried out and measured on the validation text."""

    iteration: int
    checkpoint: str = Field(description="Id of the manifest that holds this trial's weights.")
    sparsity: float
    perplexity: float | None = Field(description="On the validation text; null when it was not finite.")
    kl: float | None = Field(description="KL(dense || pruned) in nats per token; null when not finite.")
    kl_error: float | None = Field(None, description="Standard error of kl over the windows.")
    change_error: float | None = Field(
        None, description="Standard error of kl minus the last accepted trial's, paired; null where not comparable."
    )
    predicted_kl: float = Field(description="Sum of the KL curves at this allocation, nats per token.")
    fact_retention: float | None = Field(
        None,
        description="Share of the gold answers' probability per token that is left of the dense model's; null where no "
        "questions are asked, or an answer's was not finite.",
    )
    fact_error: float | None = Field(None, description="Standard error of fact_retention, over questions.")
    tokens: int = Field(0, description="Tokens put through the model to measure it.")
    verdict: Literal["accept", "rollback", "refuse"] = Field(
        description="refuse: a person refused the plan before it was carried out, and nothing was measured."
    )
    reason: str = ""
    plan: str = Field("", description="The plan in one line.")
    recipe: Recipe | None = Field(None, description="The plan's recipe; null for the dense model.")
    seconds: float = 0.0


class Lesson(BaseModel):
    """What trials taught: for these layers the KL curves were off by this factor."""

    run: str = Field(description="The run that taught it, or the last of those that did.")
    iteration: int
    recipe: str = Field("", description="Mask method and refit the lesson was learnt with, such as two-sided+refit.")
    curves: Literal["mask", "method"] = Field(
        "mask", description="The KL curves that it corrects: the profile's, or those of its method itself."
    )
    selector: str = Field(description="The layers it is about; * is the model as a whole.")
    factor: float = Field(
        description="Measured over predicted; for a group, 2 = twice as precious as its KL curves say."
    )
    predicted: float
    measured: float | None = Field(description="Null where it was not finite.")
    text: str
    source: Literal["measured", "reflector"] = Field(
        "measured", description="Worked out from the trial's figures, or said by the reflector's model."
    )
    confidence: float = Field(
        1.0, ge=0, le=1, description="Weight of an observation in a mean; 0 for words that nothing is computed with."
    )
    count: int = Field(1, ge=1, description="Observations that it is the mean of.")
    model: str = Field("", description="The model it is about, where that is another than the run's.")
    same_config: bool = Field(
        False, description="The lesson comes from a run with this very config, so a repeat would count it twice."
    )


class Input(BaseModel):
    """What a run is started with in Studio; everything else is its context (the config)."""

    run: str = Field(
        "",
        pattern=r"^$|^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the run's directory; empty makes one from the thread.",
    )
    replay: str = Field(
        "",
        pattern=r"^$|^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of a recorded run whose plans and reflections are taken, so that no agent is asked; empty "
        "for a run of its own.",
    )


def last_accepted(trials: Sequence[Trial]) -> Trial | None:
    """The last trial that was kept; None before the first."""
    return next((trial for trial in reversed(trials) if trial.verdict == "accept"), None)


class State(Input):
    """The whole state of a run between two nodes."""

    came_from: str = Field("", description="The checkpoint that the last node worked from; it tells a fork.")
    config: RunConfig = Field(default_factory=RunConfig)
    profile: str = Field("", description="Hash of the profile artifact.")
    dense: Trial | None = Field(None, description="The dense model on the validation text, as iteration 0.")
    iteration: int = 0
    plan: Plan | None = None
    current: str = Field("dense", description="Manifest of the weights that are in the model now.")
    accepted: str = Field("dense", description="Manifest of the last accepted weights.")
    accepted_plan: Plan | None = Field(None, description="The plan that made them.")
    trials: Annotated[list[Trial], operator.add] = []
    lessons: list[Lesson] = []
    reprofile: bool = Field(False, description="The reflector asked for a new profile after the last trial.")
    usage: Usage = Field(default_factory=Usage)
    evaluated_tokens: int = Field(0, description="Tokens put through pruned models so far, by trials and probes.")
    stop: str = Field("", description="Why the loop ended; empty while it goes on.")
    seconds: float = Field(0.0, description="Time spent inside nodes, over all processes that worked on the run.")

    @property
    def trial_tokens(self) -> int:
        """Tokens that one trial puts through the model."""
        return self.dense.tokens if self.dense and self.dense.tokens else self.config.validation_tokens
