"""What a planner answers with."""

import operator
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.json_schema import SkipJsonSchema

from graph.goals.schema import MOST_TEXTS, NewText
from graph.reflecting.schema import MOST
from tools.plans.cuts import Cutting
from tools.plans.groups import MAX_GROUPS, Group, GroupRecipe
from tools.plans.recipe import MAX_ADJUSTMENTS, Adjustment, Recipe

ONLY_ZEROS = ("recipe", "groups", "adjustments", "new_texts", "reprofile")
"""What a plan says of single weights, and has no part in a cut."""

WORDS = {"hypothesis", "reason"}
"""What a plan says for people and agents, and what is done hangs on nothing of it."""


MOST_HYPOTHESIS = 1000
"""Characters of a plan's hypothesis."""


class PlannedText(NewText):
    """A text that the dense model writes for a plan."""

    weight: float = Field(
        gt=0,
        le=100,
        description="What it counts in this plan's mix beside the other texts, whose shares add up to 1.",
    )


class Plan(BaseModel):
    """One round of pruning, as the planner wants it."""

    model_config = ConfigDict(extra="forbid")

    hypothesis: str = Field(
        "",
        max_length=MOST_HYPOTHESIS,
        exclude_if=operator.not_,
        description="First of all: what you expect of this round, in figures, and what would prove you wrong.",
    )
    sparsity: float = Field(
        gt=0,
        lt=1,
        description="Share of all prunable weights that are zero after this round, as a fraction: the target, or a "
        "step towards it.",
    )
    recipe: Recipe = Field(
        default_factory=Recipe,
        description="How weights are chosen and shared out over the layers, and what becomes of the rest.",
    )
    groups: list[Group] = Field(
        default_factory=list,
        max_length=MAX_GROUPS,
        exclude_if=operator.not_,
        description="Other recipes for some layers, not for all; the first that names a layer counts. Each goes by the "
        "KL curves of its own, and costs what it costs anywhere.",
    )
    adjustments: list[Adjustment] = Field(
        default_factory=list,
        max_length=MAX_ADJUSTMENTS,
        description="Corrections to the allocation for groups of layers, at no cost. An empty list trusts the KL "
        "curves.",
    )
    cut: SkipJsonSchema[Cutting | None] = Field(  # planners of runs that cut are told of it, and of little else
        None,
        exclude_if=lambda cut: cut is None,
        description="How the sparsity is shared out over groups of attention heads, neurons and whole blocks.",
    )
    new_texts: SkipJsonSchema[list[PlannedText]] = Field(  # planners are told of it where a goal allows any
        default_factory=list,
        max_length=MOST_TEXTS,
        exclude_if=operator.not_,
        description="Texts of a kind that no text shows and the goal needs, written by the dense model from these "
        "prompts, to fit to: they count in the mix of this plan, and of later ones that name them, never in what is "
        "judged. Costs a profile.",
    )
    reprofile: bool = Field(
        False,
        description="If this round is kept, profile again on its weights before the next; costs as much as the first "
        "profile, and seldom changes the KL curves much.",
    )
    reason: str = Field("", max_length=2000, description="Why this plan, in one or two sentences.")
    multipliers: SkipJsonSchema[dict[str, Annotated[float, Field(ge=1 / MOST, le=MOST)]]] = Field(
        {},
        description="Selectors to factors on the KL curves, from the lessons (`graph.planning.orders`): the "
        "planner neither sees nor sets them. Part of the plan, so that whoever carries it out, again or elsewhere, "
        "uses the same.",
    )


@cache
def _tell_of(polishes: bool, texts: tuple[str, ...], patterned: bool, writes: bool) -> type[Plan]:
    """The schema of a plan with levers that are hidden in `Recipe`, or without one that is told; what it answers with
    goes by the same names."""
    levers: dict[str, Any] = {}
    of_groups: dict[str, Any] = {}
    if texts:
        shares: dict[str, Any] = {name: (Annotated[float, Field(ge=0)], 0.0) for name in texts}
        mix = create_model("Mix", __config__=ConfigDict(extra="forbid"), __doc__="Weights of texts.", **shares)
        levers["mix"] = (mix | None, Field(None, description=Recipe.model_fields["mix"].description))
        of_groups["mix"] = (mix | None, None)
    if polishes:
        levers["polish"] = (bool, Field(False, description=Recipe.model_fields["polish"].description))
    if patterned:
        of_groups["pattern"] = (SkipJsonSchema[str], "")
    told = _extend(Recipe, levers)
    group = _extend(Group, {"recipe": (_extend(GroupRecipe, of_groups), _describe_again(Group, "recipe"))})
    groups = (list[group], _describe_again(Plan, "groups", default_factory=list, max_length=MAX_GROUPS))  # type: ignore[valid-type]
    fields: dict[str, Any] = {
        "recipe": (told, _describe_again(Plan, "recipe", default_factory=told)),
        "groups": groups,
    }
    if writes:
        new = _describe_again(Plan, "new_texts", default_factory=list, max_length=MOST_TEXTS)
        fields["new_texts"] = (list[PlannedText], new)
    return _extend(Plan, fields)


@cache
def tell_of_cuts() -> type[Plan]:
    """The schema of a plan in a run that takes parts away: what is said of single weights is hidden."""
    told = {
        "sparsity": (
            Annotated[float, Field(gt=0, lt=1)],
            Field(description="Share of what the blocks cost that is gone after this round: the target, or a step."),
        ),
        "cut": (Cutting, _describe_again(Plan, "cut", default_factory=Cutting)),
    }
    hidden: dict[str, Any] = {}
    for name in ONLY_ZEROS:
        field = Plan.model_fields[name]
        hidden[name] = (SkipJsonSchema[field.annotation], field)  # type: ignore[misc, name-defined]
    return _extend(Plan, told | hidden)


def _extend(model: type[Any], fields: dict[str, Any]) -> type[Any]:
    return create_model(model.__name__, __base__=model, __doc__=model.__doc__, **fields)


def _describe_again(model: type[BaseModel], name: str, **options: Any) -> Any:
    return Field(description=model.model_fields[name].description, **options)


def find_schema(
    polish_tokens: int, texts: Iterable[str] = (), pattern: str = "", *, writes: bool = False
) -> type[Plan]:
    """What a planner is told to answer with in a run that allows so many tokens of polish, whose plans may mix these
    texts, and have the model write texts, and that has this pattern in all layers."""
    mixed = tuple(texts)
    if not polish_tokens and not mixed and not pattern:
        return Plan
    return _tell_of(polish_tokens > 0, mixed, bool(pattern), writes)


def drop_schema(plan: Plan) -> Plan:
    """The plan itself, whatever schema it was answered by."""
    return plan if type(plan) is Plan else Plan.model_validate(plan.model_dump())
