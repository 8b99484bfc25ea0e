"""The one budget: trials, probes, and what plans put through the model beside them."""

import dataclasses
import math
from typing import Any

import pytest

from graph.config import RunConfig
from graph.nodes.plan import explain_end
from graph.nodes.reflect import after_reflect
from graph.planning.brief import planner_messages
from graph.planning.budget import TokenBudget, can_profile, charge, find_lateness, open_budget
from graph.planning.plan import Plan
from graph.planning.refinements import STRONG, plan_refinements
from graph.state import State
from tests.situations import make_situation, make_trial
from tools.instruments.probed import Probed, count_rest
from tools.plans.costs import count_in_order, count_profile, count_walk
from tools.plans.methods import Statistics
from tools.plans.mix import mix_questions
from tools.plans.recipe import Recipe
from tools.plans.work_order import WorkOrder, order_all

CONFIG = RunConfig(
    window=64, calibration_windows=4, gradient_windows=2, validation_windows=3, max_evaluated_tokens=2000
)
TRIAL = 3 * 64
WALK = 4 * 2 * 64
SEQUENTIAL = 2 * 4 * 64
PROFILE = (4 + 5 * 2) * 64


def make_budget(tokens: int, limit: int = 600) -> TokenBudget:
    return TokenBudget(CONFIG.model_copy(update={"max_evaluated_tokens": limit}), tokens, TRIAL)


def make_order(**recipe: Any) -> WorkOrder:
    return order_all(Recipe(**recipe), {"blocks.0.q": 3}, sparsity=0.45, predicted_kl=0.1)


def test_what_costs_come_to() -> None:
    assert (count_walk(CONFIG), count_profile(CONFIG)) == (WALK, PROFILE)
    kinds: list[list[Statistics]] = [["dense"], ["sequential"], ["dense", "sequential"], ["sequential", "sequential"]]
    assert [count_in_order(some, CONFIG) for some in kinds] == [0, SEQUENTIAL, SEQUENTIAL, SEQUENTIAL + 4 * 64]
    few = CONFIG.model_copy(update={"gradient_windows": 9})
    assert count_walk(few) == 4 * 4 * 64, "no more windows are back-propagated than there are"


def test_a_probe_leaves_the_tokens_of_the_trial() -> None:
    budget = make_budget(192)
    budget.book(128)
    assert budget.tokens == 320
    with pytest.raises(ValueError, match=r"^a probe of 128 tokens is too much: 88 are left beside the trial$"):
        budget.book(128)
    assert budget.tokens == 320


def test_a_probe_with_sequential_statistics_counts_their_walk_once_for_each_order() -> None:
    budget, order = make_budget(0, 1000), make_order(statistics="sequential")
    budget.book(64, [order, make_order()])
    assert budget.tokens == 64 + SEQUENTIAL
    budget.book(64, [order])
    assert budget.tokens == 128 + SEQUENTIAL
    state = State(config=CONFIG, evaluated_tokens=budget.tokens, counted=budget.counted)
    plan = Plan(sparsity=0.45, recipe=Recipe(statistics="sequential", curves="mask"))
    assert charge(state, plan, order) == {"evaluated_tokens": budget.tokens, "counted": budget.counted}


def test_beside_a_probe_only_the_rest_of_its_plans_trial_is_kept() -> None:
    order, other = make_order(statistics="sequential"), make_order()
    with pytest.raises(ValueError, match=r"^a probe of 640 tokens is too much: 616 are left beside the trial$"):
        make_budget(0, 680).book(128, [order])
    budget = make_budget(0, 704)  # the trial of that plan measures 64 more
    budget.book(128, [order])
    budget.probed.append(
        Probed(order=order.id, checkpoint="x", sparsity=0.45, tokens=128, losses={}, line="a plan", windows=[0, 2])
    )
    assert budget.left == 64 and budget.count_rest() == 64
    plan = Plan(sparsity=0.45, recipe=Recipe(statistics="sequential", curves="mask"))
    assert budget.refuse(plan, order) == ""
    assert budget.refuse(Plan(sparsity=0.45, recipe=STRONG), other).startswith(
        f"the plan takes {TRIAL} tokens through the model, 0 of them beside its trial, and 64 are left; "
    )
    with pytest.raises(ValueError, match=r"^a probe of 1 tokens is too much: 0 are left beside the trial$"):
        budget.book(1, [other])


def test_a_plan_probed_on_more_text_pays_for_the_rest() -> None:
    order, budget = make_order(), make_budget(0, 1000)
    budget.probed.append(
        Probed(order=order.id, checkpoint="x", sparsity=0.45, tokens=64, losses={}, line="a plan", windows=[0])
    )
    assert [count_rest(budget.probed, order.id, tokens) for tokens in (32, 64, 128)] == [0, 0, 64]
    assert count_rest(budget.probed, "another", 128) == 128
    left = make_budget(0, 64 + TRIAL - 128)
    left.probed = budget.probed
    left.book(64, [order])  # its trial measures the windows beyond these two
    assert left.left == left.count_rest(128) == TRIAL - 128


def test_without_a_limit_everything_is_counted() -> None:
    budget = make_budget(0, 0)
    budget.book(10**9)
    budget.spend("curves", {"curves of refit": WALK})
    assert budget.tokens == 10**9 + WALK and budget.left == budget.trials_left == math.inf
    assert budget.count_rounds(3) == CONFIG.max_iterations


def test_a_plan_carried_out_is_charged_for_its_curves_and_its_walk_once() -> None:
    plan, order = Plan(sparsity=0.45, recipe=Recipe(statistics="sequential")), make_order(statistics="sequential")
    state = State(config=CONFIG, evaluated_tokens=TRIAL)
    update = charge(state, plan, order)
    assert update["evaluated_tokens"] == TRIAL + WALK + SEQUENTIAL
    again = charge(state.model_copy(update=update), plan, order)
    assert again == update
    other = make_order(statistics="sequential", gamma="clipped")
    assert charge(state.model_copy(update=update), plan, other)["evaluated_tokens"] == TRIAL + WALK + 2 * SEQUENTIAL
    assert charge(state, Plan(sparsity=0.45, recipe=STRONG), make_order())["evaluated_tokens"] == TRIAL
    asking = state.model_copy(update={"config": CONFIG.model_copy(update={"questions": "hub:org/q:train"})})
    mixed = Plan(sparsity=0.45, recipe=STRONG.model_copy(update={"mix": mix_questions(0.5)}))
    assert charge(asking, mixed, make_order())["evaluated_tokens"] == TRIAL + PROFILE
    order = make_order(statistics="sequential", mix={"run": 1, "questions": 1})
    plan = Plan(sparsity=0.45, recipe=Recipe(statistics="sequential", mix=mix_questions(0.5)))
    assert charge(asking, plan, order)["evaluated_tokens"] == TRIAL + PROFILE + 2 * WALK + 2 * SEQUENTIAL


def test_an_order_that_is_drafted_takes_another_walk_than_the_one_it_looks_like() -> None:
    plan, order = Plan(sparsity=0.45, recipe=Recipe(statistics="sequential")), make_order(statistics="sequential")
    state = State(config=CONFIG, evaluated_tokens=TRIAL)
    spent = charge(state, plan, order)
    tokens, counted = spent["evaluated_tokens"], spent["counted"]
    assert isinstance(tokens, int) and isinstance(counted, list)
    budget = make_budget(tokens, tokens + TRIAL + SEQUENTIAL - 1)
    budget.counted = counted
    assert budget.refuse(plan, order) == ""
    assert f", {SEQUENTIAL:,} of them beside its trial, and " in budget.refuse(plan, order, drafted=True)


def test_what_measures_curves_by_choice_leaves_the_tokens_of_the_trial() -> None:
    budget = make_budget(0, TRIAL + WALK)
    budget.spend("measuring its curves", {"curves of refit": WALK})
    with pytest.raises(ValueError, match=r"^measuring its curves takes 512 tokens, and 0 are left beside the trial$"):
        budget.spend("measuring its curves", {"curves of wanda": WALK})
    budget.spend("measuring its curves", {"curves of refit": WALK})
    assert budget.tokens == WALK


def test_a_plan_beyond_the_budget_is_refused_with_what_it_takes() -> None:
    budget, plan = make_budget(0, 600), Plan(sparsity=0.45, recipe=STRONG)
    assert budget.refuse(plan, make_order()) == ""
    sequential = STRONG.model_copy(update={"statistics": "sequential"})
    assert budget.refuse(Plan(sparsity=0.45, recipe=sequential), make_order(statistics="sequential")) == (
        "the plan takes 704 tokens through the model, 512 of them beside its trial, and 600 are left; plan without "
        "what costs them (statistics sequential, curves method, or reprofile)"
    )
    assert "takes 1,088 tokens" in budget.refuse(plan.model_copy(update={"reprofile": True}), make_order())


def test_the_rule_plans_what_the_budget_allows() -> None:
    accepted = make_trial(1, "accept", 0.45, STRONG)
    for limit, first in ((TRIAL + SEQUENTIAL, "sequential"), (TRIAL + SEQUENTIAL - 1, "dense")):
        situation = dataclasses.replace(make_situation(accepted), budget=make_budget(0, limit))
        assert next(plan_refinements(situation)).recipe.statistics == first
    assert explain_end(situation) == "every lever of the rule that 703 tokens allow has been tried"


def test_a_planner_is_told_how_many_trials_the_budget_allows() -> None:
    config = CONFIG.model_copy(update={"max_iterations": 200})
    situation = dataclasses.replace(
        make_situation(), config=config, budget=TokenBudget(config, 1000, TRIAL), iteration=3
    )
    said = planner_messages(situation)[1].text
    assert "Round 3 of at most 7. Perplexity limit" in said
    assert (
        " Budget: 1,000 of 2,000 tokens through the model are left: a trial takes 192 and what its recipe adds; "
        "a probe counts towards its plan's own trial; statistics sequential 512 more, for each plan "
        "once, probed or tried; curves method 512 more, once for each "
        "method, gamma and damping; a new profile, reprofile, 896. Plans beyond it are refused; "
        "with less than a trial the run ends."
    ) in said
    asking = dataclasses.replace(situation, config=config.model_copy(update={"questions": "hub:org/q:train"}))
    assert "a new profile, reprofile or questions in a mix, 896." in planner_messages(asking)[1].text
    free = dataclasses.replace(situation, budget=TokenBudget(RunConfig(), 1000, TRIAL))
    assert "Budget:" not in planner_messages(free)[1].text


def test_a_profile_that_leaves_no_trial_is_not_made() -> None:
    asked = CONFIG.model_copy(update={"reprofile": True})
    trial = make_trial(1, "accept", 0.3, STRONG)
    for tokens, where in ((2000 - PROFILE - TRIAL, "profile"), (2001 - PROFILE - TRIAL, "plan")):
        state = State(config=asked, trials=[trial], evaluated_tokens=tokens)
        assert after_reflect(state) == where and can_profile(state) is (where == "profile")
    assert open_budget(state).tokens == 2001 - PROFILE - TRIAL


def test_a_run_that_took_its_seconds_ends() -> None:
    config = RunConfig(max_seconds=90)
    state = State(run="r", config=config)
    assert find_lateness(state, 89.9) == find_lateness(State(run="r", config=RunConfig()), 1e9) == ""
    assert find_lateness(state.model_copy(update={"replay": "other"}), 1e9) == "", "which goes by no clock"
    assert find_lateness(state, 90.4) == "90 of at most 90 seconds were spent"
