"""The speed of a polish, beside autograd on the whole model and beside the bare forward.

Shape suffixes: T tokens, D hidden width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tools.base.progress import ignore_progress
from tools.experiments.speed import SPARSITY, UPDATED, Site, Task
from tools.models.blocks import Blocks
from tools.models.layers import Layer
from tools.models.readout import compute_hidden, compute_logits
from tools.plans.work_order import order_allocation
from tools.polish.gradients import KL, Divergence
from tools.polish.optimisers import Adam, Step
from tools.polish.survivors import Survivors
from tools.results.speed import Result
from tools.workbench.store import DENSE

STEP = Step(0, 10)
"""The step that is taken again and again."""


def bench_polish(site: Site) -> list[Result]:
    """A step on one window: the gradient by all survivors, block by block, Adam, and the weights put into the model."""
    bench, ids_T = site.bench, site.calibration_BT[0]
    bench.restore(DENSE)
    with torch.no_grad():
        dense_TD = compute_hidden(bench.model, ids_T[None])[0]
    bench.prune(site.profile, order_allocation(UPDATED, site.share_out(SPARSITY)), ignore_progress)
    survivors, lead = Survivors(bench.layers), bench.windows.lead
    problem = Divergence(Blocks(bench.model), survivors, site.calibration_BT, {0: dense_TD.cpu()}, lead)
    values = survivors.read()
    ours = Adam(values)
    parameters = {id(layer.parameter): layer.parameter for layer in bench.layers}  # fused experts share one
    theirs = torch.optim.Adam(parameters.values(), lr=0.0)  # it leaves the weights as they are

    def take_step() -> None:
        gradients = problem.differentiate([0])
        gradients.pop(KL)
        ours.take(values, gradients, STEP)
        survivors.write(values)

    @torch.no_grad()
    def run_forward() -> None:
        compute_hidden(bench.model, ids_T[None])

    def take_plain_step() -> None:
        differentiate_whole(bench.model, bench.layers, ids_T, dense_TD, lead)
        theirs.step()
        theirs.zero_grad()

    try:
        step, plain, forward = site.time(Task(take_step), Task(take_plain_step), Task(run_forward))
    finally:
        bench.weights.installed.update(dict.fromkeys(bench.weights.by_name, ""))
        bench.restore(DENSE)
    what = f"a step of the polish on {len(ids_T)} tokens"
    whole = "autograd on the whole model, its logits at once, and Adam of torch"
    return [
        site.compare("polish/autograd", what, step, whole, plain),
        site.compare("polish/forward", what, step, "a bare forward of these tokens, without the output head", forward),
    ]


def differentiate_whole(model: Any, layers: Sequence[Layer], ids_T: Tensor, dense_TD: Tensor, lead: int) -> None:
    """The gradient of KL(dense || model), summed over the tokens of the text, by all weights of the layers: in `grad`
    of these, by one backward. `dense_TD` is what the dense model's head reads."""
    for layer in layers:
        layer.parameter.requires_grad_()
    try:
        with torch.enable_grad():
            dense_TV = compute_logits(model, dense_TD[lead:]).float().log_softmax(-1)
            model_TV = model(ids_T[None]).logits[0, lead:].float().log_softmax(-1)
            torch.nn.functional.kl_div(model_TV, dense_TV, reduction="sum", log_target=True).backward()
    finally:
        for layer in layers:
            layer.parameter.requires_grad_(False)
