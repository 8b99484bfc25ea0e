"""Allocations: exact to the weight, within bounds, and no plan, however hostile, does harm."""

import contextlib
import time
from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given

from tests.profiles import make_profile
from tools.allocate import Allocation, ImpossiblePlan, allocate, select_layers
from tools.curves import LEVELS, LayerProfile, predict_kl
from tools.recipes import Adjustment, Recipe

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
KAPPA = Recipe()
UNIFORM = Recipe(allocation="uniform")


def make_layers(blocks: int = 4, weights: int = 10_007, seed: int = 0) -> list[LayerProfile]:
    """Layers of different sizes and growing, convex KL curves over three orders of magnitude."""
    generator = np.random.default_rng(seed)
    return [
        make_profile(
            block,
            kind,
            weights * (1 + kind.startswith("mlp")),
            10 ** generator.uniform(-5, -2) * np.exp(6 * np.array(LEVELS)),
        )
        for block in range(blocks)
        for kind in KINDS
    ]


@st.composite
def models(draw: st.DrawFn, least_weights: int = 1) -> list[LayerProfile]:
    """Up to six layers with any KL curves (flat, falling, zero, huge) and up to all of their weights zero already."""
    layers = []
    for i in range(draw(st.integers(1, 6))):
        weights = draw(st.integers(least_weights, 50_000))
        kappa = draw(st.lists(st.floats(0, 1e3) | st.just(0.0), min_size=len(LEVELS), max_size=len(LEVELS)))
        zeros = int(draw(st.sampled_from([0.0, 0.0, 0.03, 0.4, 1.0])) * weights)
        layers.append(make_profile(i // 2, KINDS[i % 4], weights, kappa, zeros))
    return layers


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


def check_sentence(refusal: ImpossiblePlan) -> None:
    """One line that a planner can read."""
    assert "\n" not in str(refusal)
    assert 20 < len(str(refusal)) < 400


@given(models(), st.floats(0.001, 0.999), st.floats(0, 1), adjustments(), st.sampled_from([0.5, 0.9, 1.0]))
def test_every_allocation_is_exact_and_within_bounds(
    layers: list[LayerProfile], sparsity: float, strength: float, plan: list[Adjustment], most: float
) -> None:
    try:
        allocation = allocate(layers, sparsity, Recipe(strength=strength), plan, max_layer_sparsity=most)
    except ImpossiblePlan as refusal:
        check_sentence(refusal)
        return
    protected = [a for a in plan if a.action == "protect"]
    check(allocation, layers, sparsity, [*protected, *(a for a in plan if a.action != "protect")], most)


@given(models(), st.floats(0.01, 0.99), st.floats(0, 1))
def test_without_bounds_only_zeros_in_the_model_can_stand_in_the_way(
    layers: list[LayerProfile], sparsity: float, strength: float
) -> None:
    assume(round(sparsity * sum(layer.weights for layer in layers)) >= sum(layer.zeros for layer in layers))
    check(allocate(layers, sparsity, Recipe(strength=strength)), layers, sparsity)


@given(models(), st.floats(0.01, 0.99))
def test_uniform_is_the_same_everywhere_and_so_is_strength_0(layers: list[LayerProfile], sparsity: float) -> None:
    layers = [layer.model_copy(update={"zeros": 0}) for layer in layers]
    uniform = allocate(layers, sparsity, UNIFORM)
    check(uniform, layers, sparsity)
    for layer in layers:
        assert abs(uniform.zeros[layer.name] - sparsity * layer.weights) <= 1
    assert allocate(layers, sparsity, Recipe(strength=0)) == uniform


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
    for recipe in (KAPPA, UNIFORM):
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


def test_bounds_hold_for_kappa_and_uniform() -> None:
    layers = make_layers()
    plan = [
        Adjustment(selector="*.v_proj", action="bounds", low=0.7),
        Adjustment(selector="mlp.*", action="bounds", high=0.4),
    ]
    for recipe in (KAPPA, UNIFORM):
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


def test_400_layers_take_a_moment() -> None:
    layers = make_layers(blocks=100, weights=4_000_037)
    plan = [Adjustment(selector=f"blocks {i}-{i + 3}", action="factor", factor=1.1) for i in range(64)]
    start = time.monotonic()
    check(allocate(layers, 0.4567, KAPPA, plan), layers, 0.4567, plan)
    assert time.monotonic() - start < 10


# --- selectors -----------------------------------------------------------------------------------------------------


def names(*pairs: tuple[int, str]) -> list[str]:
    return [f"model.layers.{block}.{kind}" for block, kind in pairs]


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        ("*.v_proj", names((0, KINDS[1]), (1, KINDS[1]))),
        ("v_proj", names((0, KINDS[1]), (1, KINDS[1]))),
        ("self_attn.q_proj", names((0, KINDS[0]), (1, KINDS[0]))),
        ("model.layers.1.*", names(*((1, kind) for kind in KINDS))),
        ("blocks 0-0", names(*((0, kind) for kind in KINDS))),
        ("block 1", names(*((1, kind) for kind in KINDS))),
        ("blocks 0-1 · *.v_proj", names((0, KINDS[1]), (1, KINDS[1]))),
        ("  blocks 1,7 *.q_proj ", names((1, KINDS[0]))),
        ("blocks 0, 1: mlp.up_proj", names((0, KINDS[2]), (1, KINDS[2]))),
        ("blocks 1-999999 · mlp.*", names((1, KINDS[2]), (1, KINDS[3]))),
        ("*[qv]_proj", names((0, KINDS[0]), (0, KINDS[1]), (1, KINDS[0]), (1, KINDS[1]))),
    ],
)
def test_selectors(selector: str, chosen: list[str]) -> None:
    assert select_layers(selector, make_layers(blocks=2)) == chosen


@pytest.mark.parametrize(
    ("selector", "sentence"),
    [
        ("", "is not a glob such as"),
        ("*.v_proj and *.q_proj", "is not a glob such as"),
        ("blocks 0--3", "'0--3' is not a range of blocks such as 0-3"),
        ("blocks 0-9999999", "'0-9999999' is not a range of blocks"),
        ("blocks 3-0", "means no layer"),
        ("blocks 50", "means no layer"),
        ("layers.0", "means no layer"),
    ],
)
def test_selectors_that_mean_nothing(selector: str, sentence: str) -> None:
    with pytest.raises(ImpossiblePlan, match=sentence):
        select_layers(selector, make_layers(blocks=2))


@given(st.text(max_size=200) | st.text("blocks 0-9,·:*?[]!^.(){}\\|+$\n", max_size=200))
def test_no_text_is_more_than_refused(selector: str) -> None:
    layers = make_layers(blocks=1)
    try:
        chosen = select_layers(selector, layers)
    except ImpossiblePlan as refusal:
        check_sentence(refusal)
    else:
        assert chosen and set(chosen) <= {layer.name for layer in layers}


@pytest.mark.parametrize(
    "selector",
    [
        "blocks " + ",".join(["0-999999"] * 20),
        "blocks " + "0 " * 96 + "x y",
        "blocks 0" + " ,-" * 60 + "·x y",
        "*a" * 99 + "b",
        "[" * 200,
        "[!-" * 60,
    ],
)
def test_hostile_selectors_take_neither_time_nor_memory(selector: str) -> None:
    layers = make_layers(blocks=10)
    start = time.monotonic()
    with contextlib.suppress(ImpossiblePlan):
        select_layers(selector, layers)
    assert time.monotonic() - start < 1
