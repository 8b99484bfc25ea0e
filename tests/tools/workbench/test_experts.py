"""Fused experts pruned by every kind of recipe: exact to the weight, exported for stock transformers, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.benches import open_bench, plan, prune, same, snapshot
from tests.tiny import MIXTURES, VOCABULARY, make_tiny_model, make_tiny_tokenizer, save_tiny_model, tiny_settings
from tools.base.errors import UserError
from tools.base.progress import ignore_progress as ignore
from tools.models.layers import find_layers
from tools.models.save import export_model
from tools.plans.pattern import count_pattern_zeros
from tools.plans.recipe import parse_recipe
from tools.workbench.bench import Workbench

RECIPES = ("wanda:uniform", "sparsegpt:uniform", "refit:kappa", "refit~sequential:kappa-mask")


@pytest.fixture(params=[*MIXTURES, "llama4_text"])
def mixture(request: pytest.FixtureRequest, tmp_path: Path, workbench_closed: None) -> Workbench:
    """A workbench of a tiny mixture of experts whose calibration text is long enough for all of them."""
    settings = tiny_settings(save_tiny_model(tmp_path / "model", request.param), calibration_windows=6)
    return open_bench(settings, tmp_path / "run", lambda text: None)


def test_experts_are_pruned_to_the_weight_and_load_in_stock_transformers(mixture: Workbench, tmp_path: Path) -> None:
    bench, dense = mixture, snapshot(mixture)
    profile = bench.profile(ignore)
    weights = sum(layer.weight_OI.numel() for layer in bench.weights.layers)
    assert weights == bench.reach.prunable and bench.reach.of_blocks > 0.98
    for label in RECIPES:
        checkpoint = prune(bench, profile, 0.45, parse_recipe(label))
        assert bench.weights.count_zeros() == (round(0.45 * weights), weights)
        counted = {layer.name: int((layer.weight_OI == 0).sum()) for layer in bench.weights.layers}
        assert counted == plan(bench, profile, 0.45, parse_recipe(label)).zeros
        assert all(counted[layer.name] for layer in bench.weights.layers if layer.pool)
    paired = parse_recipe("refit:uniform").model_copy(update={"pattern": "2:4"})
    last = prune(bench, profile, 0.5, paired)
    for layer in bench.weights.layers:
        assert int((layer.weight_OI == 0).sum()) == count_pattern_zeros(layer.weight_OI.numel(), (2, 4))
        assert bool(((layer.weight_OI == 0).reshape(-1, 4).sum(1) == 2).all())

    bench.pruner.restore(checkpoint)
    masks = bench.weights.hash_masks()
    export_model(bench.model, bench.tokenizer, tmp_path / "out", "")
    stock: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(40)[None] % VOCABULARY
    with torch.no_grad():
        assert torch.equal(stock(input_ids=ids).logits, bench.model(input_ids=ids).logits)
    zeros = {layer.name: layer.weight_OI == 0 for layer in find_layers(stock)}
    assert all(torch.equal(zeros[layer.name], layer.weight_OI == 0) for layer in bench.weights.layers)

    bench.pruner.restore(last)
    assert bench.weights.hash_masks() != masks
    bench.pruner.restore("dense")
    assert same(snapshot(bench), dense)


def test_routers_stay_as_they_are(mixture: Workbench) -> None:
    before = {name: p.clone() for name, p in mixture.model.named_parameters() if "gate.weight" in name}
    before |= {name: p.clone() for name, p in mixture.model.named_parameters() if "router" in name}
    assert before
    prune(mixture, mixture.profile(ignore), 0.8, parse_recipe("refit:kappa-mask"))
    now = dict(mixture.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())


def test_experts_that_few_tokens_are_sent_to_are_warned_of(tmp_path: Path, workbench_closed: None) -> None:
    model = make_tiny_model("qwen3_moe")
    router = model.model.layers[1].mlp.gate
    router.weight[:] = torch.stack([router.weight[0], -router.weight[0], *torch.zeros(2, 32)])
    model.config.num_experts_per_tok = 1
    model.save_pretrained(tmp_path / "model")
    make_tiny_tokenizer().save_pretrained(tmp_path / "model")
    said: list[str] = []
    settings = tiny_settings(tmp_path / "model", calibration_windows=8)
    bench = open_bench(settings, tmp_path / "run", said.append)
    profile = bench.profile(ignore)
    assert set(bench.profiles.read(profile).few) == {
        f"model.layers.1.mlp.experts.{expert}.{part}_proj" for expert in (2, 3) for part in ("gate", "up", "down")
    }
    assert said[1:] == [
        "2 of 8 experts were sent fewer calibration tokens than they have inputs, 2 of them fewer than 64; their "
        "statistics are filled up with those of all experts of their block: "
        "model.layers.1.mlp.experts.2 (0), model.layers.1.mlp.experts.3 (0). "
        "More calibration windows give them their own"
    ]
    for label in RECIPES:
        prune(bench, profile, 0.6, parse_recipe(label))
        zeros, weights = bench.weights.count_zeros()
        assert zeros == round(0.6 * weights)


def test_experts_that_compute_something_else_are_refused(
    tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    stock = Qwen3MoeExperts.forward
    monkeypatch.setattr(Qwen3MoeExperts, "forward", lambda self, x, *routed: stock(self, x, *routed) + x)
    with pytest.raises(UserError) as refused:
        open_bench(tiny_settings(save_tiny_model(tmp_path / "model", "qwen3_moe")), tmp_path / "run", lambda text: None)
    assert str(refused.value) == (
        "the experts of Qwen3MoeForCausalLM compute something else than gate, up and down projections (another result "
        "in Qwen3MoeExperts); it is not supported yet"
    )
