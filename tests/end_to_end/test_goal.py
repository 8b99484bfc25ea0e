"""A goal in words, from a chat model or a person to the report: fixed for the run, replayed, resumed after a kill."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    TINY,
    Halt,
    assert_same_weights,
    fork,
    read_events,
    read_run_config,
    read_state,
    read_summary,
    read_trials,
    run_here,
)
from tests.end_to_end.test_approve import Terminal
from tests.named import write_texts
from tests.openai_server import OpenAIServer
from tools.workbench.written import Author

pytestmark = pytest.mark.figures

GOAL = "The calls must stay as they are; the prose may go."
BRIEF: dict[str, Any] = {
    "reason": "code stands for the calls.",
    "aims": [{"name": "code", "weight": 3, "max_rise": 9}, {"name": "prose", "weight": 0}],
    "probes": ["alpha();\nbeta();\n"],
}
PLAN: dict[str, Any] = {"sparsity": 0.45, "reason": "To the target."}


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """What a planner says that reads the goal."""
    return BRIEF if "The goal:\n<data goal>" in body["messages"][1]["content"] else PLAN


def flags(model: Path, texts: Path, *more: str) -> list[str]:
    named = [flag for name, source in write_texts(texts).items() for flag in ("--text", f"{name}={source}")]
    return ["--name", "run", "--model", str(model), *TINY, "--tau", "9", *named, "--goal", GOAL, *more]


def test_a_goal_from_words_to_report_killed_resumed_and_replayed(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    run, more = tmp_path / "runs" / "run", ("--max-iterations", "2", "--check-weights")
    with OpenAIServer(answer) as server:
        given = flags(tiny_llama, tmp_path, "--planner", server.planner("m"), *more)
        assert command(*given).code == 0
        asked = [request.messages[1]["content"] for request in server.requests]
        halted = fork(tmp_path, *given, "--runs-dir", "killed", halt=Halt("brief", "graph.nodes.brief:follow_brief"))
        assert halted.finish().code < 0
        before = len(server.requests)
        assert run_here("--resume", "run", "--runs-dir", "killed") == 0
        resumed = [request.messages[1]["content"] for request in server.requests[before:]]
    assert not any("The goal:\n<data goal>" in question for question in resumed), "the answer was kept"
    assert read_trials(tmp_path / "killed" / "run") == read_trials(run)
    assert_same_weights(tmp_path / "killed" / "run", run)

    (told,) = read_events(run, "brief")
    assert told["line"] == "code 100% (at most +900%), prose 0%" and told["planner"].startswith("openai:m@")
    state = read_state(run)
    assert state.config.text_weights == {"code": 3, "prose": 0} and state.config.text_bounds == {"code": 9}
    assert read_run_config(run).text_weights == {}, "the file says what the run was started with"
    assert "Texts and their weights: code 1.00, prose 0.00;" in asked[1] and GOAL in asked[1]
    trials, summary = read_events(run, "trial"), read_summary(run)
    assert [trial["iteration"] for trial in trials][:2] == [0, 1]
    assert all(trial["kl"] == trial["texts"][0]["kl"] for trial in trials[1:])
    assert summary["goal"] == {
        "words": GOAL,
        "line": told["line"],
        "reason": BRIEF["reason"],
        "bounds": {"code": 9},
    }
    assert [text["weight"] for text in summary["texts"]] == [1, 0]
    assert [sample["prompt"] for sample in summary["samples"]][-1] == BRIEF["probes"][0]
    check_weightings(run, summary)
    for name in ("report.md", "model/README.md"):
        assert f"## Goal\n> {GOAL}\n\nIt came to: code 100% (at most +900%), prose 0%." in (run / name).read_text()
    assert f"The goal: “{GOAL}” It came to code 100%" in (run / "report.html").read_text()

    assert command("--replay", "run", "--name", "again").code == 0
    assert read_trials(tmp_path / "runs" / "again") == read_trials(run)
    assert read_events(tmp_path / "runs" / "again", "brief")[0]["details"] == told["details"]


def check_weightings(run: Path, summary: dict[str, Any]) -> None:
    """The kept weights, all texts alike, and the heaviest text left out: in figures, words and both reports."""
    kept, alike, without = summary["weightings"]
    assert [x["weights"] for x in (kept, alike, without)] == [
        {"code": 1, "prose": 0},
        {"code": 0.5, "prose": 0.5},
        {"code": 0, "prose": 1},
    ]
    assert [x["kl"] for x in kept["texts"]] == [x["kl"] for x in summary["texts"]]
    for other in (alike, without):
        for text, own in zip(other["texts"], kept["texts"], strict=True):
            assert text["change"] == pytest.approx(text["kl"] - own["kl"], abs=1e-9) and text["change_error"] > 0
    assert without["texts"][0]["change"] > 0 > without["texts"][1]["change"]
    notes = [event["text"] for event in read_events(run, "note")]
    assert sum(note.startswith("by weights code 0%, prose 100%: code KL ") for note in notes) == 1
    code, prose = (f"{x['kl']:.4f} ({x['change']:+.4f} ± {x['change_error']:.4f})" for x in without["texts"])
    assert f"| code 0%, prose 100% | {code} | {prose} |" in (run / "report.md").read_text()
    page = (run / "report.html").read_text()
    assert "code 100%, prose 0% (kept)</th>" in page and f"code 0%, prose 100%</th><td>{code}</td>" in page


@pytest.mark.usefixtures("raw_gamma")
def test_a_person_edits_what_was_made_of_a_goal_and_a_bound_rolls_back(
    tiny_llama: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "run"
    given = flags(tiny_llama, tmp_path, "--approve", "goal", "--max-iterations", "1")
    stopped = command(*given)
    assert stopped.code == 1
    assert "what was made of the goal waits for a person to accept or edit it: resume in a terminal, or" in stopped.out
    aims = [{"name": "code", "weight": 1}, {"name": "prose", "weight": 1, "max_rise": 1e-9}]
    lines = [json.dumps({"aims": aims[:1]}), json.dumps({"aims": aims})]
    monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{line}\n" for line in lines)))
    done = command("--resume", "run")
    assert done.code == 0
    assert "that cannot be used: aims have none for 'prose'; a weight of 0 lets it go\n" in done.out
    assert "because: every text as the config weighs it: no words are read by a rule\n" in done.out
    (told,) = read_events(run, "brief")
    assert told["planner"] == "you" and told["details"]["aims"] == [aims[0] | {"max_rise": None}, aims[1]]
    (trial,) = read_events(run, "trial")[1:]
    assert trial["verdict"] == "rollback" and trial["reason"].startswith("perplexity on prose ")
    assert ", where 1e-09 is the bound, although perplexity " in trial["reason"]


def test_a_planner_has_the_model_write_text_for_its_goal(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "runs" / "run"
    new = {"name": "tales", "prompts": ["alpha beta", "gamma delta", "once more"]}
    brief = {**BRIEF, "new_texts": [new], "aims": [*BRIEF["aims"], {"name": "tales", "weight": 1}]}
    with OpenAIServer(lambda body: brief if answer(body) is BRIEF else PLAN) as server:
        given = flags(tiny_llama, tmp_path, "--planner", server.planner("m"), "--max-iterations", "1")
        assert command(*given, "--goal-tokens", "100000").code == 0
    texts = read_summary(run)["texts"]
    assert [(text["name"], text["weight"]) for text in texts] == [("code", 0.75), ("prose", 0.0), ("tales", 0.25)]
    assert texts[2]["source"] == "self:alpha beta | gamma delta | once more" and texts[2]["kl"] > 0


NEW = {"name": "tales", "prompts": ["alpha beta", "gamma delta", "once more"], "weight": 1}


def plan_in_turn(body: dict[str, Any]) -> dict[str, Any]:
    """To the target, then fitted to a text of its own as well."""
    if (said := answer(body)) is BRIEF or "Plan round 1." in body["messages"][1]["content"]:
        return said
    return {**PLAN, "new_texts": [NEW], "reason": "Tales hold it together."}


def test_a_plan_is_fitted_to_a_text_that_the_model_writes_for_it_killed_resumed_and_replayed(
    tiny_llama: Path, tmp_path: Path, command: Command
) -> None:
    run, more = tmp_path / "runs" / "run", ("--max-iterations", "2", "--goal-tokens", "100000")
    with OpenAIServer(plan_in_turn) as server:
        given = flags(tiny_llama, tmp_path, "--planner", server.planner("m"), *more)
        assert command(*given).code == 0
        prompts = [request.messages for request in server.requests]
        halt = Halt("plan", "graph.nodes.plan:measure_dense")
        assert fork(tmp_path, *given, "--runs-dir", "killed", halt=halt).finish().code < 0
        assert run_here("--resume", "run", "--runs-dir", "killed") == 0
    assert read_trials(tmp_path / "killed" / "run") == read_trials(run)
    assert_same_weights(tmp_path / "killed" / "run", run)

    assert "new_texts" in prompts[1][0]["content"] and "`new_texts`: " in prompts[1][1]["content"]
    state, (_, first, second) = read_state(run), read_events(run, "trial")
    assert [text.name for text in state.written] == ["tales"]
    assert state.config.text["tales"] == "self:alpha beta | gamma delta | once more"
    assert state.config.text_weights == {"code": 3, "prose": 0, "tales": 0}, "it counts nothing in what is judged"
    assert [text["name"] for text in first["texts"]] == ["code", "prose"]
    assert [(text["name"], text["weight"]) for text in second["texts"]] == [("code", 1), ("prose", 0), ("tales", 0)]
    assert second["kl"] == second["texts"][0]["kl"] and second["texts"][2]["kl"] > 0
    assert second["recipe"]["mix"] == {"code": 0.5, "tales": 0.5}
    notes = [event["text"] for event in read_events(run, "note")]
    assert notes.count("the model writes tales for this plan, and is profiled once more with it") == 1
    assert first["change_error"] is None or first["change_error"] >= 0
    assert second["change_error"] is not None, "beside the accepted weights, measured on the same texts"

    assert command("--replay", "run", "--name", "again").code == 0
    assert read_trials(tmp_path / "runs" / "again") == read_trials(run)
    assert_same_weights(tmp_path / "runs" / "again", run)
    assert not [e for e in read_events(tmp_path / "runs" / "again", "warning") if "parts from" in e["text"]]


def write_nothing_new(_author: Author, _split: str, _prompts: Sequence[str], tokens: int) -> list[int]:
    """The same words in every split."""
    return (list(range(1, 200)) * tokens)[:tokens]


@pytest.mark.parametrize(
    ("patched", "by", "said"),
    [
        ("tools.workbench.written.take_fresh", lambda document, said: False, "came out degenerate: "),
        (
            "tools.workbench.written.Author.__call__",
            write_nothing_new,
            "the tales calibration and tales validation texts overlap",
        ),
    ],
)
def test_a_text_that_is_of_no_use_is_a_round_that_broke(
    patched: str,
    by: Any,
    said: str,
    tiny_llama: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patched, by)
    run = tmp_path / "runs" / "run"
    with OpenAIServer(plan_in_turn) as server:
        given = flags(tiny_llama, tmp_path, "--planner", server.planner("m"), "--max-iterations", "2")
        assert command(*given, "--goal-tokens", "100000").code == 0
    broke = read_events(run, "trial")[2]
    assert broke["broken"] and said in broke["reason"] and broke["verdict"] == "rollback"
    state = read_state(run)
    assert state.written == [] and "tales" not in state.config.text, "the run is as it was before"
    assert command("--replay", "run", "--name", "again").code == 0
    assert read_trials(tmp_path / "runs" / "again") == read_trials(run)
