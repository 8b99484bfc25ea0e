"""What an ablation is asked for: a model, its texts, arms and seeds."""

import operator
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from graph.config import HEURISTIC, TargetSettings
from tools.base.errors import UserError
from tools.base.named import Texts, Weights
from tools.base.options import join_list
from tools.base.settings import PolishSettings, TeamSettings

ARMS = {
    "chat": "a chat model plans and a chat model reflects",
    "chat-alone": "a chat model plans, fixed rules reflect",
    "chat-bare": "a chat model plans and a chat model reflects, without the rule's list and with nobody in their stead",
    "heuristic": "fixed rules plan and reflect",
    "told": "fixed rules plan and reflect, told in figures what the goal says in words",
    "kappa": "the default recipe, then the fixed ones in their order while the budget lasts; the one of least KL",
    "fixed": "one plan",
    "grid": "the strong recipe, then each plan of the rule's list, all small levers or one, while the budget lasts; "
    "the one of least KL",
    "random": "plans drawn at random from all of the planner's levers, the one of least KL",
    "search": "EvoPress's super-fast search over the shares of the layers, cut short by the tokens that every arm has, "
    "with the default recipe's weights",
}
"""What is compared; the first five are runs of the graph."""

CHAT = ("chat", "chat-alone", "chat-bare")
TOLD = "told"
"""The arm that is there with a goal alone."""

GRAPH = (*CHAT, "heuristic", TOLD)
ALONE = "kappa"
"""Gains are counted from this arm, which is what a person does who has no agent."""

POLISHED = "refit+polish:kappa-mask"
"""The one of the fixed recipes that wants `polish_tokens`."""

FIXED = (
    POLISHED,
    "refit10~clipped~damped0.2~sequential:kappa-mask",
    "refit10~sequential:kappa-mask",
    "refit~sequential:kappa-mask",
    "refit10:kappa-mask",
    "refit:kappa-mask",
    "refit:kappa",
)
"""The recipes of the arm `fixed`, a row each under its own name, the likeliest best first."""

ROWS = tuple(row for arm in ARMS for row in (FIXED if arm == "fixed" else (arm,)))
"""What rows are called, in the order of the arms."""


def describe_arm(row: str) -> str:
    """What the arm of a row does."""
    return f"{ARMS['fixed']}, `{row}`" if row in FIXED else ARMS[row]


class AblateSettings(TargetSettings, PolishSettings, TeamSettings):
    """The model, its texts, who plans, and how much each may try."""

    arms: str = Field(
        "", description=f"Comma-separated: {', '.join(ARMS)}. Empty: all; those with chat need --planner."
    )
    seeds: str = Field(
        "0,1,2,3,4",
        description="Comma-separated seeds; each arm is run once for each, with labels of its own and other windows "
        "of every text: so many cuts behind --text-cut.",
    )
    planner: str = Field("", description="The chat model that plans, as in graph.run; empty leaves its arms out.")
    reflector: str = Field("", description="The chat model that reflects, as in graph.run; empty: the planner's.")
    goal: str = Field(
        "",
        max_length=2000,
        exclude_if=operator.not_,  # as of `text`
        description="What the model is for, in words: chat planners read it, all other arms go by text_weights; needs "
        "named texts, and judge.",
    )
    judge: Weights = Field(
        {},
        exclude_if=operator.not_,
        description="With a goal: what each named text counts in the tables, such as code=9,prose=1; no arm is told "
        f"but {TOLD}.",
    )
    unseen: Texts = Field(
        {},
        exclude_if=operator.not_,
        description="With a goal: a text of what it names, NAME=SOURCE, given several times as many, that judge weighs "
        "and no arm is given; measured on as many test windows.",
    )
    evaluated_tokens: int = Field(
        49152,
        ge=1,
        description="Tokens that each arm may put through the model, once it is profiled, before it has to choose: by "
        "trials, probes, curves, sequential statistics and searches, a backward pass as two forwards.",
    )
    seconds: float = Field(
        0.0,
        ge=0,
        description="Seconds, the profile's included, after which an arm begins no further plan; a search goes by its "
        "tokens alone. 0 for no limit.",
    )
    out: str = Field("ablate", min_length=1, description="Directory of the tables, the plot and the work.")

    def for_seed(self, seed: int) -> Self:
        """What a row of this seed is made by: other labels, and other windows of every text."""
        return self.model_copy(update={"seed": seed, "text_cut": self.text_cut + seed})

    @model_validator(mode="after")
    def _check_goal(self) -> Self:
        if bool(self.goal) != bool(self.judge):
            given, missing = ("goal", "judge") if self.goal else ("judge", "goal")
            raise ValueError(f"a {given} needs a {missing}: words for those who read, and figures to judge all by")
        if self.unseen and not self.goal:
            raise ValueError("unseen texts are of what a goal names; give goal and judge")
        if both := [name for name in self.unseen if name in self.text]:
            raise ValueError(f"{both[0]!r} cannot be unseen: it is a text that every arm is given")
        named = [*self.text, *self.unseen]
        if self.goal and sorted(self.judge) != sorted(named):
            raise ValueError(f"judge must weigh every named text, and no other: {', '.join(named) or 'none'}")
        if self.goal and not any(self.judge.values()):
            raise ValueError("judge weighs all texts 0: nothing would be judged")
        return self

    @property
    def told(self) -> dict[str, float]:
        """What the texts at hand count by judge; empty where none of them counts."""
        weights = {name: self.judge.get(name, 0.0) for name in self.text}
        return weights if any(weights.values()) else {}

    @field_validator("planner", "reflector", mode="after")
    @classmethod
    def _name_no_model(cls, value: str) -> str:
        """Every run's config names the rule, which is no chat model."""
        return "" if value == HEURISTIC else value

    @field_validator("arms", "seeds", mode="before")
    @classmethod
    def _join_list(cls, value: Any) -> str:
        return join_list(value)


def list_arms(settings: AblateSettings) -> list[str]:
    """The rows asked for with each seed, in the order of ROWS. Raises UserError in one line."""
    asked = [part.strip() for part in settings.arms.split(",") if part.strip()]
    if unknown := [arm for arm in asked if arm not in ARMS]:
        raise UserError(f"there is no arm {unknown[0]!r}; choose among {', '.join(ARMS)}")
    if not settings.planner and (chats := [arm for arm in asked if arm in CHAT]):
        raise UserError(
            f"the arm {chats[0]} needs a chat model: give --planner, such as openai:NAME@http://HOST:PORT/v1"
        )
    if TOLD in asked and not settings.told:
        raise UserError(f"the arm {TOLD} is told what texts at hand count for a goal; give --goal, and --judge of them")
    missing = {*(() if settings.planner else CHAT), *(() if settings.told else (TOLD,))}
    chosen = [arm for arm in ARMS if (arm in asked if asked else arm not in missing)]
    fixed = list_fixed(settings) if "fixed" in chosen else ()
    return [row for row in ROWS if row in chosen or row in fixed]


def list_fixed(settings: AblateSettings) -> list[str]:
    """The fixed recipes that the settings allow."""
    return [label for label in FIXED if label != POLISHED or settings.polish_tokens]


def list_seeds(settings: AblateSettings) -> list[int]:
    """The seeds asked for. Raises UserError in one line."""
    try:
        seeds = list(dict.fromkeys(int(part) for part in settings.seeds.split(",") if part.strip()))
    except ValueError as error:
        raise UserError(f"seeds {settings.seeds!r} must be whole numbers, such as 0,1,2,3,4") from error
    if not seeds or min(seeds) < 0:
        raise UserError(f"seeds {settings.seeds!r} must name at least one number from 0 up, such as 0,1,2,3,4")
    return seeds
