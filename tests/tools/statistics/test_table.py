"""The table of layers against explicit sums."""

import math
from pathlib import Path

import numpy as np
import torch

from billhook_kernels.masks import score_wanda
from tests.tiny import VOCABULARY, make_tiny_model
from tools.base.progress import ignore_progress
from tools.models.blocks import Blocks
from tools.models.layers import find_layers
from tools.statistics.collect import collect_statistics
from tools.statistics.requests import work_alone
from tools.statistics.table import build_profile, measure_peak


def test_the_table_of_layers(tmp_path: Path) -> None:
    model = make_tiny_model("gpt2")
    layers = find_layers(model)
    layers[2].write(torch.where(layers[2].weight_OI.abs() < 0.02, 0, layers[2].weight_OI))
    layers[3].write(torch.zeros_like(layers[3].weight_OI))
    windows_BT = torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
    team, extent = work_alone(Blocks(model), layers, windows_BT, 2, 5, tmp_path)
    statistics = collect_statistics(team, extent, layers, ignore_progress, None)
    table = build_profile(layers, statistics)
    assert [(row.name, row.block, row.kind) for row in table] == [(la.name, la.block, la.kind) for la in layers]
    for row, layer in zip(table, layers, strict=True):
        assert row.weights == layer.stored_weight.numel()
        assert row.zeros == int((layer.stored_weight == 0).sum())
        assert row.gradient == statistics.gradient[layer.name]
        assert row.kappa == statistics.kappa[layer.name]
        assert row.inputs == layer.weight_OI.shape[1]
        assert row.peak == measure_peak(statistics.mean_square[layer.name])
        weight = layer.weight_OI
        active = sorted(score_wanda(weight, statistics.mean_square[layer.name])[weight != 0].tolist())
        assert row.wanda == (active[math.ceil(len(active) / 10) - 1] if active else 0)
    for score in ("wanda", "gradient"):
        values = np.array([getattr(row, score) for row in table])
        z = [getattr(row, f"{score}_z") for row in table]
        np.testing.assert_allclose(z, (values - values.mean()) / values.std(), rtol=1e-6)
