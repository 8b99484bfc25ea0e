"""What calls of instruments take, and that those beyond what is left are refused before they begin."""

import dataclasses
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from graph.config import RunConfig
from graph.llm.toolbox import Toolbox
from graph.planning.brief import planner_messages
from graph.planning.budget import TokenBudget
from graph.planning.orders import Curves
from graph.planning.plan import Plan
from graph.planning.prices import Price, describe_price, describe_prices, describe_spending, price_drafts, refuse_dear
from graph.planning.situation import Situation
from tests.situations import make_layers, make_situation
from tools.instruments.probed import Probed
from tools.plans.costs import count_in_order, count_walk
from tools.plans.paces import Paces, join_paces, list_works, name_pruning, split_work, time_work
from tools.plans.recipe import Recipe, parse_recipe
from tools.plans.work_order import order_all, prune_alone
from tools.results.schema import Usage

CONFIG = RunConfig(window=64, calibration_windows=4, gradient_windows=2, validation_windows=4)
MASK = Plan(sparsity=0.4, recipe=parse_recipe("wanda~dense:kappa-mask"))
WALKED = Plan(sparsity=0.4, recipe=parse_recipe("refit~sequential:kappa"))
PACES = {"measuring a token": 0.01, "pruning by refit~sequential": 7.0, "measuring curves of refit": 3.0}


def make_budget(limit: int = 0, **more: Any) -> TokenBudget:
    return TokenBudget(CONFIG.model_copy(update={"max_evaluated_tokens": limit}), 0, 256, **more)


def situate(*, exact: bool) -> Situation:
    known = replace(make_situation(), config=CONFIG)
    return replace(known, read_layers=lambda recipe: Curves(make_layers(), exact or not recipe.needs_curves))


def test_a_call_is_priced_by_what_it_walks_through_and_by_what_took_time_before() -> None:
    budget, walk = make_budget(paces=PACES), count_in_order(["sequential"], CONFIG)
    one = price_drafts([WALKED], 128, situate(exact=True), budget)
    assert one == Price(128 + count_walk(CONFIG) + walk, 1.28 + 7, 128)
    both = price_drafts([WALKED, MASK], 128, situate(exact=False), budget)
    assert both == Price(one.tokens + 128, 2.56 + 7 + 3, 128), "nobody knows yet how long a mask alone takes"
    assert price_drafts([WALKED, WALKED], 128, situate(exact=True), budget) == one, "measured once, whoever asks twice"
    assert price_drafts([WALKED], 0, situate(exact=False), budget) == Price(count_walk(CONFIG), 3), "a prediction"
    budget.pay(budget.list_costs(WALKED, situate(exact=True).orders.draft(WALKED)))
    assert price_drafts([WALKED], 64, situate(exact=True), budget).tokens == 64, "what is paid for is not paid again"
    assert price_drafts([MASK], 0, situate(exact=True), make_budget()) == Price(0, 0)
    order = situate(exact=True).orders.draft(MASK)
    budget.probed.append(Probed(order=order.id, checkpoint="a", sparsity=0.4, tokens=64, losses={}, windows=[0]))
    prices = [price_drafts([MASK], tokens, situate(exact=True), budget) for tokens in (64, 128)]
    assert prices == [Price(0, 0), Price(64, 0.64, 128)], "what was probed is read back, of more text the rest measured"


def test_a_price_in_words() -> None:
    limited, slow = make_budget(2000, paces={"measuring a token": 0.1}), make_budget(paces={"measuring a token": 0.1})
    assert describe_price(Price(1152, 0.0), limited) == "1,152 tokens (120 s)"
    assert describe_price(Price(1152, 1840.0), slow) == "1800 s", "whatever takes longer"
    assert describe_price(Price(64, 0.0), make_budget(2000)) == "64 tokens"


def test_some_layers_alone_take_their_share_of_the_time_and_spare_no_trial() -> None:
    situation = situate(exact=True)
    sizes = {"self_attn.q_proj": 8, "mlp.up_proj": 8, "mlp.down_proj": 32}
    kinds = [layer.model_copy(update={"inputs": sizes.get(layer.kind, 8)}) for layer in situation.layers]
    situation = replace(situation, layers=kinds)
    budget = make_budget(paces={"measuring a token": 0.01, "pruning by refit": 48.0, "pruning by wanda~dense": 6.0})
    refit = Plan(sparsity=0.4, recipe=parse_recipe("refit:kappa-mask"))
    last = f"blocks 0 · {kinds[-1].kind}"
    work = {True: 0.0, False: 0.0}
    for layer in kinds:
        work[layer.block == 0 and layer.kind == kinds[-1].kind] += layer.weights * layer.inputs
    found = price_drafts([refit, MASK], 128, situation, budget, alone=[last, last])
    share = work[True] / sum(work.values())
    assert found.seconds == pytest.approx(2.56 + 48 * share + 6 / len(kinds)), "a fit grows with inputs, too"
    assert (found.tokens, found.each) == (256, 0)
    both = price_drafts([refit, refit], 128, situation, budget, alone=["", last])
    assert (both.each, both.seconds) == (128, pytest.approx(2.56 + 48 * (1 + share)))
    assert price_drafts([MASK], 0, situation, budget, alone=[last]).seconds == 0
    order = prune_alone(situation.orders.draft(MASK), last, kinds)
    assert name_pruning(order) == "pruning layers alone", "no pace of what all layers take"
    budget.probed.append(
        Probed(order=order.id, checkpoint="a", sparsity=0.4, tokens=64, losses={}, windows=[0], alone=last)
    )
    assert budget.count_rest() == budget.trial
    assert price_drafts([MASK], 64, situation, budget, alone=[last]) == Price(0, 0)
    limited = make_budget(256 + 64)
    with pytest.raises(ValueError, match=r"a probe of 128 tokens is too much: 64 are left beside the trial$"):
        limited.book(128, [order])
    limited.book(64, [order])


def test_what_is_beyond_what_is_left_is_refused_with_its_price() -> None:
    budget = make_budget(1000)
    refuse_dear(Price(744, 9), budget, 9)
    with pytest.raises(ValueError, match=r"^not begun: ") as caught:
        refuse_dear(Price(745, 8.6), budget, 60)
    assert str(caught.value) == (
        "not begun: this call takes 745 tokens and 9 s or more (as far as is known); 744 tokens are left beside the "
        "round's trial and 60 s are left"
    )
    with pytest.raises(ValueError, match=r"this call takes 90 s or more \(as far as is known\); 60 s are left$"):
        refuse_dear(Price(10, 90), make_budget(), 60)
    with pytest.raises(ValueError, match=r"takes 745 tokens; 744 tokens are left beside the round's trial$"):
        refuse_dear(Price(745, 90), budget, math.inf)
    refuse_dear(Price(10**9, 1e9), make_budget(), math.inf)


def test_what_is_foreseen_counts_until_it_is_measured() -> None:
    budget = make_budget(
        paces=dict(PACES), foreseen={"pruning by wanda~dense": 40.0, "pruning by refit~sequential": 90.0}
    )
    assert price_drafts([MASK, WALKED], 128, situate(exact=True), budget).seconds == 2.56 + 40 + 7
    told = "Seconds, the most so far: nothing took 10 yet; foreseen: pruning by wanda~dense 40."
    assert describe_prices(CONFIG, budget).endswith(told)
    budget.paces["pruning by refit~sequential"] = 180.0
    assert price_drafts([MASK], 128, situate(exact=True), budget).seconds == 1.28 + 80, "what came took twice as long"
    told = "Seconds, the most so far: pruning by refit~sequential 180; foreseen: pruning by wanda~dense 80."
    assert describe_prices(CONFIG, budget).endswith(told)
    budget.paces["pruning by refit~sequential"] = 9.0
    budget.paces["pruning by wanda~dense"] = 20.0
    assert price_drafts([MASK], 128, situate(exact=True), budget).seconds == 1.28 + 20
    assert describe_prices(CONFIG, budget).endswith("Seconds, the most so far: pruning by wanda~dense 20.")


def test_work_of_a_kind_that_nobody_knows_is_priced_by_what_is_known_of_its_method_and_its_walks() -> None:
    known = {"measuring a token": 0.01, "pruning by refit": 20.0, "pruning by wanda~dense": 5.0}
    budget = make_budget(foreseen=known)
    stages, walk = Plan(sparsity=0.4, recipe=parse_recipe("refit10~damped0.2~stages:kappa-mask")), 5 * 4 * 64
    assert price_drafts([stages], 128, situate(exact=True), budget).seconds == pytest.approx(1.28 + 40 + 0.01 * walk)
    assert price_drafts([stages], 0, situate(exact=True), budget).seconds == 0, "a prediction prunes nothing"
    curves = price_drafts([WALKED], 0, situate(exact=False), budget)
    assert curves.seconds == pytest.approx(0.01 * count_walk(CONFIG)), "a plan's own curves count, before any were made"
    budget.paces["pruning by refit10~damped0.2~stages"] = 90.0
    assert price_drafts([stages], 128, situate(exact=True), budget).seconds == pytest.approx(1.28 + 90)


def test_a_method_with_a_fit_is_priced_before_anything_like_it_was_done() -> None:
    names = [recipe.mask_label for recipe in list_works("")]
    assert names == ["two-sided", "two-sided+refit", "sparsegpt~dense", "refit"], (
        "what takes as long as another is none"
    )
    assert [recipe.mask_label for recipe in list_works("2:4")] == names
    known = {
        "pruning by two-sided": 3.0,
        "pruning by two-sided+refit": 20.0,
        "pruning by sparsegpt~dense": 50.0,
        "measuring curves of two-sided+refit": 90.0,
    }
    budget = make_budget(foreseen=known)
    prices = {
        label: price_drafts(
            [Plan(sparsity=0.4, recipe=parse_recipe(f"{label}:kappa-mask"))], 128, situate(exact=True), budget
        ).seconds
        for label in ("wanda~dense", "wanda+refit~damped0.3~dense", "two-sided-obs~clipped", "sparsegpt+refit~dense")
    }
    assert list(prices.values()) == [3, 20, 50, 70]
    curves = Plan(sparsity=0.4, recipe=parse_recipe("wanda+refit~damped0.3~dense:kappa"))
    assert price_drafts([curves], 0, situate(exact=False), budget).seconds == 90
    finer = Plan(sparsity=0.4, recipe=parse_recipe("refit10~damped0.3:kappa"))
    steps = make_budget(foreseen={"pruning by refit": 20.0, "measuring curves of refit": 60.0})
    assert price_drafts([finer], 0, situate(exact=False), steps).seconds == 60, "curves are the same for any steps"
    assert price_drafts([finer], 128, situate(exact=False), steps).seconds == 60 + 40
    assert split_work(Recipe(method="alps", refit=False)) == [Recipe(method="alps", refit=False, statistics="dense")]


def test_the_longest_time_counts_and_none_of_what_breaks() -> None:
    paces: Paces = {"a": 2.0}
    assert join_paces(paces, {"a": 1.0, "b": 3.0}) is paces == {"a": 2.0, "b": 3.0}
    with time_work(paces, "c", 10):
        pass
    assert 0 <= paces["c"] < 0.1
    with pytest.raises(ValueError, match="broke"), time_work(paces, "d"):
        raise ValueError("broke")
    assert "d" not in paces
    order = order_all(Recipe(method="wanda", refit=False), {"a": 1}, sparsity=0.4, predicted_kl=0.1, polish=512)
    assert name_pruning(order) == "pruning by wanda+polish512"


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
    slow = PACES | {"measuring a token": 0.1, "pruning by refit~sequential": 71.0}
    prices = describe_prices(CONFIG, make_budget(paces=slow))
    assert prices == (
        "Prices: probe 10 s for each plan on half of the validation text, 30 s on all of it, and what its recipe "
        "takes; statistics sequential 50 s, stages 130 s more; predict 0, or 50 s where curves are not known; all "
        "others 0. Seconds, the most so far: pruning by refit~sequential 70."
    ), "3.0 s of curves are not worth a word"
    slow["measuring curves of refit"] = 310.0
    assert "; predict 0, or 310 s where" in describe_prices(CONFIG, make_budget(paces=slow))
    assert describe_prices(CONFIG, make_budget(1000, paces=slow | {"measuring a token": 0.05})) == (
        "Prices: probe 128 tokens for each plan on half of the validation text, 256 tokens (10 s) on all of it, and "
        "what its recipe takes; predict 0, or 512 tokens (310 s) where curves are not known; all "
        "others 0. Seconds, the most so far: measuring curves of refit 310; pruning by "
        "refit~sequential 70."
    ), "tokens, where they are limited, and seconds"
    assert describe_prices(CONFIG, make_budget()).startswith("Prices: probe 128 tokens for"), "a pace nobody knows"
    assert describe_prices(CONFIG, make_budget(paces=PACES)).startswith("Prices: probe under 10 s for each plan")
    for few in ({}, PACES):
        assert describe_prices(CONFIG, make_budget(paces=few)).endswith("so far: nothing took 10 yet.")
    left_now = {"tokens_left": 744.0}
    toolbox = Toolbox(lambda: nullcontext([]), calls=3, seconds=9, prices=prices, list_left=lambda: left_now)
    said = planner_messages(situation, toolbox)[1].text
    assert left in said
    assert f'Tools: "calls_left": 3, "seconds_left": 9, "tokens_left": 744\n{prices}\n\nPlan round 1.' in said


def test_of_cuts_only_what_there_is_has_a_price() -> None:
    cutting = CONFIG.model_copy(update={"target_size": 0.8})
    prices = describe_prices(cutting, TokenBudget(cutting, 0, 0))
    assert "all of it, and the fit of its cut; all others 0." in prices
