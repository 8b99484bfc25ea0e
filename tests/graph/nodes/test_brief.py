"""What is known of each named text before a goal is read."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from graph.config import RunConfig
from graph.nodes.brief import look_at_texts
from graph.planning.orders import resolve
from graph.planning.plan import Plan
from tests.named import name_texts
from tests.situations import ignore
from tests.tiny import tiny_settings
from tools.plans.layer_profile import predict_kl
from tools.plans.recipe import Recipe
from tools.results.schema import TextFigures
from tools.workbench.open import use_workbench


def test_each_text_is_seen_with_its_beginning_and_what_its_own_curves_say_of_the_target(
    tmp_path: Path, tiny_llama: Path, workbench_closed: None
) -> None:
    settings = tiny_settings(tiny_llama, **name_texts(tmp_path / "texts"))
    figures = {"weight": 0.5, "kl": 0.0, "kl_error": 0.0, "change": None, "change_error": None}
    dense = SimpleNamespace(texts=[TextFigures(name="code", perplexity=9.5, **figures)])
    config = RunConfig(target_sparsity=0.45, text=settings.text, text_weights=settings.text_weights)
    with use_workbench(settings, tmp_path / "run", pytest.fail, ignore) as bench:
        state: Any = SimpleNamespace(config=config, dense=dense, profile=bench.profile(ignore))
        code, prose = look_at_texts(bench, state)
        layers = bench.profiles.read(state.profile).layers
        alone = {
            name: bench.curves.describe_layers(state.profile, Recipe(curves="mask", mix=((name, 1.0),)), ignore)
            for name in settings.text
        }
    assert (code.name, code.perplexity, prose.name, prose.perplexity) == ("code", 9.5, "prose", None)
    assert "();" in code.begins and "();" not in prose.begins
    order = resolve(Plan(sparsity=0.45), layers, config)
    shares = np.array([order.zeros[layer.name] / layer.weights for layer in layers])
    predicted = [predict_kl(alone[name], shares) for name in ("code", "prose")]
    assert [code.predicted_kl, prose.predicted_kl] == pytest.approx(predicted, rel=1e-6)
    assert 0.75 * code.predicted_kl + 0.25 * prose.predicted_kl == pytest.approx(order.predicted_kl, rel=0.02)
    assert abs(code.predicted_kl / prose.predicted_kl - 1) > 0.05
