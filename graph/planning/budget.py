"""The one budget of a run: every token put through the model once the profile is made, and the seconds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from graph.config import RunConfig
from graph.goals.schema import follow_new_texts
from graph.planning.plan import Plan
from graph.planning.recipes import count_new_tokens, fit_to_new_texts, list_recipes, list_unwritten
from graph.state import State
from tools.instruments.probed import Probed, count_rest
from tools.plans.costs import count_profile, list_curve_costs, list_order_costs
from tools.plans.work_order import WorkOrder


@dataclass
class TokenBudget:
    """What was put through the model so far, and what was paid for with it."""

    config: RunConfig
    tokens: int
    trial: int
    """Tokens that a trial takes to be measured."""
    counted: list[str] = field(default_factory=list)
    """Names of the costs (`tools.plans.costs`) that are in `tokens`; none is counted twice."""
    probed: list[Probed] = field(default_factory=list)
    """What was probed in this round."""

    @property
    def left(self) -> float:
        """Tokens that are left for rounds; inf without a cap."""
        limit = self.config.max_evaluated_tokens
        return limit - self.tokens if limit else math.inf

    @property
    def trials_left(self) -> float:
        """How many trials of plans that cost nothing else are left; inf without a cap."""
        return max(self.left, 0) // self.trial if self.left < math.inf else math.inf

    def count_rest(self, probing: int = 0) -> int:
        """Tokens of the cheapest trial that the round can end with, once plans were probed on so many each: that of a
        probed plan, which is measured on the rest alone."""
        return max(0, self.trial - max([probing, *(known.tokens for known in self.probed if not known.alone)]))

    def count_rounds(self, done: int) -> int:
        """How many rounds there may be in all, where so many are done: as many as rounds and tokens allow."""
        return int(min(self.config.max_iterations, done + self.trials_left))

    def count_new(self, costs: Mapping[str, int]) -> int:
        """Tokens of costs that are not counted yet."""
        return sum(tokens for name, tokens in costs.items() if name not in self.counted)

    def pay(self, costs: Mapping[str, int]) -> None:
        """Count costs that are not counted yet, whatever is left."""
        self.tokens += self.count_new(costs)
        self.counted += [name for name in costs if name not in self.counted]

    def spend(self, what: str, costs: Mapping[str, int]) -> None:
        """As `pay`, before it is spent by choice. Raises ValueError when the trial that follows would go over."""
        tokens, left = self.count_new(costs), self.left - self.count_rest()
        if tokens and tokens > left:
            raise ValueError(f"{what} takes {tokens:,} tokens, and {max(left, 0):,.0f} are left beside the trial")
        self.pay(costs)

    def book(self, tokens: int, orders: Sequence[WorkOrder] = ()) -> None:
        """Count the tokens of a probe of these orders, on which none of them was measured yet in the round, all
        together. Raises ValueError as `spend`."""
        costs: dict[str, int] = {}
        for order in orders:
            costs |= list_order_costs(order, self.config)
        before = {known.order: known.tokens for known in self.probed}
        probed = [before.get(order.id, 0) for order in orders if not order.alone]
        rest = self.count_rest(tokens // len(orders) + min(probed) if probed else 0)
        total, left = tokens + self.count_new(costs), self.left - rest
        if total > left:
            raise ValueError(f"a probe of {total:,} tokens is too much: {max(left, 0):,.0f} are left beside the trial")
        self.tokens += tokens
        self.pay(costs)

    def list_costs(self, plan: Plan, order: WorkOrder | None) -> dict[str, int]:
        """What a plan costs beside its trial; of its order too, where that is known."""
        costs: dict[str, int] = {}
        for recipe in list_recipes(plan, self.config):
            costs |= list_curve_costs(recipe, self.config)
        return costs | (list_order_costs(order, self.config) if order else {})

    def refuse(self, plan: Plan, order: WorkOrder, *, drafted: bool = False) -> str:
        """Why there are not the tokens for a plan and its trial; empty where there are.

        An order that is `drafted` by curves that are not those that the plan asks for may be that of an earlier round,
        which the plan's own will hardly be: what is walked through for it is counted again.
        """
        new = list_unwritten(plan, self.config)
        config = follow_new_texts(self.config, new) if new else self.config
        # with its new texts curves are of another mix, and every walk and trial is of more texts
        costs = replace(self, config=config).list_costs(fit_to_new_texts(plan, config) if new else plan, order)
        if drafted:
            costs = {f"{name}, drafted" if order.id in name else name: tokens for name, tokens in costs.items()}
        extra = self.count_new(costs)
        if plan.reprofile:
            extra += count_profile(self.config)
        extra += count_new_tokens(self.config, len(new), accepted=True)
        if new:
            trial = self.trial * len(config.text) // len(self.config.text)
        else:
            trial = count_rest(self.probed, order.id, self.trial)
        if trial + extra <= self.left:
            return ""
        polish = "polish, " if self.config.polish_tokens else ""
        more = "new_texts, " if plan.new_texts else ""
        known = "; or plan what was probed in this round" if self.probed else ""
        more += "a mix with questions, " if plan.recipe.mix and self.config.mixes_questions else ""
        return (
            f"the plan takes {trial + extra:,} tokens through the model, {extra:,} of them beside its trial, and "
            f"{max(self.left, 0):,.0f} are left; plan without what costs them (statistics sequential, "
            f"curves method, {polish}{more}or reprofile){known}"
        )


def open_budget(state: State) -> TokenBudget:
    """The budget as the state has it."""
    return TokenBudget(state.config, state.evaluated_tokens, state.trial_tokens, list(state.counted))


def charge(state: State, plan: Plan, order: WorkOrder) -> dict[str, object]:
    """The update of a state in which a plan was carried out: what of its costs is not counted yet."""
    budget = open_budget(state)
    budget.pay(budget.list_costs(plan, order))
    return {"evaluated_tokens": budget.tokens, "counted": budget.counted}


def can_profile(state: State) -> bool:
    """Whether another profile leaves the tokens of a trial."""
    budget = open_budget(state)
    return count_profile(state.config) + budget.trial <= budget.left


def find_lateness(state: State, seconds: float) -> str:
    """Why a run that has taken so many seconds ends; empty while there is time, and of a replay, which goes by its
    record."""
    most = state.config.max_seconds
    if most and seconds >= most and not state.replay:
        return f"{seconds:.0f} of at most {most:g} seconds were spent"
    return ""
