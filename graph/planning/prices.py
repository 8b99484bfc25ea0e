"""What rounds and instruments take, in tokens and in seconds as measured or foreseen, and what is left of both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graph.config import RunConfig
from graph.planning.budget import TokenBudget
from graph.planning.new_texts import count_new_tokens
from graph.planning.plan import Plan
from graph.planning.situation import Situation
from tools.instruments.probed import find_known
from tools.plans.costs import (
    count_calibration,
    count_fit,
    count_in_order,
    count_polish,
    count_profile,
    count_walk,
    count_weights,
)
from tools.plans.paces import MEASURING, Paces, name_measuring_curves, name_pruning
from tools.results.schema import Usage

LEAST_TOLD = 10
"""Seconds below which a planner is not told of them: no round hangs on so few."""


@dataclass(frozen=True)
class Price:
    """What a call of an instrument takes."""

    tokens: int
    seconds: float
    """As far as work like it was measured in this run, or foreseen; the rest counts nothing."""


def price_drafts(
    plans: Sequence[Plan], tokens: int, situation: Situation, budget: TokenBudget, others: int = 0
) -> Price:
    """Of carrying out plans, which are weighed, and measuring each on so many tokens, and other weights on `others`.

    Curves that are known cost nothing, nor do orders that were probed on as many tokens in this round. Of what a plan
    takes to be shared out and pruned, nothing counts twice. Raises ImpossiblePlan.
    """
    costs, paces = dict[str, int](), budget.expected
    known = find_known(budget.probed, tokens)
    plans = [plan for plan in plans if situation.orders.draft(plan).id not in known]
    measured = len(plans) * tokens + others
    seconds = measured * paces.get(MEASURING, 0.0)
    for plan in plans:
        order = situation.orders.draft(plan)
        costs |= budget.list_costs(plan, order if tokens else None)
        seconds += paces.get(name_pruning(order), 0.0) if tokens else 0.0
    curves = {name_measuring_curves(recipe) for plan in plans for recipe in situation.orders.list_unknown(plan)}
    seconds += sum(paces.get(name, 0.0) for name in curves)
    return Price(measured + budget.count_new(costs), seconds)


def refuse_dear(price: Price, budget: TokenBudget, seconds_left: float) -> None:
    """Raises ValueError in one line where a call takes more tokens than are left beside the trial that follows it, or
    more seconds than are left."""
    tokens_left = max(budget.left - budget.trial, 0)
    if price.tokens <= tokens_left and price.seconds <= seconds_left:
        return
    left = f"{tokens_left:,.0f} tokens are left beside the round's trial" if tokens_left < math.inf else ""
    time = f"{seconds_left:.0f} s are left" if seconds_left < math.inf else ""
    raise ValueError(
        f"not begun: this call takes {price.tokens:,} tokens and {price.seconds:.0f} s or more (as far as is known); "
        f"{' and '.join(filter(None, [left, time]))}"
    )


def describe_costs(config: RunConfig, budget: TokenBudget | None) -> str:
    """The tokens that are left and what takes them; nothing where they are not limited."""
    if budget is None or budget.left == math.inf:
        return ""
    weighted = count_weights(config) + count_calibration(config)
    costs = [
        f"a trial takes {budget.trial:,}",
        "a probe as many as it measures on, for each plan",
        f"statistics sequential {count_in_order(['sequential'], config):,} more, stages "
        f"{count_in_order(['stages'], config):,}, in a probe and in a trial",
        *([] if config.text else [f"tokens weighted {weighted:,} more, once for each text"]),
        f"curves method {count_walk(config):,} more, once for each method",
        f"a new profile, reprofile{' or questions in a mix' if config.mixes_questions else ''}, "
        f"{count_profile(config):,}",
    ]
    if config.text and config.goal_tokens:
        costs.append(f"each of new_texts {count_new_tokens(config, 1, accepted=True):,}")
    if config.polish_tokens:
        costs.append(f"polish {count_polish(config, config.polish_tokens):,} more, in a probe and in a trial")
    return (
        f" Budget: {budget.left:,.0f} of {config.max_evaluated_tokens:,} tokens through the model are left, "
        f"{budget.trials_left:.0f} trials without extras: {'; '.join(costs)}. Plans beyond it are refused."
    )


def describe_spending(config: RunConfig, seconds: float, usage: Usage) -> str:
    """Seconds and the agents' dollars and tokens that are left, of those that are limited."""
    spent = usage.input_tokens + usage.output_tokens
    left = [
        f"{max(config.max_seconds - seconds, 0):.0f} of {config.max_seconds:g} seconds" if config.max_seconds else "",
        f"${max(config.max_agent_cost - usage.cost, 0):.2f} of ${config.max_agent_cost:g} for agents"
        if config.max_agent_cost
        else "",
        f"{max(config.max_agent_tokens - spent, 0):,} of {config.max_agent_tokens:,} tokens for agents"
        if config.max_agent_tokens
        else "",
    ]
    told = ", ".join(filter(None, left))
    return f" Left: {told}." if told else ""


def describe_prices(config: RunConfig, budget: TokenBudget, groups: int) -> str:
    """What each instrument takes, slopes of so many groups among them, and how long parts of it took; the same for all
    calls of a round."""
    every, half = config.validation_tokens, config.half_tokens
    lines = [
        f"Prices in tokens: probe {half:,} for each plan on half of the validation text, {every:,} on all of it, and "
        "what its recipe takes",
        f"predict 0, or {count_walk(config):,} where curves are not known",
        f"slopes {groups * half:,} on half of the text",
        f"swap {half:,} for each selector",
        "search what its probes take",
        f"fit {count_fit(config):,}",
        "all others 0",
    ]
    measured = _describe_paces(budget.paces, half) or f"nothing took {LEAST_TOLD} yet"
    untried = {what: seconds for what, seconds in budget.foreseen.items() if what not in budget.paces}
    foreseen = _describe_paces(untried, half)
    return f"{'; '.join(lines)}. Seconds, the most so far: {measured}{foreseen and f'; foreseen: {foreseen}'}."


def _describe_paces(paces: Paces, half: int) -> str:
    """One digit of tens of seconds and more: a machine that is a little slower is told of, and plans, the same."""
    shown = {what: seconds for what, seconds in paces.items() if what != MEASURING}
    if MEASURING in paces:
        shown["measuring half of the text"] = half * paces[MEASURING]
    return ", ".join(
        f"{what} {float(f'{seconds:.0e}'):g}" for what, seconds in sorted(shown.items()) if seconds >= LEAST_TOLD
    )
