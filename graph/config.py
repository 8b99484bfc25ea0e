"""Every option of a run in one pydantic model."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tools.options import check_options, read_options
from tools.recipes import parse_pattern
from tools.settings import WorkbenchSettings

PLANNER = "heuristic (no key, deterministic), openai:NAME, or openai:NAME@http://HOST:PORT/v1 for a compatible endpoint"


class RunConfig(WorkbenchSettings):
    """Every option of a run: what is pruned, how far, judged by what, planned by whom."""

    target_sparsity: float = Field(
        0.45, gt=0, lt=1, description="Share of the prunable weights that are zero at the end, as a fraction."
    )
    pattern: str = Field(
        "",
        description="N:M, such as 2:4: N zeros in every M consecutive inputs of every layer that is not protected. The "
        "target is then what that comes to (N/M where nothing is protected); empty for zeros anywhere.",
    )
    max_iterations: int = Field(8, ge=1, le=200, description="Plans that are tried at most.")
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
    max_layer_sparsity: float = Field(
        0.9, gt=0, le=1, description="No layer is pruned further than this, whatever a plan says."
    )
    protect: list[str] = Field(
        [],
        description="Layers that are never touched: selectors such as '*.v_proj' or 'blocks 0-1', comma-separated.",
    )
    planner: str = Field(
        "heuristic",
        pattern=r"^(heuristic|openai:[^\s@]+(@https?://\S+)?)$",
        description=f"Who plans: {PLANNER}.",
        json_schema_extra={"langgraph_nodes": ["plan"]},
    )
    planner_fallback: Literal["none", "heuristic"] = Field(
        "none",
        description="Who plans a round when the planner fails; none stops the run, resumable.",
        json_schema_extra={"langgraph_nodes": ["plan"]},
    )
    planner_timeout: float = Field(120.0, gt=0, le=3600, description="Seconds to wait for one answer of the planner.")
    planner_retries: int = Field(
        2, ge=0, le=10, description="Times a failed request (429, 5xx, time-out) to the planner is repeated."
    )
    planner_price_input: float = Field(
        0.0, ge=0, description="US dollars per million tokens sent to the planner, for the cost shown."
    )
    planner_price_output: float = Field(
        0.0, ge=0, description="US dollars per million tokens the planner writes, for the cost shown."
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

    @field_validator("protect", mode="before")
    @classmethod
    def _split_selectors(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def read_config(flags: dict[str, Any], path: Path | None) -> RunConfig:
    """The run's options, as `tools.options.read_options` reads them. Raises UserError in one line."""
    return read_options(RunConfig, flags, path)


def check_config(values: dict[str, Any]) -> RunConfig:
    """The options from plain values. Raises UserError in one line."""
    return check_options(RunConfig, values)
