"""Experts that were sent few tokens: how many are enough, and how those of all their fellows fill up what lacks."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor

from tools.models.layers import Layer
from tools.statistics.shards import Sums

FEW = 64
"""From so many tokens on an expert's mean squares (a and gamma) and its KL curve stand on their own: the mean of 64
squares of a normal variable is within 18 % of the truth (one standard error). Its second moment needs as many as it has
inputs: of fewer it is singular."""

SHOWN = 8
"""Experts that a warning names."""


def find_few(sums: Sums, pool: Sequence[str], enough: int, tokens: int) -> dict[str, int]:
    """The layers of a pool that saw fewer than `enough` tokens, and not all `tokens` of the text; with their number."""
    seen = count_seen(sums, pool, tokens)
    return {name: n for name, n in seen.items() if n < min(enough, tokens)}


def count_seen(sums: Sums, pool: Sequence[str], tokens: int) -> dict[str, int]:
    """How many tokens each layer of a pool saw.

    One that is known but was not counted stands for layers outside of the pool that read the same: all `tokens`.
    """
    uncounted = {name: tokens if f"A/{name}" in sums or f"a/{name}" in sums else 0 for name in pool}
    return {name: int(sums.get(f"n/{name}", uncounted[name])) for name in pool}


def fill_up(
    sums: Sums, kind: str, pool: Sequence[str], enough: int, tokens: int, own: Collection[str] | None = None
) -> None:
    """Mix into `KIND/LAYER`, a sum over the tokens that an expert saw, what an average token of its fellows adds.

    An expert that saw n tokens, fewer than `enough` and than the text's `tokens`, gets `enough` - n average ones, and
    the sum is scaled back to n tokens (to one, where it saw none), so that rarely used experts stay rarely used. The
    `pool` are the layers that stand for each other, `n/LAYER` their tokens; those that are its `own`, or all, are
    filled up.
    """
    few = {x: n for x, n in find_few(sums, pool, enough, tokens).items() if own is None or x in own}
    whole = sum(count_seen(sums, pool, tokens).values())
    known = [sums[f"{kind}/{name}"] for name in pool if f"{kind}/{name}" in sums]
    if not few or not known:
        return
    total: Tensor = sum(known[1:], known[0].clone())
    for name, n in few.items():
        filled = total * ((enough - n) / whole)
        if n:
            filled += sums[f"{kind}/{name}"]
        sums[f"{kind}/{name}"] = filled.mul_(max(n, 1) / enough)


def fill_up_moments(
    sums: Sums, tokens: int, layers: Sequence[Layer], group: Mapping[str, str], full: bool
) -> dict[str, int]:
    """Fill up what experts read that were sent few of a text's tokens; the tokens of those that were sent fewer than
    they have inputs.

    Masks go by mean squares, which are their own where the second moments, of so many more figures, are not.
    """
    inputs = {layer.name: layer.weight_OI.shape[1] for layer in layers}
    of, pools = {layer.name: layer.pool for layer in layers}, _list_pools(layers, group)
    if full:
        leaders = dict.fromkeys(name for pool in pools.values() for name in pool)
        sums |= {f"a/{name}": sums[f"A/{name}"].diagonal().clone() for name in leaders if f"A/{name}" in sums}
    few: dict[str, int] = {}
    # What leads two pools, as a gate that is read with its up projection, is filled up once, and after the pool that it
    # does not belong to has had its own sum: leaders come before what they lead.
    for pool_name, pool in reversed(pools.items()):
        own, wide = [name for name in pool if of[name] == pool_name], inputs[pool[0]]
        few |= find_few(sums, pool, wide, tokens)
        if full:
            fill_up(sums, "A", pool, wide, tokens, own)
        fill_up(sums, "a", pool, FEW, tokens, own)
    return {name: few[leader] for name, leader in group.items() if leader in few}


def list_pools(layers: Iterable[Layer]) -> list[list[str]]:
    """The layers that stand for each other."""
    layers = list(layers)
    return list(_list_pools(layers, {layer.name: layer.name for layer in layers}).values())


def _list_pools(layers: Iterable[Layer], group: Mapping[str, str]) -> dict[str, list[str]]:
    """By the names of pools, the first layers of the groups that their layers read with."""
    pools: dict[str, dict[str, None]] = {}
    for layer in layers:
        if layer.pool:
            pools.setdefault(layer.pool, {})[group[layer.name]] = None
    return {name: list(pool) for name, pool in pools.items()}


def describe_few(few: Mapping[str, int], layers: Iterable[Layer]) -> str:
    """Which experts did not see enough tokens, in one sentence; "" where all did."""
    experts: dict[tuple[str, str], int] = {}
    count: set[tuple[str, str]] = set()
    for layer in layers:
        if layer.pool:
            place, _, rest = layer.pool.partition(".*")
            expert = place, layer.name.removeprefix(f"{place}.").removesuffix(rest)
            count.add(expert)
            if layer.name in few:
                experts[expert] = min(few[layer.name], experts.get(expert, few[layer.name]))
    if not experts:
        return ""
    fewest = sorted(experts.items(), key=lambda item: item[1])
    named = [f"{place}.{number} ({n})" for (place, number), n in fewest[:SHOWN]]
    return (
        f"{len(experts)} of {len(count)} experts were sent fewer calibration tokens than they have inputs, "
        f"{sum(n < FEW for n in experts.values())} of them fewer than {FEW}; their statistics are filled up with those "
        f"of all experts of their block: {', '.join(named)}{', …' if len(experts) > SHOWN else ''}. More calibration "
        "windows give them their own"
    )
