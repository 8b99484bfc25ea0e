"""What a reflector is shown of a trial that took parts away, and what it may say."""

from dataclasses import replace
from typing import Any

import pytest

from graph.config import RunConfig
from graph.llm.ladder import AgentError
from graph.llm.models import open_model
from graph.planning.plan import Plan
from graph.planning.table import describe_parts
from graph.reflecting.brief import reflect_with_chat, reflector_messages, take_note
from graph.reflecting.rule import Evidence, combine_lessons
from graph.reflecting.schema import Note
from tests.evidence import learnt, make_evidence
from tests.openai_server import OpenAIServer
from tests.parts import make_parts
from tests.situations import make_trial
from tools.plans.cuts import Cutting

CONFIG = RunConfig(target_size=0.8).model_copy(update={"target_sparsity": 0.3})


def make_cut_evidence(**changes: Any) -> Evidence:
    """A second cut at the target, beside one that was kept."""
    told = {"recipe": None, "plan": "30% cut · heads 1, neurons 8", "kl": 0.2, "predicted_kl": 0.1}
    before = make_trial(1, "accept", 0.3, make_evidence().recipe).model_copy(update=told | {"kl": 0.25})
    trial = make_trial(2, "rollback", 0.3, make_evidence().recipe).model_copy(update=told)
    nothing = {"layers": (), "sparsity": {}, "before_sparsity": {}, "lessons": (), "measured": None}
    plan = Plan(sparsity=0.3, cut=Cutting(heads=1), reason="One group fewer.", hypothesis="KL below 0.2.")
    evidence = make_evidence(config=CONFIG, plan=plan, trial=trial, before=before, trials=[before], parts=make_parts())
    return replace(evidence, **(nothing | changes))


def test_it_is_shown_the_parts_and_what_came_of_the_cut() -> None:
    evidence = make_cut_evidence()
    system, human = (message.text for message in reflector_messages(evidence))
    for told in (
        describe_parts(make_parts()),
        "plan: 30% cut · heads 1, neurons 8\nreason: One group fewer.\nexpected: KL below 0.2.",
        "KL 0.2 +- ",
        "round 1: 30% cut · heads 1, neurons 8; sparsity 0.3;",
        "Round 2 of at most 8. The target sparsity 0.3 is reached. Rounds without an improvement: 1; the run ends by ",
    ):
        assert told in human
    assert "lesson" not in human and "groups of layers" not in human
    assert "whole parts of it were taken away" in system and "veto" not in system and "reprofile" not in system


def test_it_writes_notes_and_may_stop_and_draws_no_lessons() -> None:
    evidence, problems = make_cut_evidence(), list[str]()
    said = {"note": {"text": "Heads go last.", "trials": [1, 2]}, "stop": True, "reason": "Nothing helps."}
    with OpenAIServer(
        [said | {"lessons": [learnt("*.v_proj")]}, said | {"note": said["note"] | {"trials": [7]}}, said]
    ) as server:
        model = open_model(server.planner("model"), RunConfig(agent_retries=0))
        reflection = reflect_with_chat(evidence, model, lambda call: problems.append(call.problem))
    assert problems[0].startswith("lessons: ") and problems[2] == ""
    assert problems[1] == "note.trials: round 7 of this run measured nothing; its measured rounds: 1, 2"
    assert (reflection.stop, reflection.reason, reflection.lessons) == (True, "Nothing helps.", [])
    note = take_note(evidence, reflection)
    assert note == Note(
        run="run", iteration=2, sparsity=0.3, pattern="", cuts=True, text="Heads go last.", trials=[1, 2]
    )
    assert combine_lessons(evidence, reflection) == []
    assert "by rounds 1, 2: Heads go last." in reflector_messages(make_cut_evidence(notes=[note]))[1].text


def test_nothing_usable_is_an_error() -> None:
    with OpenAIServer([{"veto": True}]) as server:
        model = open_model(server.planner("model"), RunConfig(agent_retries=0))
        with pytest.raises(AgentError):
            reflect_with_chat(make_cut_evidence(), model)
