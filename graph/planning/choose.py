"""Who plans a round: the planner's model, the rule, or the rule in the model's stead."""

from typing import NamedTuple

from graph.config import HEURISTIC, RunConfig
from graph.llm.ladder import AgentError, DeadEnd
from graph.llm.models import open_model
from graph.llm.quoting import quote_data
from graph.llm.spending import Account, CapReached
from graph.llm.toolbox import Toolbox
from graph.planning.brief import advise_against, plan_with_chat
from graph.planning.new_texts import check_new_texts
from graph.planning.orders import refuse_above_target
from graph.planning.plan import Plan
from graph.planning.rule import find_relief, plan_by_rule
from graph.planning.situation import Situation
from graph.runs.session import Session
from tools.results.schema import Usage


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
