"""Tiny models that are cut, and what is read of them; shared by the tests of tools.surgery."""

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from billhook_kernels.channels import DAMPINGS
from tests.tiny import ARCHITECTURES, VOCABULARY, make_tiny_config
from tools.base.progress import ignore_progress
from tools.plans.cuts import Counts, Cutting, count_cut_zeros, resolve_cut
from tools.plans.recipe import Recipe
from tools.plans.work_order import WorkOrder, order_all
from tools.surgery.blocks import choose_blocks, fold_blocks
from tools.surgery.choose import choose_channels
from tools.surgery.parts import Cut
from tools.surgery.share import find_target
from tools.workbench.bench import Workbench

IDS = torch.randint(VOCABULARY, (4, 48), generator=torch.Generator().manual_seed(0))
COUNTS = {"neurons": Counts(neurons=12), "heads": Counts(heads=1), "both": Counts(heads=1, neurons=12)}


def compute_logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def assert_same_logits(model: Any, dense: Any) -> None:
    """Up to the order of sums."""
    torch.testing.assert_close(compute_logits(model), compute_logits(dense), rtol=1e-4, atol=1e-4)


def cut_blocks(model: Any, dropped: list[int]) -> Cut:
    return Cut(Counts(blocks=len(dropped)), list(fold_blocks(model, dropped, IDS, ignore_progress)), tuple(dropped))


def make_cut(model: Any, parts: str) -> Cut:
    if parts == "blocks":
        return cut_blocks(model, choose_blocks(model, 1, IDS, ignore_progress)[0])
    return choose_channels(model, [COUNTS[parts]], IDS, ignore_progress)[0]


def make_config(architecture: str, **options: Any) -> Any:
    """The tiny config with some fields changed; of an architecture that it does not know, with Llama's sizes."""
    if architecture in ARCHITECTURES:
        config = make_tiny_config(architecture)
        for name, value in options.items():
            setattr(config, name, value)
        return config
    sizes = make_tiny_config("llama").to_dict()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("intermediate_size", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
    return transformers.AutoConfig.for_model(architecture, **{name: sizes[name] for name in names}, **options)


def make_model(config: Any) -> Any:
    """A model with seeded random weights; its biases are not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_()
    return model.eval().requires_grad_(False)


def read_inputs(model: Any, module: Any) -> np.ndarray[Any, Any]:
    """What a module reads in one forward of the whole model, float64."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].flatten(0, -2)))
    compute_logits(model)
    hook.remove()
    return seen[0].double().numpy()


def fit_slowly(x: Any, target: Any, towards: Any, damping: float, *, biased: bool) -> Any:
    """Least squares over the tokens, with a row for each damped weight; the intercept last, where there is one."""
    rows = np.concatenate([x, np.sqrt(len(x) * damping) * np.eye(x.shape[1])])
    if biased:
        rows = np.concatenate([rows, np.r_[np.ones(len(x)), np.zeros(x.shape[1])][:, None]], axis=1)
    extended = np.concatenate([target, np.sqrt(len(x) * damping) * towards.T])
    return np.linalg.lstsq(rows, extended, rcond=None)[0].T


def find_damping_slowly(x: Any, target: Any, weight: Any, kept: Any, *, biased: bool) -> float:
    """The share of the mean square to damp a fit with: the best of a fit to windows 0 and 2 on the others, halved."""
    even = np.arange(len(x)) // IDS.shape[1] % 2 == 0
    first, wanted, second, judged = x[even], target[even], x[~even], target[~even]
    spread = first - first.mean(0) if biased else first
    errors = []
    for share in DAMPINGS:
        damping = share * float((spread**2).mean())
        fitted = fit_slowly(first[:, kept], wanted, weight[:, kept], damping, biased=biased)[:, : len(kept)]
        left = second[:, kept] @ fitted.T - judged
        errors.append(float(((left - left.mean(0) if biased else left) ** 2).sum()))
    return DAMPINGS[int(np.argmin(errors))] / 2


def order_cut(bench: Workbench, profile: str, size: float = 0.75, **levers: object) -> WorkOrder:
    """What leaves so much of the bytes of the model in a workbench, shared out as these levers of a plan say."""
    target = find_target(bench.model, size)
    parts = bench.cuts.read(bench.cuts.measure(profile, target, ignore_progress))
    layers = bench.profiles.read(profile).layers
    cut = resolve_cut(Cutting.model_validate(levers), parts, target.share, layers)
    zeros = count_cut_zeros(cut, parts, layers)
    return order_all(Recipe(), zeros, sparsity=target.share, predicted_kl=0.0).model_copy(update={"cut": cut})
