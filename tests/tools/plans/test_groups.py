"""Recipes of single groups: what may differ in one, which layers have it, and how it is told."""

from typing import Any

import pytest
from pydantic import ValidationError

from tests.profiles import make_layers
from tools.base.errors import ImpossiblePlan
from tools.plans.groups import (
    Group,
    GroupRecipe,
    assign_groups,
    describe_group,
    identify_group,
    name_work,
    refuse_two_polishes,
    refuse_two_walks,
)
from tools.plans.recipe import Recipe, parse_recipe

LAYERS = make_layers(blocks=3)
PLANS = Recipe(gamma="clipped", statistics="sequential", strength=0.8)
"""Of the plan."""


def group(selector: str, **recipe: Any) -> Group:
    return Group.model_validate({"selector": selector, "recipe": recipe})


def test_what_is_left_out_is_as_in_the_plans_recipe() -> None:
    assert GroupRecipe().complete(PLANS) == PLANS
    own = GroupRecipe(method="wanda", refit=False, pattern="1:4", statistics="dense")
    assert own.complete(PLANS) == PLANS.model_copy(
        update={"method": "wanda", "refit": False, "pattern": "1:4", "statistics": "dense"}
    )
    assert GroupRecipe(method="wanda").complete(PLANS).statistics == "sequential", "the plan's, not its authors'"
    mixed = GroupRecipe.model_validate({"mix": {"code": 3, "prose": 1}})
    assert mixed.complete(PLANS).mix == (("code", 0.75), ("prose", 0.25))


def test_what_differs_alone_is_written() -> None:
    written = group("*.v_proj", method="wanda", refit=False, mix={"code": 2}).model_dump()
    assert written == {"selector": "*.v_proj", "recipe": {"method": "wanda", "refit": False, "mix": {"code": 1.0}}}
    assert Group.model_validate(written).model_dump() == written
    assert (
        group("*").model_dump() == group("*", method=None, pattern="").model_dump() == {"selector": "*", "recipe": {}}
    )


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({"allocation": "kappa", "polish": True}, "allocation and polish cannot differ by group; say it in the plan's"),
        ({"strength": 0.5}, "strength cannot differ by group; say it in the plan's recipe"),
        ({"curves": "mask"}, "curves cannot differ by group"),
        ({"pattern": "4:2"}, "pattern '4:2' is not N:M with 0 < N < M, such as 2:4"),
        ({"refit_steps": 11}, "less than or equal to 10"),
        ({"method": "magic"}, "Input should be 'magnitude'"),
        ({"other": 1}, "Extra inputs are not permitted"),
    ],
)
def test_what_may_not_differ_is_refused(recipe: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence) as refusal:
        group("*", **recipe)
    assert len(refusal.value.errors()) == 1


def test_the_first_group_that_names_a_layer_counts() -> None:
    groups = [group("blocks 0"), group("*.v_proj", method="wanda"), group("blocks 0-1 · *_proj", method="magnitude")]
    found = assign_groups(groups, LAYERS)
    assert list(found) == [x.name for x in LAYERS if x.block < 2 or x.kind.endswith("v_proj")], "in the model's order"
    for layer in LAYERS:
        place = 0 if layer.block == 0 else 1 if layer.kind.endswith("v_proj") else 2
        assert found.get(layer.name) is (groups[place] if layer.name in found else None)
    assert assign_groups([], LAYERS) == {}


@pytest.mark.parametrize(
    ("selectors", "sentence"),
    [
        (
            ["*.k_proj"],
            r"selector '\*\.k_proj' means no layer; layers are named like 'model.layers.0.self_attn.q_proj'",
        ),
        (["blocks 0-1", "blocks 1 · *.v_proj"], r"group 'blocks 1 · \*\.v_proj' has no layer: those before it have th"),
        (
            ["blocks 0", "*"],
            r"groups take every layer, so that the plan's recipe counts for none; leave one of them ou",
        ),
    ],
)
def test_groups_that_are_none_are_refused(selectors: list[str], sentence: str) -> None:
    with pytest.raises(ImpossiblePlan, match=f"^{sentence}"):
        assign_groups([group(selector) for selector in selectors], LAYERS)


def test_a_group_in_words() -> None:
    told = {
        "wanda+refit in *.v_proj": group(" *.v_proj", method="wanda"),
        "wanda+refit~dense in *.v_proj": group("*.v_proj", method="wanda", statistics="dense"),
        "refit3~clipped~sequential 2:4 in blocks 0 · *.q_proj": group(
            "blocks  0 · *.q_proj", refit_steps=3, pattern="2:4"
        ),
        f"refit~sequential in {'x' * 39}…": group("x" * 50, gamma="plain"),
    }
    assert [describe_group(one, PLANS) for one in told.values()] == list(told)
    assert name_work(PLANS, []) == PLANS.work_label
    assert name_work(PLANS, list(told.values())[1:3]) == (
        "refit~clipped~sequential [*.v_proj: wanda+refit~dense] [blocks 0 · *.q_proj: refit3~clipped~sequential 2:4]"
    )
    same = [group("*.v_proj", method="wanda", refit=True, refit_steps=9), group(" *.v_proj ", method="wanda")]
    assert identify_group(same[0], PLANS) == identify_group(same[1], PLANS)
    assert len({str(identify_group(one, PLANS)) for one in (*told.values(), group("*.v_proj", pattern="2:4"))}) == 5


def test_one_text_for_all_that_is_pruned_in_order_and_one_for_a_polish() -> None:
    dense, staged = parse_recipe("refit~half"), parse_recipe("refit~quarter~sequential")
    refuse_two_walks([PLANS, dense])
    with pytest.raises(ImpossiblePlan, match=r"^statistics behind .* and not of 'run' and '~quarter'$"):
        refuse_two_walks([PLANS, dense, staged])
    code = Recipe.model_validate({"mix": {"code": 1}})
    refuse_two_polishes(Recipe(), [code])
    refuse_two_polishes(Recipe(polish=True), [Recipe(polish=True, method="wanda")])
    for other in (code, dense):
        line = "^a polish of all layers is on one text; leave polish out, or mix out of groups$"
        with pytest.raises(ImpossiblePlan, match=line):
            refuse_two_polishes(Recipe(polish=True), [Recipe(polish=True), other])
