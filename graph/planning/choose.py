"""Who plans a round: the planner's model, the rule, or the rule in the model's stead."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_core.tools import BaseTool
from langgraph.store.base import BaseStore
from pydantic import BaseModel

from graph.config import HEURISTIC, RunConfig
from graph.llm.ladder import AgentError, DeadEnd
from graph.llm.models import open_model
from graph.llm.quoting import quote_data
from graph.llm.spending import Account, CapReached
from graph.llm.toolbox import ToolAnswer, Toolbox, ToolRecord
from graph.memory.lessons import search_lessons
from graph.planning.brief import advise_against, describe_lesson, plan_with_chat, recount_trial
from graph.planning.budget import TokenBudget
from graph.planning.orders import measure_with, refuse_above_target
from graph.planning.past import MAX_PROBES, spell_out_plan, take_latest
from graph.planning.plan import Plan
from graph.planning.prices import describe_prices, price_drafts, refuse_dear
from graph.planning.recipes import check_new_texts
from graph.planning.rule import find_relief, list_candidates, plan_by_rule
from graph.planning.situation import Situation
from graph.runs.session import OpenBench, Session, do_once
from graph.state import State, pair_with_kept
from tools.base.settings import KEPT
from tools.instruments.probed import PastProbe, Probed, count_probes
from tools.plans.layer_profile import MOST_SELECTOR, group_layers
from tools.plans.work_order import WorkOrder, prune_alone
from tools.results.schema import Usage

if TYPE_CHECKING:
    from tools.instruments.functions import Draft, Round
    from tools.workbench.bench import Workbench


def weigh_in_bounds(plan: Plan, situation: Situation) -> Plan:
    """What a planner says, weighed by the lessons, whatever it says. Raises ValueError with a reason for it."""
    refuse_above_target(plan, situation.config)
    if plan.sparsity < situation.dense.sparsity:
        raise ValueError(
            f"sparsity {plan.sparsity:g} prunes nothing, for more weights are zero already; plan a step towards "
            f"{situation.config.target_sparsity:g}"
        )
    return situation.orders.weigh(plan)


class ChosenPlan(NamedTuple):
    """A plan, the tokens spent on agents so far, and who made it."""

    plan: Plan | None
    """None when a rule has nothing left to try, or an unaided planner gave no usable plan."""
    usage: Usage
    planner: str


def choose_plan(
    situation: Situation, usage: Usage, session: Session, caps: RunConfig, toolbox: Toolbox | None = None
) -> ChosenPlan:
    """The planner's plan, or its fallback's, where it failed or had better be relieved.

    Raises AgentError without a fallback, and CapReached when the agents have spent what `caps` allows.
    """
    config = situation.config
    if config.planner == HEURISTIC:
        return ChosenPlan(plan_by_rule(situation), usage, HEURISTIC)
    if config.planner_fallback == HEURISTIC and (reason := find_relief(situation)):
        relief = plan_by_rule(situation)
        if relief is not None:
            session.emit("note", text=f"{reason}: the rule plans this round")
            return ChosenPlan(relief, usage, HEURISTIC)
    account = Account("planner", session, usage, config, caps, situation.iteration)

    def check(candidate: Plan) -> None:
        check_new_texts(candidate, config, situation.texts_left)
        situation.orders.draft(weigh_in_bounds(candidate, situation))
        if expense := situation.find_expense(candidate):
            raise ValueError(expense)
        if broken := situation.find_broken(candidate):
            raise ValueError(
                f"this is the plan of round {broken.iteration}, which broke while it was carried out and would again: "
                f"{quote_data(broken.reason, 300)}; plan another method, or less"
            )

    try:
        model = open_model(config.planner, config, session.progress)
        plan = account.converse(
            lambda: plan_with_chat(
                situation,
                model,
                on_call=account.keep_call,
                check=check,
                advise=lambda candidate: advise_against(candidate, situation),
                keep_prompt=account.keep_prompt,
                toolbox=toolbox,
                carry_out=account.carry_out,
                meter=account,
            )
        )
    except CapReached:
        raise
    except AgentError as error:
        if config.planner_unaided and isinstance(error, DeadEnd):
            session.warn(f"{error}; nobody plans in its stead")
            return ChosenPlan(None, account.usage, config.planner)
        if config.planner_fallback == "none":
            raise
        session.warn(f"{error}; the fallback planner ({config.planner_fallback}) plans this round")
        return ChosenPlan(plan_by_rule(situation), account.usage, HEURISTIC)
    return ChosenPlan(plan, account.usage, config.planner)


MAX_NEW_PROBES = 2 * MAX_PROBES
"""Probes of the round that was planned last, all of which its reflector compares."""


class Measured(BaseModel):
    """What a tool answered, and what had been evaluated with it."""

    answer: ToolAnswer
    evaluated_tokens: int
    counted: list[str]
    probed: list[Probed]


def open_toolbox(
    open_bench: OpenBench,
    situation: Situation,
    state: State,
    session: Session,
    store: BaseStore | None,
    budget: TokenBudget,
) -> Toolbox | None:
    """The instruments of a chat planner and their budget of this round; None where it has none."""
    config, limit = situation.config, situation.config.max_seconds
    if not config.offers_instruments:
        return None

    def recall(query: str) -> list[str]:
        return [describe_lesson(lesson, config) for lesson in search_lessons(store, config, query)] if store else []

    def recount(n: int) -> list[str]:
        """The latest first: an answer is cut off at its end."""
        return [recount_trial(trial, before) for trial, before in reversed(pair_with_kept(situation.trials)[-n:])]

    def suggest(n: int) -> list[dict[str, Any]]:
        return [spell_out_plan(plan) for plan in list_candidates(situation, n)]

    def count_seconds() -> float:
        return min(toolbox.time_left, limit - session.seconds if limit else math.inf)

    def admit(drafts: Sequence["Draft"], tokens: int) -> None:
        plans = _weigh_possible(drafts, situation)
        price = price_drafts([plan for plan, _ in plans], tokens, situation, budget, [x for _, x in plans])
        refuse_dear(price, budget, count_seconds())

    @contextmanager
    def offer() -> Iterator[Sequence[BaseTool]]:
        with open_bench() as bench:
            from tools.instruments.agent_tools import make_planner_tools  # torch again, imported by now

            round_ = _describe_round(bench, situation, state, session, budget, admit, count_seconds)
            candidates = None if config.planner_unaided else suggest
            yield make_planner_tools(
                round_, history=recount, recall=recall, candidates=candidates, cuts=config.takes_parts
            )

    def carry_out(call: Callable[[], ToolAnswer]) -> ToolAnswer:
        def measure() -> Measured:
            answer = call()
            return Measured(
                answer=answer,
                evaluated_tokens=budget.tokens,
                counted=budget.counted,
                probed=budget.probed,
            )

        kept = do_once("tool", measure, Measured)
        budget.tokens = kept.evaluated_tokens
        if kept.counted is not None:
            budget.counted = kept.counted
        budget.probed = kept.probed
        return kept.answer

    def tell(record: ToolRecord) -> None:
        session.emit("tool", iteration=situation.iteration, **record.model_dump())

    toolbox = Toolbox(
        offer,
        calls=config.planner_calls,
        seconds=min(config.planner_seconds, max(limit - situation.seconds, 0.0) if limit else math.inf),
        on_tool=tell,
        carry_out=carry_out,
        prices=describe_prices(config),
        list_left=lambda: {"tokens_left": max(budget.left, 0)} if budget.left < math.inf else {},
        beside={} if config.takes_parts else {"alone": {"type": "string", "maxLength": MOST_SELECTOR, "default": ""}},
    )
    return toolbox


def note_probes(state: State, budget: TokenBudget) -> list[PastProbe]:
    """The probes of this round and the latest before them, for the rounds to come, and the best ones that these are
    compared with."""
    if not budget.probed:
        return state.probes
    from tools.instruments.comparisons import sum_up_probes  # torch, imported by now

    new = sum_up_probes(budget.probed, state.iteration, count_probes(state.probes))
    return take_latest([*state.probes, *new], max(MAX_PROBES, min(len(new), MAX_NEW_PROBES)))


def _weigh(draft: "Draft", situation: Situation) -> Plan:
    """The plan that a draft is. Raises ValueError with a reason for the planner."""
    plan = Plan.model_validate(draft.model_dump())
    weighed = weigh_in_bounds(plan, situation)
    prune_alone(situation.orders.draft(weighed), draft.alone, situation.layers)
    return weighed


def _weigh_possible(drafts: Sequence["Draft"], situation: Situation) -> list[tuple[Plan, str]]:
    """The plans of those drafts that can be carried out, each with the layers that it prunes alone."""
    plans = []
    for draft in drafts:
        with suppress(ValueError):
            plans.append((_weigh(draft, situation), draft.alone))
    return plans


def _describe_round(
    bench: "Workbench",
    situation: Situation,
    state: State,
    session: Session,
    budget: TokenBudget,
    admit: Callable[[Sequence["Draft"], int], None],
    count_seconds: Callable[[], float],
) -> "Round":
    """What the instruments work on."""
    from tools.instruments.functions import Round

    measure = measure_with(bench, state.profile, state.current, session.progress)

    def resolve(draft: "Draft") -> WorkOrder:
        weighed = _weigh(draft, situation)  # refused before it is paid for
        budget.spend("measuring its curves", budget.list_costs(weighed, None))
        return situation.orders.resolve(weighed, measure)

    def price(draft: "Draft") -> str:
        plan = _weigh(draft, situation)
        return f"{price_drafts([plan], budget.trial, situation, budget).tokens:,} tokens"

    return Round(
        bench=bench,
        profile=state.profile,
        resolve=resolve,
        progress=session.progress,
        admit=admit,
        price=price,
        in_time=lambda: count_seconds() > 0,
        present=state.current,
        book=budget.book,
        keep=state.kept[: KEPT - 1],  # the best probe takes the room of a trial
        probed=budget.probed,
        past=state.probes,
        groups={selector: [x.name for x in group] for selector, group in group_layers(situation.layers).items()},
    )
