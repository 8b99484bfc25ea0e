"""Work orders tried out: carried out, measured on some of the validation text, and undone."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tools.base.errors import BrokenPlan, ImpossiblePlan
from tools.plans.work_order import WorkOrder
from tools.results.losses import Evaluation

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench
    from tools.workbench.unfinished import StoredProfile


class Probe(NamedTuple):
    """An order that was tried out."""

    checkpoint: str
    sparsity: float
    losses: Evaluation
    """On a part of the validation text (`Losses.list_part`)."""


def find_best(probes: Iterable[Probe | None]) -> Probe | None:
    """The one of least KL among those of the greatest sparsity; None where there is none."""
    return min(filter(None, probes), key=rank_probe, default=None)


def rank_probe(probe: Probe) -> tuple[float, float]:
    """Less is better: the greatest sparsity, and of these the least KL."""
    kl = probe.losses.mean_kl
    return -round(probe.sparsity, 3), math.inf if kl is None else kl


def probe_orders(
    bench: "Workbench",
    profile: str,
    orders: Sequence[WorkOrder],
    windows: int,
    progress: "Progress",
    *,
    back: str,
    keep: Sequence[str] = (),
    best: Probe | None = None,
) -> list[Probe | str]:
    """Prune by each order as `prune` would, measure it on so many windows of the validation text (`Losses.list_part`),
    and put the weights of the checkpoint `back` back, bit for bit. In place of losses: why one cannot be carried out.

    They are measured at once, no more of them than can be (`Crew.abreast`); each once, then read back. Layers on
    disk are deleted, so that many probes take no more room than those that are measured at once; but for those of
    `back`, of the checkpoints to `keep`, of the best probe of these and the `best` so far, and of these themselves.
    """
    part = bench.losses.list_part("validation", windows)
    keys = [_name_probe(bench.profiles.read(profile), order, part) for order in orders]
    found: dict[int, Probe | str] = {}
    for number, key in enumerate(keys):
        if (known := bench.index.read_measured(key)) is not None:
            found[number] = Probe(known["checkpoint"], orders[number].sparsity, Evaluation.model_validate(known))
    missing = [number for number in range(len(orders)) if number not in found]
    if not missing:
        return [found[number] for number in range(len(orders))]
    batch = dict[int, str]()
    try:
        for number in missing:
            try:
                batch[number] = bench.pruner.prune(profile, orders[number], progress)
            except ImpossiblePlan as error:
                found[number] = str(error)
        evaluations = bench.evaluator.evaluate_each(list(batch.values()), windows, profile, progress, "probe")
        tried = [
            Probe(checkpoint, orders[number].sparsity, losses)
            for (number, checkpoint), losses in zip(batch.items(), evaluations, strict=True)
        ]
        best = find_best([best, *tried])
        bench.pruner.forget([back, *keep, *([best.checkpoint] if best else []), *batch.values()])
    except BrokenPlan as error:
        return [found.get(number, str(error)) for number in range(len(orders))]
    finally:
        bench.pruner.restore(back)
    for number, probe in zip(batch, tried, strict=True):
        bench.index.keep_measured(keys[number], probe.losses.model_dump() | {"checkpoint": probe.checkpoint})
        found[number] = probe
    return [found[number] for number in range(len(orders))]


def _name_probe(profile: "StoredProfile", order: WorkOrder, part: Sequence[int]) -> list[str]:
    """What the losses of an order depend on: its layers, by the statistics that they are pruned by, and the text."""
    recipes = {name: layer.recipe.model_dump_json() for name, layer in order.layers.items()}
    shared = set(recipes.values())
    recipe = shared.pop() if len(shared) == 1 else json.dumps(recipes)
    polish = [f"polished on {order.polish}"] if order.polish else []
    cut = [order.cut.model_dump_json()] if order.cut else []
    return ["probe", profile.means, profile.hidden, recipe, json.dumps(order.zeros), str(part), *polish, *cut]
