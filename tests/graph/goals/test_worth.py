"""Which other weights of texts a run's own are compared with, and what is foreseen of it."""

from types import SimpleNamespace
from typing import Any

import pytest

from graph.config import RunConfig
from graph.goals.choose import find_shares, list_other_weights, weigh_otherwise
from graph.planning.foresee import foresee_course
from graph.planning.plan import Plan
from graph.state import State
from tools.plans.groups import Group, GroupRecipe
from tools.plans.mix import read_mix
from tools.plans.recipe import parse_recipe

TEXTS = {name: f"file:{name}.txt" for name in ("code", "prose", "french")}


@pytest.mark.parametrize(
    ("weights", "others"),
    [
        ({"code": 2, "prose": 1, "french": 1}, [{"code": 1, "prose": 1, "french": 1}, {"prose": 0.5, "french": 0.5}]),
        ({"code": 1, "prose": 0, "french": 0}, [{"code": 1, "prose": 1, "french": 1}, {"prose": 0.5, "french": 0.5}]),
        ({"code": 0, "prose": 3, "french": 1}, [{"code": 1, "prose": 1, "french": 1}, {"french": 1}]),
        ({}, [{"prose": 0.5, "french": 0.5}]),
    ],
)
def test_all_alike_and_the_heaviest_left_out(weights: dict[str, float], others: list[dict[str, float]]) -> None:
    config = RunConfig(text=TEXTS, text_weights=weights)
    found = list_other_weights(find_shares(config, Plan(sparsity=0.4)))
    assert [dict(mix) for mix in found] == [
        {name: pytest.approx(weight / sum(other.values()), abs=1e-4) for name, weight in other.items()}
        for other in others
    ]


def test_texts_written_for_plans_count_nothing_in_other_weights_either() -> None:
    config = RunConfig(text=TEXTS, text_weights={"code": 3, "prose": 1, "french": 0})
    alike, without = list_other_weights(config.text_shares, ["french"])
    assert dict(alike) == {"code": 0.5, "prose": 0.5} and dict(without) == {"prose": 1}


def test_a_plan_with_a_mix_of_its_own_is_compared_with_others_than_that() -> None:
    config = RunConfig(text=TEXTS, text_weights={"code": 9, "prose": 1, "french": 0})
    shares = find_shares(config, Plan(sparsity=0.4, recipe=parse_recipe("refit~0.25code~0.75prose:kappa-mask")))
    assert shares == {"code": 0.25, "prose": 0.75, "french": 0}
    alike, without = list_other_weights(shares, ["french"])
    assert dict(alike) == {"code": 0.5, "prose": 0.5} and dict(without) == {"code": 1}
    even = find_shares(config, Plan(sparsity=0.4, recipe=parse_recipe("refit~0.5code~0.5prose:kappa-mask")))
    assert [dict(mix) for mix in list_other_weights(even, ["french"])] == [{"prose": 1}], "never with itself"


def test_one_text_has_no_other_weights() -> None:
    assert list_other_weights(RunConfig(text={"code": "pydoc"}).text_shares) == []


def test_two_more_rounds_are_foreseen_where_they_are_asked_for() -> None:
    config = RunConfig(text=TEXTS)
    course = foresee_course(config.model_copy(update={"check_weights": True}))
    plain = foresee_course(config)
    *rounds, baseline = plain.recipes
    assert list(course.recipes) == [*rounds, rounds[-1], rounds[-1], baseline]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (None, "of no plan that was accepted last"),
        (
            Plan(sparsity=0.4, groups=[Group(selector="*.v_proj", recipe=GroupRecipe(mix=read_mix({"code": 1})))]),
            "fitted by other weights in some of its layers",
        ),
    ],
)
def test_what_no_weights_made_is_compared_with_nothing(plan: Plan | None, said: str) -> None:
    warned: list[str] = []
    session: Any = SimpleNamespace(warn=warned.append)
    bench: Any = None
    config = RunConfig(text=TEXTS, check_weights=True)
    assert weigh_otherwise(bench, State(config=config, accepted_plan=plan), session) == []
    line = f"the model that is kept is {said}, so that weights of texts are not compared"
    assert warned == [line]
    assert weigh_otherwise(bench, State(config=RunConfig(), accepted_plan=plan), session) == [] and len(warned) == 1
