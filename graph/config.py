"""Every option of a run in one pydantic model, and how it is read from flags, environment and YAML."""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, create_model, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from tools.errors import UserError
from tools.settings import WorkbenchSettings

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PLANNER = "heuristic (no key, deterministic), openai:NAME, or openai:NAME@http://HOST:PORT/v1 for a compatible endpoint"


class RunConfig(WorkbenchSettings):
    """Every option of a run: what is pruned, how far, judged by what, planned by whom."""

    target_sparsity: float = Field(
        0.45, gt=0, lt=1, description="Share of the prunable weights that are zero at the end, as a fraction."
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

    @field_validator("protect", mode="before")
    @classmethod
    def _split_selectors(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class _Environment(BaseSettings):
    """The names of `RunConfig`'s fields as `BILLHOOK_…` variables, unparsed."""

    model_config = SettingsConfigDict(env_prefix="BILLHOOK_", extra="ignore")


def _read_environment() -> dict[str, str]:
    names = dict.fromkeys(RunConfig.model_fields, (str | None, None))
    found = create_model("_Variables", __base__=_Environment, **names)()  # type: ignore[call-overload]
    return {name: value for name, value in found.model_dump().items() if value is not None}


def read_config(flags: dict[str, Any], path: Path | None) -> RunConfig:
    """The run's options: flags over `BILLHOOK_…` variables over the YAML file over defaults.

    Raises UserError in one line for a file that cannot be read, an unknown field (with the nearest name) or a value
    out of bounds.
    """
    return check_config({**(read_yaml(path) if path else {}), **_read_environment(), **flags})


def check_config(values: dict[str, Any]) -> RunConfig:
    """The options from plain values. Raises UserError in one line."""
    unknown = sorted(set(values) - set(RunConfig.model_fields))
    if unknown:
        near = difflib.get_close_matches(unknown[0], RunConfig.model_fields, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; see --help for all fields"
        raise UserError(f"unknown field {unknown[0]!r}{hint}")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(_describe_problem(problem) for problem in error.errors())) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file, unchecked. Raises UserError when it cannot be read."""
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
        raise UserError(f"config file {path} does not exist; Billhook's own are in configs/: {known}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} is not YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(values, dict):
        raise UserError(f"config file {path} must hold one 'field: value' a line")
    return {str(key): value for key, value in values.items()}


def _describe_problem(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message[0].lower()}{message[1:]}, not {str(problem['input'])[:80]!r}"
