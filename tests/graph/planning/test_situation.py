"""What a planner knows of trials: those of earlier versions are known by what their checkpoints were made of."""

from types import SimpleNamespace
from typing import Any

import pytest

from graph.planning.orders import resolve
from graph.planning.plan import Plan
from graph.planning.situation import _compare_trials, identify_trial
from tests.situations import make_layers, make_situation, make_trial
from tools.base.errors import DamagedArtifact
from tools.plans.recipe import Recipe
from tools.results.losses import Evaluation

RECIPE = Recipe(method="refit", curves="mask", strength=0.8)


def make_bench(zeros: dict[str, int]) -> Any:
    """A workbench that knows one checkpoint."""
    return SimpleNamespace(read_checkpoint=lambda _: {name: SimpleNamespace(zeros=n) for name, n in zeros.items()})


def test_the_order_of_an_old_trial_is_what_its_checkpoint_was_made_of() -> None:
    old, situation = make_trial(1, "rollback", 0.45, RECIPE), make_situation()
    plan = Plan(sparsity=0.45, recipe=RECIPE)
    order = resolve(plan, make_layers(), situation.config)
    known = identify_trial(make_bench(order.zeros), old, "")
    assert known.order == order.id
    assert make_situation(known).find_trial(plan) == known
    assert make_situation(known).find_trial(plan.model_copy(update={"recipe": Recipe(curves="mask")})) is None
    assert identify_trial(make_bench(order.zeros), old, "2:4").order != order.id
    assert identify_trial(make_bench(order.zeros), known, "2:4") is known


@pytest.mark.parametrize("verdict", ["refuse", "rollback"])
def test_what_was_refused_or_is_damaged_has_its_line(verdict: str) -> None:
    def fail(checkpoint: str) -> None:
        raise DamagedArtifact("no manifest")

    old = make_trial(1, verdict, 0.45, RECIPE)
    assert identify_trial(SimpleNamespace(read_checkpoint=fail), old, "") is old  # type: ignore[arg-type]
    assert make_situation(old).find_trial(Plan(sparsity=0.45, recipe=RECIPE)) == old
    assert make_situation(old).find_trial(Plan(sparsity=0.44, recipe=RECIPE)) is None


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
