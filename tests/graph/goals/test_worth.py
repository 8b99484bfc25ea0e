"""Which other weights of texts a run's own are compared with, and what is foreseen of it."""

import pytest

from graph.config import RunConfig
from graph.goals.worth import list_other_weights
from graph.planning.foresee import foresee_course

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
    found = list_other_weights(RunConfig(text=TEXTS, text_weights=weights))
    assert [dict(mix) for mix in found] == [
        {name: pytest.approx(weight / sum(other.values()), abs=1e-4) for name, weight in other.items()}
        for other in others
    ]


def test_one_text_has_no_other_weights() -> None:
    assert list_other_weights(RunConfig(text={"code": "pydoc"})) == []


def test_two_more_rounds_are_foreseen_where_they_are_asked_for() -> None:
    config = RunConfig(text=TEXTS)
    course = foresee_course(config.model_copy(update={"check_weights": True}))
    assert course.reweighted == [course.rounds[-1]] * 2 and foresee_course(config).reweighted == []
