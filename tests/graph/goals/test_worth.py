"""Which other weights of texts a run's own are compared with, and what is foreseen of it."""

from types import SimpleNamespace
from typing import Any

import pytest

from graph.config import RunConfig
from graph.goals.worth import list_other_weights, weigh_otherwise
from graph.planning.foresee import foresee_course
from graph.planning.plan import Plan
from graph.state import State
from tools.plans.graft import Graft

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


def test_texts_written_for_plans_count_nothing_in_other_weights_either() -> None:
    config = RunConfig(text=TEXTS, text_weights={"code": 3, "prose": 1, "french": 0})
    alike, without = list_other_weights(config, ["french"])
    assert dict(alike) == {"code": 0.5, "prose": 0.5} and dict(without) == {"prose": 1}


def test_one_text_has_no_other_weights() -> None:
    assert list_other_weights(RunConfig(text={"code": "pydoc"})) == []


def test_two_more_rounds_are_foreseen_where_they_are_asked_for() -> None:
    config = RunConfig(text=TEXTS)
    course = foresee_course(config.model_copy(update={"check_weights": True}))
    assert course.reweighted == [course.rounds[-1]] * 2 and foresee_course(config).reweighted == []


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (None, "of no plan that was accepted last"),
        (Plan(sparsity=0.4, reason="", graft=Graft(selector="*.v_proj", of=1, rest=2)), "a graft"),
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
