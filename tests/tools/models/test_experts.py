"""Fused experts run one by one as transformers runs them together."""

from itertools import product

import pytest
import torch

from tests.tiny import MIXTURES, VOCABULARY, make_tiny_model
from tools.models.experts import check_experts, run_apart
from tools.models.layers import find_layers

IDS_BT = 1 + torch.arange(40)[None] % (VOCABULARY - 1)


@pytest.mark.parametrize(
    ("architecture", "implementation"),
    [*product(MIXTURES, ("eager", "grouped_mm", "batched_mm")), ("llama4_text", "eager")],
)
def test_experts_run_apart_give_what_transformers_gives(architecture: str, implementation: str) -> None:
    model = make_tiny_model(architecture)
    model.set_experts_implementation(implementation)
    check_experts(model, IDS_BT[0])
    with torch.no_grad():
        theirs = model(input_ids=IDS_BT).logits
        seen: list[int] = []
        layers = [layer for layer in find_layers(model) if layer.pool]
        hooks = [x.module.register_forward_hook(lambda _, args, y: seen.append(len(args[0]))) for x in layers]
        with run_apart(layer.module for layer in layers):
            ours = model(input_ids=IDS_BT).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    chosen = 1 if architecture == "llama4_text" else 2
    assert sum(seen) == chosen * 3 * 2 * 40, "so many experts of three projections for each token, in both blocks"
    for hook in hooks:
        hook.remove()
    assert not any("forward" in vars(part) for part in model.modules())
