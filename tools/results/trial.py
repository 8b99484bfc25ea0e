"""A trial: one plan, carried out and measured. The same in a run's state, in its log and in its report. No torch."""

import math
import operator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from tools.plans.cuts import Cutting
from tools.plans.groups import Group
from tools.plans.recipe import Adjustment, Recipe
from tools.results.schema import TextFigures


def _drop_infinite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Measured = Annotated[float | None, BeforeValidator(_drop_infinite)]
"""A figure; None where it was not finite, or nothing was measured."""


class Trial(BaseModel):
    """One plan, carried out and measured on the validation text, or without figures where it was not."""

    iteration: int
    checkpoint: str = Field(description="Id of the manifest that holds this trial's weights.")
    sparsity: float
    perplexity: Measured = Field(description="On the validation text; null when it was not finite, or not measured.")
    kl: Measured = Field(description="KL(dense || pruned) in nats per token; null likewise.")
    kl_error: Measured = Field(None, description="Standard error of kl over the windows.")
    change_error: Measured = Field(
        None, description="Standard error of kl minus the last accepted trial's, paired; null where not comparable."
    )
    better: Measured = Field(
        None,
        description="Probability that its KL is below the last accepted trial's, by a paired t-test over "
        "the windows; null where the verdict does not go by it.",
    )
    texts: list[TextFigures] = Field(
        [],
        exclude_if=operator.not_,
        description="Perplexity and KL on each of the named texts, of which perplexity and kl are the means by weight.",
    )
    predicted_kl: float = Field(description="Sum of the KL curves at this allocation, nats per token.")
    fact_retention: Measured = Field(
        None,
        description="Answer probability kept: exp of the mean change of the gold answers' log-probability per token "
        "beside the dense model; null where no questions are asked, or an answer's was not finite.",
    )
    fact_error: Measured = Field(None, description="Standard error of fact_retention, over questions.")
    tokens: int = Field(0, description="Tokens put through the model to measure it.")
    verdict: Literal["accept", "rollback", "refuse"] = Field(
        description="refuse: a person refused the plan before it was carried out, and nothing was measured."
    )
    broken: bool = Field(
        False, description="Rolled back because it broke while it was carried out, by the reason; nothing was measured."
    )
    reason: str = ""
    plan: str = Field("", description="The plan in one line.")
    hypothesis: str = Field("", exclude_if=operator.not_, description="What the planner expected of it, if it said so.")
    order: str = Field("", description="Id of the plan's work order; empty for the dense model.")
    asked: str = Field("", description="Hash of what the plan asked for, whatever lessons made of it.")
    recipe: Recipe | None = Field(None, description="The plan's recipe; null for the dense model.")
    groups: list[Group] = Field([], exclude_if=operator.not_, description="Layers that had another.")
    adjustments: list[Adjustment] = Field(
        [], exclude_if=operator.not_, description="Corrections to the allocation that it asked for."
    )
    cut: Cutting | None = Field(
        None, exclude_if=lambda cut: cut is None, description="How it was to be shared out, where whole parts went."
    )
    seconds: float = 0.0

    @property
    def measured(self) -> bool:
        """Whether it has figures."""
        return self.verdict != "refuse" and not self.broken
