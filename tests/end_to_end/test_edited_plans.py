"""A plan that a person edits in the state, in Studio say: examined, logged where it is carried out, and replayed."""

from pathlib import Path
from typing import Any

import pytest

from graph.planning.plan import Plan
from graph.state import UnreadableState
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    SAVE,
    TINY,
    Halt,
    fork,
    read_events,
    read_run_config,
    read_state,
    read_trials,
)
from tests.end_to_end.test_approve import APPROVE, PROMPT, Say, decisions, say
from tests.end_to_end.test_forks import fork_before, forks, opened
from tools.plans.recipe import Recipe

assert say

MINE = Plan(sparsity=0.35, recipe=Recipe(method="wanda", refit=False, allocation="uniform"), reason="mine")


@pytest.fixture
def run(flags: list[str], tmp_path: Path, command: Command) -> Path:
    """A run that was killed when its second round was planned."""
    assert fork(tmp_path, *flags, halt=Halt("prune", "graph.nodes.prune:settle_plan", 2)).finish().code == -9
    return tmp_path / "runs" / "run"


def edit(run: Path, values: dict[str, Any], after: str = "plan") -> None:
    """As a person does in Studio before the next node."""
    with opened(run) as (app, settings):
        app.update_state(settings, values, as_node=after)


def test_an_edited_plan_is_logged_where_it_is_carried_out_and_a_replay_takes_it(run: Path, command: Command) -> None:
    planned = read_events(run, "plan")[-1]
    edit(run, {"plan": MINE})
    resumed = command("--resume", "run")
    assert (resumed.code, resumed.err) == (0, "")
    logged = [event for event in read_events(run, "plan") if event["iteration"] == 2]
    assert [event["planner"] for event in logged] == ["heuristic", "you"]
    assert logged[0] == planned and logged[1]["details"] == MINE.model_dump()
    trial, state = read_state(run).trials[1], read_state(run)
    assert (trial.plan, trial.order) == ("35.0% wanda:uniform", logged[1]["order"])
    replayed = command("--replay", "run", "--name", "again")
    assert (replayed.code, replayed.err) == (0, "")
    assert "note: the masks are those of run run " in replayed.out and "parting" not in replayed.out
    assert read_trials(run.parent / "again") == read_trials(run)
    assert state.order != "" and len(logged) == len({event["order"] for event in logged})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ", which are another plan's"),
        ({"adjustments": [{"selector": "*.nothing", "action": "protect"}]}, ", and cannot be carried out: selector "),
    ],
)
def test_a_plan_edited_once_its_weights_are_there_is_no_trial_of_them(
    changes: dict[str, Any], why: str, flags: list[str], tmp_path: Path, command: Command
) -> None:
    halt = Halt("validate", "graph.nodes.validate:find_kept", 2)
    assert fork(tmp_path, *flags, halt=halt).finish().code == -9
    run = tmp_path / "runs" / "run"
    edit(run, {"plan": {**MINE.model_dump(), **changes}}, after="prune")
    resumed = command("--resume", "run")
    assert (resumed.code, resumed.err) == (0, "")
    trial = read_state(run).trials[1]
    assert (trial.verdict, trial.broken, trial.kl) == ("rollback", True, None)
    assert trial.reason.startswith(f"the plan was edited behind the making of its weights{why}")
    assert not [event for event in read_events(run, "lesson") if event["iteration"] == 2]


def test_an_edit_weighs_what_the_lessons_say_as_any_plan_does(run: Path, command: Command) -> None:
    plan = Plan(sparsity=0.35, recipe=Recipe(method="two-sided", refit=False), reason="mine")
    lesson = read_state(run).lessons[-1].model_copy(update={"selector": "*.v_proj", "factor": 3.0, "curves": "mask"})
    edit(run, {"plan": plan, "lessons": [lesson]})
    assert command("--resume", "run").code == 0
    logged = read_events(run, "plan")[2]
    assert (logged["planner"], list(logged["details"]["multipliers"])) == ("you", ["*.v_proj"])
    assert read_state(run).trials[1].plan == logged["plan"]


def test_a_fork_with_an_edited_plan_is_replayed_as_it_was(flags: list[str], tmp_path: Path, command: Command) -> None:
    assert command(*flags).code == 0
    run = tmp_path / "runs" / "run"
    with opened(run) as (app, settings):
        edited = fork_before(app, settings, "prune", 2, {"plan": MINE.model_dump()}, "plan")
        app.invoke(None, edited, context=read_run_config(run), durability="sync")
    (forked,) = forks(run)
    logged = [event["planner"] for event in read_events(forked, "plan") if event["iteration"] == 2]
    assert logged == ["heuristic", "you"]
    replayed = command("--replay", forked.name, "--name", "again")
    assert f"note: the masks are those of run {forked.name} " in replayed.out and "parting" not in replayed.out


BAD = {
    "texts that nobody writes": (
        {"new_texts": [{"name": "sql", "prompts": ["SELECT", "INSERT", "UPDATE"], "weight": 1}]},
        "new_texts were written when the plan was made; leave them as they are, and change recipe.mix",
    ),
    "above the target": ({"sparsity": 0.9}, "sparsity 0.9 is above the target; plan at most 0.45"),
    "no layer": (
        {"adjustments": [{"selector": "*.nothing", "action": "protect"}]},
        "selector '*.nothing' means no layer; ",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_an_edit_that_cannot_be_is_asked_for_again_and_nothing_is_pruned(
    bad: str, run: Path, command: Command, say: Say
) -> None:
    changes, problem = BAD[bad]
    index = (run / "artifacts" / "index.jsonl").read_bytes()
    edit(run, {"plan": {**MINE.model_dump(), **changes}})
    stopped = command("--resume", "run")
    assert (stopped.code, stopped.err) == (1, "")
    line = stopped.out.splitlines()[-2]
    assert line.startswith(
        "stopped: plan 2 waits for a person to accept, edit or refuse it, for it cannot be carried out as it was "
        f"edited: {problem}"
    )
    assert line.endswith("; resume in a terminal, or answer in Studio")
    assert (run / "artifacts" / "index.jsonl").read_bytes() == index
    say("accept", '{"sparsity": 0.4, "adjustments": [], "new_texts": []}')
    resumed = command("--resume", "run")
    assert (resumed.code, resumed.err) == (0, "")
    assert resumed.out.count(PROMPT) == 2
    assert f"  that cannot be used: it cannot be carried out as it is: {problem}" in resumed.out
    assert decisions(run) == [(2, "edit", "")]
    assert read_events(run, "plan")[2]["planner"] == "you" and read_state(run).trials[1].plan == "40.0% wanda:uniform"
    replayed = command("--replay", "run", "--name", "again")
    assert "note: the masks are those of run run " in replayed.out and "parting" not in replayed.out


def test_a_bad_edit_may_be_refused_and_the_replay_refuses_it(run: Path, command: Command, say: Say) -> None:
    edit(run, {"plan": {**MINE.model_dump(), "sparsity": 0.9}})
    say("refuse I was wrong")
    resumed = command("--resume", "run")
    assert (resumed.code, resumed.err) == (0, "")
    refused = read_state(run).trials[1]
    assert (refused.verdict, refused.reason, refused.measured) == ("refuse", "I was wrong", False)
    replayed = command("--replay", "run", "--name", "again")
    assert "note: the masks are those of run run " in replayed.out and "parting" not in replayed.out
    again = [(trial.verdict, trial.reason) for trial in read_state(run.parent / "again").trials]
    assert again == [(trial.verdict, trial.reason) for trial in read_state(run).trials]


def test_an_edit_before_a_person_is_asked_is_shown_with_what_is_wrong(
    tiny_llama: Path, tmp_path: Path, command: Command, say: Say
) -> None:
    run = tmp_path / "runs" / "run"
    assert command("--name", "run", "--model", str(tiny_llama), *TINY, *APPROVE).code == 1
    edit(run, {"plan": {**MINE.model_dump(), "sparsity": 0.9}})
    stopped = command("--resume", "run")
    assert stopped.code == 1 and "edited: sparsity 0.9 is above the target; plan at most 0.45; resume" in stopped.out
    edit(run, {"plan": MINE.model_dump()})
    say("accept", "refuse enough", *["accept"] * 5)
    resumed = command("--resume", "run")
    assert (resumed.code, resumed.err) == (0, "")
    assert "plan 1: 35.0% wanda:uniform\n" in resumed.out
    assert [event["planner"] for event in read_events(run, "plan")[:2]] == ["heuristic", "you"]
    assert decisions(run)[:2] == [(1, "accept", ""), (2, "refuse", "enough")]
    assert read_state(run).trials[0].plan == "35.0% wanda:uniform"


def test_what_is_no_state_is_told_in_one_line(run: Path, command: Command) -> None:
    said = "the run's state was edited to what it cannot be (plan.sparsity: input should be less than 1, not '1.5')"
    for after in ("plan", "accept", "profile"):
        with pytest.raises(UnreadableState) as caught:
            edit(run, {"plan": {**MINE.model_dump(), "sparsity": 1.5}}, after)
        assert str(caught.value) == f"{said}; edit it again"
    assert read_state(run).plan == Plan.model_validate(read_events(run, "plan")[-1]["details"]), "nothing is changed"
    with opened(run) as (app, settings):
        saved = app.checkpointer.get_tuple(settings)
        whole = saved.checkpoint["channel_values"]["plan"]
        for plan in ({**MINE.model_dump(), "sparsity": 1.5}, whole):
            saved.checkpoint["channel_values"]["plan"] = plan
            app.checkpointer.put(saved.parent_config, saved.checkpoint, saved.metadata, {})
            if plan is not whole:
                refused = command("--resume", "run")
    assert (refused.code, refused.err) == (2, f"error: run 'run' cannot go on: {said}; edit it again\n")
    assert command("--resume", "run").code == 0


def test_an_edited_plan_that_is_killed_is_logged_once(run: Path, tmp_path: Path, command: Command) -> None:
    edit(run, {"plan": MINE})
    for halt in (Halt("prune", "tools.workbench.layer_pruning:LayerPruner.compute", 3), Halt("prune", SAVE)):
        assert fork(tmp_path, "--resume", "run", halt=halt).finish().code == -9
    assert command("--resume", "run").code == 0
    assert [event["planner"] for event in read_events(run, "plan") if event["iteration"] == 2] == ["heuristic", "you"]
