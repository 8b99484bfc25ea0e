"""What a little more sparsity costs each group of layers in a pruned model: measured there."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tools.results.losses import Evaluation
from tools.workbench.store import DENSE

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench

STEP = 0.02
"""Share of each layer's weights that become zero beside those that are: two points of sparsity."""


class Moved(NamedTuple):
    """A group of layers with so many more weights zero."""

    added: int
    losses: Evaluation
    """On a part of the validation text (`Losses.list_part`)."""


def move_groups(
    bench: "Workbench",
    profile: str,
    checkpoint: str,
    groups: Mapping[str, Sequence[str]],
    windows: int,
    progress: "Progress",
) -> dict[str, Moved]:
    """Move one group of a checkpoint's layers after another by `STEP`, without a refit (`Pruner.move`), and measure
    each on so many windows of the validation text (`Losses.list_part`).

    As many at once as can be, each once, then read back. Layers that have their dense weights, as protected ones do,
    and those that have no room stay; a group of none but such is left out. What was made for it is deleted, and the
    weights of `checkpoint` are in the model before and after, bit for bit.
    """
    bench.restore(checkpoint)
    present = bench.weights.count_each()
    movable = {name for name, record in bench.read_checkpoint(checkpoint).items() if record.artifact != DENSE}
    zeros = {
        group: _count_more(bench, [name for name in names if name in movable], present)
        for group, names in groups.items()
    }
    keys = {group: _name_move(bench, profile, checkpoint, more, windows) for group, more in zeros.items() if more}
    known = {group: bench.index.read_measured(key) for group, key in keys.items()}
    found = {group: Evaluation.model_validate(value) for group, value in known.items() if value is not None}
    missing = [group for group in keys if group not in found]
    for first in range(0, len(missing), bench.abreast):
        batch = missing[first : first + bench.abreast]
        with bench.move_layers(checkpoint, [zeros[group] for group in batch]) as made:
            measured = bench.evaluate_each(made, windows, profile, progress, f"slopes {first + 1} of {len(missing)}")
        for group, losses in zip(batch, measured, strict=True):
            bench.index.keep_measured(keys[group], losses.model_dump())
            found[group] = losses
    added = {group: sum(count - present[name] for name, count in more.items()) for group, more in zeros.items()}
    return {group: Moved(added[group], found[group]) for group in keys}


def _count_more(bench: "Workbench", names: Sequence[str], present: Mapping[str, int]) -> dict[str, int]:
    """How many zeros each layer would have, of those that have room."""
    more = {}
    for name in names:
        weights = bench.dense[name].numel()
        count = min(present[name] + round(STEP * weights), weights)
        if count > present[name]:
            more[name] = count
    return more


def _name_move(bench: "Workbench", profile: str, checkpoint: str, zeros: Mapping[str, int], windows: int) -> list[str]:
    """What the losses hang on."""
    moved = [f"{name} {count}" for name, count in zeros.items()]
    part = bench.losses.list_part("validation", windows)
    return ["slopes", bench.read_profile(profile).hidden, checkpoint, str(part), *moved]
