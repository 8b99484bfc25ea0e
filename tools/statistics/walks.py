"""The calibration text on its way up through the blocks, and its gradients on their way down, shard by shard.

At no time is more held of a walk than what one block reads (in CPU memory), what a block needs on the way down, and, on
disk, what every block read of the gradient windows.

Shape suffixes: B windows, T tokens, I input features (d_in), O output features (d_out), D hidden width.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from billhook_kernels.statistics import mean_absolute_gradient
from tools.base.errors import UnknownStatistics
from tools.base.progress import heed_stop
from tools.base.settings import Calibration
from tools.models.blocks import Blocks
from tools.models.experts import run_apart
from tools.models.layers import Layer
from tools.models.readout import begin_draw, hidden_gradients
from tools.models.streamed import find_stream
from tools.models.unfinished import hold_states
from tools.statistics.gradients import (
    OVERFLOW,
    Gradient,
    Pair,
    Seen,
    add_curve,
    bring_near,
    flow_back,
    scale_losses,
    sum_gradients,
    tapped,
)
from tools.statistics.moments import MomentSums, Spare, Waiting, Wanted
from tools.statistics.passage import KeptPassages, Passage, Passages, Purpose, Walk
from tools.statistics.shards import Aside, Span, Sums, cut_shards, forget, list_nodes, sum_node
from tools.statistics.table import parts_of_mask

Nodes = list[tuple[Span, Sums]]
"""What a span of shards comes to, as few nodes of the tree over all shards."""


class Walks:
    """Walks, each of which holds what it has come to until it is finished.

    Answers depend on the weights in the model and on what is asked, never on what was asked before: whoever takes over
    a span in the middle of a walk finds the way to that block by himself.
    """

    def __init__(
        self,
        blocks: Blocks,
        layers: Sequence[Layer],
        windows_BT: Tensor,
        gradient_windows: int,
        seed: int,
        scratch: Path,
        ahead: int = 0,
        mixed: Mapping[Calibration, Tensor] | None = None,
        lead: int = 0,
        kept: KeptPassages | None = None,
    ) -> None:
        """`windows_BT`, the run's own text, lies on the model's device; in the directory `scratch` lie files without a
        name. The texts `mixed` are it and others, as many windows of each, one behind the other.

        `ahead` is for how many requests others may be made before curves of a block are asked for. The first `lead`
        tokens of each window are no text: no label is drawn there, and no loss begins. How far a walk has come is
        `kept` until it is finished.
        """
        self.blocks, self.windows_BT, self.seed, self.scratch = blocks, windows_BT, seed, scratch
        self.gradient_windows, self.ahead, self.lead = gradient_windows, ahead, lead  # of each text
        self.grouped = layers_by_block(layers, len(blocks))
        self._scaled = blocks.model.dtype == torch.float16
        self._away = find_stream(blocks.model) is not None
        """Of a streamed model: what flowed back through a block lies in CPU memory, one layer's at a time on the
        device, and sums of second moments that wait for others lie on disk."""
        self._pooled = {layer.name for layer in layers if layer.pool}
        self.shards = cut_shards(len(windows_BT))
        self._texts: dict[Calibration, Tensor] = {"run": windows_BT, **(mixed or {})}
        self._walk: Walk | None = None
        self._ways = Passages(blocks.model, scratch, kept)

    def moments(
        self,
        span: Span,
        walk: Walk,
        block: int,
        full: bool,
        purpose: Purpose,
    ) -> tuple[Nodes, dict[str, str]]:
        """(what a block's layers read, summed over tokens; the first layer of each that read the same tensor).

        `A/LAYER` is the sum of x x^T of each group's first layer, or, not `full`, `a/LAYER` that of x^2: all that masks
        without an update need, at a fraction of the products. `n/LAYER` is how many tokens an expert's sum is over.
        """
        way = self._reach(span, walk, block, purpose == "profile")
        group: dict[str, str] = {}
        self._put_down(way, span)
        wanted, layers = Wanted(full, group), self.grouped[block]
        aside = partial(Waiting, scratch=self.scratch) if self._away else None
        passes, spare = purpose != "pruning", Spare()

        def leaf(shard: int) -> Sums:
            return self._sum_moments(way, block, shard, layers, MomentSums(wanted, spare), passes)

        nodes = self._sum(span, leaf, aside, spare.give)
        if passes:
            way.up = block + 1
        return nodes, group

    def gradients(self, span: Span, walk: Walk, block: int) -> Nodes:
        """What flows back through a block's layers, summed over the tokens of the gradient windows.

        `plain/LAYER` and `clipped/LAYER` are the sums of g^2; `language/LAYER` is the sum over windows of the mean
        |dL/dW|; `n/LAYER` is how many tokens an expert's sums are over.
        """
        seen = self._descend(span, walk, block, language=True)
        device = self.blocks.model.device if self._away else None
        return self._sum(span, lambda shard: sum_gradients(seen, shard, self._pooled, device))

    def mask_curves(self, span: Span, walk: Walk, block: int, known: Mapping[str, Sequence[Tensor]]) -> Nodes:
        """As `curves`, of what the two-sided mask removes.

        `known` is, for each layer, its dense weight where it is not the one in the model (else an empty tensor), a and
        gamma.
        """
        parts: dict[str, Iterable[Tensor]] = {}
        for layer in self.grouped[block]:
            weight_OI, mean_square_I, gamma_O = (tensor.to(layer.device) for tensor in known[layer.name])
            weight_OI = weight_OI if weight_OI.numel() else layer.weight_OI.to(layer.device)
            parts[layer.name] = parts_of_mask(weight_OI, mean_square_I, gamma_O)
        return self._sum_curves(self._descend(span, walk, block, language=True), span, block, parts)

    def curves(self, span: Span, walk: Walk, block: int, parts: Mapping[str, Iterable[Tensor]]) -> Nodes:
        """`curve/LAYER` is sum_t (g_t^T dW x_t)^2 at each level (levels,), fp64; `parts` is what each adds to dW."""
        return self._sum_curves(self._descend(span, walk, block, language=False), span, block, parts)

    def finish(self, walk: Walk, *, whole: bool = True) -> None:
        """Let go of what is held of a walk, of whatever spans: another worker may have taken one over.

        What is kept of one that is not `whole` stays.
        """
        self._ways.finish(walk, whole=whole)

    # --- up ----------------------------------------------------------------------------------------------------

    def _reach(self, span: Span, walk: Walk, block: int, returns: bool) -> Passage:
        """The way of a span, standing before `block`."""
        self._turn_to(walk)
        way = self._ways.get(span, walk)
        if way is None or way.up > block:
            windows = [w for shard in range(*span) for w in self._list_windows(shard)]
            way = self._begin(span, walk, windows, block, returns)
        self._rise(span, walk, way, block)
        return way

    def _rise(self, span: Span, walk: Walk, way: Passage, block: int) -> None:
        """Have all windows pass the blocks below `block`."""
        self._ways.keep(span, walk, way)
        while way.up < block:
            self._put_down(way, span)
            for window in way.states:
                self._step(way, way.up, window)
            way.up += 1
            self._ways.keep(span, walk, way)

    def _turn_to(self, walk: Walk) -> None:
        if walk != self._walk:
            self._walk = walk
            self.windows_BT = self._texts[walk.text].to(self.windows_BT.device)
            self.shards = cut_shards(len(self._texts["run"]), len(self.windows_BT) // len(self._texts["run"]))
            if self._ways.keeps:
                tokens = hashlib.sha256(self.windows_BT.cpu().numpy().tobytes()).hexdigest()
                self._ways.source = [tokens, f"{self.seed} {self.gradient_windows} {self.lead}"]

    def _begin(self, span: Span, walk: Walk, windows: Sequence[int], block: int, returns: bool) -> Passage:
        """The way of windows where it was kept, if that is no later than before `block`, else before the first."""
        if kept := self._ways.find_up(span, walk, windows, block, returns):
            return kept
        states = hold_states(self.blocks.model, windows, lambda window: self.blocks.embed(self.windows_BT[window]))
        return self._ways.begin(span, walk, states, returns)

    def _put_down(self, way: Passage, span: Span) -> None:
        """Keep what the next block reads of the gradient windows."""
        if way.inputs is not None and way.inputs.height == way.up:
            way.inputs.push([way.states[window] for window in self._gradient_windows(span)])

    def _gradient_windows(self, span: Span) -> list[int]:
        return [window for shard in range(*span) for window in self._flowing(shard)]

    def _flowing(self, shard: int) -> list[int]:
        """The windows of a shard that gradients flow back through."""
        windows, walk = len(self.windows_BT), self._walk
        assert walk is not None, "a walk was begun"
        return [w for w in self._list_windows(shard) if walk.flows(w, windows, self.gradient_windows)]

    def _list_windows(self, shard: int) -> list[int]:
        """The windows of a shard that are walked."""
        return [window for window in self.shards[shard] if self._find_share(window)]

    def _mark(self, window: int) -> str:
        return self._walk.mark(window, len(self.windows_BT)) if self._walk else ""

    def _find_share(self, window: int) -> float:
        return self._walk.find_share(window, len(self.windows_BT)) if self._walk else 1.0

    def _step(self, way: Passage, block: int, window: int) -> None:
        way.states[window] = self._run(way, block, window).cpu()

    @torch.no_grad()
    def _run(self, way: Passage, block: int, window: int) -> Tensor:
        heed_stop()
        with self._run_apart(block):
            return self.blocks.run(self.windows_BT[window], block, way.states[window])

    def _run_apart(self, block: int) -> AbstractContextManager[None]:
        """Fused experts run one by one on every walk, seen or not: whoever takes over a span finds the same states."""
        return run_apart(layer.module for layer in self.grouped[block])

    def _sum_moments(
        self, way: Passage, block: int, shard: int, layers: Sequence[Layer], taken: MomentSums, passes: bool
    ) -> Sums:
        """Of a shard whose windows then stand behind the block, where it `passes` that."""
        with tapped(layers, taken.see):
            for window in self._list_windows(shard):
                taken.share = self._find_share(window)
                if passes:
                    self._step(way, block, window)
                else:
                    self._run(way, block, window)
        return taken.sums

    # --- down --------------------------------------------------------------------------------------------------

    def _descend(self, span: Span, walk: Walk, block: int, *, language: bool) -> Seen:
        """What flows back through a block. Each block runs forward once more, so that only its own graph is held."""
        self._turn_to(walk)
        way = self._ways.get(span, walk)
        if way is None or not self._leads_to(way, block):
            way = self._ways.find_down(span, walk, block, 1 + language) or self._climb(span, walk)
        if way.down is None:
            way.states, way.down = {}, len(self.blocks) - 1  # the way down needs the gradient windows only
        while block not in way.seen:
            self._ways.keep(span, walk, way)
            for passed in sorted(way.seen)[self.ahead :]:
                del way.seen[passed]
            way.seen[way.down] = self._step_down(way, way.down, span, language)
            way.down -= 1
        return way.seen[block]

    def _leads_to(self, way: Passage, block: int) -> bool:
        if way.down is None:
            return way.inputs is not None and way.inputs.height == len(self.blocks)
        return block in way.seen or block <= way.down

    def _climb(self, span: Span, walk: Walk) -> Passage:
        """Walk up with the gradient windows alone."""
        last = len(self.blocks) - 1
        way = self._begin(span, walk, self._gradient_windows(span), last, True)
        self._rise(span, walk, way, last)
        self._put_down(way, span)
        way.up += 1
        return way

    def _step_down(self, way: Passage, block: int, span: Span, language: bool) -> Seen:
        """Back-propagate through a block the loss of labels drawn from the model and, with `language`, the text's.

        Raises UnknownStatistics when fp16 cannot hold what flows back.
        """
        layers, last, shards = self.grouped[block], block == len(self.blocks) - 1, range(*span)
        seen = Seen(
            {shard: {layer.name: [] for layer in layers} for shard in shards},
            {shard: {} for shard in shards},
        )
        assert way.inputs is not None
        entered = iter(way.inputs.pop())
        pairs: list[tuple[str, Tensor, Tensor]] = []
        means: list[tuple[str, float]] = []
        fisher = True

        def on_gradient(layer: Layer, x_TI: Tensor, g_TO: Tensor) -> None:
            if fisher:
                pairs.append((layer.name, x_TI, g_TO))
            else:
                means.append((layer.name, mean_absolute_gradient(g_TO, x_TI)))

        for shard in shards:
            for window in self._flowing(shard):
                heed_stop()
                ids_T = self.windows_BT[window]
                x_BTD = next(entered).requires_grad_()
                with self._run_apart(block), tapped(layers, lambda layer, x: None, on_gradient):
                    output = self.blocks.run_to_head(ids_T, block, x_BTD)
                    if last:
                        way.above[window] = self._begin_gradients(ids_T, output[0], window)
                    above, fisher = way.above[window], True
                    drawn = flow_back(output, x_BTD, above[0], pairs.clear, scaled=self._scaled, again=language)
                    below = [drawn]
                    if language:
                        fisher = False
                        below.append(flow_back(output, x_BTD, above[1], means.clear, scaled=self._scaled))
                for name, x_TI, g_TO in pairs:
                    pair = Pair(x_TI, g_TO, drawn.scale, self._mark(window))
                    seen.pairs[shard][name].append(pair.move("cpu") if self._away else pair)
                for name, mean in means:
                    key = self._mark(window) + name
                    seen.language[shard][key] = seen.language[shard].get(key, 0.0) + mean / below[1].scale
                pairs.clear()
                means.clear()
                way.above[window] = tuple(bring_near(gradient, scaled=self._scaled) for gradient in below)
        return seen

    def _begin_gradients(self, ids_T: Tensor, hidden_TD: Tensor, window: int) -> tuple[Gradient, Gradient]:
        if self._scaled and not hidden_TD.isfinite().all():
            raise UnknownStatistics(f"what the model makes of the calibration text {OVERFLOW}")
        generator = begin_draw(hidden_TD.device, self.seed, window)
        scales = scale_losses(len(ids_T) - self.lead) if self._scaled else (1.0, 1.0)
        drawn_TD, text_TD = hidden_gradients(
            self.blocks.model, ids_T, hidden_TD, generator, lead=self.lead, scales=scales
        )
        return Gradient(drawn_TD[None], scales[0]), Gradient(text_TD[None], scales[1])

    def _sum_curves(self, seen: Seen, span: Span, block: int, parts: Mapping[str, Iterable[Tensor]]) -> Nodes:
        leaves: dict[int, Sums] = {shard: {} for shard in range(*span)}
        for layer in self.grouped[block]:  # layer by layer, so that the parts and pairs of one only are held
            heed_stop()
            add_curve(layer, {shard: seen.pairs[shard][layer.name] for shard in leaves}, parts[layer.name], leaves)
        return self._sum(span, leaves.__getitem__)

    def _sum(
        self,
        span: Span,
        leaf: Callable[[int], Sums],
        aside: Callable[[Sums], Aside] | None = None,
        give: Callable[[Tensor], None] = forget,
    ) -> Nodes:
        return [(node, sum_node(node, leaf, aside, give)) for node in list_nodes((0, len(self.shards)), span)]


def layers_by_block(layers: Iterable[Layer], count: int) -> list[list[Layer]]:
    """The layers of each of `count` blocks."""
    grouped: list[list[Layer]] = [[] for _ in range(count)]
    for layer in layers:
        grouped[layer.block].append(layer)
    return grouped
