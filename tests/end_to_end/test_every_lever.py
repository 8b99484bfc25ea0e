"""One run in which whoever answers by files uses every instrument and every lever of a run on one text; replayed.

Levers of several texts, `mix` and `new_texts`, are in test_goal.py and test_texts.py, `polish` is in test_polish.py.
"""

import json
import re
from pathlib import Path
from typing import Any

from graph.planning.plan import Plan
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import answering, read_events, read_state, read_summary, read_trials
from tools.plans.groups import GroupRecipe
from tools.plans.recipe import Recipe

MASKS = {"method": "two-sided", "refit": False, "curves": "mask"}
FINE = {"method": "refit", "refit_steps": 10, "gamma": "clipped", "damping": 0.2, "curves": "mask"}
GROUPS = [
    {"selector": "blocks 1 · *.down_proj", "recipe": {"pattern": "2:4"}},
    {"selector": "*.q_proj", "recipe": {"method": "wanda", "refit": True, "damping": 0.1, "statistics": "dense"}},
    {"selector": "*.k_proj", "recipe": {"gamma": "plain", "refit_steps": 3}},
]
CORRECTIONS = [
    {"selector": "*.v_proj", "action": "factor", "factor": 2, "reason": "values"},
    {"selector": "*.o_proj", "action": "bounds", "low": 0.1, "high": 0.6},
    {"selector": "blocks 0 · *.k_proj", "action": "protect"},
]
PLANS: list[dict[str, Any]] = [
    {
        **{
            "hypothesis": "KL below 0.2.",
            "sparsity": 0.3,
            "recipe": {**FINE, "strength": 0.9, "statistics": "sequential"},
        },
        **{"groups": GROUPS, "adjustments": CORRECTIONS, "reason": "All at once."},
    },
    {"sparsity": 0.45, "recipe": {**FINE, "statistics": "sequential"}, "reprofile": True},
    {"sparsity": 0.45, "recipe": {"method": "sparsegpt", "refit": True, "curves": "method", "allocation": "uniform"}},
    {"sparsity": 0.45, "recipe": {**MASKS, "allocation": "uniform"}},
]
LOOKS: list[list[dict[str, Any]]] = [
    [
        {"tool": "inspect_layers", "arguments": {"selector": "*.v_proj"}},
        {"tool": "candidates", "arguments": {"n": 2}},
        {"tool": "predict", "arguments": {"plans": [{"sparsity": 0.3, "recipe": MASKS}, {"sparsity": 0.45}]}},
        {
            "tool": "probe",
            "arguments": {"plans": [{"sparsity": 0.45, "recipe": MASKS}], "alone": "blocks 1", "tokens": 64},
        },
    ],
    [],
    [
        {"tool": "history", "arguments": {"n": 2}},
        {"tool": "recall", "arguments": {"query": "v_proj"}},
    ],
    [],
]
NOTE = {"text": "Fit what is left.", "trials": [1]}
LESSON = {
    **{"selector": "*.v_proj", "direction": "dearer", "multiplier": 1.5, "confidence": 0.8},
    "evidence": "The values took most of the sparsity.",
}


def answer(prompt: str) -> str:
    """What is said to a prompt: a look that was not taken in this round, or else its plan; or a lesson."""
    if reflected := re.findall(r"Reflect on round (\d+)\.", prompt):
        return json.dumps({"lessons": [LESSON] if reflected[-1] == "1" else [], "note": NOTE})
    round_ = int(re.findall(r"Plan round (\d+)\.", prompt)[-1]) - 1
    left = (look for look in LOOKS[round_] if f"<data tool {look['tool']}>" not in prompt)
    return f"I think first.\n{json.dumps(next(left, PLANS[round_]))}"


def test_the_script_uses_every_lever_and_every_instrument() -> None:
    recipe = {name for plan in PLANS for name in plan.get("recipe", {})}
    assert recipe == Recipe.model_fields.keys() - {"mix", "polish", "polish_tokens", "pattern"}
    of_groups = {name for group in GROUPS for name in group["recipe"]}  # type: ignore[attr-defined]
    assert of_groups == GroupRecipe.model_fields.keys() - {"mix"}
    levers = {name for plan in PLANS for name in plan}
    assert levers == Plan.model_fields.keys() - {"cut", "new_texts", "multipliers"}
    assert {str(x["action"]) for x in CORRECTIONS} == {"factor", "bounds", "protect"}


def test_every_lever_by_files_and_its_replay(flags: list[str], tmp_path: Path, command: Command) -> None:
    place = tmp_path / "exchange"
    agents = ("--planner", f"exchange:{place}", "--reflector", f"exchange:{place}")
    place.mkdir()
    with answering(place, answer):
        done = command(*flags, *agents, "--max-iterations", "4", "--tau", "9", "--patience", "9", "--no-memory")
    assert (done.code, done.err) == (0, "")
    run = tmp_path / "runs" / "run"
    asked = [event["tool"] for event in read_events(run, "tool")]
    assert asked == [look["tool"] for looks in LOOKS for look in looks]
    answers = [json.loads(event["answer"]) for event in read_events(run, "tool")]
    assert not [told for told in answers if "error" in told]
    trials = read_state(run).trials
    assert [trial.plan for trial in trials] == [event["plan"] for event in read_events(run, "plan")]
    assert [trial.sparsity for trial in trials[1:]] == [trials[-1].sparsity] * 3
    (later,) = [x for x in sorted(place.glob("*.prompt.md")) if "Plan round 2." in x.read_text()][:1]
    assert "Fit what is left." in later.read_text(), "the reflector's note"
    assert sum("I think first." in prompt.read_text() for prompt in place.glob("*.prompt.md")) >= len(asked)
    replayed = command("--replay", "run", "--name", "again")
    assert (replayed.code, replayed.err) == (0, "")
    again = tmp_path / "runs" / "again"
    assert read_trials(again) == read_trials(run)
    assert read_summary(again)["mask_sha256"] == read_summary(run)["mask_sha256"]
