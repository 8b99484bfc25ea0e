"""Checkpoints that were polished: exact, restored bit for bit, gone on with after a kill, never worse than before."""

from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

import tools.plans.costs
import tools.polish.gradients
import tools.polish.loop
from tests.benches import (
    REFIT,
    WANDA,
    damage,
    ignore,
    open_bench,
    plan,
    same,
    snapshot,
)
from tests.team import gather_teams
from tests.tiny import save_tiny_model, tiny_settings
from tools.base.errors import ImpossiblePlan
from tools.base.progress import Stopped, stop_at
from tools.plans.allocate import allocate
from tools.plans.mix import mix_questions
from tools.plans.recipe import Adjustment, Recipe
from tools.plans.work_order import WorkOrder, order_allocation
from tools.polish.gradients import Divergence, Vectors
from tools.polish.loop import Polish, Standing
from tools.workbench.bench import Workbench
from tools.workbench.open import close_workbench
from tools.workbench.store import DENSE

TOKENS = 64 * 12
"""Two passes through 6 of 7 windows."""


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps a pass, which move weights far enough for a tiny model."""
    monkeypatch.setattr(tools.plans.costs, "STEP_TOKENS", 128)
    monkeypatch.setattr(tools.polish.loop, "RATE", 3e-3)


@pytest.fixture
def bench(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> Workbench:
    return open_bench(tiny_settings(tiny_llama, calibration_windows=7), tmp_path / "run")


def order(
    bench: Workbench, profile: str, recipe: Recipe = REFIT, *changes: Adjustment, tokens: int = TOKENS
) -> WorkOrder:
    return order_allocation(recipe, plan(bench, profile, 0.5 if recipe.pattern else 0.4, recipe, *changes), tokens)


def masks(bench: Workbench) -> dict[str, Tensor]:
    return {layer.name: layer.weight_OI == 0 for layer in bench.weights.layers}


def list_files(bench: Workbench) -> set[str]:
    return {path.name for path in bench.store.directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", "fp32"), ("gpt2", "bf16"), ("opt", "fp16")])
def test_zeros_stay_exactly_where_they_were_and_the_kl_falls(
    architecture: str, dtype: str, tmp_path: Path, workbench_closed: None
) -> None:
    model = save_tiny_model(tmp_path / "model", architecture)
    bench = open_bench(tiny_settings(model, dtype=dtype, calibration_windows=7), tmp_path / "run")
    profile, protect = bench.profile(ignore), Adjustment(selector="blocks 0-0", action="protect")
    dense = snapshot(bench)
    before = bench.pruner.prune(profile, order(bench, profile, REFIT, protect, tokens=0), ignore)
    zeros, mask = masks(bench), bench.weights.hash_masks()
    after = bench.pruner.prune(profile, order(bench, profile, REFIT, protect), ignore)
    assert after != before and bench.weights.hash_masks() == mask
    assert all(torch.equal(found, zeros[name]) for name, found in masks(bench).items())
    polished, made = snapshot(bench), bench.pruner.read_checkpoint(after)
    for layer in bench.weights.layers:
        untouched = torch.equal(polished[f"{layer.name}.weight"], dense[f"{layer.name}.weight"])
        assert untouched == (layer.block == 0) == (made[layer.name].artifact == DENSE)
    told = bench.pruner.read_polished(after)
    assert told is not None and told.helped and told.after < told.before
    assert (told.tokens, told.passes, told.planned_steps) == (TOKENS, 2, 6)
    kl = [bench.evaluator.evaluate(x, "validation", profile, ignore).mean_kl for x in (before, after)]
    assert kl[0] is not None and kl[1] is not None and kl[1] < kl[0]
    bench.pruner.restore(DENSE)
    bench.pruner.restore(after)
    assert same(snapshot(bench), polished)


@pytest.mark.usefixtures("raw_gamma")
def test_the_figures_of_a_polish(bench: Workbench) -> None:
    """Of the tiny Llama, whose weights and text are seeded, as they were found."""
    profile = bench.profile(ignore)
    checkpoints = [bench.pruner.prune(profile, order(bench, profile, tokens=tokens), ignore) for tokens in (0, TOKENS)]
    told = bench.pruner.read_polished(checkpoints[1])
    assert told is not None
    kls = [bench.evaluator.evaluate(checkpoint, "validation", profile, ignore).mean_kl for checkpoint in checkpoints]
    assert (told.before, told.after) == pytest.approx((0.16028, 0.15528), rel=5e-3)
    assert kls == pytest.approx([0.25680, 0.25013], rel=5e-3)


def test_a_pattern_holds(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    recipe = Recipe(method="two-sided", refit=False, allocation="uniform", pattern="2:4")
    bench.pruner.prune(profile, order(bench, profile, recipe), ignore)
    for layer in bench.weights.layers:
        assert torch.equal((layer.weight_OI == 0).view(-1, 4).sum(1), torch.full((layer.weight_OI.numel() // 4,), 2))


def test_without_a_polish_everything_is_called_what_it_was(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    plain = order(bench, profile, tokens=0)
    checkpoint = bench.pruner.prune(profile, plain, ignore)
    assert "polish" not in plain.model_copy(update={"line": ""}).layers["model.layers.0.mlp.up_proj"].model_dump_json()
    assert "polish" not in str(bench.store.read_json(checkpoint))
    assert bench.pruner.is_made_of(checkpoint, profile, plain) and bench.pruner.read_polished(checkpoint) is None
    other = order(bench, profile)
    assert other.id != plain.id and not bench.pruner.is_made_of(checkpoint, profile, other)
    polished = bench.pruner.prune(profile, other, ignore)
    assert bench.pruner.is_made_of(polished, profile, other) and not bench.pruner.is_made_of(polished, profile, plain)
    fewer = order(bench, profile, tokens=64)
    assert fewer.id not in (other.id, plain.id) and not bench.pruner.is_made_of(polished, profile, fewer)


def test_what_never_gets_better_stays_as_it_was(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.polish.loop, "RATE", 3.0)
    profile, warnings = bench.profile(ignore), []
    before = bench.pruner.prune(profile, order(bench, profile, tokens=0), ignore)
    bits = snapshot(bench)
    bench.warn = warnings.append
    after = bench.pruner.prune(profile, order(bench, profile), ignore)
    assert same(snapshot(bench), bits) and after != before
    assert bench.pruner.read_checkpoint(after) == bench.pruner.read_checkpoint(before)
    told = bench.pruner.read_polished(after)
    assert told is not None and not told.helped and told.before == told.after
    assert warnings == [
        f"the polish on {TOKENS} tokens never brought the KL on the windows held out below the {told.before:.4f} "
        "nats/token from before it; the weights from before it are kept"
    ]


def test_stopped_in_a_pass_and_gone_on_with_by_another_process_is_the_same(bench: Workbench) -> None:
    alone = open_bench(bench.settings, bench.directory.parent / "alone")
    profile = alone.profile(ignore)
    asked = order(alone, profile)
    expected, bits, files = alone.pruner.prune(profile, asked, ignore), snapshot(alone), list_files(alone)
    bench = open_bench(bench.settings, bench.directory)
    assert bench.profile(ignore) == profile
    event, steps = Event(), []

    def stop(label: str, done: int, _total: int) -> None:
        if label.startswith("polish"):
            steps.append(done)
            if done == 5:
                event.set()

    with stop_at(event), pytest.raises(Stopped):
        bench.pruner.prune(profile, asked, stop)
    settings, directory = bench.settings, bench.directory
    close_workbench()
    bench = open_bench(settings, directory)
    again: list[int] = []
    made = bench.pruner.prune(
        profile, asked, lambda label, done, _: again.append(done) if label.startswith("pol") else None
    )
    assert made == expected and same(snapshot(bench), bits)
    assert again[0] == 5, "steps that were taken are not taken again"
    times = {name for name in list_files(bench) ^ files if not name.endswith(".json")}
    assert times == set(), "nothing is left of what was under way but figures with their seconds"


SCARCE = "too little memory for the means of the polish in fp32: they are bf16"


def free_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """As if so many bytes of it were free when a polish begins."""
    monkeypatch.setattr(tools.polish.gradients, "count_free", lambda: size)


def hold_state(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Vectors]]:
    """The optimiser's state at the end of each polish from now on."""
    states: list[dict[str, Vectors]] = []
    run = tools.polish.loop.Polish.run

    def hold(polish: Polish) -> Standing:
        standing = run(polish)
        states.append(polish.optimiser.state)
        return standing

    monkeypatch.setattr(tools.polish.loop.Polish, "run", hold)
    return states


def test_means_are_in_bf16_where_memory_is_scarce_and_the_kl_falls_nearly_as_far(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, made, told, warned = hold_state(monkeypatch), [], [], list[str]()
    for i, size in enumerate((10**12, 0, 0)):
        free_memory(monkeypatch, size)
        bench = open_bench(bench.settings, tmp_path / str(i), warned.append)
        profile = bench.profile(ignore)
        made.append(bench.pruner.prune(profile, order(bench, profile), ignore))
        told.append(bench.pruner.read_polished(made[-1]))
    fp32, bf16, again = told
    assert warned == 2 * [SCARCE]
    assert fp32 is not None and bf16 is not None and again is not None
    assert (fp32.means, bf16.means) == ("fp32", "bf16")
    assert made[0] != made[1] == made[2] and again.after == bf16.after, "the same bits, twice"
    assert fp32.before == bf16.before > fp32.after
    assert abs(bf16.after - fp32.after) < 0.05 * (fp32.before - fp32.after)
    sizes = [sum(x.nbytes for vectors in state.values() for x in vectors.values()) for state in states]
    assert sizes[0] == 2 * sizes[1] == 2 * sizes[2] > 0


@pytest.mark.parametrize("rich", [False, True])
def test_the_format_of_means_is_settled_when_a_polish_is_begun(
    rich: bool, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, and gone on with while as much memory is free as if it were another machine; lost, and made again."""
    first, then = (10**12, 0) if rich else (0, 10**12)
    free_memory(monkeypatch, first)
    warned: list[str] = []
    alone = open_bench(bench.settings, bench.directory.parent / "alone", warned.append)
    profile = alone.profile(ignore)
    asked = order(alone, profile)
    expected, bits = alone.pruner.prune(profile, asked, ignore), snapshot(alone)
    told = alone.pruner.read_polished(expected)
    assert told is not None and told.means == ("fp32" if rich else "bf16")
    bench = open_bench(bench.settings, bench.directory, warned.append)
    assert bench.profile(ignore) == profile
    event, again = Event(), list[Any]()
    with stop_at(event), pytest.raises(Stopped):
        bench.pruner.prune(
            profile, asked, lambda label, done, _: event.set() if (done, label[:3]) == (3, "pol") else None
        )
    assert warned == ([] if rich else 2 * [SCARCE]), "told when it is settled"
    settings, directory = bench.settings, bench.directory
    close_workbench()
    free_memory(monkeypatch, then)
    bench = open_bench(settings, directory)
    made = bench.pruner.prune(
        profile, asked, lambda label, done, _: again.append(done) if label.startswith("pol") else None
    )
    assert (made, again[0]) == (expected, 3) and same(snapshot(bench), bits)
    assert bench.pruner.prune(profile, asked, ignore) == expected, "read back"
    bench.pruner.restore(DENSE)
    bench.pruner.forget([])
    bench.warn = again.append  # that all layers are computed again
    bench.pruner.restore(expected)
    assert same(snapshot(bench), bits)


def test_what_was_kept_of_a_polish_and_is_damaged_is_done_anew(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    asked, event = order(bench, profile), Event()
    with stop_at(event), pytest.raises(Stopped):
        bench.pruner.prune(
            profile, asked, lambda label, done, _: event.set() if (done, label[:3]) == (3, "pol") else None
        )
    for path in bench.store.directory.rglob("*.safetensors"):
        damage(path)
    bench = open_bench(bench.settings, bench.directory.parent / "fresh")
    assert bench.profile(ignore) == profile
    bench.pruner.prune(profile, asked, ignore)
    assert bench.pruner.read_polished(bench.pruner.prune(profile, asked, ignore)) is not None


@pytest.mark.parametrize(
    ("tokens", "windows", "line"),
    [(63, 7, "less than one window of 64"), (640, 1, "polish holds calibration windows out, and there is one")],
)
def test_too_little_is_refused_before_anything_is_pruned(
    tokens: int,
    windows: int,
    line: str,
    tiny_llama: Path,
    tmp_path: Path,
    workbench_closed: None,
    computed: list[tuple[str, int]],
) -> None:
    settings = tiny_settings(tiny_llama, calibration_windows=windows, gradient_windows=1)
    bench = open_bench(settings, tmp_path / "run")
    profile = bench.profile(ignore)
    with pytest.raises(ImpossiblePlan, match=line):
        bench.pruner.prune(profile, order(bench, profile, WANDA, tokens=tokens), ignore)
    assert computed == []


@pytest.mark.parametrize("free", [10**12, 0])
def test_workers_come_to_the_same_weights(
    free: int, bench: Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free_memory(monkeypatch, free)
    warned: list[str] = []
    bench.warn = warned.append
    profile = bench.profile(ignore)
    checkpoint = bench.pruner.prune(profile, order(bench, profile), ignore)
    evaluation = bench.evaluator.evaluate(checkpoint, "validation", profile, ignore)
    gather_teams(monkeypatch)
    monkeypatch.delattr(Divergence, "differentiate")  # of this process alone
    settings = tiny_settings(bench.settings.model, calibration_windows=7, workers="2")
    shared = open_bench(settings, tmp_path / "shared", warned.append)
    assert shared.profile(ignore) == profile
    assert shared.pruner.prune(profile, order(shared, profile), ignore) == checkpoint
    assert warned == ([] if free else 2 * [SCARCE])
    assert shared.evaluator.evaluate(checkpoint, "validation", profile, ignore) == evaluation


def test_a_mixture_with_questions_is_polished_on_where_statistics_are_of_it(
    asking: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By workers, too; one that questions alone count in is on these alone."""
    gather_teams(monkeypatch)
    snapshots = {}
    for name, changes, share in (("mixed", {}, 0.5), ("shared", {"workers": "2"}, 0.5), ("alone", {}, 1.0)):
        bench = open_bench(asking.model_copy(update=changes), tmp_path / name)
        profile = bench.profile(ignore)
        recipe = REFIT.model_copy(update={"mix": mix_questions(share)})
        allocation = allocate(bench.curves.describe_layers(profile, recipe, ignore), 0.7, recipe)
        checkpoint = bench.pruner.prune(profile, order_allocation(recipe, allocation, TOKENS), ignore)
        told = bench.pruner.read_polished(checkpoint)
        assert told is not None and told.helped
        snapshots[name] = snapshot(bench)
        if name == "mixed":
            other = bench.pruner.prune(profile, order_allocation(REFIT, allocation, TOKENS), ignore)
            assert other != checkpoint and bench.pruner.read_polished(other) != told
    assert same(snapshots["mixed"], snapshots["shared"]) and not same(snapshots["mixed"], snapshots["alone"])
