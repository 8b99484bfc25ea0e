"""Cuts in the model's own shapes: the same function as the smaller model, kept, put back and made again bit for bit."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tools.models.streamed
import tools.surgery.blocks
import tools.workbench.bench
import tools.workbench.cuts
from tests.benches import artifact_path, damage, ignore, open_bench, same, snapshot
from tests.cuts import make_config, make_model, order_cut
from tests.spread import lay_over
from tests.team import join_team
from tests.tiny import make_tiny_tokenizer, save_biased_model, save_tiny_model, tiny_settings
from tools.base.errors import BrokenPlan, UserError
from tools.base.settings import WorkbenchSettings
from tools.models.load import load_model
from tools.models.save import export_model
from tools.models.spread import find_places
from tools.models.streamed import find_stream
from tools.plans.cuts import CutOrder, Parts, Target
from tools.plans.recipe import Recipe
from tools.plans.work_order import order_all
from tools.results.losses import Evaluation
from tools.surgery.blocks import Drop
from tools.surgery.parts import find_parts
from tools.surgery.share import find_shape, find_target
from tools.workbench.cuts import _read_drop, _write_drop
from tools.workbench.store import DENSE

LEVERS: tuple[dict[str, object], ...] = ({}, {"heads": 1}, {"refit": False})


@pytest.mark.parametrize(
    ("architecture", "levers"),
    [
        *((architecture, levers) for architecture in ("llama", "qwen3", "gemma3") for levers in LEVERS),
        *((architecture, levers) for architecture in ("opt", "gpt2") for levers in LEVERS[::2]),
    ],
)
def test_a_cut_is_the_smaller_model_exactly_and_goes_and_comes_back_bit_for_bit(
    architecture: str, levers: dict[str, object], tmp_path: Path, workbench_closed: None
) -> None:
    bench = open_bench(tiny_settings(save_biased_model(tmp_path / "model", architecture)), tmp_path / "run")
    dense = snapshot(bench)
    profile = bench.profiles.make_bare(ignore)
    order = order_cut(bench, profile, **levers)
    checkpoint = bench.pruner.prune(profile, order, ignore)
    made = snapshot(bench)
    for layer in bench.weights.layers:
        assert int((layer.weight_OI == 0).sum()) == order.zeros[layer.name]

    found = bench.pruner.build_cut(checkpoint)
    assert found is not None
    built, cut = found
    assert cut == order.cut
    ids = bench.windows.validation
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, use_cache=False).logits for model in (built, bench.model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert find_parts(built, "neurons")[0].units == find_parts(bench.model, "neurons")[0].units - cut.neurons

    assert bench.pruner.is_made_of(checkpoint, profile, order)
    bench.pruner.restore(DENSE)
    assert same(snapshot(bench), dense)
    bench.pruner.restore(checkpoint)
    assert same(snapshot(bench), made)
    assert bench.pruner.prune(profile, order, ignore) == checkpoint, "read back"
    assert same(snapshot(bench), made)


def test_what_was_damaged_or_forgotten_comes_out_the_same_again(tmp_path: Path, workbench_closed: None) -> None:
    told: list[str] = []
    bench = open_bench(tiny_settings(save_tiny_model(tmp_path / "model", "llama")), tmp_path / "run", told.append)
    profile = bench.profiles.make_bare(ignore)
    order = order_cut(bench, profile)
    checkpoint = bench.pruner.prune(profile, order, ignore)
    made = snapshot(bench)
    broken = artifact_path(bench, checkpoint, "model.layers.1.mlp.down_proj")
    bench.pruner.restore(DENSE)
    damage(broken)
    bench.pruner.restore(checkpoint)
    assert same(snapshot(bench), made)
    assert len(told) == 1 and "is computed again" in told[0]

    bench.pruner.restore(DENSE)
    bench.pruner.forget([DENSE])
    assert not broken.is_file()
    assert bench.pruner.prune(profile, order, ignore) == checkpoint
    assert same(snapshot(bench), made)


def test_nothing_is_known_of_single_weights_but_wanda_can_prune_as_its_authors_do(
    tmp_path: Path, workbench_closed: None
) -> None:
    bench = open_bench(tiny_settings(save_tiny_model(tmp_path / "model", "llama")), tmp_path / "run")
    told: list[str] = []
    bare = bench.profiles.make_bare(lambda step, _done, _of: told.append(step))
    assert set(told) == {"dense validation"}
    layers = bench.profiles.read(bare).layers
    half = {layer.name: layer.weights // 2 for layer in layers}
    wanda = Recipe(method="wanda", refit=False, allocation="uniform", statistics="sequential")
    order = order_all(wanda, half, sparsity=0.5, predicted_kl=0.0)
    bench.pruner.prune(bare, order, ignore)
    pruned = snapshot(bench)

    whole = bench.profile(ignore)
    assert bench.profiles.read(whole).dense == bench.profiles.read(bare).dense
    known = bench.profiles.read(whole).layers
    assert [(x.name, x.weights, x.zeros, x.inputs) for x in known] == [
        (x.name, x.weights, x.zeros, x.inputs) for x in layers
    ]
    assert not any(any(x.kappa) or x.wanda or x.gradient for x in layers)
    bench.pruner.prune(whole, order, ignore)
    assert same(snapshot(bench), pruned)


def test_another_text_has_parts_of_its_own(tmp_path: Path, workbench_closed: None) -> None:
    bench = open_bench(tiny_settings(save_tiny_model(tmp_path / "model", "llama")), tmp_path / "run")
    profile, target = bench.profiles.make_bare(ignore), find_target(bench.model, 0.75)
    parts = bench.cuts.measure(profile, target, ignore)
    assert bench.cuts.measure(profile, target, ignore) == parts
    bench.windows.calibration[0, 0] += 1
    assert bench.cuts.measure(profile, target, ignore) != parts


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_whole_blocks_go(architecture: str, tmp_path: Path, workbench_closed: None) -> None:
    bench = open_bench(tiny_settings(save_biased_model(tmp_path / "model", architecture)), tmp_path / "run")
    dense = snapshot(bench)
    profile = bench.profiles.make_bare(ignore)
    target = find_target(bench.model, 0.75)
    cut = CutOrder(
        parts=bench.cuts.read(bench.cuts.measure(profile, target, ignore)).artifact,
        **{"heads": 0, "neurons": 0, "dropped": (1,), "refit": True},
    )
    layers = bench.profiles.read(profile).layers
    zeros = {layer.name: layer.weights * (layer.block == 1) for layer in layers}
    order = order_all(Recipe(), zeros, sparsity=0.5, predicted_kl=0.0).model_copy(update={"cut": cut})
    found = bench.pruner.build_cut(bench.pruner.prune(profile, order, ignore))
    assert found is not None and found[0].config.num_hidden_layers == 1
    ids = bench.windows.validation
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, use_cache=False).logits for model in (found[0], bench.model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert bench.pruner.build_cut(DENSE) is None
    bench.pruner.restore(DENSE)
    assert same(snapshot(bench), dense)


def test_a_cut_whose_fit_is_not_finite_breaks_its_plan_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workbench_closed: None
) -> None:
    bench = open_bench(tiny_settings(save_tiny_model(tmp_path / "model", "llama")), tmp_path / "run")
    profile = bench.profiles.make_bare(ignore)
    order = order_cut(bench, profile)
    finish, before = tools.surgery.blocks.finish_moments, set((tmp_path / "run").rglob("*.safetensors"))

    def overflow(sums: Any, part: Any) -> Any:
        if part.block:
            sums._halves[0].product_II[0, 0] = math.inf
        return finish(sums, part)

    with monkeypatch.context() as patch:
        patch.setattr(tools.surgery.blocks, "finish_moments", overflow)
        with pytest.raises(BrokenPlan, match=r"^model\.layers\.1\..* is not finite "):
            bench.pruner.prune(profile, order, ignore)
    bench.pruner.forget([DENSE])
    assert set((tmp_path / "run").rglob("*.safetensors")) <= before
    assert bench.pruner.build_cut(bench.pruner.prune(profile, order, ignore)) is not None, (
        "nor is anything else the worse"
    )


def test_what_was_measured_before_an_interruption_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workbench_closed: None
) -> None:
    settings = tiny_settings(save_tiny_model(tmp_path / "model", "llama", num_hidden_layers=6))
    told: list[str] = []

    def stop(step: str, _done: int, _of: int) -> None:
        told.append(step)
        if step == "search block 2 to drop":
            raise KeyboardInterrupt

    bench = open_bench(settings, tmp_path / "whole")
    profile, target = bench.profiles.make_bare(ignore), find_target(bench.model, 0.5)
    expected = bench.cuts.read(bench.cuts.measure(profile, target, ignore))
    assert len(expected.order) > 2
    bench = open_bench(settings, tmp_path / "halted")
    assert bench.profiles.make_bare(ignore) == profile
    with pytest.raises(KeyboardInterrupt):
        bench.cuts.measure(profile, target, stop)
    assert "curves of units" in told and "search block 1 to drop" in told
    monkeypatch.setattr(tools.workbench.cuts, "measure_curves", lambda *_, **__: pytest.fail("measured again"))
    told.clear()
    found = bench.cuts.measure(profile, target, lambda step, _done, _of: told.append(step))
    assert bench.cuts.read(found) == expected
    assert "search block 1 to drop" not in told and "search block 2 to drop" in told


def test_a_drop_that_breaks_the_model_is_kept_as_what_it_is() -> None:
    drop = Drop(3, 64, math.inf, {0: 1.5, 2: math.inf})
    assert _read_drop(json.loads(json.dumps(_write_drop(drop), allow_nan=False))) == drop


@pytest.mark.parametrize(
    ("architecture", "own_memory"),  # of a CPU, or as that of a GPU
    [("llama", False), ("llama", True), ("gemma3", True), ("opt", False), ("gpt2", True)],
)
def test_of_a_streamed_model_it_is_the_same_and_so_is_the_smaller_one(
    architecture: str, own_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workbench_closed: None
) -> None:
    monkeypatch.setattr(tools.models.streamed, "has_own_memory", lambda device: own_memory)
    path = save_biased_model(tmp_path / "model", architecture)
    whole, streamed = (cut_and_export(path, device, tmp_path / device) for device in ("cpu", "stream"))
    assert find_stream(streamed.built) is not None and find_stream(whole.built) is None
    assert_same(streamed, whole)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt"])
def test_of_a_model_laid_over_devices_it_is_the_same_and_so_is_the_smaller_one(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workbench_closed: None
) -> None:
    path = save_biased_model(tmp_path / "model", architecture)
    whole = cut_and_export(path, "cpu", tmp_path / "whole")

    def load_over(settings: WorkbenchSettings, _scratch: Path) -> Any:
        model, tokenizer = load_model(settings)
        return lay_over(model), tokenizer

    monkeypatch.setattr(tools.workbench.bench, "load_model", load_over)
    spread = cut_and_export(path, "cpu", tmp_path / "spread")
    assert spread.places is not None and whole.places is None
    assert sum(".layers." in name for name in spread.places) == 1, "one of two blocks is left"
    assert_same(spread, whole)


class Exported(NamedTuple):
    """A cut, and the smaller model of it."""

    parts: Parts
    checkpoint: str
    made: dict[str, Tensor]
    built: Any
    places: Mapping[str, Any] | None
    smaller: dict[str, Tensor]
    losses: Evaluation
    files: dict[str, Tensor]


def cut_and_export(model: str, device: str, directory: Path) -> Exported:
    """A block and some neurons of the others."""
    bench = open_bench(tiny_settings(model, device=device), directory)
    profile, target = bench.profiles.make_bare(ignore), find_target(bench.model, 0.75)
    parts = bench.cuts.read(bench.cuts.measure(profile, target, ignore))
    layers = bench.profiles.read(profile).layers
    cut = CutOrder(parts=parts.artifact, **{"heads": 0, "neurons": 8, "dropped": (1,), "refit": True})
    zeros = {name: layer.weights for name, layer in zip(bench.weights.by_name, layers, strict=True)}
    order = order_all(Recipe(), zeros, sparsity=0.5, predicted_kl=0.0).model_copy(update={"cut": cut})
    checkpoint = bench.pruner.prune(profile, order, ignore)
    made, found = snapshot(bench), bench.pruner.build_cut(checkpoint)
    assert found is not None
    built, _ = found
    smaller = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    losses, places = bench.evaluator.evaluate_other(built, profile, ignore), find_places(built)
    vars(built).pop("hf_device_map", None)  # the library takes a CPU in it for where weights wait, and warns
    export_model(built, bench.tokenizer, directory / "smaller", "")
    assert [*directory.rglob(".mapped-*")] == [], "what is streamed lies in files without names"
    files = load_file(directory / "smaller" / "model.safetensors")
    return Exported(parts, checkpoint, made, built, places, smaller, losses, files)


def assert_same(found: Exported, other: Exported) -> None:
    """All but the models themselves, to the bit."""
    assert (found.parts, found.checkpoint, found.losses) == (other.parts, other.checkpoint, other.losses)
    for ours, theirs in ((found.made, other.made), (found.smaller, other.smaller), (found.files, other.files)):
        assert same(ours, theirs)


@pytest.mark.parametrize(
    ("architecture", "size", "problem"),
    [
        ("llama", 0.01, r"^target_size 0.01 cannot be met: \d+\.\d+% of the model's bytes are not of the blocks'"),
        ("llama", 0.999, r"^target_size 0.999 cannot be met: .* some must stay: give a smaller size$"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_anything_is_measured(
    architecture: str, size: float, problem: str, tmp_path: Path, workbench_closed: None
) -> None:
    bench = open_bench(tiny_settings(save_biased_model(tmp_path / "model", architecture)), tmp_path / "run")
    with pytest.raises(UserError, match=problem):
        find_target(bench.model, size)


def test_widths_are_aligned_as_asked(tmp_path: Path, workbench_closed: None) -> None:
    bench = open_bench(tiny_settings(save_tiny_model(tmp_path / "model", "llama")), tmp_path / "run")
    assert find_target(bench.model, 0.75).shape.neurons.options == [0, 8, 16, 24, 32, 40]
    assert find_target(bench.model, 0.75, 32).shape.neurons.options == [0, 16]
    with pytest.raises(UserError, match=r"^of 48 neurons no multiple of 128 can stay but all; give a smaller align$"):
        find_target(bench.model, 0.75, 128)


def test_workers_and_what_was_damaged_have_the_biases_of_a_cut(tmp_path: Path, workbench_closed: None) -> None:
    told: list[str] = []
    bench = open_bench(tiny_settings(save_biased_model(tmp_path / "model", "opt")), tmp_path / "run", told.append)
    dense, team = snapshot(bench), join_team(bench)
    profile = bench.profiles.make_bare(ignore)
    order = order_cut(bench, profile)
    checkpoint = bench.pruner.prune(profile, order, ignore)
    made, moved = snapshot(bench), "model.decoder.layers.0.fc2"
    assert not torch.equal(made[f"{moved}.bias"], dense[f"{moved}.bias"])
    assert "bias" in bench.weights.read_artifact(moved, bench.weights.installed[moved])

    for wanted, name in ((made, checkpoint), (dense, DENSE)):
        bench.evaluator.evaluate(name, "test", profile, ignore)
        for worker in team.workers:
            state = worker.model.state_dict()
            assert all(torch.equal(state[x].view(bits.dtype), bits) for x, bits in wanted.items())
    bench.pruner.restore(checkpoint)
    damage(artifact_path(bench, checkpoint, moved))
    assert "bias" in bench.weights.read_artifact(moved, bench.weights.installed[moved]), "what is in the model is whole"
    bench.pruner.restore(DENSE)
    bench.pruner.restore(checkpoint)
    assert same(snapshot(bench), made) and "is computed again" in told[-1]


def test_no_block_goes_whole_where_a_norm_stands_behind_the_sum(tmp_path: Path, workbench_closed: None) -> None:
    """What is judged, a model with a block of zeros, would not be what is exported."""
    config = make_config("opt", do_layer_norm_before=False, num_hidden_layers=4)
    make_model(config).save_pretrained(tmp_path / "model")
    make_tiny_tokenizer().save_pretrained(tmp_path / "model")
    bench = open_bench(tiny_settings(tmp_path / "model"), tmp_path / "run")
    profile = bench.profiles.make_bare(ignore)

    def measure(share: float) -> Parts:
        target = Target(shape=find_shape(bench.model, 8), share=share)
        return bench.cuts.read(bench.cuts.measure(profile, target, ignore))

    assert measure(0.25).order == [], "as much as a block"
    with pytest.raises(UserError, match=r"^the target cannot be met: whole blocks must go for it, and of OPTForCausal"):
        measure(0.75)
