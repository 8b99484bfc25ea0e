"""What a plan may ask of the tools: the recipe for a layer's weights, and corrections to the allocation."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Recipe(BaseModel):
    """How weights are chosen, shared out over the layers, and what happens to the survivors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["magnitude", "wanda", "two-sided", "sparsegpt", "two-sided-obs", "refit"] = Field(
        "two-sided",
        description="magnitude: |W| within the layer. wanda: |W|*sqrt(a) within each output row. two-sided: "
        "W^2*a*gamma within the layer; usually the best mask. sparsegpt, two-sided-obs: survivors corrected column by "
        "column. refit: the two-sided mask grown in 5 steps, survivors refitted between; the best and slowest.",
    )
    refit: bool = Field(
        True,
        description="After any method but refit, fit all surviving weights of a layer by least squares; costs most of "
        "a round's time and usually wins much.",
    )
    allocation: Literal["kappa", "uniform"] = Field(
        "kappa", description="kappa: minimise the predicted KL over the layers. uniform: the same sparsity everywhere."
    )
    strength: float = Field(
        1.0, ge=0, le=1, description="1 follows the kappa allocation, 0 is uniform, between is linear; costs nothing."
    )

    @property
    def refits_after(self) -> bool:
        """Whether a refit follows the method; the method `refit` ends with its own."""
        return self.refit and self.method != "refit"

    @property
    def refits(self) -> bool:
        """Whether the survivors end as a least-squares fit, by the method or after it."""
        return self.refit or self.method == "refit"

    @property
    def mask_label(self) -> str:
        """What is done inside a layer, such as `two-sided+refit`."""
        return f"{self.method}{'+refit' if self.refits_after else ''}"

    @property
    def label(self) -> str:
        """The whole recipe in short, such as `two-sided+refit:kappa@0.8`."""
        strength = f"@{self.strength:g}" if self.allocation == "kappa" and self.strength != 1 else ""
        return f"{self.mask_label}:{self.allocation}{strength}"


class Adjustment(BaseModel):
    """One correction to the allocation, for the layers a selector names."""

    model_config = ConfigDict(extra="forbid")

    selector: str = Field(
        min_length=1,
        max_length=200,
        description="Which layers: a glob over layer names, optionally after a range of blocks, such as "
        "'*.v_proj', 'blocks 0-3' or 'blocks 0-3 · *.v_proj'.",
    )
    action: Literal["factor", "bounds", "protect"] = Field(
        description="factor: the layers count this many times as much as predicted. bounds: least and greatest "
        "sparsity of each. protect: leave them dense."
    )
    factor: float | None = Field(None, ge=0.05, le=20, description="For action factor; 2 = twice as precious.")
    low: float | None = Field(None, ge=0, le=1, description="For action bounds: least sparsity, as a fraction.")
    high: float | None = Field(None, ge=0, le=1, description="For action bounds: greatest sparsity, as a fraction.")
    reason: str = Field("", max_length=500, description="Why, in a few words.")

    @model_validator(mode="after")
    def _check_action(self) -> Self:
        if self.action == "factor" and self.factor is None:
            raise ValueError("action 'factor' needs a factor")
        if self.action == "bounds" and self.low is None and self.high is None:
            raise ValueError("action 'bounds' needs low or high")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        return self
