"""Random plans."""

from graph.ablation.arms import draw_plan
from tests.profiles import make_profile
from tools.plans.allocate import allocate


def test_a_random_plan_depends_on_seed_and_number_alone_and_can_be_carried_out() -> None:
    layers = [
        make_profile(block, kind, 1000, [0.001, 0.004, 0.01, 0.03, 0.1])
        for block in range(6)
        for kind in ("self_attn.q_proj", "mlp.up_proj")
    ]
    plans = [draw_plan(layers, 7, number) for number in range(40)]
    assert plans == [draw_plan(layers, 7, number) for number in range(40)]
    factors = [repr(adjustments) for _, adjustments in plans if adjustments]
    assert len(set(factors)) == len(factors) > 10
    assert {recipe.method for recipe, _ in plans} == {"two-sided", "sparsegpt", "two-sided-obs", "refit"}
    for recipe, adjustments in plans:
        assert (len(adjustments) == 4) == (recipe.allocation == "kappa")
        if recipe.allocation != "owl":  # these layers were never looked at for outliers
            assert sum(allocate(layers, 0.45, recipe, adjustments).zeros.values()) == 5400
