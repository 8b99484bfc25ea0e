"""What rounds and instruments take, in tokens and in seconds as measured or foreseen, and what is left of both."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from graph.config import RunConfig
from graph.planning.budget import TokenBudget
from graph.planning.new_texts import count_new_tokens
from graph.planning.plan import Plan
from graph.planning.situation import Situation
from tools.base.words import round_seconds
from tools.instruments.probed import count_rest, find_known
from tools.plans.costs import (
    count_cut_fit,
    count_in_order,
    count_polish,
    count_profile,
    count_walk,
    list_order_costs,
)
from tools.plans.layer_profile import LayerProfile
from tools.plans.paces import (
    MEASURING,
    Paces,
    expect_curves,
    expect_pruning,
    find_longest_curves,
    name_measuring_curves,
    name_pruning,
)
from tools.plans.selectors import select_layers
from tools.plans.work_order import WorkOrder, prune_alone
from tools.results.schema import Usage

LEAST_TOLD = 10
"""Seconds below which a planner is not told of them: no round hangs on so few."""


@dataclass(frozen=True)
class Price:
    """What a call of an instrument takes."""

    tokens: int
    seconds: float
    """As far as work like it was measured in this run, or foreseen; the rest counts nothing."""
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
    costs, paces = dict[str, int](), budget.expected
    pace = paces.get(MEASURING, 0.0)
    known = find_known(budget.probed, tokens)
    only = alone or [""] * len(plans)
    orders = [_prune_alone(plan, selector, situation) for plan, selector in zip(plans, only, strict=True)]
    jobs = {order.id: (plan, order) for plan, order in zip(plans, orders, strict=True) if order.id not in known}
    measured = sum(count_rest(budget.probed, order, tokens) for order in jobs)
    seconds = measured * pace
    for plan, order in jobs.values():
        costs |= budget.list_costs(plan, order if tokens else None)
        if tokens:
            whole = _expect_pruning(situation.orders.draft(plan), budget.config, paces)
            seconds += whole * (_count_share(order, situation.layers) if order.alone else 1.0)
    unknown = (recipe for plan, _ in jobs.values() for recipe in situation.orders.list_unknown(plan))
    curves = {name_measuring_curves(recipe): recipe for recipe in unknown}
    walk = count_walk(budget.config) * pace
    seconds += sum(expect_curves(recipe, paces, walk) for recipe in curves.values())
    spared = any(not order.alone for _, order in jobs.values())  # by the trial that such a plan may have
    return Price(measured + budget.count_new(costs), seconds, tokens if spared else 0)


def _prune_alone(plan: Plan, selector: str, situation: Situation) -> WorkOrder:
    return prune_alone(situation.orders.draft(plan), selector, situation.layers)


def _count_share(order: WorkOrder, layers: Sequence[LayerProfile]) -> float:
    """The share of all layers' work that those take which an order prunes: scores grow with a layer's weights, fits
    with these times its inputs."""
    fits = any(x.recipe.changes_survivors for x in order.layers.values())
    work = {layer.name: layer.weights * (layer.inputs or 1 if fits else 1) for layer in layers}
    pruned = set(select_layers(order.alone, layers))
    return sum(x for name, x in work.items() if name in pruned) / max(sum(work.values()), 1)


def _expect_pruning(order: WorkOrder, config: RunConfig, paces: Paces) -> float:
    """Seconds of carrying an order out. Where none like it was measured or foreseen: those of its dearest method by the
    dense model's statistics, and what it puts through the model as fast as text is measured on."""
    if (known := paces.get(name_pruning(order))) is not None:
        return known
    recipes = {layer.recipe for layer in order.layers.values()}
    dearest = max((expect_pruning(recipe, paces) for recipe in recipes), default=0.0)
    return dearest + sum(list_order_costs(order, config).values()) * paces.get(MEASURING, 0.0)


def refuse_dear(price: Price, budget: TokenBudget, seconds_left: float) -> None:
    """Raises ValueError in one line where a call takes more tokens than are left beside the trial that follows it, or
    more seconds than are left, of which there may be none: what takes none can be had all the same."""
    seconds_left = max(seconds_left, 0.0)
    tokens_left = max(budget.left - budget.count_rest(price.each), 0)
    if price.tokens <= tokens_left and price.seconds <= seconds_left:
        return
    takes, left = list[str](), list[str]()
    if tokens_left < math.inf:
        takes.append(f"{price.tokens:,} tokens")
        left.append(f"{tokens_left:,.0f} tokens are left beside the round's trial")
    if seconds_left < math.inf:
        takes.append(f"{round_seconds(price.seconds):g} s or more (as far as is known)")
        left.append(f"{round_seconds(seconds_left):g} s are left")
    raise ValueError(f"not begun: this call takes {' and '.join(takes)}; {' and '.join(left)}")


def describe_price(price: Price, budget: TokenBudget) -> str:
    """What a call takes: tokens where they are limited, seconds as far as they are known."""
    return _show_price(price.tokens, price.seconds, limited=budget.left < math.inf, pace=budget.expected.get(MEASURING))


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
            f"statistics sequential {count_in_order(['sequential'], config):,} more, stages "
            f"{count_in_order(['stages'], config):,}, for each plan once, probed or tried",
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


def describe_prices(config: RunConfig, budget: TokenBudget) -> str:
    """What each instrument takes, and how long parts of it took; the same for all calls of a round. In tokens where
    these are limited, and in seconds."""
    half, paces = config.half_tokens, budget.expected
    show = partial(_show_price, limited=budget.left < math.inf, pace=paces.get(MEASURING))
    in_order = [f"{kind} {show(count_in_order([kind], config))}" for kind in ("sequential", "stages")]
    probe = (
        f"Prices: probe {show(half)} for each plan on half of the validation text, {show(config.validation_tokens)} on "
        f"all of it, and {'the fit of its cut' if config.takes_parts else 'what its recipe takes'}"
    )
    of_weights = [
        *([] if budget.left < math.inf else [f"statistics {', '.join(in_order)} more"]),  # told in tokens elsewhere
        f"predict 0, or {show(count_walk(config), find_longest_curves(paces))} where curves are not known",
    ]
    lines = [probe, *([] if config.takes_parts else of_weights), "all others 0"]
    measured = _describe_paces(budget.paces) or f"nothing took {LEAST_TOLD} yet"
    foreseen = _describe_paces({what: seconds for what, seconds in paces.items() if what not in budget.paces})
    return f"{'; '.join(lines)}. Seconds, the most so far: {measured}{foreseen and f'; foreseen: {foreseen}'}."


def _show_price(tokens: int, seconds: float = 0.0, *, limited: bool, pace: float | None) -> str:
    """`1,152 tokens (30 s)`: tokens where they are limited, or nobody knows how long one takes; seconds from
    `LEAST_TOLD` up, or where they are all that is limited."""
    seconds = max(seconds, tokens * (pace or 0.0))
    time = f"{round_seconds(seconds):g} s" if seconds >= LEAST_TOLD else ""
    if limited or pace is None:
        return f"{tokens:,} tokens{time and f' ({time})'}"
    return time or f"under {LEAST_TOLD} s"


def _describe_paces(paces: Paces) -> str:
    """Of what took, or takes, so long, what is of a kind together; measuring is told with its prices."""
    told: dict[str, list[str]] = {}
    for what, seconds in sorted(paces.items()):
        if what != MEASURING and seconds >= LEAST_TOLD:
            kind = found[0] if (found := re.match(r".*? (?:by|of) ", what)) else ""
            told.setdefault(kind, []).append(f"{what.removeprefix(kind)} {round_seconds(seconds):g}")
    return "; ".join(f"{kind}{', '.join(named)}" for kind, named in told.items())
