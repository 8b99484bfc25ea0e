"""Mixtures of named texts in recipes: one form for one mixture, told and read by labels."""

import json

import pytest
from pydantic import ValidationError

from tools.plans.mix import label_mix, parse_mix, read_mix
from tools.plans.recipe import Recipe, parse_recipe


def test_a_mixture_has_one_form() -> None:
    same = [
        {"prose": 3, "code": 7},
        {"code": 0.7, "prose": 0.3},
        [("code", 0.7), ("prose", 0.3)],
        {"a": 0, "code": 7, "prose": 3},
    ]
    assert {read_mix(mix) for mix in same} == {(("code", 0.7), ("prose", 0.3))}
    thirds = read_mix({"a": 1, "b": 1, "c": 1})
    assert thirds == (("a", 0.3333), ("b", 0.3333), ("c", 0.3333)) == read_mix(dict(thirds))
    odd = read_mix({"a": 1, "b": 2, "c": 4.7})
    assert odd == read_mix(dict(odd)) == read_mix(parse_mix(label_mix(odd)))
    assert read_mix({}) == read_mix(None) == read_mix({"code": 0}) == ()


def test_a_recipe_tells_its_mixture_and_reads_it_again() -> None:
    recipe = Recipe.model_validate(
        {"mix": {"code": 7, "prose": 3}, "refit": False, "statistics": "sequential", "curves": "mask"}
    )
    assert recipe.label == "refit~0.7code~0.3prose~sequential:kappa-mask" and parse_recipe(recipe.label) == recipe
    assert json.loads(recipe.model_dump_json())["mix"] == {"code": 0.7, "prose": 0.3}
    assert Recipe.model_validate(recipe.model_dump()) == recipe and hash(recipe) == hash(parse_recipe(recipe.label))
    assert recipe.within_layers().mix == recipe.mix
    for label in (
        "wanda~1code:uniform",
        "two-sided+refit~clipped~0.5a1~0.5b_2:kappa@0.8",
        "refit10~0.1a~0.9b+polish640:kappa",
    ):
        assert parse_recipe(label).label == label


def test_without_a_mixture_recipes_are_called_what_they_were() -> None:
    assert "mix" not in Recipe().model_dump() and "mix" not in Recipe.model_json_schema()["properties"]
    assert parse_recipe("refit:kappa") == Recipe(refit=False) and Recipe(mix={}) == Recipe()


@pytest.mark.parametrize("mix", [{"code": -1}, {"code": "x"}, {"code": float("inf")}, {"Code": 1}, [0.7, 0.3], [[1]]])
def test_bad_mixtures_are_refused(mix: object) -> None:
    with pytest.raises(ValidationError, match="mix"):
        Recipe.model_validate({"mix": mix})


def test_a_text_twice_in_a_label_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a text stands in '~0\.5a~0\.5a' twice"):
        parse_recipe("refit~0.5a~0.5a:kappa")
