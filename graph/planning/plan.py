"""What a planner answers with."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from graph.reflecting.schema import MOST
from tools.plans.recipe import MAX_ADJUSTMENTS, Adjustment, Recipe


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
