"""Predicted KL of units: A and the Fisher information of whole forwards, and cuts that were really made."""

from typing import Any

import pytest
import torch
from torch import Tensor

from billhook_kernels.channels import MomentSums, eliminate_units
from tests.cuts import IDS, make_config, make_model
from tools.base.progress import ignore_progress
from tools.models.readout import compute_hidden, hidden_gradients
from tools.plans.cuts import Counts
from tools.surgery.curves import measure_curves
from tools.surgery.parts import KINDS, Part, find_parts


def read_slowly(model: Any, parts: list[Part], lead: int) -> list[tuple[MomentSums, Tensor]]:
    """(what each output projection reads, mean of g g^T at its output), by one graph of the whole model a window."""
    found = [(MomentSums(p.output.weight_OI.shape[1], IDS.device), torch.zeros(32, 32)) for p in parts]
    for i, ids_T in enumerate(IDS):
        outputs: dict[int, Tensor] = {}

        def keep(place: int) -> Any:
            def see(_module: Any, inputs: Any, output: Tensor) -> Tensor:
                found[place][0].add(inputs[0].detach().flatten(0, -2))
                outputs[place] = output if output.requires_grad else output.requires_grad_()  # noqa: B023
                return outputs[place]  # noqa: B023

            return see

        hooks = [part.output.module.register_forward_hook(keep(place)) for place, part in enumerate(parts)]
        with torch.enable_grad():
            hidden_BTD = compute_hidden(model, ids_T[None])
        for hook in hooks:
            hook.remove()
        draw = torch.Generator().manual_seed(i)
        above_TD, _ = hidden_gradients(model, ids_T, hidden_BTD[0].detach(), draw, lead=lead)
        gradients = torch.autograd.grad(hidden_BTD, [outputs[place] for place in range(len(parts))], above_TD[None])
        for (_, metric_OO), gradient in zip(found, gradients, strict=True):
            metric_OO += gradient[0, lead:].T @ gradient[0, lead:] / IDS[:, lead:].numel()
    return found


@pytest.mark.parametrize(("architecture", "lead"), [("llama", 0), ("qwen3", 1)])
def test_curves_are_those_of_the_whole_model(architecture: str, lead: int) -> None:
    model = make_model(make_config(architecture))
    parts = [part for kind in KINDS for part in find_parts(model, kind)]
    slow = read_slowly(model, parts, lead)
    most = Counts(heads=1, neurons=40)
    curves = measure_curves(model, most, IDS, ignore_progress, lead=lead)
    assert list(curves) == list(KINDS)
    for part, (sums, metric_OO) in zip(parts, slow, strict=True):
        found = curves[part.kind][part.block]
        weight_OI, removed = part.output.weight_OI, getattr(most, part.kind)
        moments = sums.finish()
        expected = eliminate_units(weight_OI, moments, metric_OO, part.units, removed, biased=False)
        assert len(found.order_R) == removed
        torch.testing.assert_close(found.cost_R, expected.cost_R, rtol=1e-3, atol=1e-9)
        assert {*found.order_R[:16].tolist()} == {*expected.order_R[:16].tolist()}
