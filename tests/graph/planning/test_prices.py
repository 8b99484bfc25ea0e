"""What calls of instruments take, and that those beyond what is left are refused before they begin."""

import dataclasses
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest

from graph.config import RunConfig
from graph.llm.toolbox import Toolbox
from graph.planning.brief import planner_messages
from graph.planning.budget import TokenBudget
from graph.planning.orders import Curves
from graph.planning.plan import Plan
from graph.planning.prices import Price, describe_prices, describe_spending, price_drafts, refuse_dear
from graph.planning.situation import Situation
from tests.situations import make_layers, make_situation
from tools.instruments.probed import Probed
from tools.plans.costs import count_in_order, count_walk
from tools.plans.recipe import parse_recipe
from tools.plans.work_order import prune_alone
from tools.results.schema import Usage

CONFIG = RunConfig(window=64, calibration_windows=4, gradient_windows=2, validation_windows=4)
MASK = Plan(sparsity=0.4, recipe=parse_recipe("wanda~dense:kappa-mask"))
WALKED = Plan(sparsity=0.4, recipe=parse_recipe("refit~sequential:kappa"))


def make_budget(limit: int = 0) -> TokenBudget:
    return TokenBudget(CONFIG.model_copy(update={"max_evaluated_tokens": limit}), 0, 256)


def situate(*, exact: bool) -> Situation:
    known = replace(make_situation(), config=CONFIG)
    return replace(known, read_layers=lambda recipe: Curves(make_layers(), exact or not recipe.needs_curves))


def test_a_call_is_priced_by_what_it_walks_through() -> None:
    budget, walk = make_budget(), count_in_order(["sequential"], CONFIG)
    one = price_drafts([WALKED], 128, situate(exact=True), budget)
    assert one == Price(128 + count_walk(CONFIG) + walk, 128)
    both = price_drafts([WALKED, MASK], 128, situate(exact=False), budget)
    assert both == Price(one.tokens + 128, 128)
    assert price_drafts([WALKED, WALKED], 128, situate(exact=True), budget) == one, "measured once, whoever asks twice"
    assert price_drafts([WALKED], 0, situate(exact=False), budget) == Price(count_walk(CONFIG)), "a prediction"
    budget.pay(budget.list_costs(WALKED, situate(exact=True).orders.draft(WALKED)))
    assert price_drafts([WALKED], 64, situate(exact=True), budget).tokens == 64, "what is paid for is not paid again"
    assert price_drafts([MASK], 0, situate(exact=True), make_budget()) == Price(0)
    order = situate(exact=True).orders.draft(MASK)
    budget.probed.append(
        Probed(order=order.id, checkpoint="a", sparsity=0.4, tokens=64, losses={}, line="a plan", windows=[0])
    )
    prices = [price_drafts([MASK], tokens, situate(exact=True), budget) for tokens in (64, 128)]
    assert prices == [Price(0), Price(64, 128)], "what was probed is read back, of more text the rest measured"


def test_some_layers_alone_spare_no_trial() -> None:
    situation = situate(exact=True)
    budget, last = make_budget(), f"blocks 0 · {situation.layers[-1].kind}"
    refit = Plan(sparsity=0.4, recipe=parse_recipe("refit:kappa-mask"))
    assert price_drafts([refit, MASK], 128, situation, budget, alone=[last, last]) == Price(256)
    assert price_drafts([refit, refit], 128, situation, budget, alone=["", last]).each == 128
    order = prune_alone(situation.orders.draft(MASK), last, situation.layers)
    budget.probed.append(
        Probed(
            order=order.id, checkpoint="a", sparsity=0.4, tokens=64, losses={}, line="a plan", windows=[0], alone=last
        )
    )
    assert budget.count_rest() == budget.trial
    assert price_drafts([MASK], 64, situation, budget, alone=[last]) == Price(0)
    limited = make_budget(256 + 64)
    with pytest.raises(ValueError, match=r"a probe of 128 tokens is too much: 64 are left beside the trial$"):
        limited.book(128, [order])
    limited.book(64, [order])


def test_what_is_beyond_what_is_left_is_refused_with_its_price() -> None:
    budget = make_budget(1000)
    refuse_dear(Price(744), budget, 9)
    with pytest.raises(ValueError, match=r"^not begun: ") as caught:
        refuse_dear(Price(745), budget, 60)
    assert str(caught.value) == "not begun: this call takes 745 tokens; 744 are left beside the round's trial"
    with pytest.raises(ValueError, match=r"^not begun: no time is left$"):
        refuse_dear(Price(10), make_budget(), 0)
    refuse_dear(Price(0), make_budget(), 0)
    refuse_dear(Price(10**9), make_budget(), math.inf)


def test_a_planner_is_told_what_calls_take_and_what_is_left() -> None:
    config = CONFIG.model_copy(update={"max_seconds": 3600.0, "max_agent_cost": 1.0, "max_agent_tokens": 5000})
    usage = Usage(calls=1, input_tokens=900, output_tokens=100, cost=0.25)
    situation = dataclasses.replace(make_situation(), config=config, seconds=600.4, usage=usage)
    left = (
        " Left: 3000 of 3600 seconds (what begins in time is finished), $0.75 of $1 for agents, 4,000 of 5,000 tokens "
        "for agents."
    )
    assert describe_spending(config, 600.4, usage) == left
    assert describe_spending(CONFIG, 600.4, usage) == ""
    prices = describe_prices(CONFIG)
    assert prices == (
        "Prices in tokens: probe 128 for each plan on half of the validation text, 256 on all of it, and what its "
        "recipe takes; statistics sequential 512 more; predict 0, or 512 where curves are not known; all others 0."
    )
    left_now = {"tokens_left": 744.0}
    toolbox = Toolbox(lambda: nullcontext([]), calls=3, seconds=9, prices=prices, list_left=lambda: left_now)
    said = planner_messages(situation, toolbox)[1].text
    assert left in said
    assert f'Tools: "calls_left": 3, "seconds_left": 9, "tokens_left": 744\n{prices}\n\nPlan round 1.' in said


def test_of_cuts_only_what_there_is_has_a_price() -> None:
    cutting = CONFIG.model_copy(update={"target_size": 0.8})
    prices = describe_prices(cutting)
    assert "all of it, and the fit of its cut; all others 0." in prices
