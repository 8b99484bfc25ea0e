"""What a trial teaches, in figures."""

import pytest

from graph.agents.heuristic import MASKS, group_kl
from graph.agents.reflector import MOST, draw_lesson
from tests.graph.test_heuristic import make_layers, make_trial
from tools.recipes import Recipe

LAYERS = make_layers()
EVEN = {layer.name: 0.45 for layer in LAYERS}
GROUP = "blocks 4-5 · mlp.down_proj"


def tilt(amount: float) -> dict[str, float]:
    """More sparsity in the last down projections, less everywhere else."""
    chosen = {layer.name for layer in LAYERS if layer.block >= 4 and layer.kind == "mlp.down_proj"}
    return {name: s + amount if name in chosen else s - amount / 8 for name, s in EVEN.items()}


def test_a_climb_teaches_how_far_the_curves_are_off() -> None:
    trial = make_trial(1, "accept", 0.3, Recipe())
    lesson = draw_lesson("run", LAYERS, trial, EVEN, None, dict.fromkeys(EVEN, 0.0))
    assert lesson is not None
    assert (lesson.selector, lesson.factor, lesson.recipe) == ("*", 2.0, "refit")
    assert "2.00 times the predicted" in lesson.text


@pytest.mark.parametrize(("amount", "surprise", "above"), [(0.1, 0.05, True), (0.1, -0.05, False), (-0.1, 0.05, False)])
def test_a_surprise_goes_to_the_group_that_moved_most(amount: float, surprise: float, above: bool) -> None:
    before = make_trial(1, "accept", 0.45, Recipe())
    after = tilt(amount)
    scale = before.kl / group_kl(LAYERS, EVEN)  # type: ignore[operator]
    expected = before.kl + scale * (group_kl(LAYERS, after) - group_kl(LAYERS, EVEN))  # type: ignore[operator]
    trial = make_trial(2, "rollback", 0.45, Recipe()).model_copy(update={"kl": expected + surprise})
    lesson = draw_lesson("run", LAYERS, trial, after, before, EVEN)
    assert lesson is not None
    assert lesson.selector == GROUP
    assert (lesson.factor > 1) is above
    assert 1 / MOST <= lesson.factor <= MOST
    exact = trial.model_copy(update={"kl": expected})
    unsurprised = draw_lesson("run", LAYERS, exact, after, before, EVEN)
    assert unsurprised is not None
    assert unsurprised.factor == pytest.approx(1, abs=1e-3)


def test_a_surprise_inside_the_noise_teaches_nothing() -> None:
    before, after = make_trial(1, "accept", 0.45, Recipe()), tilt(0.1)
    for error, factor in ((1.0, 1.0), (1e-6, MOST)):
        trial = make_trial(2, "rollback", 0.45, Recipe()).model_copy(update={"kl": 0.5, "change_error": error})
        lesson = draw_lesson("run", LAYERS, trial, after, before, EVEN)
        assert lesson is not None
        assert lesson.factor == factor
        assert ("within the noise" in lesson.text) is (factor == 1.0)


def test_a_change_of_method_is_about_the_whole_model() -> None:
    before = make_trial(1, "accept", 0.45, MASKS)
    lesson = draw_lesson("run", LAYERS, make_trial(2, "accept", 0.45, Recipe()), EVEN, before, EVEN)
    assert lesson is not None
    assert lesson.selector == "*"


def test_nothing_is_learnt_from_a_loss_that_is_not_finite() -> None:
    trial = make_trial(1, "rollback", 0.3, Recipe()).model_copy(update={"kl": None})
    assert draw_lesson("run", LAYERS, trial, EVEN, None, EVEN) is None
