"""Another recipe for some of the layers: what may differ in a group, and which layers have which group. No torch."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from tools.base.errors import ImpossiblePlan
from tools.base.settings import RUN
from tools.base.words import shorten
from tools.plans.cuts import Cutting, describe_cutting
from tools.plans.layer_profile import MOST_SELECTOR, LayerProfile, select_layers
from tools.plans.methods import LEVERS, MOST_STEPS, MethodName, Statistics
from tools.plans.mix import Mix, label_mix
from tools.plans.pattern import PatternText
from tools.plans.recipe import Adjustment, Damping, Recipe

MAX_GROUPS = 8
"""Groups that one plan may hold."""


def drop_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of what may be nothing, without that, for it may be left out; any other as it is."""
    kinds = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    return {key: part for key, part in schema.items() if key != "anyOf"} | kinds[0] if len(kinds) == 1 else schema


def _tell_briefly(schema: dict[str, Any]) -> None:
    """Of most fields what they may be and nothing else, for what they do is told with the plan's recipe."""
    for name, field in schema["properties"].items():
        told = drop_null(field).items()
        schema["properties"][name] = {key: part for key, part in told if key not in ("title", "default")}
    schema["properties"]["method"]["enum"] = [*LEVERS]  # those that planners have a use for


def _leave_out(least: int | None = None, most: int | None = None) -> Any:
    """A field that is as in the plan's recipe where it is left out, and is not written then."""
    return Field(None, exclude_if=lambda value: value is None, ge=least, le=most)


class GroupRecipe(BaseModel):
    """What differs; each is told in `recipe`, and is as there where it is left out."""

    # How sparsity is shared out over all layers, and a polish of all, are the plan's.
    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_tell_briefly)

    method: MethodName | None = _leave_out()
    refit_steps: int | None = _leave_out(1, MOST_STEPS)
    refit: bool | None = _leave_out()
    gamma: Literal["plain", "clipped"] | None = _leave_out()
    damping: Damping | None = _leave_out()
    statistics: Statistics | None = _leave_out()
    mix: SkipJsonSchema[Mix] = Field((), exclude_if=operator.not_)
    pattern: PatternText = Field(
        "",
        exclude_if=operator.not_,
        description="Such as 2:4: 2 zeros in every 4 consecutive inputs; the other layers share out the rest.",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_the_plans(cls, values: Any) -> Any:
        own = [name for name in Recipe.model_fields if name not in cls.model_fields]
        if isinstance(values, dict) and (asked := [name for name in own if name in values]):
            raise ValueError(f"{' and '.join(asked)} cannot differ by group; say it in the plan's recipe")
        return values

    def complete(self, recipe: Recipe) -> Recipe:
        """The whole recipe of the group's layers, in a plan of this recipe."""
        given = {name: getattr(self, name) for name in GroupRecipe.model_fields}
        return recipe.model_copy(update={name: value for name, value in given.items() if value not in (None, "", ())})


class Group(BaseModel):
    """Layers and what is done otherwise inside them."""

    model_config = ConfigDict(extra="forbid")

    selector: str = Field(min_length=1, max_length=MOST_SELECTOR, description="Which layers, as in adjustments.")
    recipe: GroupRecipe = Field(
        description="What differs there; each is told in the plan's recipe, and is as there where it is left out."
    )


def assign_groups(groups: Sequence[Group], layers: Sequence[LayerProfile]) -> dict[str, Group]:
    """The group of every layer that has one, in the model's order: the first that names it.

    Raises ImpossiblePlan for a group that has no layer, and where the plan's recipe has none.
    """
    first: dict[str, Group] = {}
    for group in groups:
        own = [name for name in select_layers(group.selector, layers) if name not in first]
        if not own:
            raise ImpossiblePlan(f"group {group.selector[:80]!r} has no layer: those before it have them all")
        first |= dict.fromkeys(own, group)
    if len(first) == len(layers):
        raise ImpossiblePlan(
            "groups take every layer, so that the plan's recipe counts for none; leave one of them out, and make its "
            "recipe the plan's"
        )
    return {layer.name: first[layer.name] for layer in layers if layer.name in first}


def refuse_two_walks(recipes: Iterable[Recipe]) -> None:
    """Raises ImpossiblePlan where layers of one round are to be pruned behind others by several texts."""
    mixes = dict.fromkeys(recipe.mix for recipe in recipes if recipe.in_order)
    if len(mixes) > 1:
        asked = " and ".join(repr(label_mix(mix) or RUN) for mix in mixes)
        raise ImpossiblePlan(
            f"statistics behind pruned predecessors in one round are of one calibration text, and not of {asked}"
        )


def refuse_two_polishes(recipe: Recipe, others: Iterable[Recipe]) -> None:
    """Raises ImpossiblePlan where a plan of this recipe polishes, and statistics of other layers are of other text: it
    would be on none of them.
    """
    for other in others if recipe.polish else ():
        if other.mix != recipe.mix:
            raise ImpossiblePlan("a polish of all layers is on one text; leave polish out, or mix out of groups")


def describe_group(group: Group, recipe: Recipe) -> str:
    """Such as `wanda~dense in *.v_proj` or `refit 2:4 in mlp.up_proj`, in a plan of this recipe."""
    return f"{_label(group, recipe)} in {shorten(' '.join(group.selector.split()), 40)}"


def identify_group(group: Group, recipe: Recipe) -> list[str]:
    """What is asked for a group, in a plan of this recipe: two that say the same in other words are alike."""
    whole = group.recipe.complete(recipe)
    return [" ".join(group.selector.split()), whole.mask_label, whole.pattern]


def name_work(recipe: Recipe, groups: Sequence[Group]) -> str:
    """`Recipe.work_label`, and what is done otherwise in groups, such as `refit [*.v_proj: wanda~dense]`."""
    told = [f" [{' '.join(group.selector.split())}: {_label(group, recipe)}]" for group in groups]
    return f"{recipe.work_label}{''.join(told)}"


def _label(group: Group, recipe: Recipe) -> str:
    label = group.recipe.complete(recipe).mask_label
    return f"{label} {group.recipe.pattern}" if group.recipe.pattern else label


MOST_NAMED = 4
"""Groups, and adjustments, that a line names; of others it says how many."""


class Levers(Protocol):
    """A planner's plan, or a draft of one."""

    sparsity: float
    recipe: Recipe

    @property
    def groups(self) -> Sequence[Group]: ...
    @property
    def adjustments(self) -> Sequence[Adjustment]: ...
    @property
    def cut(self) -> Cutting | None: ...


def describe_levers(plan: Levers) -> str:
    """The line. Groups stand behind the recipe: `45.0% refit:kappa · wanda in *.v_proj`."""
    if plan.cut:
        return f"{plan.sparsity:.1%} {describe_cutting(plan.cut)}"
    line = f"{plan.sparsity:.1%} {plan.recipe.label}"
    for told in (
        [describe_group(group, plan.recipe) for group in plan.groups],
        [_describe_adjustment(adjustment) for adjustment in plan.adjustments],
    ):
        left_out = len(told) - MOST_NAMED
        shown = [*told[:MOST_NAMED], *([f"{left_out} more"] if left_out > 0 else [])]
        line = f"{line} · {', '.join(shown)}" if shown else line
    return line


def _describe_adjustment(adjustment: Adjustment) -> str:
    selector = shorten(" ".join(adjustment.selector.split()), 40)
    if adjustment.action == "factor":
        return f"{selector} x{adjustment.factor:g}"
    if adjustment.action == "protect":
        return f"{selector} protected"
    low, high = adjustment.low, adjustment.high
    if low is None:
        return f"{selector} ≤{100 * (high or 0):.3g}%"
    return f"{selector} ≥{100 * low:.3g}%" if high is None else f"{selector} {100 * low:.3g}–{100 * high:.3g}%"
