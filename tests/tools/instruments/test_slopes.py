"""What moving each group of layers costs: as by hand, and the same bits in the model afterwards."""

from collections.abc import Callable

import pytest
import torch

from billhook_kernels.methods import prune_weight
from graph.config import RunConfig
from graph.planning.budget import TokenBudget
from tests.benches import same, snapshot
from tests.situations import ignore
from tools.base.errors import ImpossiblePlan
from tools.instruments.functions import Draft, Round
from tools.instruments.slopes import measure_slopes
from tools.plans.layer_profile import group_layers
from tools.plans.recipe import Recipe, parse_recipe
from tools.results.losses import compare_kl

WANDA = Draft(sparsity=0.4, recipe=parse_recipe("wanda:uniform"))
REFIT = Draft(sparsity=0.4)


@pytest.mark.parametrize("accepted", [REFIT, WANDA])
def test_slopes_are_what_a_group_moved_by_hand_loses(accepted: Draft, make_round: Callable[..., Round]) -> None:
    budget = TokenBudget(RunConfig(), 0, 64)
    round_ = make_round(accepted, spend=budget.spend, count_new=budget.count_new)
    bench, before = round_.bench, snapshot(round_.bench)
    files = sorted(bench.directory.rglob("*.*"))
    figures = measure_slopes(round_)
    assert same(snapshot(bench), before) and bench.restore(round_.present) == []
    layers = bench.read_profile(round_.profile).layers
    groups = {name: group for name, group in group_layers(layers).items() if not name.endswith("v_proj")}
    assert figures["groups"].keys() == groups.keys(), "protected layers stay as they are"
    assert (figures["tokens"], budget.tokens) == (128, 128 * len(groups))
    left = {path for path in bench.directory.rglob("*.*") if path not in files}
    assert {path.suffix for path in left} == {".json"}, "losses by their keys alone"
    slopes = [row[4] for row in figures["groups"].values()]
    assert slopes == sorted(slopes, reverse=True)
    group = next(iter(figures["groups"]))
    share, sparsity, slope, error, per_model, _ = figures["groups"][group]
    names = [layer.name for layer in groups[group]]
    weights = sum(bench.dense[name].numel() for name in names)
    assert share == pytest.approx(weights / sum(layer.weights for layer in layers), rel=1e-3)
    assert sparsity == pytest.approx(
        sum(int((bench.by_name[x].weight_OI == 0).sum()) for x in names) / weights, rel=1e-3
    )
    assert per_model == pytest.approx(slope / share, rel=0.01) and error > 0
    again = measure_slopes(round_)
    assert again == figures and budget.tokens == 128 * len(groups), "read back at no cost"
    now = bench.evaluate(round_.present, "validation", round_.profile, ignore).take([0, 2])
    added = 0
    for name in names:
        layer = bench.by_name[name]
        weight_OI, more = layer.weight_OI.clone(), round(0.02 * layer.weight_OI.numel())
        recipe = Recipe(method="two-sided" if accepted is REFIT else "wanda", refit=False, statistics="dense")
        statistics = bench.profiles.find_statistics(round_.profile, name, recipe)
        moved = prune_weight(recipe.method, weight_OI, statistics, int((weight_OI == 0).sum()) + more, refit=False)
        stays_OI = moved.weight_OI != 0
        assert torch.equal(moved.weight_OI[stays_OI], weight_OI[stays_OI]), "none is refitted"
        layer.write(moved.weight_OI)
        added += more
    hidden = bench.profiles.read_hidden(round_.profile)[[0, 2]]
    losses, _ = bench.losses.measure("validation", [0, 2], hidden, "", ignore)
    change, spread = compare_kl(losses, now)
    points = 100 * added / weights
    assert (slope, error) == pytest.approx((change / points, spread / points), rel=1e-3)


def test_slopes_of_fewer_tokens_are_of_fewer_windows_and_cost_less(make_round: Callable[..., Round]) -> None:
    budget = TokenBudget(RunConfig(), 0, 64)
    round_ = make_round(WANDA, spend=budget.spend)
    half, one = measure_slopes(round_), measure_slopes(round_, 30)
    window, groups = round_.bench.settings.window, len(half["groups"])
    assert (half["tokens"], one["tokens"]) == (2 * window, window)
    assert budget.tokens == 3 * window * groups
    assert one["groups"].keys() == half["groups"].keys() and one["groups"] != half["groups"]


def test_slopes_that_there_are_not(make_round: Callable[..., Round]) -> None:
    with pytest.raises(ImpossiblePlan, match=r"^nothing is pruned yet"):
        measure_slopes(make_round())
