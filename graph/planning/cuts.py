"""Plans of runs that take whole parts away: what they come to."""

from collections.abc import Sequence

from graph.planning.plan import ONLY_ZEROS, Plan
from tools.base.errors import ImpossiblePlan
from tools.plans.cuts import Cutting, Parts, count_cut_zeros, resolve_cut
from tools.plans.layer_profile import LayerProfile
from tools.plans.recipe import Recipe
from tools.plans.work_order import WorkOrder, order_all


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
