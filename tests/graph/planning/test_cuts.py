"""Cuts that the rule plans, and what a plan of one comes to."""

import pytest

from graph.config import RunConfig
from graph.planning.orders import describe_plan, hash_request, order_cut
from graph.planning.plan import Plan
from graph.planning.rule import find_relief, plan_by_rule
from graph.planning.situation import Situation
from tests.parts import make_layers, make_parts
from tests.situations import make_trial
from tools.base.errors import ImpossiblePlan
from tools.plans.cuts import Cutting, Parts
from tools.plans.recipe import Recipe
from tools.results.trial import Trial

TARGET = 0.3


def make_situation(*trials: Trial, accepted: Plan | None = None, parts: Parts | None = None) -> Situation:
    kept = [trial for trial in trials if trial.verdict == "accept"]
    return Situation(
        config=RunConfig(target_size=0.8).model_copy(update={"target_sparsity": (parts or make_parts()).target}),
        layers=make_layers(),
        sparsity={},
        dense=make_trial(0, "accept", 0.0, Recipe(), perplexity=10.0),
        accepted=kept[-1] if kept else None,
        accepted_plan=accepted,
        trials=trials,
        parts=parts or make_parts(),
    )


def try_cut(plan: Plan, verdict: str, iteration: int = 1, parts: Parts | None = None) -> Trial:
    trial = make_trial(iteration, verdict, plan.sparsity, Recipe())
    made = order_cut(plan, parts or make_parts(), make_layers(), "")
    told = {"recipe": None, "plan": describe_plan(plan), "order": made.id, "asked": hash_request(plan), "cut": plan.cut}
    return trial.model_copy(update=told)


def test_the_target_at_once_then_half_the_step_then_the_target_again() -> None:
    first = plan_by_rule(make_situation())
    assert first is not None and (first.sparsity, first.cut) == (TARGET, Cutting())
    undone = try_cut(first, "rollback")
    half = plan_by_rule(make_situation(undone))
    assert half is not None and half.sparsity == TARGET / 2
    assert half.reason == "Shared out by the KL curves of the parts, round 1 was rolled back: half its step."
    kept = try_cut(half, "accept", 2)
    again = plan_by_rule(make_situation(undone, kept, accepted=half))
    assert again is not None and again.sparsity == TARGET


def test_halves_end_where_whole_units_come_to_nothing_else() -> None:
    """A round that is planned again would be refused, or end in a cut of nothing."""
    trials: list[Trial] = []
    while (plan := plan_by_rule(make_situation(*trials))) is not None:
        trials.append(try_cut(plan, "rollback", len(trials) + 1))
    assert len({trial.order for trial in trials}) == len(trials) == 2
    sparsities = [trial.sparsity for trial in trials]
    assert sparsities == sorted(sparsities, reverse=True) and sparsities[0] == TARGET


def test_at_the_target_one_number_at_a_time_until_all_were_tried() -> None:
    plan = Plan(sparsity=TARGET, cut=Cutting())
    trials, tried = [try_cut(plan, "accept")], []
    while (change := plan_by_rule(make_situation(*trials, accepted=plan))) is not None:
        assert change.cut is not None
        tried.append((change.cut.blocks, change.cut.heads, change.reason))
        trials.append(try_cut(change, "rollback", len(trials) + 1))
    assert tried == [
        (0, None, "One whole block fewer."),
    ], "two blocks are more than the target, and beside one no group of heads goes"


@pytest.mark.parametrize(("first", "kept", "steps"), [(0, 1, [3, 2]), (2, 1, [0, 3])])
def test_where_a_change_of_blocks_was_kept_the_next_goes_further_that_way(
    first: int, kept: int, steps: list[int]
) -> None:
    parts = make_parts().model_copy(update={"order": [3, 1, 0], "dropped_kl": [0.5, 2.0, 3.0], "target": 0.75})
    before, plan = (Plan(sparsity=0.75, cut=Cutting(blocks=blocks)) for blocks in (first, kept))
    trials = [try_cut(made, "accept", i + 1, parts) for i, made in enumerate((before, plan))]
    tried: list[int | None] = []
    while (change := plan_by_rule(make_situation(*trials, accepted=plan, parts=parts))) is not None and change.cut:
        if change.cut.heads is not None:
            break
        tried.append(change.cut.blocks)
        trials.append(try_cut(change, "rollback", len(trials) + 1, parts))
    assert tried == steps, "and what was tried before is not tried again"


def test_no_method_is_missed_at_the_target() -> None:
    plan = Plan(sparsity=TARGET, cut=Cutting())
    assert find_relief(make_situation(try_cut(plan, "accept"), accepted=plan)) == ""


def test_what_is_of_single_weights_is_refused() -> None:
    plan = Plan(sparsity=TARGET, recipe=Recipe(method="wanda", refit=False))
    with pytest.raises(ImpossiblePlan, match=r"^recipe is about single weights, and this run takes parts away; leave"):
        make_situation().orders.draft(plan)
    order = make_situation().orders.draft(make_situation().orders.weigh(Plan(sparsity=TARGET)))
    assert order.cut is not None and order.cut.neurons == 8 and order.sparsity == TARGET
    other = make_situation().orders.draft(Plan(sparsity=TARGET, cut=Cutting(refit=False)))
    assert other.id != order.id and other.zeros == order.zeros


def test_what_was_accepted_below_the_target_need_not_come_to_it() -> None:
    """Without whole blocks, say, as much cannot go as the target has."""
    half = Plan(sparsity=0.1, cut=Cutting(blocks=2, heads=0, refit=False))
    kept = make_trial(1, "accept", 0.1, Recipe())
    plan = plan_by_rule(make_situation(kept, accepted=half))
    assert plan is not None and (plan.sparsity, plan.cut) == (TARGET, Cutting(refit=False))
