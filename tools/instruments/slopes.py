"""What a point of sparsity more costs each group of layers, measured in the pruned model, for all groups at once."""

from tools.base.errors import ImpossiblePlan
from tools.instruments.comparisons import Figures, round_figure
from tools.instruments.functions import Round, count_windows
from tools.plans.layer_profile import group_layers
from tools.results.losses import Evaluation, compare_kl
from tools.workbench.slopes import STEP, Moved, move_groups
from tools.workbench.store import DENSE

MAX_SLOPES = 64
"""Groups whose slopes one call measures."""


def measure_slopes(round_: Round, tokens: int | None = None) -> Figures:
    """KL slopes of every group of layers (kind x third of depth) in the last accepted weights, dearest first.

    Each group in turn has `STEP` more of its weights zero, those of least score, without a refit, which makes slopes
    steeper than a round's would be, but compares them. Nats per token and point of sparsity, paired with the weights as
    they are on the same windows, with standard errors; also per point of the whole model's sparsity, at which the best
    allocation has the same slope in all groups. Each group on `tokens` tokens of the validation text, rounded up to
    windows, or on half of its windows; the same weights on as many are paid for once. Raises ImpossiblePlan where
    nothing is pruned or a pattern leaves no room, and ValueError where there are not the tokens or seconds.
    """
    bench, layers = round_.bench, round_.bench.read_profile(round_.profile).layers
    if round_.present == DENSE:
        raise ImpossiblePlan("nothing is pruned yet, and slopes are those of the last accepted weights")
    bench.pruner.refuse_move(round_.present)
    windows = count_windows(bench, tokens, whole=False)
    pruned = {name for name, record in bench.read_checkpoint(round_.present).items() if record.artifact != DENSE}
    groups = {name: [x.name for x in group] for name, group in group_layers(layers, merge=True).items()}
    groups = {name: group for name, group in groups.items() if not pruned.isdisjoint(group)}
    groups = dict(sorted(groups.items(), key=lambda group: -len(group[1]))[:MAX_SLOPES])
    cost = {f"slopes of {round_.present[:16]} on {windows}": len(groups) * windows * bench.settings.window}
    round_.admit([], 0, round_.count_new(cost))
    round_.spend("measuring slopes", cost)
    moved = move_groups(bench, round_.profile, round_.present, groups, windows, round_.progress)
    before = bench.evaluate(round_.present, "validation", round_.profile, round_.progress)
    now = dict(zip(bench.by_name, bench.sparsities(), strict=True))
    weights = {name: bench.dense[name].numel() for name in now}
    rows = {}
    for group, found in moved.items():
        size = sum(weights[name] for name in groups[group])
        share, sparsity = size / sum(weights.values()), sum(now[x] * weights[x] for x in groups[group]) / size
        rows[group] = [share, sparsity, *_find_slope(round_, found, before, 100 * found.added / size, share)]
    rows = dict(sorted(rows.items(), key=lambda row: -(row[1][4] or 0)))
    return {
        "tokens": windows * bench.settings.window,
        "step": STEP,
        "columns": "group: share of all weights, sparsity now, KL per point of the group, error, KL per point of the "
        "whole model, error",
        "groups": {group: [round_figure(figure) for figure in row] for group, row in rows.items()},
    }


def _find_slope(round_: Round, found: Moved, before: Evaluation, points: float, share: float) -> list[float | None]:
    """Slope and error by a group's own points and by those of the model; None where a loss is not finite."""
    if not (found.losses.finite and before.finite):
        return [None] * 4
    change, error = compare_kl(found.losses, round_.bench.losses.take_part(before, len(found.losses.kl)))
    return [change / points, error / points, change / points / share, error / points / share]
