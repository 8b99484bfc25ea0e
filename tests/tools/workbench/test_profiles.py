"""The dense model is profiled once for each text, and comes out the same again."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tools.workbench.profiles
from tests.benches import MASK, REFIT, artifact_path, damage, ignore, open_bench, plan, prune, same, snapshot
from tests.team import join_team
from tools.base.errors import ImpossiblePlan, UserError
from tools.plans.allocate import allocate
from tools.plans.mix import mix_questions
from tools.plans.recipe import Recipe, parse_recipe
from tools.plans.work_order import order_allocation
from tools.statistics.collect import collect_questions, collect_statistics
from tools.statistics.known import ModelStatistics
from tools.workbench.bench import Workbench
from tools.workbench.evaluate import probe_orders
from tools.workbench.open import close_workbench


def test_a_profile_holds_every_layer_and_comes_out_the_same_again(bench: Workbench) -> None:
    before = snapshot(bench)
    profile = bench.profile(ignore)
    stored = bench.profiles.read(profile)
    assert [layer.name for layer in stored.layers] == [layer.name for layer in bench.weights.layers]
    assert stored.dense.finite and len(stored.dense.nll) == 3
    assert bench.store.read_tensors(stored.hidden)["hidden"].shape == (3, 64, 32)
    assert bench.profile(ignore) == profile
    prune(bench, profile, 0.5)
    assert bench.profile(ignore) == profile  # of the dense weights, whatever is in the model
    assert same(snapshot(bench), before)


def test_second_moments_wait_until_a_recipe_needs_them(bench: Workbench) -> None:
    whole = bench.profiles.read(bench.profile(ignore))
    profile = bench.profile(ignore, masks_only=True)
    assert bench.profiles.read(profile).moments == {}
    bench.pruner.prune(profile, order_allocation(MASK, plan(bench, profile, 0.5, MASK)), ignore)
    assert len(bench.index.read(".json")) == 3, "what was checked, what was opened, and the dense model's losses"
    refitted = bench.pruner.prune(profile, order_allocation(REFIT, plan(bench, profile, 0.5)), ignore)
    assert bench.profiles.find_moments(profile) == whole.moments
    planned = bench.pruner.planned_sparsity(refitted)
    assert dict(zip(bench.weights.by_name, bench.weights.sparsities(), strict=True)) == pytest.approx(planned)


def test_a_second_profile_makes_no_layer_and_no_curve_again(
    bench: Workbench, computed: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hang on the dense model's statistics, which a profile of the present weights leaves as they are."""
    recipes = [parse_recipe(label) for label in ("refit:kappa", "sparsegpt~sequential:alphapruning", "wanda:owl")]
    first = bench.profile(ignore)
    told = {recipe: bench.curves.describe_layers(first, recipe, ignore) for recipe in recipes}
    orders = [order_allocation(recipe, allocate(told[recipe], 0.4, recipe)) for recipe in recipes]
    checkpoints = [bench.pruner.prune(first, order, ignore) for order in orders]
    probed = probe_orders(bench, first, orders[:1], 2, ignore, back=checkpoints[0], keep=checkpoints)
    count = len(computed)
    assert count == 3 * len(bench.weights.layers)
    second = bench.profile(ignore, first)
    assert second != first
    for name in ("measure_kappa", "measure_alpha"):
        monkeypatch.setattr(tools.workbench.curves, name, pytest.fail)
    for recipe, order, checkpoint in zip(recipes, orders, checkpoints, strict=True):
        layers = bench.curves.describe_layers(second, recipe, ignore)
        own = [(x.kappa if recipe.needs_curves else x.alpha) for x in layers]
        assert own == [(x.kappa if recipe.needs_curves else x.alpha) for x in told[recipe]]
        assert bench.curves.has_layers(second, recipe)
        again = bench.pruner.prune(second, order, ignore)
        assert bench.pruner.read_checkpoint(again) == bench.pruner.read_checkpoint(checkpoint)
    monkeypatch.setattr(bench.pruner, "prune", pytest.fail)
    assert probe_orders(bench, second, orders[:1], 2, ignore, back=again) == probed
    assert len(computed) == count


@pytest.mark.parametrize("masks_only", [False, True])
def test_a_second_profile_has_curves_of_the_present_weights_and_prunes_by_what_the_dense_model_reads(
    bench: Workbench, masks_only: bool
) -> None:
    first = bench.profile(ignore, masks_only=masks_only)
    allocation = plan(bench, first, 0.5)
    pruned = bench.pruner.prune(first, order_allocation(REFIT, allocation), ignore)
    second = bench.profile(ignore, first)
    curves = [[layer.kappa for layer in bench.profiles.read(profile).layers] for profile in (first, second)]
    assert curves[0] != curves[1]
    present = dict(zip(bench.weights.by_name, bench.weights.sparsities(), strict=True))
    assert present == pytest.approx(bench.pruner.planned_sparsity(pruned)), "the weights are left as they were"
    again = bench.pruner.prune(second, order_allocation(REFIT, allocation), ignore)
    assert bench.pruner.read_checkpoint(again) == bench.pruner.read_checkpoint(pruned), (
        "the same layers, by their contents"
    )


def test_a_profile_of_a_second_process_is_the_same(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    settings, directory = bench.settings, bench.directory
    close_workbench()
    again = open_bench(settings, directory)
    assert again is not bench
    assert again.profile(ignore) == profile
    first, second = prune(again, profile, 0.4), prune(again, profile, 0.4)
    assert first == second


def test_a_dense_model_that_is_not_finite_is_refused(bench: Workbench) -> None:
    bench.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(
        UserError, match=r"^the dense model's loss is not finite on the validation text; try --dtype fp32$"
    ):
        bench.profile(ignore)


def test_statistics_that_are_not_finite_are_refused(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(*arguments: Any) -> ModelStatistics:
        statistics = collect_statistics(*arguments)
        statistics.gradient_square[bench.weights.layers[3].name][1] = math.inf
        return statistics

    monkeypatch.setattr(tools.workbench.profiles, "collect_statistics", spoil)
    sentence = "activations or gradients of model.layers.0.self_attn.o_proj are not finite in fp32; try --dtype"
    with pytest.raises(UserError, match=sentence):
        bench.profile(ignore)


def read_known(bench: Workbench, profile: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, float]]:
    """(mean squares, second moments, gradient scores), each by layer."""
    stored = bench.profiles.read(profile)
    found = {name: bench.profiles.find_statistics(profile, name, Recipe()) for name in bench.weights.by_name}
    moments = {name: own.second_moment_II for name, own in found.items() if own.second_moment_II is not None}
    return {n: own.mean_square_I for n, own in found.items()}, moments, {x.name: x.gradient for x in stored.layers}


def test_any_mixture_with_questions_is_a_sum_of_what_each_text_says(asking: Any, tmp_path: Path) -> None:
    """What questions say is what a run says whose own text they are: but for labels, which each window draws itself."""
    bench = open_bench(asking, tmp_path / "mixed")
    alone = open_bench(asking.model_copy(update={"calibration_mix": 1.0}), tmp_path / "questions")
    profile, other = bench.profile(ignore), alone.profile(ignore)
    ours, theirs = read_known(bench, profile), read_known(alone, other)
    for label, share in (("refit~quarter", 0.25), ("refit~half", 0.5), ("refit~0.9questions~0.1run", 0.9)):
        found = bench.profiles.find(profile, parse_recipe(label), ignore)
        means, moments, gradients = read_known(bench, found)
        for name, mean_I in means.items():
            assert torch.allclose(mean_I, (1 - share) * ours[0][name] + share * theirs[0][name], rtol=1e-5)
            whole_II = (1 - share) * ours[1][name] + share * theirs[1][name]
            assert torch.allclose(moments[name], whole_II, rtol=1e-5, atol=1e-7)
            assert gradients[name] == pytest.approx((1 - share) * ours[2][name] + share * theirs[2][name], rel=1e-5)
        stored = bench.profiles.read(found)
        for layer in stored.layers:
            own, asked = (stored.parts[text].kappa[layer.name] for text in ("run", "questions"))
            levels = [(1 - share) * a + share * b for a, b in zip(own, asked, strict=True)]
            assert layer.kappa == pytest.approx(levels, rel=1e-12)
    run, whole = bench.profiles.read(profile), bench.profiles.find(profile, parse_recipe("refit~1run"), ignore)
    assert (bench.profiles.read(whole).layers, bench.profiles.read(whole).means) == (run.layers, run.means)


@pytest.mark.parametrize("label", ["two-sided:kappa", "refit:kappa", "sparsegpt~sequential:owl"])
def test_layers_are_pruned_by_a_mixture_with_questions(asking: Any, tmp_path: Path, label: str) -> None:
    bench = open_bench(asking, tmp_path / "run")
    profile, recipe = bench.profile(ignore), parse_recipe(label)
    own = bench.pruner.prune(profile, order_allocation(recipe, plan(bench, profile, 0.5, recipe)), ignore)
    mixed = recipe.model_copy(update={"mix": mix_questions(0.5)})
    allocation = allocate(bench.curves.describe_layers(profile, mixed, ignore), 0.5, mixed)
    order = order_allocation(mixed, allocation)
    checkpoint = bench.pruner.prune(profile, order, ignore)
    assert bench.pruner.is_made_of(checkpoint, profile, order)
    assert checkpoint != own and not bench.pruner.is_made_of(own, profile, order)
    assert not bench.pruner.is_made_of(checkpoint, profile, order_allocation(recipe, allocation))


def test_questions_are_profiled_once(asking: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profiled: list[str] = []

    def count(*arguments: Any) -> ModelStatistics:
        profiled.append("run")
        return collect_statistics(*arguments)

    def count_questions(*arguments: Any) -> ModelStatistics:
        profiled.append("questions")
        return collect_questions(*arguments)

    monkeypatch.setattr(tools.workbench.profiles, "collect_statistics", count)
    monkeypatch.setattr(tools.workbench.profiles, "collect_questions", count_questions)
    bench = open_bench(asking, tmp_path / "run")
    profile = bench.profile(ignore, masks_only=True)
    recipe = parse_recipe("refit~half:kappa-mask")
    bench.curves.read_layers(profile, recipe, ignore)
    assert profiled == ["run"] and not bench.curves.has_layers(profile, recipe)
    allocation = allocate(bench.curves.describe_layers(profile, recipe, ignore), 0.5, recipe)
    assert bench.curves.has_layers(profile, recipe)
    checkpoint = bench.pruner.prune(profile, order_allocation(recipe, allocation), ignore)
    expected = snapshot(bench)
    assert profiled == ["run", "questions"]
    stored = bench.profiles.read(bench.profiles.find(profile, recipe, ignore))
    assert (stored.calibration, stored.moments, stored.mix) == ("questions", {}, {"run": 0.5, "questions": 0.5})
    assert bench.curves.has_layers(profile, parse_recipe("refit~quarter:kappa-mask"))
    bench.curves.describe_layers(profile, parse_recipe("refit~0.1questions~0.9run:kappa-mask"), ignore)
    assert stored.dense == bench.profiles.read(profile).dense

    artifact = artifact_path(bench, checkpoint, bench.weights.layers[3].name)
    close_workbench()
    damage(artifact)
    seen: list[str] = []
    bench = open_bench(asking, tmp_path / "run", seen.append)
    assert same(expected, (bench.pruner.restore(checkpoint), snapshot(bench))[1])
    assert profiled == ["run", "questions"] and len(seen) == 1


@pytest.mark.parametrize("label", ["refit~half:kappa", "sparsegpt~quarter~sequential"])
def test_workers_walk_through_the_same_text(asking: Any, tmp_path: Path, label: str) -> None:
    recipe, results = parse_recipe(label), []
    for name in ("alone", "team"):
        bench = open_bench(asking, tmp_path / name)
        if name == "team":
            join_team(bench)
        profile = bench.profile(ignore)
        allocation = allocate(bench.curves.describe_layers(profile, recipe, ignore), 0.5, recipe)
        results.append((profile, bench.pruner.prune(profile, order_allocation(recipe, allocation), ignore)))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"questions": ""},
            "mix weighs 'questions', and this run has neither named texts nor questions; leave it out",
        ),
        (
            {"calibration_windows": 64, "question_pairs": 140},
            "mix needs 64 windows of questions that are in no other text; there are fewer, or one of them is; leave it",
        ),
    ],
)
def test_a_text_that_the_run_has_not_is_refused_before_anything_is_measured(
    asking: Any, tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    bench = open_bench(asking.model_copy(update=fields), tmp_path / "run")
    profile = bench.profile(ignore)
    recipe = parse_recipe("refit~half:kappa")
    with pytest.raises(ImpossiblePlan, match=re.escape(reason)):
        bench.curves.read_layers(profile, recipe, ignore)
    with pytest.raises(ImpossiblePlan, match=re.escape(reason)):
        bench.pruner.prune(profile, order_allocation(recipe, plan(bench, profile, 0.5, MASK)), ignore)


def test_a_mixture_is_of_the_dense_model_whatever_was_profiled_again(
    asking: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = open_bench(asking, tmp_path / "run")
    profile, recipe = bench.profile(ignore), parse_recipe("refit~half:kappa-mask")
    expected = bench.curves.describe_layers(profile, recipe, ignore)
    monkeypatch.setattr(tools.workbench.profiles, "collect_questions", None)  # once is enough
    again = profile
    for share in (0.3, 0.5):
        prune(bench, profile, share)
        again = bench.profile(ignore, first=again)
        assert bench.profiles.read(again).first == profile
        assert bench.curves.describe_layers(again, recipe, ignore) == expected
