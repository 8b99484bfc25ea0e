"""Cuts of the loaded model, in its own shapes: what goes is zero, so that a cut is kept and undone as zeros are.

A unit whose weights are zero adds nothing, nor does a block whose weights are. The smaller model is built of the same
weights once one is kept.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from billhook_kernels.channels import expand_units
from tools.base.errors import BrokenBaseline, BrokenPlan, UnknownStatistics, UserError, explain_layer, explain_work
from tools.base.progress import Progress
from tools.models.artifacts import FORMAT, pack_pruned
from tools.models.blocks import Blocks
from tools.models.layers import Layer
from tools.models.unfinished import UNFINISHED
from tools.plans.cuts import Counts, CutOrder, Parts, Shape, Target, find_most, list_by_blocks
from tools.surgery.blocks import Drop, drop_blocks, pass_on_without_weights
from tools.surgery.curves import Curves, measure_curves
from tools.surgery.parts import KINDS, Cut, Fit, Kind, Part, find_parts
from tools.surgery.rebuild import build_cut, check_cut
from tools.surgery.share import make_fits
from tools.texts.windows import Windows
from tools.workbench.kept_cuts import CurveFiles, FitFiles, list_curves, list_orders, read_curves
from tools.workbench.store import DENSE, ArtifactStore, Index
from tools.workbench.weights import Weights

Made = dict[str, str]
"""Artifacts, by layer name."""


class Cuts:
    """What of the loaded model can go, what that costs, and the weights without it."""

    def __init__(
        self,
        model: Any,
        windows: Windows,
        shares: Mapping[str, float],
        weights: Weights,
        store: ArtifactStore,
        index: Index,
        directory: Path,
        seed: int,
    ) -> None:
        """`shares` are what each named text counts: of each so many windows are read, in proportion. What is kept of
        walks that may be killed lies within `directory`; `seed` draws the labels of the curves."""
        self._seed = seed
        self._unfinished = directory / UNFINISHED
        self._model, self._windows, self._weights, self._store, self._index = model, windows, weights, store, index
        self._read = windows.list_in_proportion(shares)

    # --- what can go --------------------------------------------------------------------------------------------

    @explain_work("measuring the model's parts", BrokenBaseline)
    def measure(self, profile: str, target: Target, progress: Progress) -> str:
        """The artifact of what is known of the parts (`Parts`), for cuts of up to the target.

        The weights in the model are the dense ones. What was measured for the same profile is read back. Raises
        UserError where whole blocks must go, and a block of zeros is not the same as none.
        """
        key = self._name("parts", profile, target.model_dump())
        if known := self._index.read(".json").get(key):
            return known
        self._weights.restore_dense()
        shape, every = target.shape, list_by_blocks(target.shape, target.share)
        if not pass_on_without_weights(Blocks(self._model), self._text[0]):
            every = every[:1]
            if not any(every):
                raise UserError(
                    f"the target cannot be met: whole blocks must go for it, and of {type(self._model).__name__} none "
                    "can, for the model without one is another than with one of zeros; ask for less"
                )
        most = find_most(every)
        curves = self._measure_curves(most, progress)
        drops = list(takewhile(lambda drop: math.isfinite(drop.kl), self._search(most.blocks, progress)))
        parts = Parts(
            shape=shape,
            target=target.share,
            artifact=self._store.write_tensors(list_orders(curves)),
            **{kind: _list_costs(curves, kind, getattr(shape, kind).options) for kind in KINDS},
            order=[drop.block for drop in drops],
            dropped_kl=[drop.kl for drop in drops],
            **{f"{kind.removesuffix('s')}_layers": self._list_layers(kind, shape) for kind in KINDS},
        )
        made = self._store.write_json(parts.model_dump())
        self._index.add(key, made)
        return made

    def _measure_curves(self, most: Counts, progress: Progress) -> Curves:
        """As `tools.surgery.curves.measure_curves`; where the work was interrupted it goes on."""
        key = self._name("curves of units", self._weights.hash_all_dense(), most.heads, most.neurons, self._seed)

        kept = CurveFiles(self._unfinished / f"curves-{key[:16]}")

        def measure() -> dict[str, str]:
            lead, seed = self._windows.lead, self._seed
            curves = measure_curves(self._model, most, self._text, progress, lead=lead, seed=seed, kept=kept)
            return {"curves": self._store.write_tensors(list_curves(curves))}

        made = self._index.measure_files([key], measure)
        kept.forget()
        return read_curves(self._store.read_tensors(made["curves"]))

    def _search(self, count: int, progress: Progress) -> Iterator[Drop]:
        """As many as `tools.surgery.blocks.drop_blocks` finds. Each is kept as it is found, and what it costs to drop a
        block as that is measured: a search that was interrupted, or is to go further, goes on behind it."""
        key = [self._name("blocks that go", self._weights.hash_all_dense())]
        before = self._index.read_measured(key) or {"drops": [], "begun": []}
        known, begun = [_read_drop(values) for values in before["drops"]], _read_costs(before["begun"])
        yield from known[:count]

        def keep() -> None:
            drops = [_write_drop(own) for own in known]
            self._index.replace_measured(key, {"drops": drops, "begun": _write_costs(begun)})

        def remember(block: int, measure: Callable[[], float]) -> float:
            if block not in begun:
                begun[block] = measure()
                keep()
            return begun[block]

        lead = self._windows.lead
        searching = drop_blocks(self._model, self._text, progress, known, lead=lead, remember=remember)
        for drop in islice(searching, max(count - len(known), 0)):
            known.append(drop)
            begun.clear()
            keep()
            yield drop

    def read(self, artifact: str) -> Parts:
        """What `measure` found. Raises DamagedArtifact."""
        return Parts.model_validate(self._store.read_json(artifact))

    def _list_layers(self, kind: Kind, shape: Shape) -> list[list[str]]:
        if kind not in shape.kinds:
            return [[] for _ in range(shape.blocks)]
        return [[layer.name for layer in _list_layers(part)] for part in find_parts(self._model, kind)]

    @property
    def _text(self) -> Tensor:
        return self._windows.calibration[self._read].to(self._model.device)

    def _name(self, what: str, *about: Any) -> str:
        """What tells something that depends on the text from all others."""
        text = hashlib.sha256(self._text.cpu().numpy().tobytes()).hexdigest()
        return hashlib.sha256(json.dumps([what, FORMAT, text, self._windows.lead, *about]).encode()).hexdigest()

    # --- the weights without it -----------------------------------------------------------------------------------

    def make(self, order: CutOrder, progress: Progress) -> tuple[Made, str]:
        """(the artifact of every layer, all of which are in the model; the artifact of which units stay).

        What was made before is read back. Raises BrokenPlan for a layer whose fit has no answer,
        UnknownStatistics where what it reads is not finite, DamagedArtifact.
        """
        key = self._name("cut", order.model_dump())
        known = self._index.read(".json").get(key, "")
        if self._store.has(known, ".json"):
            made: Made
            made, units = self._store.read_json(known)
            if self._store.has(units, ".safetensors") and self._weights.install_all(made):
                return made, units
        name = self._name("fits behind cuts", order.model_dump())
        files = FitFiles(self._unfinished / f"fits-{name[:16]}", self._take_up)
        try:
            made = self._cut(order, files, progress)
        except (BrokenPlan, UnknownStatistics):
            self._index_layers(key, files.made)
            files.forget()  # nobody carries it out again
            raise
        units = self._store.write_tensors(files.units)
        self._index_layers(key, made)
        self._index.add(key, self._store.write_json([made, units]))
        files.forget()
        return made, units

    def _index_layers(self, key: str, made: Made) -> None:
        """So that they are deleted with the others that no checkpoint needs."""
        for name, artifact in made.items():
            if artifact != DENSE:
                self._index.add(f"{key} {name}", artifact)

    def _cut(self, order: CutOrder, kept: FitFiles, progress: Progress) -> Made:
        """Put a cut of the dense weights into the model and on disk, block by block; which units stay is in `kept`."""
        self._weights.restore_dense()
        curves = read_curves(self._store.read_tensors(order.parts))
        fits = make_fits(
            *(self._model, order.counts, curves, order.dropped, self._text, progress), refit=order.refit, kept=kept
        )
        with explain_layer("cutting the model"):
            for fit in fits:
                kept.made |= self._install(fit)
                kept.units[f"{fit.part.kind}/{fit.part.block}"] = fit.units
        made = dict.fromkeys(self._weights.by_name, DENSE) | kept.made
        for block in order.dropped:
            for layer in self._weights.by_block[block]:
                nothing_O = None if layer.bias_O is None else torch.zeros_like(layer.bias_O)
                made[layer.name] = self._keep(layer, torch.zeros_like(layer.weight_OI), nothing_O)
        return made

    def _take_up(self, made: Mapping[str, str]) -> bool:
        """Put what was made before an interruption into the model; where a file is gone the dense weights."""
        if self._weights.install_all(made):
            return True
        self._weights.restore_dense()
        return False

    def _install(self, fit: Fit) -> Made:
        """Put what stays of one part into the model and on disk."""
        part, gone, made = fit.part, len(fit.units) < fit.part.units, Made()
        for layer in part.inputs if gone else ():
            run = layer.weight_OI.shape[0] // part.units
            weight_OI = torch.zeros_like(layer.weight_OI)
            rows = expand_units(fit.units, run).to(weight_OI.device)
            weight_OI[rows] = layer.weight_OI[rows]
            made[layer.name] = self._keep(layer, weight_OI)
        if gone or fit.weight_OK is not None:
            dense_OI = part.output.weight_OI
            weight_OI = torch.zeros_like(dense_OI)
            kept_K = expand_units(fit.units, dense_OI.shape[1] // part.units).to(dense_OI.device)
            stays_OK = dense_OI[:, kept_K] if fit.weight_OK is None else fit.weight_OK.to(dense_OI.device)
            weight_OI[:, kept_K] = stays_OK
            made[part.output.name] = self._keep(part.output, weight_OI, fit.bias_O, values=fit.weight_OK is not None)
        return made

    def _keep(self, layer: Layer, weight_OI: Tensor, bias_O: Tensor | None = None, *, values: bool = False) -> str:
        tensors = pack_pruned(weight_OI, values=values) | ({} if bias_O is None else {"bias": bias_O.cpu()})
        artifact = self._store.write_tensors(tensors)
        self._weights.write(layer.name, weight_OI, artifact, bias_O)
        return artifact

    # --- the smaller model ----------------------------------------------------------------------------------------

    def build(self, order: CutOrder, units: str) -> Any:
        """The smaller model, of the weights that are in this one, which are those that were made by the order.

        `units` is the artifact of which units stay. Raises DamagedArtifact, and UserError where the smaller model
        computes something else, for its architecture orders its parts in a way that is not known here.
        """
        stored = self._store.read_tensors(units)
        fits = [
            Fit(part, stored[f"{kind}/{part.block}"])
            for kind in KINDS
            if getattr(order, kind)
            for part in find_parts(self._model, kind)
            if part.block not in order.dropped
        ]
        cut = Cut(order.counts, fits, order.dropped)
        built = build_cut(self._model, cut)
        check_cut(self._model, cut, built, self._text[0])
        return built


def _list_layers(part: Part) -> list[Layer]:
    return [*part.inputs, part.output]


def _list_costs(curves: Curves, kind: Kind, options: list[int]) -> list[list[float]]:
    """By block: the cost of every number that may go, as far as it was measured; 0 of none."""
    found = []
    for curve in curves.get(kind, []):
        cost = [0.0, *curve.cost_R.tolist()]
        found.append([cost[gone] for gone in options if gone < len(cost)])
    return found


def _write_drop(drop: Drop) -> dict[str, Any]:
    """As JSON has it, which knows nothing infinite."""
    [(block, kl)], costs = _write_costs({drop.block: drop.kl}), _write_costs(drop.costs)
    return {"block": block, "tokens": drop.tokens, "kl": kl, "costs": costs}


def _read_drop(values: dict[str, Any]) -> Drop:
    [(block, kl)] = _read_costs([[values["block"], values["kl"]]]).items()
    return Drop(block, values["tokens"], kl, _read_costs(values["costs"]))


def _write_costs(costs: Mapping[int, float]) -> list[tuple[int, float | None]]:
    return [(block, cost if math.isfinite(cost) else None) for block, cost in costs.items()]


def _read_costs(costs: Iterable[Sequence[Any]]) -> dict[int, float]:
    return {block: math.inf if cost is None else cost for block, cost in costs}
