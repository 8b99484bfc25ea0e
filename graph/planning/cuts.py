"""Plans of runs that take whole parts away: what they come to, and which of them a rule makes."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from graph.planning.plan import ONLY_ZEROS, Plan
from graph.state import Trial
from tools.base.errors import ImpossiblePlan
from tools.plans.cuts import CutOrder, Cutting, Parts, count_cut_zeros, resolve_cut
from tools.plans.layer_profile import LayerProfile
from tools.plans.recipe import Recipe
from tools.plans.work_order import WorkOrder, order_all

if TYPE_CHECKING:
    from graph.planning.situation import Situation

MOST_BLOCKS = 2
"""Whole blocks more, or fewer, than in the accepted cut that the rule tries at the target."""


def order_cut(plan: Plan, parts: Parts, layers: Sequence[LayerProfile], line: str) -> WorkOrder:
    """What goes of every layer by such a plan, as nearly to its sparsity as whole units allow. Raises ImpossiblePlan.

    The order's sparsity is the plan's: cuts that differ by less than a unit are of one budget.
    """
    usual = Plan(sparsity=plan.sparsity)
    if spoken := [name for name in ONLY_ZEROS if getattr(plan, name) != getattr(usual, name)]:
        raise ImpossiblePlan(f"{spoken[0]} is about single weights, and this run takes parts away; leave it out")
    cut = resolve_cut(plan.cut or Cutting(), parts, plan.sparsity, layers)
    return order_all(
        Recipe(refit=cut.refit),
        count_cut_zeros(cut, parts, layers),
        sparsity=plan.sparsity,
        predicted_kl=parts.predict(cut.counts, cut.dropped),
        line=line,
    ).model_copy(update={"cut": cut})


def plan_cut(situation: "Situation") -> Plan | None:
    """The next cut, by rule; None when every one that it knows was tried.

    To the target at once; where that was rolled back half the step, then on. At the target, cuts that differ from the
    accepted one by a block or a group of heads. Raises ImpossiblePlan where the target cannot be met.
    """
    if situation.at_target:
        return next(_vary(situation), None)
    target, accepted = situation.config.target_sparsity, situation.accepted
    start = (accepted or situation.dense).sparsity
    failed = _list_failures(situation.trials)
    step = round(start + (failed[-1].sparsity - start) / 2, 4) if failed else target
    if failed and step >= failed[-1].sparsity:
        return None
    why = f"round {failed[-1].iteration} was rolled back: half its step" if failed else "to the target"
    cutting = situation.accepted_plan.cut if situation.accepted_plan and situation.accepted_plan.cut else Cutting()
    return Plan(sparsity=step, cut=cutting, reason=f"Shared out by the KL curves of the parts, {why}.")


def _list_failures(trials: Sequence[Trial]) -> list[Trial]:
    """What was rolled back, or refused, since the last accepted trial."""
    failed: list[Trial] = []
    for trial in trials:
        failed = [] if trial.verdict == "accept" else [*failed, trial]
    return failed


def _vary(situation: "Situation") -> Iterator[Plan]:
    """Untried cuts that differ from the accepted one in one number, likeliest first."""
    parts, base = situation.parts, situation.accepted_plan
    assert parts is not None and base is not None, "a cut was accepted"
    cutting = base.cut or Cutting()
    cut = situation.orders.draft(base).cut
    assert cut is not None, "its order is a cut's"
    target, told = situation.config.target_sparsity, parts.shape.heads
    changes: list[tuple[dict[str, int], str]] = [({}, "the accepted cut, at the target")]
    for step in range(1, MOST_BLOCKS + 1):
        for blocks in (len(cut.dropped) + step, len(cut.dropped) - step):
            words = "One whole block" if step == 1 else f"{step} whole blocks"
            changes.append(({"blocks": blocks}, f"{words} {'more' if blocks > len(cut.dropped) else 'fewer'}."))
    place = told.options.index(cut.heads)
    for other in (place - 1, place + 1):
        if other in range(len(told.options)):
            heads = told.options[other]
            changes.append(({"heads": heads}, f"{heads} of {told.units} groups of heads in place of {cut.heads}."))
    seen = {trial.order for trial in situation.trials}
    for change, reason in changes:
        if change.get("blocks", 0) < 0:
            continue
        plan = Plan(sparsity=target, cut=cutting.model_copy(update=change), reason=reason)
        try:
            order: CutOrder | None = (made := situation.orders.draft(plan)).cut
            costs = situation.find_expense(plan)
        except ImpossiblePlan:
            continue
        if order is not None and made.id not in seen and not costs:
            yield plan
