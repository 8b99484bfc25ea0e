"""One loaded model: profiled, pruned and restored bit for bit, whatever happens to the files."""

import hashlib
import json
import math
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import tools.team.worker
import tools.workbench.bench
from kernels.guard import Pruned
from kernels.methods import prune_weight
from tests.team import Team
from tests.tiny import ARCHITECTURES, save_tiny_model, tiny_settings
from tools.base.errors import DamagedArtifact, ImpossiblePlan, UserError
from tools.measure.losses import PrefixCache
from tools.models.save import export_model
from tools.plans.allocate import Allocation, allocate
from tools.plans.recipe import Adjustment, Recipe, parse_recipe
from tools.plans.work_order import order_allocation
from tools.statistics.collect import ModelStatistics, collect_statistics
from tools.workbench.bench import DENSE, Workbench, close_workbench, use_workbench

REFIT = Recipe()
MASK = Recipe(method="two-sided", refit=False)
WANDA = Recipe(method="wanda", allocation="uniform", refit=False)
WORDS = ["river", "stone", "bright", "engine", "quiet", "seven", "market"]


def ignore(label: str, done: int, total: int) -> None:
    """No progress bar."""


def open_bench(settings: Any, directory: Path, warn: Callable[[str], None] = pytest.fail) -> Workbench:
    with use_workbench(settings, directory, warn, ignore) as bench:
        return bench


@pytest.fixture
def bench(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> Workbench:
    """A fresh workbench whose warnings fail the test."""
    return open_bench(tiny_settings(tiny_llama), tmp_path / "run")


@pytest.fixture
def warnings(bench: Workbench) -> list[str]:
    """The warnings of a workbench, which then fail nothing."""
    seen: list[str] = []
    bench.warn = seen.append
    return seen


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(method, zeros) of every layer that is really computed."""
    calls: list[tuple[str, int]] = []

    def count(method: str, weight_OI: Tensor, statistics: Any, zeros: int, **options: Any) -> Pruned:
        calls.append((method, zeros))
        return prune_weight(method, weight_OI, statistics, zeros, **options)

    monkeypatch.setattr(tools.team.worker, "prune_weight", count)
    return calls


def snapshot(bench: Workbench) -> dict[str, Tensor]:
    """The bits of every parameter and buffer."""
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
    return {k: v.view(integers.get(v.dtype, v.dtype)).clone() for k, v in bench.model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def plan(bench: Workbench, profile: str, sparsity: float, recipe: Recipe = REFIT, *changes: Adjustment) -> Allocation:
    return allocate(bench.read_profile(profile).layers, sparsity, recipe, changes, max_layer_sparsity=0.9)


def prune(bench: Workbench, profile: str, sparsity: float, recipe: Recipe = REFIT) -> str:
    return bench.prune(profile, order_allocation(recipe, plan(bench, profile, sparsity, recipe)), ignore)


def artifact_path(bench: Workbench, checkpoint: str, name: str) -> Path:
    return bench.store.path(bench.read_checkpoint(checkpoint)[name].artifact, ".safetensors")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x10
    path.write_bytes(content)


# --- profile ---------------------------------------------------------------------------------------------------


def test_a_profile_holds_every_layer_and_comes_out_the_same_again(bench: Workbench) -> None:
    before = snapshot(bench)
    profile = bench.profile(ignore)
    stored = bench.read_profile(profile)
    assert [layer.name for layer in stored.layers] == [layer.name for layer in bench.layers]
    assert stored.dense.finite and len(stored.dense.nll) == 3
    assert bench.store.read_tensors(stored.hidden)["hidden"].shape == (3, 64, 32)
    assert bench.profile(ignore) == profile
    prune(bench, profile, 0.5)
    assert bench.profile(ignore) == profile  # of the dense weights, whatever is in the model
    assert same(snapshot(bench), before)


def test_second_moments_wait_until_a_recipe_needs_them(bench: Workbench) -> None:
    whole = bench.read_profile(bench.profile(ignore))
    profile = bench.profile(ignore, masks_only=True)
    assert bench.read_profile(profile).moments == {}
    bench.prune(profile, order_allocation(MASK, plan(bench, profile, 0.5, MASK)), ignore)
    assert not any(bench.store.has(artifact, ".json") for artifact in bench._read_index(".json").values())
    refitted = bench.prune(profile, order_allocation(REFIT, plan(bench, profile, 0.5)), ignore)
    assert bench._find_moments(profile) == whole.moments
    planned = bench.planned_sparsity(refitted)
    assert dict(zip(bench.by_name, bench.sparsities(), strict=True)) == pytest.approx(planned)


@pytest.mark.parametrize("masks_only", [False, True])
def test_a_second_profile_has_curves_of_the_present_weights_and_prunes_by_what_the_dense_model_reads(
    bench: Workbench, masks_only: bool
) -> None:
    first = bench.profile(ignore, masks_only=masks_only)
    allocation = plan(bench, first, 0.5)
    pruned = bench.prune(first, order_allocation(REFIT, allocation), ignore)
    second = bench.profile(ignore, first)
    curves = [[layer.kappa for layer in bench.read_profile(profile).layers] for profile in (first, second)]
    assert curves[0] != curves[1]
    present = dict(zip(bench.by_name, bench.sparsities(), strict=True))
    assert present == pytest.approx(bench.planned_sparsity(pruned)), "the weights are left as they were"
    again = bench.prune(second, order_allocation(REFIT, allocation), ignore)
    assert bench.read_checkpoint(again) == bench.read_checkpoint(pruned), "the same layers, by their contents"


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
        statistics.gradient_square[bench.layers[3].name][1] = math.inf
        return statistics

    monkeypatch.setattr(tools.workbench.bench, "collect_statistics", spoil)
    sentence = "activations or gradients of model.layers.0.self_attn.o_proj are not finite in fp32; try --dtype"
    with pytest.raises(UserError, match=sentence):
        bench.profile(ignore)


# --- the text that statistics come from ------------------------------------------------------------------------


@pytest.fixture
def asking(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> Any:
    """Settings of a run with questions, and text enough for any share of them."""
    rows = [{"question": f"What is number {i} of {WORDS[i % 7]}?", "answer": WORDS[i % 5]} for i in range(300)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {}
    for i, split in enumerate(("calibration", "validation", "test")):
        words = (WORDS[(i + j * j + j // 5) % 7] + str((7 * i + j * j) % 1000) for j in range(3000))
        path = tmp_path / f"{split}.txt"
        path.write_text(" ".join(words))
        texts[split] = f"file:{path}"
    return tiny_settings(
        tiny_llama, **texts, questions=f"file:{tmp_path / 'qa.jsonl'}", question_pairs=4, calibration_windows=8
    )


def test_a_recipe_may_ask_for_the_statistics_of_a_text_with_more_questions(asking: Any, tmp_path: Path) -> None:
    """They are those of a run whose own text has that many."""
    results: dict[str, list[dict[str, Tensor]]] = {}
    for name, mix in (("lever", 0.0), ("config", 0.5)):
        bench = open_bench(asking.model_copy(update={"calibration_mix": mix}), tmp_path / name)
        profile = bench.profile(ignore)
        results[name] = []
        for label in ("two-sided:kappa", "refit:kappa", "sparsegpt~sequential:owl"):
            recipe = parse_recipe(label)
            if name == "lever":
                own = bench.prune(profile, order_allocation(recipe, plan(bench, profile, 0.5, recipe)), ignore)
                recipe = recipe.model_copy(update={"calibration": "half"})
            allocation = allocate(bench.describe_layers(profile, recipe, ignore), 0.5, recipe)
            checkpoint = bench.prune(profile, order_allocation(recipe, allocation), ignore)
            results[name].append(snapshot(bench))
            assert bench.is_made_of(checkpoint, profile, order_allocation(recipe, allocation))
            if name == "lever":
                assert checkpoint != own and not bench.is_made_of(own, profile, order_allocation(recipe, allocation))
                assert not bench.is_made_of(checkpoint, profile, order_allocation(parse_recipe(label), allocation))
    assert all(same(a, b) for a, b in zip(results["lever"], results["config"], strict=True))


def test_another_text_is_profiled_once(asking: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profiled: list[str] = []

    def count(team: Any, extent: Any, layers: Any, progress: Any, keep: Any, dense: Any, text: str) -> ModelStatistics:
        profiled.append(text)
        return collect_statistics(team, extent, layers, progress, keep, dense, text)

    monkeypatch.setattr(tools.workbench.bench, "collect_statistics", count)
    bench = open_bench(asking, tmp_path / "run")
    profile = bench.profile(ignore, masks_only=True)
    recipe = parse_recipe("refit~half:kappa-mask")
    bench.read_layers(profile, recipe, ignore)
    assert profiled == ["run"] and not bench.has_layers(profile, recipe)
    allocation = allocate(bench.describe_layers(profile, recipe, ignore), 0.5, recipe)
    assert bench.has_layers(profile, recipe)
    checkpoint = bench.prune(profile, order_allocation(recipe, allocation), ignore)
    expected = snapshot(bench)
    assert profiled == ["run", "half"]
    stored = bench.read_profile(bench.find_profile(profile, recipe, ignore))
    assert (stored.calibration, stored.moments) == ("half", {})
    assert stored.dense == bench.read_profile(profile).dense

    artifact = artifact_path(bench, checkpoint, bench.layers[3].name)
    close_workbench()
    damage(artifact)
    seen: list[str] = []
    bench = open_bench(asking, tmp_path / "run", seen.append)
    assert same(expected, (bench.restore(checkpoint), snapshot(bench))[1])
    assert profiled == ["run", "half"] and len(seen) == 1


@pytest.mark.parametrize("label", ["refit~half:kappa", "sparsegpt~quarter~sequential"])
def test_workers_walk_through_the_same_text(asking: Any, tmp_path: Path, label: str) -> None:
    recipe, results = parse_recipe(label), []
    for name in ("alone", "team"):
        bench = open_bench(asking, tmp_path / name)
        if name == "team":
            bench.cluster = bench._team = Team(bench)  # type: ignore[assignment]
        profile = bench.profile(ignore)
        allocation = allocate(bench.describe_layers(profile, recipe, ignore), 0.5, recipe)
        results.append((profile, bench.prune(profile, order_allocation(recipe, allocation), ignore)))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"questions": ""},
            "calibration 'half' mixes questions in, and this run has none; leave it at 'run'",
        ),
        ({"calibration_mix": 0.5}, "calibration 'half' has no more questions than the run's own text; leave it at"),
        (
            {"calibration_windows": 64, "question_pairs": 140},
            "calibration 'half' needs 32 windows of questions that are in no other text; there are fewer",
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
        bench.read_layers(profile, recipe, ignore)
    with pytest.raises(ImpossiblePlan, match=re.escape(reason)):
        bench.prune(profile, order_allocation(recipe, plan(bench, profile, 0.5, MASK)), ignore)


# --- prune and restore -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_pruned_exactly_and_restored_bit_for_bit(
    architecture: str, dtype: str, tmp_path: Path, workbench_closed: None
) -> None:
    model = save_tiny_model(tmp_path / "model", architecture)
    bench = open_bench(tiny_settings(model, dtype=dtype), tmp_path / "run")
    dense = snapshot(bench)
    profile = bench.profile(ignore)
    made = {}
    for recipe in (REFIT, MASK, WANDA):
        allocation = plan(bench, profile, 0.45, recipe)
        checkpoint = bench.prune(profile, order_allocation(recipe, allocation), ignore)
        made[checkpoint] = snapshot(bench)
        zeros, weights = bench.count_zeros()
        assert zeros == round(0.45 * weights) == sum(allocation.zeros.values())
        for layer, share in zip(bench.layers, bench.sparsities(), strict=True):
            assert int((layer.weight_OI == 0).sum()) == allocation.zeros[layer.name]
            assert share == pytest.approx(allocation.zeros[layer.name] / layer.weight_OI.numel())
    assert len(made) == 3
    for checkpoint, bits in made.items():
        bench.restore(checkpoint)
        assert same(snapshot(bench), bits)
        bench.restore(DENSE)
        assert same(snapshot(bench), dense)
    names = {layer.name for layer in bench.layers}
    for bits in made.values():  # nothing but the prunable layers is touched
        assert {k.removesuffix(".weight") for k in bits if not torch.equal(bits[k], dense[k])} <= names


def test_restoring_touches_only_what_differs(bench: Workbench, written: list[str]) -> None:
    profile = bench.profile(ignore)
    allocation = plan(bench, profile, 0.4)
    first = bench.prune(profile, order_allocation(REFIT, allocation), ignore)
    names = list(allocation.zeros)
    allocation.zeros[names[2]] -= 10
    allocation.zeros[names[5]] += 10
    written.clear()
    second = bench.prune(profile, order_allocation(REFIT, allocation), ignore)
    assert sorted(written) == sorted([names[2], names[5]])
    written.clear()
    assert sorted(bench.restore(first)) == sorted([names[2], names[5]]) == sorted(written)
    assert bench.restore(first) == []
    assert sorted(bench.restore(second)) == sorted([names[2], names[5]])
    assert sorted(bench.restore(DENSE)) == sorted(names)


def test_sparsity_may_fall_as_well_as_rise(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    direct = prune(bench, profile, 0.3)
    weights = snapshot(bench)
    prune(bench, profile, 0.7)
    assert prune(bench, profile, 0.3) == direct
    assert same(snapshot(bench), weights)


def test_protected_layers_stay_dense(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    before = snapshot(bench)
    allocation = plan(bench, profile, 0.4, REFIT, Adjustment(selector="*.v_proj", action="protect"))
    checkpoint = bench.prune(profile, order_allocation(REFIT, allocation), ignore)
    after = snapshot(bench)
    for name, record in bench.read_checkpoint(checkpoint).items():
        protected = name.endswith("v_proj")
        assert (record.artifact == DENSE) == protected
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) == protected


def test_progress_counts_every_layer(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    seen: list[tuple[str, int, int]] = []
    bench.prune(profile, order_allocation(REFIT, plan(bench, profile, 0.4)), lambda *step: seen.append(step))
    assert seen == [("prune", i, 14) for i in range(15)]


def test_what_was_made_before_is_read_back(bench: Workbench, computed: list[tuple[str, int]]) -> None:
    profile = bench.profile(ignore)
    first = prune(bench, profile, 0.4)
    assert len(computed) == 14
    weights = snapshot(bench)
    prune(bench, profile, 0.5, MASK)
    assert prune(bench, profile, 0.4) == first
    assert len(computed) == 28
    settings, directory = bench.settings, bench.directory
    close_workbench()
    again = open_bench(settings, directory)
    assert prune(again, profile, 0.4) == first
    assert len(computed) == 28
    assert same(snapshot(again), weights)


def test_a_torn_index_line_costs_one_layer(bench: Workbench, computed: list[tuple[str, int]]) -> None:
    profile = bench.profile(ignore)
    first = prune(bench, profile, 0.4)
    index = bench.store.directory / "index.jsonl"
    index.write_text(index.read_text()[:-20])
    computed.clear()
    assert prune(bench, profile, 0.4) == first
    assert len(computed) == 1
    assert prune(bench, profile, 0.4) == first
    assert len(computed) == 1


@pytest.mark.parametrize(
    "line", ["[]", "3", '{"key": 1}', '{"key": [], "artifact": "a"}', '{"key": "k", "artifact": "gone"}']
)
def test_an_index_line_that_is_nonsense_is_ignored(bench: Workbench, line: str) -> None:
    profile = bench.profile(ignore)
    first = prune(bench, profile, 0.4)
    with (bench.store.directory / "index.jsonl").open("a") as file:
        file.write("\n" + line + "\n")
    assert prune(bench, profile, 0.4) == first


# --- damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [REFIT, MASK])
@pytest.mark.parametrize("hurt", [damage, Path.unlink])
def test_a_damaged_artifact_is_named_and_computed_again(
    bench: Workbench, warnings: list[str], recipe: Recipe, hurt: Callable[[Path], None]
) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.4, recipe)
    weights = snapshot(bench)
    name = bench.layers[4].name
    path = artifact_path(bench, checkpoint, name)
    content = path.read_bytes()
    bench.restore(DENSE)
    hurt(path)
    assert len(bench.restore(checkpoint)) == 14
    assert same(snapshot(bench), weights)
    assert path.read_bytes() == content
    assert len(warnings) == 1
    assert str(path) in warnings[0] and warnings[0].endswith(f"; layer {name} is computed again")


def test_pruning_does_not_trust_a_damaged_artifact_either(bench: Workbench, warnings: list[str]) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.4)
    weights = snapshot(bench)
    bench.restore(DENSE)
    damage(artifact_path(bench, checkpoint, bench.layers[4].name))
    assert prune(bench, profile, 0.4) == checkpoint
    assert same(snapshot(bench), weights)
    assert len(warnings) == 1


def test_an_artifact_that_comes_out_different_is_refused(
    bench: Workbench, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.4)
    bench.restore(DENSE)
    name = bench.layers[4].name
    damage(artifact_path(bench, checkpoint, name))

    def spoil(*arguments: Any, **options: Any) -> Pruned:
        pruned = prune_weight(*arguments, **options)
        return pruned._replace(weight_OI=2 * pruned.weight_OI)

    monkeypatch.setattr(tools.team.worker, "prune_weight", spoil)
    with pytest.raises(DamagedArtifact) as refusal:
        bench.restore(checkpoint)
    assert str(refusal.value) == (
        f"layer {name} of checkpoint {checkpoint[:12]} is damaged and does not come out the same again"
    )


@pytest.mark.parametrize("recipe", [REFIT, MASK])
def test_a_checkpoint_of_an_earlier_version_comes_back_even_where_an_artifact_is_gone(
    bench: Workbench, warnings: list[str], recipe: Recipe
) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.4, recipe)
    weights = snapshot(bench)
    manifest = bench.store.read_json(checkpoint)
    for name, record in manifest["layers"].items():
        keep_OI = bench.by_name[name].weight_OI != 0
        earlier = {"mask": torch.from_numpy(np.packbits(keep_OI.numpy().reshape(-1), bitorder="little"))}
        if recipe.changes_survivors:
            earlier["values"] = bench.by_name[name].weight_OI[keep_OI]
        record["artifact"] = bench.store.write_tensors(earlier)
    earlier_checkpoint = bench.store.write_json(manifest)
    assert earlier_checkpoint != checkpoint
    gone = bench.layers[4].name
    artifact_path(bench, earlier_checkpoint, gone).unlink()
    for again in range(2):
        bench.restore(DENSE)
        assert len(bench.restore(earlier_checkpoint)) == 14
        assert same(snapshot(bench), weights)
        assert bench.restore(earlier_checkpoint) == []
        assert len(warnings) == again + 1 and warnings[again].endswith(f"; layer {gone} is computed again")


def test_damage_beyond_repair_is_refused_and_named(bench: Workbench, warnings: list[str]) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.4)
    bench.restore(DENSE)
    damage(artifact_path(bench, checkpoint, bench.layers[-1].name))
    stored = bench.read_profile(profile)
    moment = bench.store.path(stored.moments[stored.group[bench.layers[-1].name]], ".safetensors")
    damage(moment)
    bench._shared = None
    with pytest.raises(DamagedArtifact, match=rf"artifact {moment} is damaged"):
        bench.restore(checkpoint)


@pytest.mark.parametrize("which", ["manifest", "profile", "means"])
def test_a_damaged_manifest_or_profile_is_refused(bench: Workbench, which: str) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.4)
    stored = bench.read_profile(profile)
    settings, directory = bench.settings, bench.directory
    path = {
        "manifest": bench.store.path(checkpoint, ".json"),
        "profile": bench.store.path(profile, ".json"),
        "means": bench.store.path(stored.means, ".safetensors"),
    }[which]
    damage(path)
    close_workbench()
    again = open_bench(settings, directory)
    with pytest.raises(DamagedArtifact, match=rf"^artifact {path} is damaged: its content does not match its hash$"):
        again.restore(checkpoint) if which == "manifest" else again.read_profile(profile)


def test_an_unknown_checkpoint_is_refused(bench: Workbench) -> None:
    with pytest.raises(DamagedArtifact, match="is missing"):
        bench.restore("0" * 64)


# --- forget ----------------------------------------------------------------------------------------------------


def test_forgotten_checkpoints_lose_their_files_but_not_their_recipe(bench: Workbench, warnings: list[str]) -> None:
    profile = bench.profile(ignore)
    first = prune(bench, profile, 0.3)
    first_weights = snapshot(bench)
    second = prune(bench, profile, 0.4)
    second_weights = snapshot(bench)
    shared = {r.artifact for r in bench.read_checkpoint(first).values()} & {
        r.artifact for r in bench.read_checkpoint(second).values()
    }
    bench.forget_checkpoints([second, DENSE])
    for name in bench.by_name:
        record = bench.read_checkpoint(first)[name]
        assert artifact_path(bench, first, name).is_file() == (record.artifact in shared)
        assert record.artifact == DENSE or artifact_path(bench, second, name).is_file()
    bench.restore(DENSE)
    bench.restore(second)
    assert same(snapshot(bench), second_weights)
    assert warnings == []
    bench.restore(first)
    assert same(snapshot(bench), first_weights)
    assert len(warnings) == sum(
        a not in (*shared, DENSE) for a in {r.artifact for r in bench.read_checkpoint(first).values()}
    )


# --- measure ---------------------------------------------------------------------------------------------------


def test_evaluations_are_measured_once(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.5, MASK)
    bench.restore(DENSE)
    first = bench.evaluate(checkpoint, "validation", profile, ignore)
    assert bench.installed[bench.layers[0].name] != DENSE  # the checkpoint was put in
    assert first.finite and first.mean_kl is not None and first.mean_kl > 0.01
    dense = bench.evaluate(DENSE, "validation", profile, ignore)
    assert dense.nll == bench.read_profile(profile).dense.nll
    assert dense.mean_kl == pytest.approx(0, abs=1e-6)
    test = bench.evaluate(checkpoint, "test", profile, ignore)
    assert len(test.nll) == 2 and test.kl == [0, 0]
    with monkeypatch.context() as patch:
        patch.setattr(tools.workbench.bench, "evaluate_windows", pytest.fail)
        assert bench.evaluate(checkpoint, "validation", profile, ignore) == first


def test_a_damaged_evaluation_is_named_and_measured_again(bench: Workbench, warnings: list[str]) -> None:
    profile = bench.profile(ignore)
    first = bench.evaluate(DENSE, "validation", profile, ignore)
    [path] = (bench.directory / "evaluations").iterdir()
    for content in (b"{", b"\xff\xfe", b'{"nll": 3}'):
        path.write_bytes(content)
        assert bench.evaluate(DENSE, "validation", profile, ignore) == first
        assert warnings.pop() == f"{path} is damaged; validation is measured again"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_masks_are_hashed_as_the_exported_file_has_them(
    architecture: str, tmp_path: Path, workbench_closed: None
) -> None:
    bench = open_bench(tiny_settings(save_tiny_model(tmp_path / "model", architecture)), tmp_path / "run")
    profile = bench.profile(ignore)
    dense = bench.hash_masks()
    prune(bench, profile, 0.45)
    export_model(bench.model, bench.tokenizer, tmp_path / "exported", "card")

    prefix = "model.layers." if architecture == "llama" else "transformer.h."
    digest, zeros, weights = hashlib.sha256(), 0, 0
    with safe_open(tmp_path / "exported" / "model.safetensors", "pt") as file:
        names = [key for key in file.keys() if key.startswith(prefix) and file.get_tensor(key).ndim == 2]  # noqa: SIM118
        for key in sorted(name.removesuffix(".weight") for name in names):
            flat = file.get_tensor(f"{key}.weight").flatten().tolist()
            flat += [0.0] * (-len(flat) % 8)
            digest.update(key.encode())
            digest.update(bytes(sum((flat[i + j] != 0) << j for j in range(8)) for i in range(0, len(flat), 8)))
            zeros, weights = zeros + flat.count(0.0), weights + len(flat)
    assert bench.hash_masks() == digest.hexdigest() != dense
    assert (zeros, weights) == bench.count_zeros()
    assert zeros == round(0.45 * weights)


def test_memory_is_counted(bench: Workbench) -> None:
    assert 10e6 < bench.peak_memory_bytes() < 1e12


# --- opening ---------------------------------------------------------------------------------------------------


def test_one_workbench_at_a_time(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> None:
    settings = tiny_settings(tiny_llama)
    first = open_bench(settings, tmp_path / "a")
    assert open_bench(tiny_settings(tiny_llama), tmp_path / "a" / ".." / "a") is first
    second = open_bench(settings, tmp_path / "b")
    assert second is not first
    assert open_bench(settings, tmp_path / "b") is second
    assert open_bench(tiny_settings(tiny_llama, seed=1), tmp_path / "b") is not second


def test_fused_experts_are_warned_of(tmp_path: Path, workbench_closed: None) -> None:
    seen: list[str] = []
    open_bench(tiny_settings(save_tiny_model(tmp_path / "model", "qwen3_moe")), tmp_path / "run", seen.append)
    assert "model.layers.0.mlp.experts.down_proj is not a plain linear layer and stays dense" in seen


def test_a_disk_too_small_is_refused_at_once(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 5))
    with pytest.raises(
        UserError, match=r"^the disk is full: a run of this model may write 0.0 GB to .*/run, but 0.0 GB"
    ):
        open_bench(tiny_settings(tiny_llama), tmp_path / "run")


def test_a_failed_opening_can_be_tried_again(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> None:
    with pytest.raises(UserError, match="is too short"):
        open_bench(tiny_settings(tiny_llama, calibration_windows=60000), tmp_path / "run")
    open_bench(tiny_settings(tiny_llama), tmp_path / "run")


def test_manifests_are_small_and_plain(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.4, parse_recipe("refit:kappa@0.5"))
    manifest = json.loads(bench.store.path(checkpoint, ".json").read_text())
    assert manifest["profile"] == profile
    assert list(manifest["layers"][bench.layers[0].name]) == ["artifact", "zeros"]
    assert Recipe.model_validate(manifest["recipe"]) == Recipe().within_layers(), (
        "how layers were shared out is not in it"
    )


def test_steps_of_the_method_refit_make_other_layers_by_the_same_curves(
    bench: Workbench, computed: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = bench.profile(ignore)
    allocation = plan(bench, profile, 0.4)
    five, three = (
        bench.prune(profile, order_allocation(parse_recipe(label), allocation), ignore) for label in ("refit", "refit3")
    )
    assert five != three
    assert len(computed) == 2 * len(bench.layers)
    assert bench.prune(profile, order_allocation(parse_recipe("refit3:owl"), allocation), ignore) == three
    assert len(computed) == 2 * len(bench.layers)
    assert bench.has_layers(profile, Recipe(curves="mask")) and not bench.has_layers(profile, Recipe())
    bench.describe_layers(profile, Recipe(), ignore)
    assert bench.has_layers(profile, Recipe(refit_steps=3)) and not bench.has_layers(profile, Recipe(gamma="clipped"))
    monkeypatch.setattr(tools.workbench.bench, "measure_kappa", pytest.fail)
    assert bench.describe_layers(profile, Recipe(refit_steps=3), ignore) == bench.describe_layers(
        profile, Recipe(), ignore
    )


def test_the_method_refit_is_made_once_whatever_the_recipe_says_of_a_refit(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    allocation = plan(bench, profile, 0.4)
    first = bench.prune(profile, order_allocation(Recipe(method="refit"), allocation), ignore)
    assert bench.prune(profile, order_allocation(Recipe(method="refit", refit=False), allocation), ignore) == first


# --- what recipes need beyond the profile ------------------------------------------------------------------------


def test_curves_of_a_method_are_measured_once_with_what_it_leaves(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = bench.profile(ignore)
    masks = bench.read_profile(profile).layers
    prune(bench, profile, 0.4)
    layers = bench.describe_layers(profile, Recipe(), ignore)
    assert {x.name: x.kappa for x in layers} != {x.name: x.kappa for x in masks}
    assert [x.model_copy(update={"kappa": []}) for x in layers] == [x.model_copy(update={"kappa": []}) for x in masks]
    own = bench.describe_layers(profile, parse_recipe("two-sided+refit:kappa"), ignore)
    assert sum(x.kappa[2] for x in own) < sum(x.kappa[2] for x in masks), "a refit repairs"
    monkeypatch.setattr(tools.workbench.bench, "measure_kappa", pytest.fail)
    assert bench.describe_layers(profile, Recipe(strength=0.5), ignore) == layers
    for label in ("two-sided:kappa", "refit:kappa-mask", "refit:uniform", "refit:owl"):
        assert bench.describe_layers(profile, parse_recipe(label), ignore) == masks


def test_curves_of_the_mask_by_the_long_way_are_those_of_the_profile(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    measured = bench._measure_kappa(profile, MASK, ignore)
    for layer in bench.read_profile(profile).layers:
        assert measured[layer.name] == pytest.approx(layer.kappa, rel=1e-3)


def test_alphas_are_added_for_alphapruning(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = bench.profile(ignore)
    layers = bench.describe_layers(profile, Recipe(allocation="alphapruning"), ignore)
    assert all(layer.alpha and layer.alpha > 1 for layer in layers)
    monkeypatch.setattr(tools.workbench.bench, "measure_alpha", pytest.fail)
    assert bench.describe_layers(profile, Recipe(allocation="alphapruning"), ignore) == layers


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "refit"])
def test_a_pattern_holds_in_every_group(bench: Workbench, method: str) -> None:
    profile = bench.profile(ignore)
    recipe = parse_recipe(f"{method}:uniform").model_copy(update={"pattern": "2:4"})
    prune(bench, profile, 0.5, recipe)
    for layer in bench.layers:
        assert bool(((layer.weight_OI == 0).reshape(-1, 4).sum(1) == 2).all())


def test_a_damping_that_had_to_grow_is_told(
    bench: Workbench, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def strain(*arguments: Any, **options: Any) -> Pruned:
        return prune_weight(*arguments, **options)._replace(damping=0.1)

    monkeypatch.setattr(tools.team.worker, "prune_weight", strain)
    prune(bench, bench.profile(ignore), 0.4)
    assert warnings[0] == (f"layer {bench.layers[0].name} needed damping 0.1 instead of 0.01: its inputs are singular")


# --- sequential statistics -----------------------------------------------------------------------------------------

SEQUENTIAL = Recipe(statistics="sequential")


def test_in_order_the_first_block_is_as_ever_and_the_others_see_pruned_inputs(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    allocation = plan(bench, profile, 0.4)
    plain = bench.prune(profile, order_allocation(REFIT, allocation), ignore)
    weights = {layer.name: layer.weight_OI.clone() for layer in bench.layers}
    ordered = bench.prune(profile, order_allocation(SEQUENTIAL, allocation), ignore)
    for layer in bench.layers:
        change = (layer.weight_OI - weights[layer.name]).norm() / weights[layer.name].norm()
        assert (float(change) < 1e-3) is (layer.block == 0)
    assert bench.planned_sparsity(plain) == bench.planned_sparsity(ordered)
    assert bench.count_zeros()[0] == sum(allocation.zeros.values())


def test_in_order_interrupted_is_as_uninterrupted(
    bench: Workbench, computed: list[tuple[str, int]], tmp_path: Path
) -> None:
    profile = bench.profile(ignore)
    allocation = plan(bench, profile, 0.4)
    checkpoint = bench.prune(profile, order_allocation(SEQUENTIAL, allocation), ignore)
    whole, count = snapshot(bench), len(computed)
    index = bench.store.directory / "index.jsonl"
    lines = index.read_text().splitlines()
    for kept in (3, 10, len(lines)):  # as if killed in the first block, in the second, and after the last
        index.write_text("\n".join(lines[:kept]))
        computed.clear()
        bench.restore(DENSE)
        assert bench.prune(profile, order_allocation(SEQUENTIAL, allocation), ignore) == checkpoint
        assert same(snapshot(bench), whole)
        assert len(computed) <= count - kept + 1


def test_a_damaged_layer_of_blocks_pruned_in_order_comes_back(bench: Workbench, warnings: list[str]) -> None:
    profile = bench.profile(ignore)
    checkpoint = bench.prune(profile, order_allocation(SEQUENTIAL, plan(bench, profile, 0.4)), ignore)
    whole = snapshot(bench)
    bench.restore(DENSE)
    damage(artifact_path(bench, checkpoint, bench.layers[-1].name))
    bench.restore(checkpoint)
    assert same(snapshot(bench), whole)
    assert warnings


# --- validation from where the weights differ ----------------------------------------------------------------------


def test_validation_starts_at_the_first_changed_block_with_the_same_bits(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = bench.profile(ignore)
    bench._prefix.kept = range(1, 2)
    bench.evaluate(DENSE, "validation", profile, ignore)
    starts: list[int] = []
    find = PrefixCache.find_start
    monkeypatch.setattr(PrefixCache, "find_start", lambda *args: starts.append(find(*args)) or starts[-1])
    protect = Adjustment(selector="blocks 0", action="protect")
    checkpoint = bench.prune(profile, order_allocation(MASK, plan(bench, profile, 0.3, MASK, protect)), ignore)
    evaluation = bench.evaluate(checkpoint, "validation", profile, ignore)
    other = prune(bench, profile, 0.3, MASK)
    bench.evaluate(other, "validation", profile, ignore)
    shutil.rmtree(bench.directory / "evaluations")
    assert bench.evaluate(other, "validation", profile, ignore) == bench.evaluate(other, "validation", profile, ignore)
    assert starts == [1, 0, 1]
    bench._prefix._marks.clear()
    shutil.rmtree(bench.directory / "evaluations")
    assert bench.evaluate(checkpoint, "validation", profile, ignore) == evaluation


def test_block_inputs_are_kept_within_their_memory(bench: Workbench) -> None:
    size = bench.windows.validation.numel() * 32 * 4
    for limit, kept in ((0, []), (size // 2, []), (size, []), (2 * size, [1]), (9 * size, [1])):
        assert list(PrefixCache(bench._prefix.blocks, bench.windows.validation, limit).kept) == kept


def test_kl_on_calibration_windows_leaves_the_weights_as_they_are(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.5, MASK)
    weights = snapshot(bench)
    kl = measure_kl(bench, checkpoint, [0, 1])
    both = measure_kl(bench, checkpoint, [0]) + measure_kl(bench, checkpoint, [1])
    assert kl == pytest.approx(both / 2, rel=1e-5)
    assert same(snapshot(bench), weights)
    assert bench.measure_kl_each([DENSE, checkpoint, DENSE], [1, 0]) == pytest.approx([0, kl, 0], abs=1e-6)
    assert same(snapshot(bench), weights)


def measure_kl(bench: Workbench, checkpoint: str, windows: list[int]) -> float:
    return bench.measure_kl_each([checkpoint], windows)[0]


# --- several checkpoints at once -----------------------------------------------------------------------------------


@pytest.fixture
def three(bench: Workbench) -> tuple[str, list[str]]:
    """A profile and three checkpoints, the last one in the model."""
    profile = bench.profile(ignore)
    return profile, [
        prune(bench, profile, 0.3, MASK),
        prune(bench, profile, 0.5, REFIT),
        prune(bench, profile, 0.5, MASK),
    ]


@pytest.mark.parametrize("windows", [1, 3])
def test_checkpoints_side_by_side_are_as_one_after_another(
    bench: Workbench, three: tuple[str, list[str]], windows: int
) -> None:
    profile, checkpoints = three
    asked = [*checkpoints, DENSE, checkpoints[0]]
    weights = snapshot(bench)
    alone = bench.evaluate_each(asked, windows, profile, ignore), bench.measure_kl_each(asked, [1])
    assert same(snapshot(bench), weights)
    assert bench.abreast == 1
    if windows == 3:
        assert alone[0] == [bench.evaluate(checkpoint, "validation", profile, ignore) for checkpoint in asked]
        shutil.rmtree(bench.directory / "evaluations")
    bench.restore(checkpoints[0])
    weights = snapshot(bench)
    team = bench.cluster = bench._team = Team(bench)  # type: ignore[assignment]
    ticks: list[tuple[int, int]] = []
    shared = bench.evaluate_each(asked, windows, profile, lambda _, done, total: ticks.append((done, total)))
    assert (shared, bench.measure_kl_each(asked, [1])) == alone
    assert team.handed == [("losses", place) for place in (1, 0, 1, 0)] * 2 and bench.abreast == 2
    assert ticks == [(done * windows, 4 * windows) for done in range(5)]
    assert same(snapshot(bench), weights)
    if windows == 3:  # kept, so that nothing is handed out again
        assert bench.evaluate_each(asked, 3, profile, ignore) == shared and len(team.handed) == 8


def test_a_layer_damaged_before_it_travels_is_made_again(
    bench: Workbench, warnings: list[str], three: tuple[str, list[str]]
) -> None:
    profile, checkpoints = three
    alone = bench.evaluate_each(checkpoints, 2, profile, ignore)
    damage(artifact_path(bench, checkpoints[1], bench.layers[3].name))
    weights = snapshot(bench)
    team = bench.cluster = bench._team = Team(bench)  # type: ignore[assignment]
    assert bench.evaluate_each(checkpoints, 2, profile, ignore) == alone
    assert team.handed == [("losses", 0)], "the others are measured one after another"
    assert len(warnings) == 1 and "computed again" in warnings[0]
    assert same(snapshot(bench), weights)
