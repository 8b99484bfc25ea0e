"""A planner without the rule's list and without anybody in its stead."""

import dataclasses
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from graph.config import RunConfig
from graph.llm.ladder import AgentError
from graph.nodes.plan import explain_end
from graph.planning.choose import choose_plan
from graph.planning.refinements import STRONG
from graph.runs.session import Session
from graph.state import Trial
from tests.openai_server import OpenAIServer
from tests.situations import make_situation, make_trial
from tools.results.schema import Usage

REACHED = make_trial(1, "accept", 0.45, STRONG)


def choose(server: OpenAIServer, name: str, directory: Path, *trials: Trial, unaided: bool) -> tuple[object, str]:
    config = RunConfig(planner=server.planner(name), planner_unaided=unaided, planner_calls=0)
    situation = dataclasses.replace(make_situation(*trials), config=config)
    plan, _, planner = choose_plan(situation, Usage(), Session(directory, lambda _event: None, 0.0), config)
    return plan, explain_end(situation, planner)


@pytest.mark.parametrize("unaided", [False, True])
def test_it_is_not_shown_what_the_rule_would_try(tmp_path: Path, unaided: bool) -> None:
    plan = {"sparsity": 0.45, "recipe": {"method": "refit", "gamma": "clipped"}}
    with OpenAIServer([plan]) as server:
        made, _ = choose(server, "fine", tmp_path, REACHED, unaided=unaided)
        asked = json.dumps(server.requests[-1].body)
    assert made is not None and ("Untried, each one lever" in asked) is not unaided


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
