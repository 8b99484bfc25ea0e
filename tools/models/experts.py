"""Fused experts: the linear layers of a mixture of experts that transformers keeps stacked in one 3-D parameter.

A module that follows transformers' interface for experts (`transformers.integrations.moe`) is known by its attributes,
whatever its class is called. Each expert's projections stand as linear layers of their own, whose weights are views of
the stacked parameter, so that what is written to one is written to the model.

Shape suffixes: T tokens, K experts of each token, S = T * K rows, D hidden width, I input features, O output features.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tools.base.errors import UserError, in_one_line

Experts = Sequence[Mapping[str, nn.Module]]
"""For each expert its projections, by name: gate_proj where it has one, up_proj and down_proj, as they run."""

_TRAITS = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
"""What transformers' decorator of classes of experts says of each module."""


class ExpertLinear(nn.Module):
    """One projection of one expert as a linear layer. It is no part of the model; its weight is a view of it."""

    def __init__(self, experts: nn.Module, parameter: str, expert: int, rows: slice) -> None:
        """`rows` are those of the projection where the parameter stacks two (gate and up)."""
        super().__init__()
        object.__setattr__(self, "experts", experts)  # not a part of this one
        self._place = parameter, expert, rows

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
        return (weight.T if self.experts.is_transposed else weight)[rows]

    @property
    def bias(self) -> Tensor | None:
        """A view, (O,)."""
        parameter, expert, rows = self._place
        return self.experts.get_parameter(f"{parameter}_bias")[expert, rows] if self.experts.has_bias else None

    @property
    def is_second(self) -> bool:
        """Whether it reads what the expert's projection before it reads."""
        return self.experts.has_gate and self is self.siblings[self._place[1]]["up_proj"]

    def forward(self, x_TI: Tensor) -> Tensor:
        """(T, O)."""
        return linear(x_TI, self.weight, self.bias)


def is_fused(module: nn.Module) -> bool:
    """Whether a module is stacked experts that follow transformers' interface."""
    if not all(hasattr(module, trait) for trait in (*_TRAITS, "_apply_gate")):
        return False
    stacked = list_stacked(module).values()
    return len(stacked) == 2 and all(p.ndim == 3 and p.is_floating_point() for p in stacked)


def list_stacked(module: Any) -> dict[str, nn.Parameter]:
    """The parameters that hold the projections of all experts."""
    names = "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
    return {name: p for name in names if (p := module._parameters.get(name)) is not None}


def split_experts(module: Any) -> list[dict[str, ExpertLinear]]:
    """The projections of every expert of a module."""
    half = module.down_proj.shape[1 if module.is_transposed else 2]
    every = slice(None)
    if not module.has_gate:
        parts = {"up_proj": ("up_proj", every)}
    elif module.is_concatenated:
        parts = {"gate_proj": ("gate_up_proj", slice(0, half)), "up_proj": ("gate_up_proj", slice(half, None))}
    else:
        parts = {"gate_proj": ("gate_up_proj", slice(0, None, 2)), "up_proj": ("gate_up_proj", slice(1, None, 2))}
    parts["down_proj"] = ("down_proj", every)
    linears = [
        {name: ExpertLinear(module, parameter, expert, rows) for name, (parameter, rows) in parts.items()}
        for expert in range(module.num_experts)
    ]
    for projections in linears:
        for projection in projections.values():
            object.__setattr__(projection, "siblings", linears)
    return linears


def run_experts(
    module: Any,
    linears: Experts,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """What the module's forward gives, expert by expert, with these projections: (T, D).

    Experts that no token is sent to do not run.
    """
    rows_S, order_S = top_k_index.reshape(-1).sort(stable=True)
    x_SD = hidden_states[order_S // top_k_index.shape[-1]]
    counts = torch.bincount(rows_S, minlength=module.num_experts)[: module.num_experts].tolist()
    parts = [
        _run_expert(module, linears[expert], x_TD)
        for expert, x_TD in enumerate(x_SD[: sum(counts)].split(counts))
        if len(x_TD)
    ]
    y_SD = torch.cat([*parts, x_SD[sum(counts) :].new_zeros(len(x_SD) - sum(counts), x_SD.shape[1])])
    if module.has_post_expert_norm:
        y_SD = module.post_expert_norm(y_SD)
    weighted_SD = y_SD[order_S.argsort()] * top_k_weights.reshape(-1, 1)
    return weighted_SD.view(len(hidden_states), -1, weighted_SD.shape[1]).sum(1).to(hidden_states.dtype)


def _run_expert(module: Any, linears: Mapping[str, nn.Module], x_TD: Tensor) -> Tensor:
    up_TI = linears["up_proj"](x_TD) if not module.has_gate else _join(module, linears, x_TD)
    y_TD: Tensor = linears["down_proj"](module._apply_gate(up_TI) if module.has_gate else module.act_fn(up_TI))
    return y_TD


def _join(module: Any, linears: Mapping[str, nn.Module], x_TD: Tensor) -> Tensor:
    """What both first projections give, laid out as in the stacked parameter."""
    gate_TI, up_TI = linears["gate_proj"](x_TD), linears["up_proj"](x_TD)
    return torch.cat([gate_TI, up_TI], 1) if module.is_concatenated else torch.stack([gate_TI, up_TI], 2).flatten(1)


class PackedExpert(nn.Module):
    """One projection of one expert with its weight packed; a bias is still the stacked one's."""

    def __init__(self, packed: nn.Module, dense: ExpertLinear) -> None:
        super().__init__()
        self.packed = packed
        object.__setattr__(self, "dense", dense)  # not a part of this one

    dense: ExpertLinear

    def forward(self, x_TI: Tensor) -> Tensor:
        """(T, O)."""
        y_TO: Tensor = self.packed(x_TI)
        return y_TO if self.dense.bias is None else y_TO + self.dense.bias


def replace_experts(module: nn.Module, projections: Experts) -> None:
    """Make stacked experts run by other linear layers for good; their own weights are let go of."""
    for name in list_stacked(module):
        del module._parameters[name]
    module.projections = nn.ModuleList(nn.ModuleDict(dict(expert)) for expert in projections)
    module.forward = partial(run_experts, module, projections)


@contextmanager
def run_apart(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, stacked experts run by the projections that are among the `modules`, whose hooks see tokens."""
    changed: dict[int, tuple[nn.Module, Any]] = {}
    for module in modules:
        if isinstance(module, ExpertLinear) and id(module.experts) not in changed:
            changed[id(module.experts)] = module.experts, vars(module.experts).get("forward")
            module.experts.forward = partial(run_experts, module.experts, module.siblings)
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
        try:
            ours = run_experts(module, split_experts(module), *args, **kwargs)
            size, error = theirs.float().abs().max(), (ours.float() - theirs.float()).abs().max()
            same = bool(error <= (1e-4 if theirs.dtype == torch.float32 else 2e-2) * size) or not size.isfinite()
            odd.extend([] if same else [f"another result in {type(module).__name__}"])
        except Exception as error:  # whatever an operation raises that does not fit
            odd.append(in_one_line(error, 100))

    hooks = [module.register_forward_hook(compare, with_kwargs=True) for module in fused]
    try:
        if hooks:
            model(input_ids=ids_T[None, :16], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if odd:
        raise UserError(
            f"the experts of {type(model).__name__} compute something else than gate, up and down projections "
            f"({odd[0]}); it is not supported yet"
        )
