"""What groups of layers of one round are worth in place of another's: measured, and nothing pruned for it."""

from collections.abc import Sequence

from tools.instruments.comparisons import Figures, list_pairs, round_figure
from tools.instruments.functions import Draft, Round, probe, read_probed
from tools.plans.graft import Graft, refuse_gone
from tools.results.losses import Evaluation, compare_kl

MOST_SWAPS = 8
"""Groups of layers that one call swaps, one after another."""


def swap(round_: Round, selectors: Sequence[str], of: int, rest: int, *, whole: bool = False) -> Figures:
    """KL where the layers of each selector in turn are those of round `of`, and the rest those of round `rest`.

    `kl_minus_rest` is that KL minus round `rest`'s own, paired, with its standard error; on each named text, too. On
    half of the validation windows, or the `whole` text. Each counts as a probe of the plan with this `graft`. Of a swap
    that cannot be there is `error` alone. Raises ImpossiblePlan when none can, and ValueError where there are not the
    tokens or seconds.
    """
    bench, at_hand = round_.bench, round_.list_at_hand()
    grafts = [Graft(selector=selector, of=of, rest=rest) for selector in dict.fromkeys(selectors)]
    refuse_gone(grafts[0], at_hand)
    zeros = sum(record.zeros for record in bench.read_checkpoint(at_hand[rest]).values())
    sparsity = zeros / sum(weight_OI.numel() for weight_OI in bench.dense.values())
    found = probe(round_, [Draft(sparsity=sparsity, graft=graft) for graft in grafts], whole=whole)
    before = bench.evaluate(at_hand[rest], "validation", round_.profile, round_.progress)  # read back
    bench.restore(round_.present)
    swaps = {}
    for graft, figures in zip(grafts, found, strict=True):
        told: Figures = {name: figures[name] for name in ("error", "probe", "sparsity", "kl") if name in figures}
        if "probe" in figures:
            own = read_probed(round_, figures["probe"])
            theirs = bench.losses.take_part(before, len(own.kl))
            if "texts" in figures:
                told["texts"] = {name: {} for name in figures["texts"]}
            for whose, ours, others in list_pairs(told, own, theirs):
                whose["kl_minus_rest"] = _compare(ours, others)
        swaps[graft.selector] = told
    return {"tokens": next(x["tokens"] for x in found if "tokens" in x), "swaps": swaps}


def _compare(own: Evaluation, before: Evaluation) -> list[float | None]:
    """KL of a swap minus that of the round that has the rest, and its standard error; None for what is not finite."""
    return [round_figure(x) for x in compare_kl(own, before)] if own.finite and before.finite else [None, None]
