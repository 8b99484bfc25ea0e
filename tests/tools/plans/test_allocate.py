"""Allocations: exact to the weight, within bounds, and no plan, however hostile, does harm."""

from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given

from tests.profiles import KINDS, check_sentence, make_layers, make_profile
from tools.base.errors import ImpossiblePlan
from tools.plans.allocate import Allocation, allocate, find_bounds
from tools.plans.layer_profile import LEVELS, LayerProfile, predict_kl, select_layers
from tools.plans.recipe import Adjustment, Recipe

KAPPA = Recipe()
TWO_OF_FOUR = KAPPA.model_copy(update={"pattern": "2:4"})
UNIFORM = Recipe(allocation="uniform")
OWL = Recipe(allocation="owl")
ALPHA = Recipe(allocation="alphapruning")
ALL = (KAPPA, UNIFORM, OWL, ALPHA)


@st.composite
def models(draw: st.DrawFn, least_weights: int = 1) -> list[LayerProfile]:
    """Up to six layers with any KL curves (flat, falling, zero, huge) and up to all of their weights zero already."""
    layers = []
    outliers = draw(st.lists(st.floats(0, 100), min_size=3, max_size=3))
    for i in range(draw(st.integers(1, 6))):
        weights = draw(st.integers(least_weights, 50_000))
        kappa = draw(st.lists(st.floats(0, 1e3) | st.just(0.0), min_size=len(LEVELS), max_size=len(LEVELS)))
        zeros = int(draw(st.sampled_from([0.0, 0.0, 0.03, 0.4, 1.0])) * weights)
        alpha = draw(st.floats(1, 1e6) | (st.none() if i % 2 else st.just(3.0)))
        layer = make_profile(i // 2, KINDS[i % 4], weights, kappa, zeros)
        layers.append(layer.model_copy(update={"outliers": outliers[layer.block], "alpha": alpha}))
    return layers


recipes = st.sampled_from(ALL)
patterns_of_six = st.lists(st.sampled_from([None, (2, 4), (1, 8)]), min_size=6)


@st.composite
def adjustments(draw: st.DrawFn) -> list[Adjustment]:
    made = []
    for _ in range(draw(st.integers(0, 4))):
        selector = draw(st.sampled_from(["*", "*.v_proj", "blocks 0-1", "block 0 · *.q_proj", "blocks 1-9 · mlp.*"]))
        action = draw(st.sampled_from(["factor", "bounds", "protect"]))
        low, high = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
        made.append(Adjustment(selector=selector, action=action, factor=draw(st.floats(0.05, 20)), low=low, high=high))
    return made


def check(
    allocation: Allocation,
    layers: Sequence[LayerProfile],
    sparsity: float,
    plan: Sequence[Adjustment] = (),
    most: float = 1.0,
) -> None:
    """The promises that hold for every allocation."""
    total = sum(layer.weights for layer in layers)
    assert list(allocation.zeros) == [layer.name for layer in layers]
    assert sum(allocation.zeros.values()) == round(sparsity * total)  # exact to the weight
    assert allocation.sparsity == sum(allocation.zeros.values()) / total
    assert abs(allocation.sparsity - sparsity) <= max(0.0005, 0.5 / total) + 1e-12
    shares = np.array([allocation.zeros[layer.name] / layer.weights for layer in layers])
    assert allocation.predicted_kl == pytest.approx(predict_kl(layers, shares))
    for layer in layers:
        zeros = allocation.zeros[layer.name]
        assert layer.zeros <= zeros <= layer.weights
        low, high = float(layer.zeros), max(most * layer.weights, layer.zeros)
        for adjustment in plan:
            if adjustment.action != "factor" and layer.name in select_layers(adjustment.selector, layers):
                if adjustment.action == "protect":
                    assert zeros == layer.zeros
                    low = high = layer.zeros
                    break
                if adjustment.action == "bounds":
                    low = max(low, (adjustment.low or 0.0) * layer.weights)
                    greatest = 1.0 if adjustment.high is None else adjustment.high
                    high = min(high, max(greatest * layer.weights, layer.zeros))
        else:
            assert low - 1 < zeros < high + 1  # bounds may meet between two whole weights


@given(models(), st.floats(0.001, 0.999), recipes, st.floats(0, 1), adjustments(), st.sampled_from([0.5, 0.9, 1.0]))
def test_every_allocation_is_exact_and_within_bounds(
    layers: list[LayerProfile], sparsity: float, recipe: Recipe, strength: float, plan: list[Adjustment], most: float
) -> None:
    recipe = recipe.model_copy(update={"strength": strength})
    plan = [a for a in plan if recipe.allocation == "kappa" or a.action != "factor"]
    try:
        allocation = allocate(layers, sparsity, recipe, plan, max_layer_sparsity=most)
    except ImpossiblePlan as refusal:
        check_sentence(refusal)
        return
    protected = [a for a in plan if a.action == "protect"]
    check(allocation, layers, sparsity, [*protected, *(a for a in plan if a.action != "protect")], most)


@given(models(), st.floats(0.01, 0.99), recipes, st.floats(0, 1))
def test_without_bounds_only_zeros_in_the_model_can_stand_in_the_way(
    layers: list[LayerProfile], sparsity: float, recipe: Recipe, strength: float
) -> None:
    assume(round(sparsity * sum(layer.weights for layer in layers)) >= sum(layer.zeros for layer in layers))
    check(allocate(layers, sparsity, recipe.model_copy(update={"strength": strength})), layers, sparsity)


@given(models(), st.floats(0.01, 0.99), recipes)
def test_uniform_is_the_same_everywhere_and_so_is_strength_0(
    layers: list[LayerProfile], sparsity: float, recipe: Recipe
) -> None:
    layers = [layer.model_copy(update={"zeros": 0}) for layer in layers]
    uniform = allocate(layers, sparsity, UNIFORM)
    check(uniform, layers, sparsity)
    share = sum(uniform.zeros.values()) / sum(layer.weights for layer in layers)  # whole numbers, as near as they come
    for layer in layers:
        assert abs(uniform.zeros[layer.name] - share * layer.weights) <= 1
    assert allocate(layers, sparsity, recipe.model_copy(update={"strength": 0.0})) == uniform


@given(models(least_weights=5_000), st.floats(0.05, 0.95))
def test_full_strength_is_never_predicted_worse_than_uniform(layers: list[LayerProfile], sparsity: float) -> None:
    assume(round(sparsity * sum(layer.weights for layer in layers)) >= sum(layer.zeros for layer in layers))
    uniform = allocate(layers, sparsity, UNIFORM).predicted_kl
    assert allocate(layers, sparsity, KAPPA).predicted_kl <= uniform * 1.005 + 1e-9


def test_kappa_finds_the_optimum_of_convex_curves() -> None:
    layers = make_layers()
    best = allocate(layers, 0.45, KAPPA)
    assert best.predicted_kl < 0.8 * allocate(layers, 0.45, UNIFORM).predicted_kl
    generator = np.random.default_rng(1)
    for _ in range(200):  # no exchange between two layers lowers the prediction
        first, second = generator.choice(len(layers), 2, replace=False)
        moved = dict(best.zeros)
        amount = min(moved[layers[first].name], layers[second].weights - moved[layers[second].name], 200)
        moved[layers[first].name] -= amount
        moved[layers[second].name] += amount
        shares = np.array([moved[layer.name] / layer.weights for layer in layers])
        assert predict_kl(layers, shares) >= best.predicted_kl * (1 - 2e-3)


def test_strength_lies_between() -> None:
    layers = make_layers()
    predicted = [allocate(layers, 0.45, Recipe(strength=s)).predicted_kl for s in (0, 0.25, 0.5, 0.75, 1)]
    assert predicted == sorted(predicted, reverse=True)


@pytest.mark.parametrize("sparsity", [0.2, 0.45, 0.7])
def test_factors_move_the_right_way(sparsity: float) -> None:
    layers = make_layers()
    plain = allocate(layers, sparsity, KAPPA)
    chosen = select_layers("*.v_proj", layers)
    for factor, sign in ((4.0, -1), (0.25, 1)):
        moved = allocate(layers, sparsity, KAPPA, [Adjustment(selector="*.v_proj", action="factor", factor=factor)])
        check(moved, layers, sparsity)
        assert (sum(moved.zeros[name] for name in chosen) - sum(plain.zeros[name] for name in chosen)) * sign > 0
        for name in chosen:
            assert (moved.zeros[name] - plain.zeros[name]) * sign >= 0


def test_a_factor_on_everything_changes_nothing_and_many_factors_do_not_overflow() -> None:
    layers = make_layers()
    everything = [Adjustment(selector="*", action="factor", factor=20)]
    assert allocate(layers, 0.45, KAPPA, everything) == allocate(layers, 0.45, KAPPA)
    for factor in (20, 0.05):
        extreme = [Adjustment(selector="*.v_proj", action="factor", factor=factor)] * 64
        check(allocate(layers, 0.45, KAPPA, extreme), layers, 0.45)


def test_protected_layers_keep_exactly_the_zeros_they_have() -> None:
    layers = [layer.model_copy(update={"zeros": 137}) for layer in make_layers()]
    plan = [Adjustment(selector="blocks 0-1", action="protect")]
    for recipe in ALL:
        allocation = allocate(layers, 0.3, recipe, plan, protect=["*.q_proj"])
        for layer in layers:
            if layer.block <= 1 or layer.kind.endswith("q_proj"):
                assert allocation.zeros[layer.name] == 137
            else:
                assert allocation.zeros[layer.name] > 137


def test_protection_goes_before_bounds() -> None:
    layers = make_layers(weights=10_000)
    plan = [
        Adjustment(selector="blocks 0", action="protect"),
        Adjustment(selector="*", action="bounds", low=0.2, high=0.8),
    ]
    allocation = allocate(layers, 0.45, KAPPA, plan)
    for layer in layers:
        share = allocation.zeros[layer.name] / layer.weights
        assert share == 0 if layer.block == 0 else 0.2 <= share <= 0.8


def test_curves_that_bend_down_do_not_mislead_the_search() -> None:
    flat, steep = [1.0] * len(LEVELS), [1.0, 3.0, 3.0, 3.0, 3.0]  # the first 15 % cost as much as all
    layers = [make_profile(i, KINDS[i], 5_000, kappa) for i, kappa in enumerate((flat, steep))]
    assert allocate(layers, 0.0625, KAPPA).predicted_kl <= allocate(layers, 0.0625, UNIFORM).predicted_kl


def test_bounds_hold_for_every_allocation() -> None:
    layers = make_layers()
    plan = [
        Adjustment(selector="*.v_proj", action="bounds", low=0.7),
        Adjustment(selector="mlp.*", action="bounds", high=0.4),
    ]
    for recipe in ALL:
        check(allocate(layers, 0.45, recipe, plan), layers, 0.45, plan)


def test_bounds_that_leave_no_choice_are_met_to_the_weight() -> None:
    layers = make_layers(blocks=1)
    plan = [Adjustment(selector="*", action="bounds", low=0.45, high=0.45)]
    check(allocate(layers, 0.45, KAPPA, plan), layers, 0.45, plan)


@pytest.mark.parametrize(
    ("plan", "sparsity", "sentence"),
    [
        (
            [Adjustment(selector="*", action="bounds", high=0.3)],
            0.45,
            r"bounds and protected layers allow at most 30.00% sparsity, but 45.00% is asked",
        ),
        (
            [Adjustment(selector="mlp.*", action="protect")],
            0.45,
            r"bounds and protected layers allow at most 33.33% sparsity, but 45.00% is asked",
        ),
        (
            [Adjustment(selector="*", action="bounds", low=0.6)],
            0.45,
            r"bounds \(and zeros the model already has\) ask for at least 60.00% sparsity, but the plan has 45.00%",
        ),
        (
            [
                Adjustment(selector="*.v_proj", action="bounds", low=0.5),
                Adjustment(selector="blocks 2-3", action="bounds", high=0.3),
            ],
            0.45,
            r"'blocks 2-3': the least sparsity asked of model.layers.2.self_attn.v_proj, 0.5, is above the greatest, "
            r"0.3",
        ),
        (
            [Adjustment(selector="*.k_proj", action="protect")],
            0.45,
            r"selector '\*.k_proj' means no layer; layers are named like 'model.layers.0.self_attn.q_proj'",
        ),
        (
            [Adjustment(selector="*.q_proj,*.v_proj", action="protect")],
            0.45,
            r"selector '\*.q_proj,\*.v_proj' means no layer; globs are set apart by ';'",
        ),
    ],
)
def test_an_impossible_plan_says_why(plan: list[Adjustment], sparsity: float, sentence: str) -> None:
    with pytest.raises(ImpossiblePlan, match=f"^{sentence}$"):
        allocate(make_layers(weights=10_000), sparsity, KAPPA, plan)


def test_the_most_that_any_layer_may_lose() -> None:
    layers = make_layers()
    check(allocate(layers, 0.45, KAPPA, max_layer_sparsity=0.5), layers, 0.45, most=0.5)
    with pytest.raises(ImpossiblePlan, match=r"allow at most 40\.00% sparsity"):
        allocate(layers, 0.45, KAPPA, max_layer_sparsity=0.4)


def test_400_layers() -> None:
    layers = make_layers(blocks=100, weights=4_000_037)
    plan = [Adjustment(selector=f"blocks {i}-{i + 3}", action="factor", factor=1.1) for i in range(64)]
    check(allocate(layers, 0.4567, KAPPA, plan), layers, 0.4567, plan)
    for recipe in (UNIFORM, OWL, ALPHA):
        check(allocate(layers, 0.4567, recipe), layers, 0.4567)


def test_bounds_in_whole_weights() -> None:
    layers = make_layers(blocks=1, weights=10)  # 10, 10, 20 and 20 weights
    layers[0] = layers[0].model_copy(update={"zeros": 6})
    plan = [Adjustment(selector="mlp.*", action="bounds", low=0.12, high=0.33)]
    least, most = find_bounds(layers, plan, protect=["*.v_proj"], max_layer_sparsity=0.5)
    assert least.tolist() == [6, 0, 2, 2]
    assert most.tolist() == [6, 0, 7, 7]


def test_factors_where_nothing_weighs_them_are_refused() -> None:
    layers = with_inputs(make_layers(weights=10_000))
    plan = [Adjustment(selector="*.v_proj", action="factor", factor=2)]
    for recipe in (UNIFORM, OWL, ALPHA):
        with pytest.raises(ImpossiblePlan, match=f"^factors count only in allocation 'kappa', .*'{recipe.allocation}'"):
            allocate(layers, 0.45, recipe, plan)
    with pytest.raises(
        ImpossiblePlan, match=r"^factors count only in allocation 'kappa', not with an N:M pattern \(2:4"
    ):
        allocate(layers, 0.5, TWO_OF_FOUR, plan)


# --- patterns ------------------------------------------------------------------------------------------------------


def with_inputs(layers: Sequence[LayerProfile], inputs: int = 200) -> list[LayerProfile]:
    return [layer.model_copy(update={"inputs": inputs}) for layer in layers]


@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.25), ("3:4", 0.75)])
def test_a_pattern_gives_every_layer_the_same(pattern: str, sparsity: float) -> None:
    layers = with_inputs(make_layers(weights=10_000))
    for recipe in ALL:
        allocation = allocate(layers, sparsity, recipe.model_copy(update={"pattern": pattern}))
        assert allocation.zeros == {layer.name: layer.weights * sparsity for layer in layers}
        check(allocation, layers, sparsity)


def test_a_pattern_leaves_protected_layers_as_they_are() -> None:
    layers = [layer.model_copy(update={"zeros": 137}) for layer in with_inputs(make_layers(weights=10_000))]
    layers[1] = layers[1].model_copy(update={"inputs": 0, "weights": 9_999})  # it need not be divisible
    plan = [Adjustment(selector="mlp.up_proj", action="protect")]
    given = sum(layer.weights / 2 for i, layer in enumerate(layers) if i % 4 in (0, 3)) + 8 * 137
    sparsity = round(given / sum(layer.weights for layer in layers), 4)
    allocation = allocate(layers, sparsity, TWO_OF_FOUR, plan, protect=["*.v_proj"])
    for layer in layers:
        protected = layer.kind.endswith(("v_proj", "up_proj"))
        assert allocation.zeros[layer.name] == (137 if protected else layer.weights // 2)
    with pytest.raises(
        ImpossiblePlan,
        match=r"^with 2:4 in every layer that is not protected the sparsity is 25\.46%, but the plan has 50\.00%$",
    ):
        allocate(layers, 0.5, TWO_OF_FOUR, plan, protect=["*.v_proj"])


def test_the_sparsity_of_a_pattern_may_be_rounded() -> None:
    layers = with_inputs(make_layers(weights=10_000))
    for sparsity in (0.4996, 0.5004):
        assert allocate(layers, sparsity, TWO_OF_FOUR).sparsity == 0.5
    for sparsity in (0.4994, 0.5006):
        with pytest.raises(ImpossiblePlan, match=r"the sparsity is 50\.00%, but the plan has"):
            allocate(layers, sparsity, TWO_OF_FOUR)


@pytest.mark.parametrize(
    ("update", "plan", "sentence"),
    [
        ({"inputs": 0}, [], r"this profile has no number of inputs for NAME, which a pattern needs"),
        (
            {"inputs": 50},
            [],
            r"NAME has 50 inputs, not divisible into groups of 4; protect it, or use another pattern",
        ),
        (
            {"zeros": 6_000},
            [],
            r"2:4 makes 50.00% of NAME zero, but bounds \(and zeros it already has\) ask for 60.00% to 90.00%",
        ),
        (
            {},
            [Adjustment(selector="*.v_proj", action="bounds", high=0.3)],
            r"2:4 makes 50.00% of NAME zero, but bounds \(and zeros it already has\) ask for 0.00% to 30.00%",
        ),
    ],
)
def test_layers_that_a_pattern_does_not_fit(update: dict[str, int], plan: list[Adjustment], sentence: str) -> None:
    layers = with_inputs(make_layers(weights=10_000))
    layers[1] = layers[1].model_copy(update=update)
    with pytest.raises(ImpossiblePlan, match=f"^{sentence.replace('NAME', layers[1].name)}$"):
        allocate(layers, 0.5, TWO_OF_FOUR, plan, max_layer_sparsity=0.9)


# --- patterns of some layers ---------------------------------------------------------------------------------------


@given(
    models(),
    st.floats(0.001, 0.999),
    recipes,
    adjustments(),
    st.lists(st.sampled_from([None, (2, 4), (1, 8)]), min_size=6),
)
def test_beside_patterns_of_some_layers_the_others_meet_the_budget_to_the_weight(
    layers: list[LayerProfile],
    sparsity: float,
    recipe: Recipe,
    plan: list[Adjustment],
    drawn: list[tuple[int, int] | None],
) -> None:
    layers = [x.model_copy(update={"weights": 8 * x.weights, "zeros": 8 * x.zeros, "inputs": 8}) for x in layers]
    patterns = {layer.name: pattern for layer, pattern in zip(layers, drawn, strict=False) if pattern}
    plan = [a for a in plan if recipe.allocation == "kappa" or a.action != "factor"]
    try:
        allocation = allocate(layers, sparsity, recipe, plan, patterns=patterns)
    except ImpossiblePlan as refusal:
        check_sentence(refusal)
        return
    protected = {x for a in plan if a.action == "protect" for x in select_layers(a.selector, layers)}
    for layer in layers:
        if layer.name in protected:
            assert allocation.zeros[layer.name] == layer.zeros
        elif pattern := patterns.get(layer.name):
            assert allocation.zeros[layer.name] == layer.weights * pattern[0] // pattern[1]
    if len(patterns.keys() | protected) < len(layers):
        check(allocation, layers, sparsity)
    else:
        assert allocation.sparsity == pytest.approx(sparsity, abs=5e-4)


def test_patterns_of_some_layers_are_what_the_others_do_without() -> None:
    layers = with_inputs(make_layers(weights=10_000))
    free, fixed = allocate(layers, 0.45, KAPPA), select_layers("*.v_proj", layers)
    half = allocate(layers, 0.45, KAPPA, patterns=dict.fromkeys(fixed, (2, 4)))
    check(half, layers, 0.45)
    assert {half.zeros[name] for name in fixed} == {5_000}
    bounds = [Adjustment(selector="*.v_proj", action="bounds", low=0.5, high=0.5)]
    assert half == allocate(layers, 0.45, KAPPA, bounds) and half != free
    assert allocate(layers, 0.45, KAPPA, patterns={}) == free


@pytest.mark.parametrize(
    ("patterned", "plan", "sparsity", "sentence"),
    [
        (
            "mlp.*",
            [Adjustment(selector="self_attn.*", action="protect")],
            0.45,
            "with patterns in every layer that is not protected the sparsity is 33.33%, but the plan has 45.00%",
        ),
        (
            "mlp.*",
            [Adjustment(selector="*.v_proj", action="bounds", high=0.1)],
            0.55,
            "bounds, patterns, and protected layers allow at most 51.67% sparsity, but 55.00% is asked",
        ),
        (
            "mlp.*",
            [],
            0.3,
            r"patterns, bounds \(and zeros the model already has\) ask for at least 33.33% sparsity, but the ",
        ),
        (
            "*.v_proj",
            [Adjustment(selector="blocks 0 · *.v_proj", action="factor", factor=2)],
            0.45,
            r"'blocks 0 · \*.v_proj': a factor counts for nothing where an N:M pattern says all",
        ),
    ],
)
def test_patterns_of_some_layers_that_leave_no_room(
    patterned: str, plan: list[Adjustment], sparsity: float, sentence: str
) -> None:
    layers = with_inputs(make_layers(weights=10_000))
    with pytest.raises(ImpossiblePlan, match=f"^{sentence}"):
        allocate(layers, sparsity, KAPPA, plan, patterns=dict.fromkeys(select_layers(patterned, layers), (2, 4)))
