"""What a planner can find out: the figures that a real round would give, and the same bits in the model afterwards."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tools.instruments.comparisons
import tools.instruments.functions
import tools.statistics.table
import tools.workbench.curves
import tools.workbench.losses
from graph.config import RunConfig
from graph.planning.budget import TokenBudget
from graph.planning.orders import resolve
from graph.planning.plan import Plan
from tests.named import name_texts
from tests.situations import ignore, open_orders
from tests.team import make_team
from tests.tiny import tiny_settings
from tools.base.errors import ImpossiblePlan
from tools.instruments.comparisons import (
    compare_with_trial,
    find_best_whole,
    read_losses,
    round_figure,
    sum_up_probes,
)
from tools.instruments.functions import (
    MAX_INSPECTED,
    MAX_TOLD_GROUPS,
    Draft,
    Round,
    inspect_layers,
    predict,
    predict_all,
    probe,
)
from tools.instruments.probed import PastProbe
from tools.models.layers import Layer
from tools.plans.layer_profile import LEVELS, predict_layer_kl
from tools.plans.recipe import Adjustment, Recipe, parse_recipe
from tools.results.losses import compare_kl
from tools.workbench.bench import Workbench
from tools.workbench.open import use_workbench
from tools.workbench.store import DENSE

WANDA = Draft(sparsity=0.4, recipe=parse_recipe("wanda:uniform"))
REFIT = Draft(sparsity=0.4)


def hash_weights(bench: Workbench) -> str:
    """A hash of the bits of all weights."""
    digest = hashlib.sha256()
    for layer in bench.weights.layers:
        digest.update(layer.stored_weight.contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def strip(figures: dict[str, Any]) -> dict[str, Any]:
    """What a probe found, for itself."""
    return {name: figure for name, figure in figures.items() if name != "kl_minus_probe"}


# --- inspect -------------------------------------------------------------------------------------------------------


def test_inspect_shows_the_whole_profile_of_what_a_selector_means(make_round: Callable[..., Round]) -> None:
    round_ = make_round(WANDA)
    figures = inspect_layers(round_, "blocks 0 · *.q_proj")
    layer = round_.bench.profiles.read(round_.profile).layers[0]
    assert layer.name.endswith("0.self_attn.q_proj")
    name, weights, now, wanda_z, grad_z, peak, *kappa = figures["rows"][0].split()
    assert figures["columns"].split() == [
        *("name", "weights", "sparsity_now", "wanda_z", "grad_z", "peak"),
        *(f"kl{level:g}" for level in LEVELS),
    ]
    assert (figures["layers"], figures["weights"], len(figures["rows"])) == (1, layer.weights, 1)
    assert (name, int(weights)) == (layer.name, layer.weights)
    assert float(now) == pytest.approx(figures["sparsity_now"], rel=0.01)
    assert figures["sparsity_now"] > 0.4, "the protected layers leave more to the others"
    assert float(peak) == pytest.approx(layer.peak, rel=0.01)
    assert [float(z) for z in (wanda_z, grad_z)] == pytest.approx([layer.wanda_z, layer.gradient_z], rel=0.01)
    assert [float(kl) for kl in kappa] == pytest.approx(layer.kappa, rel=0.01)
    assert list(figures["kl_together"].values()) == pytest.approx(layer.kappa, rel=1e-3)


def test_inspect_leaves_rows_out_aloud(make_round: Callable[..., Round], monkeypatch: pytest.MonkeyPatch) -> None:
    round_ = make_round()
    layers = len(round_.bench.weights.layers)
    assert layers <= MAX_INSPECTED and "rows_left_out" not in inspect_layers(round_, "*")
    monkeypatch.setattr("tools.instruments.functions.MAX_INSPECTED", 3)
    figures = inspect_layers(round_, "*")
    assert (figures["layers"], len(figures["rows"]), figures["rows_left_out"]) == (layers, 3, layers - 3)
    with pytest.raises(ImpossiblePlan, match="means no layer"):
        inspect_layers(round_, "*.nothing")


# --- predict -------------------------------------------------------------------------------------------------------


def test_predict_is_the_allocation_that_a_round_would_have(make_round: Callable[..., Round]) -> None:
    round_ = make_round(WANDA)
    bench, before = round_.bench, hash_weights(round_.bench)
    names = list(bench.weights.by_name)
    groups = {"early": names[: len(names) // 2], "late": names[len(names) // 2 :]}
    round_ = replace(round_, groups=groups)
    figures = predict(round_, REFIT)
    assert hash_weights(bench) == before, "curves are measured on the dense weights"
    plan, config = Plan.model_validate(REFIT.model_dump()), RunConfig(protect=["*.v_proj"])
    allocation = resolve(plan, bench.curves.describe_layers(round_.profile, REFIT.recipe, ignore), config)
    masks = resolve(plan, bench.profiles.read(round_.profile).layers, config)
    assert figures["sparsity"] == pytest.approx(0.4, abs=5e-4)
    assert figures["predicted_kl"] == pytest.approx(allocation.predicted_kl, rel=1e-3)
    assert figures["mask_kl"] >= masks.predicted_kl * 0.999, "no allocation is better by the curves of the mask"
    assert sum(kl for _, kl in figures["groups"].values()) == pytest.approx(1, abs=0.01)
    for selector, (share, _) in figures["groups"].items():
        zeros = sum(allocation.zeros[name] for name in groups[selector])
        weights = sum(bench.weights.dense[name].numel() for name in groups[selector])
        assert share == pytest.approx(zeros / weights, rel=1e-3)


def test_predict_names_the_groups_that_cost_most(make_round: Callable[..., Round]) -> None:
    round_ = make_round()
    names = list(round_.bench.weights.by_name)
    groups = {f"g{i}": [names[i % len(names)]] for i in range(MAX_TOLD_GROUPS + 5)}
    figures = predict(replace(round_, groups=groups), WANDA)
    costs = [kl for _, kl in figures["groups"].values()]
    assert costs == sorted(costs, reverse=True)
    assert (len(costs), figures["groups_left_out"]) == (MAX_TOLD_GROUPS, 5)


def test_nothing_is_measured_for_an_impossible_draft(
    make_round: Callable[..., Round], monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = make_round()
    monkeypatch.setattr(tools.workbench.curves, "measure_kappa", pytest.fail)
    bounds = Adjustment(selector="*", action="bounds", high=0.2)
    for instrument in (lambda draft: predict(round_, draft), lambda draft: probe(round_, [draft], 1)):
        with pytest.raises(ImpossiblePlan, match="allow at most"):
            instrument(Draft(sparsity=0.4, adjustments=[bounds]))


def test_predict_tells_the_share_of_each_layer_that_is_asked_for(
    make_round: Callable[..., Round], monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = make_round()
    mask = Draft(sparsity=0.4, recipe=parse_recipe("two-sided:kappa-mask"))
    zeros = round_.resolve(mask).zeros
    assert "alone" not in predict(round_, mask)
    alone = mask.model_copy(update={"alone": "*.down_proj"})
    told = predict(round_, alone)["alone"]
    (probed,) = probe(round_, [alone])
    assert predict(round_, alone)["predicted_kl"] == probed["predicted_kl"] < predict(round_, mask)["predicted_kl"]
    assert list(told) == [name for name in zeros if name.endswith(".down_proj")]
    for name, share in told.items():
        assert share == pytest.approx(zeros[name] / round_.bench.weights.dense[name].numel(), rel=1e-3)
    monkeypatch.setattr("tools.instruments.functions.MAX_INSPECTED", 1)
    assert list(predict(round_, alone)["alone"].items()) == [*told.items()][:1]


def test_several_predictions_stand_beside_one_another(make_round: Callable[..., Round]) -> None:
    round_ = make_round()
    names = list(round_.bench.weights.by_name)
    round_ = replace(round_, groups={"early": names[: len(names) // 2], "late": names[len(names) // 2 :]})
    bounds = Adjustment(selector="*", action="bounds", high=0.2)
    impossible = Draft(sparsity=0.4, adjustments=[bounds])
    alone = [predict(round_, draft) for draft in (WANDA, REFIT)]
    figures = predict_all(round_, [WANDA, impossible, REFIT])
    wanda, problem, refit = figures["plans"]
    assert [wanda, refit] == [{k: own[k] for k in ("sparsity", "predicted_kl", "mask_kl")} for own in alone]
    assert list(problem) == ["error"] and "allow at most" in problem["error"]
    assert figures["groups"] == {
        name: [alone[0]["groups"][name][0], None, alone[1]["groups"][name][0]] for name in alone[0]["groups"]
    }
    other = WANDA.model_copy(update={"recipe": parse_recipe("magnitude:uniform")})
    alike = predict_all(round_, [WANDA.model_copy(update={"recipe": parse_recipe("wanda:uniform")}), other])
    assert alike["columns"] == "group: sparsity by all of them"
    assert alike["groups"] == {name: share for name, (share, _) in predict(round_, other)["groups"].items()}
    with pytest.raises(ImpossiblePlan, match="allow at most"):
        predict_all(round_, [impossible, impossible])


# --- probe ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["refit:uniform", "wanda~sequential:uniform"])
def test_a_probe_of_some_layers_leaves_all_others_dense(make_round: Callable[..., Round], recipe: str) -> None:
    round_ = make_round(WANDA)
    bench, before = round_.bench, hash_weights(round_.bench)
    draft = Draft(sparsity=0.4, recipe=parse_recipe(recipe), alone="blocks 1 · *.down_proj")
    order = round_.resolve(draft)
    (name,) = (x for x in order.zeros if x.endswith("1.mlp.down_proj"))
    (figures,) = probe(round_, [draft], whole=True)
    assert hash_weights(bench) == before
    alone = order.model_copy(
        update={
            "layers": {x: y if x == name else y.model_copy(update={"zeros": 0}) for x, y in order.layers.items()},
        }
    )
    checkpoint = bench.pruner.prune(round_.profile, alone, ignore)
    assert {x for x, made in bench.pruner.read_checkpoint(checkpoint).items() if made.artifact != DENSE} == {name}
    real = bench.evaluator.evaluate(checkpoint, "validation", round_.profile, ignore)
    assert figures["kl"] == pytest.approx(real.mean_kl, rel=1e-3)
    assert figures["worst_window_kl"] == pytest.approx(max(real.kl), rel=1e-3)
    (layer,) = (x for x in bench.profiles.read(round_.profile).layers if x.name == name)
    own = predict_layer_kl(layer, np.array([order.zeros[name] / layer.weights]))[0]
    assert figures["predicted_kl"] == pytest.approx(own, rel=1e-3), "of these layers"
    assert "kl_change" not in figures, "beside weights that are all pruned it would say nothing"
    assert figures["sparsity"] == pytest.approx(
        order.zeros[name] / sum(x.numel() for x in bench.weights.dense.values()), 1e-3
    )
    with pytest.raises(ImpossiblePlan, match="means no layer"):
        probe(round_, [draft.model_copy(update={"alone": "*.nothing"})])


def test_probes_of_some_layers_are_compared_with_their_like(make_round: Callable[..., Round]) -> None:
    round_ = make_round()
    drafts = [Draft(sparsity=0.4, recipe=parse_recipe(x)) for x in ("wanda:uniform", "magnitude:uniform")]
    some = [draft.model_copy(update={"alone": "*.down_proj"}) for draft in drafts]
    figures = probe(round_, [*drafts, *some, drafts[0].model_copy(update={"alone": "*"})])
    told = [[*x["kl_minus_probe"]] for x in figures]
    assert told == [["2"], ["1"], ["4"], ["3"], ["2"]], "all layers are a plan like any other"
    assert figures[4]["probe"] == figures[0]["probe"]
    assert [x.alone for x in round_.probed] == ["", "", "*.down_proj", "*.down_proj"]
    whole, part = (min(pair, key=lambda place: figures[place]["kl"]) for pair in ((0, 1), (2, 3)))
    best = find_best_whole(round_.probed)
    assert best is not None and best.checkpoint == round_.probed[whole].checkpoint
    past = sum_up_probes(round_.probed, 1, 0)
    assert [x.number for x in past if x.losses is not None] == [whole + 1]
    assert [x.best for x in past] == [0 if place in (whole, part) else place + (-1) ** place + 1 for place in range(4)]
    assert past[3].plan == "*.down_proj alone as by 40.0% magnitude:uniform"
    only = [x for x in round_.probed if x.alone]
    assert [x.losses for x in sum_up_probes(only, 1, 0)] == [None, None]
    later = replace(round_, probed=[], past=past)
    mask = Draft(sparsity=0.4, recipe=Recipe(method="two-sided", refit=False))
    both = probe(later, [mask, mask.model_copy(update={"alone": "*.down_proj"})])
    ours = read_losses(later.probed[0])
    assert both[0]["kl_minus_probe"] == {
        f"{whole + 1}": [pytest.approx(x, rel=1e-3) for x in compare_kl(ours, read_losses(round_.probed[whole]))]
    }, "the best of an earlier round"
    assert "kl_minus_probe" not in both[1]


@pytest.mark.parametrize(("tokens", "windows"), [(1, 1), (64, 1), (None, 2), (10**9, 3)])
@pytest.mark.parametrize("accepted", [None, WANDA])
def test_probe_measures_what_a_round_would_and_puts_everything_back(
    accepted: Draft | None, tokens: int | None, windows: int, make_round: Callable[..., Round]
) -> None:
    round_ = make_round(accepted)
    bench, before = round_.bench, hash_weights(round_.bench)
    present = bench.evaluator.evaluate(round_.present, "validation", round_.profile, ignore)
    figures = probe(round_, [REFIT], tokens)[0]
    assert hash_weights(bench) == before
    assert bench.pruner.restore(round_.present) == []
    checkpoint = bench.pruner.prune(round_.profile, round_.resolve(REFIT), ignore)
    real = bench.evaluator.evaluate(checkpoint, "validation", round_.profile, ignore)
    part = [0, 2] if windows == 2 else list(range(windows))
    kl, nll = ([losses[window] for window in part] for losses in (real.kl, real.nll))
    dense = bench.profiles.read(round_.profile).dense
    assert figures["tokens"] == 64 * windows
    assert figures["kl"] == pytest.approx(sum(kl) / windows, rel=1e-3)
    assert (figures["kl_error"] is None) == (windows == 1)
    assert figures["perplexity"] == pytest.approx(2.718281828 ** (sum(nll) / windows), rel=1e-3)
    if windows == 3:
        assert figures["dense_perplexity"] == pytest.approx(dense.perplexity, rel=1e-3)
    assert ("kl_change" in figures) == (accepted is not None)
    if accepted:
        changes = [real.kl[window] - present.kl[window] for window in part]
        assert figures["kl_change"] == pytest.approx(sum(changes) / windows, rel=1e-3)
        assert figures["present_kl"] == pytest.approx(figures["kl"] - figures["kl_change"], rel=1e-2)


def test_a_probe_says_what_changed_on_each_named_text(tmp_path: Path, tiny_llama: Path, workbench_closed: None) -> None:
    settings = tiny_settings(tiny_llama, **name_texts(tmp_path / "texts"))
    with use_workbench(settings, tmp_path / "run", pytest.fail, ignore) as bench:
        profile = bench.profile(ignore)
        orders = open_orders(bench, profile, RunConfig(), DENSE)
        present = bench.pruner.prune(profile, orders(Plan.model_validate(WANDA.model_dump())), ignore)
        round_ = Round(
            bench, profile, lambda draft: orders(Plan.model_validate(draft.model_dump())), ignore, present=present
        )
        figures = probe(round_, [REFIT], whole=True)[0]
        before = bench.evaluator.evaluate(present, "validation", profile, ignore)
    for name, text in figures["texts"].items():
        assert text["kl_change"] == pytest.approx(text["kl"] - before.take_text(name).mean_kl, abs=2e-4)
        assert text["kl_change_error"] > 0
    [past] = sum_up_probes(round_.probed, 1, 0)
    assert past.texts == {x: (y["kl_change"], y["kl_change_error"]) for x, y in figures["texts"].items()}
    code, prose = (figures["texts"][name]["kl_change"] for name in ("code", "prose"))
    assert figures["kl_change"] == pytest.approx(0.75 * code + 0.25 * prose, abs=1e-4)


def test_probes_are_told_apart_on_each_named_text_and_in_later_rounds(
    tmp_path: Path, tiny_llama: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(tiny_llama, **name_texts(tmp_path / "texts"))
    with use_workbench(settings, tmp_path / "run", pytest.fail, ignore) as bench:
        profile = bench.profile(ignore)
        orders = open_orders(bench, profile, RunConfig(), DENSE)
        round_ = Round(bench, profile, lambda draft: orders(Plan.model_validate(draft.model_dump())), ignore)
        figures = [*probe(round_, [REFIT], whole=True), *probe(round_, [WANDA])]
        monkeypatch.setattr(tools.instruments.comparisons, "MOST_DIFFERENCES", 3)
        last = probe(round_, [Draft(sparsity=0.2, recipe=WANDA.recipe)])[0]
    refit, wanda = (read_losses(probed) for probed in round_.probed[:2])
    refit = refit.take([0, 2, 3, 5])  # what the shorter one has
    for texts, ours, theirs in (
        (figures[1], wanda, refit),
        *((figures[1]["texts"][name], wanda.take_text(name), refit.take_text(name)) for name in ("code", "prose")),
    ):
        assert texts["kl_minus_probe"] == {"1": [pytest.approx(x, rel=1e-3) for x in compare_kl(ours, theirs)]}
    assert "kl_minus_probe" not in figures[0]["texts"]["code"], "the first of a round has none beside it"
    assert [list(x["kl_minus_probe"]) for x in (last, last["texts"]["code"])] == [["1"], ["1"]], "the best alone"
    past = sum_up_probes(round_.probed, 4, 10)
    change, error = (round_figure(x) for x in compare_kl(wanda, refit))
    assert [(x.number, x.best, x.behind, x.behind_error) for x in past[:2]] == [
        (11, 0, None, None),
        (12, 11, change, error),
    ]
    assert (past[2].number, past[2].best) == (13, 11)
    assert [x.losses is not None for x in past] == [True, False, False], "of the best"
    kept = compare_with_trial(past, 4, read_losses(round_.probed[0]))
    assert [x.trial for x in kept] == [None] * 3, "the trial is what it probed"
    assert [x.losses for x in kept] == [x.losses for x in past], "of the best, for probes of later rounds"
    whole = read_losses(round_.probed[0])
    other = whole.model_copy(update={"kl": [kl + 0.25 + 0.01 * i for i, kl in enumerate(whole.kl)]})
    told = compare_with_trial(past, 4, other)
    assert (told[0].trial, told[0].trial_error) == tuple(round_figure(x) for x in compare_kl(other, whole))
    assert [x.trial for x in told[1:]] == [None, None]
    assert compare_with_trial(past, 5, other)[0].trial is None, "the trial of a later round, for this one had none"


def test_a_probe_on_all_text_is_the_evaluation_of_the_round(
    make_round: Callable[..., Round], monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = make_round()
    figures = probe(round_, [WANDA], whole=True)[0]
    monkeypatch.setattr(tools.statistics.table, "prune_weight", pytest.fail)
    monkeypatch.setattr(tools.workbench.losses, "evaluate_windows", pytest.fail)
    bench = round_.bench
    checkpoint = bench.pruner.prune(round_.profile, round_.resolve(WANDA), ignore)
    evaluation = bench.evaluator.evaluate(checkpoint, "validation", round_.profile, ignore)
    assert evaluation.mean_kl == pytest.approx(figures["kl"], rel=1e-3)


def test_a_probe_is_measured_once(make_round: Callable[..., Round], monkeypatch: pytest.MonkeyPatch) -> None:
    round_ = make_round()
    figures = probe(round_, [REFIT], 100)[0]
    assert figures.pop("probe") == 1
    probe(round_, [WANDA], 100)
    monkeypatch.setattr(tools.statistics.table, "prune_weight", pytest.fail)
    monkeypatch.setattr(tools.workbench.losses, "evaluate_windows", pytest.fail)
    again = probe(round_, [REFIT], 128)[0]
    assert (again.pop("kl_minus_probe").keys(), again.pop("probe")) == ({"2"}, 1)
    assert again == figures, "on as many windows"


@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize("tokens", [100, 192])
def test_several_drafts_are_measured_as_each_alone(
    workers: bool, tokens: int, make_round: Callable[..., Round], monkeypatch: pytest.MonkeyPatch
) -> None:
    booked: list[int] = []
    round_ = make_round(WANDA, book=lambda tokens, *_: booked.append(tokens))
    bench = round_.bench
    bounds = Adjustment(selector="*", action="bounds", high=0.2)
    drafts = [REFIT, Draft(sparsity=0.4, adjustments=[bounds]), Draft(sparsity=0.2, recipe=WANDA.recipe), REFIT, WANDA]
    alone = [probe(round_, [draft], tokens)[0] for draft in (REFIT, drafts[2], WANDA)]
    assert booked == [2 * 64 if tokens == 100 else 3 * 64] * 3
    for made in (bench.store.directory / "index.jsonl", *(bench.directory / "evaluations").iterdir()):
        made.unlink()
    bench.evaluator.evaluate(round_.present, "validation", round_.profile, ignore)
    before = hash_weights(bench)
    team = make_team(bench, 3)
    if workers:
        monkeypatch.setattr(bench.crew, "cluster", team)
        monkeypatch.setattr(bench.crew, "team", team)
    round_ = replace(round_, probed=[])
    figures = probe(round_, drafts, tokens)
    beside = [figures[number].get("kl_minus_probe") for number in (0, 2, 3, 4)]
    assert [list(x) for x in beside if x] == [["2", "3"], ["1", "3"], ["2", "3"], ["1", "2"]]
    assert beside[0]["2"][0] == -beside[1]["1"][0] == pytest.approx(alone[0]["kl"] - alone[1]["kl"], rel=0.02)
    assert beside[0]["2"][1] == beside[1]["1"][1] > 0
    assert [strip(figures[number]) for number in (0, 2, 3, 4)] == [strip(alone[number]) for number in (0, 1, 0, 2)]
    assert list(figures[1]) == ["error"] and "allow at most" in figures[1]["error"]
    each, first = booked[0], len(booked)
    assert booked[3:] == ([3 * each, each] if workers else [each, each, 0, each]), "all that can be, as they are begun"
    assert hash_weights(bench) == before
    assert len(team.handed) == (2 if workers else 0)
    assert probe(round_, drafts, tokens) == figures and len(team.handed) == (2 if workers else 0)
    assert not any(booked[first:]), "what is read back costs nothing"


def test_drafts_none_of_which_can_be(make_round: Callable[..., Round]) -> None:
    drafts = [
        Draft(sparsity=0.4, adjustments=[Adjustment(selector="*", action="bounds", high=high)]) for high in (0.1, 0.2)
    ]
    with pytest.raises(ImpossiblePlan, match=r"allow at most .*; .*allow at most"):
        probe(make_round(), drafts, 1)


def test_a_probe_is_kept_for_the_round(make_round: Callable[..., Round], monkeypatch: pytest.MonkeyPatch) -> None:
    """The best one's layers and the losses of every one: pruning is not done again, nor measuring what was measured."""
    round_ = make_round()
    bench, worse = round_.bench, Draft(sparsity=0.4, recipe=Recipe(method="magnitude", refit=False))
    assert probe(round_, [REFIT])[0]["kl"] < probe(round_, [worse])[0]["kl"]
    real, measured = tools.workbench.losses.evaluate_windows, list[int]()

    def count(model: Any, windows_BT: Any, *more: Any, **named: Any) -> Any:
        measured.append(len(windows_BT))
        return real(model, windows_BT, *more, **named)

    monkeypatch.setattr(tools.workbench.losses, "evaluate_windows", count)
    with monkeypatch.context() as patch:
        patch.setattr(tools.statistics.table, "prune_weight", pytest.fail)
        checkpoint = bench.pruner.prune(round_.profile, round_.resolve(REFIT), ignore)
    kept = bench.evaluator.evaluate(checkpoint, "validation", round_.profile, ignore)
    assert measured == [1], "of three windows the probe had two"
    losses = round_.probed[0].losses
    assert (losses["kl"], round_.probed[0].windows) == ([kept.kl[0], kept.kl[2]], [0, 2])
    for path in (bench.directory / "evaluations").iterdir():
        path.unlink()
    assert bench.evaluator.evaluate(checkpoint, "validation", round_.profile, ignore) == kept, "to the bit"
    assert [(x.tokens, x.checkpoint == checkpoint) for x in round_.probed] == [(128, True), (128, False)]


def test_probes_are_numbered_from_those_of_earlier_rounds_on(make_round: Callable[..., Round]) -> None:
    plain, later = (
        make_round(),
        make_round(
            past=[
                PastProbe(
                    number=7, iteration=1, plan="x", tokens=64, kl=1, kl_error=None, change=None, change_error=None
                )
            ]
        ),
    )
    told = [probe(round_, [WANDA, REFIT]) for round_ in (plain, later)]
    assert [[(x["probe"], [*x["kl_minus_probe"]]) for x in figures] for figures in told] == [
        [(1, ["2"]), (2, ["1"])],
        [(8, ["9"]), (9, ["8"])],
    ]
    assert read_losses(later.probed[1]) == read_losses(plain.probed[1]) != read_losses(plain.probed[0])


def test_many_probes_take_the_room_of_one(make_round: Callable[..., Round]) -> None:
    round_ = make_round(WANDA)
    bench = round_.bench
    kept = bench.pruner.prune(round_.profile, round_.resolve(Draft(sparsity=0.3, recipe=WANDA.recipe)), ignore)
    bench.pruner.restore(round_.present)
    round_ = replace(round_, keep=[kept])
    count = len([*bench.store.directory.rglob("*.safetensors")])
    sizes = []
    for sparsity in (0.1, 0.2, 0.35):
        probe(round_, [Draft(sparsity=sparsity, recipe=Recipe(method="two-sided", refit=False))], 1)
        sizes.append(len([*bench.store.directory.rglob("*.safetensors")]) - count)
    assert sizes[0] == sizes[1] == sizes[2] > 0
    for checkpoint in (kept, round_.present):
        assert all(
            record.artifact == DENSE or bench.store.has(record.artifact, ".safetensors")
            for record in bench.pruner.read_checkpoint(checkpoint).values()
        )


def test_tokens_of_a_probe_are_booked_before_it_is_made(make_round: Callable[..., Round]) -> None:
    booked: list[int] = []
    round_ = make_round(book=lambda tokens, *_: booked.append(tokens))
    probe(round_, [WANDA], 65)
    probe(round_, [WANDA], 1_000_000)
    assert booked == [128, 64], "whole windows of 64 tokens, at most the three that there are, and none twice"

    def refuse(*_: Any) -> None:
        raise ValueError("none are left")

    before = hash_weights(round_.bench)
    refused = replace(round_, book=refuse)
    with pytest.raises(ValueError, match="none are left"):
        probe(refused, [Draft(sparsity=0.2)], 1)
    assert hash_weights(round_.bench) == before


def test_plans_of_a_probe_for_which_no_seconds_are_left_are_not_begun(make_round: Callable[..., Round]) -> None:
    booked: list[int] = []
    round_ = make_round(book=lambda tokens, *_: booked.append(tokens), in_time=lambda: len(booked) < 2)
    before = hash_weights(round_.bench)
    drafts = [Draft(sparsity=share, recipe=WANDA.recipe) for share in (0.2, 0.3, 0.4)]
    figures = probe(round_, drafts, 64)
    assert [figure.get("error") for figure in figures] == [
        None,
        None,
        "not begun: those before it took all the seconds that were left",
    ]
    assert (booked, len(round_.probed)) == ([64, 64], 2)
    assert hash_weights(round_.bench) == before
    always = replace(round_, in_time=lambda: True)
    assert "error" not in probe(always, drafts[2:], 64)[0]
    late = replace(make_round(), in_time=lambda: False)
    assert "error" not in probe(late, drafts[:1], 64)[0], "the first one was admitted"
    assert ["error" in figure for figure in probe(late, drafts[::-1], 64)] == [True, True, False], "known, and told"


def test_what_a_plan_of_a_probe_spares_its_trial_counts_for_those_after_it(make_round: Callable[..., Round]) -> None:
    budget = TokenBudget(RunConfig(max_evaluated_tokens=192 + 64), 0, 192)
    round_ = make_round(book=budget.book, probed=budget.probed)
    masks = Draft(sparsity=0.2, recipe=Recipe(method="two-sided", refit=False))
    some = masks.model_copy(update={"alone": "blocks 0"})
    assert all("error" not in figure for figure in probe(round_, [masks, some], 64))
    assert (budget.tokens, budget.count_rest(), budget.left) == (128, 128, 128), "the trial's rest is left"


def test_a_call_is_admitted_before_anything_is_done_for_it(make_round: Callable[..., Round]) -> None:
    asked: list[tuple[int, int]] = []

    def refuse(drafts: Sequence[Draft], tokens: int) -> None:
        asked.append((len(drafts), tokens))
        raise ValueError("too dear")

    round_ = replace(make_round(admit=refuse), resolve=pytest.fail)
    for instrument in (lambda: probe(round_, [WANDA, REFIT], 65), lambda: predict(round_, REFIT)):
        with pytest.raises(ValueError, match="too dear"):
            instrument()
    assert asked == [(2, 128), (1, 0)]


def test_what_fails_in_a_probe_leaves_the_weights_as_they_were(
    make_round: Callable[..., Round], monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ = make_round(WANDA)
    before, calls = hash_weights(round_.bench), 0
    real = Layer.write

    def fail_third(layer: Layer, weight_OI: Any) -> None:
        nonlocal calls
        calls += 1
        real(layer, weight_OI)
        if calls == 3:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(Layer, "write", fail_third)
    with pytest.raises(ImpossiblePlan, match=r"^pruning: out of memory \(out of memory\)$"):
        probe(round_, [Draft(sparsity=0.2, recipe=WANDA.recipe)], 1)
    assert calls > 3
    assert hash_weights(round_.bench) == before
