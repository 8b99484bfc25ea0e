"""What is checkpointed between nodes: JSON-sized, ids of artifacts, never a tensor."""

import operator
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from graph.config import RunConfig
from tools.recipes import Adjustment, Recipe

MAX_ADJUSTMENTS = 64

SIGMAS = 2.0
"""Differences of KL below this many standard errors are noise: neither an improvement nor a lesson."""

SAME_SPARSITY = 5e-4
"""Two sparsities nearer than this are the same budget: the promise is the target within 0.05 %."""


class Plan(BaseModel):
    """One round of pruning, as the planner wants it."""

    model_config = ConfigDict(extra="forbid")

    sparsity: float = Field(
        gt=0,
        lt=1,
        description="Share of all prunable weights that are zero after this round, as a fraction such as 0.3.",
    )
    recipe: Recipe = Field(
        default_factory=Recipe, description="How the weights are chosen and what becomes of the rest."
    )
    adjustments: list[Adjustment] = Field(
        default_factory=list,
        max_length=MAX_ADJUSTMENTS,
        description="Corrections to the allocation for groups of layers; an empty list trusts the KL curves.",
    )
    reprofile: bool = Field(
        False,
        description="If this round is kept, profile again on its weights before the next; costs as much as the first "
        "profile, and seldom changes the KL curves much.",
    )
    reason: str = Field("", max_length=2000, description="Why this plan, in one or two sentences.")


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
    verdict: Literal["accept", "rollback"]
    reason: str = ""
    plan: str = Field("", description="The plan in one line.")
    recipe: Recipe | None = Field(None, description="The plan's recipe; null for the dense model.")
    seconds: float = 0.0


class Lesson(BaseModel):
    """What a trial taught: for these layers the KL curves were off by this factor."""

    run: str
    iteration: int
    recipe: str = Field("", description="Mask method and refit the lesson was learnt with, such as two-sided+refit.")
    selector: str = Field(description="The layers it is about; * is the model as a whole.")
    factor: float = Field(
        description="Measured over predicted; for a group, 2 = twice as precious as its KL curves say."
    )
    predicted: float
    measured: float
    text: str
    same_config: bool = Field(
        False, description="The lesson comes from a run with this very config, so a repeat would count it twice."
    )


class Usage(BaseModel):
    """Tokens and money spent on agents so far."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = Field(0.0, description="US dollars, from the prices in the config.")


class Input(BaseModel):
    """What a run is started with in Studio; everything else is its context (the config)."""

    run: str = Field(
        "",
        pattern=r"^$|^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the run's directory; empty makes one from the thread.",
    )


def last_accepted(trials: Sequence[Trial]) -> Trial | None:
    """The last trial that was kept; None before the first."""
    return next((trial for trial in reversed(trials) if trial.verdict == "accept"), None)


class State(Input):
    """The whole state of a run between two nodes."""

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
    usage: Usage = Field(default_factory=Usage)
    stop: str = Field("", description="Why the loop ended; empty while it goes on.")
    seconds: float = Field(0.0, description="Time spent inside nodes, over all processes that worked on the run.")
