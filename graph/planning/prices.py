"""What rounds and instruments take of the tokens, and what is left of these, of seconds and of dollars."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graph.config import RunConfig
from graph.planning.budget import TokenBudget
from graph.planning.plan import Plan
from graph.planning.recipes import count_new_tokens
from graph.planning.situation import Situation
from tools.base.words import round_seconds
from tools.instruments.probed import count_rest, find_known
from tools.plans.costs import count_cut_fit, count_in_order, count_polish, count_profile, count_walk
from tools.plans.work_order import WorkOrder, prune_alone
from tools.results.schema import Usage


@dataclass(frozen=True)
class Price:
    """What a call of an instrument takes."""

    tokens: int
    each: int = 0
    """Tokens that each plan is measured on, and need not be by its trial."""


def price_drafts(
    plans: Sequence[Plan],
    tokens: int,
    situation: Situation,
    budget: TokenBudget,
    alone: Sequence[str] = (),
) -> Price:
    """Of carrying out plans, which are weighed, and measuring each on so many tokens.

    Each is carried out on the layers of its selector `alone`, on all where there is none. Curves that are known cost
    nothing, nor do tokens on which orders were probed in this round. Of what a plan takes to be shared out and pruned,
    nothing counts twice. Raises ImpossiblePlan.
    """
    costs, known = dict[str, int](), find_known(budget.probed, tokens)
    only = alone or [""] * len(plans)
    orders = [_prune_alone(plan, selector, situation) for plan, selector in zip(plans, only, strict=True)]
    jobs = {order.id: (plan, order) for plan, order in zip(plans, orders, strict=True) if order.id not in known}
    measured = sum(count_rest(budget.probed, order, tokens) for order in jobs)
    for plan, order in jobs.values():
        costs |= budget.list_costs(plan, order if tokens else None)
    spared = any(not order.alone for _, order in jobs.values())  # by the trial that such a plan may have
    return Price(measured + budget.count_new(costs), tokens if spared else 0)


def _prune_alone(plan: Plan, selector: str, situation: Situation) -> WorkOrder:
    return prune_alone(situation.orders.draft(plan), selector, situation.layers)


def refuse_dear(price: Price, budget: TokenBudget, seconds_left: float) -> None:
    """Raises ValueError in one line where a call takes more tokens than are left beside the trial that follows it, or
    where no time is left: what takes no tokens can be had all the same."""
    tokens_left = max(budget.left - budget.count_rest(price.each), 0)
    if price.tokens > tokens_left:
        raise ValueError(
            f"not begun: this call takes {price.tokens:,} tokens; {tokens_left:,.0f} are left beside the round's trial"
        )
    if price.tokens and seconds_left <= 0:
        raise ValueError("not begun: no time is left")


def describe_costs(config: RunConfig, budget: TokenBudget | None) -> str:
    """The tokens that are left and what takes them; nothing where they are not limited."""
    if budget is None or budget.left == math.inf:
        return ""
    cuts = [
        f"a trial takes {budget.trial:,}",
        f"the fit of a cut {count_cut_fit(config):,} more, of heads and neurons {count_cut_fit(config, 2):,}",
    ]
    costs = (
        cuts
        if config.takes_parts
        else [
            f"a trial takes {budget.trial:,} and what its recipe adds",
            "a probe counts towards its plan's own trial",
            f"statistics sequential {count_in_order(['sequential'], config):,} more, for each plan "
            "once, probed or tried",
            f"curves method {count_walk(config):,} more, once for each method, gamma"
            f"{', mix' if config.text else ''} and damping",
            f"a new profile, reprofile{' or questions in a mix' if config.mixes_questions else ''}, "
            f"{count_profile(config):,}",
        ]
    )
    if config.text and config.goal_tokens:
        costs.append(f"each of new_texts {count_new_tokens(config, 1, accepted=True):,}")
    if config.polish_tokens:
        costs.append(f"polish {count_polish(config, config.polish_tokens):,} more, for each plan once, probed or tried")
    return (
        f" Budget: {budget.left:,.0f} of {config.max_evaluated_tokens:,} tokens through the model are left: "
        f"{'; '.join(costs)}. Plans beyond it are refused; with less than a trial the run ends."
    )


def describe_spending(config: RunConfig, seconds: float, usage: Usage) -> str:
    """Seconds and the agents' dollars and tokens that are left, of those that are limited."""
    spent = usage.input_tokens + usage.output_tokens
    seconds_left = max(config.max_seconds - seconds, 0)
    left = [
        f"{round_seconds(seconds_left):g} of {config.max_seconds:g} seconds (what begins in time is finished)"
        if config.max_seconds
        else "",
        f"${max(config.max_agent_cost - usage.cost, 0):.2f} of ${config.max_agent_cost:g} for agents"
        if config.max_agent_cost
        else "",
        f"{max(config.max_agent_tokens - spent, 0):,} of {config.max_agent_tokens:,} tokens for agents"
        if config.max_agent_tokens
        else "",
    ]
    told = ", ".join(filter(None, left))
    return f" Left: {told}." if told else ""


def describe_prices(config: RunConfig) -> str:
    """The tokens that each instrument takes; the same for all calls of a round."""
    probe = (
        f"Prices in tokens: probe {config.half_tokens:,} for each plan on half of the validation text, "
        f"{config.validation_tokens:,} on all of it, and "
        f"{'the fit of its cut' if config.takes_parts else 'what its recipe takes'}"
    )
    of_weights = [
        f"statistics sequential {count_in_order(['sequential'], config):,} more",
        f"predict 0, or {count_walk(config):,} where curves are not known",
    ]
    return f"{'; '.join([probe, *([] if config.takes_parts else of_weights), 'all others 0'])}."
