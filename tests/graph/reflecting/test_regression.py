"""Which groups trials blame, all together."""

import math
from typing import Any

import numpy as np
import pytest

from graph.reflecting.posterior import HEARD, MOSTLY, SPREAD, TRANSFER, find_mover, fit_factors, merge_lessons
from graph.reflecting.schema import MOST, Lesson
from tests.evidence import find_multipliers
from tests.situations import make_layers, make_lesson
from tools.plans.layer_profile import group_layers
from tools.plans.recipe import Recipe

LAYERS = make_layers()
GROUPS = list(group_layers(LAYERS))
ONE, OTHER, THIRD = GROUPS[:3]
REFIT = Recipe(method="refit", curves="mask")


def make_trial(moved: dict[str, float], surprise: float, error: float | None = 0.0, recipe: str = "refit") -> Lesson:
    """What a trial taught that was predicted to change the groups' KL by so much, and changed it by more."""
    predicted = sum(moved.values())
    figures = {"predicted": predicted, "measured": predicted + surprise, "moved": moved, "error": error}
    return make_lesson("*", 1.0, recipe).model_copy(update=figures)


def fit(*trials: Lesson, weight: float = 1.0) -> dict[str, Any]:
    found = fit_factors([(trial, weight) for trial in trials])
    return {group: pytest.approx((blame.factor, blame.evidence)) for group, blame in found.items()}


def test_known_factors_are_recovered() -> None:
    draws = np.random.default_rng(0)
    factors = dict(zip(GROUPS, [0.6, 1.0, 1.8, 1.0, 0.8, 1.3, 1.0, 1.5, 1.1], strict=True))
    trials = []
    for _ in range(400):
        moved = {group: float(draws.normal()) for group in GROUPS}
        surprise = sum((factors[group] - 1) * change for group, change in moved.items())
        trials.append((make_trial(moved, surprise), 1.0))
    found = fit_factors(trials)
    assert {group: round(blame.factor, 1) for group, blame in found.items()} == factors
    assert all(30 < blame.evidence < 60 for blame in found.values()), "400 trials over nine groups"
    assert fit_factors(trials[:1]) == {}, "nine groups that moved at once"


def test_what_moved_alone_takes_the_surprise_and_counts_as_one_observation() -> None:
    assert fit(make_trial({ONE: 0.02}, 0.01)) == {ONE: (1.5, 1.0)}
    assert fit(make_trial({ONE: -0.02}, 0.01)) == {ONE: (0.5, 1.0)}
    assert fit(*[make_trial({ONE: 0.02}, 0.01)] * 3) == {ONE: (1.5, 3.0)}
    assert fit(make_trial({ONE: 0.02}, 0.01), weight=TRANSFER) == {ONE: (1.5, TRANSFER)}
    assert fit(make_trial({ONE: 0.02}, 0.01, error=None)) == {ONE: (1.5, 0.5)}
    noisy = 0.02 * SPREAD
    assert fit(make_trial({ONE: 0.02}, 2.001 * noisy, error=noisy)) == {ONE: (2.0005, 0.5)}
    assert fit(make_trial({ONE: 0.02}, 1.999 * noisy, error=noisy)) == {ONE: (1.0, 0.5)}, "inside the noise"
    assert fit(make_trial({ONE: 0.02}, 0.2, error=0.02)) == {}, "too noisy to say anything"


def test_groups_that_moved_together_are_told_apart_by_another_trial() -> None:
    together, apart = make_trial({ONE: 0.02, OTHER: 0.02}, 0.01), make_trial({ONE: 0.02, OTHER: -0.02}, 0.01)
    assert fit(together) == {}
    assert fit(together, apart) == {ONE: (1.5, 1.0), OTHER: (1.0, 1.0)}
    assert fit() == {}


def test_a_mover_has_most_of_all_that_moved() -> None:
    rest = math.sqrt(1 / MOSTLY - 1)
    assert find_mover({ONE: -1.0, OTHER: rest - 1e-9}) == ONE
    assert find_mover({ONE: -1.0, OTHER: rest + 1e-9}) is None
    assert find_mover({ONE: 1.0, **dict.fromkeys(GROUPS[1:], -1 / 8)}) == ONE, (
        "what it gained is spread over all others"
    )
    assert find_mover({ONE: 0.0}) is find_mover({}) is None
    explained = fit_factors([(make_trial({ONE: -1.0, OTHER: rest - 1e-9}, 0.1), 1.0)])
    assert explained[ONE].evidence == pytest.approx(HEARD / (1 - HEARD)) and list(explained) == [ONE]


def multiply(*lessons: Lesson) -> dict[str, float]:
    return find_multipliers(lessons, LAYERS, REFIT, 0.45, "pydoc")


def test_factors_of_trials_are_shrunk_bounded_and_merged_with_what_else_is_known() -> None:
    alone = make_trial({ONE: 0.02}, 0.01)
    assert multiply(alone) == {ONE: round(1.5**0.5, 3)}
    assert multiply(alone, alone) == {ONE: round(1.5 ** (2 / 3), 3)}
    assert multiply(make_trial({ONE: 0.02}, 9.0)) == {ONE: round(MOST**0.5, 3)}
    assert multiply(make_trial({ONE: 0.02}, -9.0)) == {ONE: round(MOST**-0.5, 3)}
    assert multiply(alone, make_lesson(ONE, 1.5)) == {ONE: round(1.5 ** (2 / 3), 3)}
    assert multiply(make_trial({ONE: 0.02}, 0.01, recipe="wanda")) == {ONE: round(1.5 ** (1 / 3), 3)}
    assert multiply(make_trial({"blocks 7-9 · mlp.down_proj": 0.02}, 0.01)) == {}, "no layer of this model"
    assert multiply(alone.model_copy(update={"same_config": True})) == {}


def test_counter_lessons_cancel() -> None:
    more, less = make_trial({ONE: 0.02, THIRD: -0.002}, 0.01), make_trial({ONE: 0.02, THIRD: -0.002}, -0.01)
    assert list(multiply(more)) == [ONE] and multiply(more, less) == {}


def test_trials_stay_by_themselves_among_lessons_and_are_never_counted_twice() -> None:
    first = make_trial({ONE: 0.02}, 0.01)
    second = first.model_copy(update={"iteration": 2})
    assert merge_lessons([first, second, first]) == [second, first]
    assert Lesson.model_validate_json(first.model_dump_json()) == first
    assert not {"moved", "error"} & set(make_lesson(ONE, 1.5).model_dump())
