"""The evolutionary search: exact, within its budget, resumable at every generation, and better than uniform."""

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from pydantic import ValidationError

from tests.profiles import make_profile
from tools.base.errors import ImpossiblePlan, UserError
from tools.plans.allocate import allocate
from tools.plans.evolve import EFFORTS, Search, SearchSettings, describe_effort, evolve, follow_effort
from tools.plans.layer_profile import LEVELS, LayerProfile
from tools.plans.recipe import Recipe

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
UNIFORM = Recipe(allocation="uniform")


def make_layers(blocks: int = 2, zeros: int = 0, weights: int = 10_007) -> list[LayerProfile]:
    return [
        make_profile(block, kind, weights * (1 + kind.startswith("mlp")), [0.0] * len(LEVELS), zeros)
        for block in range(blocks)
        for kind in KINDS
    ]


def make_settings(**changes: Any) -> SearchSettings:
    """A small search: 32 windows of 10 tokens, generations of 8 * 10 + (1 + 2) * 40 = 200 tokens."""
    few = {"window": 10, "windows": 32, "tokens": 4_000, "children": 8, "stages": [(2, 10), (1, 40)]}
    return SearchSettings.model_validate(few | changes)


class Model:
    """A separable KL, sum_l c_l z_l^3, that differs from window to window; remembers what it was asked."""

    def __init__(self, layers: Sequence[LayerProfile], seed: int = 0, noise: float = 0.0) -> None:
        generator = np.random.default_rng(seed)
        self.layers = layers
        self.cost = 10 ** generator.uniform(-1, 1, len(layers))
        self.noise = noise * generator.standard_normal((64, len(layers)))
        self.asked: list[tuple[dict[str, int], list[int]]] = []

    def measure(self, candidates: list[dict[str, int]], windows: list[int]) -> list[float]:
        self.asked += [(dict(zeros), list(windows)) for zeros in candidates]
        return [self.kl(zeros, windows) for zeros in candidates]

    def kl(self, zeros: dict[str, int], windows: Sequence[int] = range(64)) -> float:
        shares = np.array([zeros[layer.name] / layer.weights for layer in self.layers])
        sizes = np.array([layer.weights for layer in self.layers]) / 1e4
        return float(((self.cost * np.exp(self.noise[list(windows)])).mean(0) * sizes * shares**3).sum())


def uniform_zeros(layers: Sequence[LayerProfile], sparsity: float, protect: Sequence[str] = ()) -> dict[str, int]:
    return allocate(layers, sparsity, UNIFORM, protect=protect).zeros


def test_it_finds_the_optimum_of_a_separable_convex_kl() -> None:
    layers = make_layers()
    model = Model(layers)
    found = evolve(layers, 0.5, make_settings(tokens=60_000), model.measure)
    uniform = uniform_zeros(layers, 0.5)
    assert model.kl(found.zeros) < 0.8 * model.kl(uniform)
    assert found.kl == pytest.approx(model.kl(found.zeros))
    step = round(0.03 * sum(layer.weights for layer in layers) / len(layers))
    for down, up in permutations(layers, 2):  # with convex costs, no better neighbour means no better allocation
        moved = found.zeros | {down.name: found.zeros[down.name] - step, up.name: found.zeros[up.name] + step}
        if all(abs(moved[x.name] - uniform[x.name]) <= 8 * step and moved[x.name] >= 0 for x in (down, up)):
            assert model.kl(moved) >= model.kl(found.zeros) * (1 - 1e-12)


def test_it_improves_on_text_that_differs_from_window_to_window() -> None:
    layers = make_layers(blocks=4)
    model = Model(layers, noise=0.3)
    found = evolve(layers, 0.5, make_settings(tokens=40_000), model.measure)
    assert model.kl(found.zeros) < 0.85 * model.kl(uniform_zeros(layers, 0.5))


@settings(max_examples=40)
@given(
    st.floats(0.05, 0.9),
    st.sampled_from([[], ["*.v_proj"], ["block 0"]]),
    st.sampled_from([0.6, 0.9, 1.0]),
    st.sampled_from([0, 900]),
    st.floats(0.001, 0.5),
    st.integers(0, 1_000),
)
def test_every_candidate_is_exact_and_within_bounds(
    sparsity: float, protect: list[str], most: float, zeros: int, step: float, seed: int
) -> None:
    layers = make_layers(zeros=zeros)
    model = Model(layers)
    rules = make_settings(tokens=1_000, protect=protect, max_layer_sparsity=most, step=step, seed=seed)
    try:
        start = allocate(layers, sparsity, UNIFORM, protect=protect, max_layer_sparsity=most).zeros
    except ImpossiblePlan:
        with pytest.raises(ImpossiblePlan):
            evolve(layers, sparsity, rules, model.measure)
        return
    found = evolve(layers, sparsity, rules, model.measure)
    budget = round(sparsity * sum(layer.weights for layer in layers))
    weights = max(1, round(step * sum(layer.weights for layer in layers) / len(layers)))
    for candidate in [found.zeros, *(asked for asked, _ in model.asked)]:
        assert list(candidate) == [layer.name for layer in layers]
        assert sum(candidate.values()) == budget
        for layer in layers:
            away = candidate[layer.name] - start[layer.name]
            assert away % weights == 0 and abs(away) <= 8 * weights
            assert layer.zeros <= candidate[layer.name] <= math.ceil(most * layer.weights)
            if ("*.v_proj" in protect and layer.kind.endswith("v_proj")) or ("block 0" in protect and not layer.block):
                assert candidate[layer.name] == layer.zeros


def test_children_differ_and_move_one_to_three_steps() -> None:
    layers = make_layers(blocks=4)
    model = Model(layers)
    evolve(layers, 0.5, make_settings(children=64, tokens=64 * 10 + 3 * 40), model.measure)
    start, step = np.array(list(uniform_zeros(layers, 0.5).values())), round(0.03 * 10_007 * 1.5)
    children = [tuple(zeros.values()) for zeros, _ in model.asked[:64]]
    assert len(set(children)) == 64 and tuple(start) not in children
    moved = [int(np.abs(np.array(child) - start).sum()) // (2 * step) for child in children]
    assert set(moved) == {1, 2, 3}
    assert moved.count(1) > moved.count(2) > moved.count(3)  # 5, 3 and 1 of nine


def test_stages_see_the_same_windows_and_the_parent_joins_the_last() -> None:
    layers = make_layers()
    model = Model(layers)
    evolve(layers, 0.5, make_settings(tokens=410, stages=[(4, 10), (2, 30), (1, 50)]), model.measure)  # one generation
    windows = [asked for _, asked in model.asked]
    assert [len(asked) for asked in windows] == [1] * 8 + [3] * 4 + [5] * 3
    for stage in (windows[:8], windows[8:12], windows[12:]):
        assert all(asked == stage[0] for asked in stage)
        assert len(set(stage[0])) == len(stage[0]) and set(stage[0]) <= set(range(32))
    kls = [model.kl(zeros) for zeros, _ in model.asked[:8]]
    assert sorted(model.kl(zeros) for zeros, _ in model.asked[8:12]) == sorted(kls)[:4]
    assert model.asked[12][0] == uniform_zeros(layers, 0.5)


def test_a_stage_takes_all_windows_when_it_asks_for_more() -> None:
    model = Model(make_layers())
    found = evolve(make_layers(), 0.5, make_settings(windows=3, tokens=8 * 10 + 3 * 30), model.measure)
    assert found.generation == 1 and found.tokens == 8 * 10 + 3 * 30
    assert model.asked[-1][1] == [0, 1, 2]


@pytest.mark.parametrize("tokens", [1, 199, 200, 399, 400, 3_333])
def test_the_budget_of_tokens_is_kept_and_told(tokens: int) -> None:
    model = Model(make_layers())
    found = evolve(make_layers(), 0.5, make_settings(tokens=tokens), model.measure)
    assert found.tokens == sum(10 * len(windows) for _, windows in model.asked) == tokens // 200 * 200
    assert found.generation == tokens // 200
    if tokens < 200:
        assert found == Search(zeros=uniform_zeros(make_layers(), 0.5))


def test_without_a_cap_all_generations_are_done_and_told() -> None:
    layers = make_layers()
    model = Model(layers)
    rules = make_settings(tokens=0, generations=7)
    found = evolve(layers, 0.5, rules, model.measure)
    assert (found.generation, found.tokens, found.children) == (7, 7 * 200, 7 * 8)
    assert rules.planned_tokens == 7 * 200
    assert make_settings(tokens=900, generations=7).planned_tokens == 900
    model.asked.clear()
    assert evolve(layers, 0.5, rules, model.measure, state=found) == found and not model.asked


def test_the_published_settings_are_those_of_the_paper() -> None:
    fast, full = (follow_effort(name, window=512, windows=1024) for name in ("fast", "full"))
    assert SearchSettings(window=512, windows=1024) == fast
    assert (fast.generations, fast.children, fast.stages) == (400, 16, [(1, 512), (1, 8192)])
    assert (full.generations, full.children) == (400, 64)
    assert full.stages == [(8, 2048), (2, 16384), (1, 65536)]
    assert fast.planned_tokens == 400 * (16 * 512 + 2 * 8192) == 9_830_400
    assert full.planned_tokens == 400 * (64 * 2048 + 8 * 16384 + 3 * 65536) == 183_500_800
    assert describe_effort(EFFORTS["fast"]) == (
        "400 generations of 16 children, of which are kept 1 by 512 tokens, 1 by 8,192 tokens"
    )


@pytest.mark.parametrize(
    ("window", "windows", "counts"),
    [
        *((512, 64, [1, 16]), (256, 64, [2, 32]), (1024, 64, [1, 8]), (2048, 64, [1, 4]), (300, 64, [2, 27])),
        *((16_384, 64, [1, 1]), (512, 8, [1, 8])),
    ],
)
def test_stages_are_as_many_tokens_with_windows_of_any_length(window: int, windows: int, counts: list[int]) -> None:
    rules = follow_effort("fast", window=window, windows=windows)
    assert [rules.count_windows(stage) for stage in rules.stages] == counts


def test_a_search_goes_on_as_if_it_had_not_been_interrupted() -> None:
    layers = make_layers()
    rules = make_settings(tokens=2_000)
    states: list[Search] = []
    whole = Model(layers, noise=0.3)
    found = evolve(layers, 0.5, rules, whole.measure, states.append)
    assert [state.generation for state in states] == list(range(1, 11)) and states[-1] == found
    for state in states:
        read = Search.model_validate_json(state.model_dump_json())
        rest = Model(layers, noise=0.3)
        assert evolve(layers, 0.5, rules, rest.measure, state=read) == found
        assert rest.asked == whole.asked[11 * state.generation :]
    half = evolve(layers, 0.5, make_settings(tokens=1_000), whole.measure)
    assert evolve(layers, 0.5, rules, whole.measure, state=half) == found  # a larger budget goes on, too


def test_a_search_killed_inside_a_generation_repeats_it() -> None:
    layers = make_layers()
    found = evolve(layers, 0.5, make_settings(), Model(layers).measure)
    states: list[Search] = []
    model = Model(layers)

    def killed(candidates: list[dict[str, int]], windows: list[int]) -> list[float]:
        if len(model.asked) == 30:  # in the second stage of the third generation
            raise KeyboardInterrupt
        return model.measure(candidates, windows)

    with pytest.raises(KeyboardInterrupt):
        evolve(layers, 0.5, make_settings(), killed, states.append)
    assert len(states) == 2
    assert evolve(layers, 0.5, make_settings(), model.measure, state=states[-1]) == found


def test_seeds_differ_and_the_same_one_does_not() -> None:
    layers = make_layers()
    found = [evolve(layers, 0.5, make_settings(seed=seed), Model(layers, noise=0.3).measure) for seed in (0, 0, 1, 2)]
    assert found[0] == found[1]
    assert len({tuple(search.zeros.values()) for search in found}) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_not_finite_is_the_worst(bad: float) -> None:
    layers = make_layers()
    model, uniform = Model(layers), uniform_zeros(layers, 0.5)
    lost = evolve(layers, 0.5, make_settings(), lambda candidates, windows: [bad] * len(candidates))
    assert lost.zeros == uniform and lost.kl is None and lost.generation == 20
    assert Search.model_validate_json(lost.model_dump_json()) == lost

    def break_more_of_the_first(candidates: list[dict[str, int]], windows: list[int]) -> list[float]:
        first = layers[0].name
        kls = model.measure(candidates, windows)
        return [bad if zeros[first] > uniform[first] else kl for zeros, kl in zip(candidates, kls, strict=True)]

    found = evolve(layers, 0.5, make_settings(), break_more_of_the_first)
    assert found.zeros[layers[0].name] <= uniform[layers[0].name]
    assert found.zeros != uniform and found.kl is not None


def test_a_parent_stays_unless_a_child_is_better() -> None:
    found = evolve(make_layers(), 0.5, make_settings(), lambda candidates, windows: [1.0] * len(candidates))
    assert found.zeros == uniform_zeros(make_layers(), 0.5) and found.kl == 1.0


@pytest.mark.parametrize(("layers", "protect"), [(make_layers()[:1], []), (make_layers(), ["*"])])
def test_a_search_without_a_choice_ends_at_once(layers: list[LayerProfile], protect: list[str]) -> None:
    model = Model(layers)
    sparsity = 0.0 if protect else 0.5
    found = evolve(layers, sparsity, make_settings(protect=protect), model.measure)
    assert model.asked == [] and found == Search(zeros=uniform_zeros(layers, sparsity, protect))


def test_few_layers_have_few_children() -> None:
    layers = make_layers()[:2]
    model = Model(layers)
    evolve(layers, 0.5, make_settings(tokens=200), model.measure)
    generation = [zeros[layers[0].name] - 5_004 for zeros, windows in model.asked if len(windows) == 1]
    assert sorted(generation) == [-3 * 300, -2 * 300, -300, 300, 2 * 300, 3 * 300]


@pytest.mark.parametrize(
    "change",
    [
        lambda zeros: {**zeros, next(iter(zeros)): next(iter(zeros.values())) + 1},
        lambda zeros: dict(reversed(zeros.items())),
        lambda zeros: dict(list(zeros.items())[1:]),
        lambda zeros: uniform_zeros(make_layers(), 0.4),
        lambda zeros: dict(zip(zeros, list(zeros.values())[::-1], strict=True)),
    ],
)
def test_another_search_is_not_gone_on_with(change: Any) -> None:
    state = Search(zeros=change(uniform_zeros(make_layers(), 0.5)), generation=1)
    with pytest.raises(UserError, match=r"^the search to go on with was begun for other layers, another sparsity or"):
        evolve(make_layers(), 0.5, make_settings(), Model(make_layers()).measure, state=state)


def test_400_layers() -> None:
    layers = make_layers(blocks=100, weights=4_000_037)
    rules = make_settings(children=64, tokens=10 * (640 + 120))
    found = evolve(layers, 0.45, rules, lambda candidates, windows: [1.0] * len(candidates))
    assert found.generation == 10


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": [(4, 10), (2, 40)]}, "the last stage must have one survivor"),
        ({"stages": []}, "at least 1 item"),
        ({"stages": [(0, 1), (1, 4)]}, "greater than 0"),
        ({"stages": [(1, 0)]}, "greater than 0"),
        ({"step": 0}, "greater than 0"),
        ({"children": 0}, "greater than or equal to 1"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"max_layer_sparsity": 1.5}, "less than or equal to 1"),
        ({"generations": 0}, "greater than or equal to 1"),
        ({"parents": 4}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        make_settings(**changes)
