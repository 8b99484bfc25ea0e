"""What a plan may and may not ask for."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from tools.base.errors import ImpossiblePlan
from tools.plans.methods import LEVERS, METHODS, name_sequential
from tools.plans.pattern import count_pattern_zeros, parse_pattern
from tools.plans.recipe import Adjustment, Recipe, parse_recipe
from tools.plans.work_order import order_all


@pytest.mark.parametrize(
    ("recipe", "mask", "label"),
    [
        (Recipe(), "refit", "refit:kappa"),
        (Recipe(method="two-sided"), "two-sided+refit", "two-sided+refit:kappa"),
        (Recipe(strength=0.8), "refit", "refit:kappa@0.8"),
        (Recipe(curves="mask", strength=0.8), "refit", "refit:kappa-mask@0.8"),
        (
            Recipe(gamma="clipped", statistics="sequential"),
            "refit~clipped~sequential",
            "refit~clipped~sequential:kappa",
        ),
        (Recipe(method="wanda", refit=False, allocation="uniform"), "wanda", "wanda:uniform"),
        (Recipe(method="sparsegpt"), "sparsegpt+refit", "sparsegpt+refit:kappa"),
        (Recipe(allocation="uniform", strength=0.5), "refit", "refit:uniform"),
        (Recipe(method="sparsegpt", refit=False, allocation="owl"), "sparsegpt", "sparsegpt:owl"),
        (Recipe(allocation="owl", strength=0.5), "refit", "refit:owl@0.5"),
        (Recipe(refit_steps=3), "refit3", "refit3:kappa"),
        (Recipe(refit_steps=10, gamma="clipped", strength=0.8), "refit10~clipped", "refit10~clipped:kappa@0.8"),
        (Recipe(refit_steps=5), "refit", "refit:kappa"),
        (Recipe(method="wanda", refit_steps=3), "wanda+refit", "wanda+refit:kappa"),
        (Recipe(allocation="alphapruning", strength=0), "refit", "refit:alphapruning@0"),
        (Recipe(method="wanda", statistics="sequential"), "wanda+refit", "wanda+refit:kappa"),
        (Recipe(method="wanda", statistics="dense"), "wanda+refit~dense", "wanda+refit~dense:kappa"),
        (
            Recipe(method="sparsegpt", refit=False, mix={"run": 1, "questions": 1}, statistics="dense"),
            "sparsegpt~half~dense",
            "sparsegpt~half~dense:kappa",
        ),
        (Recipe(statistics="dense"), "refit", "refit:kappa"),
        (
            Recipe(gamma="clipped", mix={"run": 0.75, "questions": 0.25}, statistics="sequential"),
            "refit~clipped~quarter~sequential",
            "refit~clipped~quarter~sequential:kappa",
        ),
        (Recipe(mix={"questions": 1, "run": 4}), "refit~0.2questions~0.8run", "refit~0.2questions~0.8run:kappa"),
        (Recipe(damping=0.3), "refit~damped0.3", "refit~damped0.3:kappa"),
        (Recipe(method="wanda", damping=10), "wanda+refit~damped10", "wanda+refit~damped10:kappa"),
        (Recipe(method="sparsegpt", refit=False, damping=1), "sparsegpt", "sparsegpt:kappa"),
        (
            Recipe(gamma="clipped", damping=0.05, mix={"a": 1}),
            "refit~clipped~damped0.05~1a",
            "refit~clipped~damped0.05~1a:kappa",
        ),
        (Recipe(statistics="sequential"), "refit~sequential", "refit~sequential:kappa"),
    ],
)
def test_labels(recipe: Recipe, mask: str, label: str) -> None:
    assert (recipe.mask_label, recipe.label) == (mask, label)
    assert parse_recipe(label).label == label
    assert parse_recipe(label).statistics == recipe.statistics


@pytest.mark.parametrize(
    ("label", "tokens", "work"),
    [
        ("refit+polish25000:kappa", 25_000, "refit+polish25000"),
        ("refit+polish:kappa-mask", 4096, "refit+polish"),
        ("two-sided+refit~clipped~sequential+polish:uniform", 4096, "two-sided+refit~clipped~sequential+polish"),
        ("wanda~dense+polish64:uniform", 64, "wanda~dense+polish64"),
    ],
)
def test_a_polish_is_the_last_part_of_what_is_done_and_no_part_of_what_is_done_within_layers(
    label: str, tokens: int, work: str
) -> None:
    recipe = parse_recipe(label)
    plain = recipe.model_copy(update={"polish": False, "polish_tokens": 0})
    assert recipe.label == label and recipe.work_label == work and recipe.count_polish(4096) == tokens
    assert recipe.within_layers() == plain.within_layers()
    assert (recipe.mask_label, recipe.needs_curves) == (plain.mask_label, plain.needs_curves)
    assert recipe.label != plain.label and Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_without_a_polish_a_recipe_is_written_and_described_as_ever() -> None:
    recipe = parse_recipe("refit:kappa")
    assert recipe.count_polish(4096) == 0 and not any("polish" in field for field in recipe.model_dump())
    assert "polish" not in str(Recipe.model_json_schema())
    with pytest.raises(ImpossiblePlan) as refused:
        parse_recipe("refit+polish:kappa").count_polish(0)
    assert str(refused.value) == (
        "recipe 'refit+polish:kappa' polishes, on no tokens; give --polish-tokens, or write +polish25000"
    )
    with pytest.raises(ValidationError, match="polish_tokens 64 are for a recipe with polish"):
        Recipe(polish_tokens=64)


@pytest.mark.parametrize(
    ("given", "label"),
    [
        ("refit~sequential~damped0.3:uniform", "refit~damped0.3~sequential:uniform"),
        ("refit10+polish64~sequential~clipped:kappa@0.8", "refit10~clipped~sequential+polish64:kappa@0.8"),
        ("wanda~0.7code~0.3prose+refit", "wanda+refit~0.7code~0.3prose:uniform"),
        ("wanda~dense~half+refit", "wanda+refit~half~dense:uniform"),
        ("wanda~0.25questions~0.75run", "wanda~quarter:uniform"),
    ],
)
def test_marks_may_be_given_in_any_order(given: str, label: str) -> None:
    assert parse_recipe(given) == parse_recipe(label) and parse_recipe(given).label == label


@pytest.mark.parametrize(
    "label",
    [
        *("refit~half~quarter:kappa", "refit~half~1code", "refit~clipped~clipped:kappa"),
        *("refit~dense~sequential", "refit~fast:kappa", "refit~"),
    ],
)
def test_marks_that_there_are_not_and_those_given_twice_are_refused(label: str) -> None:
    with pytest.raises(ValueError, match=rf"recipe '{label}' is not of the form METHOD"):
        parse_recipe(label)


@pytest.mark.parametrize(
    ("label", "statistics"),
    [
        ("wanda:owl", "sequential"),
        ("sparsegpt:uniform", "sequential"),
        ("two-sided+refit~clipped:kappa-mask", "dense"),
        ("sparsegpt~dense:uniform", "dense"),
        ("magnitude:uniform", "dense"),
        ("refit3:kappa", "dense"),
        ("refit3~sequential:kappa", "sequential"),
    ],
)
def test_statistics_without_a_mark_are_those_that_a_methods_authors_take(label: str, statistics: str) -> None:
    recipe = parse_recipe(label)
    assert (recipe.statistics, recipe.label) == (statistics, label)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_plan_that_leaves_statistics_out_gets_its_methods_own() -> None:
    taken = {name: Recipe.model_validate({"method": name}).statistics for name in METHODS}
    assert taken == {name: "sequential" if name in ("wanda", "sparsegpt", "alps") else "dense" for name in METHODS}
    assert Recipe.model_validate({}).statistics == "dense"
    schema = Recipe.model_json_schema()["properties"]["statistics"]
    assert "default" not in schema and schema["description"].endswith(
        "Left out: sequential for wanda and sparsegpt, as published, else dense."
    )
    assert name_sequential(LEVERS.values()) == "wanda and sparsegpt"
    assert name_sequential(METHODS.values()) == "wanda, alps and sparsegpt"


def test_the_method_refit_is_not_refitted_once_more() -> None:
    assert not Recipe(method="refit").refits_after
    assert Recipe(method="refit", refit=False).refits
    assert Recipe(method="wanda").refits_after
    assert not Recipe(method="wanda", refit=False).refits


def test_a_recipe_is_a_value() -> None:
    assert Recipe() == Recipe(method="refit") and hash(Recipe()) == hash(Recipe())
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().strength = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"strength": 1.01}, "less than or equal to 1"),
        ({"strength": -0.1}, "greater than or equal to 0"),
        ({"strength": float("nan")}, "strength"),
        ({"method": "random"}, "'two-sided-obs' or 'refit'"),
        ({"allocation": "evopress"}, "'kappa', 'uniform', 'owl' or 'alphapruning'"),
        ({"gamma_clip": 10}, "Extra inputs are not permitted"),
    ],
)
def test_recipes_that_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Recipe.model_validate(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "factor", "factor": 2},
        {"action": "bounds", "low": 0.1},
        {"action": "bounds", "high": 0.1},
        {"action": "bounds", "low": 0.1, "high": 0.1, "reason": "x" * 500},
        {"action": "protect"},
    ],
)
def test_adjustments_that_make_sense(fields: dict[str, Any]) -> None:
    Adjustment.model_validate({"selector": "*", **fields})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"action": "factor"}, "action 'factor' needs a factor"),
        ({"action": "factor", "low": 0.3}, "action 'factor' needs a factor"),
        ({"action": "bounds", "factor": 2}, "action 'bounds' needs low or high"),
        ({"action": "bounds", "low": 0.6, "high": 0.5}, "low 0.6 is above high 0.5"),
        ({"action": "bounds", "high": 45}, "less than or equal to 1"),
        ({"action": "factor", "factor": 0}, "greater than or equal to 0.05"),
        ({"action": "factor", "factor": float("nan")}, "factor"),
        ({"action": "factor", "factor": float("inf")}, "less than or equal to 20"),
        ({"action": "drop"}, "'factor', 'bounds' or 'protect'"),
        ({"action": "protect", "selector": ""}, "at least 1 character"),
        ({"action": "protect", "selector": "x" * 201}, "at most 200 characters"),
        ({"action": "protect", "reason": "x" * 501}, "at most 500 characters"),
        ({"action": "protect", "strength": 1}, "Extra inputs are not permitted"),
    ],
)
def test_adjustments_that_are_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Adjustment.model_validate({"selector": "*", **fields})


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ("", "recipe '' is not of the form METHOD[+refit]:ALLOCATION, such as refit:kappa"),
        ("refit:kappa:owl", "is not of the form"),
        ("obs:kappa", "recipe 'obs:kappa': method: input should be 'magnitude'"),
        ("wanda:greedy", "recipe 'wanda:greedy': allocation: input should be 'kappa'"),
        ("refit11:kappa", "recipe 'refit11:kappa': refit_steps: input should be less than or equal to 10"),
        ("refit~damped11:kappa", "damping: input should be less than or equal to 10"),
        ("refit~damped1.2.3:kappa", "damping: input should be a valid number"),
        ("refit0:kappa", "refit_steps: input should be greater than or equal to 1"),
        ("wanda3:kappa", "is not of the form"),
        ("wanda:by-depth", "recipe 'wanda:by-depth': allocation: input should be"),  # hyphens are no other form
        ("two-sided+refit3:kappa", "is not of the form"),
        ("wanda:owl@2", "recipe 'wanda:owl@2': strength: input should be less than or equal to 1"),
    ],
)
def test_labels_that_are_refused(label: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_recipe(label)


def test_only_another_change_of_the_weights_needs_curves_of_its_own() -> None:
    assert parse_recipe("refit:kappa").needs_curves
    assert parse_recipe("wanda:kappa").needs_curves
    assert not parse_recipe("two-sided:kappa").needs_curves, "the profile has these"
    assert not parse_recipe("refit:kappa-mask").needs_curves
    assert not parse_recipe("refit:owl").needs_curves
    assert not parse_recipe("refit:kappa").model_copy(update={"pattern": "2:4"}).needs_curves


def test_a_pattern_names_the_zeros_first() -> None:
    assert parse_pattern("2:4") == (2, 4)
    assert parse_pattern("1:4") == (1, 4)
    assert parse_pattern("16:32") == (16, 32)


@pytest.mark.parametrize("text", ["", "4", "2:4:8", "2/4", "0:4", "4:4", "5:4", "-1:4", "2:4 ", "2:4\n", "٢:4", "a:b"])
def test_what_is_no_pattern_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not N:M with 0 < N < M, such as 2:4$") as error:
        parse_pattern(text)
    assert len(str(error.value).splitlines()) == 1


def test_patterns() -> None:
    assert Recipe(pattern="2:4").group == (2, 4)
    assert Recipe().group is None
    assert count_pattern_zeros(64 * 48, (3, 8)) == 64 * 48 * 3 // 8
    for text in ("4:2", "2:2", "0:4", "2/4", "a:b"):
        with pytest.raises(ValidationError, match=f"pattern '{text}' is not N:M with 0 < N < M, such as 2:4"):
            Recipe(pattern=text)


def test_the_part_within_layers_leaves_the_allocation_out() -> None:
    recipe = parse_recipe("two-sided+refit~clipped:owl@0.5")
    assert recipe.within_layers() == parse_recipe("two-sided+refit~clipped:kappa")
    assert Recipe(method="refit", refit=True).within_layers() == Recipe(method="refit", refit=False).within_layers()


def test_a_clipped_gamma_counts_where_outputs_are_weighed() -> None:
    weighing = {name for name in METHODS if Recipe(method=name, gamma="clipped").clips}
    assert weighing == {"two-sided", "two-sided-obs", "refit"}
    for name in METHODS.keys() - weighing:
        clipped, plain = (Recipe(method=name, refit=True, gamma=gamma) for gamma in ("clipped", "plain"))
        assert clipped.within_layers() == plain.within_layers() and clipped.label == plain.label


def test_steps_count_for_the_method_refit_alone() -> None:
    assert parse_recipe("refit3:owl").within_layers() == Recipe(refit=False, refit_steps=3)
    assert Recipe(method="wanda", refit_steps=3).within_layers() == Recipe(method="wanda").within_layers()


def test_damping_counts_where_survivors_are_fitted_alone_and_to_what_a_label_tells() -> None:
    assert parse_recipe("wanda+refit~damped0.3:owl").within_layers().fit_damping == 0.3
    assert parse_recipe("wanda~damped0.3:owl").within_layers() == parse_recipe("wanda").within_layers()
    assert Recipe(damping=1e-7) == Recipe() and Recipe(damping=2 / 3).label == "refit~damped0.667:kappa"


def test_recipes_and_orders_on_disk() -> None:
    assert Recipe().model_dump() == {
        **{"method": "refit", "refit_steps": 5, "refit": True, "allocation": "kappa", "strength": 1.0},
        **{"gamma": "plain", "curves": "method", "statistics": "dense", "pattern": ""},
    }
    order = order_all(parse_recipe("refit~sequential:kappa"), {"q": 3, "k": 4}, sparsity=0.5, predicted_kl=0.1)
    assert order.id.startswith("5eb8ceeb59d3")
    marked = Recipe(damping=0.3)
    assert Recipe.model_validate_json(marked.model_dump_json()) == marked
