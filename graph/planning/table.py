"""The layers as a planner is shown them: one by one, or in sums over groups, which tools tell apart."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from graph.llm.quoting import data_block, quote_data
from graph.planning.orders import find_lesson_factors
from graph.planning.situation import Situation
from tools.plans.cuts import Parts
from tools.plans.layer_profile import LEVELS, LayerProfile, group_layers, merge_numbers, predict_kl

MAX_ROWS = 400
"""Rows of the layer table; 10 to 14 tokens each. Larger models are shown as means over neighbours."""
MAX_GROUP_ROWS = 64
"""Rows of the table of groups."""
TOLD_ZEROS = 0.05
"""Share of a layer's weights that are zero in the dense model, from which planners are told of them."""
POINT = 0.01
"""Of sparsity, one in a hundred."""


@dataclass(frozen=True)
class _Row:
    """A layer of the table, or several that it stands for."""

    blocks: str
    kind: str
    layers: list[LayerProfile]


def describe_layers(situation: Situation) -> str:
    """The table of layers: constant through a run, a line each, at most 8,000 tokens."""
    rows = _rows(situation.layers)
    labels = _labels([row.kind for row in rows])
    columns = _columns(situation.config.target_sparsity)
    unit = _unit([fmean(layer.kappa[columns[0]] for layer in row.layers) for row in rows])
    lines = [_describe_kind(kind, label, situation.layers) for kind, label in labels.items()]
    lines += [f"columns: layer, wanda z, grad z, {_name_levels(columns)} (kl in units of {unit:.0e} nats/token)"]
    blocks = None
    for row in rows:
        if row.blocks != blocks:
            blocks = row.blocks
            lines.append(f"block {blocks}")
        lines.append(f"{labels[row.kind]} {_figures(row.layers, columns, unit)}")
    example = quote_data(situation.layers[0].name, 120)
    title = f"The {len(situation.layers)} prunable layers{_describe_merging(rows, len(situation.layers))}:"
    return title + "\n" + data_block("layers", [f"names look like: {example}", *lines])


def _describe_merging(rows: Sequence[_Row], layers: int) -> str:
    if len(rows) == layers:
        return ""
    left_out = layers - sum(len(row.layers) for row in rows)
    return f", shown as {len(rows)} means over neighbours" + (f" ({left_out} not shown)" if left_out else "")


def _describe_kind(kind: str, label: str, layers: Sequence[LayerProfile]) -> str:
    same = [layer for layer in layers if layer.kind == kind or merge_numbers(layer.kind) == kind]
    sizes = sorted({layer.weights for layer in same})
    size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return f"{label} = {quote_data(kind, 80)}: {size} weights{_describe_zeros(same)}"


def _describe_zeros(layers: Sequence[LayerProfile]) -> str:
    zeros = sum(layer.zeros for layer in layers) / sum(layer.weights for layer in layers)
    return f", {zeros:.2g} of them zero already" if zeros >= TOLD_ZEROS else ""


def _rows(layers: Sequence[LayerProfile]) -> list[_Row]:
    """The layers in a fixed order, merged as little as `MAX_ROWS` asks.

    First numbered siblings (experts) become one, then neighbouring blocks.
    """
    rows = _merge(layers, 1, numbers=False)
    if len(rows) <= MAX_ROWS:
        return rows
    span = 1
    rows = _merge(layers, span, numbers=True)
    while len(rows) > MAX_ROWS and span <= max(layer.block for layer in layers):
        span += 1
        rows = _merge(layers, span, numbers=True)
    return rows[:MAX_ROWS]


def _merge(layers: Sequence[LayerProfile], span: int, *, numbers: bool) -> list[_Row]:
    last = max(layer.block for layer in layers)
    groups: dict[tuple[int, str], list[LayerProfile]] = {}
    for layer in layers:
        kind = merge_numbers(layer.kind) if numbers else layer.kind
        groups.setdefault((layer.block // span, kind), []).append(layer)
    return [
        _Row(_range_of_blocks(group * span, min(group * span + span - 1, last)), kind, members)
        for (group, kind), members in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def _range_of_blocks(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def _labels(kinds: Sequence[str]) -> dict[str, str]:
    """A short label for each kind, in order of first appearance: `v` for self_attn.v_proj where that is enough."""
    distinct = list(dict.fromkeys(kinds))
    last = [kind.rsplit(".", 1)[-1].removesuffix("_proj") for kind in distinct]
    return {
        kind: quote_data(kind if last.count(short) > 1 else short, 40)
        for kind, short in zip(distinct, last, strict=True)
    }


def _columns(target: float) -> range:
    """Indices of two of LEVELS: the one nearest to the target and the next above, or the last two."""
    nearest = min(range(len(LEVELS)), key=lambda i: abs(LEVELS[i] - target))
    first = min(nearest, len(LEVELS) - 2)
    return range(first, first + 2)


def _name_levels(columns: Iterable[int]) -> str:
    return " ".join(f"kl{LEVELS[column]:.2f}".replace("0.", ".") for column in columns)


def _unit(values: Sequence[float]) -> float:
    """A power of ten in which the median value has two digits: for many models every digit is a token."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    return 10.0 ** (math.floor(math.log10(median(positive))) - 1) if positive else 1.0


def _figures(layers: Sequence[LayerProfile], columns: Iterable[int], unit: float) -> str:
    scores = [fmean(layer.wanda_z for layer in layers) * 10, fmean(layer.gradient_z for layer in layers) * 10]
    kl = [fmean(layer.kappa[column] for layer in layers) / unit for column in columns]
    return " ".join([*(_rounded(score) for score in scores), *(_two_digits(value) for value in kl)])


def _rounded(value: float) -> str:
    return f"{round(value)}" if math.isfinite(value) else "?"


def _two_digits(value: float) -> str:
    """A number as a whole one of two significant digits: 1234 -> 1200, 5.12 -> 5."""
    if not math.isfinite(value):
        return "?"
    return f"{float(f'{value:.1e}'):.0f}"


# Parts

MOST_COLUMNS = 4
"""Numbers of units that the table of parts has a column for, at most, of each kind."""


def describe_parts(parts: Parts) -> str:
    """What it costs to take parts away: a line for each block, and the order in which whole ones would go."""
    shape, columns = parts.shape, list[tuple[str, list[list[float]], int]]()
    for name, units, cost in (("heads", shape.heads, parts.heads), ("neurons", shape.neurons, parts.neurons)):
        places = range(1, len(cost[0])) if cost else range(0)
        columns += [(f"{name}.{units.options[place]}", cost, place) for place in _spread(places, MOST_COLUMNS)]
    unit = _unit([of_kind[block][place] for _, of_kind, place in columns for block in range(shape.blocks)])
    lines = [f"columns: block, {', '.join(name for name, *_ in columns)} (predicted KL in units of {unit:.0e})"]
    for block in range(shape.blocks):
        lines.append(f"{block} {' '.join(_two_digits(cost[block][place] / unit) for _, cost, place in columns)}")
    order = [f"{block} ({kl:.3g})" for block, kl in zip(parts.order, parts.dropped_kl, strict=True)]
    heads, neurons = shape.heads, shape.neurons
    title = (
        f"{shape.blocks} blocks, each with {heads.units} groups of heads ({heads.cost / shape.block_cost:.3%} of "
        f"the blocks' weights go with one of each block) and {neurons.units} neurons "
        f"({neurons.cost / shape.block_cost:.4%}); of heads {', '.join(map(str, heads.options))} may go"
    )
    return (
        f"{title}:\n{data_block('parts', lines)}\n"
        f"Whole blocks in the order in which they go (KL without all up to it): {', '.join(order) or 'none'}."
    )


def _spread(places: Sequence[int], most: int) -> list[int]:
    """At most so many of the places, the last among them, evenly."""
    count = min(len(places), most)
    return [places[(i + 1) * len(places) // count - 1] for i in range(count)]


# Groups


def describe_groups(situation: Situation) -> str:
    """The layers in sums over groups of a kind and a third of the depth: constant through a run, a line each.

    The line of a third and a kind in it make a selector.
    """
    groups, layers = _list_groups(situation.layers), situation.layers
    columns = _columns(situation.config.target_sparsity)
    unit = _unit([sum(layer.kappa[columns[0]] for layer in group) for group in groups.values()])
    lines = [
        f"names look like: {quote_data(layers[0].name, 120)}",
        f"columns: kind, % of all weights, wanda z, grad z (means), {_name_levels(columns)} (sums; kl in units of "
        f"{unit:.0e} nats/token)",
    ]
    total, blocks = sum(layer.weights for layer in layers), ""
    short = _shorten_kinds([selector.partition(" · ")[2] for selector in group_layers(layers, merge=True)])
    for selector, group in groups.items():
        third, _, kind = selector.partition(" · ")
        if third != blocks:
            blocks = third
            lines.append(blocks)
        share = 100 * sum(layer.weights for layer in group) / total
        figures = _figures(group, columns, unit / len(group))
        lines.append(f"{quote_data(short[kind], 80)} {share:.1f} {figures}{_describe_zeros(group)}")
    left_out = len(group_layers(layers, merge=True)) - len(groups)
    title = f"The {len(layers)} prunable layers in {len(groups)} groups"
    return f"{title}{f' ({left_out} more not shown)' if left_out else ''}:\n" + data_block("groups", lines)


def _shorten_kinds(kinds: Iterable[str]) -> dict[str, str]:
    """The last name of each kind, by which a selector knows its layers too, where no other kind ends in it."""
    last = {kind: kind.rsplit(".", 1)[-1] for kind in kinds}
    ends = Counter(last.values())
    return {kind: name if ends[name] == 1 else kind for kind, name in last.items()}


def _list_groups(layers: Sequence[LayerProfile]) -> dict[str, list[LayerProfile]]:
    return dict(list(group_layers(layers, merge=True).items())[:MAX_GROUP_ROWS])


def describe_present(situation: Situation, *, grouped: bool) -> str:
    """Present sparsities in the order of the table: one for each group, or a line for each block.

    Of groups also what a little more costs there, and the factors that lessons put on their KL curves.
    """
    now = situation.sparsity
    if grouped:
        return _describe_present_groups(situation) + _describe_factors(situation)
    lines: dict[str, list[str]] = {}
    for row in _rows(situation.layers):
        share = fmean(now.get(layer.name, 0.0) for layer in row.layers)
        lines.setdefault(row.blocks, []).append(_show_share(share))
    return " Present sparsities, a line per block, in the order of the table:\n" + data_block(
        "sparsities", [f"{blocks}: {' '.join(shares)}" for blocks, shares in lines.items()]
    )


def _describe_present_groups(situation: Situation) -> str:
    total, shares, costs = sum(layer.weights for layer in situation.layers), list[str](), list[float]()
    for group in _list_groups(situation.layers).values():
        weights = np.array([layer.weights for layer in group])
        now = np.array([situation.sparsity.get(layer.name, 0.0) for layer in group])
        shares.append(_show_share(float(weights @ now) / weights.sum()))
        more = predict_kl(group, np.minimum(now + POINT, 1.0)) - predict_kl(group, now)
        costs.append(more * total / weights.sum())
    unit = _unit(costs)
    title = (
        f" Present sparsities, and KL by the table's curves of one more point of the model's taken there (units of "
        f"{unit:.0e}), in the order of the table:\n"
    )
    return title + data_block("sparsities", [" ".join(shares), " ".join(_two_digits(cost / unit) for cost in costs)])


def _describe_factors(situation: Situation) -> str:
    """What lessons make of the curves of groups where the last accepted plan is made again; empty where nothing."""
    plan = situation.accepted_plan
    if plan is None:
        return ""
    found = find_lesson_factors(plan, situation.lessons, situation.layers, situation.config)
    told = [f"{quote_data(name, 80)} {x.factor:.3g} +- {x.error:.2g}" for name, x in found.items()][:MAX_GROUP_ROWS]
    return "\nFactors of lessons on the curves:\n" + data_block("factors", told) if told else ""


def _show_share(share: float) -> str:
    return f"{share:.2f}".removeprefix("0")
