"""Fused experts: the linear layers of a mixture of experts that transformers keeps stacked in one 3-D parameter.

A module that follows transformers' interface for experts (`transformers.integrations.moe`) is known by its attributes,
whatever its class is called, and one like Llama 4's, which reads a row of every token for every expert, by its forms.
Each expert's projections stand as linear layers of their own, whose weights are views of the stacked parameter, so that
what is written to one is written to the model.

Shape suffixes: T tokens, K experts of each token, S = T * K rows, D hidden width, I input features, O output features.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tools.base.errors import UserError, in_one_line
from tools.models.positions import CHECKED

Experts = Sequence[Mapping[str, nn.Module]]
"""For each expert its projections, by name: gate_proj where it has one, up_proj and down_proj, as they run."""

_SAID = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
"""What transformers' decorator of classes of experts says of each module, in the order of `Traits`."""


class Traits(NamedTuple):
    """How the projections of experts are stacked, and what a module of them reads."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool
    """Gate before up, and not in turn, in the parameter that stacks both."""
    has_post_expert_norm: bool
    reads_all: bool = False
    """A row of every token for every expert, zero where it is not sent there; else each token with its experts."""

    @property
    def stacked(self) -> tuple[str, str]:
        """Names of the parameters."""
        return "gate_up_proj" if self.has_gate else "up_proj", "down_proj"


def describe_experts(module: Any) -> Traits | None:
    """None for any module that is not stacked experts of a kind that is known."""
    if all(hasattr(module, said) for said in (*_SAID, "_apply_gate", "num_experts")):
        traits = Traits(*(bool(getattr(module, said)) for said in _SAID))
    elif hasattr(module, "act_fn") and hasattr(module, "num_experts"):
        traits = Traits(True, False, True, True, False, reads_all=True)
    else:
        return None
    first, down = (module._parameters.get(name) for name in traits.stacked)
    if first is None or down is None or not first.ndim == down.ndim == 3 or not first.is_floating_point():
        return None
    if traits.reads_all and (
        first.shape[1:] != (down.shape[2], 2 * down.shape[1]) or len(inspect.signature(module.forward).parameters) != 1
    ):
        return None
    return traits


def is_fused(module: nn.Module) -> bool:
    """Whether a module is stacked experts of a kind that is known."""
    return describe_experts(module) is not None


def list_stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of stacked experts."""
    traits = describe_experts(module)
    return {name: module.get_parameter(name) for name in traits.stacked} if traits else {}


class ExpertLinear(nn.Module):
    """One projection of one expert as a linear layer. It is no part of the model; its weight is a view of it."""

    def __init__(self, experts: nn.Module, traits: Traits, parameter: str, expert: int, rows: slice) -> None:
        """`rows` are those of the projection where the parameter stacks two (gate and up)."""
        super().__init__()
        object.__setattr__(self, "experts", experts)  # not a part of this one
        self.traits, self._place = traits, (parameter, expert, rows)

    experts: Any
    siblings: "list[dict[str, ExpertLinear]]"
    """The projections of all experts of the same module."""

    @property
    def stacked(self) -> nn.Parameter:
        """The parameter of all experts."""
        parameter: nn.Parameter = self.experts.get_parameter(self._place[0])
        return parameter

    @property
    def weight(self) -> Tensor:
        """A view, (O, I)."""
        _, expert, rows = self._place
        weight = self.stacked[expert]
        return (weight.T if self.traits.is_transposed else weight)[rows]

    @property
    def bias(self) -> Tensor | None:
        """A view, (O,)."""
        parameter, expert, rows = self._place
        return self.experts.get_parameter(f"{parameter}_bias")[expert, rows] if self.traits.has_bias else None

    @property
    def is_second(self) -> bool:
        """Whether it reads what the expert's projection before it reads."""
        return self.traits.has_gate and self is self.siblings[self._place[1]]["up_proj"]

    def forward(self, x_TI: Tensor) -> Tensor:
        """(T, O)."""
        return linear(x_TI, self.weight, self.bias)


def split_experts(module: Any) -> list[dict[str, ExpertLinear]]:
    """The projections of every expert of a module that `is_fused`."""
    traits = describe_experts(module)
    assert traits is not None
    half, every = module.down_proj.shape[1 if traits.is_transposed else 2], slice(None)
    if not traits.has_gate:
        parts = {"up_proj": ("up_proj", every)}
    elif traits.is_concatenated:
        parts = {"gate_proj": ("gate_up_proj", slice(0, half)), "up_proj": ("gate_up_proj", slice(half, None))}
    else:
        parts = {"gate_proj": ("gate_up_proj", slice(0, None, 2)), "up_proj": ("gate_up_proj", slice(1, None, 2))}
    parts["down_proj"] = ("down_proj", every)
    linears = [
        {name: ExpertLinear(module, traits, parameter, expert, rows) for name, (parameter, rows) in parts.items()}
        for expert in range(module.num_experts)
    ]
    for projections in linears:
        for projection in projections.values():
            object.__setattr__(projection, "siblings", linears)
    return linears


def run_experts(module: Any, traits: Traits, linears: Experts, *inputs: Tensor, **named: Tensor) -> Tensor:
    """What the module's forward gives, expert by expert, with these projections.

    Experts that no token is sent to do not run.
    """
    run = _run_all if traits.reads_all else _run_chosen
    return run(module, traits, linears, *inputs, **named)


def _run_chosen(
    module: Any, traits: Traits, linears: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Each token's K experts are `top_k_index`, (T, K); those beyond the last one give nothing: (T, D)."""
    rows_S, order_S = top_k_index.reshape(-1).sort(stable=True)
    x_SD = hidden_states[order_S // top_k_index.shape[-1]]
    counts = torch.bincount(rows_S, minlength=len(linears))[: len(linears)].tolist()
    shares = x_SD[: sum(counts)].split(counts)
    parts = [_run_expert(module, traits, *pair) for pair in zip(linears, shares, strict=True) if len(pair[1])]
    y_SD = torch.cat([*parts, x_SD.new_zeros(len(x_SD) - sum(counts), x_SD.shape[1])])
    if traits.has_post_expert_norm:
        y_SD = module.post_expert_norm(y_SD)
    weighted_SD = y_SD[order_S.argsort()] * top_k_weights.reshape(-1, 1)
    return weighted_SD.view(len(hidden_states), -1, weighted_SD.shape[1]).sum(1).to(hidden_states.dtype)


def _run_all(module: Any, traits: Traits, linears: Experts, hidden_states: Tensor) -> Tensor:
    """The rows are those of all tokens for the first expert, then for the next; zeros give zeros: (E * T, D)."""
    parts = []
    for projections, x_TD in zip(linears, hidden_states.view(len(linears), -1, hidden_states.shape[-1]), strict=True):
        (sent_S,) = x_TD.any(1).nonzero(as_tuple=True)
        y_TD = torch.zeros_like(x_TD)
        if len(sent_S):
            y_TD = y_TD.index_put((sent_S,), _run_expert(module, traits, projections, x_TD[sent_S]))
        parts.append(y_TD)
    return torch.cat(parts)


def _run_expert(module: Any, traits: Traits, linears: Mapping[str, nn.Module], x_TD: Tensor) -> Tensor:
    if not traits.has_gate:
        inner_TI = module.act_fn(linears["up_proj"](x_TD))
    else:
        both = linears["gate_proj"](x_TD), linears["up_proj"](x_TD)
        if traits.reads_all:
            inner_TI = module.act_fn(both[0]) * both[1]
        else:  # laid out as in the stacked parameter
            joined = torch.cat(both, 1) if traits.is_concatenated else torch.stack(both, 2).flatten(1)
            inner_TI = module._apply_gate(joined)
    y_TD: Tensor = linears["down_proj"](inner_TI)
    return y_TD


@contextmanager
def run_apart(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, stacked experts run by the projections that are among the `modules`, whose hooks see tokens."""
    changed: dict[int, tuple[nn.Module, Any]] = {}
    for module in modules:
        if isinstance(module, ExpertLinear) and id(module.experts) not in changed:
            changed[id(module.experts)] = module.experts, vars(module.experts).get("forward")
            module.experts.forward = partial(run_experts, module.experts, module.traits, module.siblings)
    try:
        yield
    finally:
        for experts, before in changed.values():
            if before is None:
                del experts.forward
            else:
                experts.forward = before


@torch.no_grad()
def check_experts(model: Any, ids_T: Tensor) -> None:
    """Compare `run_experts` with the forward of every module of experts on 16 tokens.

    Raises UserError, in one line, for an architecture whose experts do something else.
    """
    fused = [module for module in model.modules() if is_fused(module)]
    odd: list[str] = []

    def compare(module: Any, args: Any, kwargs: Any, theirs: Tensor) -> None:
        linears = split_experts(module)
        try:
            ours = run_experts(module, linears[0]["down_proj"].traits, linears, *args, **kwargs)
            size, error = theirs.float().abs().max(), (ours.float() - theirs.float()).abs().max()
            same = bool(error <= (1e-4 if theirs.dtype == torch.float32 else 2e-2) * size) or not size.isfinite()
            odd.extend([] if same else [f"another result in {type(module).__name__}"])
        except Exception as error:  # whatever an operation raises that does not fit
            odd.append(in_one_line(error, 100))

    hooks = [module.register_forward_hook(compare, with_kwargs=True) for module in fused]
    try:
        if hooks:
            model(input_ids=ids_T[None, :CHECKED], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if odd:
        raise UserError(
            f"the experts of {type(model).__name__} compute something else than gate, up and down projections "
            f"({odd[0]}); it is not supported yet"
        )
