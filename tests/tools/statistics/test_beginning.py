"""Statistics of windows that begin with a token which is no text, against plain autograd in float64."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from billhook_kernels.statistics import lean_to_mean
from tests.tiny import VOCABULARY, make_tiny_model
from tests.tools.statistics.test_collect import watch
from tools.base.progress import ignore_progress
from tools.models.blocks import Blocks
from tools.models.layers import find_layers
from tools.models.readout import compute_hidden, compute_logits
from tools.plans.layer_profile import LEVELS
from tools.statistics.collect import collect_statistics, measure_kappa
from tools.statistics.known import PRIOR
from tools.statistics.requests import Here, work_alone

WINDOWS, LENGTH, BACKWARD, SEED = 3, 20, 2, 5


def test_layers_read_the_beginning_and_are_told_of_it_by_what_comes_after(tmp_path: Path) -> None:
    model = make_tiny_model("llama")
    layers = find_layers(model)
    text_BT = torch.randint(0, VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    windows = F.pad(text_BT, (1, 0), value=7)
    parts = {layer.name: [0.1 * layer.weight_OI, *[0 * layer.weight_OI] * (len(LEVELS) - 1)] for layer in layers}
    team, extent = work_alone(Blocks(model), layers, windows, BACKWARD, SEED, tmp_path, lead=1)
    moments: dict[str, Tensor] = {}
    found = collect_statistics(team, extent, layers, ignore_progress, moments.__setitem__)
    kappa = measure_kappa(team, extent, layers, ignore_progress, lambda _: [Here(parts)])

    double = copy.deepcopy(model).double().requires_grad_(True)
    weights = {layer.name: layer.module.get_parameter("weight") for layer in find_layers(double)}
    read, gamma, score = ({name: torch.zeros(1, dtype=torch.float64) for name in weights} for _ in range(3))
    cost, began = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, False)
    for window, ids in enumerate(windows):
        with watch(find_layers(double)) as (inputs, outputs):
            logits = double(input_ids=ids[None], use_cache=False).logits[0]
        for name, x in inputs.items():
            read[name] = read[name] + x.T @ x / (WINDOWS * (LENGTH + 1))
        if window >= BACKWARD:
            continue
        with torch.no_grad():
            p = compute_logits(model, compute_hidden(model, ids[None])[0, 1:]).softmax(-1)
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + window)
        labels = torch.multinomial(p, 1, generator=generator)[:, 0]
        F.cross_entropy(logits[1:], labels, reduction="sum").backward(retain_graph=True)
        for name, output in outputs.items():
            assert output.grad is not None
            g = output.grad.flatten(0, -2)
            gamma[name] = gamma[name] + g.square().sum(0) / (BACKWARD * LENGTH)
            change = g * (inputs[name] @ (0.1 * weights[name].detach()).T)
            cost[name] += float(change.sum(1).square().sum()) / (2 * BACKWARD * LENGTH)
            began[name] |= bool(g[0].any())
        language = torch.autograd.grad(F.cross_entropy(logits[1:-1], ids[2:]), list(weights.values()))
        for name, gradient in zip(weights, language, strict=True):
            score[name] = score[name] + gradient.abs().mean() / BACKWARD
    assert began["model.layers.0.mlp.down_proj"] and began["model.layers.1.self_attn.v_proj"]
    assert not began["model.layers.1.mlp.down_proj"], "no loss is taken there"
    for name in weights:
        second_moment = moments[found.group[name]]
        leant = lean_to_mean(gamma[name], BACKWARD * LENGTH, PRIOR)
        largest, most = float(read[name].max()), float(leant.max())
        torch.testing.assert_close(second_moment.double(), read[name], rtol=1e-4, atol=1e-5 * largest)
        torch.testing.assert_close(found.mean_square[name], second_moment.diagonal())
        torch.testing.assert_close(found.gradient_square[name].double(), leant, rtol=1e-3, atol=1e-5 * most)
        assert found.gradient[name] == pytest.approx(float(score[name]), rel=1e-4)
        assert kappa[name][0] == pytest.approx(cost[name], rel=2e-3)
