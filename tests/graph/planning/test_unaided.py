"""A planner without the rule's list and without anybody in its stead."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from graph.config import RunConfig
from graph.llm.ladder import AgentError
from graph.llm.toolbox import Toolbox, ToolCall
from graph.nodes.plan import explain_end
from graph.planning.brief import planner_messages
from graph.planning.budget import open_budget
from graph.planning.choose import choose_plan, open_toolbox
from graph.planning.plan import Plan
from graph.planning.refinements import STRONG
from graph.planning.rule import list_candidates, plan_by_rule
from graph.planning.situation import Situation
from graph.runs.session import Session
from graph.state import State
from tests.openai_server import OpenAIServer
from tests.situations import make_patterned, make_situation, make_trial
from tools.results.schema import Usage
from tools.results.trial import Trial

REACHED = make_trial(1, "accept", 0.45, STRONG)


def choose(server: OpenAIServer, name: str, directory: Path, *trials: Trial, unaided: bool) -> tuple[object, str]:
    config = RunConfig(planner=server.planner(name), planner_unaided=unaided, planner_calls=0)
    situation = dataclasses.replace(make_situation(*trials), config=config)
    plan, _, planner = choose_plan(situation, Usage(), Session(directory, lambda _event: None, 0.0), config)
    return plan, explain_end(situation, planner)


def open_tools(situation: Situation, directory: Path) -> Toolbox:
    state, session = State(config=situation.config), Session(directory, lambda _event: None, 0.0)
    bench: Any = SimpleNamespace()
    toolbox = open_toolbox(lambda: nullcontext(bench), situation, state, session, None, open_budget(state))
    assert toolbox is not None
    return toolbox


@pytest.mark.parametrize("unaided", [False, True])
def test_the_rules_list_comes_on_request_and_not_to_an_unaided_planner(tmp_path: Path, unaided: bool) -> None:
    """A planner without tools hears nothing of it, and no prompt shows it."""
    config = RunConfig(planner="openai:m@http://127.0.0.1:1/v1", planner_unaided=unaided)
    situation = dataclasses.replace(make_situation(REACHED), config=config)
    toolbox = open_tools(situation, tmp_path)
    assert ("candidates" in toolbox.names) is not unaided
    told, alone = ("".join(m.text for m in planner_messages(situation, tools)) for tools in (toolbox, None))
    assert ("`candidates(n)`: free: a rule's untried plans" in told) is not unaided
    assert ("`recall(query)`" in told, "candidates" in alone) == (True, False)
    answer = toolbox.run(ToolCall("candidates", {"n": 2}), str)
    if unaided:
        assert "there is no such tool" in answer
        return
    given = json.loads(answer.split("\n")[1])["plans"]
    plans = [Plan.model_validate(plan) for plan in given]
    assert [plan.recipe.statistics for plan in plans] == ["sequential", "dense"]
    assert plans[0] == Plan(**given[0]) == list_candidates(situation, 1)[0].model_copy(update={"multipliers": {}})


def test_below_the_target_the_list_has_the_rules_next_step_and_what_it_tries_at_the_target() -> None:
    start = make_situation()
    first, whole, *levers = list_candidates(start, 9)
    assert first == plan_by_rule(start) and list_candidates(start, 1) == [first]
    target = start.config.target_sparsity
    assert whole == Plan(sparsity=target, recipe=STRONG, reason="The whole step at once.")
    assert {plan.sparsity for plan in levers} == {target} and len({plan.recipe for plan in levers}) == len(levers)
    both = [plan.recipe for plan in levers[:2]]
    assert [(x.statistics, x.refit_steps, x.gamma) for x in both] == [
        (s, 10, "clipped") for s in ("sequential", "dense")
    ]
    assert not any(plan.adjustments for plan in levers), "of weights that were never pruned nothing is known to be dear"
    patterned = list_candidates(make_patterned(), 3)
    assert [plan.sparsity for plan in patterned] == [0.5] * 3
    assert len({plan.recipe for plan in patterned}) == 3


def test_no_usable_plan_ends_the_run_and_a_broken_endpoint_stops_it(tmp_path: Path) -> None:
    with OpenAIServer() as server:
        assert choose(server, "prose", tmp_path, unaided=True) == (None, "the planner gave no usable plan")
        with pytest.raises(AgentError):
            choose(server, "prose", tmp_path, unaided=False)
        with pytest.raises(AgentError, match="HTTP 401"):
            choose(server, "unauthorized", tmp_path, unaided=True)


def test_there_is_no_fallback_beside_it() -> None:
    with pytest.raises(ValidationError, match="planner_unaided has no fallback; leave planner_fallback at none"):
        RunConfig(planner_unaided=True, planner_fallback="heuristic")
