"""What a planner knows of trials: how each compares with what was kept then."""

from types import SimpleNamespace
from typing import Any

import pytest

from graph.planning.situation import _compare_trials
from tests.situations import make_trial
from tools.plans.recipe import Recipe
from tools.results.losses import Evaluation

RECIPE = Recipe(method="refit", curves="mask", strength=0.8)


def test_trials_before_what_is_kept_are_compared_with_it_where_losses_are_on_disk() -> None:
    def losses(*kl: float) -> Evaluation:
        return Evaluation(nll=list(kl), kl=list(kl))

    known = {"1": losses(0.3, 0.5), "2": losses(0.25, 0.4), "3": losses(0.2, 0.3), "5": losses(0.1, 0.1)}
    bench: Any = SimpleNamespace(evaluator=SimpleNamespace(read_validation=known.get))
    sparsities, verdicts = (0.3, 0.45, 0.45, 0.45, 0.45), ("accept", "accept", "accept", "rollback", "rollback")
    trials = [make_trial(i + 1, *told, RECIPE) for i, told in enumerate(zip(verdicts, sparsities, strict=True))]
    assert _compare_trials(bench, trials) == {2: pytest.approx((0.075, 0.025))}, "the first has another sparsity"
    known.pop("3")
    assert _compare_trials(bench, trials) == _compare_trials(bench, []) == {}
