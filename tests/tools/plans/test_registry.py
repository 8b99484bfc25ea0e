"""How choices are told of."""

from typing import NamedTuple

from tools.plans.methods import LEVERS, METHODS
from tools.plans.recipe import Recipe, describe_named, list_named
from tools.plans.rules import RULES


class Made(NamedTuple):
    """A choice made up."""

    name: str
    sentence: str


CHOICES = Made("a", "|W| * a"), Made("b", "the same"), Made("c", "the same"), Made("d", "other")


def test_neighbours_that_do_the_same_are_told_of_together() -> None:
    assert describe_named(CHOICES) == "a: |W| * a. b, c: the same. d: other."
    assert list_named("CHOICE", CHOICES) == [
        *("| CHOICE | |", "|---|---|", r"| `a` | \|W\| \* a |", "| `b`, `c` | the same |", "| `d` | other |")
    ]


def test_planners_are_told_of_every_rule_and_of_the_methods_that_are_levers() -> None:
    schema = Recipe.model_json_schema()["properties"]
    for field, registry in (("method", LEVERS), ("allocation", RULES)):
        assert schema[field]["enum"] == list(registry)
        assert schema[field]["description"].startswith(describe_named(registry.values()))


def test_opponents_are_no_levers_but_can_be_asked_for() -> None:
    assert {*METHODS} - {*LEVERS} == {"alps"}
    assert not any(method.ours for method in METHODS.values() if not method.lever)
    assert Recipe.model_validate({"method": "alps"}).method == "alps"
