"""The gradient of KL(dense || model) by all survivors of all layers, window by window: up through the blocks, and down.

The forward keeps what each block reads; on the way down each block runs once more, so that only its own graph is held.
No logits of more than `tools.models.readout.CHUNK` tokens are held.

Shape suffixes: B windows, T tokens, I input features, O output features, D hidden width, S survivors of a layer.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from billhook_kernels.guard import mend_lost
from billhook_kernels.packed import gather_kept, spread_kept
from tools.base.errors import BrokenPlan
from tools.base.memory import count_free
from tools.base.progress import heed_stop
from tools.models.blocks import Blocks
from tools.models.experts import ExpertLinear, run_apart
from tools.models.layers import Layer
from tools.models.readout import compute_hidden, diverge_gradients, measure_losses
from tools.plans.costs import Means
from tools.statistics.gradients import Gradient, bring_near, flow_back, scale_losses, tapped
from tools.statistics.shards import Span, Sums, list_nodes, sum_node
from tools.statistics.walks import Nodes

Vectors = dict[str, Tensor]
"""By layer name, (S,); fp32, where `Survivors` keeps them."""

STATE_SHARE = 0.5
"""Share of the memory free on a GPU, or in CPU memory, that what a polish keeps of each survivor may take there; the
gradients of a step, the marks of what survives and a walk need room beside it."""

MEAN_BYTES: dict[Means, int] = {"fp32": 4, "bf16": 2}
"""Of one mean of a survivor."""


class Place(NamedTuple):
    """Where what a polish keeps of each survivor lies, and in which format."""

    away: bool
    """Whether it lies in CPU memory, wherever the weights are."""
    means: Means


class Survivors:
    """Which weights of the model are not zero now, and for good."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.layers = list(layers)
        self.keep = {layer.name: layer.weight_OI != 0 for layer in self.layers}
        """bool, (O, I), on the layer's device."""
        self.written = 0
        """How often weights were put into the model."""

    def gather(self, name: str, full_OI: Tensor) -> Tensor:
        """The survivors' entries of a tensor of a layer's shape: (S,)."""
        return gather_kept(full_OI, self.keep[name])

    @cached_property
    def place(self) -> Place:
        """Where vectors are kept, and in which format means: by what was free when this was first asked."""
        wanted = Counter[torch.device]()
        for layer in self.layers:
            kept = int(torch.count_nonzero(self.keep[layer.name]))
            wanted[layer.weight_OI.device] += kept * count_state_bytes(layer.weight_OI.element_size(), "fp32")
        free = count_free()
        return place_state([(size, _count_free_on(device, free)) for device, size in wanted.items()], free)

    def read(self) -> Vectors:
        """Those in the model, as fp32."""
        return {
            layer.name: self.gather(layer.name, layer.weight_OI)
            .to("cpu" if self.place.away else layer.weight_OI.device)
            .float()
            for layer in self.layers
        }

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Put survivors into the model, in its number format; all other weights of the layers are zero.

        Those that come out as exactly 0 become the least normal number, as in `guard.finish_update`: zeros stay
        as many as they were. Raises BrokenPlan where one is not finite.
        """
        for layer in self.layers:
            layer.write(self.spread(layer, values[layer.name]))
        self.written += 1

    def spread(self, layer: Layer, values_S: Tensor) -> Tensor:
        """The weight that survivors stand for, (O, I), as `write` puts it into the model."""
        dtype = layer.weight_OI.dtype
        stored_S = values_S.to(dtype)
        if not bool(torch.isfinite(stored_S).all()):
            raise BrokenPlan(f"polish: the weights of layer {layer.name} are not finite")
        stored_S = mend_lost(stored_S, stored_S == 0)
        keep_OI = self.keep[layer.name]
        return spread_kept(stored_S.to(keep_OI.device), keep_OI)


def count_state_bytes(item: int, means: Means) -> int:
    """Bytes that a polish keeps of each survivor, of a model with so many a weight: itself in fp32, two means, and the
    best so far."""
    return 4 + 2 * MEAN_BYTES[means] + item


def place_state(wanted: Sequence[tuple[int, float]], free: float) -> Place:
    """Where what is kept fits: with the weights, else in CPU memory, where `free` bytes are free, else there with means
    in bf16.

    `wanted` are, for each device with weights, the bytes that is kept of theirs with means in fp32, and those free on
    it.
    """
    if all(size <= STATE_SHARE * there for size, there in wanted):
        return Place(away=False, means="fp32")
    fits = sum(size for size, _ in wanted) <= STATE_SHARE * free
    return Place(away=True, means="fp32" if fits else "bf16")


def _count_free_on(device: torch.device, free: int) -> int:
    """Bytes free on a device with weights, where so many are in CPU memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free


KL = "kl"
"""The name of a sum: KL(dense || model) over the text's tokens, nats, fp64. All others are layers'."""


class Divergence:
    """KL(dense || model) on windows of a text, for whatever weights are in the model."""

    def __init__(
        self,
        blocks: Blocks,
        survivors: Survivors,
        windows_BT: Tensor,
        dense_hidden: Mapping[int, Tensor],
        lead: int = 0,
        shares: Mapping[int, float] | None = None,
    ) -> None:
        """`dense_hidden` is what the dense model's head reads of the windows, (T, D), by their numbers. The first
        `lead` tokens of each window are no text: what is predicted there counts in no loss. `shares` are what windows
        count, by their numbers, with a mean of 1 over all that train; without them all count alike.
        """
        self._blocks, self._survivors, self._lead = blocks, survivors, lead
        self._windows_BT, self._dense_hidden, self._shares = windows_BT, dense_hidden, shares or {}
        self._uses = find_uses(blocks, survivors.layers)
        self._lowest = next(block for block, uses in enumerate(self._uses) if uses)
        self._scaled = blocks.model.dtype == torch.float16

    def count_tokens(self, windows: Sequence[int]) -> int:
        """Tokens whose KL counts."""
        return len(windows) * (self._windows_BT.shape[1] - self._lead)

    def measure(self, windows: Sequence[int]) -> float:
        """The mean KL, nats per token, in which windows have their shares."""
        return self.average(windows, list(map(self.measure_window, windows)))

    def average(self, windows: Sequence[int], sums: Sequence[float]) -> float:
        """The mean of what `measure_window` gave of each of the windows."""
        if not self._shares:
            return sum(sums) / self.count_tokens(windows)
        shares = [self._shares[window] for window in windows]
        weighed = sum(share * kl for share, kl in zip(shares, sums, strict=True))
        return weighed * len(windows) / sum(shares) / self.count_tokens(windows)

    def measure_window(self, window: int) -> float:
        """The KL of a window's tokens, nats, whatever its share."""
        heed_stop()
        ids_T = self._windows_BT[window].to(self._blocks.model.device)
        with run_apart(layer.module for layer in self._survivors.layers):
            losses, _ = measure_losses(self._blocks.model, ids_T, self._dense_hidden[window], lead=self._lead)
        return losses.kl

    def differentiate(self, windows: Sequence[int]) -> Sums:
        """Sums over the windows' tokens, by their shares: `KL`, and by layer the gradient of that by its survivors,
        (S,), fp32.

        Those of a fixed tree over the windows, whoever makes which. An expert that no token was sent to has none.
        """
        [(_, sums)] = self.sum_nodes(windows, (0, len(windows)))
        return sums

    def sum_nodes(self, windows: Sequence[int], span: Span) -> Nodes:
        """The nodes of that tree which a span of the windows makes up."""

        def leaf(place: int) -> Sums:
            return self._differentiate(windows[place])

        return [(node, sum_node(node, leaf)) for node in list_nodes((0, len(windows)), span)]

    def _differentiate(self, window: int) -> Sums:
        heed_stop()
        model, last, share = self._blocks.model, len(self._blocks) - 1, self._shares.get(window, 1.0)
        ids_T, sums = self._windows_BT[window].to(model.device), Sums()
        pairs: list[tuple[str, Tensor, Tensor]] = []
        with run_apart(layer.module for layer in self._survivors.layers):
            with torch.no_grad(), self._blocks.only(0, last, ids_T) as entered:
                compute_hidden(model, ids_T[None])
            for block in reversed(range(self._lowest, last + 1)):
                x_BTD = entered.pop(block).detach().requires_grad_()
                with torch.enable_grad(), tapped(self._uses[block], _ignore, lambda *pair: pairs.append(_name(*pair))):
                    output = self._blocks.run_to_head(ids_T, block, x_BTD)
                    if block == last:
                        sums[KL], above = self._begin(output.detach()[0], window)
                        sums[KL] = sums[KL] * share
                    above = flow_back(output, x_BTD, above, pairs.clear, scaled=self._scaled)
                for name, x_TI, g_TO in pairs:
                    self._add(sums, name, x_TI, g_TO, above.scale / share)
                pairs.clear()
                above = bring_near(above, scaled=self._scaled)
        return sums

    def _begin(self, hidden_TD: Tensor, window: int) -> tuple[Tensor, Gradient]:
        """(the window's KL, its gradient at what the head reads)."""
        scale = scale_losses(len(hidden_TD) - self._lead)[0] if self._scaled else 1.0
        dense_TD = self._dense_hidden[window]
        kl, gradient_TD = diverge_gradients(self._blocks.model, hidden_TD, dense_TD, lead=self._lead, scale=scale)
        return kl, Gradient(gradient_TD[None], scale)

    def _add(self, sums: Sums, name: str, x_TI: Tensor, g_TO: Tensor, scale: float) -> None:
        """Products of bf16 come out as bf16, as any backward's do; they are summed in fp32."""
        if self._scaled:
            x_TI, g_TO = x_TI.float(), g_TO.float()
        gradient_S = self._survivors.gather(name, g_TO.T @ x_TI).float()
        if scale != 1:
            gradient_S /= scale
        sums[name] = sums[name].add_(gradient_S) if name in sums else gradient_S


def find_uses(blocks: Blocks, layers: Sequence[Layer]) -> list[list[Layer]]:
    """For each block, the layers as it runs them; one whose weight is tied stands in every module that has it."""
    experts = [layer for layer in layers if isinstance(layer.module, ExpertLinear)]
    tied = {id(layer.parameter): layer for layer in layers if not isinstance(layer.module, ExpertLinear)}
    uses: list[list[Layer]] = []
    for block, module in enumerate(blocks.modules):
        found = [(part, tied.get(id(part._parameters.get("weight")))) for part in module.modules()]
        own = [replace(layer, block=block, module=part) for part, layer in found if layer is not None]
        uses.append([*own, *(layer for layer in experts if layer.block == block)])
    return uses


def _ignore(_layer: Layer, _x_TI: Tensor) -> None:
    """What layers read comes with what flows back to them."""


def _name(layer: Layer, x_TI: Tensor, g_TO: Tensor) -> tuple[str, Tensor, Tensor]:
    return layer.name, x_TI, g_TO
