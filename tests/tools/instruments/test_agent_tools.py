"""The LangChain wrappers answer what the plain functions answer, and hold the run's bounds."""

import json
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import ToolMessage
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ValidationError

from graph.config import RunConfig
from graph.planning.plan import Plan
from tests.situations import ignore, open_orders
from tests.tiny import tiny_settings
from tools.base.errors import ImpossiblePlan
from tools.instruments.agent_tools import make_planner_tools
from tools.instruments.functions import Draft, Round
from tools.workbench.open import use_workbench
from tools.workbench.store import DENSE

WANDA = {"sparsity": 0.3, "recipe": {"method": "wanda", "refit": False, "allocation": "uniform"}}


@pytest.fixture
def instruments(tmp_path: Path, tiny_llama: Path, workbench_closed: None) -> dict[str, BaseTool]:
    with use_workbench(tiny_settings(tiny_llama), tmp_path / "run", pytest.fail, ignore) as bench:
        profile = bench.profile(ignore)
    orders = open_orders(bench, profile, RunConfig(protect=["*.v_proj"]), DENSE)
    round_ = Round(bench, profile, lambda draft: orders(Plan.model_validate(draft.model_dump())), ignore)
    tools = make_planner_tools(
        round_,
        history=lambda n: [f"round {i}" for i in range(n)],
        recall=lambda query: [f"about {query}"],
        candidates=lambda n: [WANDA] * (n - 3),
    )
    return {tool.name: tool for tool in tools}


def call(tool: BaseTool, **arguments: object) -> tuple[dict[str, object], str]:
    """The answer, and the same for people."""
    message = tool.invoke({"type": "tool_call", "id": "1", "name": tool.name, "args": arguments})
    assert isinstance(message, ToolMessage)
    return json.loads(message.text), message.artifact


def test_a_planner_gets_six_and_none_of_them_changes_the_model(instruments: dict[str, BaseTool]) -> None:
    looks = ["inspect_layers", "predict", "probe"]
    assert list(instruments) == [*looks, "history", "recall", "candidates"]
    plan = {**WANDA, "reason": "what a plan has beyond that does no harm", "reprofile": False}
    answer, shown = call(instruments["inspect_layers"], selector="*.v_proj")
    assert shown == f"*.v_proj -> {answer['layers']} layers"
    answer, shown = call(instruments["predict"], plan=plan)
    assert shown == f"30.0% wanda:uniform -> predicted KL {answer['predicted_kl']}"
    answer, shown = call(instruments["predict"], plans=[plan, plan])
    told = f"30.0% wanda:uniform -> predicted KL {answer['plans'][1]['predicted_kl']}"
    assert (answer["plans"][0]["plan"], shown) == ("30.0% wanda:uniform", f"{told}; {told}")
    answer, shown = call(instruments["probe"], plan=plan, tokens=64)
    assert (answer["tokens"], shown) == (64, f"30.0% wanda:uniform -> KL {answer['kl']} on 64 tokens")
    assert call(instruments["history"], n=2) == ({"trials": ["round 0", "round 1"]}, "2 -> 2 trials")
    assert call(instruments["recall"], query="v_proj") == ({"lessons": ["about v_proj"]}, "v_proj -> 1 lesson")
    assert call(instruments["candidates"]) == ({"plans": [WANDA]}, "4 -> 1 plan")
    assert call(instruments["candidates"], n=40) == ({"plans": [WANDA] * 9}, "40 -> 9 plans"), "as of 12"


def test_a_probe_answers_for_each_of_several_plans(instruments: dict[str, BaseTool]) -> None:
    impossible = {**WANDA, "adjustments": [{"selector": "*", "action": "bounds", "high": 0.1}]}
    mask = {"sparsity": 0.2, "recipe": {"method": "two-sided", "refit": False}}
    answer, shown = call(instruments["probe"], plans=[WANDA, impossible, mask], tokens=64)
    one, _ = call(instruments["probe"], plan=WANDA, tokens=64)
    found: Any = answer["plans"]
    assert found[0] == {"plan": "30.0% wanda:uniform", **one}
    assert list(found[1]) == ["plan", "error"] and "allow at most" in found[1]["error"]
    assert found[2]["plan"] == "20.0% two-sided:kappa" and found[2]["kl"] > 0
    assert shown == (
        f"30.0% wanda:uniform -> KL {one['kl']} on 64 tokens; 30.0% wanda:uniform · * ≤10% -> "
        f"{found[1]['error']}; 20.0% two-sided:kappa -> KL {found[2]['kl']} on 64 tokens"
    )
    assert call(instruments["probe"], plan=[WANDA], tokens=64)[0] == {"plans": found[:1]}, "a list as the plan"
    assert call(instruments["probe"], plans=WANDA, plan=None, tokens=64)[0] == {"plans": found[:1]}
    assert call(instruments["probe"], **WANDA, tokens=64)[0] == one, "what a plan is, without its name"


def test_what_plans_have_in_common_may_stand_beside_them(instruments: dict[str, BaseTool]) -> None:
    some, shared = {**WANDA, "alone": "blocks 1"}, {"alone": "blocks 1", "tokens": 64}
    found, shown = call(instruments["probe"], plans=[WANDA, {**WANDA, "alone": "blocks 0"}], **shared)
    assert found == call(instruments["probe"], plans=[some, {**WANDA, "alone": "blocks 0"}], tokens=64)[0]
    assert "· blocks 1 alone -> KL " in shown and "· blocks 0 alone -> KL " in shown
    assert call(instruments["probe"], plan=WANDA, **shared)[0] == call(instruments["probe"], plan=some, tokens=64)[0]


def test_a_probes_line_tells_of_groups_and_adjustments(instruments: dict[str, BaseTool]) -> None:
    protect = {"selector": "*.q_proj", "action": "protect"}
    _, shown = call(instruments["predict"], plan={**WANDA, "adjustments": [protect]})
    assert shown.startswith("30.0% wanda:uniform · *.q_proj protected -> ")
    _, shown = call(
        instruments["predict"],
        plan={"sparsity": 0.3, "recipe": {"method": "two-sided", "refit": False}},
    )
    assert shown.startswith("30.0% two-sided:kappa -> ")
    half = {"selector": "*.o_proj", "recipe": {"pattern": "2:4"}}
    answer, shown = call(instruments["predict"], plan={**WANDA, "groups": [half], "adjustments": [protect]})
    assert shown.startswith("30.0% wanda:uniform · wanda 2:4 in *.o_proj · *.q_proj protected -> ")
    assert {sparsity for name, (sparsity, _) in answer["groups"].items() if "o_proj" in name} <= {0.5}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("inspect_layers", {"selector": ""}, "at least 1 character"),
        ("predict", {"plan": {"sparsity": 45}}, "less than 1"),
        ("predict", {"plan": {**WANDA, "adjustments": [{"selector": "*", "action": "protect"}] * 65}}, "at most 64"),
        ("probe", {"plan": WANDA, "tokens": 0}, "greater than or equal to 1"),
        ("probe", {"tokens": 64}, "give a plan, or up to 4 plans"),
        ("probe", {"plan": WANDA, "plans": [WANDA]}, "give a plan, or up to 4 plans"),
        ("probe", {"plans": []}, "give a plan, or up to 4 plans"),
        ("probe", {"plan": WANDA, "layers": "blocks 1"}, "no argument and no lever of a plan is called 'layers'"),
        ("probe", {"plans": [WANDA] * 5}, "at most 4 items"),
        ("probe", {"plan": [WANDA, {"sparsity": 45}]}, "less than 1"),
        ("probe", {"plan": {"sparsity": 0.3, "group": []}}, "no lever of a plan is called 'group'"),
        ("predict", {"plans": [WANDA, {"sparsity": 0.3, "adjustment": []}]}, "is called 'adjustment'"),
        ("probe", {"plan": {"sparsity": 0.3, "new_texts": [{"name": "a"}]}}, "instruments know the texts there are"),
        ("history", {"n": 51}, "less than or equal to 50"),
        ("history", {"rounds": 3}, "no argument is called 'rounds'; there are: n"),
        ("recall", {"query": "x" * 201}, "at most 200 characters"),
        ("candidates", {"n": 0}, "greater than or equal to 1"),
    ],
)
def test_bad_arguments_of_a_planner(
    name: str, arguments: dict[str, object], problem: str, instruments: dict[str, BaseTool]
) -> None:
    with pytest.raises(ValidationError, match=problem):
        call(instruments[name], **arguments)


def test_selectors_and_bounds_are_checked(instruments: dict[str, BaseTool]) -> None:
    with pytest.raises(ImpossiblePlan, match="means no layer"):
        call(instruments["inspect_layers"], selector="*.nothing")
    bounds = {"selector": "*", "action": "bounds", "high": 0.1}
    with pytest.raises(ImpossiblePlan, match="allow at most"):
        call(instruments["probe"], plan={**WANDA, "adjustments": [bounds]})


def test_tools_are_described_shortly(instruments: dict[str, BaseTool]) -> None:
    described = [convert_to_openai_tool(tool)["function"] for tool in instruments.values()]
    assert len(json.dumps(described)) < 4_500, "a plan's schema is not sent once more for each tool"
    assert all("\n" not in function["description"] for function in described)
    assert Draft.model_validate({"sparsity": 0.3}).recipe.method == "refit"
    whole = {"sparsity": 0.3, "hypothesis": "h", "reason": "r", "reprofile": True, "new_texts": []}
    assert Draft.model_validate(whole) == Draft(sparsity=0.3), "a plan as it would be answered"
